"""The Metal kernels of feed-forward networks that leave out inputs against float64: on the GPU, or emulated where there
is none, which costs some 12 seconds, most of them to compile some thirty instances.
"""

import math

import mlx.core as mx
import numpy as np
import pytest

import metal_on_cpu
from helpers import assert_close, to_numpy
from mlxeff.dynamoe import sparse, sparse_metal
from mlxeff.dynamoe.columns import Columns, stored_by_columns
from mlxeff.dynamoe.fractions import Fractions
from mlxeff.dynamoe.sparse import SparseFeedForward
from mlxeff.modules import Linear, QuantizedLinear
from mlxeff.running import RunOptions
from test_dynamoe_metal import STEP, close, emulated_only, normal, stored

DENSE = (None, None)
# (Bits, group), type of x, type of dense weights or scales, inputs, outputs, tokens. With 608 inputs in groups of 32
# some simdgroups have several groups, with the other numbers some have none.
CASES = [
    ((4, 32), mx.float32, mx.float32, 608, 64, 1),
    ((4, 64), mx.float16, mx.float16, 192, 320, 3),
    ((4, 128), mx.bfloat16, mx.bfloat16, 128, 576, 8),
    ((8, 32), mx.float16, mx.float16, 96, 192, 1),
    ((8, 64), mx.bfloat16, mx.bfloat16, 64, 64, 8),
    ((8, 128), mx.float32, mx.float16, 384, 320, 3),
    (DENSE, mx.float32, mx.float32, 32, 64, 8),
    (DENSE, mx.float16, mx.float16, 608, 192, 1),
    (DENSE, mx.bfloat16, mx.bfloat16, 96, 320, 3),
]


def matrix(inputs, outputs, packing=DENSE, dtype=mx.float32, bias=False, seed=0):
    """A random matrix by its columns; dtype: of its weights, or of its scales."""
    bits, group = packing
    layer = Linear(inputs, outputs, bias)
    layer.weight = normal(outputs, inputs, seed=seed)
    if bias:
        layer.bias = normal(outputs, seed=seed + 1)
    if bits:
        layer = QuantizedLinear.from_linear(layer, group, bits)
    layer.update({name: array.astype(dtype) for name, array in layer.items() if array.dtype == mx.float32})
    return stored_by_columns(layer)


def weights_of(inputs, seed=7):
    return mx.abs(normal(inputs, seed=seed)) + 0.1


def decoded(columns):
    """The weights in float64, and the size of the terms that a kernel adds for each: |scale| code + |bias|. (K, N)."""
    if not columns.bits:
        numbers = to_numpy(columns.weight)
        return numbers, np.abs(numbers)
    scales, biases = (
        to_numpy(columns._joined_strips(each, 1)).repeat(columns.group_size, axis=0)
        for each in (columns.scales, columns.biases)
    )
    terms = to_numpy(columns._codes()) * scales
    return terms + biases, np.abs(terms) + np.abs(biases)


def counting(x, weights, threshold):
    """Whether each input counts, by float32 numbers: (T, K)."""
    with np.errstate(invalid="ignore"):
        return ~(np.abs(to_numpy(x).astype(np.float32)) * np.array(weights) < np.float32(threshold))


def product(x, kept, columns):
    """The product of the kept inputs in float64, and a bound of a kernel's error: a simdgroup adds up its group by at
    most one rounding an input, 2 more put its scale and bias to the sum; then come those of the other simdgroups."""
    numbers, sizes = decoded(columns)
    unit = columns.group_size or 32
    roundings = unit + 2 * math.ceil(columns.inputs / unit / 16) + 24
    x = np.where(kept, to_numpy(x), 0)
    return x @ numbers, roundings * STEP * (np.abs(x) @ sizes)


def check_neurons(x, columns, weights, threshold, **options):
    got, count = metal_on_cpu.run(sparse_metal.neurons, x, columns, weights, threshold, **options)
    assert got.dtype == mx.float32
    kept = counting(x, weights, threshold)
    assert count.tolist() == kept.sum(axis=1).tolist()
    halves = [each.reshape(len(kept), -1, 2, 32) for each in product(x, kept, columns)]
    (g, u), (g_bound, u_bound) = ([each[:, :, i].reshape(len(kept), -1) for i in (0, 1)] for each in halves)
    silu = g / (1 + np.exp(-g))
    # |silu'| < 1.1; exp, of at most 4 units, and three more roundings.
    bound = 1.1 * g_bound * (np.abs(u) + u_bound) + np.abs(silu) * u_bound + 12 * STEP * np.abs(silu * u)
    close(got, silu * u, bound + 2.0**-40, f"neurons at {threshold}")
    return got, count


def check_output(hidden, columns, weights, threshold, dtype=mx.float32, **options):
    got, count = metal_on_cpu.run(sparse_metal.output, hidden, columns, weights, threshold, dtype, **options)
    assert got.dtype == dtype
    kept = counting(hidden, weights, threshold)
    assert count.tolist() == kept.sum(axis=1).tolist()
    want, bound = product(hidden, kept, columns)
    added = to_numpy(columns.bias) if "bias" in columns else np.zeros(columns.outputs)
    close(got, want + added, stored(want + added, bound + 2 * STEP * np.abs(added), dtype), f"output at {threshold}")
    return got, count


# ---- Products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_neurons(case):
    packing, x_type, dtype, inputs, outputs, tokens = case
    columns, weights = matrix(inputs, outputs, packing, dtype), weights_of(inputs)
    x = (normal(tokens, inputs) / inputs**0.5).astype(x_type)
    counts = [check_neurons(x, columns, weights, threshold / inputs**0.5)[1].tolist() for threshold in (0, 0.5, 1e9)]
    assert counts[0] == [inputs] * tokens
    assert all(0 < count < inputs for count in counts[1])
    assert counts[2] == [0] * tokens


@pytest.mark.parametrize("case", CASES)
def test_output(case):
    packing, x_type, dtype, inputs, outputs, tokens = case
    bias = packing[0] == 4 or dtype == mx.float16
    columns, weights = matrix(inputs, outputs, packing, dtype, bias), weights_of(inputs)
    hidden = normal(tokens, inputs) / inputs**0.5
    for threshold in (0, 0.5, 1e9):
        got, _ = check_output(hidden, columns, weights, threshold / inputs**0.5, x_type)
    rest = columns.bias.astype(x_type) if bias else mx.zeros(outputs, x_type)
    assert mx.array_equal(got, mx.broadcast_to(rest, got.shape))


def test_an_input_at_the_threshold_counts():
    columns, weights = matrix(32, 64), mx.array([0.5] * 16 + [0.25] * 16)
    _, count = check_output(mx.ones((1, 32)), columns, weights, 0.5)
    assert count.item() == 16
    _, count = check_output(mx.zeros((1, 32)), columns, weights, 0.0)
    assert count.item() == 32


@pytest.mark.parametrize("packing", [DENSE, (4, 32), (8, 32)])
def test_a_token_has_the_same_bits_alone_and_among_others(packing):
    """Also beside a token that is not a number, which counts and spoils itself alone."""
    gate_up, down, weights = matrix(96, 192, packing), matrix(96, 192, packing), weights_of(96)
    x = np.array(normal(8, 96))
    x[5, 41] = np.nan
    x = mx.array(x)
    for run in (sparse_metal.neurons, sparse_metal.output):
        arguments = (gate_up, weights, 0.4) if run is sparse_metal.neurons else (down, weights, 0.4, mx.float32)
        got, counts = metal_on_cpu.run(run, x, *arguments)
        assert counts.tolist() == counting(x, weights, 0.4).sum(axis=1).tolist()
        assert np.isnan(to_numpy(got)).all(axis=1).tolist() == [token == 5 for token in range(8)]
        assert np.isfinite(to_numpy(got)).any(axis=1).tolist() == [token != 5 for token in range(8)]
        for token in (0, 3, 5, 7):
            alone, count = metal_on_cpu.run(run, x[token : token + 1], *arguments)
            assert mx.array_equal(alone[0], got[token], equal_nan=True)
            assert count.item() == counts[token].item()


# ---- What is read ---------------------------------------------------------------------------------------------------


def test_columns_that_do_not_count_are_not_read():
    """They hold NaN here, which would spoil every sum."""
    x, weights, threshold = normal(1, 96), weights_of(96), 0.5
    kept = mx.array(counting(x, weights, threshold)[0])
    for run, outputs in ((check_neurons, 64), (check_output, 192)):
        columns = matrix(96, outputs)
        want, _ = run(x, columns, weights, threshold)
        columns.weight = mx.where(kept[:, None], columns.weight, math.nan)
        launch = sparse_metal.neurons if run is check_neurons else sparse_metal.output
        arguments = () if run is check_neurons else (mx.float32,)
        got, _ = metal_on_cpu.run(launch, x, columns, weights, threshold, *arguments)
        assert mx.array_equal(got, want)


def half_of(size, inputs):
    """Weights of inputs of which the second half never counts."""
    return mx.where(mx.arange(inputs) < size, weights_of(inputs), 0.0)


@emulated_only
@pytest.mark.parametrize("packing", [DENSE, (4, 32), (8, 32)])
def test_no_memory_of_columns_that_do_not_count_is_read(ending, packing):
    """Of one piece the second half of the columns is missing, and their scales and biases too."""
    columns, weights = matrix(128, 64, packing, bias=True), half_of(64, 128)
    for name in ("weight", "scales", "biases") if packing[0] else ("weight",):
        ending(columns[name], columns[name].nbytes // 2)
    check_output(normal(3, 128), columns, weights, 1e-9, sanitizer="address")


@emulated_only
@pytest.mark.parametrize("packing", [DENSE, (4, 64), (8, 32)])
def test_memory_that_ends_too_early_is_seen(ending, packing):
    columns = matrix(128, 64, packing, bias=True)
    ending(columns.weight, columns.weight.nbytes // 2)
    with pytest.raises(metal_on_cpu.MetalError, match="heap-buffer-overflow"):
        check_output(normal(1, 128), columns, half_of(65, 128), 1e-9, sanitizer="address")


@emulated_only
@pytest.mark.parametrize(("packing", "outputs"), [(DENSE, 192), ((4, 32), 320)])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_sanitizers_find_nothing(packing, outputs, sanitizer):
    """In the kernel of gate and up, which shares all but its last lines with that of down. The threads' order does not
    change the bits."""
    x, columns, weights = normal(2, 96), matrix(96, outputs, packing), weights_of(96)
    got, _ = check_neurons(x, columns, weights, 0.5, sanitizer=sanitizer)
    other, _ = check_neurons(x, columns, weights, 0.5, descending=True)
    assert mx.array_equal(got, other)


# ---- The network ----------------------------------------------------------------------------------------------------


def network(packing, dtype=mx.float32, size=128, neurons=192):
    """A module in which thresholds from 2.0 (at 0.1 of the weights) down to 0.001 (at 0.9) leave out inputs."""
    gate_up = matrix(size, 2 * neurons, packing, dtype)
    down = matrix(neurons, size, packing, dtype, bias=True, seed=1)
    module = SparseFeedForward(gate_up, down, Fractions("threshold", ((0.1, 2.0), (0.9, 0.001))))
    module.input_weights, module.neuron_weights = weights_of(size), weights_of(neurons, 8) / neurons
    module.eval()
    return module


@pytest.mark.parametrize("packing", [DENSE, (4, 64)])
def test_a_network_computes_a_step_by_the_kernels(monkeypatch, packing):
    """As on a GPU: the same as its own operations, and the same counts."""
    module, other = network(packing), network(packing)
    for fraction in (1.0, 0.5, 0.0):
        x, options, shares = normal(1, 5, 128), RunOptions(fraction=fraction), ([], [])
        for each, recorded in zip((module, other), shares, strict=True):
            each.record(recorded)
        with mx.stream(mx.cpu):
            want = other(x, options)
            mx.eval(want)
        with monkeypatch.context() as patched:
            patched.setattr(sparse, "on_gpu", lambda: True)
            got = metal_on_cpu.run(module, x, options)
        assert_close(got, want, f"at {fraction}")
        assert module.counts == other.counts
        assert mx.array_equal(shares[0][0], shares[1][0])
    kept = module.counts[1] / module.counts[0] / 128
    assert 0.4 < kept < 0.9


def test_which_calls_take_the_kernels(monkeypatch):
    monkeypatch.setattr(sparse, "on_gpu", lambda: True)
    module = network((4, 64))

    def launches(tokens=1, dtype=mx.float32, fraction=0.5):
        with metal_on_cpu.recorded() as recorded:
            y = module(normal(1, tokens, 128, dtype=dtype), RunOptions(fraction=fraction))
        assert y.shape == (1, tokens, 128)
        assert y.dtype == dtype or not recorded
        return len(recorded)

    assert [launches(tokens) for tokens in (1, 8, 9)] == [2, 2, 0]
    assert [launches(dtype=dtype) for dtype in (mx.float16, mx.bfloat16)] == [2, 2]
    assert launches(fraction=1.0) == 2
    module.train()
    assert launches() == 0
    module.eval()
    scales = module.down.scales
    module.down.scales = scales.astype(mx.int32)
    assert launches() == 0  # arrays that are replaced are looked at again
    module.down.scales = scales
    assert launches() == 2
    monkeypatch.setattr(sparse, "on_gpu", lambda: False)
    assert launches() == 0


def test_another_threshold_compiles_nothing():
    module, sources = network((4, 64)), set()
    parts = sparse_metal.Parts(module.gate_up, module.down, module.input_weights, module.neuron_weights)
    for threshold in (0.0, 0.25, 1e9):
        with metal_on_cpu.recorded() as recorded:
            sparse_metal.decode(normal(1, 128), parts, threshold)
        sources |= {launch.source for launch in recorded}
    assert len(sources) == 2


def test_what_the_kernels_do_not_compute_is_refused():
    def parts(gate_up=None, down=None, input_weights=None, neuron_weights=None):
        given = (gate_up, down, input_weights, neuron_weights)
        usual = (Columns(384, 128, 4, 32), Columns(128, 192, None, None), mx.ones(128), mx.ones(192))
        return sparse_metal.Parts(*(each if each is not None else other for each, other in zip(given, usual)))

    x = mx.zeros((2, 128))
    assert sparse_metal.supported(parts(), 8)
    assert not sparse_metal.supported(parts(), 9)
    assert not sparse_metal.supported(parts(), 0)
    assert "Linear" in parts(gate_up=Linear(128, 384)).refusal
    three, narrow = Columns(384, 128, 4, 32), Columns(384, 128, 4, 32)
    three.bits, narrow.weight = 3, narrow.weight[1:]
    for change in (
        {"gate_up": three},
        {"gate_up": narrow},
        {"gate_up": Columns(384, 128, 4, 32, bias=True)},
        {"gate_up": Columns(320, 128, 4, 32)},
        {"gate_up": Columns(384, 64, 4, 32)},
        {"down": Columns(96, 192, None, None)},
        {"input_weights": mx.ones(127)},
        {"neuron_weights": mx.ones(192, mx.int32)},
    ):
        wrong = parts(**change)
        assert not sparse_metal.supported(wrong), change
        with metal_on_cpu.recorded(), pytest.raises(ValueError, match="inputs that are left out"):
            sparse_metal.decode(x, wrong, 0.5)
    for tokens in (mx.zeros((9, 128)), mx.zeros(128), x.astype(mx.int32), mx.zeros((2, 96))):
        with pytest.raises(ValueError, match="inputs that are left out"):
            sparse_metal.neurons(tokens, parts().gate_up, mx.ones(128), 0.5)
