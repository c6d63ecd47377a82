"""The files beside the weights in a model folder that this package writes: config.json, which tells the folder's
origin, and the tokenizer's files.

The file names are those of Hugging Face. This module knows nothing about tensors.
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

FORMAT_VERSION = 1
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # every tokenizer has at least one of these
COMPANIONS = (
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of further chat templates
# tokenizer_config.json for OpenELM, whose release has no tokenizer of its own and uses that of Llama 2. Stock mlx-lm
# needs this file beside tokenizer.model.
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
    """Where the tokenizer comes from: files to copy, or (`metadata`) the metadata of a GGUF file. With neither, there
    is none."""

    files: tuple[Path, ...]
    metadata: bool = False

    @property
    def found(self) -> list[str]:
        """The tokenizer's files, for the report: their paths in the new folder; [] without a tokenizer."""
        return ["built from the GGUF metadata"] if self.metadata else [str(self.target(file)) for file in self.files]

    @staticmethod
    def target(file: Path) -> Path:
        """The path of a file in the new folder, relative to this folder."""
        return Path(TEMPLATES, file.name) if file.parent.name == TEMPLATES else Path(file.name)


def find_tokenizer(source: Source, tokenizer: str | Path | None) -> TokenizerFiles:
    """The tokenizer's files in the folder `tokenizer`, or this one file; None: those beside the weights, or the
    metadata of a GGUF file. Raises MlxeffError where the folder named by the user has no tokenizer."""
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
    """The tokenizer that the new folder will have, to split the calibration text into tokens. `config` is the
    model's. Raises MlxeffError where no tokenizer was found."""
    if tokens.metadata:
        return from_gguf(source.metadata, str(source.path))
    if not tokens.files:
        raise MlxeffError(f"{source.path}: calibration needs a tokenizer: name it with --tokenizer, or --data-free")
    return from_folder(tokens.files[0].parent, config.get("model_type"), config.get("eos_token_id"))


def write(folder: Path, config: dict, tokens: TokenizerFiles, source: Source) -> None:
    """Write config.json, the tokenizer, and a copy of the source's generation_config.json, if any, into `folder`."""
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
    """`value` with each infinite float and NaN, which JSON lacks, in the form {"__float__": …} of transformers."""
    if isinstance(value, dict):
        return {key: _tag(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tag(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def provenance(source: Source, options: dict) -> dict:
    """The entry `mlxeff` of config.json: source, its SHA-256, options and version. For a source of several files, the
    hash is that of the text which the command sha256sum prints for them."""
    digests = {file.name: _sha256(file) for file in source.files}
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    whole = next(iter(digests.values())) if len(digests) == 1 else hashlib.sha256(listing.encode()).hexdigest()
    return {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "source": source.path.resolve().name,
        "source_sha256": whole,
        "options": options,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(destination: Path) -> int:
    """Free bytes on the disk of `destination`, which need not exist yet."""
    place = destination.absolute().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
