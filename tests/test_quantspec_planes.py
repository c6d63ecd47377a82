"""Numbers in two planes of 4 bits: the codes beside an oracle in NumPy, bounds of the error, and what groups do to each
other. A second."""

import mlx.core as mx
import numpy as np
import pytest

from mlxeff.quantspec.cache import decode_blocks, encode_blocks
from mlxeff.quantspec.planes import decode, encode, pack, unpack


def oracle(x: np.ndarray):
    """(codes, scale, zero): scale and zero are rounded to float16 before the codes are made."""
    low, high = x.min(-1), x.max(-1)
    scale = ((high - low) * np.float32(16 / 255)).astype(np.float16)
    zero = low.astype(np.float16)
    step = (scale.astype(np.float32) / 16)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.round((x - zero.astype(np.float32)[..., None]) / step), 0, 255)
    return np.where(step > 0, codes, 0).astype(np.uint32), scale, zero


def groups(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 64)).astype(np.float32)
    return {
        "normal": x,
        "tiny": x * 1e-6,
        "subnormal scales": x * 1e-4,
        "large": x * 3000,
        "far from zero": x + 500,
        "an outlier": np.where(np.arange(64) == 9, 800.0, x).astype(np.float32),
        "constant": np.full((3, 64), -2.5, np.float32),
        "zeros": np.where(rng.random((3, 64)) < 0.5, 0.0, -0.0).astype(np.float32),
    }[kind]


KINDS = ["normal", "tiny", "subnormal scales", "large", "far from zero", "an outlier", "constant", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_oracle(kind):
    x = groups(kind)
    upper, lower, scale, zero = encode(mx.array(x))
    codes, want_scale, want_zero = oracle(x)
    assert np.array_equal(np.array(scale), want_scale)
    assert np.array_equal(np.array(zero), want_zero)
    got = np.array(unpack(upper)) * 16 + np.array(unpack(lower))
    assert np.array_equal(got, codes)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_half_a_step(kind):
    """Of the code's step with both planes, of the upper plane's step without the lower one; half precision of scale and
    zero adds to that."""
    x = groups(kind)
    upper, lower, scale, zero = encode(mx.array(x))
    both = np.array(decode(upper, lower, scale, zero, 64))
    draft = np.array(decode(upper, None, scale, zero, 64))
    span = (x.max(-1) - x.min(-1))[:, None]
    rounding = np.abs(np.array(zero, np.float32)[:, None]) * 2.0**-10 + span * 2.0**-10 + 2.0**-19
    assert (np.abs(both - x) <= span / 255 / 2 + rounding).all()
    assert (np.abs(draft - x) <= span * 16 / 255 / 2 + rounding).all()


def test_errors_that_the_documentation_states():
    x = np.random.default_rng(1).standard_normal((4000, 64)).astype(np.float32)
    upper, lower, scale, zero = encode(mx.array(x))
    span = (x.max(-1) - x.min(-1))[:, None]

    def rms(planes):
        return np.sqrt(np.mean(((np.array(decode(*planes, scale, zero, 64)) - x) / span) ** 2))

    assert rms((upper, lower)) == pytest.approx(0.0011, abs=0.0001)
    assert rms((upper, None)) == pytest.approx(0.0185, abs=0.0002)


def test_a_damaged_number_stays_visible():
    for bad in (np.nan, np.inf, 1e7):
        x = groups("normal")[:2].copy()
        x[0, 3] = bad
        upper, lower, scale, zero = encode(mx.array(x))
        values = np.array(decode(upper, lower, scale, zero, 64))
        assert not np.isfinite(values[0]).all()
        assert np.isfinite(values[1]).all()


def test_every_byte_is_packed_and_unpacked():
    codes = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(-1, 8).astype(np.uint32)
    words = pack(mx.array(codes))
    assert words.dtype == mx.uint32
    assert np.array_equal(np.array(words).reshape(-1), (codes << 4 * np.arange(8)).sum(-1).astype(np.uint32))
    assert np.array_equal(np.array(unpack(words)).reshape(-1, 8), codes)


def test_the_packing_is_that_of_mlx():
    """MLX's own products read a plane: the upper one with its scale and zero, the lower one with a sixteenth of it."""
    x = groups("normal")
    upper, lower, scale, zero = encode(mx.array(x))
    query = mx.array(np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32))
    scales, zeros = (each.astype(mx.float32)[:, None] for each in (scale, zero))
    options = {"group_size": 64, "bits": 4}
    got = mx.quantized_matmul(query, upper, scales, zeros, **options)
    got += mx.quantized_matmul(query, lower, scales / 16, mx.zeros_like(zeros), **options)
    want = query @ decode(upper, lower, scale, zero, 64).T
    assert np.abs(np.array(got - want)).max() < 1e-4


def test_keys_are_grouped_by_channel_and_values_by_token():
    """A thousandfold channel of keys, or token of values, changes the codes of no other one."""
    rows = np.random.default_rng(3).standard_normal((1, 1, 1, 64, 80)).astype(np.float32)
    channel, token = rows.copy(), rows.copy()
    channel[..., 7] *= 1000
    token[..., 9, :] *= 1000

    def stored(keys, values):
        planes = encode_blocks(mx.array(keys), mx.array(values), ("key", "value"))
        decoded = decode_blocks(*planes, size=80, block=64, lower=("key", "value"))
        return [np.array(part)[0, 0] for part in decoded]

    (keys, values), (new_keys, new_values) = stored(rows, rows), stored(channel, token)
    assert {int(e) for e in np.argwhere(keys != new_keys)[:, 1]} == {7}
    assert {int(t) for t in np.argwhere(values != new_values)[:, 0]} == {9}


@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("lower", [("key", "value"), ("key",), ()])
def test_blocks_come_back(size, lower):
    """Each part in the view that its planes allow; the number of bytes is that of the formula."""
    block = 128 if size == 128 else 64
    rng = np.random.default_rng(4)
    keys, values = (mx.array(rng.standard_normal((2, 3, 2, block, size)).astype(np.float32)) for _ in range(2))
    upper, below = encode_blocks(keys, values, lower)
    width = -(-size // 32) * 32
    assert upper.shape == (2, 3, 2, 4 * (size + block) + size * block // 2 + block * width // 2)
    assert below.shape[3] == sum({"key": size * block // 2, "value": block * width // 2}[name] for name in lower)
    got = decode_blocks(upper, below if lower else None, size=size, block=block, lower=lower)
    for name, exact, part in (("key", keys, got[0]), ("value", values, got[1])):
        error = np.array(part.reshape(exact.shape) - exact)
        span = np.ptp(np.array(exact), axis=-2 if name == "key" else -1, keepdims=True)
        bound = span / 255 / 2 if name in lower else span * 16 / 255 / 2
        assert (np.abs(error) <= bound * 1.05 + 1e-3).all()
