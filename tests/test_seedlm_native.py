"""The SeedLM kernels as MLX primitives against their twins in mx operations."""

import mlx.core as mx
import numpy as np
import pytest

from mlxeff import kernels
from mlxeff.seedlm import codec, native
from mlxeff.seedlm.format import FORMATS

if kernels.native()[0] is None:
    pytest.skip(f"the native kernels are {kernels.native()[1]}", allow_module_level=True)
CPU = mx.Device(mx.cpu)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(CPU):
        yield


def encoded(name, rows, cols, seed=0):
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    shape = (rows, fmt.blocks(cols))
    blocks = codec.Blocks(
        rng.integers(1, 1 << 16, shape).astype(np.uint16),
        rng.integers(-8, 8, (*shape, fmt.states)).astype(np.int8),
        rng.integers(4, 12, shape).astype(np.uint8),
        -3,
    )
    return fmt, {key: mx.array(value) for key, value in codec.pack(fmt, blocks).items()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_decoding_equals_the_twin(name, dtype):
    for rows, cols in ((1, 576), (37, 100)):
        fmt, arrays = encoded(name, rows, cols)
        got, want = native.decode_cpu(fmt, cols, arrays, dtype), codec.decode_ops(fmt, cols, arrays, dtype)
        assert mx.array_equal(got, want).item()
        ids = mx.array([[0, rows - 1], [rows // 2, 0]])
        assert mx.array_equal(
            native.rows_cpu(fmt, cols, arrays, ids, dtype), codec.rows_ops(fmt, cols, arrays, ids, dtype)
        ).item()


@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_the_twin(name):
    """fp32 sums of at most 576 products in another order, in units of a typical result, |x| |w| / sqrt(cols)."""
    for rows, cols in ((1, 576), (37, 100)):
        fmt, arrays = encoded(name, rows, cols)
        norm = mx.linalg.norm(codec.decode_ops(fmt, cols, arrays), axis=1).max().item() / cols**0.5
        for shape in ((cols,), (1, cols), (2, 4, cols), (33, cols)):
            x = mx.random.normal(shape, key=mx.random.key(1))
            got, want = native.matmul_cpu(fmt, arrays, x), codec.matmul_ops(fmt, arrays, x)
            assert got.shape == want.shape == (*shape[:-1], rows)
            size = max(mx.abs(want).max().item(), norm * mx.linalg.norm(x, axis=-1).max().item())
            assert mx.abs(got - want).max().item() <= 4e-6 * size
            half = native.matmul_cpu(fmt, arrays, x.astype(mx.bfloat16))
            assert half.dtype == mx.bfloat16


def test_lazy_graphs_and_slices():
    """Inputs that are views of larger arrays, results that feed further operations."""
    fmt, arrays = encoded("4", 16, 64)
    x = mx.random.normal((6, 128), key=mx.random.key(2))
    got = mx.exp(native.matmul_cpu(fmt, arrays, x[::2, 32:96]) * 0.01).sum()
    want = mx.exp(codec.matmul_ops(fmt, arrays, x[::2, 32:96]) * 0.01).sum()
    assert abs(got.item() - want.item()) < 1e-4
    part = {key: value if key == "exponent_bias" else value[5:9] for key, value in arrays.items()}
    assert mx.array_equal(native.decode_cpu(fmt, 64, part), codec.decode_ops(fmt, 64, arrays)[5:9]).item()


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_a_larger_matrix(name):
    """The first blocks of every row, as views of the arrays."""
    fmt, arrays = encoded(name, 37, 40 * FORMATS[name].columns)
    cols = 6 * fmt.columns
    shapes = {key: shape for key, (shape, _) in fmt.arrays(37, cols).items()}
    part = {key: value if key == "exponent_bias" else value[:, : shapes[key][1]] for key, value in arrays.items()}
    whole = codec.decode_ops(fmt, 40 * fmt.columns, arrays)
    assert mx.array_equal(native.decode_cpu(fmt, cols, part), whole[:, :cols]).item()
    x = mx.random.normal((3, cols), key=mx.random.key(3))
    assert mx.allclose(native.matmul_cpu(fmt, part, x), x @ whole[:, :cols].T, rtol=0, atol=1e-4).item()


def test_what_does_not_fit_is_refused():
    fmt, arrays = encoded("4.5", 4, 64)
    with pytest.raises(ValueError, match="x does not fit"):
        native._native().seedlm_matmul(
            mx.zeros((2, 60)), native._planes(fmt, arrays), **native._layout(fmt, 64, arrays), mode=0
        )
    with pytest.raises(ValueError, match="arrays do not fit"):
        native.matmul_cpu(fmt, arrays, mx.zeros((2, 200)))
    with pytest.raises(ValueError, match="arrays do not fit"):
        native.decode_cpu(fmt, 64, {**arrays, "seeds": arrays["seeds"].astype(mx.uint32)})
    with pytest.raises(ValueError, match="wanted a float32"):
        native.matmul_cpu(fmt, arrays, mx.zeros((2, 64), mx.int32))
