"""What stands beside the weights in a converted folder: config.json with its provenance, and the tokenizer's files.

File names: Hugging Face's. Knows nothing of tensors.
"""

import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..checkpoint import Source
from ..errors import MlxeffError
from ..names import json_text
from ..tokenizer import Tokenizer, from_folder, from_gguf
from .plan import Options

FORMAT_VERSION = 1
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these makes a tokenizer
COMPANIONS = (
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder with further ones
# For OpenELM, whose release has no tokenizer: what stock mlx-lm needs beside Llama 2's tokenizer.model.
LLAMA_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
}


@dataclass(frozen=True)
class TokenizerFiles:
    """The files to copy; or, for a GGUF file without any, the tokenizer in its metadata."""

    files: tuple[Path, ...]
    metadata: bool = False

    @property
    def found(self) -> list[str]:
        return ["built from the GGUF metadata"] if self.metadata else [str(self.target(file)) for file in self.files]

    @staticmethod
    def target(file: Path) -> Path:
        """Where a file belongs in the converted folder."""
        return Path(TEMPLATES, file.name) if file.parent.name == TEMPLATES else Path(file.name)


def find_tokenizer(source: Source, tokenizer: str | Path | None) -> TokenizerFiles:
    """The tokenizer's files in `tokenizer`, a folder or file (None: beside the weights). Raises MlxeffError."""
    place = Path(tokenizer) if tokenizer else source.path if source.path.is_dir() else source.path.parent
    if tokenizer and place.is_file():
        return TokenizerFiles((place,))
    if source.format == "gguf" and not tokenizer:
        return TokenizerFiles((), "tokenizer.ggml.tokens" in source.metadata)
    files = tuple(place / name for name in (*VOCABULARIES, *COMPANIONS) if (place / name).is_file())
    files += tuple(sorted((place / TEMPLATES).glob("*.jinja")))
    found = any(file.name in VOCABULARIES for file in files)
    if tokenizer and not found:
        raise MlxeffError(f"{place}: no tokenizer: looked for {', '.join(VOCABULARIES)}")
    return TokenizerFiles(files if found else ())


def calibration_tokenizer(source: Source, tokens: TokenizerFiles, config: dict) -> Tokenizer:
    """The tokenizer that the converted folder will have, to read a calibration text with. Raises MlxeffError where it
    will have none."""
    if tokens.metadata:
        return from_gguf(source.metadata, str(source.path))
    if not tokens.files:
        raise MlxeffError(f"{source.path}: calibration needs a tokenizer: name it with --tokenizer, or --data-free")
    return from_folder(tokens.files[0].parent, config.get("model_type"), config.get("eos_token_id"))


def write(folder: Path, config: dict, tokens: TokenizerFiles, source: Source) -> None:
    """config.json, the tokenizer and generation_config.json into `folder`."""
    _write_json(folder / "config.json", config)
    for file in tokens.files:
        target = folder / tokens.target(file)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if tokens.metadata:
        from_gguf(source.metadata, str(source.path)).save(folder)
    names = {file.name for file in tokens.files}
    if (
        config["model_type"] == "openelm"
        and "tokenizer.model" in names
        and not names & {"tokenizer.json", "tokenizer_config.json"}
    ):
        _write_json(folder / "tokenizer_config.json", LLAMA_TOKENIZER)
    generation = (source.path if source.path.is_dir() else source.path.parent) / "generation_config.json"
    if source.config is not None and generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json_text(_tag(dict(sorted(value.items()))), indent=4), encoding="utf-8")


def _tag(value):
    """Floats that JSON lacks, as transformers tags them."""
    if isinstance(value, dict):
        return {key: _tag(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tag(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def provenance(source: Source, options: Options) -> dict:
    """Where the folder comes from. Of several files the hash is that of their sha256sum listing."""
    digests = {file.name: _sha256(file) for file in source.files}
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    whole = next(iter(digests.values())) if len(digests) == 1 else hashlib.sha256(listing.encode()).hexdigest()
    return {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "source": source.path.resolve().name,
        "source_sha256": whole,
        "options": options.as_dict(),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(destination: Path) -> int:
    """Free bytes where `destination` will stand."""
    place = destination.absolute().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
