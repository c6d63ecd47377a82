"""Every kernel of metal/ keeps to Metal's address spaces, as Clang checks them; a kernel that does not is refused.

Needs clang (Debian: apt install clang) and no GPU. Costs some six seconds: two runs of clang, without optimisation or
code, for each test. All kernels of a .metal file, 300 for SeedLM's products, are checked in one such pair of runs.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import metal_on_cpu
from metal_on_cpu import MetalError, address_spaces
from mlxeff import kernels, small_matmul
from mlxeff.dynamoe import metal as dynamoe
from mlxeff.dynamoe import sparse_metal
from mlxeff.dynamoe.columns import Columns
from mlxeff.ops import Quantized
from mlxeff.quantspec import metal as quantspec
from mlxeff.quantspec.planes import HEAD_SIZES
from mlxeff.seedlm import metal, metal_search, search
from mlxeff.seedlm.format import FORMATS
from plane_buffers import FULL, Buffers
from test_seedlm_metal import DTYPES, Encoded, activations

METAL = Path(__file__).resolve().parents[1] / "metal"
needs_clang = pytest.mark.clang


def launch_seedlm():
    """Decoding, rows and products of every format, type and form; arrays of fewer than 8 elements and larger ones."""
    for name, dtype, (rows, cols) in itertools.product(FORMATS, DTYPES.values(), [(1, 20), (33, 576), (2049, 24)]):
        weight = Encoded(name, rows, cols)
        metal.decode_metal(weight.fmt, cols, weight.arrays, dtype)
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33):
            metal.matmul_metal(weight.fmt, weight.arrays, activations(tokens, cols, dtype))
        metal.matmul_metal(weight.fmt, weight.arrays, activations(1, cols, dtype), form="Shifts")


def launch_seedlm_encode():
    """The three kernels of the search in every format, for fewer than 8 blocks and for more, with either rounding."""
    for name, count, refine in itertools.product(FORMATS, (1, 33), (True, False)):
        fmt = FORMATS[name]
        blocks = search.problem(fmt, np.ones((count, fmt.columns), np.float32), None, -2)
        table = metal_search.inverse_table(fmt, blocks.metric)
        metal_search.choose(fmt, blocks, table, metal_search.scan(fmt, blocks, table), -2, refine)


def launch_quantspec():
    """Attention for every head size and number of rows, with one part and with several."""
    for size, rows, length in itertools.product(HEAD_SIZES, range(8, quantspec.MOST_ROWS + 1, 8), (9, 600)):
        buffers = Buffers(length, size, groups=1)
        queries = mx.zeros((1, rows // 8, 8, size))
        for dtype in DTYPES.values():
            quantspec.attend(queries.astype(dtype), *buffers.arrays(), length, *FULL, 1.0)
    quantspec.attend(mx.zeros((1, 1, 1, 64)), *Buffers(9, 64, groups=1).arrays(), 9, *FULL, 1.0)  # of 2 statistics


def launch_quantspec_store():
    """Storing, for every head size and type."""
    for size, dtype in itertools.product(HEAD_SIZES, DTYPES.values()):
        new = mx.zeros((1, 1, 3, size), dtype)
        quantspec.store(new, new, *Buffers(9, size, groups=1).arrays(), 9, 0, 0)


def launch_small_matmul():
    """Products of every type and packing, with arrays of fewer than 8 elements and larger ones."""
    for dtype, (rows, columns, tokens) in itertools.product(DTYPES.values(), [(1, 5, 1), (35, 100, 8)]):
        small_matmul.small_matmul(mx.zeros((tokens, columns), dtype), mx.zeros((rows, columns), dtype))
    for dtype, bits, group, rows in itertools.product(DTYPES.values(), (4, 8), (32, 64, 128), (1, 35)):
        packed = mx.quantize(mx.zeros((rows, 256), dtype), group_size=group, bits=bits)
        small_matmul.small_matmul(mx.zeros((3, 256), dtype), Quantized(*packed, group, bits))


def launch_dynamoe():
    """A step of every type, packing and number of tokens, with arrays of fewer than 8 elements and larger ones."""

    def matrix(rows, columns, dtype, packing):
        weight = mx.zeros((rows, columns), dtype)
        return Quantized(*mx.quantize(weight, *packing[::-1]), *packing[::-1]) if packing else weight

    cases = [(dtype, None, columns, (1, 2, 5)) for dtype in DTYPES.values() for columns in (1, 20)]
    for bits, group in itertools.product((4, 8), (32, 64, 128)):
        cases.append((mx.float16, (bits, group), 128, (group, 128, 256)))
    for dtype, packing, size, widths in cases:
        gate, whole = matrix(widths[-1], size, dtype, packing), matrix(size, widths[-1], dtype, packing)
        downs = [matrix(size, width, dtype, packing) for width in widths]
        lefts, rights = [mx.zeros((size, 2), dtype)] * 2, [mx.zeros((2, width), dtype) for width in widths[:2]]
        for tokens in (3,) if packing else (1, 8):
            x, chosen, several = mx.zeros((tokens, size), dtype), mx.zeros(tokens, mx.uint32), mx.array(widths)
            for rule, rows in (("lagrangian", 2), ("tail", 3)):
                dynamoe.route(x, mx.zeros((rows, size)), mx.zeros(rows), mx.zeros(3), rule, 0.5)
            h = dynamoe.gate_up(x, gate, gate, several, chosen)
            dynamoe.gate_up(x, gate, gate, several, chosen, mx.zeros(widths[-1]), mx.zeros(widths[-1]))
            dynamoe.down(h, downs, several, chosen, mx.zeros(size))
            dynamoe.down(h, [whole], several, chosen, None, lefts, rights)


def launch_sparse():
    """A step of every type and packing, with and without a bias of down."""
    kinds = [(None, None), *itertools.product((4, 8), (32, 64, 128))]
    for dtype, (bits, group), bias in itertools.product(DTYPES.values(), kinds, (False, True)):
        gate_up, down = Columns(256, 128, bits, group), Columns(128, 128, bits, group, bias)
        for each in (gate_up, down):
            each.update({name: array.astype(dtype) for name, array in each.items() if array.dtype != mx.uint32})
        sparse_metal.decode(mx.zeros((3, 128), dtype), sparse_metal.Parts(gate_up, down, *[mx.ones(128)] * 2), 0.5)


# Of each file of metal/: all its launches.
FAMILIES = {
    "seedlm": launch_seedlm,
    "seedlm_encode": launch_seedlm_encode,
    "quantspec": launch_quantspec,
    "quantspec_store": launch_quantspec_store,
    "small_matmul": launch_small_matmul,
    "dynamoe": launch_dynamoe,
    "sparse": launch_sparse,
}


@functools.cache
def launches(family):
    with metal_on_cpu.recorded() as recorded:
        FAMILIES[family]()
    return recorded


def test_every_metal_file_is_checked():
    assert sorted(FAMILIES) == sorted(path.stem for path in METAL.glob("*.metal"))


@needs_clang
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_keeps_to_its_address_spaces(family):
    header = (METAL / f"{family}.metal").read_text(encoding="utf-8")
    assert all(launch.source.startswith(header) for launch in launches(family))
    assert address_spaces.check(launches(family)) == set(), "functions that no launch calls, so that they are unchecked"


# ---- What is refused ------------------------------------------------------------------------------------------------


@needs_clang
@pytest.mark.parametrize(
    ("family", "right", "wrong"),
    [
        ("seedlm", "thread uint& state", "device uint& state"),
        ("seedlm", "thread uint& state", "uint& state"),
        ("seedlm", "(Block block, thread const uint* words", "(Block block, const uint* words"),
        ("seedlm", "device T* out) {", "thread T* out) {"),
        ("seedlm", "(threadgroup Entry* tables", "(device Entry* tables"),
        ("seedlm", "const threadgroup Entry* tables", "const constant Entry* tables"),
        ("seedlm", "uint cols, threadgroup float* tile", "uint cols, thread float* tile"),
        ("quantspec", "(threadgroup float* memory, uint rows)", "(device float* memory, uint rows)"),
        ("quantspec", "  const device uint* lower;", "  const uint* lower;"),
        ("quantspec", "const threadgroup float* probabilities", "const device float* probabilities"),
        ("small_matmul", "thread float* values) const {", "float* values) const {"),
        ("dynamoe", "threadgroup float* memory, uint simdgroup,", "thread float* memory, uint simdgroup,"),
        ("dynamoe", "uint tokens, device T* out) const", "uint tokens, thread T* out) const"),
        ("dynamoe", "static float add(thread const Chunk& loaded", "static float add(const Chunk& loaded"),
        ("sparse", "(const threadgroup float* memory, uint output)", "(const device float* memory, uint output)"),
        ("sparse", "threadgroup float* memory, threadgroup uint* counts", "threadgroup float* memory, uint* counts"),
        ("sparse", "device float* hidden,", "thread float* hidden,"),
        ("sparse", "float value, thread uint& mask,", "float value, uint& mask,"),
        ("quantspec_store", "  device uint* out;", "  const device uint* out;"),
        (
            "quantspec_store",
            "threadgroup uchar* codes, threadgroup ushort* scale,",
            "thread uchar* codes, ushort* scale,",
        ),
        ("seedlm_encode", "threadgroup uint* pending;", "uint* pending;"),
        ("seedlm_encode", "thread float (&G)[P][P]) {", "float (&G)[P][P]) {"),
        ("seedlm_encode", "device float* maxima,", "constant float* maxima,"),
        ("seedlm_encode", "const device float* maxima) {", "const constant float* maxima) {"),
        ("seedlm_encode", "thread Best<P>& best) {", "threadgroup Best<P>& best) {"),
    ],
)
def test_a_wrong_space_in_a_kernel_of_this_project_is_refused(family, right, wrong):
    first = launches(family)[:12]  # each kernel, in one format
    assert right in first[0].source
    broken = [dataclasses.replace(launch, source=launch.source.replace(right, wrong)) for launch in first]
    with pytest.raises(MetalError, match=r"error: |lacks an address space|called with another address space"):
        address_spaces.check(broken)


HEADER = """
using namespace metal;
struct Pair {
  float a, b;
  float sum() const { return a + b; }
};
inline float first(const constant float* values) { return values[0]; }
template <typename T>
inline void clear(thread T* values) {
  values[0] = 0;
}
template <typename Values>
inline float last(Values values) {
  return values[1];
}
inline void raise(thread float& value) { value += 1; }
inline void raise_all(device float& value) { value += 1; }
"""
BODY = """  // right in every statement
    threadgroup float shared[4];
    threadgroup Pair pairs[2];
    float own[2] = {one, few[2]};
    clear(own);
    raise(own[1]);
    raise_all(out[0]);
    shared[0] = first(few) + simd_sum(inp[thread_position_in_grid.x]);
    threadgroup float* place = shared + 1;
    Pair pair = {place[0], 1};
    out[1] = pair.sum() + last(own) + last(shared) + float2(one, own[0]).y;
    auto rest = own + 1;
    auto& total = out[2];
    total = *rest;
"""


def probe(body, header=HEADER, template=()):
    """The launch of a kernel with `inp` in device memory, `few` and `one` constant, and the output `out`."""
    with metal_on_cpu.recorded() as recorded:
        kernel = mx.fast.metal_kernel(
            name="probe", input_names=["inp", "few", "one"], output_names=["out"], source=body, header=header
        )
        kernel(
            inputs=[mx.zeros(8), mx.zeros(3), mx.array(1.0)],
            template=list(template),
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
        )
    return recorded


@needs_clang
def test_a_kernel_that_uses_every_space_rightly_passes():
    assert address_spaces.check(probe(BODY)) == set()
    templated = BODY + "threadgroup T more[3]; more[N] = T(out[0]); thread T* own_more = nullptr; clear(own_more);"
    assert address_spaces.check(probe(templated, template=[("T", mx.bfloat16), ("N", 2)])) == set()


@needs_clang
def test_a_function_that_is_never_called_is_named():
    header = "template <typename T> inline void never(T x) { x(); }"
    assert address_spaces.check(probe("out[0] = 1;", header)) == {"never"}


@needs_clang
@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("uint half = 0;", "cannot combine"),
        ("thread float* p = out;", "cannot initialize a variable"),
        ("const thread float* p = few;", "cannot initialize a variable"),
        ("const device float* p = few;", "cannot initialize a variable"),
        ("device float* p = shared;", "cannot initialize a variable"),
        ("rest = out;", "changes address space"),
        ("place = own;", "assigning to"),
        ("clear(out);", "clear: .* is called with"),
        ("clear(shared);", "clear: .* is called with"),
        ("first(inp);", "no matching function.*'first'"),
        ("first(own);", "no matching function.*'first'"),
        ("raise(out[0]);", "no matching function.*'raise'"),
        ("raise(shared[0]);", "no matching function.*'raise'"),
        ("raise_all(own[0]);", "no matching function.*'raise_all'"),
        ("const thread float& r = shared[0];", "changes address space"),
        ("const float& r = out[0];", "changes address space"),
        ("constant float* p = few; p[0] = 1;", "not assignable"),
        ("device float* p = inp;", "cannot initialize a variable"),
        ("out[0] = pairs[0].sum();", "cannot initialize object parameter"),
        ("place = true ? shared : out;", "incompatible operand types"),
        ("device float* p = (device float*)own;", "casts to another"),
        ("(device float&)own[0] = 1;", "casts to another"),
        ("device float* p = reinterpret_cast<device float*>(shared);", "is not allowed"),
        ("float* p = own;", r"p: float \* lacks"),
        ("float& r = own[0];", r"r: float & lacks"),
        ("device float* p = out; device float** q = nullptr;", r"q: __global float \*\* lacks"),
        ("thread float* p = (float*)own;", r".*float \* lacks"),
        ("using P = float*; P p = own;", r"P: float \* lacks"),
        ("vec<float, 2> v; thread vec<float, 2>* p = &v; vec<float, 2>* q = p;", r"q: .* \* lacks"),
    ],
)
def test_a_wrong_space_is_refused(statement, message):
    with pytest.raises(MetalError, match=message):
        address_spaces.check(probe(BODY + statement))


@needs_clang
@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("inline void extra(float* values) { values[0] = 0; }", "extra: void"),
        ("inline void extra(float (&values)[2]) { values[0] = 0; }", "extra: void"),
        ("template <typename T> inline void extra(T* values) { values[0] = 0; }", "extra: void"),
        ("template <typename T> inline void extra(const T& value) {}", "extra: void"),
        ("inline float* extra(thread float* values) { return values; }", "extra: float"),
        ("struct Extra { float* values; };", "values: float"),
        ("template <typename T> struct Extra { void run(T* values) {} };", "run: void"),
        ("template <typename T> struct Extra { vec<T, 2>* values; };", "values: "),
    ],
)
def test_a_pointer_without_a_space_is_refused_even_where_nothing_calls_it(function, named):
    with pytest.raises(MetalError, match=f"{named}.* lacks"):
        address_spaces.check(probe(BODY, HEADER + function))


@needs_clang
def test_a_threadgroup_variable_outside_of_a_kernel_is_refused():
    with pytest.raises(MetalError, match="outside of a kernel"):
        address_spaces.check(probe(BODY, HEADER + "inline void extra() { threadgroup float more[4]; }"))


@needs_clang
def test_an_error_names_its_kernel_and_line():
    with pytest.raises(MetalError, match=r"custom_kernel_probe\w*:\d+:.*cannot initialize"):
        address_spaces.check(probe("thread float* p = out;"))


def test_clang_that_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernels, "has_metal", lambda: False)
    reason = address_spaces.missing.__wrapped__()
    assert "no clang" in reason
    monkeypatch.setattr(address_spaces, "missing", lambda: reason)
    with pytest.raises(MetalError, match=reason):
        address_spaces.check(probe(BODY))
