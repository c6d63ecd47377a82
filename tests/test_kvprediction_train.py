"""Training of predictors: the loss and its gradient against float64, determinism, being killed and resumed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import kvp_reference
from helpers import assert_close
from mlxeff import ops
from mlxeff.errors import MlxeffError
from mlxeff.kvprediction.fit import fit
from mlxeff.kvprediction.predictor import identity
from mlxeff.kvprediction.train import Training, loss, predicted_logits, train
from test_kvprediction import FAMILIES, PROMPT, SMALLER, random_model, random_pair
from test_kvprediction_fit import SEQUENCES

LAYER_MAP = [0, 0, 1]
TOKENS = mx.array([PROMPT[:13]])


def double(module):
    return {name: np.array(value, dtype=np.float64) for name, value in tree_flatten(module.parameters())}


def formula(family, auxiliary, base, maps):
    models = [
        kvp_reference.Family(double(model), config)
        for model, config in ((base, FAMILIES[family]), (auxiliary, SMALLER[family]))
    ]
    return kvp_reference.training_loss(*models, maps, LAYER_MAP, PROMPT[:13], 0.3)


@pytest.mark.parametrize("family", ["llama", "openelm"])
@pytest.mark.parametrize("mlx_alone", [True, False])
def test_loss_and_gradient_against_float64(family, mlx_alone):
    """The derivative in a random direction by central differences of the float64 formula."""
    auxiliary, predictor, base = random_pair(family)
    with ops.mlx_only() if mlx_alone else pytest.MonkeyPatch.context():
        step = nn.value_and_grad(predictor, lambda: loss(predictor, auxiliary, base, TOKENS, 0.3))
        value, gradients = step()
        mx.eval(value, gradients)
    maps = double(predictor)
    assert value.item() == pytest.approx(formula(family, auxiliary, base, maps), rel=1e-5)
    flat = {name: np.array(g, dtype=np.float64) for name, g in tree_flatten(gradients)}
    assert flat.keys() == maps.keys()
    rng = np.random.default_rng(5)
    for part in ("key_maps.0", "value_maps.1", "key_maps.2", "value_maps.2"):
        names = [name for name in maps if name.startswith(part)]
        direction = {name: rng.standard_normal(maps[name].shape) for name in names}
        ends = [
            formula(family, auxiliary, base, maps | {name: maps[name] + t * direction[name] for name in names})
            for t in (1e-6, -1e-6)
        ]
        got = sum((flat[name] * direction[name]).sum() for name in names)
        # float32 gradients over three layers; |x| of the L1 term has kinks that a step of 1e-6 rarely meets.
        assert got == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-3, abs=2e-4), part


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_predictors_give_the_logits_of_the_base(family):
    base = random_model(FAMILIES[family])
    got, _ = predicted_logits(base, identity(base.kv_shapes), base, TOKENS)
    assert_close(got, base(TOKENS, base.new_cache()), "training mode", rtol=0, atol=0)


def fitted(family="llama"):
    auxiliary, _, base = random_pair(family)
    return auxiliary, fit(auxiliary, base, LAYER_MAP, SEQUENCES[:3]).predictor, base


def copy_of(predictor):
    return tree_unflatten([(name, mx.array(value)) for name, value in tree_flatten(predictor.parameters())])


def test_training_lowers_the_loss_and_leaves_both_models_alone():
    auxiliary, predictor, base = fitted("openelm")
    before = {name: mx.array(value) for model in (auxiliary, base) for name, value in tree_flatten(model.parameters())}
    tokens = mx.array(SEQUENCES)
    start = loss(predictor, auxiliary, base, tokens, 1 / 3).item()
    losses = train(predictor, auxiliary, base, SEQUENCES, Training(steps=40, batch=4, rate=3e-3, warmup=5))
    assert len(losses) == 40
    assert loss(predictor, auxiliary, base, tokens, 1 / 3).item() < start - 0.1
    after = {name: value for model in (auxiliary, base) for name, value in tree_flatten(model.parameters())}
    for name, value in before.items():
        assert_close(after[name], value, name, rtol=0, atol=0)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    auxiliary, predictor, base = fitted()
    start, settings, path = copy_of(predictor), Training(steps=12, every=4, warmup=3, seed=6), tmp_path / "state"
    whole = train(predictor, auxiliary, base, SEQUENCES, settings)
    want = dict(tree_flatten(copy_of(predictor)))

    def kill(done, total):
        if done == 10:
            raise KeyboardInterrupt

    predictor.update(start)
    with pytest.raises(KeyboardInterrupt):
        train(predictor, auxiliary, base, SEQUENCES, settings, path, kill)
    predictor.update(start)
    done = []
    losses = train(predictor, auxiliary, base, SEQUENCES, settings, path, lambda at, _: done.append(at))
    assert done == [9, 10, 11, 12]
    assert losses == whole
    for name, value in tree_flatten(predictor.parameters()):
        assert_close(value, want[name], name, rtol=0, atol=0)
    predictor.update(start)
    with pytest.raises(MlxeffError, match=r"state: wanted a checkpoint of this training \(\w+\), got \w+: delete it"):
        train(predictor, auxiliary, base, SEQUENCES, Training(steps=13, every=4, warmup=3, seed=6), path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(MlxeffError, match="state: wanted a training's checkpoint, got "):
        train(predictor, auxiliary, base, SEQUENCES, settings, path)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_a_loss_that_is_not_finite_stops():
    auxiliary, predictor, base = fitted()
    with pytest.raises(MlxeffError, match="wanted a finite loss, got nan: lower the learning rate"):
        train(predictor, auxiliary, base, SEQUENCES, Training(steps=5, rate=float("nan")))


def test_sequences_too_short():
    auxiliary, predictor, base = fitted()
    with pytest.raises(MlxeffError, match="training: wanted sequences of at least two tokens, got 1"):
        train(predictor, auxiliary, base, [[1], [2]], Training(steps=1))
