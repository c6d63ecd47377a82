"""llama.cpp's logits of the GGUF files in a folder: `python -m architectures.llama_cpp FOLDER OUT`, in the peers'
virtual environment. OUT becomes a JSON document: name of the file → `files.kept` of its logits."""

import json
import sys
from pathlib import Path

from peers.engines import LlamaCpp

from .files import IDS, kept

F32 = 0  # ggml's number of this type


class Float32(LlamaCpp):
    """llama.cpp with a KV cache in float32."""

    def _parameters(self, job: dict):
        parameters = super()._parameters(job)
        parameters.type_k = parameters.type_v = F32
        return parameters


def main(folder: str, out: str) -> None:
    result = {}
    for path in sorted(Path(folder).glob("*.gguf")):
        # Longer than the original context of the models with factors for long ones.
        job = {"path": str(path), "context": 512, "threads": 1, "options": {"flash_attention": False}}
        result[path.stem] = kept(Float32(job).logits([IDS]))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
