"""A GGUF file (version 2 or 3, little-endian) → its metadata and its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset is checked against the
size of the file before memory is allocated. `gguf_blocks` reads the content of the tensors.
"""

import math
import mmap
import struct
from pathlib import Path

import numpy as np

from ..errors import MlxeffError
from .gguf_blocks import BLOCKS, Losses, make_tensor
from .tensor import Tensor, check_shape

STRING, ARRAY, BOOL = 8, 9, 7  # numbers of the value types that are no plain numbers
SCALARS = {  # number of a value type → NumPy type
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
UNPACK = {code: struct.Struct("<" + letter) for code, letter in zip(SCALARS, "BbHhIifBQqd", strict=True)}
UINT32, UINT64 = struct.Struct("<I"), struct.Struct("<Q")
MAX_DIMENSIONS = 4  # of a ggml tensor
MAX_NESTING = 3  # levels of arrays in arrays
SMALLEST_KEY, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes of the shortest possible entries of the header


class _Cursor:
    """Reads the bytes `data` of the file `origin` from a position on, and raises MlxeffError instead of reading past
    their end."""

    def __init__(self, data: mmap.mmap, origin: Path):
        self.data, self.size, self.origin, self.position = data, len(data), origin, 0

    def fail(self, what: str) -> MlxeffError:
        """The error to raise where the header is damaged."""
        return MlxeffError(f"{self.origin.name}: damaged GGUF header at byte {self.position}: {what}")

    def advance(self, nbytes: int) -> int:
        """Move past `nbytes` bytes; returns the position before them."""
        start, left = self.position, self.size - self.position
        if nbytes > left:
            raise self.fail(f"wanted {nbytes} bytes, got {left} to the end of the file")
        self.position += nbytes
        return start

    def unpack(self, form: struct.Struct) -> int | float:
        """The next number."""
        return form.unpack_from(self.data, self.advance(form.size))[0]

    def count(self, what: str, smallest: int) -> int:
        """The next number, which counts entries (`what`) of at least `smallest` bytes each. Raises MlxeffError for more
        entries than the rest of the file has room for."""
        count, left = self.unpack(UINT64), self.size - self.position
        if count * smallest > left:
            raise self.fail(f"wanted {count} {what}, got {left} bytes to the end of the file")
        return count

    def string(self) -> str:
        """The next string."""
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """The next `count` strings, each an 8-byte length and UTF-8. The loop calls no method, because a vocabulary has
        some 10^5 strings."""
        data, size, position, result = self.data, self.size, self.position, []
        unpack, append = UINT64.unpack_from, result.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self.fail(f"a string of {position - start} bytes passes the end of the file")
                append(data[start:position].decode("utf-8"))
        except struct.error as error:
            raise self.fail("a string passes the end of the file") from error
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8: {error.reason}") from error
        self.position = position
        return result


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(The tensors by name, the metadata: key → str, int, float, bool, list of str, or NumPy array of numbers). Raises
    MlxeffError for a damaged file. Of a split file this is one part; `split.no` and `split.count` say which."""
    with open(path, "rb") as file:
        if path.stat().st_size < 24:
            raise MlxeffError(f"{path.name}: incomplete: wanted at least 24 bytes, got {path.stat().st_size}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, path))


def _parse(cursor: _Cursor) -> tuple[dict[str, Tensor], dict]:
    """`read_gguf` for a cursor at the beginning of the file."""
    _check_version(cursor)
    tensor_count = cursor.count("tensors", SMALLEST_TENSOR)
    metadata = {}
    for _ in range(cursor.count("keys", SMALLEST_KEY)):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail(f"key {key!r} appears twice")
        metadata[key] = _value(cursor, cursor.unpack(UINT32))
    entries = [_entry(cursor) for _ in range(tensor_count)]
    return _place(cursor, entries, _alignment(cursor, metadata)), metadata


def _check_version(cursor: _Cursor) -> None:
    """Raises MlxeffError for a file of another format, byte order or version."""
    magic, version = cursor.data[cursor.advance(4) : 4], cursor.unpack(UINT32)
    if magic != b"GGUF":
        raise MlxeffError(f"{cursor.origin.name}: wanted a GGUF file, got one that begins with {magic!r}")
    if version >= 1 << 16:
        raise MlxeffError(f"{cursor.origin.name}: wanted a little-endian GGUF file, got a big-endian one")
    if version not in (2, 3):
        raise MlxeffError(f"{cursor.origin.name}: wanted GGUF version 2 or 3, got {version}")


def _value(cursor: _Cursor, code: int, depth: int = 0) -> object:
    """The next value of the metadata, of type number `code`."""
    if code == STRING:
        return cursor.string()
    if code == ARRAY:
        return _array(cursor, depth)
    if code not in SCALARS:
        raise cursor.fail(f"unknown value type {code}")
    value = cursor.unpack(UNPACK[code])
    return bool(value) if code == BOOL else value


def _array(cursor: _Cursor, depth: int) -> list | np.ndarray:
    """The next array of the metadata, which is nested in `depth` other arrays."""
    code = cursor.unpack(UINT32)
    if code == STRING:
        return cursor.strings(cursor.count("strings", 8))
    if code == ARRAY:
        if depth == MAX_NESTING:
            raise cursor.fail("arrays are nested too deeply")
        return [_array(cursor, depth + 1) for _ in range(cursor.count("arrays", 12))]
    if code not in SCALARS:
        raise cursor.fail(f"unknown array type {code}")
    dtype = np.dtype(SCALARS[code])
    count = cursor.count("numbers", dtype.itemsize)
    values = np.frombuffer(cursor.data[cursor.advance(count * dtype.itemsize) : cursor.position], dtype)
    return values != 0 if code == BOOL else values


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """The next entry of the table of tensors: (name, row-major shape, number of the block type, offset in the data).
    GGUF writes the dimensions of a shape in the opposite order."""
    name, dimensions = cursor.string(), cursor.unpack(UINT32)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r}: wanted 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")
    shape = tuple(cursor.unpack(UINT64) for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.fail(f"tensor {name!r}: wanted dimensions of at least 1, got {shape}")
    check_shape(shape, cursor.origin, name)
    return name, shape, cursor.unpack(UINT32), cursor.unpack(UINT64)


def _alignment(cursor: _Cursor, metadata: dict) -> int:
    """The alignment in bytes of the data and of each tensor."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment: wanted a power of two, got {alignment!r}")
    return alignment


def _place(cursor: _Cursor, entries: list, alignment: int) -> dict[str, Tensor]:
    """The tensors of all entries, in the order of the file's table. Raises MlxeffError where one reaches past the end
    of the file or into another."""
    data_start = -(-cursor.position // alignment) * alignment
    tensors, previous_end, losses = {}, data_start, Losses(cursor.origin)
    for name, shape, code, offset in sorted(entries, key=lambda entry: entry[3]):
        start, nbytes = data_start + offset, _nbytes(cursor, name, shape, code)
        if offset % alignment:
            raise cursor.fail(f"tensor {name!r}: wanted an offset that {alignment} divides, got {offset}")
        if start + nbytes > cursor.size:
            raise MlxeffError(f"{cursor.origin.name}: incomplete: wanted {start + nbytes} bytes, got {cursor.size}")
        if start < previous_end or name in tensors:
            raise cursor.fail(f"tensor {name!r} overlaps another or appears twice")
        tensors[name] = make_tensor(cursor.origin, name, shape, code, start, nbytes, losses)
        previous_end = start + nbytes
    return {entry[0]: tensors[entry[0]] for entry in entries}


def _nbytes(cursor: _Cursor, name: str, shape: tuple[int, ...], code: int) -> int:
    """Bytes of a tensor in the file."""
    if code not in BLOCKS:
        raise MlxeffError(f"{cursor.origin.name}: tensor {name!r}: unknown GGUF type number {code}")
    kind, elements, block_bytes = BLOCKS[code]
    if shape[-1] % elements:
        what = f"{cursor.origin.name}: tensor {name!r}"
        raise MlxeffError(f"{what}: wanted rows of a multiple of {elements} for {kind}, got {shape[-1]}")
    return math.prod(shape) // elements * block_bytes
