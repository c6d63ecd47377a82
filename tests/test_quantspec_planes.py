"""Numbers in two planes of 4 bits: the codes beside an oracle in NumPy, bounds of the error, the rotation and the order
of the bytes. A second."""

import mlx.core as mx
import numpy as np
import pytest

from mlxeff.quantspec.planes import (
    MIDDLE,
    TILE,
    decode,
    encode,
    pack_keys,
    pack_values,
    rotate,
    unpack_keys,
    unpack_values,
)


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


def coarse(codes):
    """Codes of the upper plane alone."""
    return (codes >> 4).astype(mx.float32) * 16 + MIDDLE


KINDS = ["normal", "tiny", "subnormal scales", "large", "far from zero", "an outlier", "constant", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_oracle(kind):
    x = groups(kind)
    got, scale, zero = encode(mx.array(x))
    codes, want_scale, want_zero = oracle(x)
    assert np.array_equal(np.array(scale), want_scale)
    assert np.array_equal(np.array(zero), want_zero)
    assert got.dtype == mx.uint8
    assert np.array_equal(np.array(got), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_half_a_step(kind):
    """Of the code's step with both planes, of the upper plane's step without the lower one; half precision of scale and
    zero adds to that."""
    x = groups(kind)
    codes, scale, zero = encode(mx.array(x))
    both = np.array(decode(codes, scale, zero))
    draft = np.array(decode(coarse(codes), scale, zero))
    span = (x.max(-1) - x.min(-1))[:, None]
    rounding = np.abs(np.array(zero, np.float32)[:, None]) * 2.0**-10 + span * 2.0**-10 + 2.0**-19
    assert (np.abs(both - x) <= span / 255 / 2 + rounding).all()
    assert (np.abs(draft - x) <= span * 16 / 255 / 2 + rounding).all()


def test_errors_that_the_documentation_states():
    x = np.random.default_rng(1).standard_normal((4000, 64)).astype(np.float32)
    codes, scale, zero = encode(mx.array(x))
    span = (x.max(-1) - x.min(-1))[:, None]

    def rms(codes):
        return np.sqrt(np.mean(((np.array(decode(codes, scale, zero)) - x) / span) ** 2))

    assert rms(codes) == pytest.approx(0.0011, abs=0.0001)
    assert rms(coarse(codes)) == pytest.approx(0.0185, abs=0.0002)


def test_the_papers_split_has_larger_errors():
    """Its official code rounds to 4 bits between the extremes, and stores the rounding error in the lower plane."""
    x = np.random.default_rng(1).standard_normal((4000, 64)).astype(np.float32)
    low, span = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    scale = span / 15
    upper = np.round(np.clip((x - low) / scale, 0, 15))
    draft = upper * scale + low
    lower = np.round(np.clip((x - draft) * 16 / scale, -8, 7))
    paper = [draft, draft + lower * scale / 16]
    codes, *scales = encode(mx.array(x))
    ours = [np.array(decode(each, *scales)) for each in (coarse(codes), codes)]
    wrong = [[np.sqrt(np.mean(((each - x) / span) ** 2)) for each in way] for way in (paper, ours)]
    assert wrong[0] == pytest.approx([0.0191, 0.0013], abs=0.0002)
    assert (np.array(wrong[1]) < wrong[0]).all()


def test_a_damaged_number_stays_visible():
    for bad in (np.nan, np.inf, 1e7):
        x = groups("normal")[:2].copy()
        x[0, 3] = bad
        values = np.array(decode(*encode(mx.array(x))))
        assert not np.isfinite(values[0]).all()
        assert np.isfinite(values[1]).all()


def halves(size, seed=0):
    return np.random.default_rng(seed).integers(0, 16, (2, 3, TILE, size)).astype(np.uint8)


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_bytes_of_keys(size):
    """Byte (j, t, i) holds channel 8 j + i of token t in its low half, and channel 8 j + 4 + i in its high half."""
    codes = halves(size)
    packed = pack_keys(mx.array(codes))
    assert packed.shape == (2, 3, 8 * size)
    bytes_ = np.array(packed).reshape(2, 3, size // 8, TILE, 4)
    for j, t, i in np.ndindex(bytes_.shape[2:]):
        want = codes[:, :, t, 8 * j + i] | codes[:, :, t, 8 * j + 4 + i] << 4
        assert np.array_equal(bytes_[:, :, j, t, i], want)
    assert np.array_equal(np.array(unpack_keys(packed)), codes)


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_bytes_of_values(size):
    """Byte (h, d, i) holds channel d of token 8 h + i in its low half, and of token 8 h + 4 + i in its high half."""
    codes = halves(size)
    packed = pack_values(mx.array(codes))
    assert packed.shape == (2, 3, 8 * size)
    bytes_ = np.array(packed).reshape(2, 3, 2, size, 4)
    for h, d, i in np.ndindex(bytes_.shape[2:]):
        want = codes[:, :, 8 * h + i, d] | codes[:, :, 8 * h + 4 + i, d] << 4
        assert np.array_equal(bytes_[:, :, h, d, i], want)
    assert np.array_equal(np.array(unpack_values(packed)), codes)


@pytest.mark.parametrize(("size", "block"), [(64, 64), (80, 16), (96, 32), (128, 128)])
def test_the_rotation(size, block):
    """It is a Hadamard matrix for each block of the head, its own inverse, keeps products, and spreads one large
    channel over its block."""
    matrix = np.array([[1.0]])
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x, y = np.random.default_rng(2).standard_normal((2, 5, size)).astype(np.float32)
    want = (x.reshape(5, -1, block) @ (matrix / np.sqrt(block))).reshape(5, size)
    turned = rotate(mx.array(x))
    assert np.abs(np.array(turned) - want).max() < 1e-5
    assert np.abs(np.array(rotate(turned)) - x).max() < 1e-5
    assert np.abs(np.array(turned @ rotate(mx.array(y)).T) - x @ y.T).max() < 1e-4
    spike = np.zeros((1, size), np.float32)
    spike[0, 3] = 1
    assert np.abs(np.array(rotate(mx.array(spike)))[0, :block]) == pytest.approx(block**-0.5)


def test_groups_do_not_touch_each_other():
    rows = np.random.default_rng(3).standard_normal((6, 80)).astype(np.float32)
    changed = rows.copy()
    changed[4] *= 1000
    before, after = (np.array(decode(*encode(mx.array(each)))) for each in (rows, changed))
    assert set(np.argwhere(before != after)[:, 0]) == {4}
