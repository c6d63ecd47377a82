"""The layouts of GGUF's quantised block types: the bytes of blocks → codes, scales and biases of an affine form.

A weight is code · scale + bias, with one scale and one bias for a group of consecutive weights; `gguf_packing` has the
table of the forms. Each function takes blocks uint8 (n, bytes per block) and returns codes uint8 (n, V), and scales and
biases float32 (n, V / group). What a damaged file holds gives infinite or undefined numbers, never an error. Source:
ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
"""

from collections.abc import Callable

import numpy as np

Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray]


def _half(blocks: np.ndarray, column: int) -> np.ndarray:
    """The float16 at byte `column` of each block, float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, column : column + 2]).view("<f2").astype(np.float32)


def _fields(data: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Bytes (n, m · width) → the fields of `bits` bits of each, uint8 (n, m · 8 / bits · width): for each run of
    `width` bytes first the lowest fields of all of them, then the next ones."""
    size = next(size for size in (8, 4, 1) if width % size == 0)  # bytes that are shifted together
    words = np.ascontiguousarray(data).view(f"<u{size}").reshape(-1, width // size)
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * size, "little")
    found = np.empty((len(words), 8 // bits, width // size), words.dtype)
    for place in range(8 // bits):
        np.bitwise_and(words >> words.dtype.type(place * bits), words.dtype.type(mask), out=found[:, place])
    return found.view(np.uint8).reshape(len(data), -1)


def simple(low: int, middle: int | None, high: bool = False) -> Callable[[np.ndarray], Unpacked]:
    """Blocks of 32: the scale d, the bias m (or, with `middle`, -middle · d), with `high` the fifth bits of the codes,
    and from byte `low` on their lower four bits: in byte j of value j, then of value j + 16."""

    def unpack(blocks: np.ndarray) -> Unpacked:
        d, codes = _half(blocks, 0), _fields(blocks[:, low:], 16, 4)
        if high:
            codes |= np.unpackbits(blocks[:, low - 4 : low], axis=1, bitorder="little") << np.uint8(4)
        return codes, d, _half(blocks, 2) if middle is None else d * np.float32(-middle)

    return unpack


def q8_0(blocks: np.ndarray) -> Unpacked:
    d = _half(blocks, 0)
    return blocks[:, 2:] ^ np.uint8(0x80), d, -128 * d


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of a block of Q4_K or Q5_K → eight scales and eight minima, integers of 6 bits, (n, 8). The first
    four of each are in the low bits of bytes 0 to 7; of the others four bits are in bytes 8 to 11, two at the top of
    bytes 0 to 7."""
    first, last = packed[:, :8].reshape(-1, 2, 4), _fields(packed[:, 8:], 4, 4).reshape(-1, 2, 4)
    both = np.concatenate([first & np.uint8(63), first >> np.uint8(6) << np.uint8(4) | last], axis=2)
    return both[:, 0], both[:, 1]


def _with_minima(blocks: np.ndarray, codes: np.ndarray) -> Unpacked:
    scales, minima = _six_bits(blocks[:, 4:16])
    return codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima * np.float32(-1)


def q4_k(blocks: np.ndarray) -> Unpacked:
    return _with_minima(blocks, _fields(blocks[:, 16:], 32, 4))


def q5_k(blocks: np.ndarray) -> Unpacked:
    return _with_minima(blocks, _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << np.uint8(4))


def q3_k(blocks: np.ndarray) -> Unpacked:
    """Code 128 - q s, scale -d and bias 128 d, so that all q s from -124 to 128 have one."""
    low, high = _fields(blocks[:, 96:104], 8, 4), _fields(blocks[:, 104:108], 4, 2)
    scales = (low | high << np.uint8(4)).astype(np.int16) - 32
    q = (_fields(blocks[:, 32:96], 32, 2) | _fields(blocks[:, :32], 32, 1) << np.uint8(2)).reshape(-1, 16, 16)
    codes = 128 - (q.astype(np.int16) - 4) * scales[:, :, None]
    d = np.repeat(_half(blocks, 108), 2, axis=1)
    return codes.astype(np.uint8).reshape(len(blocks), -1), -d, 128 * d


def tq2_0(blocks: np.ndarray) -> Unpacked:
    d = np.repeat(_half(blocks, 64), 2, axis=1)
    return _fields(blocks[:, :64], 32, 2), d, -d


IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
E2M1_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # twice the values of FP4 (OCP MX)


def iq4_nl(blocks: np.ndarray) -> Unpacked:
    d = _half(blocks, 0)
    return (IQ4_VALUES + 128).astype(np.uint8)[_fields(blocks[:, 2:], 16, 4)], d, -128 * d


def iq4_xs(blocks: np.ndarray) -> Unpacked:
    low, high = _fields(blocks[:, 4:8], 1, 4), _fields(blocks[:, 2:4], 1, 2)
    scales = _half(blocks, 0) * ((low | high << np.uint8(4)).astype(np.float32) - 32)
    return (IQ4_VALUES + 128).astype(np.uint8)[_fields(blocks[:, 8:], 16, 4)], scales, -128 * scales


def mxfp4(blocks: np.ndarray) -> Unpacked:
    """The scale of a block of zeros, which may be too small for float16, is 0."""
    codes = (E2M1_VALUES + 16).astype(np.uint8)[_fields(blocks[:, 1:], 16, 4)]
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    scales *= (codes != 16).any(axis=1, keepdims=True)
    return codes, scales, -16 * scales


def _unit(blocks: np.ndarray, column: int) -> np.ndarray:
    """The blocks with 1 in place of the float16 at byte `column`, their scale."""
    unit = blocks.copy()
    unit[:, column : column + 2] = 0x00, 0x3C
    return unit


def _dequantised(blocks: np.ndarray, kind: str) -> np.ndarray:
    """The values of blocks, float32 (n, V), as the `gguf` library computes them, which has the tables of `kind`."""
    import gguf

    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def _odd(scales: np.ndarray) -> np.ndarray:
    """Integers s → 2 s + 1 in float32."""
    return 2 * scales.astype(np.float32) + 1


def _by_32(values: np.ndarray, scales: np.ndarray, zero: float) -> np.ndarray:
    """Values (n, V) → codes value / scale + zero, with one of the scales (n, V / 32) for 32 values."""
    codes = values.reshape(len(values), -1, 32) / scales[:, :, None] + np.float32(zero)
    return codes.astype(np.uint8).reshape(len(values), -1)


def tq1_0(blocks: np.ndarray) -> Unpacked:
    values, d = _dequantised(_unit(blocks, 52), "TQ1_0"), _half(blocks, 52)
    d = np.repeat(d, 2, axis=1)
    return (values + 1).astype(np.uint8), d, -d


def iq2_xxs(blocks: np.ndarray) -> Unpacked:
    values, d = _dequantised(_unit(blocks, 0), "IQ2_XXS"), _half(blocks, 0)
    scales = _odd(blocks[:, 9::8] >> np.uint8(4)) / 8
    return _by_32(values, scales, 128), d * scales, -128 * d * scales


def iq3_xxs(blocks: np.ndarray) -> Unpacked:
    values, d = _dequantised(_unit(blocks, 0), "IQ3_XXS"), _half(blocks, 0)
    scales = _odd(blocks[:, 69::4] >> np.uint8(4)) / 2
    return _by_32(values, scales, 32), d * scales, -32 * d * scales


def iq3_s(blocks: np.ndarray) -> Unpacked:
    """An odd c from -15 to 15 is 2 q - 15."""
    values, d = _dequantised(_unit(blocks, 0), "IQ3_S"), _half(blocks, 0)
    scales = 2 * _odd(_fields(blocks[:, 106:], 1, 4))
    return _by_32(values, scales, 7.5), d * scales, -7.5 * d * scales


def iq1_s(blocks: np.ndarray) -> Unpacked:
    values, d = _dequantised(_unit(blocks, 0), "IQ1_S"), _half(blocks, 0)
    high = blocks[:, 35::2]
    scales, shift = _odd(high >> np.uint8(4) & np.uint8(7)), np.where(high & np.uint8(0x80), 1.125, 0.875)
    codes = np.rint(values.reshape(len(values), -1, 32) / scales[:, :, None] + shift[:, :, None])
    return codes.astype(np.uint8).reshape(len(values), -1), d * scales, -shift * d * scales


def iq1_m(blocks: np.ndarray) -> Unpacked:
    """The four bits of d at a time are the highest of the last four words. Eight times a value is an odd multiple of d,
    from -135 to 135 times, which is 2 q - 135."""
    words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
    bits = words >> np.uint16(12) << np.arange(0, 16, 4, dtype=np.uint16)
    d = bits.sum(axis=1, keepdims=True, dtype=np.uint16).view(np.float16).astype(np.float32)
    unit = blocks.copy()
    unit[:, 49::2] = unit[:, 49::2] & np.uint8(15) | np.array([0, 0, 0xC0, 0x30], np.uint8)
    codes = ((8 * _dequantised(unit, "IQ1_M") + 135) / 2).astype(np.uint8)
    d = np.repeat(d, 2, axis=1)
    return codes, d / 4, d * np.float32(-135 / 8)


def q6_k(blocks: np.ndarray) -> Unpacked:
    q = (_fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << np.uint8(4)).astype(np.float32) - 32
    return requantised(q, blocks[:, 192:208].view(np.int8).astype(np.float32), _half(blocks, 208))


def q2_k(blocks: np.ndarray) -> Unpacked:
    """The 256 codes of 8 bits span the range of a group."""
    scales = _half(blocks, 80) * (blocks[:, :16] & np.uint8(15))
    minima = _half(blocks, 82) * (blocks[:, :16] >> np.uint8(4))
    q = _fields(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16)
    values = (q * scales[:, :, None] - minima[:, :, None]).reshape(-1, 8, 32)
    low = values.min(axis=2, keepdims=True)
    step = (values.max(axis=2, keepdims=True) - low) / 255
    codes = np.rint((values - low) * np.where(step > 0, 1 / step, 0))
    return codes.astype(np.uint8).reshape(len(blocks), -1), step[:, :, 0], low[:, :, 0]


def iq2_xs(blocks: np.ndarray) -> Unpacked:
    return _iq2(blocks, "IQ2_XS", 66)


def iq2_s(blocks: np.ndarray) -> Unpacked:
    return _iq2(blocks, "IQ2_S", 74)


def _iq2(blocks: np.ndarray, kind: str, column: int) -> Unpacked:
    """Blocks whose scales, four bits each, begin at byte `column`."""
    scales = _odd(_fields(blocks[:, column : column + 8], 1, 4)) / 8
    values = _dequantised(_unit(blocks, 0), kind).reshape(-1, 16, 16)
    return requantised(values / scales[:, :, None], scales, _half(blocks, 0))


def requantised(q: np.ndarray, scales: np.ndarray, d: np.ndarray) -> Unpacked:
    """Weights q · scale · d with q float32 (n, V) or (n, V / 16, 16) and a scale (n, V / 16) for 16 of them → 8-bit
    codes for groups of 32.

    A group's step is its larger scale divided by a whole number, the largest with which 256 steps around 0 suffice. So
    the half with the larger scale keeps its weights, and 0 stays 0; weights of the other half are rounded.
    """
    pairs = scales.reshape(len(scales), -1, 2)
    values = (q.reshape(len(q), -1, 2, 16) * pairs[..., None]).reshape(len(q), -1, 32)
    larger = np.abs(pairs).max(axis=2)
    low, high = -values.min(axis=2), values.max(axis=2)
    sign = np.where(high > low, np.float32(-1), np.float32(1))  # code 0 is for the weight furthest from 0
    low, high = np.maximum(low, high), np.minimum(low, high)
    count = np.floor(np.minimum(128 * larger / low, 127.49 * larger / np.maximum(high, low / 1000)))
    count = np.where(low > 0, count, 1)
    steps = np.where(larger > 0, sign * larger / count, 0)
    codes = np.rint(values * np.where(larger > 0, 1 / steps, 0)[:, :, None]) + 128
    return codes.astype(np.uint8).reshape(len(q), -1), d * steps, -128 * d * steps
