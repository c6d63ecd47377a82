"""A safetensors file → its tensors, which MLX reads lazily.

Format: https://huggingface.co/docs/safetensors/index#format. Before `mx.load` opens the file, its header is checked
twice: here for completeness, names that appear twice, and types and dimensions that MLX does not have, and by the
safetensors library for gaps, overlaps and sizes.
"""

import json
import math
from pathlib import Path

import mlx.core as mx

from ..errors import MlxeffError
from ..names import readable_by_mlx
from .tensor import DTYPES, Tensor, check_shape

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class _Arrays:
    """The arrays of a file. Each is kept here only until it is taken, so that its memory can be freed afterwards."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, {}

    def take(self, name: str) -> mx.array:
        """The lazy array called `name`. Raises MlxeffError where the file is not the one whose header was read."""
        if name not in self.waiting:
            try:
                with readable_by_mlx(self.path) as file:
                    self.waiting = mx.load(file, format="safetensors")
            except (RuntimeError, ValueError, OSError) as error:
                raise MlxeffError(f"{self.path.name}: {_one_line(error)}") from error
        if name not in self.waiting:
            raise MlxeffError(f"{self.path.name}: tensor {name!r}: wanted as in the header read before, got none")
        return self.waiting.pop(name)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(The tensors by name, the header's `__metadata__`). Raises MlxeffError for a damaged file."""
    header, data_start = _header(path)
    metadata = header.pop("__metadata__", None) or {}
    _refuse_incomplete(path, header, data_start)
    _check_with_library(path)
    arrays = _Arrays(path)
    return {name: _tensor(path, name, entry, arrays) for name, entry in header.items()}, metadata


def _header(path: Path) -> tuple[dict, int]:
    """(The parsed header, the byte offset of the data that follow it)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise MlxeffError(f"{path.name}: incomplete: wanted at least 8 bytes, got {size}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise MlxeffError(
                f"{path.name}: not safetensors: wanted a header of up to {MAX_HEADER} bytes, got {length}"
            )
        if length > size - 8:
            raise MlxeffError(
                f"{path.name}: incomplete: wanted a header of {length} bytes, got {size - 8} bytes in all"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MlxeffError(f"{path.name}: damaged header: {_one_line(error)}") from error
    if not isinstance(header, dict):
        raise MlxeffError(f"{path.name}: damaged header: wanted a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _unique(pairs: list) -> dict:
    """The dict of a JSON object; raises ValueError for a name that appears twice. Of such names, this parser and the
    safetensors library could take different entries."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _refuse_incomplete(path: Path, header: dict, data_start: int) -> None:
    """Raises MlxeffError where the file is shorter than its header says."""
    try:
        wanted = data_start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
        raise MlxeffError(f"{path.name}: damaged header: a tensor without its data_offsets") from error
    size = path.stat().st_size
    if size < wanted:
        raise MlxeffError(f"{path.name}: incomplete: wanted {wanted} bytes, got {size}")


def _check_with_library(path: Path) -> None:
    """Raises MlxeffError where the safetensors library refuses the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise MlxeffError(f"{path.name}: damaged: {_one_line(error)}") from error


def _tensor(path: Path, name: str, entry: dict, arrays: _Arrays) -> Tensor:
    """The tensor of one entry of the header. Raises MlxeffError for a type or shape that MLX does not have."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
        raise MlxeffError(
            f"{path.name}: tensor {name!r}: wanted one of {', '.join(DTYPES)}, got {dtype}, which MLX cannot load"
        )
    check_shape(shape, path, name)
    return Tensor(name, dtype, shape, math.prod(shape) * DTYPES[dtype][1], path, lambda: arrays.take(name))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
