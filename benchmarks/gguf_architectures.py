"""llama.cpp's logits of tiny GGUF files of every architecture that mlx-lm computes, for tests/test_gguf_foreign.py.

Makes the headers of the files with llama.cpp's own converter from models of transformers, fills the files with seeded
weights, and keeps what llama.cpp computes (float32 weights and KV cache, one thread). Then it prints how far mlxeff is
from it. `--save` writes both to results/; it takes minutes, most of them to install the peers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import saving
from architectures import files
from architectures.configs import MODELS
from peers.install import LLAMA_VERSION, install, pip, unpack
from places import HERE, RESULTS, work_folder

RESULT = RESULTS / "llama-cpp-gguf-architectures.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=work_folder("peers"), help="folder of the peers' environment")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name} to results/")
    options = parser.parse_args()
    peers = [install(name, options.work) for name in ("torch", "llama.cpp")]
    if missing := [peer.engine for peer in peers if not peer.present or peer.engine == "xllamacpp"]:
        sys.exit(f"gguf_architectures: wanted torch and llama.cpp from source, got no {', '.join(missing)}")
    pip(options.work, "torch", ["install", "sentencepiece", "gguf"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        headers = run(peers[0].python, "architectures.headers", unpack(options.work) / "vendor/llama.cpp", folder)
        for variant, header in headers.items():
            files.write(header, folder / f"{variant}.gguf", more={"tokenizer.ggml.model": "none"})
        logits = run(peers[1].python, "architectures.llama_cpp", folder, folder)
        document = {"llama.cpp": LLAMA_VERSION, "variants": {name: headers[name] | logits[name] for name in MODELS}}
        report(document["variants"], folder)
    if options.save:
        saving.write_text(json.dumps(document, separators=(",", ":")) + "\n", RESULT)


def run(python: str, module: str, source: Path, folder: Path) -> dict:
    """The JSON document that a module writes in the peers' environment."""
    out = folder / f"{module}.json"
    subprocess.run([python, "-m", module, str(source), str(out)], cwd=HERE, check=True)
    return json.loads(out.read_text())


def report(variants: dict, folder: Path) -> None:
    """Print how far mlxeff's logits are from llama.cpp's, in standard deviations, and on how many tokens the first
    choices agree."""
    import mlx.core as mx

    from mlxeff.assembly.model import load_model

    for name, variant in variants.items():
        model, _ = load_model(folder / f"{name}.gguf")
        got = files.kept(np.array(model(mx.array([files.IDS]), model.new_cache())[0].astype(mx.float32)))
        distance = np.abs(np.array(got["logits"]) - np.array(variant["logits"])).max()
        same = sum(a == b for a, b in zip(got["choices"], variant["choices"], strict=True))
        print(f"{name:16} {distance:.1e} of a standard deviation, {same} of {len(files.IDS)} first choices")


if __name__ == "__main__":
    main()
