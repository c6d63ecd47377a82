"""Tiny models through llama.cpp's own converter: `python -m architectures.headers SOURCE OUT`, in the peers' virtual
environment. SOURCE is llama.cpp's source tree; OUT becomes a JSON document: variant → metadata and shapes."""

import json
import sys
import tempfile
from pathlib import Path

from .configs import MODELS, SIZES


def main(source: str, out: str) -> None:
    sys.path[:0] = [source, f"{source}/gguf-py"]
    headers = {name: header(kind, SIZES | entries) for name, (kind, entries) in MODELS.items()}
    Path(out).write_text(json.dumps(headers))


def header(kind: str, entries: dict) -> dict:
    """The metadata and the tensors of the file that the converter makes of a model with these entries of the config."""
    import conversion
    import gguf
    import torch
    from conversion.base import ModelBase
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **entries)).save_pretrained(folder)
        vocabulary = {f"token {i}": i for i in range(entries["vocab_size"])}
        tokenizer = {"model": {"type": "BPE", "merges": [], "vocab": vocabulary}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        config = entries | ModelBase.load_hparams(folder, False)
        (folder / "config.json").write_text(json.dumps(config))
        convert(conversion.get_model_class(config["architectures"][0]), config, folder, gguf)
        file = gguf.GGUFReader(folder / "model.gguf")
        keys = {key: field.contents() for key, field in file.fields.items() if key not in ("general.name",)}
        own = {key: value for key, value in keys.items() if not key.startswith(("GGUF.", "tokenizer.", "general."))}
        own["general.architecture"] = keys["general.architecture"]
        return {"metadata": own, "tensors": {tensor.name: tensor.shape[::-1].tolist() for tensor in file.tensors}}


def convert(base: type, config: dict, folder: Path, gguf: object) -> None:
    """llama.cpp's conversion of the folder to model.gguf, without a tokenizer: the size of the vocabulary is in the
    metadata instead."""

    class Converter(base):
        model_arch = base.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            if f"{self.gguf_writer.arch}.vocab_size" not in self.gguf_writer.kv_data[0]:
                self.gguf_writer.add_vocab_size(config["vocab_size"])

    Converter(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf", hparams=config).write()


if __name__ == "__main__":
    main(*sys.argv[1:])
