"""A path → the checkpoint there: its files, whether all of them are present, and its tensors by name.

`files` chooses among the files of a folder. This module knows nothing about models or the content of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MlxeffError, notices, some
from .files import SUFFIXES, choose_files, parts_of, read_json
from .gguf_file import read_gguf
from .safetensors_file import read_safetensors
from .tensor import Tensor
from .torch_file import read_torch

READERS = {"safetensors": read_safetensors, "gguf": read_gguf, "torch": read_torch}


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


def _open_file(path: Path) -> Source:
    kind = _format(path)
    files = tuple(parts_of(path)) if kind == "gguf" else (path,)
    tensors, metadata = _read(files, kind)
    return Source(path, kind, files, None if kind == "gguf" else _config(path.parent), tensors, metadata)


def _open_folder(folder: Path) -> Source:
    """The checkpoint in a folder, with the tensors of all its files."""
    chosen = choose_files(folder)
    kind = _format(chosen.files[0])
    tensors, metadata = _read(chosen.files, kind)
    for problem in (*chosen.problems, *_misplaced(chosen.weight_map, tensors)):
        notices.warning("%s: %s", folder, problem)
    return Source(folder, kind, chosen.files, None if kind == "gguf" else _config(folder), tensors, metadata)


def _read(files: Sequence[Path], kind: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of all files by name, and their metadata together; of a key in several files the first one counts."""
    tensors, metadata = {}, {}
    for number, file in enumerate(files):
        file_tensors, file_metadata = READERS[kind](file)
        if kind == "gguf":
            _check_part(file, file_metadata, number, len(files))
        if doubled := sorted(tensors.keys() & file_tensors.keys()):
            raise MlxeffError(f"{file.name}: tensor {doubled[0]!r} is already in {tensors[doubled[0]].origin.name}")
        tensors.update(file_tensors)
        metadata = file_metadata | metadata
    return tensors, metadata


def _check_part(file: Path, metadata: dict, number: int, count: int) -> None:
    """Raises MlxeffError unless the file says of itself that it is the part of this number, from 0, of so many."""
    parts, own = metadata.get("split.count", 1) or 1, metadata.get("split.no", 0)
    if parts == count and (count == 1 or own == number):
        return
    if count == 1:
        raise MlxeffError(
            f"{file.name}: wanted a whole GGUF file, got one part of {parts!r:.20}, whose name is not NAME-00001-of-"
            "0000N.gguf: merge the parts, or give them these names"
        )
    raise MlxeffError(f"{file.name}: wanted part {number} of {count}, from 0, got part {own!r:.20} of {parts!r:.20}")


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


def _misplaced(weight_map: dict[str, str], tensors: dict[str, Tensor]) -> list[str]:
    """What to say of an index whose tensors are not where it says. The names and shapes that the model needs are
    checked when it is built, whatever the index says."""
    wrong = [name for name, file in weight_map.items() if name not in tensors or tensors[name].origin.name != file]
    if not wrong:
        return []
    return [f"the index is stale, the shards are read without it: {len(wrong)} tensors are elsewhere: {some(wrong)}"]
