"""A path → the checkpoint there: its files, whether all of them are present, and its tensors by name.

This module knows the file names that Hugging Face, mlx-lm, PyTorch and llama.cpp use. It knows nothing about models or
the content of tensors.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MlxeffError
from .gguf_file import read_gguf
from .safetensors_file import read_safetensors
from .tensor import Tensor
from .torch_file import read_torch

READERS = {"safetensors": read_safetensors, "gguf": read_gguf, "torch": read_torch}
# File suffix → format, for files that their first bytes do not identify.
SUFFIXES = {".safetensors": "safetensors", ".gguf": "gguf", ".bin": "torch", ".pt": "torch", ".pth": "torch"}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In a folder without an index, the weights are the files that match the first of these patterns with any match.
PATTERNS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth", "*.gguf")
SINGLE = (".pt", ".pth", ".gguf")  # several such files in one folder are different checkpoints, not shards of one
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # transformers' tags for these floats


@dataclass(frozen=True)
class Source:
    """One checkpoint."""

    path: Path  # the folder or file that was opened
    format: str  # a key of READERS
    files: tuple[Path, ...]  # the files of weights
    config: dict | None  # config.json beside the weights; None where there is none, and for GGUF
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict = field(repr=False)  # GGUF's metadata, or the `__metadata__` of the safetensors headers

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(path: str | Path) -> Source:
    """Open a model folder or one .safetensors, .bin, .pt, .pth or .gguf file. Only headers are read. Raises MlxeffError
    for missing, incomplete or damaged files."""
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_file(path)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise MlxeffError(f"{path}: wanted a model folder or a weights file, got a path where nothing is")


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. transformers writes infinite floats as `{"__float__": "Infinity"}`; they become
    floats. Raises MlxeffError for a file that cannot be read or is no JSON object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_untag)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise MlxeffError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MlxeffError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value


def _untag(value: dict) -> dict | float:
    """The float for a dict that is transformers' tag of one, otherwise the dict itself."""
    tag = value.get("__float__")
    return FLOATS[tag] if len(value) == 1 and isinstance(tag, str) and tag in FLOATS else value


def _open_file(path: Path) -> Source:
    kind = _format(path)
    tensors, metadata = READERS[kind](path)
    return Source(path, kind, (path,), None if kind == "gguf" else _config(path.parent), tensors, metadata)


def _open_folder(folder: Path) -> Source:
    """The checkpoint in a folder, with the tensors of all its files."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    weight_map = _weight_map(index) if index else {}
    files = [folder / name for name in sorted(set(weight_map.values()))] if index else _weight_files(folder)
    kind = _format(files[0])
    tensors, metadata = {}, {}
    for file in files:
        file_tensors, file_metadata = READERS[kind](file)
        if doubled := sorted(tensors.keys() & file_tensors.keys()):
            raise MlxeffError(f"{file.name}: tensor {doubled[0]!r} is already in {tensors[doubled[0]].origin.name}")
        tensors.update(file_tensors)
        metadata.update(file_metadata)
    if index:
        _check_index(index, weight_map, tensors)
    return Source(folder, kind, tuple(files), None if kind == "gguf" else _config(folder), tensors, metadata)


def _config(folder: Path) -> dict | None:
    """The folder's config.json, None where there is none."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else None


def _format(path: Path) -> str:
    """The format (a key of READERS) of a file: by its first bytes, or else by its suffix."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        return "gguf"
    if head[8:9] == b"{":
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "torch"
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    raise MlxeffError(
        f"{path.name}: wanted safetensors, GGUF or a PyTorch archive, got bytes that begin with {head[:4]!r}"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder without an index. Raises MlxeffError where there are none, where they are
    several checkpoints, and where a shard is missing that the other names announce."""
    for pattern in PATTERNS:
        files = sorted(file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith("."))
        if not files:
            continue
        if len(files) > 1 and files[0].suffix in SINGLE:
            raise MlxeffError(
                f"{folder}: wanted one checkpoint, got {', '.join(f.name for f in files)}: name one of them"
            )
        _check_shards(folder, files)
        return files
    raise MlxeffError(f"{folder}: no weights: looked for {', '.join(PATTERNS)}")


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Raises MlxeffError where a file is named as one of N shards and not all of them are there."""
    names = {file.name for file in files}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            stem, _, count, suffix = match.groups()
            wanted = (f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))
            if missing := next((name for name in wanted if name not in names), None):
                raise MlxeffError(
                    f"{folder}: incomplete: wanted {int(count)} shards, got {len(names)}: {missing} is missing"
                )


def _weight_map(index: Path) -> dict[str, str]:
    """The index's table tensor name → file name. Raises MlxeffError where a file is missing or in another folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MlxeffError(f"{index}: wanted a weight_map of tensor to file names, got {type(weight_map).__name__}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise MlxeffError(f"{index}: wanted weight files beside the index, got {name!r}")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        present = len(shards) - len(missing)
        raise MlxeffError(
            f"{index.parent}: incomplete: wanted {len(shards)} shards, got {present}: {', '.join(missing)} missing"
        )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Raises MlxeffError where a tensor is not in the file that the index names."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].origin.name != file:
            where = f"in {tensors[name].origin.name}" if name in tensors else "nowhere"
            raise MlxeffError(f"{index.parent}: incomplete: wanted tensor {name!r} in {file}, got it {where}")
