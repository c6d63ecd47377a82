"""Prefill with predicted keys and values: exact oracles, the float64 formula, keep, refine, any linear layers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import kvp_reference
from helpers import assert_close
from mlxeff import kernels, ops
from mlxeff.assembly.model import build_model
from mlxeff.decode import decode, prefill
from mlxeff.errors import MlxeffError
from mlxeff.kernels import device
from mlxeff.kvprediction import KvPrediction, Predictor, predict
from mlxeff.kvprediction.flops import parameters
from mlxeff.kvprediction.predict import Refinement
from mlxeff.kvprediction.predictor import INPUTS, identity, merge_heads, quantization, quantize
from mlxeff.running import EXACT, RunOptions
from mlxeff.sampling import make_sampler

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 200,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
OPENELM = {
    "model_type": "openelm",
    "num_transformer_layers": 3,
    "model_dim": 64,
    "head_dim": 16,
    "num_query_heads": [4, 8, 8],
    "num_kv_heads": [1, 2, 2],
    "ffn_multipliers": [0.5, 1.0, 2.0],
    "ffn_dim_divisor": 32,
    "rope_freq_constant": 10000,
    "vocab_size": 200,
}
SMALLER = {
    "llama": LLAMA | {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
    "openelm": OPENELM
    | {"num_transformer_layers": 2, "num_query_heads": [4, 4], "num_kv_heads": [1, 1], "ffn_multipliers": [1.0, 1.0]},
}
FAMILIES = {"llama": LLAMA, "qwen3": QWEN3, "openelm": OPENELM}
PROMPT = np.random.default_rng(3).integers(0, 200, 37).tolist()


def randomise(module, seed):
    """Every weight random, norms and biases included, so that one that is left out shows."""
    mx.random.seed(seed)
    for name, value in tree_flatten(module.parameters()):
        noise = mx.random.normal(value.shape) * (0.3 if "norm" in name else 0.2)
        module.load_weights([(name, 1 + noise if "norm" in name else noise)], strict=False)
    mx.eval(module.parameters())
    return module


def random_model(config, seed=0):
    return randomise(build_model(config), seed)


def random_pair(family, inputs="own"):
    """(auxiliary, predictor, base) with a smaller model of another shape."""
    base, auxiliary = random_model(FAMILIES[family]), random_model(SMALLER[family], 1)
    shapes = auxiliary.kv_shapes, base.kv_shapes
    return auxiliary, randomise(Predictor(*shapes, [0, 0, 1], inputs, auxiliary.hidden_size), 2), base


def caches_close(got, want, what, **tolerance):
    for i, (a, b) in enumerate(zip(got.layers, want.layers, strict=True)):
        for name, mine, theirs in zip(("keys", "values"), a.state(), b.state(), strict=True):
            assert_close(mine, theirs, f"{what}: {name} of layer {i}", **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mlx_alone", [True, False])
def test_base_as_its_own_auxiliary_with_identity_predictors_is_the_base(family, mlx_alone):
    """Exactly: the same operations on the same numbers, in prefill and in decoding."""
    with ops.mlx_only() if mlx_alone else pytest.MonkeyPatch.context():
        base, tokens = random_model(FAMILIES[family]), mx.array([PROMPT])
        want_cache, got_cache = base.new_cache(), base.new_cache()
        base.last_logits(tokens[:, :-1], want_cache)
        want = base.last_logits(tokens[:, -1:], want_cache)
        got = predict(base, identity(base.kv_shapes), base, tokens, got_cache)
        assert_close(got, want, "first logits", rtol=0, atol=0)
        caches_close(got_cache, want_cache, "cache", rtol=0, atol=0)
        for token in (5, 77, 130):
            want, got = (base.last_logits(mx.array([[token]]), cache) for cache in (want_cache, got_cache))
            assert_close(got, want, f"logits after {token}", rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "openelm"])
@pytest.mark.parametrize("mlx_alone", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
def test_against_the_formula_in_float64(family, mlx_alone, inputs):
    auxiliary, predictor, base = random_pair(family, inputs)

    def double(module):
        return {name: np.array(value, dtype=np.float64) for name, value in tree_flatten(module.parameters())}

    models = [
        kvp_reference.Family(double(model), config)
        for model, config in ((base, FAMILIES[family]), (auxiliary, SMALLER[family]))
    ]
    want = kvp_reference.predicted_logits(*models, double(predictor), [0, 0, 1], PROMPT, inputs)
    with ops.mlx_only() if mlx_alone else pytest.MonkeyPatch.context():
        got = predict(auxiliary, predictor, base, mx.array(PROMPT), base.new_cache())
    # Three layers and the predictor: the rounding of float32 adds up to some units of the table's.
    assert_close(got[0], want, family, rtol=2.0**-15)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("layers", "layer_map", "shared"), [([0, 2], [0, 0, 1], 1), ([0, 1], [0, 1, 1], 2)])
def test_shared_layers_hold_the_keys_and_values_of_the_base(fused, family, inputs, layers, layer_map, shared):
    """In chunks and after sinks, to rounding; the other layers hold what maps make of the same readings."""
    base = random_model(FAMILIES[family])
    auxiliary = base.pruned(layers)
    if fused and not (kernels.device() == "cpu" and base.use_native() and auxiliary.use_native()):
        pytest.skip("no native kernels here")
    shapes = auxiliary.kv_shapes, base.kv_shapes
    whole = randomise(Predictor(*shapes, layer_map, inputs, auxiliary.hidden_size), 2)
    predictor = Predictor(*shapes, layer_map, inputs, auxiliary.hidden_size, shared)
    predictor.key_maps, predictor.value_maps = whole.key_maps[shared:], whole.value_maps[shared:]
    cache, plain, true = base.new_cache(), base.new_cache(), base.new_cache()
    tokens = mx.array(PROMPT)
    predict(auxiliary, predictor.join(), base, tokens, cache, step_size=10, keep=5, sinks=4)
    predict(auxiliary, whole, base, tokens, plain, step_size=10, keep=5, sinks=4)
    prefill(base, true, tokens, 512)
    predicted = slice(4, len(PROMPT) - 5)
    for i, layer in enumerate(cache.layers):
        wanted = (true if i < shared else plain).layers[i].state()
        for mine, theirs in zip(layer.state(), wanted, strict=True):
            assert_close(mine[:, :, predicted], theirs[:, :, predicted], f"layer {i}", rtol=2.0**-16)


def test_with_all_layers_shared_the_base_is_its_own_auxiliary():
    base, tokens = random_model(FAMILIES["openelm"]), mx.array(PROMPT)
    predictor = Predictor(base.kv_shapes, base.kv_shapes, [0, 1, 2], "hidden", base.hidden_size, 3)
    assert not tree_flatten(predictor.parameters())
    got = predict(base, predictor.join(), base, tokens, base.new_cache())
    assert_close(got, base.last_logits(tokens[None], base.new_cache()), "logits", rtol=2.0**-16)


@pytest.mark.parametrize("step", [1, 7, 36, 512])
def test_chunks_give_the_same(step):
    auxiliary, predictor, base = random_pair("openelm")
    cache, whole = base.new_cache(), base.new_cache()
    want = predict(auxiliary, predictor, base, mx.array(PROMPT), whole)
    got = predict(auxiliary, predictor, base, mx.array(PROMPT), cache, step_size=step)
    # Products of few and of many rows add up in different orders.
    assert_close(got, want, "logits", rtol=2.0**-15)
    caches_close(cache, whole, "cache", rtol=2.0**-15)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_chunks_that_lie_in_the_first_tokens(fused, step):
    auxiliary, predictor, base = random_pair("openelm")
    if fused and not (kernels.device() == "cpu" and base.use_native() and auxiliary.use_native()):
        pytest.skip("no native kernels here")
    cache, whole = base.new_cache(), base.new_cache()
    want = predict(auxiliary, predictor, base, mx.array(PROMPT), whole, keep=5, sinks=4)
    got = predict(auxiliary, predictor, base, mx.array(PROMPT), cache, step_size=step, keep=5, sinks=4)
    assert_close(got, want, "logits", rtol=2.0**-15)
    assert cache.length == whole.length == len(PROMPT)


@pytest.mark.usefixtures("mlx_only")  # the native kernels compute in float32
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_predicted_keys_and_values_have_the_bases_type(dtype):
    """Whatever the type of the maps: otherwise all that follows would be computed in a wider one."""
    auxiliary, predictor, base = random_pair("llama")
    base.set_dtype(dtype)
    cache, own = base.new_cache(), base.new_cache()
    want = base.last_logits(mx.array([PROMPT]), own).dtype
    assert predict(auxiliary, predictor, base, mx.array(PROMPT), cache).dtype == want
    assert [array.dtype for array in cache.arrays()] == [array.dtype for array in own.arrays()]


def test_a_batch_is_its_sequences():
    auxiliary, predictor, base = random_pair("llama")
    tokens = mx.array(np.random.default_rng(8).integers(0, 200, (3, 20)))
    got = predict(auxiliary, predictor, base, tokens, base.new_cache(), keep=3, sinks=2)
    want = [predict(auxiliary, predictor, base, row, base.new_cache(), keep=3, sinks=2) for row in tokens]
    assert_close(got, mx.concatenate(want), "batch", rtol=2.0**-16)


def test_the_auxiliary_reads_all_but_the_last_token():
    auxiliary, predictor, base = random_pair("llama")
    calls = []

    class Spy:
        new_cache = staticmethod(auxiliary.new_cache)

        @staticmethod
        def layer_states(tokens, cache, inputs, pairs, options):
            calls.append(tokens.tolist())
            return auxiliary.layer_states(tokens, cache, inputs, pairs, options)

    predict(Spy, predictor, base, mx.array(PROMPT), base.new_cache(), step_size=20)
    assert calls == [[PROMPT[:20]], [PROMPT[20:36]]]


@pytest.mark.parametrize("family", ["llama", "openelm"])
def test_one_token_is_the_base_alone(family):
    auxiliary, predictor, base = random_pair(family)
    got = predict(auxiliary, predictor, base, mx.array(PROMPT[:1]), base.new_cache())
    assert_close(got, base.last_logits(mx.array([PROMPT[:1]]), base.new_cache()), "one token", rtol=0, atol=0)


@pytest.mark.parametrize("keep", [len(PROMPT), len(PROMPT) + 9])
def test_all_kept_is_the_base_exactly(keep):
    auxiliary, predictor, base = random_pair("openelm")
    cache, want_cache = base.new_cache(), base.new_cache()
    got = predict(auxiliary, predictor, base, mx.array(PROMPT), cache, keep=keep, sinks=4)
    want = prefill(base, want_cache, mx.array(PROMPT), 512)
    assert_close(got, want, "all kept", rtol=0, atol=0)
    caches_close(cache, want_cache, "all kept", rtol=0, atol=0)


def test_kept_tokens_and_sinks_are_computed_the_rest_is_predicted():
    auxiliary, predictor, base = random_pair("llama")
    cache, true, plain = base.new_cache(), base.new_cache(), base.new_cache()
    predict(auxiliary, predictor, base, mx.array(PROMPT), cache, keep=10, sinks=4)
    predict(auxiliary, predictor, base, mx.array(PROMPT), plain)
    prefill(base, true, mx.array(PROMPT), 512)
    assert cache.length == len(PROMPT)
    for mine, computed, predicted in zip(cache.layers, true.layers, plain.layers, strict=True):
        for a, b, c in zip(mine.state(), computed.state(), predicted.state(), strict=True):
            assert_close(a[:, :, :4], b[:, :, :4], "sinks", rtol=2.0**-16)
            assert_close(a[:, :, 4:27], c[:, :, 4:27], "predicted", rtol=2.0**-16)
            assert mx.abs(a[:, :, 4:27] - b[:, :, 4:27]).max() > 0.01
    first = cache.layers[0].state(), true.layers[0].state()  # layer 0 reads no prediction: its kept tokens are exact
    for a, b in zip(*first, strict=True):
        assert_close(a[:, :, 27:], b[:, :, 27:], "kept tokens of layer 0", rtol=2.0**-16)


@pytest.mark.parametrize("arguments", [{"keep": 0}, {"held": 3}])
def test_bad_arguments(arguments):
    auxiliary, predictor, base = random_pair("llama")
    cache = base.new_cache()
    if arguments.pop("held", 0):
        base.last_logits(mx.array([[1, 2, 3]]), cache)
    with pytest.raises(MlxeffError, match="wanted an empty cache and keep"):
        predict(auxiliary, predictor, base, mx.array(PROMPT), cache, **arguments)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [0, 4])
def test_refinement_ends_in_the_cache_of_the_base(fused, first):
    auxiliary, predictor, base = random_pair("llama")
    if fused and not (kernels.device() == "cpu" and base.use_native()):
        pytest.skip("no native kernels here")
    cache, want = base.new_cache(), base.new_cache()
    predict(auxiliary, predictor, base, mx.array(PROMPT), cache, sinks=first)
    tokens, refinement = list(PROMPT), Refinement(base, cache, first, step_size=10)
    steps = 0
    for token in (9, 8, 7, 6, 5, 4):
        base.last_logits(mx.array([[token]]), cache)
        tokens.append(token)
        steps += not refinement.done
        refinement.step(tokens)
        assert cache.length == len(tokens)
    assert refinement.done
    assert steps == {0: 5, 4: 4}[first]  # 37 tokens and those of the meantime, 10 at a time
    prefill(base, want, mx.array(tokens), 512)
    caches_close(cache, want, "refined", rtol=2.0**-14)


@pytest.mark.parametrize("refine", [False, True])
def test_refined_decoding_goes_on_as_the_base_would(refine):
    """Whatever was decoded from predictions, once they are refined the greedy tokens are the base's own. On a GPU a
    step is launched before the refinement."""
    ahead = int(device() == "gpu")
    auxiliary, predictor, base = random_pair("llama")
    pair = KvPrediction(auxiliary, predictor, "pair", refine=refine)
    cache, tokens = base.new_cache(), list(PROMPT)
    logits = pair.read(base, cache, mx.array(PROMPT), 512)
    for step in pair.accompany(decode(base, cache, logits, make_sampler(), max_tokens=30), PROMPT):
        tokens.append(step.token)
    assert pair.predicted_tokens == 36
    assert pair.refined_tokens == (len(PROMPT) + ahead if refine else 0)
    late = base(mx.array([tokens]), base.new_cache())[0].argmax(-1).tolist()
    same = [late[i] == tokens[i + 1] for i in range(len(PROMPT) + ahead, len(tokens) - 1)]
    assert all(same) == refine


def test_a_cache_that_holds_tokens_is_continued_by_the_base(caplog):
    auxiliary, predictor, base = random_pair("llama")
    pair, cache = KvPrediction(auxiliary, predictor, "pair"), base.new_cache()
    prefill(base, cache, mx.array(PROMPT[:5]), 512)
    got = pair.read(base, cache, mx.array(PROMPT[5:]), 512)
    assert_close(got, prefill(base, base.new_cache(), mx.array(PROMPT), 512), "continued", rtol=2.0**-15)
    assert "not used: the cache holds 5 tokens already" in caplog.text


@pytest.mark.parametrize("family", ["llama", "openelm"])
def test_quantised_linear_layers(family):
    """8 bit on both sides and in the predictor: near the same with the weights made dense."""
    import mlx.nn as nn

    auxiliary, predictor, base = random_pair(family)
    plain = predict(auxiliary, predictor, base, mx.array(PROMPT), base.new_cache())
    for module in (auxiliary, base, predictor):
        nn.quantize(
            module, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
        )
    got = predict(auxiliary, predictor, base, mx.array(PROMPT), base.new_cache())
    assert mx.abs(got - plain).max() > 0
    # 8 bits of a range of six sigma: 1/40 sigma a weight, over three layers.
    assert_close(got, plain, "8 bit", rtol=0.15)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_the_fused_base_continues_a_predicted_cache(kv_dtype):
    auxiliary, predictor, base = random_pair("openelm")
    want_cache = base.new_cache()
    want = predict(auxiliary, predictor, base, mx.array(PROMPT), want_cache)
    if kernels.device() != "cpu" or not base.use_native():
        pytest.skip("no native kernels here")
    options = RunOptions(kv=kv_dtype)
    cache = base.new_cache(options.kv)
    got = predict(auxiliary, predictor, base, mx.array(PROMPT), cache, options=options)
    assert str(cache.layers[0].keys.dtype).endswith(kv_dtype)
    tolerance = 2.0**-14 if kv_dtype == "float32" else 2.0**-4  # bfloat16: 2^-8 a value, over sharp random attention
    assert_close(got, want, "first logits", rtol=tolerance)
    token = mx.array([[3]])
    assert_close(
        base.last_logits(token, cache, options),
        base.plain.forward(token, want_cache, EXACT, last=True),
        "next",
        rtol=tolerance,
    )


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("family", ["llama", "openelm"])
def test_the_fused_auxiliary_predicts_the_same(family, inputs):
    auxiliary, predictor, base = random_pair(family, inputs)
    cache, want_cache = base.new_cache(), base.new_cache()
    want = predict(auxiliary, predictor, base, mx.array(PROMPT), want_cache, step_size=20)
    if kernels.device() != "cpu" or not auxiliary.use_native():
        pytest.skip("no native kernels here")
    got = predict(auxiliary, predictor, base, mx.array(PROMPT), cache, step_size=20)
    # Fused or not, float32 throughout: the order of sums differs.
    assert_close(got, want, "first logits", rtol=2.0**-15)
    caches_close(cache, want_cache, "cache", rtol=2.0**-15)


def test_hidden_states_give_the_same_keys_and_values_where_the_auxiliary_is_the_base():
    """Maps that are the base's own projections: what they predict is what the base computes."""
    base = random_model(LLAMA)
    predictor = Predictor(base.kv_shapes, base.kv_shapes, [0, 1, 2], "hidden", base.hidden_size)
    for layer, key_map, value_map in zip(base.layers, predictor.key_maps, predictor.value_maps, strict=True):
        key_map.weight, value_map.weight = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
        key_map.bias, value_map.bias = mx.zeros(32), mx.zeros(32)
    got = predict(base, predictor, base, mx.array(PROMPT), base.new_cache())
    assert_close(got, base.last_logits(mx.array([PROMPT]), base.new_cache()), "logits", rtol=2.0**-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_share_their_weights(family):
    base = random_model(FAMILIES[family])
    pruned = base.pruned([0, 2])
    assert [layer is base.layers[i] for layer, i in zip(pruned.layers, (0, 2), strict=True)] == [True, True]
    assert pruned.kv_shapes == [base.kv_shapes[0], base.kv_shapes[2]]
    x = base.embed(mx.array([PROMPT]))
    for i in (0, 2):
        x = base.layers[i](x, base.new_cache().layers[i])
    norm = base.transformer.norm if family == "openelm" else base.model.norm
    assert_close(pruned(mx.array([PROMPT]), pruned.new_cache()), base.head(norm(x)), "pruned", rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer_map", "complaint"),
    [
        ([0, 1], "layer map: wanted an auxiliary layer for each of 3 base layers, got 2"),
        ([0, 1, 2], "layer map: base layer 2: wanted an auxiliary layer 0 to 1, got 2"),
        ([0, -1, 1], "layer map: base layer 1: wanted an auxiliary layer 0 to 1, got -1"),
        ([0, "1", 1], "layer map: base layer 1: wanted an auxiliary layer 0 to 1, got '1'"),
        ([0, True, 1], "layer map: base layer 1: wanted an auxiliary layer 0 to 1, got True"),
    ],
)
def test_layer_maps_that_do_not_fit(layer_map, complaint):
    with pytest.raises(MlxeffError) as caught:
        Predictor([(2, 16)] * 2, [(2, 16)] * 3, layer_map)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("family", ["llama", "openelm"])
def test_joined_maps_predict_the_same_until_one_changes(family, inputs):
    auxiliary, predictor, _ = random_pair(family, inputs)
    read = predictor.read(auxiliary, mx.array([PROMPT]), auxiliary.new_cache())
    before = [np.array(value) for _, value in tree_flatten(predictor.parameters())]
    want = predictor(read)
    assert len(predictor.join()._joined.matrices) == (2 if inputs == "hidden" else 4)  # layers 0, 0, 1 are read
    for (name, value), old in zip(tree_flatten(predictor.parameters()), before, strict=True):
        assert_close(value, old, name, rtol=0, atol=0)
    for pair, other in zip(predictor(read), want, strict=True):
        for mine, theirs in zip(pair, other, strict=True):
            assert_close(mine, theirs, "joined", rtol=2.0**-18)  # sums in the same order, blocks of another size
    predictor.value_maps[1].weight = mx.zeros_like(predictor.value_maps[1].weight)
    got = predictor(read)[1][1]
    want = predictor.value_maps[1].bias.reshape(got.shape[1], 1, -1)
    assert_close(got, mx.broadcast_to(want[None], got.shape), "changed", rtol=0, atol=0)


QUANTISABLE = [("llama", "own"), ("llama", "hidden"), ("openelm", "hidden")]  # what maps read is a multiple of 32


def quantised_pair(family, inputs, bits):
    """(auxiliary, dense predictor, the same quantised)."""
    base = random_model(FAMILIES[family])
    auxiliary = base.pruned([0, 2])
    dense, rounded = (
        randomise(Predictor(auxiliary.kv_shapes, base.kv_shapes, [0, 0, 1], inputs, base.hidden_size), 2)
        for _ in range(2)
    )
    scheme = quantization(bits, [each.weight.shape[1] for each in dense.key_maps])
    assert scheme == {"group_size": 64 if inputs == "hidden" else 32, "bits": bits, "mode": "affine"}
    quantize(rounded, scheme)
    return auxiliary, dense, rounded


def pairs_and_bound(got, want, read, rounded, step):
    """(got, want, bound) of keys and values of each base layer, (tokens, G·E); `step(rows, map)` gives the bound, for
    rows (tokens, groups, group size)."""
    for i, j in enumerate(rounded.layer_map):
        for kind, each in enumerate(rounded.maps[i]):
            rows = read.features[j][kind][0].reshape(len(PROMPT), -1, each.group_size)
            mine, theirs = (merge_heads(pairs[i][kind])[0] for pairs in (got, want))
            yield mine, theirs, step(rows, each)


@pytest.mark.parametrize(("family", "inputs"), QUANTISABLE)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_maps_are_off_by_the_rounding(family, inputs, bits):
    """Half a step of the scale a weight, and at the ends of a group one more: the scale is chosen so that 0 is a
    value."""
    auxiliary, dense, rounded = quantised_pair(family, inputs, bits)
    read = dense.read(auxiliary, mx.array([PROMPT]), auxiliary.new_cache())
    found = pairs_and_bound(
        rounded(read), dense(read), read, rounded, lambda rows, w: mx.abs(rows).sum(-1) @ (1.5 * mx.abs(w.scales)).T
    )
    for got, want, bound in found:
        assert (mx.abs(got - want) <= bound).all()
        assert mx.abs(got - want).max() > bound.max() / 100


@pytest.mark.parametrize(("family", "inputs"), QUANTISABLE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("compute", ops.COMPUTE)
def test_joined_quantised_maps_are_the_same_to_the_bit(family, inputs, bits, compute):
    auxiliary, _, rounded = quantised_pair(family, inputs, bits)
    rounded.compute = compute
    read = rounded.read(auxiliary, mx.array([PROMPT]), auxiliary.new_cache())
    want, count = rounded(read), parameters(rounded)
    assert len(rounded.join()._joined.matrices) == (2 if inputs == "hidden" else 4)
    assert parameters(rounded) == count
    for pair, other in zip(rounded(read), want, strict=True):
        for mine, theirs in zip(pair, other, strict=True):
            assert_close(mine, theirs, "joined", rtol=0, atol=0)
    changed = rounded.value_maps[1]
    changed.scales, changed.biases = mx.zeros_like(changed.scales), mx.zeros_like(changed.biases)
    got = rounded(read)[1][1]
    want = changed.bias.reshape(got.shape[1], 1, -1)
    assert_close(got, mx.broadcast_to(want[None], got.shape), "changed", rtol=0, atol=0)


@pytest.mark.parametrize(("family", "inputs"), QUANTISABLE)
@pytest.mark.parametrize("joined", [False, True])
def test_int8_rounds_what_quantised_maps_read_and_nothing_else(family, inputs, joined):
    """By half a step at most, a step being 1/127 of the largest number of a group."""
    if not ops.native_for():
        pytest.skip("no native kernels here")
    auxiliary, dense, rounded = quantised_pair(family, inputs, 8)
    if joined:
        dense.join(), rounded.join()
    read = dense.read(auxiliary, mx.array([PROMPT]), auxiliary.new_cache())
    exact, of_dense = rounded(read), dense(read)

    def step(rows, w):
        weight = mx.abs(mx.dequantize(w.weight, w.scales, w.biases, w.group_size, w.bits))
        return mx.abs(rows).max(-1) / 254 @ weight.reshape(weight.shape[0], -1, w.group_size).sum(-1).T

    for got, want, bound in pairs_and_bound(rounded(read, "int8"), exact, read, rounded, step):
        assert (mx.abs(got - want) <= 1.0001 * bound).all()
        assert mx.abs(got - want).max() > bound.max() / 100
    for pair, other in zip(dense(read, "int8"), of_dense, strict=True):
        for mine, theirs in zip(pair, other, strict=True):
            assert_close(mine, theirs, "dense", rtol=0, atol=0)


def test_widths_that_no_group_divides():
    with pytest.raises(MlxeffError, match=r"maps of 8 bits: wanted inputs of a multiple of 32, got \[48, 64\]"):
        quantization(8, [64, 48, 64])
    with pytest.raises(MlxeffError, match=r"quantization: wanted inputs of a multiple of 64, got \[32\]"):
        quantize(Predictor([(2, 16)], [(2, 16)], [0]), {"group_size": 64, "bits": 8, "mode": "affine"})


@pytest.mark.parametrize(
    ("base", "layer_map", "shared"),
    [([(2, 16)] * 3, [1, 1, 1], 1), ([(2, 16)] * 3, [0, 0, 1], 2), ([(1, 16)] * 3, [0, 1, 1], 1)],
)
def test_shared_layers_that_are_not(base, layer_map, shared):
    with pytest.raises(MlxeffError, match=f"predictor: wanted {shared} shared layers that read themselves, got "):
        Predictor([(2, 16)] * 2, base, layer_map, shared=shared)


def test_inputs_that_are_unknown():
    with pytest.raises(MlxeffError, match="predictor: wanted inputs of own, hidden, got 'all'"):
        Predictor([(2, 16)], [(2, 16)], [0], "all")
