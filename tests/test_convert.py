"""`mlxeff.convert`: small random checkpoints of each family, converted, then loaded by stock mlx-lm.

Oracle: mlx-lm's model with the source's weights put in by hand; the logits must be equal to the bit.
"""

import hashlib
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model
from mlxeff.convert import convert
from mlxeff.convert.openelm import config_from_shapes
from mlxeff.convert.quantization import RECIPES

import checkpoint_files as files
from helpers import assert_close
from mlxeff import MlxeffError, assembly
from mlxeff.assembly.model import build_model, load_path
from mlxeff.checkpoint import Source, Tensor, open_source
from mlxeff.models.openelm import SIZES, published_config
from tiny_model import write_tiny_model

TOKENS = mx.array([[1, 5, 9, 100, 31]])
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# OpenELM in small: 2 layers of width 64, heads of 16, 4 and 8 query heads on 1 and 2 KV heads, feed-forward 64 and 192.
HEADS, WIDTHS = [(4, 1), (8, 2)], [64, 192]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def left_behind(tmp_path):
    before = set(os.listdir(tmp_path))
    return lambda: sorted(set(os.listdir(tmp_path)) - before)


def corenet_state(rng, rows=32128) -> dict[str, np.ndarray]:
    """CoreNet's flat state dict."""

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32) * 0.1

    state = {"token_embeddings.weight": draw(rows, 64), "norm.weight": 1 + draw(64)}
    for i, ((queries, groups), width) in enumerate(zip(HEADS, WIDTHS, strict=True)):
        layer = {"attn.qkv_proj": draw((queries + 2 * groups) * 16, 64), "attn.out_proj": draw(64, queries * 16)}
        layer |= {"attn.q_norm": 1 + draw(16), "attn.k_norm": 1 + draw(16), "attn_norm": 1 + draw(64)}
        layer |= {"ffn.proj_1": draw(2 * width, 64), "ffn.proj_2": draw(64, width), "ffn_norm": 1 + draw(64)}
        state |= {f"layers.{i}.{name}.weight": value for name, value in layer.items()}
    return state


def llama_state(rng, config=LLAMA) -> dict[str, np.ndarray]:
    shapes = {name: value.shape for name, value in tree_flatten(build_model(config).parameters())}
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


def write_torch(path: Path, state: dict) -> Path:
    return files.write_torch(path, {name: files.whole(value) for name, value in state.items()})


def write_hugging_face(folder: Path, state: dict, config: dict, form: str = "safetensors") -> Path:
    """A Hugging Face folder of two shards with an index and a (stand-in) tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"stand": "in"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    weight_map = {}
    for i in range(2):
        part = dict(list(state.items())[i::2])
        path = folder / f"{stem}-{i + 1:05d}-of-00002{suffix}"
        weight_map.update(dict.fromkeys(part, path.name))
        if form == "torch":
            write_torch(path, part)
        else:
            mx.save_safetensors(str(path), {name: mx.array(value) for name, value in part.items()})
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def by_hand(config: dict, weights: dict[str, mx.array]) -> mx.array:
    """Logits of mlx-lm's model with these weights."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.load_weights(list(weights.items()), strict=True)
    return model(TOKENS)


def converted(folder: Path) -> tuple[mx.array, dict]:
    """Logits of the converted folder in stock mlx-lm, and its config."""
    model, config = load_model(folder)
    return model(TOKENS), config


def test_corenet_openelm(tmp_path, rng):
    state = corenet_state(rng)
    path = write_torch(tmp_path / "checkpoint_average.pt", state)
    report = convert(path, tmp_path / "out")
    logits, config = converted(tmp_path / "out")
    weights = {f"transformer.{name}": mx.array(value) for name, value in state.items()}
    weights["transformer.token_embeddings.weight"] = weights["transformer.token_embeddings.weight"][:32000]
    assert mx.array_equal(logits, by_hand(config, weights))
    assert config["vocab_size"] == 32000
    assert config["num_query_heads"] == [4, 8]
    assert config["num_kv_heads"] == [1, 2]
    assert config["torch_dtype"] == "float32"
    assert report.ok
    assert report.written
    assert report.parameters == sum(w.size for w in weights.values())


def test_corenet_openelm_untied_in_training_checkpoint(tmp_path, rng, caplog):
    """DistributedDataParallel's prefix, the optimizer beside the model, and a head of its own."""
    state = corenet_state(rng)
    state["classifier.weight"] = rng.standard_normal((32128, 64)).astype(np.float32)
    wrapped = {f"module.{name}": files.whole(value) for name, value in state.items()}
    training = {"epoch": 1, "model_state_dict": wrapped, "optimizer": {"lr": 0.1}}
    path = files.write_torch(tmp_path / "training.pt", training)
    convert(path, tmp_path / "out")
    assert caplog.messages[0] == "training.pt: weights taken from 'model_state_dict'; ignored: epoch, optimizer"
    source = open_source(tmp_path / "out")
    assert source.tensors["lm_head.weight"].shape == (32000, 64)
    assert source.config["share_input_output_layers"] is False


@pytest.mark.parametrize("size", SIZES)
def test_published_openelm_config_from_shapes(size):
    """The four published sizes are told from shapes alone, padded vocabulary included."""
    want = published_config(size)
    shapes = {n: v.shape for n, v in tree_flatten(build_model(want).parameters())}
    shapes["transformer.token_embeddings.weight"] = (32128, want["model_dim"])
    tensors = {
        name.removeprefix("transformer."): Tensor(name, "F32", shape, 0, Path("x.pt"), lambda: None)
        for name, shape in shapes.items()
    }
    assert config_from_shapes(Source(Path("x.pt"), "torch", (), None, tensors, {}), tensors) == want


def test_hugging_face_openelm(tmp_path, rng):
    state = {f"transformer.{name}": value for name, value in corenet_state(rng, rows=32000).items()}
    convert(write_torch(tmp_path / "x.pt", corenet_state(rng)), tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_openelm.Model"}
    convert(write_hugging_face(tmp_path / "hf", state, config), tmp_path / "out")
    logits, config = converted(tmp_path / "out")
    assert mx.array_equal(logits, by_hand(config, {name: mx.array(value) for name, value in state.items()}))
    assert "auto_map" not in config


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_hugging_face_llama(tmp_path, rng, form):
    state = llama_state(rng)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = write_hugging_face(tmp_path / "hf", state, LLAMA, form)
    report = convert(folder, tmp_path / "out")
    del state["model.layers.0.self_attn.rotary_emb.inv_freq"]
    logits, config = converted(tmp_path / "out")
    assert mx.array_equal(logits, by_hand(config, {name: mx.array(value) for name, value in state.items()}))
    assert list(report.dropped) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert report.tokenizer == ["tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"stand": "in"}'
    assert config["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_dense_families(tmp_path, rng, kind):
    config = LLAMA | {"model_type": kind, "head_dim": 16, "tie_word_embeddings": kind != "mistral"}
    state = llama_state(rng, config)
    convert(write_hugging_face(tmp_path / "hf", state, config), tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    assert all(mx.array_equal(value, mx.array(state[name])) for name, value in tree_flatten(model.parameters()))


def test_dtype(tmp_path, rng):
    state = llama_state(rng)
    folder = write_hugging_face(tmp_path / "hf", state, LLAMA)
    report = convert(folder, tmp_path / "out", dtype="bfloat16")
    source = open_source(tmp_path / "out")
    for name, value in state.items():
        assert mx.array_equal(source.tensors[name].read(), mx.array(value).astype(mx.bfloat16))
    assert source.config["torch_dtype"] == "bfloat16"
    assert ("model.norm.weight", (64,), "F32", "BF16") in report.changes
    assert len(report.changes) == len(state)
    assert f"dtype      F32 -> BF16: {len(state)} tensors" in report.lines()


def test_values_too_large_for_half(tmp_path, rng, left_behind):
    state = llama_state(rng)
    state["model.norm.weight"][3] = 1e6
    folder = write_hugging_face(tmp_path / "hf", state, LLAMA)
    with pytest.raises(MlxeffError, match=r"model\.norm\.weight: wanted values that float16 can hold, got 1e\+06"):
        convert(folder, tmp_path / "out", dtype="float16")
    assert left_behind() == ["hf"]


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (3, 64)])
def test_quantize(tmp_path, rng, bits, group):
    """Equal to mlx-lm's own rule: every Linear and Embedding whose rows the group divides."""
    state = llama_state(rng)
    convert(
        write_hugging_face(tmp_path / "hf", state, LLAMA), tmp_path / "out", dtype="float16", quantize=(bits, group)
    )
    model, config = load_model(tmp_path / "out")
    module = importlib.import_module("mlx_lm.models.llama")
    want = module.Model(module.ModelArgs.from_dict(LLAMA))
    want.load_weights([(name, mx.array(value).astype(mx.float16)) for name, value in state.items()])
    nn.quantize(
        want, group, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group == 0
    )
    got, want = dict(tree_flatten(model.parameters())), dict(tree_flatten(want.parameters()))
    assert got.keys() == want.keys()
    assert all(got[name].dtype == value.dtype and mx.array_equal(got[name], value) for name, value in want.items())
    assert config["quantization"] == {"group_size": group, "bits": bits, "mode": "affine"}
    dense = "model.layers.0.mlp.down_proj.scales"  # 96 columns: 32 divides them, 64 does not
    assert (dense in got) == (group == 32)


def test_quantised_folder_passes_through(tmp_path, rng, caplog):
    """An mlx-lm folder comes out as it went in, scales cast on request."""
    convert(write_hugging_face(tmp_path / "hf", llama_state(rng), LLAMA), tmp_path / "q", quantize=(4, 32))
    convert(tmp_path / "q", tmp_path / "again")
    first, second = open_source(tmp_path / "q"), open_source(tmp_path / "again")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(mx.array_equal(t.read(), second.tensors[n].read()) for n, t in first.tensors.items())
    assert mx.array_equal(converted(tmp_path / "q")[0], converted(tmp_path / "again")[0])
    convert(tmp_path / "q", tmp_path / "half", dtype="float16")
    assert open_source(tmp_path / "half").tensors["lm_head.scales"].dtype == "F16"
    assert caplog.messages == ["convert: scales of 16 quantised modules are rounded to F16"]
    convert(tmp_path / "half", tmp_path / "wide", dtype="float32")
    assert len(caplog.messages) == 1, "widening is exact"


def tensors(folder: Path) -> dict[str, mx.array]:
    return {name: tensor.read() for name, tensor in open_source(folder).tensors.items()}


def assert_same(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert mx.array_equal(got[name], value), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_those_of_mlx_lm(tmp_path, recipe):
    from mlx_lm import convert as theirs

    folder = write_tiny_model(tmp_path / "tiny", {"num_hidden_layers": 9, "tie_word_embeddings": False})
    convert(folder, tmp_path / "ours", quantize=(recipe, 32))
    theirs(str(folder), str(tmp_path / "theirs"), quantize=True, q_group_size=32, quant_predicate=recipe)
    assert_same(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    ours, theirs = ({w.shape[-1] for n, w in tensors(tmp_path / "ours").items() if part in n and w.dtype == mx.uint32}
                    for part in ("down_proj.weight", "up_proj.weight"))  # fmt: skip
    assert (len(ours), len(theirs)) == (2, 1), "some layers have more bits"
    assert load_model(tmp_path / "ours")[0](TOKENS).shape == (1, 5, 261)
    assert load_path(tmp_path / "ours").model(TOKENS, load_path(folder).model.new_cache()).shape == (1, 5, 261)


def test_quantize_keeps_some_layers(tmp_path, rng):
    folder = write_hugging_face(tmp_path / "hf", llama_state(rng), LLAMA)
    convert(folder, tmp_path / "out", quantize=(4, 32), keep=(("lm_head", 8), ("layers.0.mlp", 16)))
    source, model = open_source(tmp_path / "out"), load_model(tmp_path / "out")[0]
    own = {"lm_head": {"group_size": 32, "bits": 8, "mode": "affine"}}
    assert source.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} | own
    assert (model.lm_head.bits, model.layers[1].mlp.up_proj.bits) == (8, 4)
    assert not hasattr(model.layers[0].mlp.up_proj, "bits")
    assert source.config["mlxeff"]["options"]["keep"] == "lm_head:8,layers.0.mlp:16"
    with pytest.raises(MlxeffError, match="keep: nothing: wanted parts of names of linear layers"):
        convert(folder, tmp_path / "no", quantize=(4, 32), keep=(("nothing", 8),))
    with pytest.raises(MlxeffError, match=r"keep: wanted with quantize or seedlm \(--quantize or --seedlm\), got"):
        convert(folder, tmp_path / "no", keep=(("lm_head", 8),))


def test_quantize_keeps_a_head_that_a_tied_model_does_not_have(tmp_path):
    """The same names serve every model of a family, as with SeedLM."""
    folder = write_tiny_model(tmp_path / "tied", {"tie_word_embeddings": True})
    convert(folder, tmp_path / "out", quantize=(4, 32), keep=(("embed", 8), ("lm_head", 8)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    assert "lm_head" not in config["quantization"]


def test_matrices_that_the_group_does_not_divide_are_named(tmp_path, rng, caplog):
    convert(write_hugging_face(tmp_path / "hf", llama_state(rng), LLAMA), tmp_path / "out", quantize=(4, 64))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "convert: quantize: 2 of 16 matrices stay dense, whose columns a group of 64 does not divide "
        "(groups of 32 divide them): model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    )


@pytest.mark.parametrize(
    "mode", [("affine", 4, 32), ("affine", 8, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dequantize_what_mlx_lm_quantised(tmp_path, mode, dtype):
    from mlx_lm import convert as theirs

    (mode, bits, group), folder = mode, write_tiny_model(tmp_path / "tiny")
    theirs(str(folder), str(tmp_path / "q"), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode, dtype=dtype)
    convert(tmp_path / "q", tmp_path / "out", dequantize=True)
    got, packed = tensors(tmp_path / "out"), tensors(tmp_path / "q")
    assert "quantization" not in open_source(tmp_path / "out").config
    for name, value in got.items():
        scales = packed.get(name.replace(".weight", ".scales"))
        if scales is None:
            assert mx.array_equal(value, packed[name])
            continue
        parts = [packed.get(name.replace(".weight", part)) for part in (".scales", ".biases")]
        parts = [each.astype(mx.float32) if mode == "affine" else each for each in parts]
        want = mx.dequantize(packed[name], *parts, group_size=group, bits=bits, mode=mode)
        assert mx.array_equal(value, want.astype(getattr(mx, dtype)))
    if dtype == "float32":
        theirs = load_model(tmp_path / "q")[0](TOKENS)
        assert_close(converted(tmp_path / "out")[0], theirs, "logits", rtol=2.0**-15)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_0"])
def test_quantised_gguf_becomes_dense_or_other(tmp_path, rng, caplog, kind):
    path, _ = gguf_file(tmp_path / "x.gguf", rng, kind)
    convert(path, tmp_path / "dense", dequantize=True)
    convert(path, tmp_path / "out", quantize=(4, 32))
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith(f"convert: quantize: 16 matrices are rounded already (16 of {kind}): ") for line in lines
    )
    dense, out = tensors(tmp_path / "dense"), tensors(tmp_path / "out")
    embedding = open_source(path).tensors["token_embd.weight"].read()
    assert mx.array_equal(dense["model.embed_tokens.weight"].astype(mx.float32), embedding.astype(mx.float16))
    want = mx.quantize(dense[Q], 32, 4)
    assert all(mx.array_equal(out[Q.replace("weight", part)], each) for part, each in zip(("weight", "scales"), want))


def test_seed_encoded_becomes_dense_or_affine(tmp_path, rng, caplog):
    folder = write_hugging_face(tmp_path / "hf", llama_state(rng), LLAMA)
    convert(folder, tmp_path / "seeds", seedlm="4", data_free=True)
    convert(tmp_path / "seeds", tmp_path / "dense", dequantize=True)
    convert(tmp_path / "seeds", tmp_path / "out", quantize=(4, 32))
    assert any("14 of SeedLM 4, 2 of affine 8 bits" in record.getMessage() for record in caplog.records)
    source = open_source(tmp_path / "seeds")
    model = build_model(source.config, source.tensors)
    model.update(tree_unflatten([(name, tensor.read()) for name, tensor in source.tensors.items()]))
    dense = tensors(tmp_path / "dense")
    assert mx.array_equal(dense[Q], model.layers[0].self_attn.q_proj.dense(mx.float32))
    assert not {"quantization", "seedlm"} & set(open_source(tmp_path / "dense").config)
    assert mx.array_equal(tensors(tmp_path / "out")[Q], mx.quantize(dense[Q], 32, 4)[0])
    assert converted(tmp_path / "dense")[0].shape == converted(tmp_path / "out")[0].shape


def test_dequantize_of_dense_weights_is_refused(tmp_path, rng):
    folder = write_hugging_face(tmp_path / "hf", llama_state(rng), LLAMA)
    with pytest.raises(MlxeffError, match="dequantize: wanted a checkpoint that is quantised, got dense weights"):
        convert(folder, tmp_path / "out", dequantize=True)
    with pytest.raises(MlxeffError, match="dequantize: wanted it without quantize"):
        convert(folder, tmp_path / "out", dequantize=True, quantize=(4, 32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_quantised(tmp_path, rng, left_behind, value):
    """As `seedlm` refuses them."""
    state = llama_state(rng)
    state[Q][3, 5] = value
    folder = write_hugging_face(tmp_path / "hf", state, LLAMA)
    with pytest.raises(MlxeffError) as caught:
        convert(folder, tmp_path / "out", quantize=(4, 32))
    assert str(caught.value) == f"tensor {Q}: wanted finite weights, got {value} at (3, 5)"
    assert left_behind() == ["hf"]


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings(tmp_path, rng, caplog, same):
    """Dropped, as stock mlx-lm drops it; said where it is another matrix."""
    config = LLAMA | {"tie_word_embeddings": True}
    state = llama_state(rng, config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 if same else 2)
    convert(write_hugging_face(tmp_path / "hf", state, config), tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records]
    wanted = f"{tmp_path / 'hf'}: lm_head.weight is dropped, though it is not the embedding: config.json says that they"
    assert [line[: len(wanted)] for line in lines] == ([] if same else [wanted])
    assert "lm_head.weight" not in open_source(tmp_path / "out").tensors


def gguf_file(path, rng, kind, metadata=None):
    """The Llama of LLAMA as a GGUF file, its q and k rows in llama.cpp's order, with further metadata."""
    state, names = (
        llama_state(rng),
        {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    )
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.{i}.{new}": f"blk.{i}.{old}" for i in range(2) for new, old in parts.items()}
    tensors = {}
    for name, value in state.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if heads:
            value = value.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(value.shape)
        tensors[names[name.removesuffix(".weight")] + ".weight"] = (value, kind if value.ndim == 2 else "F32")
    keys = {"block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 96}
    keys |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    return files.write_gguf(
        path, "llama", {f"llama.{k}": v for k, v in keys.items()} | (metadata or {}), tensors
    ), state


def test_gguf_of_full_precision(tmp_path, rng, caplog):
    path, state = gguf_file(tmp_path / "x.gguf", rng, "F32")
    convert(path, tmp_path / "out")
    logits, config = converted(tmp_path / "out")
    assert mx.array_equal(logits, by_hand(config, {name: mx.array(value) for name, value in state.items()}))
    assert caplog.messages == [f"{path}: no tokenizer found, {tmp_path / 'out'} has none: name one with --tokenizer"]


@pytest.mark.parametrize(("rule", "read"), [("yarn", "attention_factor"), ("linear", "magnitude")])
def test_gguf_attn_factor(tmp_path, rng, caplog, rule, read):
    """YaRN's becomes keys that stock mlx-lm reads; that of another rule does not, which a notice says."""
    keys = {"type": rule, "factor": 4.0, "attn_factor": 1.5}
    path, _ = gguf_file(tmp_path / "x.gguf", rng, "F32", {f"llama.rope.scaling.{k}": v for k, v in keys.items()})
    convert(path, tmp_path / "out")
    logits, config = converted(tmp_path / "out")
    assert config["rope_scaling"][read] == pytest.approx(1.5 if rule == "linear" else 1.5 * (0.1 * math.log(4) + 1))
    model, _ = assembly.load_model(path)
    error = mx.abs(logits - model(TOKENS, model.new_cache())).max().item()
    assert error < 1e-6 if rule == "yarn" else error > 1e-4
    line = f"{path}: rope.scaling.attn_factor becomes rope_scaling's magnitude in config.json, which only mlxeff reads"
    assert (line in caplog.messages) == (rule == "linear")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_stay_as_they_are(tmp_path, rng, kind):
    path, _ = gguf_file(tmp_path / "x.gguf", rng, kind)
    convert(path, tmp_path / "out")
    model, config = load_model(tmp_path / "out")
    source, bits = open_source(path), 8 if kind == "Q8_0" else 4
    head, norm = model.lm_head, model.model.norm.weight
    assert (head.bits, head.group_size, head.scales.dtype, norm.dtype) == (bits, 32, mx.float16, mx.float16)
    parts = source.tensors["output.weight"].read_packed()
    for got, want in zip((head.weight, head.scales, head.biases), parts, strict=True):
        assert mx.array_equal(got, want)
    assert config["quantization_config"] == config["quantization"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf_end_tokens_in_stock_mlx_lm(tmp_path, rng, kind):
    """Those that the file names for the end of a turn or a message, and those that are known by their names only."""
    from mlx_lm import load as load_with_mlx_lm

    texts = ["<unk>", "<s>", "<eos>", "<turn>", "<message>", "<|im_end|>", "<|im_start|>", "\u2581"]
    texts += [chr(character) for character in range(0x21, 0x7F)]
    tokens = [*texts, *(f"x{i}" for i in range(128 - len(texts)))]
    metadata = {
        "model": kind,
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [2, 3, 3, 4, 3, 1, 4] + [1] * 121,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 3,
        "eom_token_id": 4,
    }
    metadata |= {"scores": [0.0] * 128} if kind == "llama" else {"merges": ["x x"]}
    if kind == "gpt2":
        metadata["tokens"] = [*tokens[:-1], "xx"]
    path, _ = gguf_file(tmp_path / "x.gguf", rng, "F32", {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    ends = {2, 3, 4, 5}
    assert load_path(path).tokenizer.eos_token_ids == ends
    convert(path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [2, 3, 4, 5]
    assert load_path(tmp_path / "out").tokenizer.eos_token_ids == ends
    theirs = load_with_mlx_lm(str(tmp_path / "out"))[1]
    assert theirs.eos_token_ids == ends
    for text in ("a<|im_start|>b<|im_end|>", "<turn>"):
        want = load_path(path).tokenizer.encode(text)
        assert load_path(tmp_path / "out").tokenizer.encode(text) == theirs.encode(text) == want


def test_end_tokens_and_templates_of_a_folder_are_kept(tmp_path):
    """Also those of generation_config.json and of additional_chat_templates/, with --tokenizer too."""
    from mlx_lm import load as load_with_mlx_lm

    source = write_tiny_model(tmp_path / "in", {"eos_token_id": [257, 258]})
    (source / "generation_config.json").write_text('{"eos_token_id": [259]}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("T")
    (source / "chat_template.jinja").write_text("D")
    messages = [{"role": "user", "content": "x"}]
    for name, more in (("a", {}), ("b", {"tokenizer": source}), ("c", {"quantize": (4, 32)})):
        report = convert(source, tmp_path / name, **more)
        assert "additional_chat_templates/tool_use.jinja" in report.tokenizer
        ours, theirs = load_path(tmp_path / name).tokenizer, load_with_mlx_lm(str(tmp_path / name))[1]
        assert ours.eos_token_ids == {257, 258, 259}
        assert theirs.eos_token_ids == load_with_mlx_lm(str(source))[1].eos_token_ids == {257, 259}
        text = ours.apply_chat_template(messages, tokenize=False, tools=[{}])
        assert text == theirs.apply_chat_template(messages, tokenize=False, tools=[{}], chat_template="tool_use") == "T"


@pytest.mark.slow
def test_built_in_gguf_in_stock_mlx_lm(tmp_path, smollm2_gguf):
    """The whole way: GGUF -> folder -> mlx-lm with its own tokenizer -> the same logits up to the rounding of float16.
    Of one token, since MLX multiplies quantised matrices slowly on a CPU."""
    from mlx_lm import load

    report = convert(smollm2_gguf, tmp_path / "out")
    assert report.tokenizer == ["built from the GGUF metadata"]
    assert report.parameters == 134_515_008
    model, tokenizer = load(str(tmp_path / "out"))
    own = load_path(smollm2_gguf)
    assert tokenizer.eos_token_ids == own.tokenizer.eos_token_ids
    text = "The capital of France is Paris, été 🤖."
    ids = tokenizer.encode(text)
    assert ids == own.tokenizer.encode(text)
    first = mx.array([ids[:1]])
    got, want = model(first).astype(mx.float32), own.model(first, own.model.new_cache())
    assert mx.array_equal(got.argmax(-1), want.argmax(-1))
    assert mx.abs(got - want).max().item() < 0.03 * mx.abs(want).max().item()


def test_provenance(tmp_path, rng):
    path = write_torch(tmp_path / "x.pt", corenet_state(rng))
    convert(path, tmp_path / "out", dtype="float16", quantize=(8, 64))
    block = json.loads((tmp_path / "out" / "config.json").read_text())["mlxeff"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert block["source"] == "x.pt"
    assert block["source_sha256"] == digest
    assert block["format_version"] == 1
    assert block["options"] == {"dtype": "float16", "quantize": "8:64"}


def test_ignored_keys_are_left_out_and_recorded(tmp_path, rng, caplog):
    source = write_tiny_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attn_scale": 2.0}))
    with pytest.raises(MlxeffError, match="run with --ignore-keys attn_scale"):
        convert(source, tmp_path / "out")
    report = convert(source, tmp_path / "out", ignore_keys=["attn_scale", "attn_scales"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "attn_scale" not in written
    assert written["mlxeff"]["options"]["ignore_keys"] == report.options["ignore_keys"] == "attn_scale,attn_scales"
    assert any("ignore_keys attn_scale,attn_scales" in line for line in report.lines())
    assert caplog.messages == [f"{source}: the config has no key attn_scales to ignore"]
    assert mx.array_equal(*(converted(folder)[0] for folder in (source, tmp_path / "out")))


def test_ignored_keys_of_a_derived_config(tmp_path, rng):
    path, _ = gguf_file(tmp_path / "x.gguf", rng, "F32", {"llama.rope.scaling.factor": 4.0})
    convert(path, tmp_path / "out", ignore_keys=["rope_scaling"])
    assert "rope_scaling" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_tokenizer_from_elsewhere(tmp_path, rng):
    """OpenELM ships no tokenizer: Llama 2's tokenizer.model is enough, with the config that stock mlx-lm needs."""
    path = write_torch(tmp_path / "x.pt", corenet_state(rng))
    (tmp_path / "llama2").mkdir()
    with pytest.raises(MlxeffError, match=r"no tokenizer: looked for tokenizer\.json"):
        convert(path, tmp_path / "out", tokenizer=tmp_path / "llama2")
    (tmp_path / "llama2" / "tokenizer.model").write_bytes(b"model")
    for i, place in enumerate((tmp_path / "llama2", tmp_path / "llama2" / "tokenizer.model")):
        assert convert(path, tmp_path / f"out{i}", tokenizer=place).tokenizer == ["tokenizer.model"]
        assert (tmp_path / f"out{i}" / "tokenizer.model").read_bytes() == b"model"
        assert json.loads((tmp_path / f"out{i}" / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_dry_run_writes_nothing(tmp_path, rng, left_behind):
    state = llama_state(rng)
    state["model.norm.weight"] = np.ones(63, np.float32)
    state["strange"] = state.pop("lm_head.weight")
    write_hugging_face(tmp_path / "hf", state, LLAMA)
    report = convert(tmp_path / "hf", tmp_path / "out", dtype="float16", dry_run=True)
    assert left_behind() == ["hf"]
    assert (report.ok, report.written) == (False, False)
    assert report.missing == ["lm_head.weight"]
    assert report.unexpected == ["strange"]
    assert report.wrong_shape == [("model.norm.weight", (64,), (63,))]
    assert report.disk_bytes == sum(value.nbytes for value in state.values()) // 2
    assert 0 < report.peak_bytes < 4 * report.source_bytes
    text = "\n".join(report.lines())
    for words in (
        "missing    lm_head.weight",
        "unexpected strange",
        "wanted (64,), got (63,)",
        "tokenizer.json",
        "would convert",
    ):
        assert words in text
    assert json.loads(json.dumps(report.as_dict()))["missing"] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "missing 1 tensors: lm_head.weight"),
        (lambda s: s.update(strange=np.ones(3, np.float32)), "1 unknown tensors: strange"),
        (lambda s: s.update({"model.norm.weight": np.ones(3, np.float32)}), "wanted shape (64,), got (3,)"),
    ],
)
def test_differences_are_refused(tmp_path, rng, left_behind, change, message):
    state = llama_state(rng)
    change(state)
    write_hugging_face(tmp_path / "hf", state, LLAMA)
    with pytest.raises(MlxeffError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    assert message in str(caught.value)
    assert left_behind() == ["hf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype: wanted one of float16, bfloat16, float32, got 'float8'"),
        ({"quantize": (7, 64)}, "got 7:64"),
        ({"quantize": (4, 48)}, "got 4:48"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(MlxeffError) as caught:
        convert(tmp_path, tmp_path / "out", **options)
    assert message in str(caught.value)


def test_sources_that_are_not_models(tmp_path, rng):
    path = write_torch(tmp_path / "x.pt", {"a": np.ones(3, np.float32)})
    with pytest.raises(MlxeffError, match=r"wanted an OpenELM or a model with config\.json, got a"):
        convert(path, tmp_path / "out")
    folder = write_hugging_face(tmp_path / "hf", llama_state(rng), LLAMA | {"model_type": "mamba"})
    with pytest.raises(MlxeffError, match="model_type: wanted one of"):
        convert(folder, tmp_path / "out")
    broken = corenet_state(rng)
    broken["layers.1.attn.qkv_proj.weight"] = np.ones((100, 64), np.float32)
    with pytest.raises(MlxeffError, match=r"layers\.1\.attn\.qkv_proj\.weight: wanted rows of whole heads of 16"):
        convert(write_torch(tmp_path / "broken.pt", broken), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(MlxeffError, match="wanted a new folder"):
        convert(write_torch(tmp_path / "y.pt", corenet_state(rng)), tmp_path / "taken")


def test_disk_full_leaves_nothing(tmp_path, rng, left_behind):
    path = write_torch(tmp_path / "x.pt", corenet_state(rng))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(MlxeffError, match="not written, nothing is left behind"):
            convert(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert left_behind() == ["x.pt"]


MEMORY = """
import mlxeff.convert, gguf, safetensors
before = peak()
mlxeff.convert.convert(sys.argv[1], sys.argv[2], dtype="float16")
print(peak() - before)
"""


def test_peak_memory(tmp_path, rng):
    """float32 archive of one 120 MB shard -> float16: below 1.3 times the shard, cast included."""
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8000}
    config |= {"num_attention_heads": 8}
    shapes = {name: value.shape for name, value in tree_flatten(build_model(config).parameters())}
    state = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    shard = write_torch(tmp_path / "hf" / "pytorch_model.bin", state).stat().st_size
    command = [sys.executable, "-c", textwrap.dedent(files.PEAK + MEMORY), tmp_path / "hf", tmp_path / "out"]
    peak = int(subprocess.check_output(command, text=True))
    assert 0 < peak < 1.3 * shard, f"{peak / shard:.2f} times the shard"
