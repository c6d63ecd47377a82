"""`Tensor`, a tensor in a checkpoint file that is not read yet, and the table of number types.

Type names are those of safetensors ("F16", "BF16", "U32"): https://huggingface.co/docs/safetensors. This module knows
nothing about file formats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError

# Name → (MLX dtype, bytes per element). MLX has no 8-bit floats, so these are loaded as uint8 with the same bits.
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
NAMES = {mlx_type: name for name, (mlx_type, _) in reversed(DTYPES.items())}  # uint8 → "U8"
MAX_DIMENSION = 2**31 - 1  # MLX stores a dimension as int32


@dataclass(frozen=True)
class Tensor:
    """A tensor that is still on disk. `read` and `read_packed` raise MlxeffError if the file has changed since it was
    opened."""

    name: str
    dtype: str  # type of the array that `read` gives, a name in DTYPES
    shape: tuple[int, ...]  # row-major
    nbytes: int  # size in the file
    origin: Path  # the file
    reader: Callable[[], mx.array] = field(repr=False, compare=False)
    kind: str | None = None  # GGUF: its block type, such as "Q4_0"
    bits: int | None = None  # GGUF: bits and group size of its form in MLX's affine packing; None: it has none
    group_size: int | None = None
    packed_reader: Callable[[], tuple[mx.array, mx.array, mx.array]] | None = field(
        default=None, repr=False, compare=False
    )
    packed_nbytes: int | None = None  # size of the packed arrays in memory, with scales in float16

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the arrays that `read_packed` gives where there are any, otherwise of the one that `read` gives."""
        return self.size * DTYPES[self.dtype][1] if self.packed_nbytes is None else self.packed_nbytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> mx.array:
        """The dense array, of type `dtype`."""
        return self.reader()

    def read_packed(self) -> tuple[mx.array, mx.array, mx.array]:
        """For `mx.quantized_matmul`: weight uint32 (…, K · bits / 32), scales and biases (…, K / group_size); K is the
        last dimension of `shape`. Raises MlxeffError where `bits` is None."""
        if self.packed_reader is None:
            raise MlxeffError(
                f"{self.origin.name}: tensor {self.name!r}: wanted packed weights, got {self.kind or self.dtype}"
            )
        return self.packed_reader()


def check_shape(shape: tuple[int, ...], origin: Path, name: str) -> None:
    """Raises MlxeffError for dimensions that overflow in MLX."""
    if any(dimension > MAX_DIMENSION for dimension in shape):
        raise MlxeffError(f"{origin.name}: tensor {name!r}: wanted dimensions up to {MAX_DIMENSION}, got {shape}")


def read_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """The bytes of the file from `offset` on, uint8 (nbytes,). Raises MlxeffError where the file has become shorter
    since its header was read."""
    try:
        data = np.fromfile(path, np.uint8, nbytes, offset=offset)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    if data.size != nbytes:
        raise MlxeffError(f"{path.name}: incomplete: wanted {nbytes} bytes at {offset}, got {data.size}")
    return data


def to_array(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Little-endian bytes → array of the type `dtype` (a key of NUMPY). bfloat16 is read as uint16 first, because NumPy
    does not have it."""
    if dtype == "BOOL":
        return mx.array(data != 0).reshape(shape)
    if dtype == "BF16":
        return mx.array(data.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    return mx.array(data.view(NUMPY[dtype])).reshape(shape)


NUMPY = {  # name of a number type → the NumPy type that reads its bytes
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
