"""The models: equal to mlx-lm's on the same random weights, close to a NumPy float64 forward pass, of the published
sizes; refused configs; and other architectures through mlx-lm.

Equality with mlx-lm is exact on MLX's own operations: they are the same in the same order. The one exception is a
rotating cache, which stores the window's tokens in another order. The native kernels are held to float64 here.
"""

import contextlib
import importlib
import itertools
import json
import logging
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff import MlxeffError
from mlxeff.assembly.model import build_model, load_path
from mlxeff.decode import require_seam
from mlxeff.generation import stream_generate
from mlxeff.models import openelm
from mlxeff.models.config import passed_over
from mlxeff.models.llama import LlamaConfig
from mlxeff.ops import mlx_only
from reference_models import llama_logits, openelm_logits
from tiny_model import GEMMA, MAMBA, PHI, random_model, write_foreign

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_RULE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN_RULE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG_RULE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0, 6.0, 8.0],
}
VARIANTS = {
    "Llama 2": {},
    "Llama 3.1": {"num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3_RULE},
    "linear scaling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN_RULE},
    "yarn, both mscales": {"rope_scaling": YARN_RULE | {"mscale": 1.4, "mscale_all_dim": 0.7, "beta_fast": 16}},
    "yarn, mscale": {"rope_scaling": YARN_RULE | {"mscale": 1.4, "mscale_all_dim": 0}},
    "yarn, mscale_all_dim": {"rope_scaling": YARN_RULE | {"mscale_all_dim": 0.7}},
    "yarn, neutral": {"rope_scaling": YARN_RULE | {"finetuned": True, "attn_factor": 1, "extrapolation_factor": 1.0}},
    "yarn, smaller": {"rope_scaling": YARN_RULE | {"factor": 0.5, "mscale": 1.4, "mscale_all_dim": 0.7}},
    "yarn of DeepSeek": {"rope_scaling": YARN_RULE | {"rope_type": "deepseek_yarn"}},
    "longrope": {"rope_scaling": LONG_RULE},
    "longrope, one factor": {"rope_scaling": LONG_RULE | {"long_factor": 1.5}, "max_position_embeddings": 32},
    "mrope": {"rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "SmolLM2": {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 1e5},
    "Mistral": {"model_type": "mistral", "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None},
    "Qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": 5},
    "Qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}
WINDOWED = {
    "Mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "alternating": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen2": {"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
}
OPENELM = {
    "model_type": "openelm",
    "num_transformer_layers": 3,
    "model_dim": 64,
    "head_dim": 16,
    "num_query_heads": [4, 8, 12],
    "num_kv_heads": [1, 2, 3],
    "ffn_multipliers": [0.5, 1.25, 4.0],
    "ffn_dim_divisor": 32,
    "ffn_with_glu": True,
    "vocab_size": 128,
    "rope_freq_constant": 10000,
    "share_input_output_layers": True,
}


def oracle(config: dict, weights: dict[str, mx.array]) -> nn.Module:
    """mlx-lm's model with these weights, quantised as the config says."""
    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if quantization := config.get("quantization"):
        nn.quantize(model, **quantization, class_predicate=lambda path, _: f"{path}.scales" in weights)
    model.load_weights(list(weights.items()), strict=True)
    return model


def weights_of(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def double(weights: dict[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float64) for name, value in weights.items()}


def prompt(length: int, vocabulary: int = 128) -> mx.array:
    return mx.array(np.random.default_rng(3).integers(0, vocabulary, (1, length)))


def run(call, tokens: mx.array) -> mx.array:
    """Logits (1, S, V) by way of two prefill chunks, then one token at a time."""
    ends = [0, 11, 16, *range(17, tokens.shape[1] + 1)]
    chunks = [tokens[:, a:b] for a, b in itertools.pairwise(ends)]
    return mx.concatenate([call(chunk) for chunk in chunks], axis=1)


def run_both(ours, theirs, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """(our logits, mlx-lm's)."""
    from mlx_lm.models.cache import make_prompt_cache

    own, cache = ours.new_cache(), make_prompt_cache(theirs)
    with mlx_only():
        got = run(lambda chunk: ours(chunk, own), tokens)
    return got, run(lambda chunk: theirs(chunk, cache=cache), tokens)


def both(config: dict, length: int = 24) -> tuple[mx.array, mx.array]:
    """(our logits, mlx-lm's) of a config's random model."""
    ours = random_model(config, seed=1)
    return run_both(ours, oracle(config, weights_of(ours)), prompt(length))


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_family_equals_mlx_lm(name):
    got, want = both(LLAMA | VARIANTS[name])
    assert_close(got, want, name, rtol=0, atol=0)


@pytest.fixture(params=["native", "mlx"])
def arithmetic(request):
    """Both choices of the operations; one and the same where the native kernels are not built."""
    with mlx_only() if request.param == "mlx" else contextlib.nullcontext():
        yield


# What mlx-lm does not read.
MAGNITUDES = {
    "attention_factor": YARN_RULE | {"attention_factor": 1.6, "mscale": 1.4, "mscale_all_dim": 0.7},
    "default": {"rope_type": "default", "magnitude": 1.4},
    "linear": {"rope_type": "linear", "factor": 4.0, "magnitude": 1.4},
    "llama3": {"rope_type": "llama3", "magnitude": 1.4} | LLAMA3_RULE,
    "yarn": YARN_RULE | {"magnitude": 1.4},
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_rotary_magnitude_against_float64(name, arithmetic):
    config = LLAMA | {"rope_scaling": MAGNITUDES[name]}
    model, tokens = random_model(config, seed=2), prompt(24)
    want = llama_logits(double(weights_of(model)), config, tokens[0].tolist())
    # Larger logits of the attention have larger rounding errors.
    assert_close(model(tokens, model.new_cache())[0], want, name, rtol=2.0**-16)
    less = {key: value for key, value in MAGNITUDES[name].items() if key not in ("attention_factor", "magnitude")}
    plain = llama_logits(double(weights_of(model)), config | {"rope_scaling": less}, tokens[0].tolist())
    assert np.abs(want - plain).max() > 0.01, "the magnitude must matter, or this test says nothing"


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_family_against_float64(name, arithmetic):
    config = LLAMA | VARIANTS[name]
    if config["model_type"] == "qwen2":
        config["sliding_window"] = None  # a window that `use_sliding_window` does not switch on
    model, tokens = random_model(config, seed=2), prompt(24)
    want = llama_logits(double(weights_of(model)), config, tokens[0].tolist())
    assert_close(model(tokens, model.new_cache())[0], want, name)


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_window_against_float64(name, arithmetic):
    """mlx-lm ignores Mistral's and Qwen's windows, so only the formula can judge them."""
    config = LLAMA | WINDOWED[name]
    model, tokens = random_model(config, seed=2), prompt(24)
    layered = config if "Qwen" not in name else config | {"layer_types": ["full_attention", "sliding_attention"]}
    want = llama_logits(double(weights_of(model)), layered, tokens[0].tolist())
    cache = model.new_cache()
    assert_close(run(lambda chunk: model(chunk, cache), tokens)[0], want, name)
    full = llama_logits(double(weights_of(model)), config | {"sliding_window": None}, tokens[0].tolist())
    assert np.abs(full - want)[5:].max() > 0.1, "the window must matter, or this test says nothing"


def test_sliding_window_close_to_mlx_lm():
    got, want = both(LLAMA | WINDOWED["alternating"], 40)
    assert_close(got[:, :16], want[:, :16], "prefill", rtol=0, atol=0)
    assert_close(got, want, "decode: mlx-lm's rotating cache sums the window in another order")


def test_the_type_llama_has_no_sliding_window():
    """Without `layer_types`, as in mlx-lm and transformers, whatever the value is."""
    got, want = both(LLAMA | {"sliding_window": 5})
    assert_close(got, want, "sliding_window", rtol=0, atol=0)
    for window in (5, "x"):
        assert LlamaConfig.from_dict(LLAMA | {"sliding_window": window}).window(0) is None
        assert passed_over(LlamaConfig, LLAMA | {"sliding_window": window}) == ["sliding_window"]
    assert passed_over(LlamaConfig, LLAMA | WINDOWED["alternating"] | {"sliding_window": 5}) == []
    assert passed_over(LlamaConfig, LLAMA | WINDOWED["Mistral"]) == []


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["Llama 2", "SmolLM2", "Qwen2"])
def test_quantised_equals_mlx_lm(name, bits):
    dense = LLAMA | VARIANTS[name]
    theirs = oracle(dense, weights_of(random_model(dense, seed=1)))
    nn.quantize(theirs, group_size=32, bits=bits)
    config, weights = dense | {"quantization": {"group_size": 32, "bits": bits}}, weights_of(theirs)
    ours = build_model(config, weights)
    ours.load_weights(list(weights.items()), strict=True)
    assert isinstance(ours.model.embed_tokens, nn.QuantizedEmbedding)
    got, want = run_both(ours, theirs, prompt(20))
    assert_close(got, want, name, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_openelm_equals_mlx_lm(tied):
    got, want = both(OPENELM | {"share_input_output_layers": tied})
    assert_close(got, want, "OpenELM", rtol=0, atol=0)


@pytest.mark.parametrize("more", [{}, {"ffn_with_glu": False}, {"share_input_output_layers": False}])
def test_openelm_against_float64(more, arithmetic):
    config = OPENELM | more
    model, tokens = random_model(config, seed=4), prompt(24)
    want = openelm_logits(double(weights_of(model)), config, tokens[0].tolist())
    assert_close(model(tokens, model.new_cache())[0], want, "OpenELM")


# size → layers, D, E, query heads in runs, KV heads in runs, feed-forward widths, parameters with 32000 and 32128 rows
PUBLISHED = {
    "270M": (
        (16, 1280, 64),
        "12x5 16x7 20x4",
        "3x5 4x7 5x4",
        "768 1024 1280 1536 1792 2048 2560 2816 3072 3328 3584 3840 4352 4608 4864 5120",
        (271_527_168, 271_691_008),
    ),
    "450M": (
        (20, 1536, 64),
        "12x3 16x7 20x6 24x4",
        "3x3 4x7 5x6 6x4",
        "768 1024 1280 1536 1792 2304 2560 2816 3072 3328 3584 3840 4096 4352 4608 5120 5376 5632 5888 6144",
        (457_179_136, 457_375_744),
    ),
    "1_1B": (
        (28, 2048, 64),
        "16x3 20x7 24x8 28x6 32x4",
        "4x3 5x7 6x8 7x6 8x4",
        """1024 1280 1536 1792 2048 2304 2560 2816 3072 3328 3584 3840 4096 4608 4608 5120 5376 5632 5888 6144 6400 6656
        6912 7168 7424 7680 7936 8192""",
        (1_079_891_456, 1_080_153_600),
    ),
    "3B": (
        (36, 3072, 128),
        "12x4 16x14 20x12 24x6",
        "3x4 4x14 5x12 6x6",
        """1536 1792 2048 2560 2816 3072 3328 3584 4096 4352 4608 4864 5120 5632 5888 6144 6400 6656 7168 7424 7680 7936
        8192 8704 8960 9216 9472 9728 10240 10496 10752 11008 11264 11776 12032 12288""",
        (3_036_647_424, 3_037_040_640),
    ),
}


def runs(text: str) -> list[int]:
    """ "12x2 16x1" → [12, 12, 16]."""
    return [int(value) for run in text.split() for value in run.split("x")[:1] * int(run.split("x")[1])]


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_openelm_sizes(size):
    """Counted from the shapes of a model that is never evaluated."""
    dimensions, queries, keys, widths, counts = PUBLISHED[size]
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for vocabulary, wanted in zip((32000, 32128), counts):
        config = openelm.published_config(size, vocabulary)
        model = build_model(config)
        assert sum(value.size for value in weights_of(model).values()) == wanted
    assert (model.config.num_transformer_layers, model.config.model_dim, model.config.head_dim) == dimensions
    assert config["num_query_heads"] == runs(queries)
    assert config["num_kv_heads"] == runs(keys)
    assert [model.config.ffn_dim(i) for i in range(dimensions[0])] == [int(width) for width in widths.split()]
    assert [layer.ffn.proj_2.weight.shape[1] for layer in model.layers] == [int(width) for width in widths.split()]
    assert mx.get_peak_memory() - before < 1e8, "something was allocated"


def test_published_openelm_of_no_such_size():
    with pytest.raises(MlxeffError, match=r"wanted a size of 270M, 450M, 1_1B, 3B, got '7B'"):
        openelm.published_config("7B")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"num_experts": 8}, "llama config: unknown keys ['num_experts']"),
        (OPENELM | {"n_layers": 3}, "openelm config: unknown keys ['n_layers']"),
        (LLAMA | {"model_type": "mamba"}, "wanted one of openelm, llama, mistral, qwen2, qwen3, got 'mamba'"),
        (LLAMA | {"hidden_size": "64"}, "llama config: hidden_size: wanted int, got '64'"),
        (LLAMA | {"hidden_size": True}, "llama config: hidden_size: wanted int, got True"),
        (LLAMA | {"vocab_size": 0}, "llama config: vocab_size: wanted a positive whole number, got 0"),
        (LLAMA | {"rms_norm_eps": "small"}, "llama config: rms_norm_eps: wanted float, got 'small'"),
        (LLAMA | {"num_key_value_heads": "2"}, "llama config: num_key_value_heads: wanted int | None, got '2'"),
        (LLAMA | {"num_key_value_heads": 3}, "llama config: num_key_value_heads: wanted a divisor of 4, got 3"),
        (LLAMA | {"head_dim": 15}, "llama config: head_dim: wanted an even number, got 15"),
        (LLAMA | {"tie_word_embeddings": "yes"}, "llama config: tie_word_embeddings: wanted bool, got 'yes'"),
        (LLAMA | {"hidden_act": "gelu"}, "llama config: hidden_act: wanted silu, got 'gelu'"),
        (LLAMA | {"layer_types": ["full_attention"]}, "layer_types: wanted 2 of full_attention or sliding_attention"),
        (LLAMA | {"layer_types": [1, 2]}, "llama config: layer_types: wanted list[str] | None, got [1, 2]"),
        (LLAMA | {"rope_scaling": "linear"}, "llama config: rope_scaling: wanted dict | None, got 'linear'"),
        (LLAMA | {"rope_parameters": 5}, "llama config: rope_parameters: wanted dict, got 5"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "yarn, longrope, mrope, got 'dynamic'"),
        (LLAMA | {"rope_scaling": {"type": ["yarn"]}}, "default, linear, llama3, yarn, longrope, mrope, got ['yarn']"),
        (LLAMA | {"rope_scaling": {"type": "mrope"}}, "rope_scaling of type mrope: missing keys ['mrope_section']"),
        (LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [8]}}, "mrope_section: wanted three numbers, got"),
        (LLAMA | {"rope_scaling": LONG_RULE | {"long_factor": [1.0]*3}}, "long_factor: wanted 8 numbers above 0, got"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear: missing keys ['factor']"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling factor: wanted above 0, got '4'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling factor: wanted above 0, got 0"),
        (LLAMA | {"rope_scaling": {"type": "linear", "beta": 1}}, "rope_scaling: unknown keys ['beta']"),
        (LLAMA | {"rope_scaling": YARN_RULE | {"attn_factor": 1.2}}, "rope_scaling: unknown keys ['attn_factor']"),
        (LLAMA | {"rope_scaling": YARN_RULE | {"attention_factor": 0}}, "attention_factor: wanted above 0, got 0"),
        (LLAMA | {"rope_scaling": YARN_RULE | {"mscale": "1"}}, "mscale: wanted a number above -1e12 and below 1e12"),
        (LLAMA | {"rope_scaling": YARN_RULE | {"mscale": -9}}, "mscale and mscale_all_dim of a magnitude above 0, got"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "llama3: missing keys ['high_freq_factor', 'original_max_position_embeddings']",
        ),
        (LLAMA | {"model_type": "qwen2", "use_mrope": True}, "qwen2 config: use_mrope: wanted false, got True"),
        (OPENELM | {"num_kv_heads": [1, 2]}, "openelm config: num_kv_heads: wanted a list of 3 numbers, got [1, 2]"),
        (OPENELM | {"num_kv_heads": [1, 2, 5]}, "openelm config: num_kv_heads: wanted a divisor of 12, got 5"),
        (OPENELM | {"num_query_heads": 4}, "openelm config: num_query_heads: wanted list[int], got 4"),
        (OPENELM | {"model_dim": 0}, "openelm config: model_dim: wanted a positive whole number, got 0"),
        (OPENELM | {"activation_fn_name": "relu"}, "openelm config: activation_fn_name: wanted swish, got 'relu'"),
        (OPENELM | {"normalization_layer_name": "layer_norm"}, "normalization_layer_name: wanted rms_norm, got"),
        (LLAMA | {"quantization": {"bits": 4}}, "quantization: wanted group_size and bits, got ['bits']"),
        (LLAMA | {"quantization": 4}, "quantization: wanted group_size and bits, got 4"),
        (LLAMA | {"quantization": {"group_size": 32, "bits": 7}}, "quantization: {'group_size': 32, 'bits': 7}:"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "MLX's `quantization`, got quant_method 'gptq'"),
    ],
)  # fmt: skip
def test_refused_configs(config, message):
    with pytest.raises(MlxeffError) as caught:
        build_model(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [LLAMA, OPENELM])
def test_missing_keys_are_named(config):
    needed = {"llama": ["hidden_size", "vocab_size"], "openelm": ["model_dim", "num_query_heads"]}[config["model_type"]]
    with pytest.raises(MlxeffError) as caught:
        build_model({key: value for key, value in config.items() if key not in needed})
    assert str(caught.value) == f"{config['model_type']} config: missing keys {needed}"


def test_transformers_5_rope_parameters():
    nested = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    nested["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "llama3"} | LLAMA3_RULE
    flat = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3_RULE}
    a, b = random_model(nested, seed=1), random_model(flat, seed=1)
    assert_close(a(prompt(20), a.new_cache()), b(prompt(20), b.new_cache()), "rope_parameters", rtol=0, atol=0)


FOREIGN = {"Gemma 3": GEMMA, "Phi-3": PHI, "Mamba": MAMBA}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_architectures_run_through_mlx_lm(tmp_path, caplog, name):
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    folder = write_foreign(tmp_path / "foreign", FOREIGN[name])
    with caplog.at_level(logging.INFO, logger="mlxeff"):
        loaded = load_path(folder)
    kind = FOREIGN[name]["model_type"]
    assert f"architecture '{kind}' is not one of ours: plain decoding through mlx-lm" in caplog.text
    ids = loaded.tokenizer.encode("The quick brown fox")
    got = [r.token for r in stream_generate(loaded.model, loaded.tokenizer, ids, max_tokens=24, prefill_step_size=6)]
    model, _ = load_model(folder)
    want = [token for token, _ in generate_step(mx.array(ids), model, max_tokens=24, prefill_step_size=6)]
    assert got == want[: len(got)]
    assert len(got) == 24 or got[-1] == 257
    assert len(set(got)) > 2, "a constant sequence would compare nothing"
    assert loaded.model.context_length == FOREIGN[name].get("max_position_embeddings")
    assert loaded.model.new_cache().nbytes == 0


def test_foreign_caches_rewind_or_keep_all(tmp_path):
    model = load_path(write_foreign(tmp_path / "foreign", PHI)).model
    tokens, cache = prompt(12, 256), model.new_cache()
    want = model(tokens, cache)
    assert cache.rewind(7) == 7
    assert (cache.length, cache.nbytes > 0) == (7, True)
    assert_close(model(tokens[:, 7:], cache), want[:, 7:], "rewind and redo")
    assert cache.length == 12
    recurrent = load_path(write_foreign(tmp_path / "recurrent", MAMBA)).model
    cache = recurrent.new_cache()
    mx.eval(recurrent(tokens[:, :9], cache))
    assert cache.rewind(8) == cache.length == 9, "nothing can be taken back, and nothing is lost"
    for length in (-1, 10):
        with pytest.raises(MlxeffError, match=f"wanted to rewind to 0 to 9 tokens, got {length}"):
            cache.rewind(length)
    want, fresh = recurrent(tokens, recurrent.new_cache()), recurrent(tokens[:, 9:], cache)
    assert_close(fresh, want[:, 9:], "goes on")


def test_code_of_a_checkpoint_runs_only_when_trusted(tmp_path):
    """At every version of mlx-lm, those before 0.32 included, which run it without asking."""
    folder, ran = write_foreign(tmp_path / "foreign", PHI), tmp_path / "ran"
    (folder / "mine.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom mlx_lm.models.phi3 import Model, ModelArgs\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "mine.py"}))
    with pytest.raises(MlxeffError, match=r"mine\.py"):
        load_path(folder)
    assert not ran.exists()
    load_path(folder, trust_remote_code=True)
    assert ran.exists()


def test_a_technique_without_its_seam_is_refused(tmp_path):
    foreign = load_path(write_foreign(tmp_path / "foreign", PHI)).model
    with pytest.raises(MlxeffError) as caught:
        require_seam(foreign, "cache", "QuantSpec")
    assert str(caught.value) == "QuantSpec needs the cache seam, which 'phi3' (run through mlx-lm) does not have"
    for seam in ("cache", "linear", "feed-forward"):
        require_seam(build_model(LLAMA), seam, "QuantSpec")
        require_seam(build_model(OPENELM), seam, "QuantSpec")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_model"}, "unsupported architecture 'no_such_model': not one of ours, and mlx-lm"),
        ({"model_type": "phi3", "hidden_size": 64}, "unsupported architecture 'phi3': not one of ours, and mlx-lm"),
        ({"model_type": 3}, "config: model_type: wanted the name of an architecture, got 3"),
        ({}, "config: model_type: wanted the name of an architecture, got None"),
    ],
)  # fmt: skip
def test_unsupported_architecture(tmp_path, config, message):
    folder = write_foreign(tmp_path / "foreign", PHI)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlxeffError) as caught:
        load_path(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_through_mlx_lm_keeps_the_limit_of_open_files(tmp_path):
    """mlx-lm sets it to (2048, 4096) when imported; a lowered hard limit cannot be raised again."""
    folder = write_foreign(tmp_path / "foreign", PHI)
    code = f"""if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        from mlxeff.assembly.model import load
        load({str(folder)!r})
        assert "mlx_lm.utils" in sys.modules
        print(before == resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit.__name__)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["True", "setrlimit"], run.stderr
