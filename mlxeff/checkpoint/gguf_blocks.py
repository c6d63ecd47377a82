"""GGUF's block types → MLX arrays.

Tensors of types Q4_0, Q4_1 and Q8_0 can be read without loss in MLX's affine packing; other quantised types are
dequantised. Sources: ggml-common.h of https://github.com/ggml-org/ggml for the blocks, the documentation of
`mx.quantize` for MLX's packing. A block of these three types, like a group of MLX's, has 32 values w:

    type  block in the file           value            in MLX's packing
    Q4_0  half d, 16 bytes q          w = (q - 8) d    scale d, bias -8 d
    Q4_1  half d, half m, 16 bytes q  w = q d + m      scale d, bias m
    Q8_0  half d, 32 signed bytes q   w = q d          scale d, bias -128 d, with q + 128 in place of q

In a 4-bit block, the low half of byte j is value j and its high half is value j + 16.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError, notices
from .tensor import Tensor, read_bytes, to_array

# Type number → (name, values per block, bytes per block)
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
DIRECT = {"F32", "F16", "BF16", "I8", "I16", "I32", "I64"}  # types that are plain numbers
PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # types with an equivalent in MLX → bits per value
GROUP = 32  # values per block of these types
Packed = tuple[mx.array, mx.array, mx.array]  # a matrix in MLX's packing: weight uint32, scales, biases
CHUNK_VALUES = 1 << 22  # number of values that are dequantised at a time


def make_tensor(
    path: Path, name: str, shape: tuple[int, ...], code: int, start: int, nbytes: int, dequantised: dict[str, Counter]
) -> Tensor:
    """The tensor of type number `code` at byte `start` of the file. `dequantised` is one dict for all tensors of the
    file: it counts the types that have to be dequantised, for a single notice when the first of them is read."""
    kind = BLOCKS[code][0]
    if kind in DIRECT:
        return Tensor(
            name, kind, shape, nbytes, path, lambda: to_array(read_bytes(path, start, nbytes), kind, shape), kind
        )
    if kind in PACKED_BITS:
        return _packed_tensor(path, name, shape, kind, start, nbytes)
    counts = dequantised.setdefault("types", Counter())
    counts[kind] += 1

    def reader() -> mx.array:
        if not dequantised.get("said"):
            dequantised["said"] = True
            types = ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items()))
            notices.warning(f"{path.name}: tensors dequantised to float16, as MLX has no such type: {types}")
        return dequantise(read_bytes(path, start, nbytes), kind, shape, f"{path.name}: tensor {name!r}")

    return Tensor(name, "F16", shape, nbytes, path, reader, kind)


def _packed_tensor(path: Path, name: str, shape: tuple[int, ...], kind: str, start: int, nbytes: int) -> Tensor:
    """A tensor that can be read in MLX's packing and as dense float16."""
    bits = PACKED_BITS[kind]

    def read_packed() -> Packed:
        return PACKERS[kind](read_bytes(path, start, nbytes), shape)

    def read_dense() -> mx.array:
        weight, scales, biases = (part.reshape(-1, part.shape[-1]) for part in read_packed())
        exact = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), GROUP, bits)
        return _narrow(exact).reshape(shape)

    return Tensor(name, "F16", shape, nbytes, path, read_dense, kind, bits, GROUP, read_packed)


def _narrow(values: mx.array) -> mx.array:
    """The values in float16; unchanged, in float32, where float16 would overflow."""
    half = values.astype(mx.float16)
    return half if mx.all(mx.isfinite(half) | ~mx.isfinite(values)).item() else values


def _nibbles_to_mlx(q: np.ndarray, rows: tuple[int, ...]) -> mx.array:
    """The bytes of 4-bit blocks in ggml's order, (blocks, 16) → MLX's packing, uint32 (*rows, K / 8): value k of a row
    is in the four bits from 4 (k mod 8) on of word k div 8."""
    low, high = q & 15, q >> 4
    packed = np.empty_like(q)
    packed[:, :8] = low[:, 0::2] | low[:, 1::2] << 4
    packed[:, 8:] = high[:, 0::2] | high[:, 1::2] << 4
    return mx.array(packed.view("<u4").reshape(*rows, -1))


def _halves(blocks: np.ndarray, column: int, rows: tuple[int, ...]) -> np.ndarray:
    """The float16 at byte `column` of each block, (*rows, blocks per row)."""
    return np.ascontiguousarray(blocks[:, column : column + 2]).view("<f2").reshape(*rows, -1)


def _scaled(scales: np.ndarray, zero: int) -> tuple[mx.array, mx.array]:
    """(Scales, biases = zero · scales). Both are float16, where the product with `zero`, a power of two, is exact, or
    float32 where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file's scales may be infinite
        biases = scales * np.float16(zero)
        if not np.isfinite(biases[np.isfinite(scales)]).all():
            scales = scales.astype(np.float32)
            biases = scales * np.float32(zero)
    return mx.array(scales), mx.array(biases)


def _pack_q4_0(data: np.ndarray, shape: tuple[int, ...]) -> Packed:
    """The bytes of a tensor of Q4_0 blocks → MLX's packing."""
    blocks = data.reshape(-1, 18)
    return _nibbles_to_mlx(blocks[:, 2:], shape[:-1]), *_scaled(_halves(blocks, 0, shape[:-1]), -8)


def _pack_q4_1(data: np.ndarray, shape: tuple[int, ...]) -> Packed:
    """The bytes of a tensor of Q4_1 blocks → MLX's packing."""
    blocks, rows = data.reshape(-1, 20), shape[:-1]
    return _nibbles_to_mlx(blocks[:, 4:], rows), mx.array(_halves(blocks, 0, rows)), mx.array(_halves(blocks, 2, rows))


def _pack_q8_0(data: np.ndarray, shape: tuple[int, ...]) -> Packed:
    """The bytes of a tensor of Q8_0 blocks → MLX's packing."""
    blocks = data.reshape(-1, 34)
    weight = np.ascontiguousarray(blocks[:, 2:] ^ 0x80).view("<u4").reshape(*shape[:-1], -1)
    return mx.array(weight), *_scaled(_halves(blocks, 0, shape[:-1]), -128)


PACKERS: dict[str, Callable[[np.ndarray, tuple[int, ...]], Packed]] = {
    "Q4_0": _pack_q4_0,
    "Q4_1": _pack_q4_1,
    "Q8_0": _pack_q8_0,
}


def dequantise(data: np.ndarray, kind: str, shape: tuple[int, ...], what: str) -> mx.array:
    """The bytes of blocks of type `kind` → a float16 array of `shape`, or float32 where float16 would overflow. The
    `gguf` library computes, some rows at a time. `what` names the tensor in errors. Raises MlxeffError for a type that
    the library does not have."""
    import gguf

    rows = data.reshape(-1, data.size * shape[-1] // np.prod(shape, dtype=np.int64))
    step, dtype = max(1, CHUNK_VALUES // shape[-1]), np.float16
    out, done = np.empty((rows.shape[0], shape[-1]), dtype), 0
    while done < rows.shape[0]:
        try:
            with np.errstate(all="ignore"):
                values = gguf.quants.dequantize(rows[done : done + step], gguf.GGMLQuantizationType[kind])
        except (NotImplementedError, KeyError) as error:
            raise MlxeffError(f"{what}: the gguf library cannot dequantise {kind}") from error
        if dtype is np.float16 and (np.abs(values[np.isfinite(values)]) >= 65520).any():
            out, dtype = out.astype(np.float32), np.float32
        out[done : done + step] = values
        done += step
    return mx.array(out.reshape(shape))
