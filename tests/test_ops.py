"""Each operation of `ops.py` and each of its gradients by the native kernels: against MLX's own in float32, no worse
than MLX's in half precision; composed with MLX's transformations; refused shapes; threads.
"""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from helpers import assert_close, to_numpy
from mlxeff import kernels, ops
from mlxeff.ops import Quantized, Rope, mlx_only

native, reason = kernels.native()
pytestmark = pytest.mark.skipif(native is None or kernels.device() != "cpu", reason=reason or "the device is a GPU")

HALF = {"float16": mx.float16, "bfloat16": mx.bfloat16}
WAVELENGTHS = 7.0 ** (mx.arange(0, 10, 2) / 10)


def split_swiglu(x):
    """Gate and up are halves of one array: rows with gaps."""
    return ops.swiglu(*mx.split(x, 2, axis=-1))


def heads_norm(x, w):
    return ops.rms_norm(x.transpose(0, 2, 1, 3), w, 1e-5)


def transposed_attention(window=None):
    """(B, tokens, heads, E) arguments, read by their strides; keys and values are parts of longer buffers."""

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k[:, : k.shape[1] - 2], v[:, : v.shape[1] - 2]))
        return ops.attention(q, k, v, 0.3, window)

    return attend


def attend(window=None):
    return lambda q, k, v: ops.attention(q, k, v, 0.4, window)


def rotate(angles, offset):
    return lambda x: ops.rope(x.transpose(0, 2, 1, 3), angles, offset)


def linear_of_strided_rows(x, w):
    return ops.linear(x[:, -1], w[3:20])


# name: (operation, shapes of its arguments)
CASES = {
    "linear": (ops.linear, [(2, 5, 67), (33, 67)]),
    "linear, one row": (ops.linear, [(67,), (3, 67)]),
    "linear, one of all": (ops.linear, [(1, 1, 1), (1, 1)]),
    "linear, bias": (ops.linear, [(3, 64), (48, 64), (48,)]),
    "linear, many rows": (ops.linear, [(2, 70, 48), (130, 48)]),
    "linear, strided rows": (linear_of_strided_rows, [(3, 4, 64), (24, 64)]),
    "linear, transposed": (lambda x, w: ops.linear(x.T, w.T), [(64, 5), (64, 7)]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), [(3, 5, 63), (63,)]),
    "rms_norm, one row": (lambda x, w: ops.rms_norm(x, w, 1e-2), [(130,), (130,)]),
    "rms_norm, heads": (heads_norm, [(2, 7, 3, 32), (32,)]),
    "swiglu": (ops.swiglu, [(2, 3, 33), (2, 3, 33)]),
    "swiglu, halves": (split_swiglu, [(3, 5, 90)]),
    "attention": (attend(), [(1, 4, 9, 16), (1, 4, 9, 16), (1, 4, 9, 16)]),
    "attention, one query": (attend(), [(1, 6, 1, 20), (1, 2, 11, 20), (1, 2, 11, 20)]),
    "attention, one of all": (attend(), [(1, 1, 1, 1)] * 3),
    "attention, chunk": (attend(), [(2, 6, 37, 64), (2, 3, 101, 64), (2, 3, 101, 64)]),
    "attention, window": (attend(7), [(2, 4, 40, 32), (2, 1, 55, 32), (2, 1, 55, 32)]),
    "attention, window, one query": (attend(5), [(2, 4, 1, 32), (2, 2, 23, 32), (2, 2, 23, 32)]),
    "attention, strided": (transposed_attention(9), [(2, 21, 4, 24), (2, 33, 2, 24), (2, 33, 2, 24)]),
    "log_softmax": (ops.log_softmax, [(2, 3, 501)]),
    "log_softmax, one": (ops.log_softmax, [(4, 1)]),
    "rope": (rotate(Rope(12, 1e4), 0), [(2, 9, 3, 12)]),
    "rope, offset": (rotate(Rope(64, 1e5, scale=0.25), 250), [(1, 13, 2, 64)]),
    "rope, wavelengths": (rotate(Rope(10, None, wavelengths=WAVELENGTHS, magnitude=1.5), 3), [(2, 5, 1, 10)]),
}


def arguments(shapes, dtype=mx.float32):
    random = np.random.default_rng(7)
    return [mx.array(random.standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(function, args):
    """The value and the gradient of its product with fixed numbers, with respect to every argument."""
    shape, dtype = (value := function(*args)).shape, value.dtype
    cotangent = mx.array(np.random.default_rng(8).standard_normal(shape), dtype)
    values, gradients = mx.vjp(function, args, [cotangent])
    return [*values, *gradients]


def assert_same(got, want, what, **tolerance):
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        assert_close(a, b, f"{what}: {f'gradient {place}' if place else 'value'}", **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_equals_mlx(name):
    function, shapes = CASES[name]
    args = arguments(shapes)
    got = value_and_gradients(function, args)
    with mlx_only():
        want = value_and_gradients(function, args)
    assert not all(np.array_equal(a, b) for a, b in zip(got, want)) or max(a.size for a in got) < 100, (
        "MLX's kernel ran"
    )
    # MLX's rope multiplies position and frequency in float32: an angle of 256 is off by up to 256 * 2^-24.
    assert_same(got, want, name, rtol=2.0**-16 if name.startswith("rope") else None)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_no_worse_than_mlx(name, dtype):
    """Root mean square errors against float64. The same roundings fall differently: the error of n of them varies by
    about 1/√(2n), and that of a few numbers by a rounding of the largest.
    """
    function, shapes = CASES[name]
    args = arguments(shapes, HALF[dtype])
    got = value_and_gradients(function, args)
    with mlx_only():
        mlx = value_and_gradients(function, args)
        exact = value_and_gradients(function, [x.astype(mx.float64) for x in args])
    for place, (a, b, want) in enumerate(zip(got, mlx, exact, strict=True)):
        assert a.dtype == b.dtype == HALF[dtype]
        rounding = np.abs(to_numpy(want)).max() * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        mine, theirs = (np.sqrt(((to_numpy(x) - to_numpy(want)) ** 2).mean()) for x in (a, b))
        assert mine <= max((1.02 + 2 / np.sqrt(a.size)) * theirs, rounding / np.sqrt(a.size)), (
            f"{name} {place}: {mine:.3g}, MLX {theirs:.3g}"
        )


def test_operands_of_different_types():
    """The result has the wider type, as MLX's; each gradient that of its operand."""
    x, w = arguments([(5, 64), (48, 64)])
    got = value_and_gradients(ops.linear, [x, w.astype(mx.bfloat16)])
    want = value_and_gradients(ops.linear, [x, w.astype(mx.bfloat16).astype(mx.float32)])
    assert [a.dtype for a in got] == [mx.float32, mx.float32, mx.bfloat16]
    for place, (a, b) in enumerate(zip(got, want)):
        assert_close(a, b, f"mixed {place}")
    gate, up = arguments([(3, 8), (3, 8)])
    assert ops.swiglu(gate.astype(mx.float16), up).dtype == mx.float32
    assert ops.rms_norm(gate.astype(mx.float16), up[0], 1e-5).dtype == mx.float32


@pytest.mark.parametrize("scales", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, 128), (5, 32), (6, 64), (8, 32)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_quantized_linear(bits, group, scales, rows):
    """Value and dx against the dequantised product in float64, whatever types the operands have."""
    x, w = arguments([(rows, 2, 256), (70, 256)])
    matrix = Quantized(
        *(part if i == 0 else part.astype(scales) for i, part in enumerate(mx.quantize(w, group, bits))), group, bits
    )
    dense = mx.dequantize(
        matrix.weight, matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32), group, bits
    )
    got = value_and_gradients(lambda x: ops.quantized_linear(x, matrix), [x])
    want = value_and_gradients(lambda x: x @ dense.T.astype(mx.float64), [x.astype(mx.float64)])
    assert [a.dtype for a in got] == [mx.float32] * 2
    for place, (a, b) in enumerate(zip(got, want)):
        assert_close(a, b, f"{bits} bits, {place}")
    half = ops.quantized_linear(x.astype(mx.bfloat16), matrix)
    with mlx_only():
        assert half.dtype == ops.quantized_linear(x.astype(mx.bfloat16), matrix).dtype


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_quantized_linear_with_int8_activations(bits, rows):
    """Each value of x is off by half a step at most, a step being 1/127 of the largest of its group. The gradient is
    that of the exact product."""
    x, w = arguments([(rows, 256), (70, 256)])
    matrix = Quantized(*mx.quantize(w, 64, bits), 64, bits)
    exact, gradient = value_and_gradients(lambda x: ops.quantized_linear(x, matrix), [x])
    got, of_rounded = value_and_gradients(lambda x: ops.quantized_linear(x, matrix, "int8"), [x])
    groups = mx.abs(x).reshape(rows, 4, 64).max(-1), mx.abs(mx.dequantize(*mx.quantize(w, 64, bits), 64, bits))
    bound = groups[0] / 254 @ groups[1].reshape(70, 4, 64).sum(-1).T
    assert (mx.abs(got - exact) <= 1.0001 * bound).all()
    assert mx.abs(got - exact).max() > bound.max() / 100
    assert_close(of_rounded, gradient, "gradient", rtol=0, atol=0)
    with mlx_only():
        assert_close(ops.quantized_linear(x, matrix, "int8"), exact, "MLX's operation")


def test_the_gradient_through_a_large_quantised_matrix():
    """It is dequantised in blocks of 2^23 numbers; here there are two and a part."""
    random = np.random.default_rng(3)
    packed = mx.array(random.integers(0, 2**32, (4200, 512), dtype=np.uint32))
    scales, biases = (mx.array(random.standard_normal((4200, 128)) * 0.1, mx.float32) for _ in range(2))
    dy = mx.array(random.standard_normal((2, 4200)), mx.float32)
    matrix = Quantized(packed, scales, biases, 32, 4)
    x = mx.zeros((2, 4096))
    _, (got,) = mx.vjp(lambda x: ops.quantized_linear(x, matrix), [x], [dy])
    assert_close(got, dy.astype(mx.float64) @ mx.dequantize(packed, scales, biases, 32, 4).astype(mx.float64), "dx")
    _, (half,) = mx.vjp(lambda x: ops.quantized_linear(x, matrix), [x.astype(mx.bfloat16)], [dy])
    assert_close(half, got, "dx of a bfloat16 input")


LOGITS = {"one row": (1, 7), "odd": (5, 1001), "batch": (2, 3, 257), "one class": (4, 1)}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_cross_entropy(name, dtype):
    shape = LOGITS[name]
    (logits,) = arguments([shape], dtype)
    logits = logits * 4
    targets = np.random.default_rng(2).integers(-1, shape[-1], shape[:-1])
    targets.flat[0] = shape[-1] - 1
    exact, kept = logits.astype(mx.float64), mx.array(targets >= 0)

    def reference(x):
        return mx.where(kept, nn.losses.cross_entropy(x, mx.array(np.maximum(targets, 0))), 0.0)

    got = value_and_gradients(lambda x: ops.cross_entropy(x, mx.array(targets)), [logits])
    want = value_and_gradients(reference, [exact])
    assert [a.dtype for a in got] == [mx.float32, dtype]
    assert_close(got[0], want[0], "losses")
    assert_close(got[1], want[1], "gradient")
    with mlx_only():
        assert_close(ops.cross_entropy(logits, mx.array(targets)), want[0], "MLX's", rtol=2.0**-16)


def test_cross_entropy_keeps_nothing_of_the_logits_size():
    """The gradient takes the logits' memory: no second array of their size, and no softmax."""
    (logits,) = arguments([(64, 20000)])
    targets = mx.zeros((64,), mx.int32)
    mx.eval(logits, targets)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(lambda x: ops.cross_entropy(x * 2, targets).mean())(logits))
    assert mx.get_peak_memory() - before < 2.5 * logits.nbytes  # x * 2, which becomes dx; dx * 2


def test_argmax_and_sampling_agree_with_mlx():
    (x,) = arguments([(2, 3, 77)])
    x = mx.round(x)  # with ties: the first counts
    assert ops.argmax(x).dtype == mx.uint32
    assert np.array_equal(ops.argmax(x), mx.argmax(x, axis=-1))
    assert np.array_equal(ops.argmax(x.transpose(2, 1, 0)), mx.argmax(x.transpose(2, 1, 0), axis=-1))
    u = mx.full((2, 3), 0.5)
    assert np.array_equal(native.sample(x, u, 1.0, 1, 0.0, 0.0), mx.argmax(x, axis=-1))


def test_strided_arguments_are_not_copied():
    """Attention over a part of a cache's buffers and a linear layer over strided rows allocate their results alone."""
    q, k, v, x, w = arguments([(1, 4, 1, 64), (1, 2, 4096, 64), (1, 2, 4096, 64), (512, 4, 256), (8, 256)])
    k, v, x = k[:, :, :4000], v[:, :, :4000], x[:, 1]
    mx.eval(q, k, v, x, w)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(ops.attention(q, k, v, 0.125), ops.linear(x, w))
    assert mx.get_peak_memory() - before < 64 * 1024 < x.size * 4


EMPTY = {
    "linear, no rows": (ops.linear, [(0, 8), (4, 8)]),
    "linear, no columns": (ops.linear, [(3, 0), (4, 0)]),
    "linear, no outputs": (ops.linear, [(3, 8), (0, 8)]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), [(0, 8), (8,)]),
    "swiglu": (ops.swiglu, [(2, 0), (2, 0)]),
    "attention, no queries": (attend(), [(1, 2, 0, 8), (1, 1, 3, 8), (1, 1, 3, 8)]),
    "attention, no batch": (attend(), [(0, 2, 1, 8), (0, 1, 3, 8), (0, 1, 3, 8)]),
    "rope": (rotate(Rope(8, 1e4), 0), [(1, 0, 2, 8)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x, mx.zeros((0,), mx.int32)), [(0, 5)]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_arrays(name):
    function, shapes = EMPTY[name]
    got = value_and_gradients(function, arguments(shapes))
    mx.eval(got)
    assert [a.shape for a in got[1:]] == shapes
    assert all(np.array_equal(a, np.zeros(a.shape)) for a in got)


ONE = mx.ones((2, 8))
REFUSED = {
    "linear: wanted x of shape (..., 4), got float32 (2, 8)": lambda: ops.linear(ONE, mx.ones((3, 4))),
    "linear: wanted a matrix (N, K), got float32 (8,)": lambda: ops.linear(ONE, mx.ones((8,))),
    "quantized_matmul: wanted scales of shape (2, 2), got float32 (2, 1)": lambda: ops.quantized_linear(
        ONE, Quantized(mx.zeros((2, 8), mx.uint32), mx.ones((2, 1)), mx.ones((2, 1)), 32, 4)
    ),
    "rms_norm: wanted x of shape (..., 3), got float32 (2, 8)": lambda: ops.rms_norm(ONE, mx.ones((3,)), 1e-5),
    "swiglu: wanted up of shape (2, 8), got float32 (8,)": lambda: ops.swiglu(ONE, ONE[0]),
    "attention: wanted keys (B, G, T, E) with G a divisor of H and T >= S for queries (1, 3, 4, 8), got float32 "
    "(1, 2, 4, 8)": lambda: ops.attention(mx.ones((1, 3, 4, 8)), mx.ones((1, 2, 4, 8)), mx.ones((1, 2, 4, 8)), 1.0),
    "attention: wanted values of shape (1, 3, 4, 8), got float32 (1, 3, 5, 8)": lambda: ops.attention(
        mx.ones((1, 3, 4, 8)), mx.ones((1, 3, 4, 8)), mx.ones((1, 3, 5, 8)), 1.0
    ),
    "rope: wanted x of shape (B, heads, tokens, 8 or more), got float32 (1, 1, 1, 6)": lambda: ops.rope(
        mx.ones((1, 1, 1, 6)), Rope(8, 1e4), 0
    ),
    "cross_entropy: wanted whole-number targets of shape (2,), got float32 (2, 8)": lambda: ops.cross_entropy(ONE, ONE),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_shapes(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        REFUSED[message]()


def test_refused_values():
    with pytest.raises(RuntimeError, match="cross_entropy: wanted targets below the size of the vocabulary"):
        mx.eval(ops.cross_entropy(ONE, mx.array([7, 8])))
    with pytest.raises(RuntimeError, match=r"sample: wanted logits without NaN and \+inf, one above -inf"):
        mx.eval(native.sample(mx.array([1.0, mx.nan]), mx.array(0.5), 1.0, 0, 0.0, 0.0))
    assert ops.cross_entropy(ONE, mx.array([7, 0])).tolist() == pytest.approx([np.log(8)] * 2)


@pytest.mark.parametrize("name", CASES)
def test_what_the_kernels_cannot_do_is_refused_by_name(name):
    function, shapes = CASES[name]
    args = arguments(shapes)
    kernel = name.partition(",")[0].replace("log_softmax", "logsumexp")
    transformations = [
        lambda: mx.jvp(function, args, args),
        lambda: mx.vmap(function)(*(mx.stack([x, x]) for x in args)),
        lambda: mx.grad(lambda *a: mx.grad(lambda *b: (function(*b) ** 2).sum())(*a).sum())(*args),
    ]
    twice = kernel in ("rope", "logsumexp")  # rope's gradient is a rope, that of logsumexp is MLX's
    for transform in transformations[: 2 if twice else 3]:
        with pytest.raises(ValueError, match=rf"native {kernel}.* cannot be .*mlx_only"):
            mx.eval(transform())
        with mlx_only():
            mx.eval(transform())


def every_operation(x, w, gate, norm):
    """A small layer with all operations: (2, S, 32) → losses (2, S)."""
    h = ops.rms_norm(x, norm, 1e-5)
    q = ops.linear(h, w).reshape(2, -1, 4, 8).transpose(0, 2, 1, 3)
    q = ops.rope(q, Rope(8, 1e4), 2)
    y = ops.attention(q, q[:, ::2], q[:, 1::2], 0.35, 5).transpose(0, 2, 1, 3).reshape(x.shape)
    y = x + ops.swiglu(ops.linear(y, gate), ops.linear(h, w))
    return ops.cross_entropy(y, TARGETS[:, : x.shape[1]])


TARGETS = mx.array(np.random.default_rng(5).integers(-1, 32, (2, 11)))
LAYER = arguments([(2, 11, 32), (32, 32), (32, 32), (32,)])


def loss(*args):
    return every_operation(*args).mean()


def gradients_of(function):
    value, gradients = mx.value_and_grad(function, argnums=(0, 1, 2, 3))(*LAYER)
    return [np.array(a) for a in (value, *gradients)]


def test_composes_with_the_transformations_of_mlx():
    """The same bits whether compiled, checkpointed, on another stream, evaluated asynchronously, or none of these."""
    want = gradients_of(loss)
    with mlx_only():
        for got, theirs in zip(want, gradients_of(loss)):
            assert_close(got, theirs, "MLX's", rtol=2.0**-16)

    compiled = mx.compile(mx.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    for _ in range(2):
        value, gradients = compiled(*LAYER)
        assert all(np.array_equal(a, b) for a, b in zip(want, (value, *gradients)))
    shapeless = mx.compile(every_operation_flat, shapeless=True)
    for tokens in (11, 7):
        x = LAYER[0][:, :tokens]
        assert np.array_equal(shapeless(x, *LAYER[1:]), every_operation_flat(x, *LAYER[1:]))

    checkpointed = mx.checkpoint(every_operation)
    assert all(np.array_equal(a, b) for a, b in zip(want, gradients_of(lambda *args: checkpointed(*args).mean())))
    with mx.stream(mx.new_stream(mx.cpu)):
        assert all(np.array_equal(a, b) for a, b in zip(want, gradients_of(loss)))
    results = [mx.value_and_grad(loss, argnums=(0, 1, 2, 3))(*LAYER) for _ in range(3)]
    mx.async_eval(results)
    for value, gradients in results:
        assert all(np.array_equal(a, b) for a, b in zip(want, (value, *gradients)))


def every_operation_flat(x, w, gate, norm):
    """Of operations whose shapes can be told from those of their arguments."""
    h = ops.rms_norm(x, norm, 1e-5)
    y = ops.swiglu(ops.linear(h, gate), ops.linear(h, w))
    return ops.cross_entropy(y, ops.argmax(x))


@pytest.mark.parametrize("name", [*CASES, "quantised"])
def test_threads_do_not_change_a_bit(name):
    """Values and gradients of 1, 2 and 5 threads. Only decoding attention over many keys is split by threads."""
    function, shapes = CASES.get(name, (None, [(3, 64)]))
    if name == "quantised":
        matrix = Quantized(*mx.quantize(arguments([(70, 64)])[0], 32, 4), 32, 4)
        function = lambda x: ops.quantized_linear(x, matrix)  # noqa: E731
    results = []
    try:
        for threads in (1, 2, 5):
            native.set_num_threads(threads)
            results.append([np.array(a) for a in value_and_gradients(function, arguments(shapes))])
    finally:
        native.set_num_threads(0)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other))


def test_the_switch_and_other_types(monkeypatch):
    (x,) = arguments([(3, 8)])
    assert ops.native_for(x)
    assert not ops.native_for(x, x.astype(mx.float64))
    with mlx_only():
        assert not ops.native_for(x)
        with mlx_only():
            pass
        assert not ops.native_for(x)
    assert ops.native_for(x)
    double = ops.linear(x.astype(mx.float64), x.astype(mx.float64))
    assert double.dtype == mx.float64
    monkeypatch.setattr(kernels, "native", lambda: (None, "not built"))
    assert not ops.native_for(x)
    assert_close(ops.linear(x, x), x @ x.T, "without the extension", rtol=0, atol=0)


def test_float32_products_are_accelerates_on_macos(monkeypatch):
    def refuse(*_):
        raise AssertionError("the native kernel was chosen")

    monkeypatch.setattr(ops, "linear_cpu", refuse)
    x, weight = mx.ones((2, 8)), mx.ones((3, 8))
    monkeypatch.setattr(ops, "ACCELERATE", True)
    assert ops.linear(x, weight).tolist() == [[8.0] * 3] * 2
    with pytest.raises(AssertionError, match="native"):
        ops.linear(x, weight.astype(mx.float16))
    monkeypatch.setattr(ops, "ACCELERATE", False)
    with pytest.raises(AssertionError, match="native"):
        ops.linear(x, weight)
