"""Named arrays → a folder of safetensors shards, with one tensor in memory at a time.

The folder is written under a hidden name beside its destination and renamed when it is complete, so an interrupted
write leaves nothing behind. File names and index are those that mlx-lm writes. Format:
https://huggingface.co/docs/safetensors/index#format. This module knows nothing about models.
"""

import contextlib
import fcntl
import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError
from .tensor import DTYPES, NAMES

SHARD_BYTES = 5 << 30  # largest size of a shard, as in mlx-lm
FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}  # types that `cast` converts to
CARRIER = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # bytes per element → type to pass bytes to NumPy


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together, by one call of `read`. `specs` has (name, safetensors' name of the dtype, shape)
    of each, in the order of the arrays that `read` returns."""

    specs: tuple[tuple[str, str, tuple[int, ...]], ...]
    read: Callable[[], list[mx.array]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(_nbytes(dtype, shape) for _, dtype, shape in self.specs)


def cast(array: mx.array, spec: tuple[str, str, tuple[int, ...]]) -> mx.array:
    """The array in the dtype of `spec` (name, dtype, shape) where that is a float type, otherwise unchanged. Raises
    MlxeffError where a value overflows in float16."""
    name, dtype, _ = spec
    if dtype not in FLOATS or array.dtype == FLOATS[dtype]:
        return array
    result = array.astype(FLOATS[dtype])
    if dtype == "F16" and (mx.isinf(result) & ~mx.isinf(array)).any().item():
        largest = mx.abs(array).max().item()
        raise MlxeffError(f"tensor {name}: wanted values that float16 can hold, got {largest:.4g} (bfloat16 can)")
    return result


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str], what: str) -> None:
    """Write one safetensors file. An existing file at `path` is replaced only by a complete one. `what` says in errors
    what the file is. Raises MlxeffError where it cannot be written."""
    temporary = temporary_beside(path, ".safetensors")
    try:
        mx.eval(arrays)
        with open(temporary, "wb") as file:
            mx.save_safetensors(file, arrays, metadata)
        wanted, got = sum(a.nbytes for a in arrays.values()), temporary.stat().st_size
        if got < wanted:
            raise OSError(f"wanted {wanted} bytes on disk, got {got} (disk full?)")
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise MlxeffError(f"{path}: cannot write {what}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """A hidden path beside `path` that no other process uses, to be renamed to it when it is complete. Those of
    processes that no longer run are removed."""
    stem = f".{path.name}."
    _remove_abandoned(path.parent, stem, suffix)
    return path.with_name(f"{stem}{os.getpid()}{suffix}")


@contextlib.contextmanager
def claim(destination: Path) -> Iterator[None]:
    """Hold the path `destination` for this process inside the block. Raises MlxeffError where another process holds it,
    or where its parent folder cannot be written. The operating system frees it when the process ends."""
    path = destination.absolute().with_name(f".{destination.name}.lock")
    try:
        file = open(path, "a")  # noqa: SIM115, closed below
    except OSError as error:
        raise MlxeffError(f"{destination}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False  # of another process, or removed by it a moment ago
        if not mine:
            raise MlxeffError(f"{destination}: another process is making it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def plan_shards(pieces: list[Piece], shard_bytes: int = SHARD_BYTES) -> list[list[Piece]]:
    """The pieces of each shard, in order. A new shard begins where the next piece would make it larger than
    `shard_bytes`; the tensors of one piece stay together."""
    shards, filled = [[]], 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    return shards


def check_new(destination: Path) -> None:
    """Raises MlxeffError where the destination exists or its parent folder does not."""
    if destination.exists() or destination.is_symlink():
        raise MlxeffError(f"{destination}: wanted a new folder, got a path that exists")
    if not destination.absolute().parent.is_dir():
        raise MlxeffError(f"{destination}: wanted an existing parent folder, got none")
    if not os.access(destination.absolute().parent, os.W_OK):  # a long computation would be in vain
        raise MlxeffError(f"{destination}: wanted a parent folder that may be written to, got one that may not")


def write_folder(
    destination: Path,
    pieces: list[Piece],
    files: Callable[[Path], None] | None = None,
    *,
    parameters: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """Write the new folder `destination` with the tensors of `pieces`; returns the paths of the weight files.

    files        called with the unfinished folder, to write other files into it
    parameters   number of parameters, for the index
    shard_bytes  largest size of a shard
    progress     called with (bytes done, bytes in total)
    metadata     entries for the header of each shard

    Needs memory for the arrays of the largest piece. Raises MlxeffError where the folder cannot be written; nothing is
    left at `destination` then.
    """
    destination = Path(destination).absolute()
    check_new(destination)
    _check_space(destination.parent, sum(piece.nbytes for piece in pieces))
    partial = _partial(destination)
    try:
        partial.mkdir()
        shards, report = plan_shards(pieces, shard_bytes), progress or (lambda *_: None)
        names = _write_shards(partial, shards, parameters, report, metadata or {})
        if files:
            files(partial)
        check_new(destination)
        os.rename(partial, destination)
    except OSError as error:
        raise MlxeffError(f"{destination}: not written, nothing is left behind: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [destination / name for name in names]


def _check_space(parent: Path, wanted: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise MlxeffError(f"{parent}: disk full: wanted {wanted} bytes free, got {free}")


def _partial(destination: Path) -> Path:
    """The hidden path to write to. Unfinished folders of processes that no longer run are removed."""
    stem = f".{destination.name}.partial-"
    _remove_abandoned(destination.parent, stem)
    return destination.parent / f"{stem}{os.getpid()}"


def _remove_abandoned(folder: Path, stem: str, suffix: str = "") -> None:
    """Remove files and folders called `stem`, number of a process, `suffix`, whose process no longer runs."""
    for left in folder.glob(f"{glob.escape(stem)}*{glob.escape(suffix)}"):
        number = left.name[len(stem) : len(left.name) - len(suffix)]
        if not (number.isascii() and number.isdigit()) or _alive(int(number)):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process with this id runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _write_shards(
    folder: Path, shards: list[list[Piece]], parameters: int | None, progress: Callable, metadata: dict[str, str]
) -> list[str]:
    """Write all shards and the index; returns the shards' file names."""
    count = len(shards)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    total, done, weight_map = sum(piece.nbytes for shard in shards for piece in shard), 0, {}
    for name, shard in zip(names, shards, strict=True):
        for piece_bytes in _write_shard(folder / name, shard, metadata):
            done += piece_bytes
            progress(done, total)
        weight_map.update({spec[0]: name for piece in shard for spec in piece.specs})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    if parameters is not None:
        index["metadata"]["total_parameters"] = parameters
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4), encoding="utf-8")
    return names


def _write_shard(path: Path, pieces: list[Piece], metadata: dict[str, str]) -> Iterator[int]:
    """Write one shard; yields the number of bytes of each piece after it was written."""
    header = _header(pieces, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for piece in pieces:
            for spec, array in zip(piece.specs, piece.read(), strict=True):
                file.write(_bytes(path, spec, array))
                del array
            mx.clear_cache()
            yield piece.nbytes
        file.flush()
        os.fsync(file.fileno())
    wanted = len(header) + sum(piece.nbytes for piece in pieces)
    if path.stat().st_size != wanted:
        raise MlxeffError(f"{path.name}: not written: wanted {wanted} bytes on disk, got {path.stat().st_size}")


def _header(pieces: list[Piece], metadata: dict[str, str]) -> bytes:
    """The header of a shard: its length in 8 bytes, and JSON that is padded with spaces to a multiple of 8 bytes."""
    entries, offset = {"__metadata__": {"format": "mlx"} | metadata}, 0
    for name, dtype, shape in (spec for piece in pieces for spec in piece.specs):
        end = offset + _nbytes(dtype, shape)
        if name in entries:
            raise MlxeffError(f"tensor {name!r}: wanted once in a shard, got twice")
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _bytes(path: Path, spec: tuple, array: mx.array) -> memoryview:
    """The bytes of the array in row-major order, without a copy. Raises MlxeffError where the array is not what the
    header says (`spec`)."""
    name, dtype, shape = spec
    if NAMES[array.dtype] != dtype or array.shape != shape:
        got = f"{NAMES[array.dtype]} {array.shape}"
        raise MlxeffError(f"{path.name}: tensor {name!r}: wanted {dtype} {shape}, got {got}")
    carrier = CARRIER[DTYPES[dtype][1]]
    if not array.size:
        return memoryview(b"")
    return memoryview(np.array(mx.contiguous(array.reshape(-1)).view(carrier), copy=False))


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor with this safetensors dtype."""
    return math.prod(shape) * DTYPES[dtype][1]
