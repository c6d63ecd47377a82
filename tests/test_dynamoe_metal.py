"""The Metal kernels of nested experts against float64: on the GPU, or emulated where there is none, which costs some
15 seconds, most of them to compile some forty instances.
"""

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import metal_on_cpu
from helpers import dtype_name, to_numpy
from metal_on_cpu import MetalError
from mlxeff import kernels
from mlxeff.dynamoe import feed_forward, metal
from mlxeff.ops import Quantized
from mlxeff.running import RunOptions

STEP = 2.0**-24  # half the distance of neighbouring floats, of their size
UNITS = {"float32": STEP, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # the same of each type
EXPERTS = [0, 2, 1, 2, 0, 0, 1, 2]  # of the tokens
emulated_only = pytest.mark.skipif(kernels.has_metal(), reason="needs the emulation, here kernels run on the GPU")


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.random.normal(shape, key=mx.random.key(sum(shape) + 1000 * seed)).astype(dtype)


def matrix(rows, columns, packing=None, dtype=mx.float32, seed=0):
    """A dense matrix, or with packing = (bits, group) a quantised one."""
    weights = normal(rows, columns, dtype=dtype, seed=seed)
    if packing is None:
        return weights
    bits, group = packing
    return Quantized(*mx.quantize(weights, group_size=group, bits=bits), group, bits)


def shape_of(weight):
    return metal._shape(weight)


def decoded(weight):
    """The weights in float64, and the size of the terms that a kernel adds for each: |scale| code + |bias|."""
    if not isinstance(weight, Quantized):
        numbers = to_numpy(weight).astype(np.float64)
        return numbers, np.abs(numbers)
    scales, biases = (to_numpy(each).repeat(weight.group_size, axis=1) for each in (weight.scales, weight.biases))
    codes = np.array(weight.weight)[..., None] >> np.arange(0, 32, weight.bits).astype(np.uint32)
    terms = (codes % (1 << weight.bits)).reshape(scales.shape) * scales
    return terms + biases, np.abs(terms) + np.abs(biases)


def product(x, weight, bias=None):
    """x Wᵀ + bias in float64 and a bound of a kernel's error. A lane adds the products of each 256th chunk of 8
    columns, with at most 12 roundings a chunk; then come 5 additions of simd_sum and those of `product`'s own parts."""
    numbers, sizes = decoded(weight)
    roundings = 12 * math.ceil(x.shape[-1] / 256) + 8
    added = 0.0 if bias is None else to_numpy(bias).astype(np.float64)
    return x @ numbers.T + added, roundings * STEP * (np.abs(x) @ sizes.T + np.abs(added))


def stored(numbers, bound, dtype):
    """`bound` with the error of rounding to a type."""
    return bound + UNITS[dtype_name(mx.zeros(1, dtype))] * (np.abs(numbers) + bound) + 2.0**-25


def close(got, want, bound, what=""):
    error = np.abs(to_numpy(got) - want)
    assert (error <= bound).all(), f"{what}: error {error.max()}, at most {(error / bound).max()} of its bound"


def widths_of(widths, chosen):
    return [widths[e] for e in chosen]


def experts(widths, chosen):
    return mx.array(widths, mx.uint32), mx.array(chosen, mx.uint32)


def check_gate_up(x, gate, up, widths, chosen, gate_bias=None, up_bias=None, order=None, **options):
    got = metal_on_cpu.run(metal.gate_up, x, gate, up, *experts(widths, chosen), gate_bias, up_bias, order, **options)
    assert got.dtype == x.dtype
    assert got.shape == (x.shape[0], shape_of(gate)[0])
    numbers = to_numpy(x).astype(np.float64)
    (g, g_bound), (u, u_bound) = product(numbers, gate, gate_bias), product(numbers, up, up_bias)
    silu = g / (1 + np.exp(-g))
    # |silu'| < 1.1; exp, of at most 4 units, and three more roundings.
    bound = 1.1 * g_bound * (np.abs(u) + u_bound) + np.abs(silu) * u_bound + 12 * STEP * np.abs(silu * u)
    bound = stored(silu * u, bound, x.dtype)
    for token, width in enumerate(widths_of(widths, chosen)):
        own = got[token] if order is None or width < len(order) else got[token][order]
        close(own[:width], (silu * u)[token, :width], bound[token, :width], f"token {token} of {width}")
    return got


def check_down(h, downs, widths, chosen, bias=None, lefts=(), rights=(), **options):
    got = metal_on_cpu.run(metal.down, h, downs, *experts(widths, chosen), bias, lefts, rights, **options)
    assert got.dtype == h.dtype
    assert got.shape == (h.shape[0], shape_of(downs[0])[0])
    numbers = to_numpy(h).astype(np.float64)
    for token, expert in enumerate(chosen):
        own = numbers[token, : widths[expert]]
        weight = downs[expert] if len(downs) > 1 else first_columns(downs[0], widths[expert])
        want, bound = product(own, weight, bias)
        if expert < len(lefts):
            middle, middle_bound = product(own, rights[expert])
            added, added_bound = product(middle, lefts[expert])
            want, bound = want + added, bound + added_bound + middle_bound @ decoded(lefts[expert])[1].T
            bound += 12 * STEP * np.abs(added)
        close(got[token], want, stored(want, bound, h.dtype), f"token {token} of expert {expert}")
    return got


def first_columns(weight, columns):
    """The first columns of a matrix, dense and in float64."""
    return decoded(weight)[0][:, :columns]


def hidden(tokens, neurons, widths, chosen, dtype=mx.float32):
    """Hidden neurons, and NaN in place of those that are beyond the tokens' experts."""
    h = np.array(normal(tokens, neurons))
    for token, width in enumerate(widths_of(widths, chosen)):
        h[token, width:] = np.nan
    return mx.array(h).astype(dtype)


def nested(rows, widths, packing=None, dtype=mx.float32):
    """A matrix of its own for each expert."""
    return [matrix(rows, width, packing, dtype, seed) for seed, width in enumerate(widths)]


# ---- The router -----------------------------------------------------------------------------------------------------


def costs_of(scores, prices, dial):
    return np.append(np.exp(scores), 0.0) + dial * prices


def chosen_by(rule, scores, prices, dial):
    """The expert of one token, and how far the numbers that decide are from another choice."""
    if rule == "lagrangian":
        costs = costs_of(scores, prices, dial)
        best = max(np.flatnonzero(costs == costs.min()))
        return best, np.delete(costs, best).min() - costs[best]
    powers = np.exp(scores - scores.max())
    tails = np.append(np.cumsum((powers / powers.sum())[:0:-1])[::-1], 0.0)
    return int(np.argmax(tails <= dial)), np.abs(tails - dial)[:-1].min()


@pytest.mark.parametrize(
    ("rule", "count", "dtype", "columns"),
    [
        ("lagrangian", 3, mx.float32, 203),
        ("lagrangian", 2, mx.float16, 2100),
        ("tail", 3, mx.float32, 2100),
        ("tail", 4, mx.float32, 64),
    ],
)
def test_the_router_chooses_by_its_scores(rule, count, dtype, columns):
    rows = count - (rule == "lagrangian")
    x = normal(8, columns, dtype=dtype)
    weight, bias = normal(rows, columns) / columns**0.5, normal(rows, seed=1) / 10
    prices, seen = mx.array([1.0, 1.25, 3.0])[:count], set()
    scores, bound = product(to_numpy(x).astype(np.float64), weight, bias)
    for dial in (0.0, 0.25, 0.5, 0.75, 1.0, 4.0):
        got = metal_on_cpu.run(metal.route, x, weight, bias, prices, rule, dial)
        assert got.dtype == mx.uint32
        for token in range(8):
            want, distance = chosen_by(rule, scores[token], to_numpy(prices), dial)
            # The error of a cost follows that of its exponent, and a probability's is smaller.
            if distance > (2 * bound[token].max() + 20 * STEP) * (np.exp(scores[token]).max() + 4 * dial + 1):
                assert int(got[token]) == want, f"dial {dial}, token {token}: scores {scores[token]}"
                seen.add(want)
    assert seen == set(range(count))


def routed(rule, scores, prices, dial):
    """The choice for one token of a router whose scores are its biases."""
    x, weight = mx.zeros((1, 8)), mx.zeros((len(scores), 8))
    prices = None if prices is None else mx.array(prices, mx.float32)
    bias = mx.array(scores, mx.float32)
    return int(metal_on_cpu.run(metal.route, x, weight, bias, prices, rule, dial)[0])


def test_ties_and_scores_that_are_not_finite():
    nan, inf = math.nan, math.inf
    cases = [
        ([0, 0], [1, 1, 2], 1.0, 2),  # costs 2, 2, 2
        ([0, 0], [1, 1, 3], 1.0, 1),  # 2, 2, 3
        ([0, 1], [1, 1, 3], 1.0, 0),
        ([inf, inf], [1, 2, 3], 1.0, 2),
        ([-inf, -inf], [1, 2, 3], 1.0, 0),
        ([-inf, nan], [1, 2, 3], 1.0, 2),
        ([nan, -inf], [1, 2, 3], 1.0, 2),
        ([0, 0], [1, 2, 3], nan, 2),
        ([0, 0], [1, 2, 3], mx.array(10.0), 0),
        ([0, 0], [1, 2, 3], mx.array([0.0], mx.float16), 2),
    ]
    for scores, prices, dial, want in cases:
        assert routed("lagrangian", scores, prices, dial) == want, (scores, prices, dial)
    cases = [
        ([0, 0, -inf], 0.5, 0),
        ([0, 0, -inf], 0.0, 1),
        ([0, 0, 0], 0.0, 2),
        ([0, 0, 0], 2.0, 0),
        ([200, 0, 0], 0.0, 0),
        ([40, 0, 0], 1e-15, 0),  # after the first lie 8e-18, though its own probability is 1 in float32
        ([40, 0, 0], 6e-18, 1),
        ([40, 0, 0], 1e-19, 2),
        ([nan, 0, 0], 0.9, 2),
        ([9, 9, nan], 1.0, 2),
        ([inf, 0, 0], 0.5, 2),
        ([0, 0, 0], nan, 2),
    ]
    for scores, dial, want in cases:
        assert routed("tail", scores, None, dial) == want, (scores, dial)


# ---- Gate and up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "dtype", "columns", "tokens"),
    [
        (None, mx.float16, 70, 1),
        (None, mx.float16, 8, 1),
        (None, mx.float16, 577, 1),
        ((4, 32), mx.float16, 96, 1),
        ((8, 64), mx.bfloat16, 320, 3),
        ((4, 128), mx.float32, 384, 8),
    ],
)
def test_gate_and_up(packing, dtype, columns, tokens):
    for widths in ([16, 32, 48], [5, 17, 45], [1, 2, 3]):
        gate, up = (matrix(widths[-1], columns, packing, dtype, seed) for seed in (0, 1))
        x = normal(tokens, columns, dtype=dtype)
        for chosen in ([0], [1], [2]) if tokens == 1 else [EXPERTS[:tokens]]:
            check_gate_up(x, gate, up, widths, chosen)


def test_gate_and_up_with_biases():
    x, gate, up = normal(2, 64), matrix(20, 64), matrix(20, 64, seed=1)
    got = check_gate_up(x, gate, up, [8, 20], [1, 0], 3 * normal(20), normal(20, dtype=mx.bfloat16, seed=1))
    assert emulated_nan(got[1, 8:])


def test_gate_and_up_in_the_order_of_the_widest_matrix():
    """Only the tokens of the widest expert are reordered."""
    x, gate, up = normal(3, 64), matrix(45, 64), matrix(45, 64, seed=1)
    order = mx.random.permutation(45, key=mx.random.key(4)).astype(mx.int32)
    check_gate_up(x, gate, up, [8, 20, 45], [2, 1, 2], order=order)
    check_gate_up(x[:1], gate, up, [8, 20, 45], [2], order=order)


def emulated_nan(numbers):
    """Whether memory was left as it was, which is known where kernels are emulated alone."""
    return kernels.has_metal() or np.isnan(to_numpy(numbers)).all()


# ---- Down -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "dtype", "rows", "tokens"),
    [(None, mx.float32, 35, 1), ((4, 32), mx.float32, 35, 1), ((8, 64), mx.float16, 16, 3)],
)
def test_down_with_a_matrix_for_each_expert(packing, dtype, rows, tokens):
    for widths in [[128, 320, 576]] + ([[5, 17, 45], [1, 2, 300]] if packing is None else []):
        downs = nested(rows, widths, packing, dtype)
        for chosen in ([0], [1], [2]) if tokens == 1 else [EXPERTS[:tokens]]:
            check_down(hidden(tokens, widths[-1], widths, chosen, dtype), downs, widths, chosen)


@pytest.mark.parametrize(("packing", "tokens"), [(None, 8), ((4, 64), 4)])
def test_down_with_one_matrix_for_all_experts(packing, tokens):
    for widths in ([64, 128, 320], [7, 100, 320], [256, 257, 320]):
        weight = matrix(18, widths[-1], packing)
        check_down(hidden(tokens, widths[-1], widths, EXPERTS[:tokens]), [weight], widths, EXPERTS[:tokens])


def test_down_with_matrices_of_several_packings_and_a_bias():
    widths = [32, 64, 96, 128]
    kinds = [(None, mx.bfloat16), ((8, 32), mx.float32), ((4, 32), mx.float16), (None, mx.float32)]
    downs = [matrix(9, width, *kind) for width, kind in zip(widths, kinds, strict=True)]
    chosen = [3, 0, 2, 1]
    check_down(hidden(4, 128, widths, chosen), downs, widths, chosen, normal(9))


def test_low_rank_corrections():
    widths, chosen = [32, 48, 80], [1, 0, 2]
    lefts = [matrix(21, 5, seed=seed) for seed in (5, 6)]
    rights = [matrix(5, width, seed=9) for width in widths[:2]]
    for downs in (nested(21, widths), [matrix(21, 80)]):
        check_down(hidden(3, 80, widths, chosen), downs, widths, chosen, None, lefts, rights)


# ---- Tokens alone and among others ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "counts"), [(None, range(2, 9)), ((4, 32), [3])])
def test_a_token_has_the_same_bits_alone_and_among_others(packing, counts):
    columns, widths = (96, [32, 64, 96]) if packing else (77, [9, 42, 83])
    gate, up = (matrix(widths[-1], columns, packing, seed=seed) for seed in (0, 1))
    x, downs, one = normal(8, columns), nested(columns, widths, packing), [matrix(columns, widths[-1], packing)]

    def step(first, last, shared):
        chosen = EXPERTS[first:last]
        h = check_gate_up(x[first:last], gate, up, widths, chosen)
        outputs = [check_down(h, each, widths, chosen) for each in ([downs, one] if shared else [downs])]
        return [to_numpy(each) for each in (h, *outputs)]

    alone = [step(token, token + 1, packing is None) for token in range(8)]
    for tokens in counts:
        for kind, among in enumerate(step(0, tokens, packing is None and tokens == 3)):
            for token in range(tokens):
                end = widths[EXPERTS[token]] if kind == 0 else None
                assert np.array_equal(among[token, :end], alone[token][kind][0, :end])


def test_a_narrow_token_does_not_see_what_a_wide_one_reads():
    widths, chosen = [13, 40], [0, 1]
    weight = np.array(matrix(6, 40))
    weight[:, 13:] = np.nan
    h = hidden(2, 40, widths, chosen)
    got = to_numpy(metal_on_cpu.run(metal.down, h, [mx.array(weight)], *experts(widths, chosen)))
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()


def test_numbers_out_of_range_are_those_of_the_widest_expert():
    x, gate, up = normal(1, 64), matrix(20, 64), matrix(20, 64, seed=1)
    weight = matrix(6, 20)
    for widths, chosen in (([8, 20], 7), ([8, 2000], 1)):
        h = metal_on_cpu.run(metal.gate_up, x, gate, up, *experts(widths, [chosen]))
        assert mx.array_equal(h, check_gate_up(x, gate, up, [8, 20], [1]))
        y = metal_on_cpu.run(metal.down, h, [weight], *experts(widths, [chosen]))
        assert mx.array_equal(y, check_down(h, [weight], [8, 20], [1]))


# ---- What is read ---------------------------------------------------------------------------------------------------


def spoiled(array, rows=None, columns=None):
    """An array with NaN, or ones where it holds codes, in the rows or columns from these on."""
    numbers = np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
    bad = 0xFFFFFFFF if array.dtype == mx.uint32 else np.nan
    numbers[slice(rows, None) if rows is not None else slice(None), columns:] = bad
    return mx.array(numbers).astype(array.dtype)


def arrays_of(weight):
    return [weight.weight, weight.scales, weight.biases] if isinstance(weight, Quantized) else [weight]


def with_arrays(weight, arrays):
    return Quantized(*arrays, weight.group_size, weight.bits) if isinstance(weight, Quantized) else arrays[0]


def cut(ending, weight, rows):
    """Ends the memory of a matrix after so many rows."""
    for array in arrays_of(weight):
        ending(array, array.nbytes // array.shape[0] * rows)


@emulated_only
@pytest.mark.parametrize("packing", [None, (4, 32)])
def test_nothing_beyond_the_width_is_read(ending, packing):
    columns, widths, chosen = (64, [32, 64, 96], [1, 0, 1]) if packing else (45, [9, 43, 83], [1, 0, 1])
    x, options = normal(3, columns), {"sanitizer": "address"}
    gate, up = (matrix(widths[-1], columns, packing, seed=seed) for seed in (0, 1))
    for weight in (gate, up):
        cut(ending, weight, widths[1])
    h = check_gate_up(x, gate, up, widths, chosen, **options)
    downs = nested(columns, widths, packing)
    cut(ending, downs[2], 0)
    check_down(h, downs, widths, chosen, **options)
    # All but what a kernel may read of a matrix that all experts share is not a number; its last row ends early.
    whole = matrix(columns, widths[-1], packing)
    part = [spoiled(array, columns=array.shape[1] * widths[1] // widths[-1]) for array in arrays_of(whole)]
    for array in part:
        ending(array, array.nbytes - array.nbytes // columns * (widths[-1] - widths[1]) // widths[-1])
    got = metal_on_cpu.run(metal.down, h, [with_arrays(whole, part)], *experts(widths, chosen), **options)
    assert np.array_equal(to_numpy(got), to_numpy(check_down(h, [whole], widths, chosen)))


@emulated_only
def test_memory_that_ends_too_early_is_seen(ending):
    gate, up = matrix(83, 45), matrix(83, 45, seed=1)
    cut(ending, up, 42)
    with pytest.raises(MetalError, match="heap-buffer-overflow"):
        check_gate_up(normal(3, 45), gate, up, [9, 43, 83], [1, 0, 1], sanitizer="address")


@emulated_only
def test_the_address_sanitizer_finds_nothing_in_the_router():
    x, weight, bias, prices = normal(3, 45), normal(2, 45), normal(2), normal(3)
    got = metal_on_cpu.run(metal.route, x, weight, bias, prices, "lagrangian", 1.0, sanitizer="address")
    assert mx.array_equal(got, metal_on_cpu.run(metal.route, x, weight, bias, prices, "lagrangian", 1.0))


# ---- The layer ------------------------------------------------------------------------------------------------------


def layer(rule, packing, shared=False, dtype=mx.float32, columns=64, widths=(32, 64, 96)):
    rows = len(widths) - (rule == "lagrangian")
    downs = [matrix(columns, widths[-1], packing, dtype)] if shared else nested(columns, widths, packing, dtype)
    return metal.Parts(
        router=normal(rows, columns) / columns**0.5,
        router_bias=normal(rows, seed=3),
        prices=mx.array([1.0, 2.0, 3.0]),
        rule=rule,
        widths=mx.array(widths, mx.uint32),
        gate=matrix(widths[-1], columns, packing, dtype),
        up=matrix(widths[-1], columns, packing, dtype, seed=1),
        downs=tuple(downs),
    )


def decode_ops(x, parts, dial):
    """`metal.decode` by MLX's operations: all experts are computed for all tokens."""

    def linear(x, weight):
        if not isinstance(weight, Quantized):
            return x @ weight.T
        scheme = {"group_size": weight.group_size, "bits": weight.bits}
        return mx.quantized_matmul(x, weight.weight, weight.scales, weight.biases, True, **scheme)

    scores = x @ parts.router.T + parts.router_bias
    if parts.rule == "lagrangian":
        costs = mx.concatenate([mx.exp(scores), mx.zeros((x.shape[0], 1))], axis=1) + dial * parts.prices
        chosen = costs.shape[1] - 1 - mx.argmin(costs[:, ::-1], axis=1)
    else:
        tails = mx.cumsum(mx.softmax(scores, axis=1)[:, :0:-1], axis=1)
        chosen = scores.shape[1] - 1 - mx.sum(tails <= dial, axis=1)
    h = nn.silu(linear(x, parts.gate)) * linear(x, parts.up)
    outputs = [linear(h[:, :width], down) for width, down in zip(parts.widths.tolist(), parts.downs, strict=True)]
    return mx.take_along_axis(mx.stack(outputs), chosen[None, :, None], axis=0)[0], chosen


@pytest.mark.parametrize(("rule", "packing"), [("lagrangian", None), ("tail", (4, 32))])
def test_a_step_gives_what_mlx_gives(rule, packing):
    parts, x = layer(rule, packing), normal(4, 64)
    assert metal.supported(parts, 4)
    seen = set()
    for dial in (0.2, 0.6, 2.0):
        with mx.stream(mx.cpu):
            want, chosen = decode_ops(x, parts, dial)
            mx.eval(want, chosen)
        got = metal_on_cpu.run(metal.decode, x, parts, dial)
        # Both have sums of 64 and 96 terms in float32, so they differ by some roundings of the largest term.
        error = np.abs(to_numpy(got) - to_numpy(want)).max()
        assert error < 200 * STEP * np.abs(to_numpy(want)).max()
        seen |= set(chosen.tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("packing", [None, (8, 32)])
def test_a_network_computes_a_step_by_the_kernels(monkeypatch, packing):
    """The module of a model, as on a GPU: the same as its own operations, and three launches."""
    from test_dynamoe import network

    module, x = network(bits=packing and packing[0], biases=packing is None), normal(1, 5, 64)
    with mx.stream(mx.cpu):
        want = module(x, RunOptions(fraction=0.3))
        mx.eval(want)
    monkeypatch.setattr(feed_forward, "on_gpu", lambda: True)
    with metal_on_cpu.recorded() as launches:
        module(x, RunOptions(fraction=0.3))
    assert len(launches) == 3
    got = metal_on_cpu.run(module, x, RunOptions(fraction=0.3))
    assert np.abs(to_numpy(got) - to_numpy(want)).max() < 200 * STEP * np.abs(to_numpy(want)).max()
    assert sum(module.counts) >= 10


@pytest.mark.parametrize("shared", [False, True])
def test_the_launches_of_a_step(shared):
    parts = layer("lagrangian", None, shared)
    for change, count in (({}, 3), ({"lefts": (matrix(64, 2),), "rights": (matrix(2, 32),)}, 4)):
        with metal_on_cpu.recorded() as launches:
            metal.decode(normal(2, 64), dataclasses.replace(parts, **change), 0.5)
        assert len(launches) == count


def test_what_the_kernels_do_not_compute_is_refused():
    parts, x = layer("lagrangian", None), normal(2, 64)
    chosen = mx.array([0, 1], mx.uint32)
    assert metal.supported(parts)
    assert not metal.supported(parts, 9)
    three, other = matrix(96, 64, (3, 32)), Quantized(*mx.quantize(normal(96, 64), mode="mxfp4"), None, 32, 4, "mxfp4")
    for change in (
        {"gate": three, "up": three},
        {"gate": other, "up": other},
        {"up": matrix(96, 64, (4, 32))},
        {"up": matrix(95, 64)},
        {"gate_bias": mx.zeros(95)},
        {"downs": parts.downs[:2]},
        {"downs": parts.downs[:1]},
        {"downs": (*parts.downs[:2], three)},
        {"down_bias": mx.zeros(63)},
        {"lefts": (matrix(64, 2),)},
        {"lefts": (matrix(64, 2),), "rights": (matrix(3, 32),)},
        {"lefts": (matrix(64, 2),), "rights": (matrix(2, 64),)},
        {"rule": "nearest"},
        {"rule": "tail"},
        {"prices": None},
    ):
        changed = dataclasses.replace(parts, **change)
        assert not metal.supported(changed), change
        with metal_on_cpu.recorded(), pytest.raises(ValueError, match="nested experts"):
            metal.decode(x, changed, 0.5)
    for wrong in (normal(9, 64), normal(64), x.astype(mx.int32), normal(2, 63)):
        with pytest.raises(ValueError, match="nested experts"):
            metal.gate_up(wrong, parts.gate, parts.up, parts.widths, chosen)
    with pytest.raises(ValueError, match="nested experts"):
        metal.gate_up(x, parts.gate, parts.up, parts.widths, chosen[:1])


def test_the_thread_sanitizer_finds_nothing():
    parts, x = layer("lagrangian", (4, 32)), normal(3, 64)
    got = metal_on_cpu.run(metal.decode, x, parts, 0.5, sanitizer="thread")
    assert np.array_equal(to_numpy(got), to_numpy(metal_on_cpu.run(metal.decode, x, parts, 0.5, descending=True)))
