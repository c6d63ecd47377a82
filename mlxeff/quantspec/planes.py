"""Keys and values as codes of 8 bits in two planes of 4 bits, in the way of QuantSpec (arXiv 2502.10424, section 4):
one scale and one zero serve both precisions, and a reader of the upper plane alone never touches the lower one.

A group is the key or the value of one token and head, rotated. A group of numbers x becomes codes
c = round((x - zero) 16 / scale) from 0 to 255, where scale is 16 / 255 of the group's range and zero its minimum, both
rounded to float16 before the codes are made. The upper plane holds u = c div 16 and the lower one l = c mod 16:

    both planes       (16 u + l) scale / 16 + zero
    the upper plane   (u + 7.5 / 16) scale + zero, the middle of the numbers with this u

Two deviations from the paper. Its official code rounds to 4 bits first and stores the rounding error in the lower
plane; this split has the smaller error in both views (rms, as a share of the range, of 64 normally distributed numbers:
0.0011 and 0.0185 for 0.0013 and 0.0191), and the codes are those of plain 8-bit quantisation. And the paper groups keys
by channel, without a rotation; `benchmarks/kv_codecs.py` measures both.

The rotation is a Hadamard transform of the head. It spreads a large channel over all of them, and is its own inverse.
Attention needs no inverse for keys, since rotated queries have the same products with rotated keys, and one for each
output, since a sum of rotated values is the rotated sum.

Tokens lie in tiles of TILE. `pack_keys` and `pack_values` put the codes of one plane into bytes, so that vector units
multiply four codes of one lane: of four channels of a token for keys, of four tokens of a channel for values.

    keys     bytes (E / 8, 16 tokens, 4): byte (j, t, i) holds channel 8 j + i of token t in its low half, and channel
             8 j + 4 + i in its high half
    values   bytes (2, E, 4): byte (h, d, i) holds channel d of token 8 h + i in its low half, and of token 8 h + 4 + i
             in its high half
"""

import mlx.core as mx

TILE = 16  # tokens
SCALE_BYTES = 4 * TILE * 2  # of a tile: scale and zero of the keys, and of the values, in float16
HEAD_SIZES = (64, 80, 96, 128)
STEPS = 255  # between the smallest and the largest code
MIDDLE = 7.5  # of the codes with the same upper half

Encoded = tuple[mx.array, mx.array, mx.array]  # codes, scale, zero


def rotate(values: mx.array) -> mx.array:
    """The Hadamard transform of the last axis, float32; in blocks of the largest power of two that divides it. It is
    orthogonal and its own inverse."""
    size = values.shape[-1]
    blocks = values.astype(mx.float32).reshape(*values.shape[:-1], -1, size & -size)
    return mx.hadamard_transform(blocks).reshape(values.shape)


def encode(values: mx.array) -> Encoded:
    """Numbers (…, n), a group along the last axis → codes uint8 (…, n), scale and zero float16 (…). Groups with NaN or
    infinite numbers, and those whose range float16 does not hold, get scales that are not finite."""
    values = values.astype(mx.float32)
    low, high = values.min(axis=-1), values.max(axis=-1)
    scale, zero = ((high - low) * (16 / STEPS)).astype(mx.float16), low.astype(mx.float16)
    step = scale.astype(mx.float32)[..., None] / 16
    offset = values - zero.astype(mx.float32)[..., None]
    codes = mx.where(step > 0, mx.clip(mx.round(offset / mx.where(step > 0, step, 1)), 0, STEPS), 0)
    return codes.astype(mx.uint8), scale, zero


def decode(codes: mx.array, scale: mx.array, zero: mx.array) -> mx.array:
    """The numbers (…, n), float32, of codes (…, n), which may be fractions, with scale and zero (…)."""
    scale, zero = (each.astype(mx.float32)[..., None] for each in (scale, zero))
    return codes.astype(mx.float32) * (scale / 16) + zero


def pack_keys(halves: mx.array) -> mx.array:
    """Half codes (…, TILE, E) of keys → bytes (…, 8 E)."""
    lead, size = halves.shape[:-2], halves.shape[-1]
    parts = halves.reshape(*lead, TILE, size // 8, 2, 4)
    return (parts[..., 0, :] | parts[..., 1, :] << 4).swapaxes(-2, -3).reshape(*lead, -1)


def unpack_keys(packed: mx.array) -> mx.array:
    """The inverse of `pack_keys`."""
    lead = packed.shape[:-1]
    parts = packed.reshape(*lead, -1, TILE, 4).swapaxes(-2, -3)
    return mx.stack([parts & 15, parts >> 4], axis=-2).reshape(*lead, TILE, -1)


def pack_values(halves: mx.array) -> mx.array:
    """Half codes (…, TILE, E) of values → bytes (…, 8 E)."""
    lead, size = halves.shape[:-2], halves.shape[-1]
    parts = halves.reshape(*lead, 2, 2, 4, size)
    return (parts[..., 0, :, :] | parts[..., 1, :, :] << 4).swapaxes(-1, -2).reshape(*lead, -1)


def unpack_values(packed: mx.array) -> mx.array:
    """The inverse of `pack_values`."""
    lead = packed.shape[:-1]
    parts = packed.reshape(*lead, 2, -1, 4).swapaxes(-1, -2)
    return mx.stack([parts & 15, parts >> 4], axis=-3).reshape(*lead, TILE, -1)
