"""The SeedLM encoder: against brute force over all seeds in float64, known errors, invariances, feedback."""

import functools

import numpy as np
import pytest

from cpu_library import BAD_ARGUMENT, LEVELS, OK, lib
from mlxeff import MlxeffError
from mlxeff.seedlm import codec, lfsr
from mlxeff.seedlm.encode import Inputs, _diagonal, exponent_bias
from mlxeff.seedlm.encode import encode as encode_matrix
from mlxeff.seedlm.format import FORMATS
from seedlm_calls import encode

NAMES = tuple(FORMATS)


@functools.cache
def bases(name):
    """U of all 65,535 seeds, float64 (seeds, C, P)."""
    fmt = FORMATS[name]
    windows = lfsr.states(np.arange(1, 1 << 16), fmt.columns * fmt.states)
    return ((windows - 32768) / 32767).reshape(-1, fmt.columns, fmt.states)


@functools.cache
def solutions(name, metric):
    """Of the seeds that the encoder considers: U, and (seeds, P, C) weighted pseudo-inverses."""
    u, metric = bases(name), np.array(metric)[:, None]
    gram = np.swapaxes(u * metric, 1, 2) @ u
    regular = np.linalg.det(gram) > 1e-9
    u, gram = u[regular], gram[regular]
    inverse = np.linalg.inv(gram)
    condition = np.trace(gram, axis1=1, axis2=2) * np.trace(inverse, axis1=1, axis2=2)
    kept = condition < 4000
    return u[kept], (inverse @ np.swapaxes(u * metric, 1, 2))[kept]


def brute_force(name, w, metric, bias, refine):
    """The least error of a block over all seeds, rounding as the encoder says it does."""
    u, inverse = solutions(name, tuple(metric))
    t = inverse @ w
    exponent = np.clip(np.frexp(np.abs(t).max(1))[1] - 3, bias - 8, bias + 7)
    middle = np.clip(np.rint(np.ldexp(t, -exponent[:, None])), -8, 7)
    best = error_of(u, np.ldexp(middle, exponent[:, None]), w, metric).min()
    if not refine:
        return best
    promising = error_of(u, t, w, metric) <= best  # the others cannot be better with any coefficients
    u, t, exponent = u[promising], t[promising], exponent[promising]
    for step in (0, 1):
        e = np.maximum(exponent - step, bias - 8)[:, None]
        middle = np.clip(np.rint(np.ldexp(t, -e)), -8, 7)
        for offsets in np.ndindex(*(3,) * t.shape[1]):
            q = np.clip(middle + np.array(offsets) - 1, -8, 7)
            best = min(best, error_of(u, np.ldexp(q, e), w, metric).min())
    return best


def error_of(u, t, w, metric):
    return ((u @ t[:, :, None])[:, :, 0] - w) ** 2 @ metric


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_plain_rounding_against_brute_force(level, name, weighted):
    assert lib.mlxeff_set_isa(level.encode()) == OK
    rng = np.random.default_rng(1)
    columns = FORMATS[name].columns
    weights = rng.standard_normal((3, columns)).astype(np.float32)
    metric = np.geomspace(0.2, 3, columns).astype(np.float32) if weighted else np.ones(columns, np.float32)
    _, decoded, errors = encode(name, weights, -2, refine=False, diagonal=metric if weighted else None)
    for row in range(3):
        want = brute_force(name, weights[row].astype(np.float64), metric.astype(np.float64), -2, refine=False)
        np.testing.assert_allclose(errors[row, 0], want, rtol=1e-5)
        np.testing.assert_allclose(((weights[row] - decoded[row]) ** 2 * metric).sum(), want, rtol=1e-5)
    assert lib.mlxeff_set_isa(None) == OK


@pytest.mark.parametrize("name", NAMES)
def test_refined_rounding_against_brute_force(name):
    weights = np.random.default_rng(2).standard_normal((1, FORMATS[name].columns)).astype(np.float32)
    metric = np.ones(weights.shape[1])
    _, _, errors = encode(name, weights, -2)
    want = brute_force(name, weights[0].astype(np.float64), metric, -2, refine=True)
    np.testing.assert_allclose(errors[0, 0], want, rtol=1e-5)


def largest_energies(name, weights, k):
    """(blocks, k) of the considered seeds: those whose columns, with unrounded coefficients, reach most of |w|²."""
    u, inverse = solutions(name, (1.0,) * weights.shape[1])
    count, columns, states = u.shape
    products = u.transpose(0, 2, 1).reshape(-1, columns).astype(np.float32) @ weights.T
    products *= inverse.reshape(-1, columns).astype(np.float32) @ weights.T
    energy = products.reshape(count, states, -1).sum(1)
    return np.argpartition(-energy, k, 0)[:k].T


def best_of(name, block, seeds, refine, bias=-2):
    """The least error of a block (C) over these seeds alone."""
    u, inverse = (each[seeds] for each in solutions(name, (1.0,) * len(block)))
    t = inverse @ block
    exponent = (
        np.clip(np.frexp(np.abs(t).max(1))[1] - 3, bias - 8, bias + 7)[:, None, None] - np.arange(1 + refine)[:, None]
    )
    offsets = np.stack(np.meshgrid(*[[0, -1, 1][: 1 + 2 * refine]] * t.shape[1]), -1).reshape(-1, t.shape[1])
    q = np.clip(np.rint(np.ldexp(t[:, None], -exponent)), -8, 7)[:, :, None] + offsets
    values = np.ldexp(np.clip(q, -8, 7), exponent[..., None]).reshape(len(t), -1, t.shape[1])
    return ((values @ np.swapaxes(u, 1, 2) - block) ** 2).sum(-1).min()


@pytest.mark.parametrize(("name", "blocks", "k"), [("4", 1000, 16), ("3", 200, 16), ("4.5", 200, 128)])
def test_the_best_seed_is_among_the_few_of_largest_energy(name, blocks, k):
    """In 99.9 % of Gaussian blocks, with either rounding; and no few seeds are better than all of them."""
    weights = np.random.default_rng(15).standard_normal((blocks, FORMATS[name].columns)).astype(np.float32)
    few = np.concatenate([largest_energies(name, part, k) for part in np.split(weights, blocks // 50)])
    for refine in (False, True):
        _, _, all_seeds = encode(name, weights, -2, refine=refine)
        best = [best_of(name, block.astype(np.float64), each, refine) for block, each in zip(weights, few, strict=True)]
        ratio = np.array(best) / all_seeds[:, 0]
        assert ratio.min() > 1 - 1e-5  # the encoder's errors are those of float32 results
        assert (ratio < 1 + 1e-5).mean() >= 0.999


# Relative error of Gaussian weights over all blocks, and the largest of a block, for both roundings.
GAUSSIAN = {"4": (0.120, 0.126, 0.121), "3": (0.220, 0.230, 0.222), "4.5": (0.082, 0.088, 0.083)}


@pytest.mark.parametrize("name", NAMES)
def test_gaussian_error(name):
    fmt = FORMATS[name]
    weights = np.random.default_rng(3).standard_normal((128, 24 * fmt.columns)).astype(np.float32)
    low, high, refined_limit = GAUSSIAN[name]
    norms = (weights.reshape(128, 24, fmt.columns) ** 2.0).sum(-1)
    _, _, plain = encode(name, weights, -2, refine=False)
    _, _, refined = encode(name, weights, -2)
    assert low < np.sqrt(plain.sum() / norms.sum()) < high
    assert np.sqrt(refined.sum() / norms.sum()) < refined_limit
    assert np.sqrt(refined / norms).max() < {"4": 0.25, "3": 0.4, "4.5": 0.2}[name]
    assert (refined <= plain * (1 + 1e-6)).all()  # both errors are those of float32 results


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_that_of_the_stored_blocks(name):
    fmt = FORMATS[name]
    weights = np.random.default_rng(4).standard_t(3, (5, 100)).astype(np.float32) / 50
    blocks, decoded, errors = encode(name, weights, exponent_bias(weights))
    codec.check_blocks(fmt, blocks, name)
    np.testing.assert_array_equal(decoded, codec.decode(fmt, blocks, 100))
    np.testing.assert_allclose(errors.sum(), ((weights - decoded.astype(np.float64)) ** 2).sum(), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_patterns_that_the_register_holds(name):
    """Spikes, constants, alternating signs and steps lie in the span of some seed, to 2^-15 of the dither vector."""
    C = FORMATS[name].columns
    step = np.where(np.arange(C) < C // 2, 1.0, -1.0)
    weights = np.stack([np.eye(C)[2], np.ones(C), (-1.0) ** np.arange(C), step, np.zeros(C)]).astype(np.float32)
    blocks, decoded, errors = encode(name, weights, -2)
    relative = np.sqrt(errors[:4, 0] / (weights[:4] ** 2).sum(1))
    assert (relative <= 1e-4).all(), relative
    assert (decoded[4] == 0).all()
    assert (blocks.seeds != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_only_move_the_exponent(name):
    weights = np.random.default_rng(5).standard_normal((4, 2 * FORMATS[name].columns)).astype(np.float32)
    one, _, _ = encode(name, weights, -2)
    for k in (-90, -3, 1, 40):
        scaled, _, _ = encode(name, np.ldexp(weights, k), k - 2)
        for field in ("seeds", "coefficients", "codes"):
            np.testing.assert_array_equal(getattr(scaled, field), getattr(one, field))
        if abs(k) <= 3:
            moved, _, _ = encode(name, np.ldexp(weights, k), -2)
            np.testing.assert_array_equal(moved.codes.astype(int), one.codes.astype(int) + k)


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_order_do_not_change_the_choice(name):
    weights = np.random.default_rng(6).standard_normal((75, 2 * FORMATS[name].columns)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        assert lib.mlxeff_set_num_threads(threads) == OK
        results.append(encode(name, weights, -2)[0])
    assert lib.mlxeff_set_num_threads(0) == OK
    order = np.random.default_rng(7).permutation(75)
    shuffled = encode(name, np.ascontiguousarray(weights[order]), -2)[0]
    for field in ("seeds", "coefficients", "codes"):
        for other in results[1:]:
            np.testing.assert_array_equal(getattr(other, field), getattr(results[0], field))
        np.testing.assert_array_equal(getattr(shuffled, field), getattr(results[0], field)[order])


@pytest.mark.parametrize("level", LEVELS)
def test_levels_find_the_same_blocks(level):
    weights = np.random.default_rng(8).standard_normal((8, 48)).astype(np.float32)
    want = {name: encode(name, weights, -2)[0] for name in NAMES}
    assert lib.mlxeff_set_isa(level.encode()) == OK
    for name in NAMES:
        got = encode(name, weights, -2)[0]
        for field in ("seeds", "coefficients", "codes"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want[name], field))
    assert lib.mlxeff_set_isa(None) == OK


def test_metric_of_ones_is_plain_and_a_metric_lowers_its_own_error():
    weights = np.random.default_rng(9).standard_normal((40, 8)).astype(np.float32)
    plain, _, plain_errors = encode("4", weights, -2)
    ones, _, _ = encode("4", weights, -2, diagonal=np.full(8, 5, np.float32))
    np.testing.assert_array_equal(ones.seeds, plain.seeds)
    metric = np.geomspace(0.05, 5, 8).astype(np.float32)
    _, weighted, errors = encode("4", weights, -2, diagonal=metric)
    unweighted = ((weights - encode("4", weights, -2)[1]) ** 2 * metric).sum()
    assert errors.sum() < 0.6 * unweighted
    assert ((weights - weighted) ** 2).sum() > plain_errors.sum()


@pytest.mark.parametrize("dominant", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_columns_that_dominate_leave_the_others_a_seed(name, dominant):
    """Massive activations weigh a column 10⁴ times and more. Plain blocks miss 0.09 to 0.25 of the weights."""
    fmt = FORMATS[name]
    weights = np.random.default_rng(17).standard_normal((32, fmt.columns)).astype(np.float32)
    for ratio in (1e3, 1e5, 1e8):
        metric = np.where(np.arange(fmt.columns) < dominant, ratio, 1).astype(np.float32)
        _, decoded, _ = encode(name, weights, -2, diagonal=metric)
        misses = np.linalg.norm(decoded - weights, axis=0) / np.linalg.norm(weights, axis=0)
        assert misses[:dominant].max() < 0.05, ratio
        assert misses[dominant:].max() < 0.6, ratio


def test_weights_below_the_window_cost_no_more_than_zeros():
    """The exponent range ends 8 below the bias: tiny blocks become zeros or better, in bounded time."""
    weights = np.random.default_rng(10).standard_normal((20, 24)).astype(np.float32) * 1e-4
    for name in NAMES:
        errors = encode(name, weights, 0)[2]
        norms = (weights.reshape(20, -1, FORMATS[name].columns) ** 2.0).sum(-1)
        errors = errors[:, : norms.shape[1]]
        assert (errors <= norms * (1 + 1e-6)).all()


def test_weights_above_the_window_are_clipped():
    weights = np.full((1, 8), 1e6, np.float32)
    blocks, decoded, _ = encode("4", weights, -2)
    assert blocks.codes[0, 0] == 15
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value):
    weights = np.ones((2, 16), np.float32)
    weights[1, 3] = value
    encode("4", weights, code=BAD_ARGUMENT)
    with pytest.raises(MlxeffError, match=r"q: wanted finite weights, got .* at \(1, 3\)"):
        encode_matrix(FORMATS["4"], weights, origin="q")


def correlated_inputs(rng, count, cols):
    """Inputs (count, cols) whose covariance has a power-law spectrum and unequal channels, and that covariance."""
    basis = np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    root = basis * np.arange(1, cols + 1) ** -0.5 * np.exp(0.6 * rng.standard_normal(cols))[:, None]
    return rng.standard_normal((count, cols)) @ root.T, root @ root.T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cols", [100, 300])
def test_feedback_lowers_the_output_error(name, cols):
    """On the true covariance, not the one it was fitted to; columns that the blocks do not divide, of one batch and of
    several. Measured: 0.43 to 0.49 of the error without it; 0.62 at 300 columns without the later batches' part."""
    rng = np.random.default_rng(11)
    x, covariance = correlated_inputs(rng, 2000, cols)
    weights = rng.standard_normal((32, cols)).astype(np.float32)

    def output_error(decoded):
        miss = weights - decoded
        return np.sqrt(np.trace(miss @ covariance @ miss.T) / np.trace(weights @ covariance @ weights.T))

    plain = encode_matrix(FORMATS[name], weights)
    aware = encode_matrix(FORMATS[name], weights, x.T @ x)
    for result in (plain, aware):
        arrays = result.arrays
        again = codec.decode(FORMATS[name], codec.unpack(FORMATS[name], 32, cols, arrays), cols)
        np.testing.assert_array_equal(again, result.decoded)
    assert output_error(aware.decoded) < 0.5 * output_error(plain.decoded)
    of_outputs = np.linalg.norm((weights - aware.decoded) @ x.T) / np.linalg.norm(weights @ x.T)
    np.testing.assert_allclose(aware.error, of_outputs, rtol=1e-5)
    relative = np.linalg.norm(weights - plain.decoded) / np.linalg.norm(weights)
    np.testing.assert_allclose(plain.error, relative, rtol=1e-5)  # of float32 norms


@pytest.mark.parametrize("name", NAMES)
def test_the_columns_of_a_block_are_weighed_by_what_the_others_cannot_compensate(name):
    """The diagonal of (UᵀU)⁻¹; a column beyond the matrix weighs a 64th of the mean."""
    fmt = FORMATS[name]
    factor = np.triu(np.random.default_rng(18).standard_normal((fmt.columns - 1, fmt.columns - 1)) + 3 * np.eye(1))
    got = _diagonal(fmt, np.linalg.inv(factor))
    want = np.diagonal(np.linalg.inv(factor.T @ factor))
    np.testing.assert_allclose(got, [*want, want.mean() / 64], rtol=1e-5)


def test_unrelated_inputs_need_no_feedback():
    """H = I: nothing to compensate, all columns alike, so the choice is the plain one."""
    weights = np.random.default_rng(12).standard_normal((6, 24)).astype(np.float32)
    for name in NAMES:
        plain = encode_matrix(FORMATS[name], weights)
        aware = encode_matrix(FORMATS[name], weights, np.eye(24))
        np.testing.assert_allclose(aware.decoded, plain.decoded, atol=1e-6)


def test_dead_inputs_and_zero_matrices():
    rng = np.random.default_rng(13)
    x = rng.standard_normal((200, 24))
    x[:, 3] = 0
    weights = rng.standard_normal((4, 24)).astype(np.float32)
    assert encode_matrix(FORMATS["4"], weights, x.T @ x).error < 0.2
    assert encode_matrix(FORMATS["4"], weights, np.zeros((24, 24))).error == 0
    zeros = encode_matrix(FORMATS["3"], np.zeros((2, 24), np.float32))
    assert zeros.error == 0
    assert (zeros.decoded == 0).all()


def test_inputs_made_once_serve_several_matrices():
    rng = np.random.default_rng(17)
    x, weights = rng.standard_normal((200, 44)), rng.standard_normal((2, 6, 44)).astype(np.float32)
    inputs = Inputs.of(FORMATS["4.5"], x.T @ x)
    for weight in weights:
        got, want = (encode_matrix(FORMATS["4.5"], weight, given) for given in (inputs, x.T @ x))
        np.testing.assert_array_equal(got.decoded, want.decoded)
        assert got.error == want.error
    with pytest.raises(MlxeffError, match=r"wanted inputs for 4 bits, got them for 4\.5"):
        encode_matrix(FORMATS["4"], weights[0], inputs)


def test_progress_counts_every_weight():
    weights = np.random.default_rng(14).standard_normal((6, 44)).astype(np.float32)
    for gram in (None, np.eye(44)):
        done = []
        encode_matrix(FORMATS["4"], weights, gram, advance=done.append)
        assert sum(done) == weights.size


@pytest.mark.parametrize(
    ("weights", "gram", "complaint"),
    [
        (np.ones(3), None, r"q: wanted a matrix, got shape \(3,\)"),
        (np.ones((2, 8)), np.eye(7), r"q: Gram matrix of the inputs: wanted shape \(8, 8\), got \(7, 7\)"),
        (np.ones((2, 8)), np.full((8, 8), np.nan), "q: Gram matrix of the inputs: wanted finite values"),
        (np.full((2, 8), 1e-36), None, r"q: wanted weights between 2\^-96 and 2\^96"),
    ],
)
def test_bad_input(weights, gram, complaint):
    with pytest.raises(MlxeffError, match=complaint):
        encode_matrix(FORMATS["4"], weights, gram, origin="q")


def test_exponent_bias():
    """floor(log2 rms) - 2, exactly at powers of two."""
    for rms, want in ((1.0, -2), (2.0, -1), (1.999, -2), (2.0**-7, -9), (0.0, 0)):
        assert exponent_bias(np.full((2, 4), rms)) == want
