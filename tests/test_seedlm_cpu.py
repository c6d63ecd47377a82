"""The native SeedLM products and decoders, at every instruction-set level, against the NumPy reference and float64."""

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
    OK,
    STORAGE_ERROR,
    address,
    assert_close,
    assert_unbiased,
    cast,
    lib,
    product,
)
from mlxeff.seedlm import codec, lfsr
from mlxeff.seedlm.format import BIAS_LIMIT, FORMATS
from seedlm_calls import Seeded, SeedWeight, decode, matmul, rows
from seedlm_models import rounds_to_int8

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)  # of x
SHAPES = ((1, 576), (3, 1536), (17, 1), (37, 100), (70, 24), (33, 257), (35, 25))


@pytest.fixture(params=(1, 2, 5))
def threads(request):
    assert lib.mlxeff_set_num_threads(request.param) == OK
    yield request.param
    assert lib.mlxeff_set_num_threads(0) == OK


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_is_bit_exact_for_every_seed(level, name):
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    for bias in (-BIAS_LIMIT, -7, BIAS_LIMIT):
        shape = (64, 1024)
        blocks = codec.Blocks(
            np.resize(np.arange(1, 65536), shape).astype(np.uint16),
            rng.integers(-8, 8, (*shape, fmt.states)).astype(np.int8),
            rng.integers(0, 16, shape).astype(np.uint8),
            bias,
        )
        weight = Seeded(name, blocks, 1024 * fmt.columns)
        np.testing.assert_array_equal(decode(weight), weight.dense(), f"{level} {name} bias {bias}")


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_in_other_types_rounds_the_float32(level, name):
    rng = np.random.default_rng(2)
    for count, cols in SHAPES:
        weight = Seeded.random(name, rng, count, cols)
        for dtype in (F32, F16, BF16):
            want = cast(weight.dense(), dtype)
            np.testing.assert_array_equal(decode(weight, dtype), want, f"{level} {name} {count}x{cols} dtype {dtype}")
            ids = rng.integers(0, count, 5)
            np.testing.assert_array_equal(rows(weight, ids, dtype), want[ids])


@pytest.mark.parametrize("name", FORMATS)
def test_products(level, name):
    rng = np.random.default_rng(3)
    for count, cols in SHAPES:
        weight = Seeded.random(name, rng, count, cols)
        for m in ROWS:
            x = rng.standard_normal((m, cols), np.float32)
            what = f"{level} {name} M={m} {count}x{cols}"
            assert_close(matmul(weight, x), product(x, weight.dense()), 4e-6, what)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("x_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("y_dtype", [F32, F16, BF16])
def test_dtypes_and_strides(level, name, x_dtype, y_dtype):
    rng = np.random.default_rng(4)
    weight = Seeded.random(name, rng, 35, 260)
    for m in (1, 3, 40):
        x = cast(rng.standard_normal((m, 300)), x_dtype)[:, 7:267]
        want = product(x, weight.dense())
        assert_close(matmul(weight, x, y_dtype), want, 4e-6 + STORAGE_ERROR[y_dtype], f"{level} {name} M={m}")


@pytest.mark.parametrize("name", FORMATS)
def test_bf16_mode(level, name):
    """Where there are AMX tiles both operands are rounded to 8 bits of mantissa: errors of 2^-9 that average out."""
    rng = np.random.default_rng(5)
    for count, cols in SHAPES:
        weight = Seeded.random(name, rng, count, cols)
        for m in (1, 8, 9, 33, 100):
            x = rng.standard_normal((m, cols), np.float32)
            got = matmul(weight, x, mode=COMPUTE_BF16)
            assert_close(got, product(x, weight.dense()), 2e-2, f"{level} {name} M={m} {count}x{cols}")
            assert_unbiased(got, product(x, weight.dense()), f"{level} {name} M={m} {count}x{cols}")


def int8_product(weight, x):
    """x Wᵀ with x rounded to int8, one scale a block, and states to their leading byte; and the size of an element."""
    fmt, blocks = weight.format, weight.blocks
    leading = lfsr.states(blocks.seeds, fmt.columns * fmt.states) >> 8
    values = leading.reshape(*blocks.seeds.shape, fmt.columns, fmt.states) * 256 + 127.5 - 32768
    scale = 2.0 ** (blocks.codes - 8.0 + blocks.exponent_bias) / 32767
    dense = (values @ blocks.coefficients[..., None].astype(float))[..., 0] * scale[..., None]
    padded = np.zeros((len(x), dense.shape[1] * fmt.columns), np.float32)
    padded[:, : x.shape[1]] = x
    padded = padded.reshape(len(x), -1, fmt.columns)
    largest = np.abs(padded).max(-1, keepdims=True)
    rounded = np.rint(padded * (np.float32(127) / np.where(largest > 0, largest, 1))) * (largest / 127.0)
    return product(rounded.reshape(len(x), -1).astype(float), dense.reshape(weight.rows, -1))


@pytest.mark.parametrize("name", FORMATS)
def test_int8_mode(level, name):
    """For one to eight rows of x, with AVX-512 VBMI; else as mode BF16. The sums start from a rounded number, an
    error of 3e-5 of a block's sum. Rounding both operands to 8 bits is one of 5e-2 at most: with codes from 0 to 15 a
    few blocks make the sum, whose errors hardly average."""
    rng = np.random.default_rng(15)
    for count, cols in SHAPES:
        weight = Seeded.random(name, rng, count, cols)
        for m in ROWS:
            x = rng.standard_normal((m, cols), np.float32) * np.exp(rng.standard_normal(cols)).astype(np.float32)
            got, what = matmul(weight, x, mode=COMPUTE_INT8), f"{level} {name} M={m} {count}x{cols}"
            if m <= 8 and rounds_to_int8(level):
                assert_close(got, int8_product(weight, x), 1e-4, what)
                assert_close(got, product(x, weight.dense()), 5e-2, what)
                assert_unbiased(got, product(x, weight.dense()), what)
            else:
                np.testing.assert_array_equal(got, matmul(weight, x, mode=COMPUTE_BF16), what)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", [EXACT, COMPUTE_INT8])
def test_threads_do_not_change_results(threads, name, mode):
    rng = np.random.default_rng(6)
    weight = Seeded.random(name, rng, 301, 576)
    for m in (1, 3, 33):
        x = rng.standard_normal((m, 576), np.float32)
        got = matmul(weight, x, mode=mode)
        assert lib.mlxeff_set_num_threads(1) == OK
        np.testing.assert_array_equal(got, matmul(weight, x, mode=mode))
        assert lib.mlxeff_set_num_threads(threads) == OK


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_large_inputs(level, name):
    weight = Seeded.random(name, np.random.default_rng(7), 19, 100)
    for m in (1, 5, 20):
        for mode in (EXACT, COMPUTE_INT8):
            assert (matmul(weight, np.zeros((m, 100), np.float32), mode=mode) == 0).all()
        for size in (6e4, 1e30, 1e-30):
            x = np.full((m, 100), size, np.float32)
            want, what = product(x, weight.dense()), f"{level} {name} M={m} {size}"
            assert_close(matmul(weight, x), want, 4e-6, what)
            if m <= 8 and rounds_to_int8(level):
                assert_close(matmul(weight, x, mode=COMPUTE_INT8), want, 5e-2, what)


@pytest.mark.parametrize("name", FORMATS)
def test_one_row_is_as_exact_as_more(level, name):
    """One row of x meets the states, more rows meet decoded weights: root mean square errors of sums of 1536 terms."""
    rng = np.random.default_rng(16)
    weight = Seeded.random(name, rng, 64, 1536)
    x = rng.standard_normal((2, 1536), np.float32)
    want, size = product(x, weight.dense())
    for m in (1, 2):
        error = np.sqrt(np.mean(((matmul(weight, x[:m]) - want[:m]) / size[:m]) ** 2))
        assert error < 1e-6, f"{level} {name} M={m}: {error:.3g}"


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_beyond_the_arrays_is_read(level, name):
    """The arrays end where an unreadable page begins."""
    import mmap

    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    for count, cols in ((3, 100), (17, 40)):
        weight = Seeded.random(name, np.random.default_rng(8), count, cols)
        held, pointers = [], []
        for array in (a for n, a in weight.arrays.items() if n != "exponent_bias"):
            pages = -(-array.nbytes // page) + 1
            memory = mmap.mmap(-1, pages * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            pointers.append(start + (pages - 1) * page - array.nbytes)
            ctypes.memmove(pointers[-1], address(array), array.nbytes)
            libc.mprotect(ctypes.c_void_p(start + (pages - 1) * page), ctypes.c_size_t(page), 0)
            held.append((memory, start + (pages - 1) * page))
        for field, pointer in zip(("seeds", "coefficients", "exponents"), pointers):
            setattr(weight.c, field, pointer)
        np.testing.assert_array_equal(decode(weight), weight.dense())
        for m in (1, 9):
            matmul(weight, np.ones((m, cols), np.float32))
        matmul(weight, np.ones((3, cols), np.float32), mode=COMPUTE_INT8)
        for _, guard in held:
            libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 3)


def columns_to_take(fmt):
    """(begin, count): one block, odd numbers of blocks, all of them, a last block that is cut; from inside, too."""
    blocks = (0, 1), (0, 3), (0, 19), (0, 40), (2, 33)
    whole = [(begin * fmt.columns, count * fmt.columns) for begin, count in blocks]
    return [*whole, (0, 26), (18 * fmt.columns, 2)]


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_a_larger_matrix(level, name):
    """The same bits as from a copy of the columns."""
    rng = np.random.default_rng(17)
    for count in (1, 37):
        weight = Seeded.random(name, rng, count, 40 * FORMATS[name].columns)
        for begin, cols in columns_to_take(FORMATS[name]):
            own, part = weight.columns(begin, cols)
            what = f"{level} {name} {count} rows, columns {begin} + {cols}"
            np.testing.assert_array_equal(decode(part), weight.dense()[:, begin : begin + cols], what)
            np.testing.assert_array_equal(rows(part, [count - 1, 0]), own.dense()[[count - 1, 0]], what)
            for m in (1, 3, 8, 40):
                x = rng.standard_normal((m, cols), np.float32)
                for mode in (EXACT, COMPUTE_BF16, COMPUTE_INT8):
                    got, want = matmul(part, x, mode=mode), matmul(own, x, mode=mode)
                    np.testing.assert_array_equal(got, want, f"{what} M={m} mode {mode}")


@pytest.mark.parametrize("name", FORMATS)
def test_accumulation(level, name):
    """Each finished sum is added once, in fp32, to what y holds."""
    rng = np.random.default_rng(18)
    for count, cols in ((1, 24), (37, 100), (301, 50)):
        weight = Seeded.random(name, rng, count, cols)
        for m in ROWS:
            x, y = rng.standard_normal((m, cols), np.float32), rng.standard_normal((m, count), np.float32)
            for mode in (EXACT, COMPUTE_BF16, COMPUTE_INT8):
                got, want = matmul(weight, x, mode=mode, added_to=y), y + matmul(weight, x, mode=mode)
                np.testing.assert_array_equal(got, want, f"{level} {name} M={m} {count}x{cols} mode {mode}")


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_columns_accumulate_to_the_product(level, name):
    rng, wide = np.random.default_rng(19), FORMATS[name].columns
    weight = Seeded.random(name, rng, 35, 13 * wide)
    for m in (1, 4, 40):
        x, y = rng.standard_normal((m, 13 * wide), np.float32), np.zeros((m, 35), np.float32)
        for begin, count in ((0, 2 * wide), (2 * wide, 6 * wide), (8 * wide, 5 * wide)):
            y = matmul(weight.columns(begin, count)[1], x[:, begin : begin + count], added_to=y)
        assert_close(y, product(x, weight.dense()), 4e-6, f"{level} {name} M={m}")


def test_bad_arguments():
    weight = Seeded.random("4.5", np.random.default_rng(9), 4, 32)
    x, y = np.ones((2, 32), np.float32), np.zeros((2, 4), np.float32)

    def call(ldx=32, dtype=F32, m=2, mode=EXACT, y_dtype=F32, accumulate=0, **fields):
        c = SeedWeight.from_buffer_copy(weight.c)
        for field, value in fields.items():
            setattr(c, field, value)
        return lib.mlxeff_seedlm_matmul(
            ctypes.byref(c), address(x), ldx, dtype, address(y), 4, y_dtype, m, mode, accumulate
        )

    assert call() == OK
    bad = ({"seeds": None}, {"exponents": None}, {"K": 0}, {"N": -1}, {"columns": 9}, {"columns": 12, "states": 3},
           {"exponent_bias": 97}, {"exponent_bias": -97}, {"ld": 31}, {"ldx": 31}, {"m": -1})  # fmt: skip
    for change in bad:
        assert call(**change) == BAD_ARGUMENT, change
    assert call(dtype=7) == BAD_DTYPE
    assert call(mode=3) == BAD_DTYPE
    assert call(y_dtype=F16, accumulate=1) == BAD_DTYPE
    assert call(accumulate=1) == OK
    ids = np.array([0, 4], np.int32)
    out = np.zeros((2, 32), np.float32)
    assert lib.mlxeff_seedlm_rows(ctypes.byref(weight.c), address(ids), 2, address(out), 32, F32) == BAD_ARGUMENT
    assert (out == 0).all()
