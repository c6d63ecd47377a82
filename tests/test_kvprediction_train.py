"""Training of predictors: the loss and its gradient against float64, determinism, being killed and resumed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import kvp_reference
from helpers import assert_close
from mlxeff import ops
from mlxeff.errors import MlxeffError
from mlxeff.kvprediction import Predictor
from mlxeff.kvprediction.fit import fit
from mlxeff.kvprediction.losses import LOSSES, loss, predicted_logits, truth
from mlxeff.kvprediction.predictor import INPUTS, identity
from mlxeff.kvprediction.train import ANSWER, Trained, Training, _batch, train
from mlxeff.modules import dense, is_matrix
from mlxeff.tuning import METHODS, LoraLinear, Tuned
from test_kvprediction import FAMILIES, PROMPT, SMALLER, random_model, random_pair, randomise
from test_kvprediction_fit import SEQUENCES
from test_tuning import model_of

LAYER_MAP = [0, 0, 1]
TOKENS = mx.array([PROMPT[:13]])


def double(module):
    return {name: np.array(value, dtype=np.float64) for name, value in tree_flatten(module.parameters())}


def weights(model):
    """All matrices and norms in float64 by name, whatever form they are stored in."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a, b = (np.array(part, np.float64) for part in (module.a, module.b))
            found[f"{name}.weight"] = np.array(dense(module._whole), np.float64) + b @ a
        elif isinstance(module, nn.QuantizedEmbedding):
            rows = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            found[f"{name}.weight"] = np.array(rows, np.float64)
        elif is_matrix(module) or isinstance(module, (nn.RMSNorm, nn.Embedding)):
            matrix = dense(module) if is_matrix(module) else module.weight
            found[f"{name}.weight"] = np.array(matrix, np.float64)
    return found


CONTINUATION = 4


def value_and_gradients(predictor, auxiliary, base, kind, tuned=None, auxiliary_loss=0.0):
    """(loss, gradients by name) with λ = 0.3."""
    trained, true = Trained(predictor, tuned), truth(base, TOKENS[:, :-1], kind, CONTINUATION)
    step = nn.value_and_grad(trained, lambda: loss(predictor, auxiliary, base, TOKENS, true, 0.3, auxiliary_loss))
    value, gradients = step()
    mx.eval(value, gradients)
    return value.item(), {name: np.array(g, np.float64) for name, g in tree_flatten(gradients)}


def reference_loss(kind, *models, layer_map=LAYER_MAP, **options):
    """The same in float64; models: base, auxiliary, maps."""
    if kind == "paper":
        return kvp_reference.paper_loss(*models, layer_map, PROMPT[:13], 0.3, **options)
    return kvp_reference.distill_loss(*models, layer_map, PROMPT[:13], CONTINUATION, 0.3, **options)


def assert_gradients(gradients, formula, parameters, prefix, seed, least=2e-4):
    """In a random direction of each parameter."""
    assert gradients.keys() == {prefix + name for name in parameters}
    rng = np.random.default_rng(seed)
    for name in parameters:
        direction, want = slope(formula, parameters, name, rng)
        # float32 gradients over three layers; |x| of the L1 term has kinks that a step of 1e-6 rarely meets.
        got = (gradients[prefix + name] * direction).sum()
        assert got == pytest.approx(want, rel=2e-3, abs=least), name


def slope(formula, parameters, name, rng):
    """(a random direction of one parameter, the derivative of the float64 formula in it by central differences)."""
    direction = rng.standard_normal(parameters[name].shape)
    ends = [formula(parameters | {name: parameters[name] + t * direction}) for t in (1e-6, -1e-6)]
    return direction, (ends[0] - ends[1]) / 2e-6


@pytest.mark.parametrize("family", ["llama", "openelm"])
@pytest.mark.parametrize("mlx_alone", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_of_the_predictor_against_float64(family, mlx_alone, inputs, kind):
    auxiliary, predictor, base = random_pair(family, inputs)
    models = (
        kvp_reference.Family(weights(base), FAMILIES[family]),
        kvp_reference.Family(weights(auxiliary), SMALLER[family]),
    )

    def formula(maps):
        return reference_loss(kind, *models, maps, inputs=inputs)

    with ops.mlx_only() if mlx_alone else pytest.MonkeyPatch.context():
        value, gradients = value_and_gradients(predictor, auxiliary, base, kind)
    maps = double(predictor)
    assert value == pytest.approx(formula(maps), rel=1e-5)
    assert_gradients(gradients, formula, maps, "predictor.", seed=5)


def pruned_config(family, layers):
    config = dict(FAMILIES[family])
    for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
        if name in config:
            config[name] = [config[name][i] for i in layers]
    config["num_transformer_layers" if family == "openelm" else "num_hidden_layers"] = len(layers)
    return config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("layers", "layer_map", "shared"), [([0, 2], [0, 0, 1], 1), ([0, 1], [0, 1, 0], 2)])
def test_loss_and_gradient_with_shared_layers_against_float64(family, inputs, kind, layers, layer_map, shared):
    base = random_model(FAMILIES[family])
    auxiliary = base.pruned(layers)
    shapes = auxiliary.kv_shapes, base.kv_shapes
    predictor = randomise(Predictor(*shapes, layer_map, inputs, auxiliary.hidden_size, shared), 2)
    models = (
        kvp_reference.Family(weights(base), FAMILIES[family]),
        kvp_reference.Family(weights(auxiliary), pruned_config(family, layers)),
    )

    def formula(maps):
        return reference_loss(kind, *models, maps, layer_map=layer_map, inputs=inputs, shared=shared)

    value, gradients = value_and_gradients(predictor, auxiliary, base, kind)
    maps = double(predictor)
    assert len(maps) == 4 * (3 - shared)
    assert value == pytest.approx(formula(maps), rel=1e-5)
    assert_gradients(gradients, formula, maps, "predictor.", seed=7)


def tuned_pair(family, method, form="dense"):
    """(auxiliary of layers 0 and 2 of the base, tuned with random parameters, predictor, base)."""
    base = model_of(family, form)
    auxiliary = base.pruned([0, 2])
    tuned = Tuned(auxiliary, method, rank=3)
    randomise(tuned.modules, 4)
    predictor = Predictor(auxiliary.kv_shapes, base.kv_shapes, LAYER_MAP, "hidden", auxiliary.hidden_size)
    return auxiliary, tuned, randomise(predictor, 2), base


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", "dense"), ("llama", "4 bit"), ("llama", "seeds"), ("openelm", "seeds"), ("qwen3", "4 bit")],
)
@pytest.mark.parametrize("mlx_alone", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_of_the_auxiliary_against_float64(family, form, method, mlx_alone, kind):
    """With the auxiliary's own loss, for every parameter that is trained."""
    auxiliary, tuned, predictor, base = tuned_pair(family, method, form)
    config, prefix = pruned_config(family, (0, 2)), "transformer." if family == "openelm" else "model."
    wholes = {place.path: np.array(dense(place.whole), np.float64) for place in tuned.places if is_matrix(place.whole)}
    maps, of_base, fixed = double(predictor), kvp_reference.Family(weights(base), FAMILIES[family]), weights(auxiliary)

    def formula(parameters):
        given = dict(fixed)
        for name, value in parameters.items():
            path, _, part = name.removeprefix("layers.").rpartition(".")
            if part == "weight":
                given[f"{prefix}layers.{path}.weight"] = value
            elif part == "a":
                given[f"{prefix}layers.{path}.weight"] = wholes[path] + parameters[f"layers.{path}.b"] @ value
        of_auxiliary = kvp_reference.Family(given, config)
        return reference_loss(kind, of_base, of_auxiliary, maps, auxiliary_loss=0.7, inputs="hidden")

    with ops.mlx_only() if mlx_alone else pytest.MonkeyPatch.context():
        value, gradients = value_and_gradients(predictor, auxiliary, base, kind, tuned, 0.7)
    parameters = double(tuned.modules)
    assert value == pytest.approx(formula(parameters), rel=1e-5)
    assert gradients.keys() == {f"predictor.{n}" for n in maps} | {f"auxiliary.{n}" for n in parameters}
    of_auxiliary = {name: value for name, value in gradients.items() if name.startswith("auxiliary.")}
    assert_gradients(of_auxiliary, formula, parameters, "auxiliary.", seed=6, least=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_predictors_give_the_logits_of_the_base(family):
    base = random_model(FAMILIES[family])
    predictor = identity(base.kv_shapes)
    got, _ = predicted_logits(predictor, predictor.read(base, TOKENS, base.new_cache()), base, TOKENS)
    assert_close(got, base(TOKENS, base.new_cache()), "training mode", rtol=0, atol=0)


def fitted(family="llama"):
    auxiliary, _, base = random_pair(family)
    return auxiliary, fit(auxiliary, base, LAYER_MAP, SEQUENCES[:3]).predictor, base


@pytest.mark.parametrize("kind", LOSSES)
def test_training_lowers_the_loss_and_leaves_both_models_alone(kind):
    auxiliary, predictor, base = fitted("openelm")
    before = {name: mx.array(value) for model in (auxiliary, base) for name, value in tree_flatten(model.parameters())}
    tokens = mx.array(SEQUENCES)
    true = truth(base, tokens[:, :-1], kind, 16)
    start = loss(predictor, auxiliary, base, tokens, true, 1 / 3).item()
    settings = Training(steps=40, batch=4, rate=3e-3, warmup=5, loss=kind, continuation=16)
    losses = train(predictor, auxiliary, base, SEQUENCES, settings)
    assert len(losses) == 40
    assert loss(predictor, auxiliary, base, tokens, true, 1 / 3).item() < start - 0.1
    after = {name: value for model in (auxiliary, base) for name, value in tree_flatten(model.parameters())}
    for name, value in before.items():
        assert_close(after[name], value, name, rtol=0, atol=0)


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("kind", LOSSES)
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, method, kind):
    settings, path = Training(12, every=4, warmup=3, loss=kind, continuation=8, seed=6), tmp_path / "state"

    def begin():
        """A new training, from the same start: (its parts, what it trains)."""
        base = random_model(FAMILIES["openelm"])
        auxiliary = base.pruned([0, 2])
        predictor = fit(auxiliary, base, LAYER_MAP, SEQUENCES[:3]).predictor
        tuned = Tuned(auxiliary, method, 2, seed=5) if method else None
        return (predictor, auxiliary, base, SEQUENCES), tuned, Trained(predictor, tuned)

    def run(checkpoint=None, progress=None, settings=settings):
        parts, tuned, trained = begin()
        return train(*parts, settings, checkpoint, progress, tuned), dict(tree_flatten(trained.parameters()))

    def kill(done, total):
        if done == 10:
            raise KeyboardInterrupt

    whole, want = run()
    with pytest.raises(KeyboardInterrupt):
        run(path, kill)
    done = []
    losses, got = run(path, lambda at, _: done.append(at))
    assert done == [9, 10, 11, 12]
    assert losses == whole
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert_close(value, want[name], name, rtol=0, atol=0)
    with pytest.raises(MlxeffError, match=r"state: wanted a checkpoint of this training \(\w+\), got \w+: delete it"):
        run(path, settings=Training(steps=13, every=4, warmup=3, seed=6))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(MlxeffError, match="state: wanted a training's checkpoint, got "):
        run(path)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("method", METHODS)
def test_tuning_lowers_the_loss_and_leaves_the_base_alone(method):
    base = random_model(FAMILIES["openelm"])
    auxiliary = base.pruned([0, 2])
    predictor = fit(auxiliary, base, LAYER_MAP, SEQUENCES).predictor
    before = {name: mx.array(value) for name, value in tree_flatten(base.parameters())}
    tuned = Tuned(auxiliary, method, 4)
    losses = train(predictor, auxiliary, base, SEQUENCES, Training(40, batch=4, rate=3e-3, warmup=5), tuned=tuned)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    for name, value in tree_flatten(base.parameters()):
        assert_close(value, before[name], name, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("method", [None, METHODS[0]])
@pytest.mark.parametrize("consistency", [None, 0.7])
def test_every_weight_of_the_loss_is_the_one_of_the_settings(kind, method, consistency):
    """The loss of the first step, which no step has changed anything before, by its definition."""
    base = random_model(FAMILIES["openelm"])
    auxiliary = base.pruned([0, 2])
    predictor = fit(auxiliary, base, LAYER_MAP, SEQUENCES[:3]).predictor
    tuned = Tuned(auxiliary, method, 2, seed=5) if method else None
    more = {"loss": kind, "continuation": 8, "consistency": consistency, "auxiliary_loss": 0.4}
    settings = Training(1, batch=2, seed=6, **more)
    tokens, continuation = _batch(np.array(SEQUENCES, np.int32), settings, np.array([], np.int64), 0)
    true = truth(base, tokens[:, :-1], kind, continuation)
    usual = {"paper": 1 / 3, "distill": 0}[kind]
    weights = usual if consistency is None else consistency, 0.4 if method else 0
    want = loss(predictor, auxiliary, base, tokens, true, *weights).item()
    [got] = train(predictor, auxiliary, base, SEQUENCES, settings, tuned=tuned)
    assert got == pytest.approx(want, rel=1e-5)


def test_the_prompts_of_every_other_step_end_where_they_shall():
    """Rows count their tokens from 0, so that a piece says where it comes from."""
    rows = np.arange(20 * 40).reshape(20, 40)
    settings = Training(steps=1, batch=50, loss="distill", continuation=9, seed=2)
    ends, lengths, found, continuations = np.arange(30, 800, 90), set(), [[], []], [set(), set()]
    for index in range(60):
        tokens, continuation = _batch(rows, settings, ends, index)
        got = np.array(tokens)
        assert (np.diff(got) == 1).all()
        assert (got == np.array(_batch(rows, settings, ends, index)[0])).all()
        lengths.add(got.shape[1])
        # The first token of the continuation; of the last one in a piece nothing is asked.
        found[index % 2] += got[:, -1 - continuation].tolist()
        continuations[index % 2].add(continuation)
    assert (min(lengths), max(lengths)) == (20, 40)
    assert continuations == [{9}, set(range(1, ANSWER + 1))]
    assert set(found[1]) == set(ends.tolist())
    assert np.isin(found[0], ends).mean() < 0.03  # one in 90
    tokens, continuation = _batch(rows, settings, ends[:0], 1)
    assert not np.isin(np.array(tokens)[:, -1 - continuation], ends).all()
    paper, continuation = _batch(rows, Training(steps=1, batch=50, seed=2), ends, 0)
    assert (paper.shape, continuation) == ((50, 40), 0)
    assert (np.array(paper)[:, 0] % 40 == 0).all()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss": "l2"}, "wanted a loss of paper, distill, got 'l2'"),
        ({"loss": "distill", "continuation": 0}, "wanted a continuation of 1 token or more, got 0"),
        ({"loss": "distill", "continuation": 38}, "wanted sequences of at least 41 tokens, got 40"),
    ],
)
def test_settings_that_are_not(settings, complaint):
    auxiliary, predictor, base = fitted()
    with pytest.raises(MlxeffError, match=complaint):
        train(predictor, auxiliary, base, SEQUENCES, Training(steps=5, **settings))


def test_a_loss_that_is_not_finite_stops():
    auxiliary, predictor, base = fitted()
    with pytest.raises(MlxeffError, match="wanted a finite loss, got nan: lower the learning rate"):
        train(predictor, auxiliary, base, SEQUENCES, Training(steps=5, rate=float("nan")))


def test_sequences_too_short():
    auxiliary, predictor, base = fitted()
    with pytest.raises(MlxeffError, match="training: wanted sequences of at least 2 tokens, got 1"):
        train(predictor, auxiliary, base, [[1], [2]], Training(steps=1))
