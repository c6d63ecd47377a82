"""The Metal kernel of products of a few rows against float64: on the GPU, or emulated where there is none, which costs
some ten seconds, most of them to compile a dozen instances."""

import mlx.core as mx
import numpy as np
import pytest

import metal_on_cpu
from helpers import HALF, TOLERANCE, assert_close, dtype_name, to_numpy
from mlxeff import kernels
from mlxeff.ops import Quantized
from mlxeff.small_matmul import generation, small_matmul, supported, wanted

M1, M2_PRO, M3, M4 = "applegpu_g13g", "applegpu_g14s", "applegpu_g15g", "applegpu_g16s"


def normal(*shape, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def quantized(rows, columns, bits, group, dtype=mx.float16):
    packed = mx.quantize(normal(rows, columns).astype(dtype), group_size=group, bits=bits)
    return Quantized(*packed, group, bits)


def dense(weight):
    """The matrix in float64."""
    if not isinstance(weight, Quantized):
        return to_numpy(weight).astype(np.float64)
    scales, biases = (to_numpy(each).repeat(weight.group_size, axis=1) for each in (weight.scales, weight.biases))
    codes = np.array(weight.weight)[..., None] >> np.arange(0, 32, weight.bits).astype(np.uint32)
    return (codes % (1 << weight.bits)).reshape(scales.shape) * scales + biases


def check(x, weight, **options):
    got = metal_on_cpu.run(small_matmul, x, weight, **options)
    assert got.dtype == x.dtype
    rtol = TOLERANCE[dtype_name(got)] if dtype_name(got) in HALF else 2e-6
    assert_close(got, to_numpy(x).astype(np.float64) @ dense(weight).T, f"{x.shape}", rtol=rtol)
    return got


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantised_matrices(bits, group):
    for rows, columns, tokens in ((1, group, 1), (16, 2 * group, 8), (35, 3 * group, 3), (129, 5 * group, 5)):
        check(normal(tokens, columns, dtype=mx.float16), quantized(rows, columns, bits, group))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_dense_matrices(dtype):
    for rows, columns, tokens in ((1, 8, 1), (3, 5, 2), (16, 64, 8), (35, 100, 3), (70, 577, 7)):
        check(normal(tokens, columns, dtype=dtype), normal(rows, columns, dtype=dtype))


@pytest.mark.parametrize("weight", [quantized(33, 320, 4, 64), quantized(33, 320, 8, 32), normal(33, 300)])
def test_a_row_has_the_same_bits_alone_and_among_others(weight):
    x = normal(8, 320 if isinstance(weight, Quantized) else 300)
    rows = [to_numpy(metal_on_cpu.run(small_matmul, x[i : i + 1], weight))[0] for i in range(8)]
    for tokens in range(1, 9):
        assert np.array_equal(to_numpy(check(x[:tokens], weight)), rows[:tokens])


def test_other_types_and_shapes():
    weight = quantized(20, 64, 4, 32, mx.bfloat16)
    assert check(normal(3, 64, dtype=mx.bfloat16), weight).shape == (3, 20)
    assert metal_on_cpu.run(small_matmul, normal(1, 4, 64), weight).shape == (1, 4, 20)
    check(normal(64, 3).T, weight)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("weight", [quantized(17, 160, 4, 32), normal(17, 67, dtype=mx.float16)])
def test_sanitizers_find_nothing(weight, sanitizer):
    check(normal(3, 160 if isinstance(weight, Quantized) else 67, dtype=mx.float16), weight, sanitizer=sanitizer)


def test_what_the_kernel_does_not_compute_is_refused():
    x = mx.zeros((2, 64))
    three, other = quantized(8, 64, 3, 32), Quantized(*mx.quantize(normal(8, 64), mode="mxfp4"), None, 32, 4, "mxfp4")
    for rows, weight in ((x, three), (x, other), (mx.zeros((9, 64)), normal(8, 64)), (x, mx.zeros((8, 64), mx.int8))):
        assert not supported(rows, weight)
        assert not wanted(rows, weight, M1)
        with pytest.raises(ValueError, match="product of a few rows"):
            small_matmul(rows, weight)


@pytest.mark.parametrize(
    ("architecture", "number"), [(M1, 13), (M2_PRO, 14), (M3, 15), ("applegpu_g17", 17), ("x86_64", None), ("", None)]
)
def test_the_generation_of_a_gpu(architecture, number):
    assert generation(architecture) == number


def test_where_the_kernel_is_predicted_to_be_faster():
    weights = quantized(8, 64, 4, 64), normal(8, 64, dtype=mx.float16)
    for weight in weights:
        for rows in range(1, 9):
            for architecture in (M1, M2_PRO, M3, M4, "x86_64"):
                chosen = wanted(mx.zeros((rows, 64)), weight, architecture)
                assert chosen == (rows > 1 and architecture in (M1, M2_PRO))
    assert not wanted(mx.zeros((2, 64)), normal(8, 64), M1)
    if kernels.device() != "gpu":
        assert not wanted(mx.zeros((2, 64)), weights[0])
