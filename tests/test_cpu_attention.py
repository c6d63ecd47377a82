"""Native attention against float64 numpy: shapes, layouts, dtypes, levels, thread counts, and the gradients."""

import numpy as np
import pytest

from cpu_calls import assert_close, attention, attention_args, attention_backward
from cpu_library import (
    BAD_ARGUMENT,
    BAD_DTYPE,
    BF16,
    COMPUTE_BF16,
    EXACT,
    F16,
    F32,
    NativeError,
    assert_unbiased,
    cast,
    set_threads,
    widen,
)  # fmt: skip

# fp32 arithmetic: a few roundings of scores of size |s| <= ~5 and a sum over at most 1000 keys.
TOLERANCE = {F32: 5e-6, F16: 1e-3, BF16: 8e-3}  # half precision: half a step of the output, of size <= 4
# Both operands of both products rounded to bf16 (relative 2^-9): scores off by ~2^-8 * sum |q k| scale, weights and
# values by 2^-9.
BF16_COMPUTE_TOLERANCE = 4e-2


pytestmark = pytest.mark.usefixtures("level")


def mask(S, T, window):
    last = np.arange(S)[:, None] + T - S
    keys = np.arange(T)[None]
    return (keys <= last) & ((keys > last - window) if window else True)


def probabilities(q, k, scale, window=0):
    """softmax(scale q k^T + mask) and its logsumexp in float64, k (B, H, T, E)."""
    scores = np.where(mask(q.shape[2], k.shape[2], window), scale * q @ k.swapaxes(2, 3), -np.inf)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    return weights / total, (peak + np.log(total))[..., 0]


def repeat(x, heads):
    return np.repeat(x, heads // x.shape[1], axis=1)


def reference(q, k, v, scale, window=0):
    q, k, v = widen(q), repeat(widen(k), q.shape[1]), repeat(widen(v), q.shape[1])
    weights, lse = probabilities(q, k, scale, window)
    return weights @ v, lse


def make(seed, B, H, G, S, T, E, q_dtype=F32, k_dtype=F32, v_dtype=None):
    rng = np.random.default_rng(seed)
    q = cast(rng.standard_normal((B, H, S, E), dtype=np.float32), q_dtype)
    k = cast(rng.standard_normal((B, G, T, E), dtype=np.float32), k_dtype)
    v = cast(rng.standard_normal((B, G, T, E), dtype=np.float32), k_dtype if v_dtype is None else v_dtype)
    return q, k, v, cast(np.full((B, H, S, E), np.nan, np.float32), q_dtype)


SHAPES = [  # B, H, G, S, T, E, window
    (1, 1, 1, 1, 1, 64, 0),
    (1, 3, 1, 1, 2, 24, 0),
    (2, 4, 4, 1, 100, 80, 0),
    (1, 9, 3, 1, 1000, 64, 0),
    (1, 8, 1, 1, 333, 128, 0),
    (3, 4, 1, 1, 65, 96, 0),
    (1, 2, 1, 1, 700, 256, 0),
    (1, 4, 4, 2, 77, 24, 0),
    (1, 8, 2, 3, 300, 128, 50),
    (2, 8, 1, 8, 8, 64, 0),
    (1, 3, 1, 16, 200, 64, 0),
    (2, 6, 2, 33, 33, 96, 0),
    (1, 4, 1, 100, 500, 256, 0),
    (1, 4, 2, 100, 500, 64, 37),
    (1, 3, 3, 129, 129, 7, 1),
    (1, 8, 1, 40, 40, 80, 0),
    (1, 2, 1, 130, 700, 64, 200),
    (3, 1, 1, 257, 1000, 1, 0),
    (1, 12, 1, 5, 600, 33, 0),
    (1, 9, 3, 8, 700, 64, 0),
    (2, 8, 2, 8, 300, 20, 40),
    (1, 3, 1, 11, 300, 64, 0),
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, threads):
    B, H, G, S, T, E, window = shape
    set_threads(threads)
    q, k, v, out = make(1, B, H, G, S, T, E)
    lse = np.full((B, H, S), np.nan, np.float32)
    attention(attention_args(q, k, v, out, E**-0.5, window, lse=lse))
    want, want_lse = reference(q, k, v, E**-0.5, window)
    assert_close(out, want, TOLERANCE[F32], shape)
    assert_close(lse, want_lse, TOLERANCE[F32], f"lse {shape}")


@pytest.mark.parametrize(
    "shape", [(1, 6, 2, 1, 150, 64, 0), (1, 6, 2, 40, 150, 80, 30), (1, 4, 2, 1, 70, 24, 0)], ids=str
)
@pytest.mark.parametrize("q_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("k_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("v_dtype", [F32, F16, BF16])
def test_dtypes(shape, q_dtype, k_dtype, v_dtype):
    *sizes, window = shape
    q, k, v, out = make(2, *sizes, q_dtype, k_dtype, v_dtype)
    attention(attention_args(q, k, v, out, 0.125, window))
    assert_close(out, reference(q, k, v, 0.125, window)[0], TOLERANCE[q_dtype], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bf16_mode(shape, dtype, level):
    *sizes, window = shape
    q, k, v, out = make(3, *sizes, dtype, dtype)
    attention(attention_args(q, k, v, out, sizes[-1] ** -0.5, window, mode=COMPUTE_BF16))
    tolerance = BF16_COMPUTE_TOLERANCE if level == "amx" else TOLERANCE[dtype]
    want = reference(q, k, v, sizes[-1] ** -0.5, window)[0]
    assert_close(out, want, tolerance, shape)
    assert_unbiased(out, want, shape)


@pytest.mark.parametrize("S", [1, 9, 70])
@pytest.mark.parametrize("mode", [EXACT, COMPUTE_BF16])
def test_cache_buffer_and_layouts(S, mode, level):
    """Keys and values inside a larger buffer whose rest is NaN; queries and output as (B, S, H, E)."""
    B, H, G, T, E, capacity = 2, 6, 2, 300, 64, 512
    q, k, v, _ = make(4, B, H, G, S, T, E, F32, F16)
    buffers = [np.full((B, G, capacity, E), np.nan, np.float16) for _ in range(2)]
    buffers[0][:, :, :T], buffers[1][:, :, :T] = k, v
    token_major = [np.full((B, capacity, G, E), np.nan, np.float16) for _ in range(2)]
    token_major[0][:, :T], token_major[1][:, :T] = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q_token_major = np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2)
    want = reference(q, k, v, 0.1)[0]
    for keys, values in (buffers, [x.swapaxes(1, 2) for x in token_major]):
        surrounded = np.full((B, S + 2, H, E), 7, np.float32)
        out = surrounded[:, 1:-1].swapaxes(1, 2)
        attention(attention_args(q_token_major, keys[:, :, :T], values[:, :, :T], out, 0.1, mode=mode))
        assert_close(out, want, BF16_COMPUTE_TOLERANCE if mode and level == "amx" else TOLERANCE[F32])
        assert (surrounded[:, [0, -1]] == 7).all()


def test_chunks_equal_one_shot():
    """Prefill in chunks against a growing cache, then token by token, gives what one pass gives."""
    B, H, G, T, E = 1, 6, 2, 230, 64
    q, k, v, whole = make(5, B, H, G, T, T, E)
    attention(attention_args(q, k, v, whole, 0.125))
    pieces, begin = np.empty_like(whole), 0
    for size in [100, 64, 33, 8, 3, 2] + [1] * 20:
        end = begin + size
        attention(attention_args(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], pieces[:, :, begin:end], 0.125))
        begin = end
    assert begin == T
    assert_close(pieces, whole.astype(np.float64), TOLERANCE[F32])


@pytest.mark.parametrize("S", [1, 50])
def test_large_scores(S):
    """Scores up to about 1e5: almost one-hot rows. fp32 scores are relative: exponents are off by up to .01."""
    q, k, v, out = make(6, 1, 3, 1, S, 200, 64)
    attention(attention_args(q, k, v, out, 3000.0))
    assert np.isfinite(out).all()
    assert_close(out, reference(q, k, v, 3000.0)[0], 0.2)
    attention(attention_args(q, k, v, out, 0.0))
    assert_close(out, reference(q, k, v, 0.0)[0], TOLERANCE[F32])


@pytest.mark.parametrize("S", [1, 50])
def test_nan_stays_in_rows_that_see_it(S):
    q, k, v, out = make(7, 1, 3, 1, S, 200, 64)
    q[0, 1, S // 2, 3] = np.nan
    attention(attention_args(q, k, v, out, 0.125))
    is_nan = np.isnan(out).all(-1)
    assert is_nan[0, 1, S // 2]
    assert is_nan.sum() == 1
    assert np.isnan(out).sum() == 64
    q, k, v, out = make(7, 1, 3, 1, S, 200, 64)
    k[0, 0, 180, 5] = np.nan
    attention(attention_args(q, k, v, out, 0.125))
    sees = 200 - S + np.arange(S) >= 180
    assert (np.isnan(out).all(-1) == sees).all()
    assert (np.isnan(out).any(-1) == sees).all()


def test_bad_arguments():
    q, k, v, out = make(8, 1, 4, 2, 4, 8, 16)

    def code(**changes):
        args = attention_args(q, k, v, out, 1.0)
        for name, value in changes.items():
            setattr(args, name, value)
        with pytest.raises(NativeError) as error:
            attention(args)
        return error.value.code

    assert code(T=3) == BAD_ARGUMENT
    assert code(G=3) == BAD_ARGUMENT
    assert code(window=-1) == BAD_ARGUMENT
    assert code(mode=2) == BAD_DTYPE
    args = attention_args(q, k, v, out, 1.0)
    args.k.dtype = 9
    with pytest.raises(NativeError):
        attention(args)
    with pytest.raises(NativeError):  # needs lse
        attention_backward(attention_args(q, k, v, out, 1.0), out, q, k, v)


def gradients(q, k, v, dout, scale, window):
    H, G = q.shape[1], k.shape[1]
    q, k, v, dout = widen(q), repeat(widen(k), H), repeat(widen(v), H), widen(dout)
    weights, _ = probabilities(q, k, scale, window)
    dweights = dout @ v.swapaxes(2, 3)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True))

    def grouped(x):
        return x.reshape(x.shape[0], G, H // G, *x.shape[2:]).sum(2)

    return scale * dscores @ k, grouped(scale * dscores.swapaxes(2, 3) @ q), grouped(weights.swapaxes(2, 3) @ dout)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 8, 0), (1, 3, 1, 33, 33, 24, 0), (2, 4, 2, 100, 100, 64, 0), (1, 8, 1, 70, 200, 80, 0),
        (1, 2, 2, 150, 150, 128, 40), (1, 2, 1, 3, 130, 256, 0), (1, 3, 3, 65, 129, 7, 1),
    ],
    ids=str,
)  # fmt: skip
def test_backward(shape, threads):
    B, H, G, S, T, E, window = shape
    set_threads(threads)
    q, k, v, out = make(9, B, H, G, S, T, E)
    dout = np.random.default_rng(10).standard_normal(q.shape, dtype=np.float32)
    lse = np.empty((B, H, S), np.float32)
    args = attention_args(q, k, v, out, E**-0.5, window, lse=lse)
    attention(args)
    got = [np.full_like(x, np.nan) for x in (q, k, v)]
    attention_backward(args, dout, *got)
    for name, a, b in zip(("dq", "dk", "dv"), got, gradients(q, k, v, dout, E**-0.5, window), strict=True):
        assert_close(a, b, 2e-5, f"{name} {shape}")  # sums of up to S * R products of size ~1 in fp32


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_backward_half(dtype):
    q, k, v, out = make(11, 1, 4, 2, 40, 60, 32, dtype, dtype)
    dout = cast(np.random.default_rng(12).standard_normal(q.shape, dtype=np.float32), dtype)
    lse = np.empty((1, 4, 40), np.float32)
    args = attention_args(q, k, v, out, 0.2, lse=lse)
    attention(args)
    got = [np.empty_like(x) for x in (q, k, v)]
    attention_backward(args, dout, *got)
    # D = dout . out uses the rounded output, an error of 2^-11 or 2^-9 of |out| in each dscore.
    for a, b in zip(got, gradients(q, k, v, dout, 0.2, 0), strict=True):
        assert_close(a, b, 3 * TOLERANCE[dtype])


def test_backward_against_finite_differences():
    """The oracle's own check: central differences of the float64 forward pass."""
    q, k, v, _ = (x.astype(np.float64) for x in make(13, 1, 2, 1, 3, 5, 4))
    dout = np.random.default_rng(14).standard_normal(q.shape)

    def loss():
        return (reference_float64(q, k, v, 0.5) * dout).sum()

    for x, gradient in zip((q, k, v), gradients(q, k, v, dout, 0.5, 0), strict=True):
        for index in np.ndindex(x.shape):
            kept = x[index]
            x[index] = kept + 1e-5
            up = loss()
            x[index] = kept - 1e-5
            down = loss()
            x[index] = kept
            assert abs((up - down) / 2e-5 - gradient[index]) < 1e-8


def reference_float64(q, k, v, scale):
    k, v = repeat(k, q.shape[1]), repeat(v, q.shape[1])
    return probabilities(q, k, scale)[0] @ v
