"""The fused forward pass of the native CPU kernels against the unfused model, and when it applies."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from helpers import assert_close
from mlxeff import kernels
from mlxeff.assembly.model import build_model
from mlxeff.cache import KVCache, LayerCache
from mlxeff.decode import decode, prefill
from mlxeff.errors import MlxeffError
from mlxeff.models.openelm import make_divisible
from mlxeff.running import Ran, RunOptions, Tally
from mlxeff.sampling import make_sampler
from mlxeff.seedlm.linear import SeedModule
from seedlm_models import randomise, rounds_to_int8, with_seeds
from tiny_model import quantise_folder, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
native, reason = kernels.native()
pytestmark = [
    pytest.mark.skipif(native is None or kernels.device() != "cpu", reason=reason or "the device is a GPU"),
    pytest.mark.usefixtures("mlx_only"),  # of the unfused model
]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "quantization": {"group_size": 32, "bits": 4},
}
DENSE = LLAMA | {"quantization": None}
OPENELM = {
    "model_type": "openelm",
    "num_transformer_layers": 3,
    "model_dim": 128,
    "head_dim": 32,
    "num_query_heads": [4, 8, 8],
    "num_kv_heads": [1, 2, 2],
    "ffn_multipliers": [0.5, 1.0, 2.0],
    "ffn_dim_divisor": 32,
    "vocab_size": 300,
    "quantization": {"group_size": 32, "bits": 8},
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "heads of 80": LLAMA | {"head_dim": 80, "num_attention_heads": 6},
    "mha": LLAMA | {"num_key_value_heads": 4},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "window": LLAMA | {"model_type": "mistral", "sliding_window": 20},
    "llama3": LLAMA | {"rope_scaling": LLAMA3},
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 64},
    "8 bit": LLAMA | {"quantization": {"group_size": 64, "bits": 8}, "intermediate_size": 192},
    "3 bit": LLAMA | {"quantization": {"group_size": 32, "bits": 3}},
    "mixed": LLAMA | {"quantization": {"group_size": 32, "bits": 4, "model.layers.1.self_attn.k_proj": {
        "group_size": 64, "bits": 6}, "model.embed_tokens": {"group_size": 32, "bits": 8}}},
    "dense": DENSE,
    "dense untied, embedding quantised": LLAMA | {"quantization": {"group_size": 32, "bits": 8, **{
        f"model.layers.{i}.{part}": False for i in range(3) for part in (
            "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")}}},
    "small": LLAMA | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
    "openelm": OPENELM,
    "openelm dense": OPENELM | {"quantization": None},
    "openelm untied": OPENELM | {"share_input_output_layers": False},
    "seeds 4": with_seeds(DENSE, "4"),
    "seeds 3, quantised head": with_seeds(LLAMA, "3", only="layers"),
    "seeds 4.5, biases, quantised attention": with_seeds(
        LLAMA | {"attention_bias": True, "mlp_bias": True}, "4.5", only="mlp"),
    "seeds 4.5, embedding too": with_seeds(DENSE | {"tie_word_embeddings": True}, "4.5", embeddings=True),
    "openelm seeds 3": with_seeds(OPENELM, "3"),
    "openelm seeds 4, half of them": with_seeds(OPENELM, "4", only="attn"),
}  # fmt: skip


def random_quantised(config, seed=0):
    """A model with random weights; queries and keys large enough for sharp attention."""
    mx.random.seed(seed)
    model, rng = build_model(config), np.random.default_rng(seed)
    for _path, module in model.named_modules():
        if isinstance(module, SeedModule):
            randomise(module, rng)
        elif isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            rows, columns = module.scales.shape[0], module.scales.shape[1] * module.group_size
            weight = mx.random.normal((rows, columns)) * 0.15
            module.weight, module.scales, module.biases = mx.quantize(weight, module.group_size, module.bits)
            if "bias" in module:
                module.bias = mx.random.normal((rows,)) * 0.5
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = mx.random.normal(module.weight.shape) * 0.15
        elif isinstance(module, nn.RMSNorm):
            module.weight = 1 + 0.2 * mx.random.normal(module.weight.shape)
    mx.eval(model.parameters())
    return model


def pair(name):
    """(the model unfused, the same fused)."""
    plain, fused = random_quantised(MODELS[name]), random_quantised(MODELS[name])
    assert fused.use_native(), name
    return plain, fused


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_unfused_model(name):
    plain, fused = pair(name)
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (1, 70)))
    want = plain(tokens, plain.new_cache())
    got = fused(tokens, fused.new_cache())
    # Activations pass through three layers: float32 rounding grows with the depth, to some units of the table's.
    assert_close(got, want, f"{name}: one shot", rtol=2.0**-15)

    caches = plain.new_cache(), fused.new_cache()
    for start, stop in ((0, 1), (1, 18), (18, 19), (19, 52), (52, 53), (53, 70)):
        wants, gots = (model(tokens[:, start:stop], cache) for model, cache in zip((plain, fused), caches))
        assert_close(gots, wants, f"{name}: {start} to {stop}", rtol=2.0**-15)
        assert_close(gots, got[:, start:stop], f"{name}: chunks and one shot, {start} to {stop}", rtol=2.0**-15)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("read", ["pairs", "inputs"])
def test_what_the_layers_read_equals_the_unfused_model(name, read):
    plain, fused = pair(name)
    tokens = mx.array(np.random.default_rng(2).integers(0, 300, (2, 40)))
    caches = plain.new_cache(), fused.new_cache()
    for start, stop in ((0, 1), (1, 18), (18, 40)):
        part = tokens[:, start:stop]
        every = {read: range(len(plain.layers))}
        states = (model.layer_states(part, cache, **every) for model, cache in zip((plain, fused), caches))
        wants, gots = (each[read == "pairs"] for each in states)
        assert len(gots) == len(wants) == len(plain.layers)
        for i, (want, got) in enumerate(zip(wants, gots)):
            parts = zip("kv", got, want) if read == "pairs" else [("x", got, want)]
            for part, mine, theirs in parts:
                # As above: three layers of float32 roundings.
                assert_close(mine, theirs, f"{name}: {part} of layer {i}, {start} to {stop}", rtol=2.0**-15)
        assert [layer.length for layer in caches[1].layers] == [stop] * (len(plain.layers) - 1) + [0]
    for want, got in zip(caches[0].layers[:-1], caches[1].layers[:-1]):
        for mine, theirs in zip(got.state(), want.state()):
            assert_close(mine, theirs, "cache", rtol=2.0**-15)


@pytest.mark.parametrize(("inputs", "pairs"), [((1,), (0, 1)), ((0, 2), ()), ((), (2,)), ((0, 1, 2), (1,))])
@pytest.mark.parametrize("name", ["llama", "openelm"])
def test_some_layers_are_read_alone_or_together(name, inputs, pairs):
    plain, fused = pair(name)
    tokens = mx.array(np.random.default_rng(2).integers(0, 300, (2, 20)))
    wants, gots = (model.layer_states(tokens, model.new_cache(), inputs, pairs) for model in (plain, fused))
    whole = fused.layer_states(tokens, fused.new_cache(), range(3), range(3))
    for layers, want, got, all_of in zip((inputs, pairs), wants, gots, whole, strict=True):
        assert len(got) == len(want) == len(layers)
        for i, mine, theirs in zip(layers, got, want, strict=True):
            for a, b, c in zip(*(each if isinstance(each, tuple) else (each,) for each in (mine, theirs, all_of[i]))):
                assert_close(a, b, f"layer {i}", rtol=2.0**-15)
                assert_close(a, c, f"layer {i} of all", rtol=0, atol=0)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 3), (-1,)])
def test_layers_to_read_that_are_not(layers):
    _, fused = pair("llama")
    with pytest.raises(ValueError, match="decoder: wanted"):
        fused.layer_states(mx.array([[1, 2]]), fused.new_cache(), (), layers)


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "heads of 80", "yarn", "qwen3", "small", "openelm"])
def test_keys_and_values_that_are_given_are_appended(name, kv_dtype):
    plain, fused = pair(name)
    rng, caches = np.random.default_rng(3), (plain.new_cache(), fused.new_cache(kv_dtype))
    for new in (1, 18, 300):  # of two sequences; the last chunk needs larger buffers
        rows = [mx.array(rng.standard_normal((2, new, 2, g, e)), mx.float32) for g, e in plain.kv_shapes]
        pairs = [tuple(x[:, :, kind].transpose(0, 2, 1, 3) for kind in range(2)) for x in rows]  # not contiguous
        before = [mx.array(x) for layer in caches[1].layers if layer.length for x in layer.state()]
        for model, cache in zip((plain, fused), caches):
            model.append_kv(pairs, cache)
        after = [x[:, :, : x.shape[2] - new] for layer in caches[1].layers for x in layer.state()]
        assert all(mx.array_equal(x, y) for x, y in zip(before, after)), "what was held stays"
    bound = {"float32": 2.0**-13, "float16": 2.0**-8, "bfloat16": 2.0**-5}[kv_dtype]  # MLX rounds angles to float32
    for want, got in zip(caches[0].layers, caches[1].layers):
        assert got.length == 319
        for mine, theirs in zip(got.state(), want.state()):
            assert str(mine.dtype).endswith(kv_dtype)
            assert_close(mine, theirs, "cache", rtol=0, atol=bound)


def test_a_cache_that_somebody_else_holds_is_not_written_to():
    _, fused = pair("llama")
    cache = fused.new_cache()
    given = [(mx.ones((1, g, 4, e)), mx.ones((1, g, 4, e))) for g, e in fused.kv_shapes]
    fused.append_kv(given, cache)
    mx.eval(cache.arrays())
    held, copies = cache.arrays(), [mx.array(np.array(x)) for x in cache.arrays()]
    fused.append_kv(given, cache)
    mx.eval(cache.arrays())
    assert all(mx.array_equal(x, y) for x, y in zip(held, copies, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 4, 32), (1, 2, 4, 16), (1, 2, 0, 32)])
def test_keys_and_values_of_another_shape_are_refused(shape):
    _, fused = pair("llama")
    with pytest.raises(ValueError, match="decoder: "):
        fused.append_kv([(mx.ones(shape), mx.ones(shape))] * 3, fused.new_cache())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "small"])
def test_last_logits_are_the_last_rows(name, batch):
    _, fused = pair(name)
    tokens = mx.array(np.random.default_rng(6).integers(0, 300, (batch, 20)))
    cache = fused.new_cache()
    whole, last = fused(tokens, fused.new_cache()), fused.last_logits(tokens, cache)
    assert last.shape == (batch, 300)
    # Many rows and one are different kernels, which add up in different orders.
    assert_close(last, whole[:, -1], "last row", rtol=2.0**-16)
    assert_close(fused(tokens, cache), fused(mx.concatenate([tokens, tokens], 1), fused.new_cache())[:, 20:],
                 "goes on from the same cache", rtol=2.0**-15)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "window", "dense", "openelm"])
def test_a_batch_equals_its_sequences(name):
    plain, fused = pair(name)
    tokens = mx.array(np.random.default_rng(5).integers(0, 300, (3, 50)))
    cache = fused.new_cache()
    got = mx.concatenate([fused(tokens[:, a:b], cache) for a, b in ((0, 30), (30, 31), (31, 50))], axis=1)
    assert_close(got, plain(tokens, plain.new_cache()), "a batch", rtol=2.0**-15)
    each = [fused(row[None], fused.new_cache()) for row in tokens]
    assert_close(got, mx.concatenate(each), "its sequences", rtol=2.0**-15)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["tied", "dense"])
def test_weights_and_scales_of_half_precision_are_read_as_they_are(name, dtype):
    """float32 arithmetic on half-precision numbers: the same result as with the numbers widened first."""
    narrow, wide = random_quantised(MODELS[name]), random_quantised(MODELS[name])
    for model, to in ((narrow, dtype), (wide, mx.float32)):
        model.apply(lambda value, to=to: value if value.dtype == mx.uint32 else value.astype(dtype).astype(to))
        assert model.use_native()
    tokens = mx.array(np.random.default_rng(8).integers(0, 300, (1, 40)))
    caches = narrow.new_cache(), wide.new_cache()
    for part in (tokens[:, :39], tokens[:, 39:]):
        got, want = (model(part, cache) for model, cache in zip((narrow, wide), caches))
        assert got.dtype == mx.float32
        assert_close(got, want, f"{name} {dtype}", rtol=2.0**-20)


# Bounds of the relative rms error of the logits. Sharp attention makes these small random models worse than
# a trained one.
@pytest.mark.parametrize(("name", "compute", "kv_dtype", "bound"), [
    ("llama", "exact", "float16", 2e-3), ("llama", "exact", "bfloat16", 2e-2), ("llama", "bf16", "float32", 3e-2),
    ("llama", "int8", "float32", 6e-2), ("seeds 4", "int8", "float32", 6e-2),
    ("seeds 3, quantised head", "int8", "float32", 6e-2),
])  # fmt: skip
def test_modes_are_close_to_exact_and_differ_from_it(name, compute, kv_dtype, bound):
    _, exact = pair(name)
    _, other = pair(name)
    options = RunOptions(compute, kv_dtype)
    tokens = mx.array(np.random.default_rng(7).integers(0, 300, (1, 60)))
    want = exact(tokens, exact.new_cache())
    cache = other.new_cache(options.kv)
    parts = [tokens[:, :50], *(tokens[:, i : i + 1] for i in range(50, 60))]
    got = mx.concatenate([other(part, cache, options) for part in parts], 1)
    assert str(cache.layers[0].keys.dtype).endswith(kv_dtype)
    error = (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
    assert error < bound
    amx = native.isa() == "amx"
    if name != "seeds 4" or rounds_to_int8(native.isa()):
        assert error > (1e-5 if compute != "bf16" or amx else 0)


@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_seed_encoded_matrices_meet_many_tokens_in_float32_but_on_amx(compute):
    _, exact = pair("seeds 4")
    _, other = pair("seeds 4")
    tokens = mx.array(np.random.default_rng(9).integers(0, 300, (1, 60)))
    want, got = exact(tokens, exact.new_cache()), other(tokens, other.new_cache(), RunOptions(compute))
    if native.isa() == "amx":
        assert (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item() < 3e-2
    else:
        assert mx.array_equal(got, want).item()


def test_rounded_products_need_the_native_executor():
    plain, fused = pair("llama")
    tokens = mx.array([[1, 2, 3]])
    for model, compute, kv in (
        (plain, "int8", "float32"),
        (fused, "int4", "float32"),
        (fused, "exact", "int7"),
    ):
        with pytest.raises(MlxeffError, match=r"wanted .*, got '?int"):
            model(tokens, model.new_cache(kv), RunOptions(compute, kv))
    with pytest.raises(MlxeffError, match="only the native CPU kernels have them"):
        plain.check(RunOptions("bf16"))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_both_executors_keep_keys_and_values_in_the_kind_that_the_cache_has(kind):
    plain, fused = pair("llama")
    tokens = mx.array(np.random.default_rng(7).integers(0, 300, (1, 40)))
    want = plain(tokens, plain.new_cache())
    bound = {"float16": 2e-3, "bfloat16": 2e-2}[kind]  # as above
    for model in (plain, fused):
        cache = model.new_cache(kind)
        got = mx.concatenate([model(tokens[:, a:b], cache) for a, b in ((0, 30), (30, 31), (31, 40))], axis=1)
        assert cache.stored_as == str(cache.layers[0].keys.dtype).removeprefix("mlx.core.") == kind
        assert 0 < (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item() < bound
        assert got.dtype == want.dtype


def test_what_ran_is_counted_by_the_cache():
    plain, fused = pair("llama")
    tokens, isa = mx.array([[1, 2, 3, 4, 5]]), native.isa()
    cache = fused.new_cache()
    fused(tokens, cache)
    before = Tally(cache.tally)
    fused.last_logits(tokens, cache, RunOptions("int8"))
    plain(tokens[:, :2], cache)
    assert cache.tally == {Ran(f"native {isa}", "exact"): 5, Ran(f"native {isa}", "int8"): 5, Ran("mlx", "exact"): 2}
    assert cache.tally.since(before).report() == {"backend": f"native {isa} + mlx", "compute": "int8 + exact"}
    fused.train()
    fused(tokens, unfused := fused.new_cache())
    assert unfused.tally.report() == {"backend": "mlx", "compute": "exact"}


def test_a_cache_of_another_kind_runs_natively_as_long_as_its_storage_is_known():
    """A subclass of the plain layer is still written and read natively; a storage that is not known is not."""

    class Own(LayerCache):
        pass

    class Foreign(LayerCache):
        store = "foreign"

    plain, fused = pair("llama")
    tokens = mx.array([[1, 2, 3, 4, 5]])
    want = plain(tokens, plain.new_cache())
    for kind, backend in ((Own, f"native {native.isa()}"), (Foreign, "mlx")):
        cache = KVCache([kind() for _ in fused.layers])
        assert_close(fused(tokens, cache), want, kind.__name__, rtol=2.0**-15)
        assert cache.tally.report()["backend"] == backend


def test_a_cache_passes_between_both_forms():
    plain, fused = pair("qwen3")
    tokens = mx.array(np.random.default_rng(2).integers(0, 300, (1, 40)))
    want = plain(tokens, plain.new_cache())
    for first, second in ((plain, fused), (fused, plain)):
        cache = first.new_cache()
        first(tokens[:, :30], cache)
        assert cache.rewind(25) == 25
        got = second(tokens[:, 25:], cache)
        assert_close(got, want[:, 25:], "continued in the other form", rtol=2.0**-15)


def test_grows_over_the_step_of_the_cache():
    plain, fused = pair("llama")
    tokens = mx.array(np.random.default_rng(3).integers(0, 300, (1, 300)))
    cache = fused.new_cache()
    got = [fused(tokens[:, start : start + 60], cache) for start in range(0, 300, 60)]
    assert cache.length == 300
    assert_close(mx.concatenate(got, axis=1), plain(tokens, plain.new_cache()), "300 tokens", rtol=2.0**-14)


def test_the_graph_is_lazy_and_buffers_that_are_still_held_stay():
    _, fused = pair("llama")
    cache = fused.new_cache()
    fused(mx.array([[1, 2, 3]]), cache)
    held = [layer.keys for layer in cache.layers]
    mx.eval(held)
    before = [np.array(keys) for keys in held]
    token = mx.array([[4]])
    for _ in range(5):  # nothing is evaluated here: each token is the argmax of logits that are still to come
        token = mx.argmax(fused.last_logits(token, cache), axis=-1)[None]
    mx.eval(token, cache.arrays())
    for keys, copy in zip(held, before):
        assert np.array_equal(np.array(keys), copy)
    assert cache.length == 8


def test_the_buffer_is_written_in_place_when_nobody_else_holds_it():
    _, fused = pair("llama")
    cache = fused.new_cache()
    mx.eval(fused(mx.array([[1, 2, 3]]), cache), cache.arrays())
    mx.clear_cache()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    mx.eval(fused.last_logits(mx.array([[4]]), cache), cache.arrays())
    assert mx.get_peak_memory() - active < cache.nbytes / 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_instruction_set_and_thread_count(level, threads):
    plain, fused = pair("mixed")
    tokens = mx.array(np.random.default_rng(4).integers(0, 300, (1, 37)))
    want = plain(tokens, plain.new_cache())
    try:
        native.set_num_threads(threads)
        cache = fused.new_cache()
        got = mx.concatenate([fused(tokens[:, :36], cache), fused(tokens[:, 36:], cache)], axis=1)
        mx.eval(got)
    finally:
        native.set_num_threads(0)
    assert_close(got, want, f"{level}, {threads} threads", rtol=2.0**-15)


def test_does_not_apply_to_training_and_other_weights():
    plain, fused = pair("llama")
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    fused.train()
    assert_close(fused(tokens[:1], fused.new_cache()), plain(tokens[:1], plain.new_cache()), "training", rtol=0, atol=0)
    assert not random_quantised(OPENELM | {"ffn_with_glu": False}).use_native()
    mxfp4 = LLAMA | {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    assert not build_model(mxfp4).use_native()
    assert make_divisible(64, 32) == 64


def test_gradients_and_changed_weights_leave_the_fused_form(caplog):
    _, fused = pair("dense")
    plain, _ = pair("dense")
    tokens = mx.array([[1, 2, 3]])

    def loss(model):
        return model(tokens, model.new_cache()).square().sum()

    value, gradients = nn.value_and_grad(fused, loss)(fused)
    wanted, wanted_gradients = nn.value_and_grad(plain, loss)(plain)
    assert_close(value, wanted, "loss", rtol=2.0**-15)
    got, want = (g["model"]["layers"][1]["mlp"]["up_proj"]["weight"] for g in (gradients, wanted_gradients))
    assert abs(want).max().item() > 0
    assert_close(got, want, "gradient", rtol=2.0**-13)
    assert "operator by operator" in caplog.text

    name, layer = "weight", fused.layers[0].input_layernorm
    layer[name] = plain.layers[0].input_layernorm[name] = layer[name] * 2
    assert_close(fused(tokens, fused.new_cache()), plain(tokens, plain.new_cache()), "changed weights", rtol=2.0**-15)


def test_decoding_does_not_copy_the_cache():
    """The loop of `decode`, of which a step in flight would hold the buffers of the cache."""
    _, fused = pair("llama")
    cache = fused.new_cache()
    logits = prefill(fused, cache, mx.array(list(range(200))), 512)
    steps = decode(fused, cache, logits, make_sampler(), max_tokens=40)
    next(steps)
    mx.clear_cache()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    for _ in range(20):
        next(steps)
    assert mx.get_peak_memory() - active < cache.nbytes / 2


def test_a_token_outside_the_vocabulary_is_an_error():
    _, fused = pair("llama")
    with pytest.raises(RuntimeError, match="native kernel"):
        mx.eval(fused(mx.array([[300]]), fused.new_cache()))
    mx.eval(fused(mx.array([[299]]), fused.new_cache()))


def test_nanobind_has_the_abi_tag_of_mlx():
    code = """if True:
        import ctypes
        api = ctypes.pythonapi
        api.PyInterpreterState_Get.restype = api.PyInterpreterState_GetDict.restype = ctypes.c_void_p
        api.PyInterpreterState_GetDict.argtypes = [ctypes.c_void_p]
        def tags():
            shared = ctypes.cast(api.PyInterpreterState_GetDict(api.PyInterpreterState_Get()), ctypes.py_object).value
            return sorted(str(key) for key in shared if "nb_internals" in str(key) and "mlx" in str(key))
        import mlx.core
        before = tags()
        from mlxeff import _native
        assert len(before) == 1 and tags() == before, (before, tags())
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_step_in_flight_at_the_end_of_the_process(tmp_path):
    folder = quantise_folder(write_tiny_model(tmp_path / "tiny"))
    code = f"""if True:
        import mlx.core as mx
        from mlxeff.assembly.model import load_path
        from pathlib import Path
        model = load_path(Path({str(folder)!r})).model
        mx.async_eval(model(mx.zeros((1, 200), mx.int32), model.new_cache()))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
