"""The SeedLM Metal kernels against the reference decoder: on the GPU, or emulated where there is none."""

import itertools
import os

import mlx.core as mx
import numpy as np
import pytest

import metal_on_cpu
from helpers import HALF, TOLERANCE, assert_close, dtype_name, to_numpy
from mlxeff.seedlm import codec, metal
from mlxeff.seedlm.format import FORMATS

BIAS = -12
# Largest error of a product by its expected size, from the rounding of float32 sums (2^-24 a step). The AND-only form
# cancels offsets up to 2^8 times as large as the result; the others sum terms of the result's own size.
BOUND = {"Windows": 1e-4, "Shifts": 1e-5, "weights": 1e-5}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
exhaustive = pytest.mark.skipif(
    not os.environ.get("MLXEFF_EXHAUSTIVE"), reason="minutes of compilation where there is no GPU: MLXEFF_EXHAUSTIVE=1"
)
each_format = pytest.mark.parametrize("name", FORMATS)


class Encoded:
    """A matrix (rows, cols) of random blocks: its stored arrays and its float32 values by the NumPy reference."""

    def __init__(self, name, rows, cols, blocks=None):
        self.fmt, self.rows, self.cols = FORMATS[name], rows, cols
        self.blocks = random_blocks(self.fmt, rows, cols) if blocks is None else blocks
        self.arrays = {key: mx.array(array) for key, array in codec.pack(self.fmt, self.blocks).items()}
        self.dense = codec.decode(self.fmt, self.blocks, cols)


def random_blocks(fmt, rows, cols):
    rng, shape = np.random.default_rng([rows, cols, fmt.states]), (rows, fmt.blocks(cols))
    return codec.Blocks(
        rng.integers(1, 1 << 16, shape).astype(np.uint16),
        rng.integers(-8, 8, (*shape, fmt.states)).astype(np.int8),
        rng.integers(4, 12, shape).astype(np.uint8),
        BIAS,
    )


def activations(tokens, cols, dtype=mx.float32):
    return mx.random.normal((tokens, cols), key=mx.random.key(tokens * cols)).astype(dtype)


def check_product(weight, x, form="Windows", **options):
    """matmul_metal of x against float64: the bound of its form, and the rounding of its result in half precision."""
    got = metal_on_cpu.run(metal.matmul_metal, weight.fmt, weight.arrays, x, form=form, **options)
    assert got.dtype == x.dtype
    vectors, dense = to_numpy(x).astype(np.float64), weight.dense.astype(np.float64)
    size = np.sqrt(np.mean((vectors**2) @ (dense**2).T))  # of a product whose terms have random signs
    bound = BOUND[form if x.size == weight.cols else "weights"] * size
    rtol = TOLERANCE[dtype_name(got)] if dtype_name(got) in HALF else 0
    assert_close(got, vectors @ dense.T, f"{weight.fmt.name} {tuple(x.shape)}", rtol=rtol, atol=bound)


# ---- Decoding -------------------------------------------------------------------------------------------------------


@each_format
def test_every_seed_decodes_to_the_bit(name):
    fmt = FORMATS[name]
    rows, count = (255, 257) if not fmt.planar else (257, 256)
    seeds = (np.arange(rows * count) % 65535 + 1).astype(np.uint16).reshape(rows, count)
    drawn = random_blocks(fmt, rows, count * fmt.columns)
    blocks = codec.Blocks(seeds, drawn.coefficients, drawn.codes, BIAS)
    weight = Encoded(name, rows, count * fmt.columns, blocks)
    assert set(seeds.ravel().tolist()) == set(range(1, 65536))
    got = metal_on_cpu.run(metal.decode_metal, fmt, weight.cols, weight.arrays)
    assert_close(got, weight.dense, f"all seeds of {name}", rtol=0, atol=0)


@each_format
@pytest.mark.parametrize(("rows", "cols", "dtype"), [(1, 20, "float16"), (3, 24, "bfloat16"), (33, 20, "float16")])
def test_decoding_is_that_of_the_ops(name, rows, cols, dtype):
    weight = Encoded(name, rows, cols)
    want = codec.decode_ops(weight.fmt, cols, weight.arrays, DTYPES[dtype])
    got = metal_on_cpu.run(metal.decode_metal, weight.fmt, cols, weight.arrays, DTYPES[dtype])
    assert_close(got, want, f"{name} {rows} x {cols} {dtype}", rtol=0, atol=0)


@each_format
@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("bias", [-96, 96])
def test_exponents_reach_their_limits(name, code, bias):
    drawn = random_blocks(FORMATS[name], 2, 48)
    blocks = codec.Blocks(drawn.seeds, drawn.coefficients, np.full_like(drawn.codes, code), bias)
    weight = Encoded(name, 2, 48, blocks)
    got = metal_on_cpu.run(metal.decode_metal, weight.fmt, 48, weight.arrays)
    assert_close(got, weight.dense, f"code {code} bias {bias}", rtol=0, atol=0)
    one = mx.zeros((1, 48)).at[0, 7].add(1.0)
    got = metal_on_cpu.run(metal.matmul_metal, weight.fmt, weight.arrays, one)
    assert_close(
        got,
        weight.dense[:, 7][None],
        f"product, code {code} bias {bias}",
        rtol=0,
        atol=2e-4 * np.abs(weight.dense).max(),
    )


@each_format
def test_rows_are_those_asked_for(name):
    weight = Encoded(name, 100, 576)
    ids = mx.array([[0, 99, 7], [7, 7, 50]])
    got = metal_on_cpu.run(metal.rows_metal, weight.fmt, weight.cols, weight.arrays, ids)
    assert_close(got, weight.dense[np.array(ids)], "embedding rows", rtol=0, atol=0)
    assert metal_on_cpu.run(metal.rows_metal, weight.fmt, weight.cols, weight.arrays, ids[0, 1]).shape == (576,)


# ---- Products -------------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("form", ["Windows", "Shifts"])
@pytest.mark.parametrize(("rows", "cols", "dtype"), [(33, 576, "float32"), (100, 1536, "float16"), (1, 20, "float32")])
def test_one_token(name, form, rows, cols, dtype):
    check_product(Encoded(name, rows, cols), activations(1, cols, DTYPES[dtype]), form)


@each_format
@pytest.mark.parametrize(("tokens", "dtype"), [(2, "float32"), (3, "bfloat16"), (8, "float16")])
def test_a_few_tokens(name, tokens, dtype):
    for rows, cols in ((33, 576), (100, 20)):
        check_product(Encoded(name, rows, cols), activations(tokens, cols, DTYPES[dtype]))


@each_format
@pytest.mark.parametrize(("tokens", "dtype"), [(9, "bfloat16"), (33, "float32")])
def test_many_tokens(name, tokens, dtype):
    for rows, cols in ((100, 576), (33, 20)):
        check_product(Encoded(name, rows, cols), activations(tokens, cols, DTYPES[dtype]))


@exhaustive
@each_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_every_size(name, dtype):
    for rows, cols in itertools.product((1, 3, 33, 100), (20, 24, 576, 1536)):
        weight = Encoded(name, rows, cols)
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 65):
            check_product(weight, activations(tokens, cols, DTYPES[dtype]))


def test_many_rows_take_four_a_simdgroup():
    weight = Encoded("4", 2049, 24)
    check_product(weight, activations(1, 24))
    check_product(weight, activations(2, 24))


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_an_input_need_not_be_contiguous(tokens):
    weight = Encoded("4.5", 3, 24)
    x = activations(24, 2 * tokens)[:, ::2].T
    check_product(weight, x)
    check_product(weight, x.reshape(1, tokens, 24)) if tokens > 1 else None


@each_format
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_zero_gives_zero_and_large_values_stay_finite(name, tokens):
    weight = Encoded(name, 33, 20)
    zero = metal_on_cpu.run(metal.matmul_metal, weight.fmt, weight.arrays, mx.zeros((tokens, 20), mx.float16))
    assert (to_numpy(zero) == 0).all()
    x = 6e4 * mx.sign(activations(tokens, 20))
    for dtype in (mx.float32, mx.bfloat16):
        check_product(weight, x.astype(dtype))


# ---- Under the sanitizers -------------------------------------------------------------------------------------------

KERNELS = {  # tokens, form
    "windows": (1, "Windows"),
    "shifts": (1, "Shifts"),
    "vectors": (3, "Windows"),
    "tiles": (9, "Windows"),
    "large tiles": (33, "Windows"),
}
SANITIZED = [("4", "windows"), ("3", "windows"), ("4.5", "vectors"), ("3", "tiles")]


def sanitize(name, kernel, sanitizer):
    """The tiles take 60 columns, of several steps: a tile is loaded again after it was read."""
    tokens, form = KERNELS[kernel]
    cols = 60 if "tiles" in kernel else 20
    weight = Encoded(name, 17, cols)
    check_product(weight, activations(tokens, cols), form, sanitizer=sanitizer)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(("name", "kernel"), SANITIZED)
def test_sanitizers_find_nothing_in_products(name, kernel, sanitizer):
    sanitize(name, kernel, sanitizer)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("name", ["3"])
def test_sanitizers_find_nothing_in_decoding(name, sanitizer):
    weight = Encoded(name, 5, 20)
    got = metal_on_cpu.run(metal.decode_metal, weight.fmt, 20, weight.arrays, sanitizer=sanitizer)
    assert_close(got, weight.dense, "decoding", rtol=0, atol=0)


@exhaustive
@each_format
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_any_kernel(name, sanitizer):
    for kernel in KERNELS:
        sanitize(name, kernel, sanitizer)
