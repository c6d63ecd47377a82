"""Native RMSNorm, RoPE, SwiGLU, softmax and cross-entropy, with their gradients, against float64 numpy."""

import ctypes as C

import numpy as np
import pytest

from cpu_calls import Heads, assert_close
from cpu_library import (
    BAD_ARGUMENT,
    BAD_DTYPE,
    BF16,
    F16,
    F32,
    NativeError,
    call,
    cast,
    dtype_of,
    set_threads,
    widen,
)  # fmt: skip

DTYPES = [F32, F16, BF16]
# A few fp32 roundings; or half a step of the output's dtype (relative 2^-11, 2^-9), with room for the fp32 ones.
TOLERANCE = {F32: 2e-6, F16: 5.5e-4, BF16: 4.2e-3}


pytestmark = pytest.mark.usefixtures("level")


def normal(seed, shape, dtype=F32, scale=1.0):
    return cast(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(scale), dtype)


def empty(shape, dtype=F32):
    return cast(np.full(shape, np.nan, np.float32), dtype)


def ld(x):
    return x.strides[0] // x.itemsize


def kind(x):
    return C.c_int(F32 if x is None else dtype_of(x))


def matrix(x):
    return x, ld(x), kind(x)


# --- RMSNorm ----------------------------------------------------------------------------------------------------------

EPS = 1e-5
NORM_SHAPES = [(1, 1), (1, 576), (3, 33), (7, 64), (100, 80), (2, 4097)]


def rms_norm(x, weight, y):
    call("mlxeff_rms_norm", *matrix(x), weight, kind(weight), *matrix(y), *x.shape, EPS)


def norm_reference(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPS)) * weight


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [F32, BF16])
def test_rms_norm(shape, dtype, weight_dtype, threads):
    set_threads(threads)
    x, weight, y = normal(1, shape, dtype), normal(2, shape[1:], weight_dtype), empty(shape, dtype)
    rms_norm(x, weight, y)
    assert_close(y, norm_reference(widen(x), widen(weight)), TOLERANCE[dtype], shape)
    rms_norm(x, None, x_copy := x.copy())
    assert_close(x_copy, norm_reference(widen(x), 1), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norm_in_a_wider_row(dtype):
    """q of a (B, S, q | k | v) projection, normed in place without touching its neighbours."""
    B, S, H, E = 2, 5, 3, 80
    rows = normal(6, (B, S, 5 * E), dtype)
    before = rows.copy()
    heads = rows.reshape(B, S, 5, E)[:, :, :H].swapaxes(1, 2)
    weight = normal(7, (E,), dtype)
    view = Heads(heads)
    call("mlxeff_head_norm", C.byref(view), C.byref(view), B, H, S, E, weight, kind(weight), EPS)
    want = norm_reference(widen(before).reshape(B, S, 5, E)[:, :, :H], widen(weight))
    assert_close(heads, want.swapaxes(1, 2), TOLERANCE[dtype])
    assert (rows[:, :, H * E :] == before[:, :, H * E :]).all()


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_backward(shape, dtype, threads):
    set_threads(threads)
    x, weight, dy = normal(8, shape, dtype), normal(9, shape[1:], dtype), normal(10, shape, dtype)
    dx, dw = empty(shape, dtype), empty(shape[1:])
    call("mlxeff_rms_norm_backward", *matrix(x), weight, kind(weight), *matrix(dy), *matrix(dx), dw, *shape, EPS)
    x, weight, dy = widen(x), widen(weight), widen(dy)
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPS))
    want = r * (weight * dy) - x * r**3 * (weight * dy * x).mean(-1, keepdims=True)
    assert_close(dx, want, 3 * TOLERANCE[dtype], shape)
    assert_close(dw, (dy * x * r).sum(0), 1e-5)
    # The formula itself, by a central difference along a random direction.
    step = 1e-6 * np.random.default_rng(11).standard_normal(shape)
    difference = ((norm_reference(x + step, weight) - norm_reference(x - step, weight)) * dy).sum() / 2
    assert abs(difference - (want * step).sum()) <= 1e-6 * np.abs(want * step).sum() + 1e-12


# --- RoPE -------------------------------------------------------------------------------------------------------------


def table(half, first, count, scale=1.0, base=10000.0):
    frequencies = base ** (-np.arange(half) / half)
    cos, sin = empty((count, half)), empty((count, half))
    call("mlxeff_rope_table", frequencies, half, first, count, C.c_double(scale), cos, sin)
    angles = np.arange(first, first + count)[:, None] * frequencies
    assert_close(cos, np.cos(angles) * scale, 1e-7)
    assert_close(sin, np.sin(angles) * scale, 1e-7)
    return cos, sin


def rope(x, y, cos, sin, rotated, inverse=0):
    B, H, S, E = x.shape
    call("mlxeff_rope", C.byref(Heads(x)), C.byref(Heads(y)), B, H, S, E, rotated, cos, sin, C.c_int(inverse))


def rope_reference(x, cos, sin, rotated):
    a, b, rest = np.split(widen(x), [rotated // 2, rotated], axis=-1)
    cos, sin = cos.astype(np.float64), sin.astype(np.float64)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], -1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64, 64), (2, 3, 5, 80, 80), (1, 9, 33, 64, 32), (1, 2, 100, 24, 24), (3, 1, 2, 7, 6)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_rope_into_a_cache(shape, dtype, out_dtype, threads):
    set_threads(threads)
    B, H, S, E, rotated = shape
    cos, sin = table(rotated // 2, 1000, S, 1.25)
    x = normal(12, (B, S, H, E), dtype).swapaxes(1, 2)
    cache = cast(np.full((B, H, S + 9, E), 3, np.float32), out_dtype)
    rope(x, cache[:, :, 4 : 4 + S], cos, sin, rotated)
    assert_close(cache[:, :, 4 : 4 + S], rope_reference(x, cos, sin, rotated), TOLERANCE[out_dtype], shape)
    assert (widen(cache[:, :, :4]) == 3).all()
    assert (widen(cache[:, :, 4 + S :]) == 3).all()


@pytest.mark.parametrize("rotated", [64, 20])
def test_rope_in_place_and_back(rotated):
    cos, sin = table(rotated // 2, 0, 17)
    x = normal(13, (2, 3, 17, 64))
    y = x.copy()
    rope(y, y, cos, sin, rotated)
    assert_close(y, rope_reference(x, cos, sin, rotated), TOLERANCE[F32])
    rope(y, y, cos, sin, rotated, inverse=1)
    assert_close(y, x, TOLERANCE[F32])


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1536), (3, 33), (64, 576), (2, 20001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(shape, dtype, threads):
    set_threads(threads)
    gate, up, dy = normal(14, shape, dtype, 4), normal(15, shape, dtype), normal(16, shape, dtype)
    y, silu = empty(shape, dtype), empty(shape, dtype)
    call("mlxeff_swiglu", gate, ld(gate), up, ld(up), y, ld(y), *shape, C.c_int(dtype))
    call("mlxeff_swiglu", gate, ld(gate), None, 0, silu, ld(silu), *shape, C.c_int(dtype))
    g, u, d = widen(gate), widen(up), widen(dy)
    assert_close(y, g * sigmoid(g) * u, TOLERANCE[dtype], shape)
    assert_close(silu, g * sigmoid(g), TOLERANCE[dtype], shape)

    dgate, dup, dsilu = empty(shape, dtype), empty(shape, dtype), empty(shape, dtype)
    call(
        "mlxeff_swiglu_backward",
        gate,
        ld(gate),
        up,
        ld(up),
        dy,
        ld(dy),
        dgate,
        ld(dgate),
        dup,
        ld(dup),
        *shape,
        C.c_int(dtype),
    )
    call(
        "mlxeff_swiglu_backward", gate, ld(gate), None, 0, dy, ld(dy), dsilu, ld(dsilu), None, 0, *shape, C.c_int(dtype)
    )
    slope = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
    assert_close(dgate, d * u * slope, TOLERANCE[dtype], shape)
    assert_close(dup, d * g * sigmoid(g), TOLERANCE[dtype], shape)
    assert_close(dsilu, d * slope, TOLERANCE[dtype], shape)
    central = ((g + 1e-6) * sigmoid(g + 1e-6) - (g - 1e-6) * sigmoid(g - 1e-6)) / 2e-6
    assert np.abs(central - slope).max() < 1e-8


def test_silu_extremes():
    x = np.array([[0, -0.0, 1e-30, 88, -88, 200, -200, 3e38, -3e38, np.inf, np.nan]], np.float32)
    y = empty(x.shape)
    call("mlxeff_swiglu", x, ld(x), None, 0, y, ld(y), *x.shape, C.c_int(F32))
    with np.errstate(over="ignore"):
        want = x.astype(np.float64) * sigmoid(x.astype(np.float64))
    assert np.isnan(y[0, -1])
    assert y[0, -2] == np.inf
    assert_close(y[:, :-2], want[:, :-2], TOLERANCE[F32])


# --- softmax and cross-entropy ----------------------------------------------------------------------------------------

SOFTMAX_SHAPES = [(1, 1), (3, 2), (2, 33), (5, 2047), (2, 49152), (1, 151936)]


def lse_reference(x):
    peak = x.max(-1, keepdims=True)
    return (peak + np.log(np.exp(x - peak).sum(-1, keepdims=True)))[..., 0]


def test_exp_within_two_ulp():
    """softmax of (x, 0) in a row of two is exp(x) / (1 + exp(x)); cross-entropy's gradient shows the bare exp."""
    x = np.linspace(-87, 0, 200001).astype(np.float32)[None]
    dx, lse, one = empty(x.shape), np.zeros(1, np.float32), np.ones(1, np.float32)
    call("mlxeff_cross_entropy_backward", *matrix(x), np.array([0], np.int32), lse, one, *matrix(dx), *x.shape)
    want = np.exp(x.astype(np.float64))[:, 1:]
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    assert (np.abs(dx[:, 1:] - want) / ulp).max() < 2


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", SOFTMAX_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_cross_entropy(shape, dtype, threads):
    set_threads(threads)
    rows, n = shape
    wide = normal(17, (rows, n + 3), dtype, 5)
    x = wide[:, :n]
    lse64 = lse_reference(widen(x))
    p64 = np.exp(widen(x) - lse64[:, None])

    y, lse = empty(shape), empty((rows,))
    call("mlxeff_softmax", *matrix(x), *matrix(y), rows, n)
    assert_close(y, p64, TOLERANCE[F32], shape)
    assert (np.abs(y - p64) <= 1e-5 * p64).all()  # relative: |x - max| of up to 50 carries 2^-24 of itself
    call("mlxeff_logsumexp", *matrix(x), lse, rows, n)
    assert_close(lse, lse64, TOLERANCE[F32])

    logarithms = empty(shape, dtype)
    call("mlxeff_log_softmax", *matrix(x), *matrix(logarithms), rows, n)
    assert_close(logarithms, widen(x) - lse64[:, None], TOLERANCE[dtype])

    targets = np.random.default_rng(18).integers(0, n, rows).astype(np.int32)
    if rows > 1:
        targets[1] = -1
    loss = empty((rows,))
    call("mlxeff_cross_entropy", *matrix(x), targets, loss, lse, rows, n)
    counts = targets >= 0
    assert_close(loss, np.where(counts, lse64 - widen(x)[np.arange(rows), targets], 0), TOLERANCE[F32])

    dloss, dx = normal(19, (rows,)), empty(shape, dtype)
    call("mlxeff_cross_entropy_backward", *matrix(x), targets, lse, dloss, *matrix(dx), rows, n)
    onehot = np.zeros(shape)
    onehot[np.arange(rows), targets] = 1
    assert_close(dx, (p64 - onehot) * (dloss * counts)[:, None], TOLERANCE[dtype], shape)

    best = np.empty(rows, np.int32)
    call("mlxeff_argmax", *matrix(x), best, rows, n)
    assert (best == widen(x).argmax(-1)).all()


def test_softmax_extremes():
    inf, nan = np.inf, np.nan
    x = np.array([[1e30, -1e30, 0], [-inf, 0, 0], [-inf, -inf, -inf], [1, nan, 2], [5e4, 5e4, -5e4]], np.float32)
    y, lse, best = empty(x.shape), empty((5,)), np.empty(5, np.int32)
    call("mlxeff_softmax", *matrix(x), *matrix(y), *x.shape)
    call("mlxeff_logsumexp", *matrix(x), lse, *x.shape)
    call("mlxeff_argmax", *matrix(x), best, *x.shape)
    logarithms = empty(x.shape)
    call("mlxeff_log_softmax", *matrix(x), *matrix(logarithms), *x.shape)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(logarithms, x - lse[:, None])
    np.testing.assert_array_equal(
        y, np.array([[1, 0, 0], [0, 0.5, 0.5], [nan] * 3, [nan] * 3, [0.5, 0.5, 0]], np.float32)
    )
    np.testing.assert_allclose(lse, [1e30, np.log(2), -inf, nan, 5e4 + np.log(2)], rtol=1e-7)
    assert best.tolist() == [0, 1, 0, 1, 0]


def test_bad_arguments():
    x, y = normal(20, (2, 3)), empty((2, 3))
    loss = empty((2,))

    def code(name, *args):
        with pytest.raises(NativeError) as error:
            call(name, *args)
        return error.value.code

    assert code("mlxeff_softmax", x, 3, C.c_int(5), *matrix(y), 2, 3) == BAD_DTYPE
    assert code("mlxeff_softmax", None, 3, C.c_int(F32), *matrix(y), 2, 3) == BAD_ARGUMENT
    assert code("mlxeff_cross_entropy", *matrix(x), np.array([0, 3], np.int32), loss, None, 2, 3) == BAD_ARGUMENT
    heads = Heads(normal(21, (1, 1, 2, 6)))
    assert code("mlxeff_rope", C.byref(heads), C.byref(heads), 1, 1, 2, 6, 5, x, y, C.c_int(0)) == BAD_ARGUMENT
