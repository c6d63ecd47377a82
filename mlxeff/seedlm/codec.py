"""Packing of blocks into stored arrays, and the reference decoders: in NumPy, and in MLX's operations on any device.

Both decoders compute the formula in `format` to the bit: integer sums isum with |isum| < 2^20, one float32
multiplication, then the conversion to the wanted type.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError
from .format import CODE_OFFSET, REGISTER_BITS, SCALE, BlockFormat, check_arrays, check_bias
from .lfsr import expand, expansion_tables

HALF = 1 << (REGISTER_BITS - 1)  # 32768, which is subtracted from a state
STEP = np.float32(1 / SCALE)
PIECE = 1 << 20  # weights that `decode_ops` decodes at a time


@dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix, NB in each row."""

    seeds: np.ndarray  # uint16 (rows, NB), none is 0
    coefficients: np.ndarray  # int8 (rows, NB, P), -8 … 7
    codes: np.ndarray  # exponent codes, uint8 (rows, NB), 0 … 15
    exponent_bias: int


def pack(fmt: BlockFormat, blocks: Blocks) -> dict[str, np.ndarray]:
    """Blocks → the stored arrays by name, as in `format`. Raises MlxeffError for blocks with values out of range."""
    check_blocks(fmt, blocks, "pack")
    shifts = np.arange(fmt.states, dtype=np.uint32) * 4
    nibbles = ((blocks.coefficients & 15).astype(np.uint32) << shifts).sum(-1, dtype=np.uint32)
    bias = np.array([blocks.exponent_bias], np.int32)
    if not fmt.planar:
        words = blocks.seeds.astype(np.uint32) | nibbles << 16 | blocks.codes.astype(np.uint32) << 28
        return {"blocks": words, "exponent_bias": bias}
    return {
        "seeds": blocks.seeds.astype(np.uint16),
        "coefficients": nibbles.astype(np.uint16),
        "exponents": (blocks.codes[:, ::2] | blocks.codes[:, 1::2] << 4).astype(np.uint8),
        "exponent_bias": bias,
    }


def unpack(fmt: BlockFormat, rows: int, cols: int, arrays: Mapping[str, object], origin: str = "unpack") -> Blocks:
    """The stored arrays (NumPy or MLX) of a matrix (rows, cols) → its blocks. Raises MlxeffError for damaged arrays;
    `origin` names the matrix."""
    check_arrays(fmt, rows, cols, arrays, origin)
    stored = {name: np.asarray(array) for name, array in arrays.items()}
    if fmt.planar:
        seeds, nibbles = stored["seeds"], stored["coefficients"].astype(np.uint32)
        codes = np.stack([stored["exponents"] & 15, stored["exponents"] >> 4], -1).reshape(seeds.shape)
    else:
        words = stored["blocks"]
        seeds, nibbles, codes = (words & 0xFFFF).astype(np.uint16), words >> 16, (words >> 28).astype(np.uint8)
    unsigned = (nibbles[..., None] >> (np.arange(fmt.states, dtype=np.uint32) * 4) & 15).astype(np.int8)
    blocks = Blocks(seeds, ((unsigned ^ 8) - 8).astype(np.int8), codes, check_bias(stored["exponent_bias"][0], origin))
    check_blocks(fmt, blocks, origin)
    return blocks


def check_blocks(fmt: BlockFormat, blocks: Blocks, origin: str) -> None:
    """Raises MlxeffError for seeds, coefficients, codes or a bias out of range, and for shapes that do not agree."""
    shape = blocks.seeds.shape
    shapes = (shape, blocks.coefficients.shape, blocks.codes.shape)
    if len(shape) != 2 or shapes != (shape, (*shape, fmt.states), shape) or (fmt.planar and shape[1] % 2):
        raise MlxeffError(f"{origin}: SeedLM {fmt.name} bits: seeds, coefficients and codes of shapes {shapes}")
    if (zero := np.argwhere(blocks.seeds == 0)).size:
        raise MlxeffError(f"{origin}: wanted seeds 1 to 65535, got 0 at row {zero[0][0]}, block {zero[0][1]}")
    for name, array, low, high in (("coefficients", blocks.coefficients, -8, 7), ("codes", blocks.codes, 0, 15)):
        if array.size and not (low <= array.min() and array.max() <= high):
            raise MlxeffError(f"{origin}: {name}: wanted {low} to {high}, got {array.min()} to {array.max()}")
    check_bias(blocks.exponent_bias, origin)


def decode(fmt: BlockFormat, blocks: Blocks, cols: int) -> np.ndarray:
    """Blocks → the weights, float32 (rows, cols), with NumPy."""
    rows, count = blocks.seeds.shape
    shifts = np.arange(fmt.columns * fmt.states, dtype=np.uint64)
    windows = (expand(blocks.seeds)[..., None] >> shifts & np.uint64(0xFFFF)).astype(np.int32) - HALF
    windows = windows.reshape(rows, count, fmt.columns, fmt.states)
    isum = (windows * blocks.coefficients[:, :, None].astype(np.int32)).sum(-1, dtype=np.int32)
    scale = np.ldexp(STEP, blocks.codes.astype(np.int32) - CODE_OFFSET + blocks.exponent_bias).astype(np.float32)
    return (isum.astype(np.float32) * scale[..., None]).reshape(rows, -1)[:, :cols]


def decode_ops(fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array], dtype: mx.Dtype = mx.float32) -> mx.array:
    """The stored arrays of some rows → their weights (rows, cols) in `dtype`, with MLX's operations. Rows are decoded
    PIECE weights at a time, which takes some 150 bytes of memory for each of these weights."""
    count, step = arrays["seeds" if fmt.planar else "blocks"].shape[0], max(1, PIECE // cols)
    if count > step:
        parts = [_rows(arrays, slice(start, start + step)) for start in range(0, count, step)]
        return mx.concatenate([decode_ops(fmt, cols, part, dtype) for part in parts])
    if fmt.planar:
        seeds, nibbles = arrays["seeds"].astype(mx.uint32), arrays["coefficients"].astype(mx.uint32)
        exponents = arrays["exponents"].astype(mx.int32)
        codes = mx.stack([exponents & 15, exponents >> 4], axis=-1).reshape(seeds.shape)
    else:
        words = arrays["blocks"]
        seeds, nibbles, codes = words & 0xFFFF, words >> 16, (words >> 28).astype(mx.int32)
    windows = _windows_ops(seeds, fmt.columns * fmt.states).reshape(*seeds.shape, fmt.columns, fmt.states)
    unsigned = (nibbles[..., None] >> mx.array([4 * p for p in range(fmt.states)], mx.uint32)) & 15
    coefficients = (unsigned ^ 8).astype(mx.int32) - 8
    isum = (windows * coefficients[..., None, :]).sum(-1).astype(mx.float32)
    exponent = codes - CODE_OFFSET + arrays["exponent_bias"]
    scale = ((exponent + 127) << 23).view(mx.float32) * STEP.item()
    return (isum * scale[..., None]).reshape(seeds.shape[0], -1)[:, :cols].astype(dtype)


def _windows_ops(seeds: mx.array, count: int) -> mx.array:
    """Seeds, uint32 (...) → their first `count` states minus 32768, int32 (..., count)."""
    # words[i] holds the bits 16 i … 16 i + 31 of the stream, which contain the states 16 i … 16 i + 15.
    words = [None] * (count // 16 + 1)
    for index in range(1, len(words)):
        low, high = (mx.array((table >> np.uint64(16 * (index - 1))).astype(np.uint32)) for table in expansion_tables())
        words[index] = low[seeds & 255] ^ high[seeds >> 8]
    words[0] = seeds | words[1] << 16
    shifts = mx.arange(16, dtype=mx.uint32)
    parts = [(word[..., None] >> shifts) & 0xFFFF for word in words[: -(-count // 16)]]
    return mx.concatenate(parts, axis=-1)[..., :count].astype(mx.int32) - HALF


def rows_ops(
    fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array], ids: mx.array, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """The rows `ids` (...) of the matrix in `dtype`, (..., cols): an embedding look-up."""
    flat = ids.reshape(-1)
    return decode_ops(fmt, cols, _rows(arrays, flat), dtype).reshape(*ids.shape, cols)


def _rows(arrays: Mapping[str, mx.array], index: mx.array | slice) -> dict[str, mx.array]:
    """The stored arrays of the rows `index`."""
    return {name: array if name == "exponent_bias" else array[index] for name, array in arrays.items()}


def matmul_ops(fmt: BlockFormat, arrays: Mapping[str, mx.array], x: mx.array) -> mx.array:
    """x (..., cols) → x Wᵀ (..., rows) in x's dtype, with W rounded to that type."""
    return x @ decode_ops(fmt, x.shape[-1], arrays, x.dtype).T
