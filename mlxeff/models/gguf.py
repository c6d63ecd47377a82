"""GGUF files of the Llama family: their metadata → the dict of a Hugging Face config.json, their tensors → parameters
with Hugging Face's names.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the names of keys and tensors, llama.cpp's
converter for the permutation of rows and for `rope_freqs`, mlx-lm for the entry `quantization`. This module knows
nothing about the block formats inside the tensors; `checkpoint` reads those.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint import Source, Tensor
from ..errors import MlxeffError, notices, some
from .config import fits
from .gguf_keys import Keys
from .rope import yarn_magnitude

FAMILIES = ("llama", "qwen2", "qwen3")  # values of general.architecture
# GGUF's names → Hugging Face's, of the modules outside and inside of the layers.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys of YaRN that llama.cpp does not read for these architectures, and what it computes with; None: see
# `rope.yarn_magnitude`.
YARN_FIXED = {"yarn_ext_factor": 1.0, "yarn_attn_factor": None, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
FREQUENCIES = "rope_freqs.weight"  # tensor (head size / 2): divisors of the rotary frequencies (Llama 3.1 and later)
# (low_freq_factor, high_freq_factor, original_max_position_embeddings) of the known Llama 3 rope_scaling entries.
LLAMA3_RULES = [(1.0, 4.0, context) for context in (8192, 4096, 2048, 16384, 32768, 131072)]


@dataclass(frozen=True)
class Parameter:
    """A tensor of a GGUF file and its Hugging Face name."""

    name: str
    tensor: Tensor
    rows: mx.array | None  # order of the tensor's rows in the parameter, see `interleaved_rows`; None: as stored

    @property
    def module(self) -> str:
        """The name without ".weight" or ".bias"."""
        return self.name.rpartition(".")[0]

    @property
    def packed(self) -> bool:
        """Whether the parameter stays quantised: it is a matrix of a block type."""
        return self.tensor.bits is not None and len(self.tensor.shape) == 2

    def read(self) -> mx.array:
        """The dense array."""
        value = self.tensor.read()
        return value if self.rows is None else value[self.rows]

    def read_packed(self) -> dict[str, mx.array]:
        """The arrays of a quantised module by their full names, which end in "weight", "scales" and "biases"."""
        parts = self.tensor.read_packed()
        names = [self.name, f"{self.module}.scales", f"{self.module}.biases"]
        return dict(zip(names, parts if self.rows is None else [part[self.rows] for part in parts], strict=True))


def config_from_gguf(source: Source) -> dict:
    """The dict of a config.json for the model in a GGUF file: Hugging Face's keys, and mlx-lm's `quantization`. Raises
    MlxeffError for missing or invalid keys, and for architectures and variants that are not supported."""
    keys = Keys(source)
    _refuse_variants(keys)
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    groups = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", hidden // heads)
    names = source.tensors
    _check_sizes(keys, heads * head_dim, hidden)
    config = {
        "model_type": keys.architecture,
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[keys.architecture] + "ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": keys.integer("block_count"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": names["token_embd.weight"].shape[0],
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(keys, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": keys.architecture != "qwen2" and "blk.0.attn_q.bias" in names,
        "hidden_act": "silu",
    }
    if keys.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    config |= keys.token_ids()
    keys.say_unused()
    return config | quantization(parameters(source, heads, groups))


def weights_from_gguf(source: Source) -> dict[str, mx.array]:
    """All parameters by their Hugging Face names. Quantised modules have ".weight" (uint32), ".scales", ".biases"."""
    keys, weights = Keys(source), {}
    heads = keys.integer("attention.head_count")
    for parameter in parameters(source, heads, keys.integer("attention.head_count_kv", heads)):
        weights.update(parameter.read_packed() if parameter.packed else {parameter.name: parameter.read()})
    return weights


def parameters(source: Source, heads: int, groups: int) -> list[Parameter]:
    """The parameter for each tensor of the file, except the rotary frequencies. `heads` and `groups` are the numbers of
    query and KV heads. Raises MlxeffError for tensors that the family does not have."""
    permuted = {"attn_q": heads, "attn_k": groups} if Keys(source).architecture == "llama" else {}
    result, unknown = [], []
    for name, tensor in source.tensors.items():
        if name == FREQUENCIES:
            continue
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = layer[2] if layer else stem
        module = (LAYER if layer else TOP).get(part)
        if module is None or kind not in ("weight", "bias"):
            unknown.append(name)
            continue
        prefix = f"model.layers.{int(layer[1])}." if layer else ""
        rows = interleaved_rows(tensor, permuted[part]) if layer and part in permuted else None
        result.append(Parameter(f"{prefix}{module}.{kind}", tensor, rows))
    if unknown:
        raise MlxeffError(f"{source.path.name}: {len(unknown)} unknown tensors: {some(unknown)}")
    return result


def _refuse_variants(keys: Keys) -> None:
    """Raises MlxeffError for keys that announce something that the dense decoder does not have; a notice says that a
    sliding window is ignored."""
    if type(experts := keys.get("expert_count", 0)) is not int or experts:
        raise MlxeffError(f"{keys.origin}: wanted a dense model, got a mixture of {experts!r:.60} experts")
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", keys.integer("embedding_length") // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(key, head_dim) != head_dim:
            raise MlxeffError(f"{keys.origin}: {key}: wanted the head size {head_dim}, got {keys.get(key)}")
    keys.say_window()


def _check_sizes(keys: Keys, queries: int, hidden: int) -> None:
    """Raises MlxeffError where the sizes in the metadata are not those of the tensors, before a model of these sizes is
    built. `queries` is the number of rows of the query projection, `hidden` the hidden size."""
    keys.layers()
    inner = keys.integer("feed_forward_length")
    shapes = {"token_embd": (None, hidden), "blk.0.attn_q": (queries, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, (rows, columns) in shapes.items():
        tensor = keys.tensors.get(f"{name}.weight")
        if tensor is None:
            raise MlxeffError(f"{keys.origin}: missing tensor {name + '.weight'!r}")
        if len(tensor.shape) != 2 or tensor.shape[1] != columns or tensor.shape[0] != (rows or tensor.shape[0]):
            wanted = (rows or "vocabulary", columns)
            raise MlxeffError(f"{keys.origin}: tensor {tensor.name!r}: wanted shape {wanted}, got {tensor.shape}")


def rope_scaling(keys: Keys, head_dim: int) -> dict | None:
    """The config entry `rope_scaling`, by which positions and magnitudes are those of llama.cpp. It multiplies queries
    and keys by `rope.scaling.attn_factor` under every rule, beside YaRN's own magnitude. Raises MlxeffError for a rule
    that is not supported."""
    rule, factor = str(keys.get("rope.scaling.type", "linear")), _rope_factor(keys)
    if rule not in ("none", "linear", "yarn"):
        raise MlxeffError(f"{keys.origin}: rope.scaling.type: wanted none, linear or yarn, got {rule!r:.60}")
    if rule == "none":
        factor = 1.0
    scaling = {"rope_type": rule, "type": rule, "factor": factor} if factor != 1.0 else {}
    if rule == "yarn":
        _say_fixed(keys, factor)
        context = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
        scaling |= {"original_max_position_embeddings": context} if scaling else {}
    if FREQUENCIES in keys.tensors and (divisors := _llama3_rule(keys, head_dim)):
        if scaling:
            raise MlxeffError(f"{keys.origin}: rope.scaling: wanted none beside {FREQUENCIES}, got {rule} {factor}")
        scaling = divisors
    magnitude = keys.number("rope.scaling.attn_factor", 1.0)
    if magnitude != 1.0 and rule == "yarn" and factor > 1.0:  # as transformers reads it, and as mlx-lm does
        whole = magnitude * yarn_magnitude({"factor": factor})
        scaling |= {"attention_factor": whole, "mscale": (whole - 1) / (0.1 * math.log(factor))}
    elif magnitude != 1.0:
        scaling = {"rope_type": "default"} | scaling | {"magnitude": magnitude}
    return scaling or None


def _say_fixed(keys: Keys, factor: float) -> None:
    """A notice for each key of YaRN that is not read and says something else than what is computed."""
    for name, used in YARN_FIXED.items():
        used = yarn_magnitude({"factor": factor}) if used is None else used
        said = keys.get(f"rope.scaling.{name}", used)
        if not fits(said, float) or not math.isclose(said, used, rel_tol=1e-6):
            text = "%s: rope.scaling.%s %.60r is not used, but %g, as llama.cpp does"
            notices.warning(text, keys.origin, name, said, used)


def _rope_factor(keys: Keys) -> float:
    """The factor of rope scaling, 1 where there is none. Files of 2023 have it under another key. llama.cpp takes 0 for
    no scaling."""
    said = {key: keys.get(key) for key in ("rope.scaling.factor", "rope.scale_linear")}
    for key, value in said.items():
        if value is not None:
            return 1.0 if fits(value, float) and value == 0 else keys.number(key)
    return 1.0


def _llama3_rule(keys: Keys, head_dim: int) -> dict | None:
    """The `rope_scaling` of type llama3 that gives the frequency divisors in the file; None where all are 1. Raises
    MlxeffError where no known entry gives them."""
    tensor = keys.tensors[FREQUENCIES]
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        raise MlxeffError(
            f"{keys.origin}: {FREQUENCIES}: wanted F32 ({head_dim // 2},), got {tensor.kind} {tensor.shape}"
        )
    divisors = np.array(tensor.read(), np.float64)
    if (divisors == 1).all():
        return None
    factor, base = float(str(np.float32(divisors.max()))), keys.number("rope.freq_base", 10000.0)
    for low, high, context in LLAMA3_RULES:
        turns = context / (2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
            rule = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
            return {"rope_type": "llama3", "factor": factor} | rule
    raise MlxeffError(f"{keys.origin}: {FREQUENCIES}: wanted the divisors of a llama3 rope_scaling, got others")


def interleaved_rows(tensor: Tensor, heads: int) -> mx.array:
    """The order of rows that undoes llama.cpp's permutation of a query or key projection: its rotary embedding pairs
    neighbouring dimensions, so its converter interleaves the two halves of each head's rows."""
    count = tensor.shape[0]
    if count % (2 * heads):
        raise MlxeffError(f"{tensor.origin.name}: tensor {tensor.name!r}: wanted rows for {heads} heads, got {count}")
    return mx.arange(count).reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def quantization(all_parameters: list[Parameter]) -> dict:
    """mlx-lm's config entry `quantization` for these parameters: the most frequent form is the default, and
    every matrix that differs has an entry of its own (false: not quantised)."""
    forms = {p.module: _affine(p) if p.packed else None for p in all_parameters if len(p.tensor.shape) == 2}
    counts = Counter(tuple(form.values()) for form in forms.values() if form)
    if not counts:
        return {}
    default = next(form for form in forms.values() if form and tuple(form.values()) == counts.most_common(1)[0][0])
    return {"quantization": default | {name: form or False for name, form in forms.items() if form != default}}


def _affine(parameter: Parameter) -> dict:
    """MLX's parameters for a matrix packed from GGUF blocks."""
    return {"group_size": parameter.tensor.group_size, "bits": parameter.tensor.bits, "mode": "affine"}
