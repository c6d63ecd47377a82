"""GGUF files of the architectures that mlx-lm computes, beside what llama.cpp computed of the same files
(benchmarks/gguf_architectures.py recorded the headers that its own converter writes, and its logits). Some 20 s in all,
two of them to import mlx-lm."""

import json
import logging
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from architectures import files
from gguf_architectures import RESULT
from mlxeff import MlxeffError, load
from mlxeff.assembly.model import load_model
from mlxeff.checkpoint import open_source
from mlxeff.models import gguf_foreign
from mlxeff.models.gguf_architectures import ARCHITECTURES
from test_cli import document, fails

VARIANTS = json.loads(RESULT.read_text())["variants"]
# llama.cpp looks GELU up in a table of half precision, so that its logits differ by some 1e-3.
GELU = {"gemma", "gemma2", "gemma3", "gpt2", "gptneox", "gptneox serial", "phi2", "starcoder", "starcoder2"}


def logits(model) -> np.ndarray:
    return np.array(model(mx.array([files.IDS]), model.new_cache())[0].astype(mx.float32))


def exact(tensor) -> np.ndarray:
    """The values of a tensor, in float32."""
    if tensor.bits is None:
        return np.array(tensor.read().astype(mx.float32))
    weight, *scales = (part.reshape(-1, part.shape[-1]) for part in tensor.read_packed())
    scales = [part.astype(mx.float32) for part in scales]
    return np.array(mx.dequantize(weight, *scales, tensor.group_size, tensor.bits)).reshape(tensor.shape)


def altered(name: str, **metadata) -> dict:
    """The header of a variant with other metadata; None removes an entry."""
    architecture = VARIANTS[name]["metadata"]["general.architecture"]
    new = VARIANTS[name]["metadata"] | {f"{architecture}.{k.replace('__', '.')}": v for k, v in metadata.items()}
    return VARIANTS[name] | {"metadata": {key: value for key, value in new.items() if value is not None}}


def test_every_architecture_is_recorded():
    assert {variant["metadata"]["general.architecture"] for variant in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_llama_cpp(tmp_path, name):
    model, _ = load_model(files.write(VARIANTS[name], tmp_path / "x.gguf"))
    got = files.kept(logits(model))
    limit = 3e-3 if name in GELU else 3e-5
    np.testing.assert_allclose(got["logits"], VARIANTS[name]["logits"], atol=limit, rtol=0)
    assert got["choices"] == VARIANTS[name]["choices"]


@pytest.mark.parametrize("name", ["gptneox", "llama experts", "phi3", "qwen3moe", "mamba", "gpt-oss", "lfm2"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_stay_quantised(tmp_path, name, kind):
    """The logits are those of the same values in float32, and no matrix has become a dense one."""
    path = files.write(VARIANTS[name], tmp_path / "x.gguf", kind)
    model, _ = load_model(path)
    dense = tmp_path / "dense.gguf"
    source = open_source(path)
    rounded = {key: exact(tensor) for key, tensor in source.tensors.items()}
    files.write(VARIANTS[name], dense, values=lambda key, _: rounded[key])
    want = logits(load_model(dense)[0])
    assert np.abs(logits(model) - want).max() < 1e-4 * want.std()
    packed = {key for key, module in model.model.named_modules() if "Quantized" in type(module).__name__}
    dense = [module.weight for _, module in model.model.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    assert packed
    assert [weight.shape for weight in dense if weight.shape[1] >= files.BLOCK] == []
    assert all(value.dtype in (mx.float32, mx.uint32) for _, value in tree_flatten(model.model.parameters()))


def test_through_the_command(tmp_path, small_metadata):
    """A whole file: its own tokenizer, plain decoding, a notice of what computes, and the reason why a technique does
    not run."""
    header = VARIANTS["gemma3"] | {"tensors": VARIANTS["gemma3"]["tensors"] | {"token_embd.weight": [280, 64]}}
    path = files.write(header, tmp_path / "gemma.gguf", "Q8_0", small_metadata)
    got = document(path, "the cat", "--raw", "--max-tokens", 5)
    model, tokenizer = load(str(path))
    assert got["prompt_token_ids"] == tokenizer.encode("the cat")
    ids, cache = tokenizer.encode("the cat"), model.new_cache()
    row, wanted = model(mx.array([ids]), cache)[0, -1], []
    while len(wanted) < 5 and int(mx.argmax(row)) not in tokenizer.eos_token_ids:
        wanted.append(int(mx.argmax(row)))
        row = model(mx.array([wanted[-1:]]), cache)[0, -1]
    assert got["token_ids"] == wanted
    error = fails("generate", "the cat", "--model", path, "--compute", "int8")
    assert "'gemma3_text' runs through mlx-lm" in error


@pytest.mark.parametrize("name", ["gemma3", "llama experts"])
def test_convert_refuses(tmp_path, name):
    path = files.write(VARIANTS[name], tmp_path / "x.gguf")
    error = fails("convert", path, tmp_path / "out")
    assert "convert: wanted one of llama, qwen2, qwen3, got " in error
    assert not (tmp_path / "out").exists()


REFUSED = [
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: wanted none, as in mlx-lm, got 30.0"),
    ("gemma3", {"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0}, "wanted one of linear, got 'yarn'"),
    ("gemma3", {"rope__scaling__attn_factor": 1.5}, "attn_factor: wanted 1, mlx-lm reads another one with YaRN only"),
    ("gemma", {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}, "as mlx-lm's gemma has none"),
    ("gemma", {"rope__dimension_count": 16}, "rope.dimension_count: wanted the head size 32, got 16"),
    ("gemma", {"attention__value_length": 16}, "attention.value_length: wanted the head size 32, got 16"),
    ("gemma", {"block_count": 2**31 - 1}, "block_count: wanted 2147483647 layers, got tensors of 2"),
    ("gemma", {"feed_forward_length": 2**31 - 1}, "wanted shape (2147483647, 64), got (96, 64)"),
    ("mamba2", {"ssm__group_count": 2}, "ssm.group_count: wanted 1, as mlx-lm has no norm of several groups, got 2"),
    ("mamba", {"ssm__dt_b_c_rms": True}, "ssm.dt_b_c_rms: wanted false, got True"),
    ("lfm2", {"attention__head_count_kv": 2}, "attention.head_count_kv: wanted a number for each layer, got 2"),
    ("gptneox", {"use_parallel_residual": 1}, "use_parallel_residual: wanted true or false, got 1"),
    ("gptneox", {"embedding_length": 128}, "tensor 'blk.0.attn_qkv.weight': wanted 384 rows, got 192"),
    ("granite", {"logit_scale": None}, "logit_scale: wanted a positive number, got None"),
]


@pytest.mark.parametrize(("name", "metadata", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_mlx_lm_has_no_counterpart_for(tmp_path, name, metadata, message):
    path = files.write(altered(name, **metadata), tmp_path / "x.gguf")
    with pytest.raises(MlxeffError) as caught:
        load_model(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_tensors(tmp_path):
    header = VARIANTS["gemma"]
    more = header | {"tensors": header["tensors"] | {"blk.0.strange.weight": [4]}}
    with pytest.raises(MlxeffError, match=r"1 tensors that mlx-lm's gemma does not have: blk\.0\.strange\.weight"):
        load_model(files.write(more, tmp_path / "x.gguf"))
    fewer = header | {"tensors": {k: v for k, v in header["tensors"].items() if k != "blk.1.ffn_up.weight"}}
    with pytest.raises(MlxeffError, match=r"missing 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(files.write(fewer, tmp_path / "y.gguf"))


def test_an_architecture_that_nothing_here_computes(tmp_path):
    header = {"metadata": {"general.architecture": "olmo"}, "tensors": {"token_embd.weight": [32, 64]}}
    with pytest.raises(MlxeffError, match=r"architecture: wanted one of .*gemma3.*, got 'olmo'") as caught:
        gguf_foreign.config_from_gguf(open_source(files.write(header, tmp_path / "x.gguf")))
    assert "\n" not in str(caught.value)
    assert set(ARCHITECTURES) <= set(re.split(r"[ ,]+", str(caught.value)))


def test_windows_of_other_periods(tmp_path, caplog):
    header = altered("gemma3", attention__sliding_window_pattern=[True, False] * 3)
    config = gguf_foreign.config_from_gguf(open_source(files.write(header, tmp_path / "x.gguf")))
    assert (config["sliding_window"], config["sliding_window_pattern"]) == (16, 2)
    header = altered("gemma3", attention__sliding_window_pattern=[False, True] * 3)
    with pytest.raises(MlxeffError, match="wanted a full layer at equal distances"):
        gguf_foreign.config_from_gguf(open_source(files.write(header, tmp_path / "y.gguf")))
    with caplog.at_level(logging.WARNING, logger="mlxeff"):
        gguf_foreign.config_from_gguf(open_source(files.write(VARIANTS["gemma2"], tmp_path / "z.gguf")))
    assert "sliding window of 64 tokens is not used: attention is full" in caplog.text


def test_metadata_that_is_not_used_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mlxeff"):
        load_model(files.write(altered("phi3", attention__strange=7), tmp_path / "x.gguf"))
    assert "metadata that is not used: phi3.attention.strange" in caplog.text
