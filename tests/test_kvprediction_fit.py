"""The closed-form fit against least squares in NumPy, its determinism, and what it finds where the answer is known."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff.errors import MlxeffError
from mlxeff.kvprediction import predict
from mlxeff.kvprediction.fit import SINK_WEIGHT, Moments, choose_layers, fit, head_columns, solve
from mlxeff.kvprediction.predictor import INPUTS, merged
from mlxeff.kvprediction.text import sample
from test_kvprediction import FAMILIES, PROMPT, random_model, random_pair

SEQUENCES = np.random.default_rng(9).integers(0, 200, (20, 40)).tolist()


def rows_of(model, layer, kind, inputs="own"):
    if inputs == "hidden":
        states = [model.layer_states(mx.array([ids]), model.new_cache(), [layer])[0][0][0] for ids in SEQUENCES]
        return np.concatenate([np.array(each, np.float64) for each in states])
    parts = [model.raw_kv(mx.array([ids]), model.new_cache())[layer][kind] for ids in SEQUENCES]
    return np.concatenate([np.array(p[0].transpose(1, 0, 2).reshape(p.shape[2], -1), np.float64) for p in parts])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("inputs", INPUTS)
def test_equals_least_squares(kind, ridge, inputs):
    auxiliary, _, base = random_pair("openelm")
    fitted = fit(auxiliary, base, [0, 0, 1], SEQUENCES, ridge=ridge, inputs=inputs)
    x, y = rows_of(auxiliary, 1, kind, inputs), rows_of(base, 2, kind)
    weights = np.where(np.arange(len(x)) % 40 == 0, SINK_WEIGHT, 1.0)[:, None]
    # Ridge as least squares: √λ I below the rows, with zeros to meet; the column of ones is not penalised.
    strength = np.sqrt(ridge * (x * x * weights).sum() / x.shape[1])
    top = np.c_[x, np.ones(len(x))]
    bottom = np.c_[strength * np.eye(x.shape[1]), np.zeros(x.shape[1])]
    root, zeros = np.sqrt(weights), np.zeros((x.shape[1], y.shape[1]))
    want = np.linalg.lstsq(np.r_[root * top, bottom], np.r_[root * y, zeros], rcond=None)[0]
    linear = (fitted.predictor.key_maps, fitted.predictor.value_maps)[kind][2]
    assert_close(linear.weight, want[:-1].T, "weight", rtol=1e-5)  # normal equations: the condition number squared
    assert_close(linear.bias, want[-1], "bias", rtol=1e-5)
    residual = y - top @ want
    mean = (weights * y).sum(0) / weights.sum()
    share = (weights * residual**2).sum() / (weights * (y - mean) ** 2).sum()
    assert fitted.errors[2][kind] == pytest.approx(share, rel=1e-6)
    assert fitted.tokens == 800


def test_the_same_text_gives_the_same_predictor_to_the_bit():
    auxiliary, _, base = random_pair("llama")
    first, second = (fit(auxiliary, base, [0, 1, 1], SEQUENCES).predictor for _ in range(2))
    for (name, a), (_, b) in zip(tree_flatten(first.parameters()), tree_flatten(second.parameters()), strict=True):
        assert_close(a, b, name, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", INPUTS)
def test_finds_the_truth_where_the_auxiliary_is_the_base(family, inputs):
    base = random_model(FAMILIES[family])
    fitted = fit(base, base, [0, 1, 2], SEQUENCES, ridge=1e-9, inputs=inputs)
    assert fitted.error < 1e-6
    got = predict(base, fitted.predictor, base, mx.array(PROMPT), base.new_cache())
    # It is found to about the ridge times the spread of the data's variances.
    assert_close(got, base.last_logits(mx.array([PROMPT]), base.new_cache()), "logits", rtol=1e-3)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("search", [False, True])
def test_shared_layers_are_not_fitted_and_change_no_other(inputs, search):
    base = random_model(FAMILIES["openelm"])
    auxiliary = base.pruned([0, 2])
    whole, fitted = (fit(auxiliary, base, [0, 0, 1], SEQUENCES, inputs=inputs, search=search, shared=n) for n in (0, 1))
    assert fitted.errors == [(0.0, 0.0), *whole.errors[1:]]
    assert max(whole.errors[0]) < 1e-6
    assert fitted.predictor.layer_map == whole.predictor.layer_map
    for pair, other in zip(fitted.predictor.maps, whole.predictor.maps[1:], strict=True):
        for mine, theirs in zip(pair, other, strict=True):
            assert_close(mine.weight, theirs.weight, "weight", rtol=0, atol=0)
            assert_close(mine.bias, theirs.bias, "bias", rtol=0, atol=0)


def test_an_auxiliary_of_all_layers_leaves_nothing_to_fit():
    base = random_model(FAMILIES["llama"])
    with pytest.raises(
        MlxeffError, match="fit: wanted an auxiliary without some of the base's 3 layers, got all of them"
    ):
        fit(base.pruned([0, 1, 2]), base, [0, 1, 2], SEQUENCES, shared=3)


def test_search_takes_the_layer_with_the_least_error():
    base = random_model(FAMILIES["llama"])
    pruned = base.pruned([0, 1])
    fitted = fit(pruned, base, [1, 1, 1], SEQUENCES, search=True)
    assert fitted.predictor.layer_map[:2] == [0, 1]  # those that are the same layers
    assert fitted.errors[0][0] < 1e-6
    each = [fit(pruned, base, [0, 0, j], SEQUENCES).errors[2] for j in (0, 1)]
    assert fitted.predictor.layer_map[2] == int(np.argmin(np.sum(each, axis=1)))


def test_per_head_reads_one_auxiliary_head():
    auxiliary, _, base = random_pair("llama")  # 3 heads of 16, 2 heads of 16
    fitted = fit(auxiliary, base, [0, 0, 1], SEQUENCES, per_head=True)
    weight = np.array(fitted.predictor.key_maps[1].weight)
    assert head_columns((3, 16), (2, 16)) == [slice(0, 16), slice(16, 32)]
    assert not weight[:16, 16:].any()
    assert not weight[16:, :16].any()
    assert not weight[16:, 32:].any()
    full = fit(auxiliary, base, [0, 0, 1], SEQUENCES)
    assert all(a > b for mine, theirs in zip(fitted.errors, full.errors, strict=True) for a, b in zip(mine, theirs))


def test_per_head_needs_heads():
    auxiliary, _, base = random_pair("llama")
    with pytest.raises(MlxeffError, match="fit: per head: wanted inputs own, which have heads, got hidden"):
        fit(auxiliary, base, [0, 0, 1], SEQUENCES, per_head=True, inputs="hidden")


def test_memory_does_not_grow_with_the_text():
    auxiliary, _, base = random_pair("llama")
    moments = Moments([[0], [0], [1]])
    sizes = []
    for ids in SEQUENCES[:3]:
        tokens = mx.array([ids])
        of_auxiliary, of_base = (model.raw_kv(tokens, model.new_cache()) for model in (auxiliary, base))
        moments.add(dict(enumerate(map(merged, of_auxiliary))), of_base)
        sums = (moments.inputs, moments.cross, moments.squares, moments.sums)
        sizes.append(sum(value.nbytes for each in sums for value in each.values()))
    assert sizes[0] == sizes[1] == sizes[2]
    assert moments.cross[0, 2, 1].dtype == np.float64


def test_too_little_text():
    auxiliary, _, base = random_pair("llama")
    with pytest.raises(MlxeffError, match="fit: wanted a text of at least one token, got none"):
        fit(auxiliary, base, [0, 0, 1], [])
    moments = Moments([[0]])
    moments.inputs[0, 0], moments.cross[0, 0, 0] = np.zeros((3, 3)), np.zeros((3, 2))
    with pytest.raises(MlxeffError, match=r"fit: wanted more text or a ridge above 0\.0"):
        solve(moments, 0, 0, 0, ridge=0.0)


def test_sampled_text_follows_the_model_and_the_seed():
    model = random_model(FAMILIES["llama"])
    drawn = sample(model, 7, 1000, 32, seed=4)
    assert [len(row) for row in drawn] == [32] * 31 + [8]
    assert all(row[0] == 7 for row in drawn)
    assert drawn == sample(model, 7, 1000, 32, seed=4)
    assert drawn != sample(model, 7, 1000, 32, seed=5)
    logits = model(mx.array([row[:31] for row in drawn[:31]]), model.new_cache())
    ranks = (logits > mx.take_along_axis(logits, mx.array([row[1:32] for row in drawn[:31]])[..., None], -1)).sum(-1)
    assert ranks.astype(mx.float32).mean().item() < 40  # of 200: chance would be near 100


def test_layers_are_chosen_by_their_error():
    base = random_model(FAMILIES["llama"])
    choices = [[0, 1], [0, 2]]
    best, errors = choose_layers(base, choices, SEQUENCES)
    maps = ([0, 1, 1], 2), ([0, 0, 1], 1)
    want = [fit(base.pruned(c), base, m, SEQUENCES, shared=n).error for c, (m, n) in zip(choices, maps, strict=True)]
    assert errors == want
    assert best == choices[int(np.argmin(want))]


def test_states_that_are_not_finite():
    """They would look like a perfect fit."""
    moments = Moments([[0]])
    moments.add({0: (mx.full((1, 5, 4), float("nan")),) * 2}, [(mx.ones((1, 1, 5, 4)),) * 2])
    with pytest.raises(MlxeffError, match="fit: layer 0: wanted finite hidden states, keys and values, got others"):
        solve(moments, 0, 0, 0)
