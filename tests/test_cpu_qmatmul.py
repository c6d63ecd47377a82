"""Quantised matmul of the native CPU library against float64 numpy, at every instruction-set level of this machine."""

import ctypes

import numpy as np
import pytest

from cpu_library import (
    BAD_ARGUMENT,
    BAD_DTYPE,
    BF16,
    COMPUTE_BF16,
    COMPUTE_INT8,
    EXACT,
    F16,
    F32,
    LEVELS,
    OK,
    STORAGE_ERROR,
    Quantized,
    address,
    assert_close,
    assert_unbiased,
    call,
    cast,
    empty,
    lib,
    operand,
    product,
    qmm,
)  # fmt: skip

ROWS = (1, 2, 3, 8, 17, 100)
COLUMNS = (1, 17, 576)


@pytest.fixture(params=(1, 2, 5))
def threads(request):
    assert lib.mlxeff_set_num_threads(request.param) == OK
    yield request.param
    assert lib.mlxeff_set_num_threads(0) == OK


def activations_of_integers(rng, m, k, group):
    """x whose int8 rounding is beyond doubt (no near ties), and the rounded x: the largest of a group is 127 steps."""
    integers = rng.integers(-127, 128, (m, k // group, group))
    integers[..., 0] = rng.choice([-127, 127], (m, k // group))
    noise = rng.uniform(-0.4, 0.4, integers.shape) * (np.abs(integers) < 127)
    step = rng.uniform(0.001, 0.1, (m, k // group, 1))
    return ((integers + noise) * step).reshape(m, k).astype(np.float32), (integers * step).reshape(m, k)


def test_levels_include_scalar():
    assert "scalar" in LEVELS


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_exact(level, bits, group):
    rng = np.random.default_rng(bits * 1000 + group)
    for k in sorted({group, 3 * group, 9 * group, 1536 if bits in (4, 5, 6, 8) else 5 * group}):
        for n in COLUMNS:
            weight = Quantized(rng, n, k, bits, group)
            dense = weight.dense()
            for m in ROWS:
                x = rng.standard_normal((m, k), np.float32)
                assert_close(
                    qmm(weight, x, F32), product(x, dense), 4e-6, f"{level} {bits} bit g{group} M={m} N={n} K={k}"
                )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int8_activations(level, bits, group):
    """Rounding x is the only difference to the exact mode, and sums inside a group are exact."""
    rng = np.random.default_rng(bits * 1000 + group + 1)
    for k in (group, 3 * group, 9 * group):
        for n in COLUMNS:
            weight = Quantized(rng, n, k, bits, group)
            for m in ROWS:
                x, rounded = activations_of_integers(rng, m, k, group)
                got = qmm(weight, x, F32, COMPUTE_INT8)
                what = f"{level} {bits} bit g{group} M={m} N={n} K={k}"
                assert_close(got, product(rounded, weight.dense()), 4e-6, what)


@pytest.mark.parametrize("scale_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("x_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("y_dtype", [F32, F16, BF16])
def test_dtypes(level, scale_dtype, x_dtype, y_dtype):
    rng = np.random.default_rng(7)
    for bits, group, k in ((4, 32, 576), (8, 64, 192), (3, 128, 384)):
        weight = Quantized(rng, 83, k, bits, group, scale_dtype)
        for m in (1, 3, 40):
            x = cast(rng.standard_normal((m, k)), x_dtype)
            want = product(x, weight.dense())
            what = f"{level} {bits} bit M={m} dtypes {scale_dtype} {x_dtype} {y_dtype}"
            assert_close(qmm(weight, x, y_dtype), want, 4e-6 + STORAGE_ERROR[y_dtype], what)


def test_bf16_mode(level):
    """Both operands rounded to 8 bits of mantissa: errors of 2^-9 each, averaging out over K."""
    rng = np.random.default_rng(8)
    for bits, group, n, k in (
        (4, 32, 576, 1536),
        (8, 32, 35, 1056),
        (4, 64, 17, 2112),
        (6, 128, 100, 128),
        (4, 32, 1, 32),
    ):
        weight = Quantized(rng, n, k, bits, group, F16)
        for m in ROWS:
            x = rng.standard_normal((m, k), np.float32)
            for y_dtype in (F32, BF16):
                got, want = qmm(weight, x, y_dtype, COMPUTE_BF16), product(x, weight.dense())
                assert_close(got, want, 2e-2, f"{level} {bits} bit M={m} N={n} K={k}")
                assert_unbiased(got, want, f"{level} {bits} bit M={m} N={n} K={k}")


@pytest.mark.parametrize("mode", [EXACT, COMPUTE_BF16, COMPUTE_INT8])
def test_threads(level, threads, mode):
    """The result does not depend on the number of threads, bit for bit."""
    rng = np.random.default_rng(9)
    weight = Quantized(rng, 1536, 576, 4, 32, F16)
    for m in (1, 8, 100):
        x = rng.standard_normal((m, 576), np.float32)
        got = qmm(weight, x, F32, mode)
        assert lib.mlxeff_set_num_threads(1) == OK
        want = qmm(weight, x, F32, mode)
        assert lib.mlxeff_set_num_threads(threads) == OK
        assert np.array_equal(got, want)


def test_strided_rows(level):
    rng = np.random.default_rng(10)
    weight = Quantized(rng, 50, 96, 4, 32)
    storage = rng.standard_normal((20, 128), np.float32)
    for m in (1, 4, 20):
        assert_close(
            qmm(weight, storage[:m, 5:101], F32), product(storage[:m, 5:101], weight.dense()), 4e-6, f"{level} M={m}"
        )
    y = np.full((20, 60), 7.0, np.float32)
    x = np.ascontiguousarray(storage[:, :96])
    assert lib.mlxeff_qmm(ctypes.byref(weight.c), address(x), 96, F32, address(y), 60, F32, 20, EXACT, 0) == OK
    assert (y[:, 50:] == 7).all()
    assert np.array_equal(y[:, :50], qmm(weight, x, F32))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_one_row_of_any_size(level, bits):
    """Activations of very different sizes in a group, and groups of very different sizes."""
    rng = np.random.default_rng(13)
    weight = Quantized(rng, 65, 1056, bits, 32)
    for exponents in ((-6, 0), (-35, -30), (25, 30)):
        x = (rng.standard_normal((1, 1056)) * 10 ** rng.uniform(*exponents, (1, 1056))).astype(np.float32)
        assert_close(qmm(weight, x, F32), product(x, weight.dense()), 4e-6, f"{level} {bits} bit 1e{exponents}")
    x = (rng.standard_normal((33, 32)) * 10 ** rng.uniform(-8, 4, (33, 1))).astype(np.float32).reshape(1, 1056)
    x[0, 64:96] = 0
    x[0, 100] = 1e6
    assert_close(qmm(weight, x, F32), product(x, weight.dense()), 4e-6, f"{level} {bits} bit")


def test_one_row_that_is_not_finite(level):
    rng = np.random.default_rng(14)
    for bits in (4, 5, 6, 8):
        weight = Quantized(rng, 17, 96, bits, 32)
        for bad in (np.nan, np.inf, -np.inf):
            x = rng.standard_normal((1, 96)).astype(np.float32)
            x[0, 40] = bad
            assert not np.isfinite(qmm(weight, x, F32)).any(), (level, bits, bad)


def test_zero_activations(level):
    weight = Quantized(np.random.default_rng(11), 40, 64, 4, 32)
    for mode in (EXACT, COMPUTE_BF16, COMPUTE_INT8):
        for m in (1, 20):
            assert (qmm(weight, np.zeros((m, 64), np.float32), F32, mode) == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_and_dequantize(level, bits):
    rng = np.random.default_rng(bits)
    for group in (32, 64, 128):
        for out_dtype in (F32, F16, BF16):
            weight = Quantized(rng, 37, group * 3, bits, group, F16)
            out = empty((37, group * 3), out_dtype)
            assert lib.mlxeff_dequantize(ctypes.byref(weight.c), address(out), group * 3, out_dtype) == OK
            assert_close(out, weight.dense(), 4e-7 + STORAGE_ERROR[out_dtype], f"{level} dequantize {bits}")
            ids = rng.integers(0, 37, 50).astype(np.int32)
            rows = empty((50, group * 3), out_dtype)
            assert (
                lib.mlxeff_qmm_rows(ctypes.byref(weight.c), address(ids), 50, address(rows), group * 3, out_dtype) == OK
            )
            assert np.array_equal(rows, out[ids])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_columns_of_a_larger_matrix(level, bits, group):
    """The same bits as from a copy of the columns; what lies around them is not read."""
    rng = np.random.default_rng(bits * 1000 + group + 2)
    for n, scale_dtype in ((1, F32), (37, F16), (70, BF16)):
        weight = Quantized(rng, n, 9 * group, bits, group, scale_dtype)
        for begin, count in ((0, 1), (0, 3), (0, 8), (2, 5), (6, 3)):
            own, part = weight.columns(begin * group, count * group)
            what = f"{level} {bits} bit g{group} N={n} groups {begin} + {count}"
            for m in (1, 3, 8, 40):
                x = rng.standard_normal((m, count * group), np.float32)
                assert_close(qmm(own, x, F32), product(x, own.dense()), 4e-6, what)
                for mode in (EXACT, COMPUTE_BF16, COMPUTE_INT8):
                    np.testing.assert_array_equal(qmm(part, x, F32, mode), qmm(own, x, F32, mode), f"{what} {m} {mode}")
            ids = rng.integers(0, n, 5).astype(np.int32)
            want, out, rows = (empty((k, count * group), F32) for k in (n, n, 5))
            call("mlxeff_dequantize", ctypes.byref(own.c), want, count * group, F32)
            call("mlxeff_dequantize", ctypes.byref(part.c), out, count * group, F32)
            call("mlxeff_qmm_rows", ctypes.byref(part.c), ids, 5, rows, count * group, F32)
            np.testing.assert_array_equal(out, want, what)
            np.testing.assert_array_equal(rows, want[ids], what)


def test_rows_of_a_larger_matrix(level):
    """A part of the rows of some columns, each pointer moved by whole rows."""
    rng = np.random.default_rng(15)
    whole, part = Quantized(rng, 90, 320, 4, 32, F16).columns(64, 192)
    x = rng.standard_normal((5, 192), np.float32)
    want = qmm(whole, x, F32)
    for begin, count in ((0, 31), (17, 33), (89, 1)):
        c = type(part.c).from_buffer_copy(part.c)
        c.packed, c.N = part.c.packed + begin * part.packed.strides[0], count
        c.scales, c.biases = (a + begin * part.scales.strides[0] for a in (part.c.scales, part.c.biases))
        y = empty((5, count), F32)
        call("mlxeff_qmm", ctypes.byref(c), *operand(x), *operand(y), 5, EXACT, 0)
        np.testing.assert_array_equal(y, want[:, begin : begin + count], f"{level} rows {begin} + {count}")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_accumulation(level, threads, bits):
    """Each finished sum is added once, in fp32, to what y holds."""
    rng = np.random.default_rng(bits + 20)
    for n in (1, 37, 301):
        weight = Quantized(rng, n, 160, bits, 32, F16)
        for m in (1, 3, 8, 40):
            x, y = rng.standard_normal((m, 160), np.float32), rng.standard_normal((m, n), np.float32)
            for mode in (EXACT, COMPUTE_BF16, COMPUTE_INT8):
                got, want = qmm(weight, x, F32, mode, added_to=y), y + qmm(weight, x, F32, mode)
                np.testing.assert_array_equal(got, want, f"{level} {bits} bit {n} {m} {mode}")


def test_blocks_of_columns_accumulate_to_the_product(level):
    rng = np.random.default_rng(16)
    weight = Quantized(rng, 45, 416, 4, 32)
    for m in (1, 4, 40):
        x, y = rng.standard_normal((m, 416), np.float32), np.zeros((m, 45), np.float32)
        for begin, count in ((0, 32), (32, 96), (128, 288)):
            y = qmm(weight.columns(begin, count)[1], x[:, begin : begin + count], F32, added_to=y)
        assert_close(y, product(x, weight.dense()), 4e-6, f"{level} M={m}")


def test_same_as_mlx():
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(12)
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            packed, scales, biases = mx.quantize(mx.array(rng.standard_normal((96, 384), np.float32)), group, bits)
            x = mx.array(rng.standard_normal((5, 384), np.float32))
            want = np.array(mx.quantized_matmul(x, packed, scales, biases, True, group, bits))
            weight = Quantized(rng, 96, 384, bits, group)
            arrays = [np.array(a) for a in (packed, scales, biases)]
            weight.c.packed, weight.c.scales, weight.c.biases = (address(a) for a in arrays)
            assert_close(qmm(weight, np.array(x), F32), want.astype(np.float64), 4e-6, f"mlx {bits} bit g{group}")


def test_refuses_bad_arguments():
    weight = Quantized(np.random.default_rng(0), 4, 64, 4, 32)
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 4), np.float32)

    def code(m=1, x_dtype=F32, mode=EXACT, y=y, y_dtype=F32, accumulate=0, **changes):
        changed = type(weight.c)(*(changes.get(name, getattr(weight.c, name)) for name, _ in weight.c._fields_))
        return lib.mlxeff_qmm(
            ctypes.byref(changed),
            address(x),
            64,
            x_dtype,
            y is not None and address(y),
            4,
            y_dtype,
            m,
            mode,
            accumulate,
        )

    assert code() == OK
    assert code(m=0) == OK
    assert code(accumulate=1) == OK
    for changes in (
        {"bits": 7},
        {"bits": 1},
        {"group": 16},
        {"K": 48},
        {"K": 0},
        {"N": -1},
        {"packed": None},
        {"m": -1},
        {"ld": 32},
        {"ld": 80},
        {"y": None},
    ):
        assert code(**changes) == BAD_ARGUMENT, changes
    for changes in ({"scale_dtype": 3}, {"x_dtype": 9}, {"mode": 3}, {"y_dtype": F16, "accumulate": 1}):
        assert code(**changes) == BAD_DTYPE, changes
    ids, out = np.array([0, 4], np.int32), np.zeros((2, 64), np.float32)
    assert lib.mlxeff_qmm_rows(ctypes.byref(weight.c), address(ids), 2, address(out), 64, F32) == BAD_ARGUMENT
