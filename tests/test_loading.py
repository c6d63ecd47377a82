"""Folders → (model, tokenizer): what mlx-lm writes in every quantisation, Hugging Face's dtypes and shards, PyTorch
files; the arithmetic type; what is refused, with its one line.

Logits are compared exactly with mlx-lm's model of the same folder, brought to the dtype in which this package computes.
"""

import json
import logging
import os
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import checkpoint_files as files
from helpers import assert_close
from mlxeff import MlxeffError, kernels, load, stream_generate
from mlxeff.assembly.model import load_path
from mlxeff.models import openelm
from mlxeff.ops import mlx_only
from mlxeff.tokenizer import Tokenizer
from tiny_model import (
    CONFIG,
    GEMMA,
    PHI,
    quantise_folder,
    write_foreign,
    write_random_model,
    write_tiny_model,
)

ROOT = Path(__file__).resolve().parent.parent
native, _ = kernels.native()
needs_native = pytest.mark.skipif(native is None or kernels.device() != "cpu", reason="no native CPU kernels in use")


TOKENS = mx.array([[256, 72, 101, 108, 108, 111, 44, 32, 119]])
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def logits_of(loaded) -> mx.array:
    return loaded.model(TOKENS, loaded.model.new_cache())


def assert_equals_mlx_lm(folder) -> None:
    """mlx-lm's logits of the folder in our arithmetic type: exactly by MLX's operations, to rounding by native ones."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    def theirs(dtype: str) -> mx.array:
        model, _ = load_model(folder)
        model.set_dtype(DTYPES[dtype])
        return model(TOKENS, cache=make_prompt_cache(model))

    loaded = load_path(folder)
    if loaded.backend.startswith("native"):
        assert loaded.dtype == "float32"
        assert_close(logits_of(loaded), theirs("float32"), f"{folder.name}, {loaded.backend}", rtol=2.0**-15)
        loaded.model.native = None
        assert_close(logits_of(loaded), theirs("float32"), f"{folder.name}, native operators", rtol=2.0**-15)
    with mlx_only():
        plain = load_path(folder)
        want = theirs(plain.dtype)
        assert_close(logits_of(plain), want, folder.name, rtol=0, atol=0)
    assert np.std(np.array(want.astype(mx.float32))) > 0.1, "constant logits would compare nothing"


def quantised(source, target, bits: int, group: int, mode: str = "affine", **more):
    from mlx_lm import convert

    convert(str(source), str(target), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode, **more)
    return target


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [
        (2, 32, "affine"),
        (3, 32, "affine"),
        (4, 64, "affine"),
        (5, 32, "affine"),
        (6, 32, "affine"),
        (8, 32, "affine"),
        (4, 32, "mxfp4"),
        (8, 32, "mxfp8"),
        (4, 16, "nvfp4"),
    ],
)
def test_folders_that_mlx_lm_quantised(tmp_path, tiny_folder, bits, group, mode):
    folder = quantised(tiny_folder, tmp_path / "quantised", bits, group, mode)
    layer = load_path(folder).model.layers[0].self_attn.q_proj
    assert (layer.bits, layer.group_size, layer.mode) == (bits, group, mode)
    assert_equals_mlx_lm(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantised_with_half_precision_scales(tmp_path, tiny_folder, dtype):
    folder = quantised(tiny_folder, tmp_path / "quantised", 4, 32, dtype=dtype)
    with mlx_only():
        assert load_path(folder).dtype == (dtype if kernels.has_metal() else "float32")
    assert_equals_mlx_lm(folder)


def test_modules_with_a_quantisation_of_their_own(tmp_path, tiny_folder):
    """Two widths, one module left dense by its entry, one by having no scales."""

    def choose(path: str, _: nn.Module, *__):
        if path.endswith("o_proj"):
            return False
        return {"group_size": 64, "bits": 8} if "v_proj" in path or "embed" in path else True

    folder = quantised(tiny_folder, tmp_path / "mixed", 4, 32, quant_predicate=choose)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    config["quantization"]["model.layers.0.self_attn.o_proj"] = False
    (folder / "config.json").write_text(json.dumps(config))
    attention = load_path(folder).model.layers[0].self_attn
    assert (attention.q_proj.bits, attention.v_proj.bits, attention.v_proj.group_size) == (4, 8, 64)
    assert isinstance(attention.o_proj, nn.Linear)
    assert_equals_mlx_lm(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_folders(tmp_path, tiny_folder, dtype):
    from mlx_lm import convert

    convert(str(tiny_folder), str(tmp_path / "dense"), dtype=dtype)
    with mlx_only():
        loaded = load_path(tmp_path / "dense")
    widened = dtype == "float16" and not kernels.has_metal()
    assert loaded.dtype == ("float32" if widened else dtype)
    assert {value.dtype for _, value in tree_flatten(loaded.model.parameters())} == {DTYPES[loaded.dtype]}
    assert_equals_mlx_lm(tmp_path / "dense")


@pytest.mark.parametrize(
    ("metal", "stored", "quantized", "wanted"),
    [
        (True, mx.float16, False, mx.float16),
        (True, mx.bfloat16, True, mx.bfloat16),
        (True, mx.float32, True, mx.float32),
        (False, mx.float32, False, mx.float32),
        (False, mx.float16, False, mx.float32),
        (False, mx.float16, True, mx.float32),
        (False, mx.bfloat16, True, mx.float32),
        (False, mx.bfloat16, False, mx.bfloat16),
    ],
)
def test_arithmetic_type(monkeypatch, metal, stored, quantized, wanted):
    monkeypatch.setattr(kernels, "has_metal", lambda: metal)
    assert kernels.arithmetic_dtype(stored, quantized) == wanted


@needs_native
@pytest.mark.parametrize("bits", [None, 4])
def test_native_kernels_take_weights_as_they_are_stored(tmp_path, tiny_folder, bits):
    folder = tiny_folder if bits is None else quantised(tiny_folder, tmp_path / "quantised", bits, 32, dtype="float16")
    loaded = load_path(folder)
    stored = {name: value.dtype for name, value in weights_in(folder).items()}
    assert {name: value.dtype for name, value in tree_flatten(loaded.model.parameters())} == stored
    assert logits_of(loaded).dtype == mx.float32
    assert_equals_mlx_lm(folder)


def test_a_few_float32_norms_do_not_decide(tmp_path):
    """The commonest dtype by bytes is the stored one; all floats come to one type."""
    folder = write_tiny_model(tmp_path / "tiny")
    change(folder, lambda w: {k: v if "norm" in k else v.astype(mx.bfloat16) for k, v in w.items()})
    with mlx_only():
        loaded = load_path(folder)
    assert loaded.dtype == "bfloat16"
    assert {str(v.dtype) for _, v in tree_flatten(loaded.model.parameters())} == {"mlx.core.bfloat16"}


def weights_in(folder) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def change(folder, edit) -> None:
    """Rewrite the folder's weights."""
    weights = edit(dict(weights_in(folder)))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def change_config(folder, **keys) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def split(folder) -> dict[str, str]:
    """Turn the one weights file into three shards with an index; returns the index's map."""
    weights, shards = weights_in(folder), {}
    mx.eval(weights)
    for at, name in enumerate(sorted(weights)):
        shards.setdefault(f"model-{at % 3 + 1:05d}-of-00003.safetensors", {})[name] = weights[name]
    (folder / "model.safetensors").unlink()
    for name, part in shards.items():
        mx.save_safetensors(str(folder / name), part, {"format": "mlx"})
    names = {tensor: file for file, part in shards.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


@pytest.mark.parametrize("bits", [None, 4])
def test_shards_with_an_index(tmp_path, tiny_folder, bits):
    folder = tmp_path / "sharded"
    if bits:
        quantised(tiny_folder, folder, bits, 32)
        (folder / "model.safetensors.index.json").unlink()
    else:
        shutil.copytree(tiny_folder, folder)
    whole = logits_of(load_path(folder))
    split(folder)
    assert_close(logits_of(load_path(folder)), whole, "three shards or one file", rtol=0, atol=0)
    assert_equals_mlx_lm(folder)


def test_pytorch_file(tmp_path, tiny_folder):
    folder = tmp_path / "torch"
    shutil.copytree(tiny_folder, folder)
    state = {name: files.whole(np.array(value)) for name, value in weights_in(folder).items()}
    files.write_torch(folder / "pytorch_model.bin", state)
    (folder / "model.safetensors").unlink()
    want = logits_of(load_path(tiny_folder))
    assert_close(logits_of(load_path(folder)), want, "pytorch_model.bin", rtol=0, atol=0)
    assert_close(logits_of(load_path(folder / "pytorch_model.bin")), want, "the file by name", rtol=0, atol=0)


def write_openelm(folder):
    config = openelm.published_config("270M", 261) | {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "head_dim": 16,
        "num_query_heads": [4, 8],
        "num_kv_heads": [1, 2],
        "ffn_multipliers": [0.5, 4.0],
        "ffn_dim_divisor": 32,
    }
    return write_random_model(folder, config)


@pytest.mark.parametrize(("name", "expected"), [("OpenELM-270M-Instruct", True), ("OpenELM-270M", False)])
def test_an_openelm_is_instruct_by_the_name_of_its_own_folder(tmp_path, name, expected):
    """Not by the names of the folders above it, of which one here has the word of this test's name."""
    folder = write_openelm(tmp_path / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_path(folder).tokenizer.has_chat_template is expected


def test_openelm_folder(tmp_path):
    """Layer-wise scaling, names and lists as in Apple's release; an output head beside shared embeddings is unused."""
    folder = write_openelm(tmp_path / "OpenELM")
    assert_equals_mlx_lm(folder)
    want = logits_of(load_path(folder))
    change(folder, lambda w: w | {"lm_head.weight": mx.zeros((261, 64))})
    assert_close(logits_of(load_path(folder)), want, "with a head", rtol=0, atol=0)


def test_tensors_that_the_model_derives_itself_are_unused(tmp_path, tiny_folder):
    folder = tmp_path / "old"
    shutil.copytree(tiny_folder, folder)
    extra = {"lm_head.weight": mx.zeros((261, 64)), "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(8)}
    change(folder, lambda w: w | extra)
    assert_close(logits_of(load_path(folder)), logits_of(load_path(tiny_folder)), "extra tensors", rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_that_does_not_say_whether_the_head_is_tied(tmp_path, tied):
    """Hugging Face's default differs from mlx-lm's: the file decides."""
    folder = write_tiny_model(tmp_path / "tiny", {"tie_word_embeddings": tied})
    want = logits_of(load_path(folder))
    change_config(folder, tie_word_embeddings=...)
    assert "tie_word_embeddings" not in (folder / "config.json").read_text()
    assert_close(logits_of(load_path(folder)), want, "key left out", rtol=0, atol=0)


def test_load_has_mlx_lms_shape(tiny_folder):
    model, tokenizer = load(str(tiny_folder))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("Hi")[0] == 256
    assert model.training is False
    assert (model.context_length, len(model.layers)) == (256, 2)
    _, _, config = load(str(tiny_folder), return_config=True)
    assert config == json.loads((tiny_folder / "config.json").read_text())


def test_config_overrides(tiny_folder):
    model, _, config = load(str(tiny_folder), model_config={"max_position_embeddings": 99}, return_config=True)
    assert (model.context_length, config["max_position_embeddings"]) == (99, 99)
    model, _, config = load(str(tiny_folder), model_config={"max_position_embeddings": None}, return_config=True)
    assert "max_position_embeddings" not in config
    assert model.context_length == 2048, "the family's default"
    with pytest.raises(MlxeffError, match=r"tensor model\.embed_tokens\.weight: wanted shape"):
        load(str(tiny_folder), model_config={"vocab_size": 300})


def test_lazy_weights_are_not_read(tmp_path):
    folder = write_tiny_model(tmp_path / "wide", {"hidden_size": 512, "intermediate_size": 4096})
    size = (folder / "model.safetensors").stat().st_size
    before = mx.get_active_memory()
    lazy = load(str(folder), lazy=True)
    assert mx.get_active_memory() - before < size / 10
    eager = load(str(folder))
    assert mx.get_active_memory() - before > size * 0.9
    assert_close(lazy[0](TOKENS, lazy[0].new_cache()), eager[0](TOKENS, eager[0].new_cache()), "lazy", rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_path": "lora"}, "adapter_path is not supported, got 'lora': fuse it with mlx_lm.fuse"),
        (
            {"tokenizer_config": {"padding_side": "x"}},
            "tokenizer_config: wanted keys of chat_template, eos_token, trust_remote_code, got 'padding_side'",
        ),
    ],
)
def test_unsupported_options_are_refused(tiny_folder, options, message):
    with pytest.raises(MlxeffError) as caught:
        load(str(tiny_folder), **options)
    assert str(caught.value) == f"load: {message}"


GROWTH = """
import gc, sys
from pathlib import Path
import mlx.core as mx
from mlxeff.assembly.model import load_path

def resident() -> int:
    gc.collect()
    mx.clear_cache()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def load_30_times() -> int:
    for _ in range(30):
        load_path(Path(sys.argv[1]))
    return resident()

resident(), load_30_times()  # until the allocator's own pools have their size
print(-load_30_times() + load_30_times())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_again_and_again_keeps_no_memory(tmp_path):
    """The initial weights of a model are drawn from MLX's random state, whose graph must not keep them."""
    folder = write_tiny_model(tmp_path / "tiny", {"num_hidden_layers": 16})
    command = [sys.executable, "-c", GROWTH, str(folder)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert grown < 30 * 100, f"{grown} KiB in 30 loads"


def test_fingerprint_tells_models_apart(tmp_path):
    folder, other = write_tiny_model(tmp_path / "a"), write_tiny_model(tmp_path / "b", seed=1)
    first = load_path(folder).fingerprint
    assert load_path(folder).fingerprint == first == load_path(write_tiny_model(tmp_path / "c")).fingerprint
    assert load_path(other).fingerprint != first
    assert load_path(folder, {"rope_theta": 5e5}).fingerprint != first


def refused(path, **options) -> str:
    """The message, which must be one line."""
    with pytest.raises(MlxeffError) as caught:
        load_path(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path, tiny_folder):
    """A copy of the tiny folder, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_nothing_there(tmp_path, folder):
    missing = tmp_path / "missing"
    assert refused(missing) == f"{missing}: wanted a model folder or a weights file, got a path where nothing is"
    (folder / "model.safetensors").unlink()
    assert refused(folder).startswith(f"{folder}: no weights: looked for model*.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert refused(folder).startswith("model.safetensors: ")


def test_a_header_of_absurd_size(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    message = refused(folder)
    assert message.startswith("model.safetensors: ")
    assert str(1 << 62) in message.replace(",", "")


def test_a_missing_shard(folder):
    names = split(folder)
    shard = "model-00002-of-00003.safetensors"
    (folder / shard).unlink()
    assert shard in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert refused(folder) == f"{folder}: incomplete: wanted 3 shards, got 2: {shard} is missing"
    assert shard in names.values()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_an_index_that_lies(folder, caplog):
    """Tensors that the index places elsewhere, and one that is nowhere: stock mlx-lm does not read the index."""
    names = split(folder)
    tensor = "model.norm.weight"
    index = {
        "weight_map": dict(zip(names, [*list(names.values())[1:], names[tensor]]))
        | {"model.extra.weight": names[tensor]}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_path(folder)
    (line,) = warnings(caplog)
    assert line.startswith(f"{folder}: the index is stale, the shards are read without it: ")
    assert_equals_mlx_lm(folder)


INDEX = "model.safetensors.index.json"


def one_file_beside_a_stale_index(folder):
    """What saving a sharded model again as one file leaves."""
    whole = (folder / "model.safetensors").read_bytes()
    names = split(folder)
    for shard in set(names.values()):
        (folder / shard).unlink()
    (folder / "model.safetensors").write_bytes(whole)
    return f"{INDEX} is stale, model.safetensors are read without it"


def other_shards_beside_a_stale_index(folder):
    names = split(folder)
    stale = {name: file.replace("00003", "00009") for name, file in names.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": stale}))
    return f"{INDEX} is stale, model-00001-of-00003.safetensors"


def whole_beside_shards(folder):
    whole = (folder / "model.safetensors").read_bytes()
    split(folder)
    (folder / "model.safetensors").write_bytes(whole)
    return "not read, the weights are in other files: model.safetensors"


def whole_beside_shards_without_index(folder):
    line = whole_beside_shards(folder)
    (folder / INDEX).unlink()
    return line


def a_shard_of_another_division(folder):
    split(folder)
    (folder / INDEX).unlink()
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00005.safetensors")
    return "not read, the weights are in other files: model-00002-of-00005.safetensors"


@pytest.mark.parametrize(
    "change_files",
    [
        one_file_beside_a_stale_index,
        other_shards_beside_a_stale_index,
        whole_beside_shards,
        whole_beside_shards_without_index,
        a_shard_of_another_division,
    ],
)
def test_other_files_beside_the_weights(folder, caplog, change_files):
    """Runs as in stock mlx-lm, with one warning that names the files."""
    want = change_files(folder)
    load_path(folder)
    (line,) = warnings(caplog)
    assert line.startswith(f"{folder}: {want}")
    assert_equals_mlx_lm(folder)


def test_two_complete_sets_of_shards(folder):
    split(folder)
    (folder / INDEX).unlink()
    for i in (1, 2):
        shutil.copy(folder / f"model-0000{i}-of-00003.safetensors", folder / f"model-0000{i}-of-00002.safetensors")
    assert "wanted one checkpoint, got model-00001-of-00002.safetensors and model-00001-of-00003" in refused(folder)


UNREAD = {
    "max_sequence_length": 2048,
    "pad_token": "<pad>",
    "tokenizer_padding_side": "left",
    "partial_rotary_factor": 1.0,
    "_flash_attn_2_enabled": True,
    "resid_pdrop": 0.1,
    "num_experts": 0,
    "rope_traditional": False,
    "clip_qkv": None,
    "use_sliding_window": False,
    "summary_type": "cls_index",
    "kv_cache_dtype": "fp8",
    "trl_version": "0.9",
    "vllm": {"dtype": "auto"},
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit": True,
    "medusa_num_heads": 3,
    "text_config": {"hidden_size": 8},
    "vision_config": {"hidden_size": 8},
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_config_keys_that_mean_nothing(tmp_path, caplog, kind):
    folder = write_tiny_model(tmp_path / "tiny", {"model_type": kind, "head_dim": 16})
    change_config(folder, **UNREAD)
    load_path(folder)
    (line,) = warnings(caplog)
    wanted = ", ".join(sorted(set(UNREAD) - {"use_sliding_window"}))
    assert line == f"{folder}: config keys that change nothing in the model are not read: {wanted}"
    assert_equals_mlx_lm(folder)


DYNAMIC = {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(
    ("kind", "config", "rule"),
    [
        ("llama", DYNAMIC | {"max_position_embeddings": 4}, "dynamic"),
        ("qwen3", DYNAMIC | {"max_position_embeddings": 4, "head_dim": 16}, "dynamic"),
        ("llama", {"rope_traditional": True}, "rope_traditional"),
        ("qwen2", {"rope_traditional": True}, "rope_traditional"),
        ("llama", DYNAMIC | {"rope_traditional": True}, "dynamic and rope_traditional"),
    ],
)
def test_rotary_rules_of_mlx_lm_only(tmp_path, caplog, kind, config, rule):
    """Plain decoding through mlx-lm, with a notice; positions beyond the context too."""
    folder = write_tiny_model(tmp_path / "tiny", {"model_type": kind})
    plain = logits_of(load_path(folder))
    change_config(folder, **config)
    caplog.set_level(logging.INFO)
    loaded = load_path(folder)
    what = f"rotary embedding of the rule {rule}"
    assert f"{folder}: {what} is not one of ours: plain decoding through mlx-lm" in caplog.messages
    assert loaded.model.seams == frozenset()
    assert_equals_mlx_lm(folder)
    assert np.abs(np.array(logits_of(loaded)) - np.array(plain)).max() > 0.01
    change_config(folder, attn_scale=2.0)
    assert "unknown keys ['attn_scale']" in refused(folder)


def test_a_window_beside_a_rotary_rule_of_mlx_lm_is_refused(folder):
    change_config(folder, model_type="mistral", sliding_window=8, **DYNAMIC)
    assert "rope_scaling: wanted one of default, linear" in refused(folder)


@pytest.mark.parametrize(
    "key", [{"partial_rotary_factor": 0.5}, {"use_rope": False}, {"num_experts": True}, {"attn_scale": 2.0}]
)
def test_config_keys_that_could_mean_something(folder, key):
    change_config(folder, **key)
    (name,) = key
    message = refused(folder)
    assert f"unknown keys ['{name}']" in message
    assert message.endswith(f"delete them from config.json, or run with --ignore-keys {name}")
    assert load_path(folder, {name: None}).model.vocab_size == 261


def test_unknown_keys_can_be_ignored_as_the_message_says(folder):
    """However many there are, and with names that a shell would not leave alone."""
    names = [f"mystery parameter number {i}" for i in range(30)]
    change_config(folder, **dict.fromkeys(names, 1.5))
    command = shlex.split(refused(folder).partition(", or run with ")[2])
    assert command == ["--ignore-keys", ",".join(sorted(names))]
    assert load_path(folder, dict.fromkeys(command[1].split(","))).model.vocab_size == 261
    change_config(folder, **{"a,b": 1.5})
    assert refused(folder).endswith("; if they change nothing in the model, delete them from config.json")


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w | {Q_PROJ: w[Q_PROJ][:32]}, f"tensor {Q_PROJ}: wanted shape (64, 64), got (32, 64)"),
        (lambda w: w | {Q_PROJ: w[Q_PROJ].astype(mx.int32)}, f"tensor {Q_PROJ}: wanted dtype mlx.core.float32, got"),
        (lambda w: {k: v for k, v in w.items() if k != Q_PROJ}, f"missing 1 tensors: {Q_PROJ}"),
        (lambda w: {k: v for k, v in w.items() if "mlp" not in k}, "missing 6 tensors: model.layers.0.mlp.down_proj."),
        (lambda w: w | {"model.extra": mx.zeros(3)}, "1 unknown tensors: model.extra"),
        (lambda w: w | {"model.layers.2.mlp.up_proj.weight": mx.zeros((96, 64))}, "unknown tensors: model.layers.2"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(folder, edit, message):
    change(folder, edit)
    got = refused(folder)
    assert got.startswith(f"{folder}: ")
    assert message in got


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_experts": 8}, "llama config: unknown keys ['num_experts']"),
        ({"hidden_size": ...}, "llama config: missing keys ['hidden_size']"),
        ({"hidden_size": "64"}, "llama config: hidden_size: wanted int, got '64'"),
        ({"model_type": "no_such_model"}, "unsupported architecture 'no_such_model'"),
        ({"model_type": ...}, "config: model_type: wanted the name of an architecture, got None"),
        ({"vocab_size": 300}, "tensor model.embed_tokens.weight: wanted shape (300, 64), got (261, 64)"),
        ({"num_hidden_layers": 3}, "missing 9 tensors: model.layers.2."),
        ({"quantization": {"group_size": 64}}, "quantization: wanted group_size and bits, got ['group_size']"),
        ({"quantization": {"group_size": 64, "bits": 9}}, "config: quantization: {'group_size': 64, 'bits': 9}"),
        ({"quantization_config": {"quant_method": "awq"}}, "wanted MLX's `quantization`, got quant_method 'awq'"),
    ],
)
def test_configs_that_do_not_fit(folder, keys, message):
    if "quantization" in keys:
        change(folder, lambda w: w | {"model.layers.0.mlp.up_proj.scales": mx.zeros((96, 1))})
    change_config(folder, **keys)
    assert message in refused(folder)


HUGE = [1 << 31, 1 << 64, 10**400, 1e39, float("nan"), float("inf"), "x" * 1000, "a\nb", [0, 0], [1 << 40, 0]]
JUNK = [None, True, 0, -1, 1.5, 1 << 40, 1e300, "x", [], ["a"], {}, {"a": 1}, [1], [[]], *HUGE]
MORE_KEYS = """head_dim rope_scaling rope_parameters sliding_window layer_types quantization quantization_config
    max_window_layers use_sliding_window attention_bias text_config mlxeff""".split()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "openelm"])
def test_any_value_at_any_key_of_a_config(tmp_path, kind):
    """It loads or is refused in one line: no other exception, no endless work."""
    folder = tmp_path / "model"
    write_openelm(folder) if kind == "openelm" else write_tiny_model(folder, {"model_type": kind})
    whole, loaded, lines = json.loads((folder / "config.json").read_text()), 0, set()
    keys = list(dict.fromkeys([*whole, *MORE_KEYS]))
    for key in keys:
        for value in JUNK:
            (folder / "config.json").write_text(json.dumps(whole | {key: value}))
            try:
                load_path(folder, lazy=True)
                loaded += 1
            except MlxeffError as error:
                lines.add(str(error))
    assert not any("\n" in line or len(line) > 300 for line in lines)
    assert len(lines) > 100
    assert 0 < loaded < len(keys) * len(JUNK) / 2


@pytest.mark.parametrize("kind", ["llama", "openelm"])
def test_any_value_in_the_entries_of_a_config(tmp_path, tiny_folder, kind):
    """As above, one level deeper: quantisation, of all and of one module, rope scaling, and the lists of OpenELM."""
    folder = tmp_path / "model"
    write_openelm(folder) if kind == "openelm" else quantised(tiny_folder, folder, 4, 32)
    whole = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    llama3 = rope | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes = {"group_size": 32, "bits": 4, "mode": "affine"}
    entries = [("rope_scaling", rope), ("rope_scaling", llama3), ("quantization", sizes)]
    changed = [(key, entry | {name: value}) for key, entry in entries for name in entry for value in JUNK]
    changed += [
        ("quantization", sizes | {"model.layers.0.mlp.up_proj": sizes | {name: value}})
        for name in sizes
        for value in JUNK
    ]
    if kind == "openelm":
        lists = [(name, whole[name]) for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers")]
        changed = [(name, [value, *entry[1:]]) for name, entry in lists for value in JUNK]
    lines = set()
    for key, value in changed:
        (folder / "config.json").write_text(json.dumps(whole | {key: value}))
        try:
            load_path(folder, lazy=True)
        except MlxeffError as error:
            lines.add(str(error))
    assert not any("\n" in line or len(line) > 300 for line in lines)
    assert len(lines) > 20


@pytest.mark.parametrize("size", [0, -32, 1, 33, 1 << 40])
@pytest.mark.parametrize("module", [None, "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_group_size_that_is_none(tmp_path, tiny_folder, size, module, kind):
    """A group size of 0 divides by zero in native code, so the process would end without a word."""
    folder = tmp_path / "model"
    if kind == "llama":
        quantised(tiny_folder, folder, 4, 32)
    else:
        write_foreign(folder, PHI)
    own = {"group_size": size, "bits": 4}
    change_config(folder, quantization={"group_size": 32, "bits": 4, module: own} if module else own)
    assert "config: quantization: {" in refused(folder)
    assert "wanted group_size of (32, 64, 128)" in refused(folder)


def test_a_packed_weight_of_another_integer_type(tmp_path, tiny_folder):
    folder = quantised(tiny_folder, tmp_path / "quantised", 4, 32)
    change(folder, lambda w: w | {Q_PROJ: w[Q_PROJ].astype(mx.int32)})
    assert f"tensor {Q_PROJ}: wanted dtype mlx.core.uint32, got mlx.core.int32" in refused(folder)


@pytest.mark.parametrize("text", [b"{", b"", b"[1, 2]", b"\xff\xfe", b'{"model_type": ' + b"[" * 100_000])
def test_a_config_that_is_not_a_json_object(folder, text):
    (folder / "config.json").write_bytes(text)
    message = refused(folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert "JSON" in message


def test_no_config(folder):
    (folder / "config.json").unlink()
    wanted = "wanted a model folder or a GGUF file, got weights without config.json"
    assert refused(folder) == f"{folder}: {wanted}"


def test_quantised_weights_that_do_not_fit(tmp_path, tiny_folder):
    folder = quantised(tiny_folder, tmp_path / "quantised", 4, 32)
    up = "model.layers.0.mlp.up_proj"
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, quantization=config["quantization"] | {"bits": 8})
    assert f"tensor {'model.embed_tokens.weight'}: wanted shape (261, 16), got (261, 8)" in refused(folder)
    change_config(folder, quantization=..., quantization_config=...)
    assert "unknown tensors: model.embed_tokens.biases" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").unlink()
    change(folder, lambda w: {k: v for k, v in w.items() if k != f"{up}.scales"})
    assert f"1 unknown tensors: {up}.biases" in refused(folder)
    change(folder, lambda w: {k: v for k, v in w.items() if k != f"{up}.biases"})
    assert f"tensor {up}.weight: wanted shape (96, 64), got (96, 8)" in refused(folder)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    """It runs, as in mlx-lm; only a prompt with a token that has no row is refused."""
    folder = write_tiny_model(tmp_path / "small", {"vocab_size": 259})
    loaded = load_path(folder)
    assert (loaded.tokenizer.vocab_size, loaded.model.vocab_size) == (261, 259)
    assert list(stream_generate(loaded.model, loaded.tokenizer, "Hello", max_tokens=3))
    wanted = "prompt: the model has no token '<|assistant|>': its id is 259, wanted one below 259"
    ids = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    for prompt in (ids, "Hello<|assistant|>"):
        with pytest.raises(MlxeffError) as error:
            next(stream_generate(loaded.model, loaded.tokenizer, prompt))
        assert str(error.value) == wanted
    assert load_path(write_tiny_model(tmp_path / "padded", {"vocab_size": 320})).tokenizer.vocab_size == 261


def test_a_foreign_model_with_fewer_rows_than_tokens(tmp_path):
    """Also where its config leaves the number of rows to mlx-lm's default."""
    folder = write_foreign(tmp_path / "gemma", GEMMA)
    entry = {"content": "<pad>", "special": True, "normalized": False}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {"261": entry}}))
    model, tokenizer = load(str(folder))
    assert list(stream_generate(model, tokenizer, "Hello", max_tokens=2))
    with pytest.raises(MlxeffError, match="the model has no token '<pad>': its id is 261, wanted one below 261"):
        next(stream_generate(model, tokenizer, "Hello<pad>"))
    del model.config["vocab_size"]
    assert model.vocab_size == model.model.args.vocab_size == 261


@pytest.mark.parametrize("foreign", [False, True], ids=["llama", "gemma3_text"])
def test_end_tokens_are_those_of_all_files(tmp_path, foreign):
    """With lists in config.json and generation_config.json, as Phi-3 and Llama 3 have them; mlx-lm's are a part."""
    from mlx_lm import load as load_with_mlx_lm

    folder = write_foreign(tmp_path / "m", GEMMA) if foreign else write_tiny_model(tmp_path / "m")
    change_config(folder, eos_token_id=[258, 257])
    assert load_path(folder).tokenizer.eos_token_ids == {257, 258}
    (folder / "generation_config.json").write_text('{"eos_token_id": [259, 260]}')
    assert load_path(folder).tokenizer.eos_token_ids == {257, 258, 259, 260}
    assert load_with_mlx_lm(str(folder))[1].eos_token_ids == {257, 259, 260}
    assert load_path(folder, {"eos_token_id": 1}).tokenizer.eos_token_ids == {1, 257}


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    message = refused(folder)
    assert message.startswith(f"{folder}: ")
    assert "tokenizer.json" in message
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(folder)


def test_the_config_of_the_fixture_is_the_one_written(tiny_folder):
    assert json.loads((tiny_folder / "config.json").read_text()) == CONFIG


@needs_native
def test_loading_chooses_the_fused_form_and_can_be_told_not_to(tmp_path):
    folder = quantise_folder(write_tiny_model(tmp_path / "tiny"))
    loaded = load_path(folder)
    assert loaded.backend == f"native {native.isa()}"
    command = [
        sys.executable,
        "-m",
        "mlxeff",
        "generate",
        "--model",
        str(folder),
        "Hello",
        "--max-tokens",
        "20",
        "--json",
    ]
    results = []
    for value in ("1", "0"):
        environment = os.environ | {"MLXEFF_NATIVE": value}
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout))
    fused, plain = results
    assert fused["token_ids"] == plain["token_ids"]
    assert (fused["timings"]["backend"], plain["timings"]["backend"]) == (f"native {native.isa()}", "mlx")
    assert fused["notices"] == []
    assert ["switched off" in notice for notice in plain["notices"]] == [True]


@needs_native
@pytest.mark.slow
def test_built_in_model_has_the_same_words(smollm2_gguf):
    from mlxeff import generate

    loaded = load_path(smollm2_gguf)
    prompt = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}])
    fused = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=24)
    loaded.model.native = None
    assert fused == generate(loaded.model, loaded.tokenizer, prompt, max_tokens=24)
