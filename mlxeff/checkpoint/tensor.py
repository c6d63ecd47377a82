"""One tensor of a file: its name, type and place, and how to read it. Also the table of number types and the two ways
to read bytes.

Type names are those of safetensors ("F16", "BF16", "U32"): https://huggingface.co/docs/safetensors. Knows no file
format.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError

# name: (MLX dtype, bytes per element). MLX holds the 8-bit floats as their bit patterns.
DTYPES = {
    "BOOL": (mx.bool_, 1),
    "U8": (mx.uint8, 1),
    "I8": (mx.int8, 1),
    "U16": (mx.uint16, 2),
    "I16": (mx.int16, 2),
    "U32": (mx.uint32, 4),
    "I32": (mx.int32, 4),
    "U64": (mx.uint64, 8),
    "I64": (mx.int64, 8),
    "F16": (mx.float16, 2),
    "BF16": (mx.bfloat16, 2),
    "F32": (mx.float32, 4),
    "C64": (mx.complex64, 8),
    "F8_E4M3": (mx.uint8, 1),
    "F8_E8M0": (mx.uint8, 1),
}
NAMES = {mlx_type: name for name, (mlx_type, _) in reversed(DTYPES.items())}
MAX_DIMENSION = 2**31 - 1  # MLX holds a dimension as int32


@dataclass(frozen=True)
class Tensor:
    """A tensor that is still on disk, of row-major `shape` and `nbytes` in the file.

    `read()` gives the dense array of type `dtype`. A GGUF tensor has its block type in `kind`; where MLX can hold those
    blocks as they are, `bits` and `group_size` are set and `read_packed()` gives `(weight uint32, scales, biases)` for
    `mx.quantized_matmul`. Both raise MlxeffError if the file has changed since it was opened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    origin: Path
    reader: Callable[[], mx.array] = field(repr=False, compare=False)
    kind: str | None = None
    bits: int | None = None
    group_size: int | None = None
    packed_reader: Callable[[], tuple[mx.array, mx.array, mx.array]] | None = field(
        default=None, repr=False, compare=False
    )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> mx.array:
        return self.reader()

    def read_packed(self) -> tuple[mx.array, mx.array, mx.array]:
        if self.packed_reader is None:
            raise MlxeffError(
                f"{self.origin.name}: tensor {self.name!r}: wanted packed weights, got {self.kind or self.dtype}"
            )
        return self.packed_reader()


def check_shape(shape: tuple[int, ...], origin: Path, name: str) -> None:
    """Refuse dimensions that MLX would wrap around."""
    if any(dimension > MAX_DIMENSION for dimension in shape):
        raise MlxeffError(f"{origin.name}: tensor {name!r}: wanted dimensions up to {MAX_DIMENSION}, got {shape}")


def read_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """(nbytes,) uint8 from `offset` of the file; an error if the file has become shorter since its header was read."""
    try:
        data = np.fromfile(path, np.uint8, nbytes, offset=offset)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    if data.size != nbytes:
        raise MlxeffError(f"{path.name}: incomplete: wanted {nbytes} bytes at {offset}, got {data.size}")
    return data


def to_array(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Little-endian bytes -> array. Two-byte floats go through uint16, since numpy has no bfloat16."""
    if dtype == "BOOL":
        return mx.array(data != 0).reshape(shape)
    if dtype == "BF16":
        return mx.array(data.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    return mx.array(data.view(NUMPY[dtype])).reshape(shape)


NUMPY = {
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "BOOL": np.uint8,
}
