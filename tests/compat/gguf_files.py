"""Writes a case as a GGUF file. The names of tensors are those of the `gguf` library; a new architecture is one more
entry of ARCHITECTURES.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

import checkpoint_files as files

from .cases import Case
from .families import CONTEXT
from .vocabularies import Vocabulary

PER_SHARD = 8  # tensors
BLOCK = 32  # values of a quantised block
# Keys after the architecture's name → those of config.json.
NORM = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
SIZES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size", "vocab_size": "vocab_size"}
DECODER = SIZES | NORM | {
    "context_length": "max_position_embeddings", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim", "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
}  # fmt: skip
EXPERTS = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
MAMBA = SIZES | {
    "ssm.conv_kernel": "conv_kernel", "ssm.inner_size": "intermediate_size", "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank",
}  # fmt: skip
# What llama.cpp's converter writes for a recurrent model.
MAMBA_CONSTANTS = {
    "context_length": 1 << 20, "feed_forward_length": 0, "attention.head_count": 0, "ssm.dt_b_c_rms": False,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter writes an architecture.

    keys       key of the metadata → key of config.json
    constants  key of the metadata → value
    permuted   part of a tensor's name → key of config.json with its heads: the two halves of a head's rows alternate
    change     (name of the tensor, value) → what is stored
    """

    keys: dict = field(default_factory=lambda: DECODER)
    constants: dict = field(default_factory=dict)
    permuted: dict = field(default_factory=dict)
    change: Callable[[str, np.ndarray], np.ndarray] | None = None


def _shifted(name: str, value: np.ndarray) -> np.ndarray:
    """Gemma's norms multiply by 1 + weight."""
    return value + 1 if name.endswith("norm.weight") else value


def _recurrent(name: str, value: np.ndarray) -> np.ndarray:
    return -np.exp(value) if name.endswith("ssm_a") else value.squeeze(2) if "conv1d.weight" in name else value


def _experts(name: str, value: np.ndarray) -> np.ndarray:
    return value.squeeze(0) if name.endswith("gate_inp_shexp.weight") else value


def _layer_norm(key: str) -> dict:
    return DECODER | {"attention.layer_norm_epsilon": key, "attention.layer_norm_rms_epsilon": key}


ARCHITECTURES = {
    "llama": Architecture(permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma3": Architecture(
        DECODER | {"attention.sliding_window": "sliding_window", "rope.freq_base_swa": "rope_local_base_freq"},
        change=_shifted,
    ),
    "phi3": Architecture(constants={"attention.sliding_window": 0}),
    "olmo2": Architecture(),
    "starcoder2": Architecture(_layer_norm("norm_epsilon")),
    "command-r": Architecture(_layer_norm("layer_norm_eps") | {"logit_scale": "logit_scale"}),
    "qwen2moe": Architecture(DECODER | EXPERTS, change=_experts),
    "mamba": Architecture(MAMBA, MAMBA_CONSTANTS, change=_recurrent),
}


def write(
    path: Path, arch: str, case: Case, config: dict, weights: dict, vocabulary: Vocabulary, template: str
) -> tuple[Path, dict[str, np.ndarray]]:
    """(the file of a case, or the first of its parts; the weights as its blocks hold them, by their names before)."""
    found = ARCHITECTURES[arch]
    values = {key: config[name] for key, name in found.keys.items()} | found.constants | _rope(case)
    metadata = {"general.name": "compat"} | {f"{arch}.{key}": value for key, value in values.items()}
    metadata |= vocabulary.metadata() | _ends(case, vocabulary) | _templates(case, template)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    tensors, held = _rope_tensors(case, config), {}
    for name, value in weights.items():
        new = names.get_name(name.replace("switch_mlp", "experts"), try_suffixes=(".weight", ".bias"))
        stored = found.change(new, value) if found.change else value
        block = case.weights if stored.ndim > 1 and stored.shape[-1] % BLOCK == 0 else "F32"
        quant = gguf.GGMLQuantizationType[block]
        same = stored.shape == value.shape and block != "F32"
        held[name] = gguf.quants.dequantize(gguf.quants.quantize(value, quant), quant) if same else value
        heads = found.permuted.get(new.split(".")[-2])
        tensors[new] = (interleave(stored, config[heads]) if heads else stored, block)
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
    """The keys that say the rule of rotary embedding."""
    scaling = {"rope.scaling.type": case.rope.rpartition(" ")[2], "rope.scaling.factor": 4.0}
    original = {"rope.scaling.original_context_length": 64}
    magnitude = math.sqrt(1 + math.log(CONTEXT / 64) / math.log(64))
    return {
        "scaling keys linear": scaling,
        "scale_linear key": {"rope.scale_linear": 4.0},
        "scaling keys yarn": scaling | original,
        "rope_factors tensors": original | {"rope.scaling.attn_factor": magnitude},
    }.get(case.rope, {})


def _rope_tensors(case: Case, config: dict) -> dict[str, tuple[np.ndarray, str]]:
    """The tensors that say the rule of rotary embedding."""
    if case.rope == "rope_freqs tensor":
        return {"rope_freqs.weight": (llama3_divisors(config), "F32")}
    if case.rope == "rope_factors tensors":
        factors = {
            which: np.array(config["rope_scaling"][f"{which}_factor"], np.float32) for which in ("long", "short")
        }
        return {f"rope_factors_{which}.weight": (value, "F32") for which, value in factors.items()}
    return {}


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
