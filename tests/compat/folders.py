"""Writes a case as a folder: Hugging Face's with safetensors or PyTorch files, or what mlx-lm's own `convert` makes of
one; its shards, the places of its end tokens and of its chat template.
"""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

import checkpoint_files as files

from .cases import Case
from .families import FAMILIES
from .vocabularies import Vocabulary

SHARDS = 3
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def write(folder: Path, case: Case, config: dict, weights: dict, vocabulary: Vocabulary, template: str) -> Path:
    """Write the folder of a case; returns it."""
    dense = folder.with_name(folder.name + " dense") if case.container == "mlx-lm" else folder
    dense.mkdir(parents=True)
    # The type of the scales too. On a CPU, MLX's products with scales of 16 bits take 14 times as long.
    halves = case.weights == "affine 4:64" and FAMILIES[case.family].own
    dtype = case.weights if case.weights in DTYPES else "float16" if halves else "float32"
    _write_config(dense, case, config | {"torch_dtype": dtype}, vocabulary)
    _write_tokenizer(dense, case, vocabulary, template)
    arrays = {name: mx.array(value).astype(DTYPES[dtype]) for name, value in hugging_face(weights).items()}
    if case.container != "mlx-lm":
        _write_weights(folder, arrays, case.sharding, torch=case.container == "torch")
        return folder
    mx.save_safetensors(str(dense / "model.safetensors"), arrays, {"format": "pt"})
    _convert_by_mlx_lm(dense, folder, case)
    arrays = mx.load(str(folder / "model.safetensors"))
    mx.eval(arrays)
    for path in folder.glob("model*"):
        path.unlink()
    if not transformers_reads(case):  # so what was saved is another tokenizer
        for place in (folder, dense):
            for path in [*place.glob("*token*"), *place.glob("*.jinja")]:
                path.unlink() if place == folder else shutil.copy(path, folder)
    _write_weights(folder, arrays, case.sharding, torch=False)
    return folder


def transformers_reads(case: Case) -> bool:
    """Whether transformers follows the tokenizer's files: of a qwen2 it makes a tokenizer with Qwen2's rules whatever
    the files say, and of tokenizer.model a BPE one."""
    return case.tokenizer != "spm unigram" and (case.family != "qwen2" or case.tokenizer == "qwen2")


def hugging_face(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights by Hugging Face's names, where mlx-lm's differ: experts one by one, kernels of convolutions."""
    result = {}
    for name, value in weights.items():
        if match := re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name):
            result |= {f"{match[1]}.experts.{i}.{match[2]}.weight": expert for i, expert in enumerate(value)}
        else:
            result[name] = np.moveaxis(value, 2, 1) if "conv1d.weight" in name else value
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


def _convert_by_mlx_lm(dense: Path, folder: Path, case: Case) -> None:
    from mlx_lm import convert

    kind, _, sizes = case.weights.partition(" ")
    options = {}
    if kind == "affine":
        bits, group = map(int, sizes.split(":"))
        options = {"quantize": True, "q_bits": bits, "q_group_size": group}
    elif kind == "mxfp4":
        options = {"quantize": True, "q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"}
    convert(str(dense), str(folder), **options)


def transformers_5(config: dict) -> dict:
    """The config as transformers 5 writes it: what concerns the rotary embedding is in `rope_parameters`."""
    names = {"torch_dtype": "dtype"}
    left = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    rope = {"rope_theta": config["rope_theta"], "rope_type": "default"} | (config.get("rope_scaling") or {})
    rope.pop("type", None)
    if local := config.get("rope_local_base_freq"):
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return {names.get(key, key): value for key, value in config.items() if key not in left} | {"rope_parameters": rope}


def _write_config(folder: Path, case: Case, config: dict, vocabulary: Vocabulary) -> None:
    config = transformers_5(config) if case.config == "transformers 5" else config
    end, other = vocabulary.id(vocabulary.end), vocabulary.id(vocabulary.other)
    ids = {"config": end, "config list": [other, end]}.get(case.end, other)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ids}))
    if case.end == "generation config":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))


def _write_tokenizer(folder: Path, case: Case, vocabulary: Vocabulary, template: str) -> None:
    config = vocabulary.write(folder)
    named = {"eos_token": vocabulary.end if case.end == "tokenizer config" else vocabulary.other}
    if case.end == "special tokens map":
        entries = {"bos_token": vocabulary.bos, "eos_token": vocabulary.end}
        (folder / "special_tokens_map.json").write_text(json.dumps(entries))
        if added := config.pop("added_tokens_decoder", None):  # beside it, transformers does not read the map
            older = {entry["content"]: int(token) for token, entry in added.items()}
            (folder / "added_tokens.json").write_text(json.dumps(older))
    else:
        config |= named
    if case.template == "string":
        config["chat_template"] = template
    elif case.template == "list":
        other = {"name": "tool_use", "template": "{{ tools[0] }}"}
        config["chat_template"] = [{"name": "default", "template": template}, other]
    elif case.template == "jinja file":
        (folder / "chat_template.jinja").write_text(template)
    elif case.template == "json file":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_weights(folder: Path, weights: dict[str, mx.array], sharding: str, torch: bool) -> None:
    stem, suffix = ("pytorch_model", "bin") if torch else ("model", "safetensors")

    def save(name: str, part: dict[str, mx.array]) -> None:
        if torch:
            state = {key: files.whole(_numpy(value)) for key, value in part.items()}
            files.write_torch(folder / name, state)
        else:
            mx.save_safetensors(str(folder / name), part, {"format": "mlx"})

    if sharding in ("one file", "stray file"):
        save(f"{stem}.{suffix}", weights)
    if sharding == "one file":
        return
    names = {name: f"{stem}-{i % SHARDS + 1:05d}-of-{SHARDS:05d}.{suffix}" for i, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        save(file, {name: weights[name] for name in names if names[name] == file})
    index = {"metadata": {}, "weight_map": names}
    if sharding == "stale index":  # of another division, which is not there
        index["weight_map"] = {name: file.replace(f"of-{SHARDS:05d}", "of-00009") for name, file in names.items()}
    if sharding != "names":
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _numpy(value: mx.array) -> np.ndarray:
    """The array as numpy, bfloat16 by its bits."""
    return np.array(value.view(mx.uint16)) if value.dtype == mx.bfloat16 else np.array(value)
