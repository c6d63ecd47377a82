"""Record what llama.cpp makes of the GGUF files of the compatibility test bed (tests/compat), for tests/test_compat.py.

    python benchmarks/compat_llama_cpp.py [--cache FOLDER]

Writes the files into a temporary folder, and llama.cpp's ids of prompts, greedy answers and logits to
tests/compat/llama_cpp.json. Run it when the bed's dimensions or its generator have changed. llama.cpp is compiled the
first time, some minutes.
"""

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from mlxeff.errors import MlxeffError
from peers.install import LLAMA_VERSION, install
from places import TESTS, work_folder
from quality import process

TOKENS = 40  # of an answer at most
LOGITS = list(range(0, 300, 20))  # ids whose logits after the prompt are recorded
WRITERS = ("gguf", "sentencepiece", "tokenizers", "numpy")  # libraries on which the files' bytes depend


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=work_folder("peers"), help="default %(default)s")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from compat import bed, cases

    options.cache.mkdir(parents=True, exist_ok=True)
    peer = install("llama.cpp", options.cache)
    if peer.engine != "llama.cpp":
        raise MlxeffError(f"llama.cpp: wanted its own bindings, got {peer.engine or 'nothing'}: {peer.how}")
    chosen = [case for case in cases.covering() if case.container == "gguf"]
    with tempfile.TemporaryDirectory() as folder:
        made = [bed.prepare(Path(folder, str(i)), case) for i, case in enumerate(chosen)]
        files = [{"path": str(each.path), "prompt": bed.PROMPT, "chat": each.chats[1][1]} for each in made]
        task = {"files": files, "tokens": TOKENS, "logits": LOGITS}
        found = process.run("peers.answers", task, 600, peer.python)["files"]
        hashes = [bed.digest(each.path) for each in made]
    records = {str(case): {"sha256": sha256, **each} for case, sha256, each in zip(chosen, hashes, found, strict=True)}
    writers = {name: version(name) for name in WRITERS}
    lines = {"llama_cpp_python": LLAMA_VERSION, "writers": writers, "logits_of": LOGITS, "cases": records}
    bed.write_records(lines)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MlxeffError as error:
        sys.exit(f"compat_llama_cpp: {error}")
