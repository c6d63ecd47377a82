"""Dense matmul of the native CPU library and its backward products against float64 numpy, at every level here."""

import numpy as np
import pytest

from cpu_library import (
    BAD_ARGUMENT,
    BAD_DTYPE,
    BF16,
    COMPUTE_BF16,
    EXACT,
    F16,
    F32,
    OK,
    STORAGE_ERROR,
    address,
    assert_close,
    assert_unbiased,
    cast,
    empty,
    lib,
    matmul,
    product,
    widen,
)  # fmt: skip

SIZES = [
    (m, n, k)
    for m in (1, 2, 3, 8, 16, 17, 33, 100)
    for n, k in ((1, 1), (3, 5), (17, 33), (48, 300), (576, 64), (70, 1536))
]


def all_products(rng, sizes, dtypes, mode):
    """(name, result, (want, size)) of y = x w^T, dx = dy w, dw = dy^T x on random operands."""
    m, n, k = sizes
    x, w, dy = (
        cast(rng.standard_normal(shape), dtype) for shape, dtype in zip(((m, k), (n, k), (m, n)), dtypes, strict=True)
    )
    out = dtypes[2]
    yield "matmul", matmul("matmul", x, w, (m, n), sizes, out, mode), product(x, w)
    yield "matmul_dx", matmul("matmul_dx", dy, w, (m, k), sizes, out, mode), product(dy, w.T)
    yield "matmul_dw", matmul("matmul_dw", dy, x, (n, k), sizes, out, mode), product(dy.T, x.T)


@pytest.mark.parametrize(("mode", "tolerance"), [(EXACT, 4e-6), (COMPUTE_BF16, 3e-2)])
def test_fp32(level, mode, tolerance):
    rng = np.random.default_rng(1)
    for sizes in SIZES:
        for name, got, want in all_products(rng, sizes, (F32, F32, F32), mode):
            assert_close(got, want, tolerance, f"{level} {name} M, N, K = {sizes}")


@pytest.mark.parametrize("x_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("w_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("y_dtype", [F32, F16, BF16])
def test_dtypes(level, x_dtype, w_dtype, y_dtype):
    rng = np.random.default_rng(2)
    for mode, tolerance in ((EXACT, 4e-6), (COMPUTE_BF16, 3e-2)):
        for sizes in ((1, 35, 70), (5, 33, 41), (40, 67, 131)):
            for name, got, want in all_products(rng, sizes, (x_dtype, w_dtype, y_dtype), mode):
                assert_close(
                    got,
                    want,
                    tolerance + STORAGE_ERROR[y_dtype],
                    f"{level} {name} {sizes} {x_dtype} {w_dtype} {y_dtype}",
                )


def test_long_contraction(level):
    """More than one block of K and of rows."""
    rng = np.random.default_rng(3)
    for mode, tolerance in ((EXACT, 6e-6), (COMPUTE_BF16, 3e-2)):
        for sizes in ((1100, 40, 1100), (30, 1060, 40)):
            for name, got, want in all_products(rng, sizes, (F32, F32, F32), mode):
                assert_close(got, want, tolerance, f"{level} {name} {sizes}")
                assert_unbiased(got, want, f"{level} {name} {sizes}")


def test_bf16_operands_are_exact_in_bf16_mode(level):
    """Products of bf16 values are exact in fp32, so the mode costs nothing when the operands are bf16 already."""
    rng = np.random.default_rng(4)
    x, w = cast(rng.standard_normal((64, 96)), BF16), cast(rng.standard_normal((40, 96)), BF16)
    assert_close(matmul("matmul", x, w, (64, 40), (64, 40, 96), F32, COMPUTE_BF16), product(x, w), 4e-6, level)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads(level, threads):
    """The result does not depend on the number of threads, bit for bit."""
    for sizes in ((1, 300, 576), (100, 300, 576)):
        results = []
        for count in (1, threads):
            assert lib.mlxeff_set_num_threads(count) == OK
            results.append([got for _, got, _ in all_products(np.random.default_rng(5), sizes, (F32, F32, F32), EXACT)])
        assert lib.mlxeff_set_num_threads(0) == OK
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_operands_and_infinities(level):
    rng = np.random.default_rng(6)
    storage = rng.standard_normal((40, 90), np.float32)
    x, w = storage[:20, 3:53], storage[20:37, 7:57]
    assert_close(matmul("matmul", x, w, (20, 17), (20, 17, 50)), product(x, w), 4e-6, level)
    x = np.array(x)
    x[3, 4] = np.inf
    y = matmul("matmul", x, w, (20, 17), (20, 17, 50))
    assert np.isinf(y[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()


@pytest.mark.parametrize("w_dtype", [F32, F16, BF16])
def test_columns_of_a_larger_matrix(level, w_dtype):
    """The same bits as from a copy of the columns; what lies around them is not read."""
    rng = np.random.default_rng(7)
    for n, begin, k in ((1, 0, 1), (37, 0, 31), (70, 3, 64), (33, 64, 300)):
        w = empty((n, 400), w_dtype)
        w[:, begin : begin + k] = own = cast(rng.standard_normal((n, k)), w_dtype)
        for m in (1, 3, 8, 40):
            x = rng.standard_normal((m, k), np.float32)
            for mode in (EXACT, COMPUTE_BF16):
                got, want = (
                    matmul("matmul", x, a, (m, n), (m, n, k), F32, mode) for a in (w[:, begin : begin + k], own)
                )
                np.testing.assert_array_equal(got, want, f"{level} {w_dtype} {n} {begin} + {k} {m} {mode}")


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("mode", [EXACT, COMPUTE_BF16])
def test_accumulation(level, threads, mode):
    """Each finished sum is added once, in fp32, to what the output holds."""
    rng = np.random.default_rng(8)
    assert lib.mlxeff_set_num_threads(threads) == OK
    for m, n, k in ((1, 37, 70), (3, 33, 67), (8, 130, 5), (40, 70, 300), (7, 5, 0)):
        x, w, dy, y = (rng.standard_normal(s, np.float32) for s in ((m, k), (n, k), (m, n), (m, n)))
        for name, a, b, held in (("matmul", x, w, y), ("matmul_dx", dy, w, x), ("matmul_dw", dy, x, w)):
            if held.size:
                got = matmul(name, a, b, held.shape, (m, n, k), F32, mode, added_to=held)
                want = held + matmul(name, a, b, held.shape, (m, n, k), F32, mode)
                np.testing.assert_array_equal(got, want, f"{level} {name} {m} {n} {k}")


def test_empty_and_bad():
    x = np.ones((2, 4), np.float32)
    y = np.full((2, 2), 9, np.float32)
    call = lambda m, n, k, dtype=F32, mode=EXACT, y_dtype=F32, accumulate=0: lib.mlxeff_matmul(  # noqa: E731
        address(x), 4, dtype, address(x), 4, F32, address(y), 2, y_dtype, m, n, k, mode, accumulate)  # fmt: skip
    assert call(0, 2, 4) == OK
    assert (y == 9).all()
    assert call(2, 2, 0) == OK
    assert (y == 0).all()
    assert call(2, 2, 5) == BAD_ARGUMENT
    assert call(-1, 2, 4) == BAD_ARGUMENT
    assert call(2, 2, 4, dtype=5) == BAD_DTYPE
    assert call(2, 2, 4, mode=2) == BAD_DTYPE
    assert call(2, 2, 4, y_dtype=BF16, accumulate=1) == BAD_DTYPE
    assert call(2, 2, 4) == OK
    assert (y == 4).all()
    assert widen(cast([1.0], BF16)) == 1
