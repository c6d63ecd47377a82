"""GGUF -> Hugging Face names, row order and config; oracle: mlx-lm's model on the weights the file was made from."""

import math

import mlx.core as mx
import numpy as np
import pytest

import checkpoint_files as files
from checkpoint_files import numbers
from helpers import assert_close
from mlxeff import MlxeffError
from mlxeff.assembly.model import build_model
from mlxeff.checkpoint import open_source
from mlxeff.models.gguf import FREQUENCIES, config_from_gguf, weights_from_gguf
from reference_models import llama_logits


def keys(arch: str) -> dict:
    own = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    return {f"{arch}.{key}": value for key, value in own.items()} | {"tokenizer.ggml.eos_token_id": 2}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for Llama's q and k: the two halves of a head alternate."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(arch: str, rng, kind: str = "F32", tied: bool = False) -> dict:
    """Random weights under Hugging Face's names -> the GGUF's (values, type); F32 for vectors."""

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32) * 0.1

    made = {"token_embd": draw(128, 64), "output_norm": 1 + draw(64)}
    if not tied:
        made["output"] = draw(128, 64)
    for i in range(2):
        shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        made |= {f"blk.{i}.{name}": draw(*shape) for name, shape in shapes.items()}
        made |= {f"blk.{i}.attn_norm": 1 + draw(64), f"blk.{i}.ffn_norm": 1 + draw(64)}
        if arch == "qwen2":
            made |= {f"blk.{i}.attn_{x}.bias": draw(rows) for x, rows in (("q", 64), ("k", 32), ("v", 32))}
        if arch == "qwen3":
            made |= {f"blk.{i}.attn_{x}_norm": 1 + draw(16) for x in "qk"}
    return {
        name if name.endswith(".bias") else f"{name}.weight": (value, kind if value.ndim == 2 else "F32")
        for name, value in made.items()
    }


def hugging_face(made: dict) -> dict[str, mx.array]:
    """The same weights under the names of Hugging Face, written out by hand."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    parts |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    parts |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    parts |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    names |= {f"blk.{i}.{old}": f"model.layers.{i}.{new}" for i in range(2) for old, new in parts.items()}
    return {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": mx.array(v) for n, (v, _) in made.items()}


def write(path, arch: str, made: dict, split: int = 0, **more):
    """The GGUF file, or parts of at most `split` tensors: Llama's q and k rows in llama.cpp's order."""
    permuted = dict(made)
    for name, (value, kind) in made.items():
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            permuted[name] = (interleave(value, heads), kind)
    return files.write_gguf(path, arch, keys(arch) | more, permuted, split)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def oracle(config: dict, weights: dict[str, mx.array], tokens: mx.array) -> mx.array:
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.load_weights(list(weights.items()), strict=True)
    return model(tokens)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_logits_of_the_weights_the_file_was_made_from(tmp_path, rng, arch, tied):
    made = tensors(arch, rng, tied=tied)
    source = open_source(write(tmp_path / "x.gguf", arch, made))
    config, weights = config_from_gguf(source), weights_from_gguf(source)
    want = hugging_face(made)
    assert config["tie_word_embeddings"] is tied
    assert config["rms_norm_eps"] == 1e-5
    assert config["eos_token_id"] == 2
    assert "quantization" not in config
    assert weights.keys() == want.keys()
    assert all(mx.array_equal(weights[name], want[name]) for name in want)
    tokens = mx.array([[1, 5, 9, 100]])
    model = build_model(config)
    model.load_weights(list(weights.items()), strict=True)
    logits = model(tokens, model.new_cache())
    assert mx.allclose(logits, oracle(config, want, tokens), rtol=0, atol=1e-5), (
        "summation order only: logits are about 1"
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_stay_quantised(tmp_path, rng, kind):
    """The packed weights are the file's blocks in Hugging Face's row order; a module of another type its own entry."""
    made = tensors("llama", rng, kind)
    made["token_embd.weight"] = (made["token_embd.weight"][0], "Q8_0")
    made["blk.0.ffn_up.weight"] = (made["blk.0.ffn_up.weight"][0], "F16")
    source = open_source(write(tmp_path / "x.gguf", "llama", made))
    config, weights = config_from_gguf(source), weights_from_gguf(source)
    quantization, bits = config["quantization"], 8 if kind == "Q8_0" else 4
    own = {key: value for key, value in quantization.items() if "." in key}
    assert (quantization["bits"], quantization["group_size"]) == (bits, 32)
    embedding = {} if bits == 8 else {"model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"}}
    assert own == embedding | {"model.layers.0.mlp.up_proj": False}
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        parts = [weights[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        dense = mx.dequantize(parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32), 32, bits)
        old = {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down"}[name.rpartition(".")[2]]
        block = source.tensors[f"blk.{name.split('.')[2]}.{old}.weight"]
        want = hugging_face(made)[f"{name}.weight"]
        step = 2 * float(parts[1].astype(mx.float32).max())
        assert block.kind == kind
        assert float(mx.abs(dense - want).max()) <= abs(step), "within a quantisation step of the weight in its own row"
    build_model(config, weights).load_weights(list(weights.items()), strict=True)


def divisors(factor, low, high, context, base=10000.0, size=16) -> np.ndarray:
    """Llama 3.1's published rule, frequency by frequency."""
    result = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * base ** (i / size)
        smooth = (context / wavelength - low) / (high - low)
        blended = 1 / ((1 - smooth) / factor + smooth)
        result.append(1 if wavelength < context / high else factor if wavelength > context / low else blended)
    return np.array(result, np.float32)


def test_llama3_frequencies(tmp_path, rng):
    made = tensors("llama", rng) | {FREQUENCIES: (divisors(32.0, 1, 4, 8192), "F32")}
    config = config_from_gguf(open_source(write(tmp_path / "x.gguf", "llama", made)))
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 32.0} | rule
    made[FREQUENCIES] = (np.ones(8, np.float32), "F32")
    assert config_from_gguf(open_source(write(tmp_path / "y.gguf", "llama", made)))["rope_scaling"] is None
    made[FREQUENCIES] = (np.linspace(1, 3, 8, dtype=np.float32), "F32")
    with pytest.raises(MlxeffError, match="divisors of a llama3 rope_scaling"):
        config_from_gguf(open_source(write(tmp_path / "z.gguf", "llama", made)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"llama.rope.dimension_count": 8}, "wanted the head size 16, got 8"),
        ({"llama.block_count": 2**32 - 1}, "block_count"),
        ({"llama.block_count": 3}, "wanted 3 layers, got tensors of 2"),
        ({"llama.feed_forward_length": 2**31 - 1}, "ffn_down.weight': wanted shape"),
        ({"llama.attention.head_count": 8, "llama.attention.key_length": 16}, "attn_q.weight': wanted shape"),
        ({"llama.context_length": "long"}, "context_length: wanted one positive number, got 'long'"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: wanted none, linear or yarn, got 'longrope'"),
        ({"llama.rope.scaling.attn_factor": -1.0}, "rope.scaling.attn_factor: wanted a positive number, got -1.0"),
    ],
)
def test_refused(tmp_path, rng, more, message):
    source = open_source(write(tmp_path / "x.gguf", "llama", tensors("llama", rng)))
    source.metadata.update(more)
    with pytest.raises(MlxeffError) as caught:
        config_from_gguf(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_tensors(tmp_path, rng):
    made = tensors("llama", rng)
    source = open_source(
        write(tmp_path / "x.gguf", "llama", made | {"blk.0.strange.weight": (np.ones(4, np.float32), "F32")})
    )
    with pytest.raises(MlxeffError, match=r"1 unknown tensors: blk\.0\.strange\.weight"):
        weights_from_gguf(source)
    made.pop("token_embd.weight")
    with pytest.raises(MlxeffError, match=r"missing tensor 'token_embd\.weight'"):
        config_from_gguf(open_source(write(tmp_path / "y.gguf", "llama", made)))


def test_linear_and_yarn_scaling(tmp_path, rng):
    source = open_source(write(tmp_path / "x.gguf", "llama", tensors("llama", rng)))
    source.metadata.update({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert config_from_gguf(source)["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    source.metadata.update({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 512})
    assert config_from_gguf(source)["rope_scaling"]["original_max_position_embeddings"] == 512


YARN_OF_4 = 0.1 * math.log(4) + 1  # YaRN's own magnitude for the factor 4
LINEAR, YARN = {"rope_type": "linear", "type": "linear"}, {"rope_type": "yarn", "type": "yarn"}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, None),
        ({"rope.scale_linear": 4.0}, LINEAR | {"factor": 4.0}),  # llama.cpp's converter of 2023
        ({"rope.scaling.factor": 4.0}, LINEAR | {"factor": 4.0}),  # llama.cpp's default type is linear
        ({"rope.scaling.factor": 4}, LINEAR | {"factor": 4.0}),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, LINEAR | {"factor": 2.0}),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 8.0}, LINEAR | {"factor": 8.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scale_linear": 0.0}, None),  # llama.cpp: none
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 9}, None),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
         YARN | {"factor": 4.0, "original_max_position_embeddings": 512}),  # the context length, as llama.cpp
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
          "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
          "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 0.1 * math.log(4) + 1},
         YARN | {"factor": 4.0, "original_max_position_embeddings": 128}),
        ({"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 128}, None),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
         YARN | {"factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 2 * YARN_OF_4,
                 "mscale": (2 * YARN_OF_4 - 1) / (0.1 * math.log(4))}),
    ],
)  # fmt: skip
def test_every_way_to_say_rope_scaling(tmp_path, rng, caplog, said, wanted):
    """All keys are read: no notice of unused ones. The logits are mlx-lm's of the config."""
    more = {f"llama.{key}": value for key, value in said.items()}
    source = open_source(write(tmp_path / "x.gguf", "llama", tensors("llama", rng), **more))
    config, weights = config_from_gguf(source), weights_from_gguf(source)
    assert config["rope_scaling"] == wanted
    assert caplog.messages == []
    model, tokens = build_model(config, weights), mx.array([[1, 5, 9, 100, 31] * 4])
    model.load_weights(list(weights.items()), strict=True)
    got = model(tokens, model.new_cache())
    assert_close(got, oracle(config, weights, tokens), str(said), rtol=2.0**-15)
    if wanted:
        plain = oracle(config | {"rope_scaling": None}, weights, tokens)
        assert mx.abs(got - plain).max() > 0.01


@pytest.mark.parametrize(
    ("said", "magnitude"),
    [
        ({}, 1.5),
        ({"type": "none", "factor": 4.0}, 1.5),
        ({"type": "linear", "factor": 4.0}, 1.5),
        ({"type": "yarn"}, 1.5),
        ({"type": "yarn", "factor": 0.5}, 1.5),
        ({"type": "yarn", "factor": 4.0}, 1.5 * YARN_OF_4),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 0.25}, 0.25 * YARN_OF_4),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_attn_factor_multiplies_under_every_rule(tmp_path, rng, arch, said, magnitude):
    """llama.cpp's arithmetic: cos and sin times attn_factor, and for YaRN times 0.1 ln(factor) + 1."""
    more = {f"{arch}.rope.scaling.{key}": value for key, value in ({"attn_factor": 1.5} | said).items()}
    source = open_source(write(tmp_path / "x.gguf", arch, tensors(arch, rng), **more))
    config, weights, ids = config_from_gguf(source), weights_from_gguf(source), [1, 5, 9, 100, 31] * 4
    rule, factor = said.get("type"), said.get("factor", 1.0)
    stated = {"rope_type": rule, "factor": factor, "original_max_position_embeddings": 512}
    stated |= {"attention_factor" if rule == "yarn" else "magnitude": magnitude}
    exact = {name: np.array(value, np.float64) for name, value in weights.items()}
    model = build_model(config, weights)
    model.load_weights(list(weights.items()), strict=True)
    got = model(mx.array([ids]), model.new_cache())
    assert_close(got[0], llama_logits(exact, config | {"rope_scaling": stated}, ids), str(said))
    if rule == "yarn" and factor > 1:  # mlx-lm reads it too
        assert_close(got, oracle(config, weights, mx.array([ids])), str(said), rtol=2.0**-15)


def test_attn_factor_beside_divisors(tmp_path, rng):
    made = tensors("llama", rng) | {FREQUENCIES: (divisors(32.0, 1, 4, 8192), "F32")}
    source = open_source(write(tmp_path / "x.gguf", "llama", made, **{"llama.rope.scaling.attn_factor": 1.5}))
    scaling = config_from_gguf(source)["rope_scaling"]
    assert (scaling["rope_type"], scaling["magnitude"]) == ("llama3", 1.5)


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [("yarn_beta_fast", 16.0, "32"), ("yarn_beta_slow", 2.0, "1"), ("yarn_ext_factor", 0.5, "1"),
     ("yarn_attn_factor", 1.2, "1.13863"), ("yarn_attn_factor", "x", "1.13863")],
)  # fmt: skip
def test_keys_of_yarn_that_llama_cpp_does_not_read(tmp_path, rng, caplog, name, value, used):
    said = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    more = {f"llama.rope.scaling.{key}": each for key, each in said.items()}
    plain = config_from_gguf(open_source(write(tmp_path / "x.gguf", "llama", tensors("llama", rng), **more)))
    source = open_source(tmp_path / "x.gguf")
    source.metadata[f"llama.rope.scaling.{name}"] = value
    assert config_from_gguf(source) == plain
    assert caplog.messages == [f"x.gguf: rope.scaling.{name} {value!r} is not used, but {used}, as llama.cpp does"]


def test_metadata_that_is_not_used_is_named(tmp_path, rng, caplog):
    more = {"llama.attention.clamp_kqv": 8.0, "llama.vocab_size": 128, "mystery.key": 1, "general.name": "x"}
    config_from_gguf(open_source(write(tmp_path / "x.gguf", "llama", tensors("llama", rng), **more)))
    assert caplog.messages == ["x.gguf: metadata that is not used: llama.attention.clamp_kqv, mystery.key"]


def split(folder, made) -> list:
    """The file in parts, as the gguf library (and llama.cpp's gguf-split) writes them."""
    write(folder / "x.gguf", "llama", made, split=8)
    return sorted(folder.iterdir())


def test_split_files_open_as_one(tmp_path, rng):
    made = tensors("llama", rng)
    parts = split(tmp_path, made)
    assert [part.name for part in parts] == [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    want = hugging_face(made)
    for path in (*parts, tmp_path):
        source = open_source(path)
        assert source.files == tuple(parts)
        weights = weights_from_gguf(source)
        assert weights.keys() == want.keys()
        assert all(mx.array_equal(value, want[name]) for name, value in weights.items())
        assert config_from_gguf(source)["num_hidden_layers"] == 2
    parts[1].rename(tmp_path / "other.gguf")
    for path in (parts[0], parts[2], tmp_path):
        with pytest.raises(MlxeffError, match=r"wanted 3 (parts|shards), got 2: x-00002-of-00003\.gguf"):
            open_source(path)
    with pytest.raises(MlxeffError, match=r"other\.gguf: wanted a whole GGUF file, got one part of 3"):
        open_source(tmp_path / "other.gguf")
    parts[0].rename(parts[1])
    parts[1].rename(tmp_path / "x-00001-of-00002.gguf")
    (tmp_path / "other.gguf").rename(tmp_path / "x-00002-of-00002.gguf")
    with pytest.raises(MlxeffError, match=r"x-00001-of-00002\.gguf: wanted part 0 of 2, from 0, got part 0 of 3"):
        open_source(tmp_path / "x-00001-of-00002.gguf")


def test_parts_of_a_split_file_in_another_order_are_refused(tmp_path, rng):
    first, second, _ = split(tmp_path, tensors("llama", rng))
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    with pytest.raises(MlxeffError, match=r"x-00001-of-00003\.gguf: wanted part 0 of 3, from 0, got part 1 of 3"):
        open_source(first)


def test_built_in_model(smollm2_gguf):
    """SmolLM2-135M: its config, its parameter count, and every parameter the model wants."""
    source = open_source(smollm2_gguf)
    config, weights = config_from_gguf(source), weights_from_gguf(source)
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert config["rope_theta"] == 100000
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    model = build_model(config, weights)
    model.load_weights(list(weights.items()), strict=True)
    assert sum(tensor.size for tensor in source.tensors.values()) == 134_515_008
    assert np.isfinite(numbers(weights["model.layers.0.self_attn.q_proj.scales"])).all()
