"""Writes a case as a GGUF file. The names of tensors are those of the `gguf` library; a new architecture is one more
entry of ARCHITECTURES.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

import checkpoint_files as files

from .cases import Case
from .families import LAYERS
from .vocabularies import Vocabulary

PER_SHARD = 8  # tensors
# Keys after the architecture's name → those of config.json.
DECODER = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim", "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter writes an architecture.

    keys      key of the metadata → key of config.json
    permuted  part of a tensor's name → key of config.json with its heads: the two halves of a head's rows alternate
    """

    keys: dict = field(default_factory=lambda: DECODER)
    permuted: dict = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture(permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
}


def write(
    path: Path, arch: str, case: Case, config: dict, weights: dict, vocabulary: Vocabulary, template: str
) -> tuple[Path, dict[str, np.ndarray]]:
    """(the file of a case, or the first of its parts; the weights as its blocks hold them, by their names before)."""
    found = ARCHITECTURES[arch]
    metadata = {"general.name": "compat"} | {f"{arch}.{key}": config[name] for key, name in found.keys.items()}
    metadata |= {f"{arch}.{key}": value for key, value in _rope(case).items()}
    metadata |= vocabulary.metadata() | _ends(case, vocabulary) | _templates(case, template)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), LAYERS)
    tensors, held = {}, {}
    for name, value in weights.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = case.weights if value.ndim == 2 else "F32"
        quant = gguf.GGMLQuantizationType[kind]
        held[name] = gguf.quants.dequantize(gguf.quants.quantize(value, quant), quant)
        heads = found.permuted.get(new.split(".")[-2])
        tensors[new] = (interleave(value, config[heads]) if heads else value, kind)
    if case.rope == "rope_freqs tensor":
        tensors["rope_freqs.weight"] = (llama3_divisors(config), "F32")
    files.write_gguf(path, arch, metadata, tensors, split=PER_SHARD if case.sharding == "split" else 0)
    return next(iter(sorted(path.parent.glob(f"{path.stem}*.gguf")))), held


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows: the two halves of a head alternate."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(config: dict) -> np.ndarray:
    """What Llama 3.1's rule divides the frequencies by, as llama.cpp's converter computes them (head size / 2)."""
    rule, size = config["rope_scaling"], config["head_dim"]
    context, low, high = (rule[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    result = []
    for at in range(0, size, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (at / size)
        smooth = (context / wavelength - low) / (high - low)
        blended = 1 / ((1 - smooth) / rule["factor"] + smooth)
        result.append(1 if wavelength < context / high else rule["factor"] if wavelength > context / low else blended)
    return np.array(result, np.float32)


def _rope(case: Case) -> dict:
    scaling = {"rope.scaling.type": case.rope.rpartition(" ")[2], "rope.scaling.factor": 4.0}
    return {
        "scaling keys linear": scaling,
        "scale_linear key": {"rope.scale_linear": 4.0},
        "scaling keys yarn": scaling | {"rope.scaling.original_context_length": 64},
    }.get(case.rope, {})


def _ends(case: Case, vocabulary: Vocabulary) -> dict:
    end, other = vocabulary.id(vocabulary.end), vocabulary.id(vocabulary.other)
    purpose = re.match(r"(\w+) key", case.end)
    ids = {"eos": other} | ({purpose[1]: end} if purpose else {})
    return {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}


def _templates(case: Case, template: str) -> dict:
    if case.template == "none":
        return {}
    more = {"tokenizer.chat_template.tool_use": "{{ tools[0] }}", "tokenizer.chat_templates": ["tool_use"]}
    return {"tokenizer.chat_template": template} | (more if case.template == "named keys" else {})
