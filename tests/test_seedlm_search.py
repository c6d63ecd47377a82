"""The three implementations of the SeedLM search find the same blocks, to the bit: NumPy, native, Metal.

Metal runs on the GPU, or emulated where there is none. That the blocks are the best is shown by brute force in
`test_seedlm_encode` for the native search, and here for Metal.
"""

import functools

import numpy as np
import pytest

import metal_on_cpu
from cpu_library import LEVELS, OK, lib
from mlxeff import MlxeffError, kernels
from mlxeff.seedlm import encode as encoder
from mlxeff.seedlm import metal_search, search
from mlxeff.seedlm.codec import HALF
from mlxeff.seedlm.format import FORMATS
from seedlm_calls import encode
from test_seedlm_encode import brute_force

BIAS = -2
emulation = pytest.mark.skipif(kernels.has_metal(), reason="tests the choice of a machine without a GPU")
each_format = pytest.mark.parametrize("name", FORMATS)


def awkward_blocks(name, count=33):
    """Float32 (count, C): Gaussian blocks, and what could go wrong: zeros, patterns, tiny, large, sparse and skewed."""
    rng, C = np.random.default_rng(20), FORMATS[name].columns
    w = rng.standard_normal((count, C)).astype(np.float32)
    w[:9] *= np.float32(2.0) ** np.array([0, -8, -11, -40, -149, 6, 3, 0, 0])[:, None]
    w[9], w[10], w[11], w[12] = 0, 1, np.eye(C)[2], (-1.0) ** np.arange(C)
    w[13] *= rng.random(C) < 0.3
    w[14, 1:] *= 1e-6
    w[15, 1:] *= 1e-38
    w[16] = -w[17] * 4
    w[18] = np.nextafter(np.float32(1), np.float32(2))
    return w


METRICS = {  # the weights of the columns; the first of the wild ones is below the least that counts
    "plain": lambda C: None,
    "mild": lambda C: np.geomspace(0.05, 5, C).astype(np.float32),
    "wild": lambda C: np.append(1e-9, 10 ** np.random.default_rng(21).uniform(-3, 2, C - 1)).astype(np.float32),
}
each_metric = pytest.mark.parametrize("metric", METRICS)


@functools.cache
def reference(name, metric, refine=True):
    return search.search_numpy(
        FORMATS[name], awkward_blocks(name), METRICS[metric](FORMATS[name].columns), BIAS, refine
    )


def run_metal(name, weight, diagonal, refine=True, bias=BIAS, sanitizer=None):
    """`search_metal` on the GPU or emulated."""
    if not kernels.has_metal():
        metal_search._plain_table.cache_clear()
    return metal_on_cpu.run(
        metal_search.search_metal, FORMATS[name], weight, diagonal, bias, refine, sanitizer=sanitizer
    )


def assert_same(got, want):
    for kind, one, other in zip(("seeds", "coefficients", "codes", "decoded"), got, want, strict=True):
        assert one.dtype == other.dtype, kind
        np.testing.assert_array_equal(one, other, err_msg=kind)


# ---- The parts ------------------------------------------------------------------------------------------------------


def test_fma_rounds_once():
    """Against exact sums of integers, near ties of float32 and with all signs."""
    rng = np.random.default_rng(22)
    a, b = (rng.integers(-(1 << 24), 1 << 24, 20000) for _ in range(2))
    c = rng.integers(-(1 << 24), 1 << 24, 20000)
    scales = rng.integers(0, 30, 20000)
    got = search.fma(a.astype(np.float32), b.astype(np.float32), np.ldexp(c.astype(np.float32), scales))
    for one, x, y, z, scale in zip(got.tolist(), a.tolist(), b.tolist(), c.tolist(), scales.tolist()):
        exact = x * y + (z << scale)
        assert abs(exact - int(one)) <= abs(exact - int(np.nextafter(np.float32(one), np.float32(np.inf))))
        assert abs(exact - int(one)) <= abs(exact - int(np.nextafter(np.float32(one), np.float32(-np.inf))))


def test_the_cycle_holds_every_seed_once():
    assert sorted(search.cycle().tolist()) == list(range(1, 65536))


@each_format
@each_metric
def test_energies_keep_their_slack(name, metric):
    """What leaves seeds out: float32 energies by tables in float32, against projections in float64.

    Of the seeds of the largest inverses, which err most, and some others. A third of the slack is room for instructions
    that fuse otherwise.
    """
    fmt = FORMATS[name]
    C, P = fmt.columns, fmt.states
    blocks = search.problem(fmt, awkward_blocks(name), METRICS[metric](C), BIAS)
    table = np.array(metal_on_cpu.run(metal_search.inverse_table, fmt, blocks.metric))[:, :-1]
    inverse = np.zeros((P, P, search.SEEDS), np.float32)
    for entry, (i, j) in enumerate(zip(*np.triu_indices(P), strict=True)):
        inverse[i, j] = table[entry] / (1 if i == j else 2)
    chosen = np.flatnonzero(table[0])
    chosen = np.concatenate([chosen[np.argsort(-table[0, chosen])[:300]], chosen[:: max(1, len(chosen) // 300)]])
    h = blocks.metric.astype(np.float64)
    values = (np.resize(search.cycle(), search.SEEDS + C * P)[chosen[:, None] + np.arange(C * P)] - float(HALF)) / HALF
    basis = np.linalg.qr(values.reshape(-1, C, P) * np.sqrt(h)[:, None])[0]
    states, _ = search._tables(fmt, blocks.metric.tobytes())
    got = search._energies(states, inverse, blocks.metric * blocks.scaled)[:, chosen]
    want = ((np.swapaxes(basis, 1, 2) @ (np.sqrt(h) * blocks.scaled).T) ** 2).sum(1).T
    norm = (blocks.scaled.astype(np.float64) ** 2) @ h
    assert (want - got <= search.SLACK / 1.5 * norm[:, None]).all()


# ---- The same blocks ------------------------------------------------------------------------------------------------


@each_format
@each_metric
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_native_finds_the_blocks_of_numpy(name, metric, refine, level):
    assert lib.mlxeff_set_isa(level.encode()) == OK
    diagonal = METRICS[metric](FORMATS[name].columns)
    blocks, decoded, _ = encode(name, awkward_blocks(name), BIAS, refine, diagonal)
    assert lib.mlxeff_set_isa(None) == OK
    assert_same((blocks.seeds, blocks.coefficients, blocks.codes, decoded), reference(name, metric, refine))


@each_format
@each_metric
def test_metal_finds_the_blocks_of_numpy(name, metric):
    diagonal = METRICS[metric](FORMATS[name].columns)
    assert_same(run_metal(name, awkward_blocks(name), diagonal), reference(name, metric))


@each_format
def test_metal_rounds_plainly_too(name):
    assert_same(run_metal(name, awkward_blocks(name), None, refine=False), reference(name, "plain", False))


@each_format
@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (3, 20), (2, 100)])
def test_rows_that_the_blocks_do_not_divide(name, rows, cols):
    weight = np.random.default_rng(cols).standard_t(3, (rows, cols)).astype(np.float32) / 50
    bias = encoder.exponent_bias(weight)
    blocks, decoded, _ = encode(name, weight, bias)
    native = (blocks.seeds, blocks.coefficients, blocks.codes, decoded)
    assert_same(run_metal(name, weight, None, bias=bias), native)
    assert_same(search.search_numpy(FORMATS[name], weight, None, bias, True), native)


@each_format
@pytest.mark.parametrize("bias", [-96, 96])
def test_exponents_at_their_limits(name, bias):
    weight = np.ldexp(np.random.default_rng(23).standard_normal((3, 24)).astype(np.float32), bias + 2)
    blocks, decoded, _ = encode(name, weight, bias)
    assert_same(run_metal(name, weight, None, bias=bias), (blocks.seeds, blocks.coefficients, blocks.codes, decoded))


@each_format
def test_weights_far_above_the_exponents(name):
    """Every seed's bound is below the error: all are evaluated."""
    weight = np.random.default_rng(24).standard_normal((1, FORMATS[name].columns)).astype(np.float32) * 1e4
    blocks, decoded, _ = encode(name, weight, BIAS, refine=False, diagonal=np.ones(weight.shape[1], np.float32))
    assert (blocks.codes == 15).all()
    native = (blocks.seeds, blocks.coefficients, blocks.codes, decoded)
    diagonal = METRICS["plain"](0) if FORMATS[name].states == 3 else np.ones(weight.shape[1], np.float32)
    assert_same(run_metal(name, weight, diagonal, refine=False), native)


@each_format
def test_metal_against_brute_force(name):
    weight = np.random.default_rng(25).standard_normal((1, FORMATS[name].columns)).astype(np.float32)
    metric = np.geomspace(0.2, 3, weight.shape[1]).astype(np.float32)
    decoded = run_metal(name, weight, metric)[3]
    want = brute_force(name, weight[0].astype(np.float64), metric.astype(np.float64), BIAS, refine=True)
    np.testing.assert_allclose(((weight - decoded.astype(np.float64)) ** 2 * metric).sum(), want, rtol=1e-5)


@pytest.mark.parametrize(("name", "count", "sanitizer"), [("4", 5, "address"), ("3", 33, "thread")])
def test_sanitizers_find_nothing(name, count, sanitizer):
    """33 blocks: a second threadgroup of both kernels, with one block."""
    weight = np.resize(awkward_blocks(name), (count, FORMATS[name].columns))
    diagonal = METRICS["mild"](weight.shape[1])
    assert_same(
        run_metal(name, weight, diagonal, sanitizer=sanitizer),
        search.search_numpy(FORMATS[name], weight, diagonal, BIAS, True),
    )


# ---- The choice -----------------------------------------------------------------------------------------------------


def gpu_of_the_emulation(monkeypatch):
    """The package believes that the default device is a GPU."""
    monkeypatch.setattr(kernels, "has_metal", lambda: True)
    monkeypatch.setattr(kernels, "device", lambda: "gpu")
    encoder._metal_reason.cache_clear()
    metal_search._plain_table.cache_clear()


@emulation
def test_feedback_is_the_same_on_metal(monkeypatch):
    """Column by column of blocks, all rows at once: every later column depends on what was found before."""
    rng = np.random.default_rng(26)
    weight, x = rng.standard_normal((5, 28)).astype(np.float32), rng.standard_normal((100, 28))
    want = encoder.encode(FORMATS["4"], weight, x.T @ x, backend="native")
    gpu_of_the_emulation(monkeypatch)
    with metal_on_cpu.emulated():
        assert encoder.search_backend(FORMATS["4"]) == "metal"
        got = encoder.encode(FORMATS["4"], weight, x.T @ x)
    encoder._metal_reason.cache_clear()
    for field in ("seeds", "coefficients", "codes"):
        np.testing.assert_array_equal(getattr(got.blocks, field), getattr(want.blocks, field))
    np.testing.assert_array_equal(got.decoded, want.decoded)


@emulation
@pytest.mark.parametrize("broken", ["does not compile", "finds other blocks"])
def test_a_metal_kernel_that_fails_is_said_and_not_used(monkeypatch, caplog, broken):
    gpu_of_the_emulation(monkeypatch)

    def search_metal(*arguments):
        if broken == "does not compile":
            raise RuntimeError("[metal::Device] Unable to build metal library from source\nmany lines")
        seeds, *others = search.search_numpy(*arguments)
        return (seeds + 1, *others)

    monkeypatch.setattr(encoder, "search_metal", search_metal)
    backend = encoder.search_backend(FORMATS["4"])
    encoder._metal_reason.cache_clear()
    assert backend.startswith("native ")
    reason = "Unable to build metal library" if broken == "does not compile" else "finds other blocks than NumPy"
    [line] = caplog.messages
    assert line.startswith("SeedLM encoding: not on Metal: ")
    assert reason in line
    assert "many" not in line


@emulation
def test_numpy_is_used_without_native_kernels_and_said(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "native", lambda: (None, "not built"))
    weight = np.random.default_rng(27).standard_normal((2, 16)).astype(np.float32)
    assert encoder.search_backend(FORMATS["4"]) == "numpy"
    assert "weights a second: the native kernels are not built" in caplog.messages[0]
    assert encoder.encode(FORMATS["4"], weight).error < 0.2


def test_weights_that_are_not_finite():
    weight = np.ones((2, 8), np.float32)
    weight[1, 3] = np.nan
    for function in (search.search_numpy, metal_search.search_metal):
        with pytest.raises(MlxeffError, match="wanted finite weights"):
            function(FORMATS["4"], weight, None, BIAS, True)


def test_a_matrix_of_zeros():
    empty = metal_on_cpu.run(metal_search.search_metal, FORMATS["4"], np.zeros((2, 8), np.float32), None, BIAS, True)
    assert (empty[0] == 1).all()
    assert not empty[1].any()
    assert not empty[3].any()


@each_format
def test_tables_of_metal_are_those_of_numpy(name):
    """Up to the rounding of float32, which the condition number multiplies."""
    fmt = FORMATS[name]
    metric = METRICS["mild"](fmt.columns)
    metric /= metric.mean()
    table = np.array(metal_on_cpu.run(metal_search.inverse_table, fmt, metric))
    assert table.dtype == np.float32
    assert (table[:, -1] == 0).all()
    _, want = search._tables(fmt, metric.tobytes())
    for entry, (i, j) in enumerate(zip(*np.triu_indices(fmt.states), strict=True)):
        scale = np.sqrt(want[i, i] * want[j, j])
        both = (table[0, :-1] != 0) & (want[0, 0] != 0)
        assert both.mean() > 0.95
        got = table[entry, :-1] / (1 if i == j else 2)
        assert (np.abs(got - want[i, j])[both] <= 4200 * 2.0**-20 * scale[both]).all()
