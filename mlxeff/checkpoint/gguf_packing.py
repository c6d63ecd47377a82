"""GGUF's quantised block types → MLX's affine packing.

A group of 32, 64 or 128 weights in MLX's packing is w = q · scale + bias with codes q of 2 to 8 bits. FORMS says which
form holds each block type. Sources: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml for the blocks,
the documentation of `mx.quantize` for the packing. n is the number of blocks, V the number of values in one.

    type            values in ggml, and their number with one scale   codes           what is lost
    Q4_0, Q5_0      (q - 8) d, (q - 16) d              32             4, 5 bits: q    nothing
    Q4_1, Q5_1      q d + m                            32             4, 5 bits: q    nothing
    Q8_0            q d                                32             8 bits          nothing
    IQ4_NL          c d, c one of 16 integers          32             8 bits          nothing
    MXFP4           c e / 2, |c| ≤ 12, e = 2^k         32             5 bits          nothing
    TQ1_0, TQ2_0    q d, q of -1, 0, 1                256             2 bits          nothing
    Q3_K            q s d, |q s| ≤ 128, s integer      16, d: 256     8 bits: q s     nothing
    Q4_K, Q5_K      q s d - t e, s and t integers      32             4, 5 bits: q    s d and t e are rounded
    IQ4_XS          c s d                              32             8 bits          s d is rounded
    IQ2_XXS         c s d / 8, |c| of 8, 25, 43        32             8 bits          s d is rounded
    IQ3_XXS         c s d / 4, |c| of 4, 12, … 52, 62  32             6 bits: c / 2   s d is rounded
    IQ3_S           c s d, |c| odd, up to 15           32             4 bits          s d is rounded
    IQ1_S           (q ± 1/8) s d, q of -1, 0, 1       32             2 bits          s d is rounded
    IQ1_M           c s d / 8, |c s| odd, up to 135     8, d: 256     8 bits          the bias is rounded
    Q6_K            q s d, q of -32 … 31               16             8 bits          weights are requantised
    Q2_K            q s d - t e, q of 0 … 3            16             8 bits          weights are requantised
    IQ2_XS, IQ2_S   c s d / 8, |c| of 8, 25, 43        16             8 bits          weights are requantised

Scales and biases are float16, the precision in which dequantised weights would be stored.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import gguf_layouts as layouts

Packed = tuple[mx.array, mx.array, mx.array]  # weight uint32 (…, K · bits / 32), scales and biases (…, K / group)
EXACT, ROUNDED, REQUANTISED = "exact", "with scales rounded to float16", "requantised to 8 bits"
CHUNK_VALUES = 1 << 18  # number of values that are unpacked at a time: the temporary arrays fit into a cache
HALF_STEP = 2.0**-11  # the relative error of rounding to float16, whose precision is 11 bits


@dataclass(frozen=True)
class Form:
    """How MLX's packing holds a block type."""

    bits: int
    group: int
    loss: str  # EXACT, ROUNDED or REQUANTISED
    unpack: Callable[[np.ndarray], layouts.Unpacked]


def pack(data: np.ndarray, shape: tuple[int, ...], form: Form, values: int, nbytes: int) -> Packed:
    """The bytes of a tensor of `shape` (…, K), in blocks of `values` values and `nbytes` bytes → MLX's packing. Scales
    and biases are float16, or float32 where that would lose more (see `_narrow`)."""
    blocks = data.reshape(-1, nbytes)
    weight = np.empty((len(blocks), values * form.bits // 8), np.uint8)
    scales, biases = np.empty((2, len(blocks), values // form.group), np.float32)
    with np.errstate(all="ignore"):  # a damaged file's scales may be infinite
        for part in slices(len(blocks), CHUNK_VALUES // values):
            codes, scales[part], biases[part] = form.unpack(blocks[part])
            weight[part] = pack_codes(codes, form.bits)
        scales, biases = _narrow(scales, biases, 0 if form.loss == EXACT else HALF_STEP)
    rows = shape[:-1]
    parts = (weight.view("<u4"), scales, biases)
    return tuple(mx.array(part.reshape(*rows, part.size // math.prod(rows))) for part in parts)


def slices(count: int, step: int) -> Iterator[slice]:
    """Yield consecutive slices of `count` rows, `step` rows each, the last one perhaps less."""
    for start in range(0, count, max(1, step)):
        yield slice(start, start + max(1, step))


def packed_nbytes(shape: tuple[int, ...], form: Form) -> int:
    """Bytes of the arrays that `pack` gives, with scales and biases in float16."""
    count = math.prod(shape)
    return count * form.bits // 8 + 4 * count // form.group


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes below 2^bits, uint8 (n, V), V a multiple of 8 → bytes uint8 (n, V · bits / 8). They are a stream of bits in
    which code k is in the bits from k · bits on, lowest first."""
    if bits == 8:
        return codes
    if bits == 4:
        pairs = np.ascontiguousarray(codes).view("<u2")
        return (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    eight = np.ascontiguousarray(codes).view("<u8")  # eight codes, a byte each, are moved together in three steps
    for width, kept in ((8, 0x00FF), (16, 0x0000FFFF), (32, 0x00000000FFFFFFFF)):
        low = np.uint64(sum(kept << shift for shift in range(0, 64, 2 * width)))
        high = (eight >> np.uint64(width)) & low
        eight = (eight & low) | high << np.uint64(bits * width // 8)
    return eight.view(np.uint8).reshape(len(codes), -1, 8)[:, :, :bits].reshape(len(codes), -1)


def _narrow(scales: np.ndarray, biases: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Both in float16 where every number of an array changes by at most `tolerance` times its largest; otherwise
    unchanged, in float32. With HALF_STEP this allows the rounding of normal numbers, and that of subnormal ones where
    the largest number is large enough; with 0 nothing but numbers that float16 has."""
    halves = [each.astype(np.float16) for each in (scales, biases)]
    for half, each in zip(halves, (scales, biases), strict=True):
        if np.array_equal(half, each):
            continue
        finite = np.where(np.isfinite(each), each, 0)
        error = np.abs(np.where(np.isfinite(each), half, 0) - finite).max(initial=0)
        if error > tolerance * np.abs(finite).max(initial=0):
            return scales, biases
    return halves[0], halves[1]


FORMS = {
    "Q4_0": Form(4, 32, EXACT, layouts.simple(2, 8)),
    "Q4_1": Form(4, 32, EXACT, layouts.simple(4, None)),
    "Q5_0": Form(5, 32, EXACT, layouts.simple(6, 16, high=True)),
    "Q5_1": Form(5, 32, EXACT, layouts.simple(8, None, high=True)),
    "Q8_0": Form(8, 32, EXACT, layouts.q8_0),
    "Q2_K": Form(8, 32, REQUANTISED, layouts.q2_k),
    "Q3_K": Form(8, 128, EXACT, layouts.q3_k),
    "Q4_K": Form(4, 32, ROUNDED, layouts.q4_k),
    "Q5_K": Form(5, 32, ROUNDED, layouts.q5_k),
    "Q6_K": Form(8, 32, REQUANTISED, layouts.q6_k),
    "IQ1_S": Form(2, 32, ROUNDED, layouts.iq1_s),
    "IQ1_M": Form(8, 128, ROUNDED, layouts.iq1_m),
    "IQ2_XXS": Form(8, 32, ROUNDED, layouts.iq2_xxs),
    "IQ2_XS": Form(8, 32, REQUANTISED, layouts.iq2_xs),
    "IQ2_S": Form(8, 32, REQUANTISED, layouts.iq2_s),
    "IQ3_XXS": Form(6, 32, ROUNDED, layouts.iq3_xxs),
    "IQ3_S": Form(4, 32, ROUNDED, layouts.iq3_s),
    "IQ4_NL": Form(8, 32, EXACT, layouts.iq4_nl),
    "IQ4_XS": Form(8, 32, ROUNDED, layouts.iq4_xs),
    "TQ1_0": Form(2, 128, EXACT, layouts.tq1_0),
    "TQ2_0": Form(2, 128, EXACT, layouts.tq2_0),
    "MXFP4": Form(5, 32, EXACT, layouts.mxfp4),
}
