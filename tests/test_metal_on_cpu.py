"""The Metal-on-CPU harness: kernels give MLX's results, and a broken kernel is caught."""

import mlx.core as mx
import numpy as np
import pytest

import metal_on_cpu
from helpers import assert_close, to_numpy
from metal_on_cpu import MetalError
from metal_on_cpu.translate import translate
from mlxeff import kernels

emulation = pytest.mark.skipif(kernels.has_metal(), reason="tests the emulation, here kernels run on the GPU")

REDUCTION = """
    threadgroup float partial[4];
    uint i = thread_position_in_grid.x;
    float value = i < uint(inp_shape[0]) ? float(inp[i]) * factor : 0.0f;
    value = simd_sum(value);
    if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = value;
    BARRIER
    if (thread_index_in_threadgroup == 0)
      out[threadgroup_position_in_grid.x] = T(partial[0] + partial[1] + partial[2] + partial[3]);
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def launch(source, inputs, shape, dtype=mx.float32, *, grid, threadgroup, template=(), init_value=None, **options):
    """One kernel with inputs `inp`, `factor`, … and the output `out`."""
    names = ["inp", "factor", "third"][: len(inputs)]
    kernel = mx.fast.metal_kernel(name="probe", input_names=names, output_names=["out"], source=source, **options)
    return kernel(
        inputs=inputs,
        template=list(template),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape],
        output_dtypes=[dtype],
        init_value=init_value,
    )[0]


def sums(x, factor, barrier=BARRIER):
    """Sums of 128 neighbours of x, times factor, in x's type."""
    groups = -(-x.size // 128)
    source = REDUCTION.replace("BARRIER", barrier)
    size = {"grid": (groups * 128, 1, 1), "threadgroup": (128, 1, 1)}
    return launch(source, [x, factor], (groups,), x.dtype, template=[("T", x.dtype)], **size)


def reduced(x, factor):
    """The float32 reference of `sums`."""
    padded = mx.pad(x.astype(mx.float32), (0, -x.size % 128))
    return padded.reshape(-1, 128).sum(axis=1) * factor


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [5, 128, 1000])
def test_a_reduction_is_mlx_s(dtype, size):
    x = mx.random.normal((size,), key=mx.random.key(size)).astype(dtype)
    assert_close(metal_on_cpu.run(sums, x, 2.0), reduced(x, 2.0), f"sums of {size} {dtype}")


MATMUL = """
    threadgroup float a[16 * 8], b[8 * 16];
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y * 16, column = threadgroup_position_in_grid.x * 16;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), left, right;
    for (uint k = 0; k < inp_shape[1]; k += 8) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = group * 32 + lane; i < 128; i += 128) {
        a[i] = inp[(row + i / 8) * inp_shape[1] + k + i % 8];
        b[i] = factor[(k + i / 16) * factor_shape[1] + column + i % 16];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_load(left, a + group / 2 * 64, 8);
      simdgroup_load(right, b + group % 2 * 8, 16);
      simdgroup_multiply_accumulate(sum, left, right, sum);
    }
    simdgroup_store(sum, out + (row + group / 2 * 8) * factor_shape[1] + column + group % 2 * 8, factor_shape[1]);
"""


def product(a, b):
    """a b for sizes that 16 divides, by 8 x 8 matrices."""
    size = {"grid": (b.shape[1] * 8, a.shape[0] // 16, 1), "threadgroup": (128, 1, 1)}
    return launch(MATMUL, [a, b], (a.shape[0], b.shape[1]), **size)


@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
def test_a_tiled_matmul_is_mlx_s(sanitizer):
    a, b = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate([(32, 24), (24, 48)]))
    assert_close(metal_on_cpu.run(product, a, b, sanitizer=sanitizer), a @ b, "tiled matmul")


def test_the_order_of_threads_changes_nothing():
    a, b = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate([(16, 8), (8, 16)]))
    first, last = (metal_on_cpu.run(product, a, b, descending=descending) for descending in (False, True))
    assert_close(first, last, "ascending and descending", 0, 0)


def gather(x):
    """A copy of x by its strides, however it lies in memory."""
    source = """
        uint i = thread_position_in_grid.x;
        long at = long(i / inp_shape[1]) * inp_strides[0] + long(i % inp_shape[1]) * inp_strides[1];
        out[i] = inp[at] + T(inp_ndim - 2) + inp[elem_to_loc(i, inp_shape, inp_strides, inp_ndim)] - inp[at];
    """
    size = {"grid": (x.size, 1, 1), "threadgroup": (32, 1, 1)}
    return launch(source, [x], x.shape, x.dtype, template=[("T", x.dtype)], ensure_row_contiguous=False, **size)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_strides_are_those_of_the_array(dtype):
    base = mx.arange(60).reshape(6, 10).astype(dtype)
    for x in (base, base.T, base[1:5, ::3], base[::-1, 2:4], mx.broadcast_to(base[:1], (3, 10))):
        mx.eval(x)
        assert_close(metal_on_cpu.run(gather, x, sanitizer="address" if x is base else None), x, "gather", 0, 0)


@emulation
def test_small_inputs_arrive_as_constants_and_scalars():
    source = "out[thread_position_in_grid.x] = inp[0] + inp[6] + factor + third[thread_position_in_grid.x];"
    small, scalar, large = mx.arange(7.0), mx.array(10.0), mx.arange(8.0)
    with metal_on_cpu.emulated():
        real = mx.fast.metal_kernel(
            name="probe", input_names=["inp", "factor", "third"], output_names=["out"], source=source
        )
    recorded = metal_on_cpu.trace(
        real.args[0],
        [small, scalar, large],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
    )
    for wanted in ("constant float* inp", "constant float& factor", "device float* third", "device float* out"):
        assert wanted in recorded.source
    size = {"grid": (8, 1, 1), "threadgroup": (8, 1, 1)}
    got = metal_on_cpu.run(launch, source, [small, scalar, large], (8,), **size)
    assert_close(got, large + 16, "constants", 0, 0)


def test_outputs_start_as_asked():
    size = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    assert metal_on_cpu.run(launch, "out[0] = 1;", [mx.zeros(1)], (3,), init_value=7, **size).tolist() == [1, 7, 7]


@emulation
def test_what_a_kernel_leaves_unwritten_is_not_a_number():
    size = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    got = metal_on_cpu.run(launch, "out[0] = 1;", [mx.zeros(1)], (2,), **size)
    assert np.isnan(got[1].item())


@emulation
def test_attributes_named_in_the_header_alone_are_not_passed():
    header = "inline float f() { return thread_position_in_grid.x; }\n"
    size = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    with pytest.raises(MetalError, match="thread_position_in_grid"):
        metal_on_cpu.run(launch, "out[0] = f();", [mx.zeros(1)], (1,), header=header, **size)


def test_the_grid_is_cut_off_at_its_end():
    source = """
        out[thread_position_in_grid.y * 5 + thread_position_in_grid.x] =
            threads_per_threadgroup.x * 100 + threads_per_threadgroup.y * 10 + threadgroups_per_grid.x
            + float(thread_index_in_threadgroup) / 64;
    """
    got = metal_on_cpu.run(launch, source, [mx.zeros(1)], (3, 5), grid=(5, 3, 1), threadgroup=(4, 2, 1))
    width, height = np.array([4, 4, 4, 4, 1]), np.array([2, 2, 1])
    index = (np.arange(3) % 2)[:, None] * width + np.arange(5) % 4
    assert_close(got, width * 100 + height[:, None] * 10 + 2 + index / 64, "cut off grid", 0, 0)


LANES = """
    uint lane = thread_index_in_simdgroup;
    float v = inp[lane];
    float4 all = float4(simd_max(v), simd_min(v), simd_prefix_exclusive_sum(v), simd_shuffle_down(v, 3));
    out[lane] = all.x * 1000 + all.y;
    float2 last = all.zw;
    out[32 + lane] = last.x;
    out[64 + lane] = last.y;
    out[96 + lane] = simd_shuffle_xor(v, 5) + simd_broadcast(v, 7);
    out[128 + lane] = quad_sum(v) + simd_shuffle(v, ushort(31 - lane));
"""


def test_lanes_exchange_values():
    x = mx.random.permutation(32, key=mx.random.key(0)).astype(mx.float32)
    got = metal_on_cpu.run(launch, LANES, [x], (5, 32), grid=(32, 1, 1), threadgroup=(32, 1, 1))
    v, lane = np.array(x), np.arange(32)
    want = [
        np.full(32, 31000.0),
        np.cumsum(v) - v,
        np.where(lane + 3 < 32, v[(lane + 3) % 32], v),
        v[lane ^ 5] + v[7],
        v.reshape(8, 4).sum(1).repeat(4) + v[::-1],
    ]
    assert_close(got, np.array(want), "lanes", 0, 0)


def test_atomics_and_integer_functions():
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&out[popcount(i)], 1, memory_order_relaxed);
        uint bits = extract_bits(i, 4u, 4u) * 16 + reverse_bits(i) / (1 << 28);
        atomic_fetch_max_explicit(&out[9], bits, memory_order_relaxed);
    """
    size = {"grid": (256, 1, 1), "threadgroup": (64, 1, 1), "atomic_outputs": True, "init_value": 0}
    for sanitizer in (None, "thread"):
        got = metal_on_cpu.run(_counted, source, size, sanitizer=sanitizer)
        assert got.tolist() == [1, 8, 28, 56, 70, 56, 28, 8, 1, 255]


def _counted(source, size):
    return launch(source, [mx.zeros(8)], (10,), mx.uint32, **size)


@emulation
def test_half_types_round_as_numpy_and_mlx_do():
    values = np.concatenate(
        [np.float32(2.0) ** np.arange(-30, 18), np.linspace(-3, 3, 999), [65519, 65520, 1e30, np.inf]]
    )
    x = mx.array(values.astype(np.float32))
    for dtype in (mx.float16, mx.bfloat16):
        size = {"grid": (x.size, 1, 1), "threadgroup": (32, 1, 1), "template": [("T", dtype)]}
        source = "uint i = thread_position_in_grid.x; T t = T(inp[i]); out[i] = t * t + T(1) / T(3) - t;"
        got = metal_on_cpu.run(launch, source, [x], x.shape, dtype, **size)
        t = x.astype(dtype)
        assert_close(got, t * t + mx.array(1, dtype) / mx.array(3, dtype) - t, str(dtype), 0, 0)


# ---- Broken kernels are caught --------------------------------------------------------------------------------------


@emulation
def test_a_removed_barrier_is_caught():
    x = mx.ones(256)
    assert_close(metal_on_cpu.run(sums, x, 1.0, sanitizer="thread"), reduced(x, 1.0), "with barrier")
    with pytest.raises(MetalError, match="ThreadSanitizer: data race"):
        metal_on_cpu.run(sums, x, 1.0, "", sanitizer="thread")
    assert not np.array_equal(to_numpy(metal_on_cpu.run(sums, x, 1.0, "")), to_numpy(reduced(x, 1.0)))


@emulation
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("out[thread_position_in_grid.x + 1] = 0;", "heap-buffer-overflow"),
        ("out[thread_position_in_grid.x] = inp[thread_position_in_grid.x + 1];", "heap-buffer-overflow"),
        ("threadgroup float a[8]; a[thread_position_in_grid.x + 1] = 0; out[0] = a[0];", "index 8 out of bounds"),
        (
            "threadgroup float a[8]; threadgroup float* b = a; b[thread_position_in_grid.x + 1] = 0; out[0] = a[0];",
            "use-after-poison",
        ),
        ("out[0] = 1 << (int(inp[0]) + 32 + thread_position_in_grid.x);", "shift exponent"),
    ],
)
def test_a_wrong_access_is_caught(source, message):
    with pytest.raises(MetalError, match=message):
        metal_on_cpu.run(
            launch, source, [mx.zeros(8)], (8,), grid=(8, 1, 1), threadgroup=(8, 1, 1), sanitizer="address"
        )


@emulation
def test_two_threadgroups_that_write_one_element_are_caught():
    size = {"grid": (64, 1, 1), "threadgroup": (32, 1, 1), "sanitizer": "thread"}
    with pytest.raises(MetalError, match="data race"):
        metal_on_cpu.run(launch, "out[(thread_position_in_grid.x + 1) / 2] = 1;", [mx.zeros(8)], (33,), **size)


@emulation
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"if (thread_position_in_grid.x < 40) {{ {BARRIER} }} out[0] = 0;", "returned, others wait|have returned"),
        (f"if (thread_index_in_simdgroup < 4) return; {BARRIER} out[0] = 0;", "have returned"),
        (
            f"if (thread_index_in_simdgroup < 4) {{ {BARRIER} }} else out[1] = simd_sum(1.0f); {BARRIER}",
            "wait for each other|others of its group",
        ),
        ("if (thread_index_in_simdgroup < 4) return; out[0] = simd_broadcast(1.0f, 2);", "does not take part"),
        ("threadgroup float a[8193]; out[0] = a[thread_position_in_grid.x];", "threadgroup memory: 32772 bytes"),
    ],
)
def test_a_broken_rule_of_metal_s_is_an_error(source, message):
    source += " out[2] = thread_index_in_simdgroup + thread_position_in_grid.x;"
    with pytest.raises(MetalError, match=message):
        metal_on_cpu.run(launch, source, [mx.zeros(8)], (8,), grid=(64, 1, 1), threadgroup=(64, 1, 1))


def test_a_declaration_that_cannot_be_translated_is_refused():
    source = "[[kernel]] void k(\n  device float* out [[buffer(0)]]) {\nthreadgroup decltype(*out) a[4];\n}\n"
    with pytest.raises(ValueError, match="cannot translate"):
        translate(source.replace("*out", "1.0f"), "k")


@emulation
def test_without_the_harness_a_launch_is_refused():
    with pytest.raises(RuntimeError, match="No Metal"):
        sums(mx.ones(8), 1.0)
