"""GGUF's names, keys and row order -> a Hugging Face config.json dict and parameters, for the family of `llama`.

Sources: the key and tensor names of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, the row permutation and
the `rope_freqs` rule of llama.cpp's converter, the `quantization` dict of mlx-lm. Knows nothing of block formats: those
are `checkpoint`'s.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint import Source, Tensor
from ..errors import MlxeffError, notices

FAMILIES = ("llama", "qwen2", "qwen3")
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
FREQUENCIES = "rope_freqs.weight"
# (low_freq_factor, high_freq_factor, original_max_position_embeddings) that Llama 3.x releases use.
LLAMA3_RULES = [(1.0, 4.0, context) for context in (8192, 4096, 2048, 16384, 32768, 131072)]


@dataclass(frozen=True)
class Parameter:
    """A tensor under its Hugging Face name; `rows` is the order that undoes the permutation (None: as stored)."""

    name: str
    tensor: Tensor
    rows: mx.array | None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def packed(self) -> bool:
        """Stays quantised: MLX can hold the blocks, and the module can be a quantised one."""
        return self.tensor.bits is not None and len(self.tensor.shape) == 2

    def read(self) -> mx.array:
        value = self.tensor.read()
        return value if self.rows is None else value[self.rows]

    def read_packed(self) -> dict[str, mx.array]:
        """`weight`, `scales` and `biases` under their full names."""
        parts = self.tensor.read_packed()
        names = [self.name, f"{self.module}.scales", f"{self.module}.biases"]
        return dict(zip(names, parts if self.rows is None else [part[self.rows] for part in parts], strict=True))


def config_from_gguf(source: Source) -> dict:
    """config.json of the model in a GGUF file: Hugging Face's keys, mlx-lm's `quantization`. Raises MlxeffError."""
    keys = _Keys(source)
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
        "rope_scaling": _rope_scaling(keys, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": keys.architecture != "qwen2" and "blk.0.attn_q.bias" in names,
        "hidden_act": "silu",
    }
    if keys.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    for name in ("bos_token_id", "eos_token_id"):
        if type(token := source.metadata.get(f"tokenizer.ggml.{name}")) is int:
            config[name] = token
    return config | _quantization(parameters(source, heads, groups))


def weights_from_gguf(source: Source) -> dict[str, mx.array]:
    """All parameters under Hugging Face names; quantised modules have `.weight` uint32, `.scales` and `.biases`."""
    keys, weights = _Keys(source), {}
    heads = keys.integer("attention.head_count")
    for parameter in parameters(source, heads, keys.integer("attention.head_count_kv", heads)):
        weights.update(parameter.read_packed() if parameter.packed else {parameter.name: parameter.read()})
    return weights


def parameters(source: Source, heads: int, groups: int) -> list[Parameter]:
    """Every tensor of the model under its new name. Raises MlxeffError for names that the family does not have."""
    permuted = {"attn_q": heads, "attn_k": groups} if _Keys(source).architecture == "llama" else {}
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
        rows = _rows(source, tensor, permuted[part]) if layer and part in permuted else None
        result.append(Parameter(f"{prefix}{module}.{kind}", tensor, rows))
    if unknown:
        raise MlxeffError(f"{source.path.name}: {len(unknown)} unknown tensors: {', '.join(unknown[:4])}")
    return result


class _Keys:
    """The architecture's own key/values, typed."""

    def __init__(self, source: Source):
        self.origin, self.metadata, self.tensors = source.path.name, source.metadata, source.tensors
        self.architecture = self.metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in FAMILIES:
            raise MlxeffError(
                f"{self.origin}: architecture: wanted one of {', '.join(FAMILIES)}, got {self.architecture!r}"
            )

    def get(self, key: str, default=None):
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])
        if type(value) is not int or value < 1:
            raise MlxeffError(
                f"{self.origin}: {self.architecture}.{key}: wanted one positive number, got {value!r:.60}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float as its shortest decimal: the file's float32 9.9999997e-06 was written as 1e-05."""
        value = self.get(key, default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise MlxeffError(f"{self.origin}: {self.architecture}.{key}: wanted a positive number, got {value!r:.60}")
        return float(str(np.float32(value)))


def _refuse_variants(keys: _Keys) -> None:
    """What the dense family cannot represent, by the keys that announce it."""
    if type(experts := keys.get("expert_count", 0)) is not int or experts:
        raise MlxeffError(f"{keys.origin}: wanted a dense model, got a mixture of {experts!r:.60} experts")
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", keys.integer("embedding_length") // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(key, head_dim) != head_dim:
            raise MlxeffError(f"{keys.origin}: {key}: wanted the head size {head_dim}, got {keys.get(key)}")
    if type(window := keys.get("attention.sliding_window")) is int and window:
        notices.warning(f"{keys.origin}: sliding window of {window} tokens is not used: attention is full")


def _check_sizes(keys: _Keys, queries: int, hidden: int) -> None:
    """The counts that size the model must be those of its tensors, before a model of that size is built."""
    layers = {name.split(".")[1] for name in keys.tensors if name.startswith("blk.")}
    if len(layers) != keys.integer("block_count"):
        raise MlxeffError(
            f"{keys.origin}: block_count: wanted {keys.get('block_count')} layers, got tensors of {len(layers)}"
        )
    inner = keys.integer("feed_forward_length")
    shapes = {"token_embd": (None, hidden), "blk.0.attn_q": (queries, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, (rows, columns) in shapes.items():
        tensor = keys.tensors.get(f"{name}.weight")
        if tensor is None:
            raise MlxeffError(f"{keys.origin}: missing tensor {name + '.weight'!r}")
        if len(tensor.shape) != 2 or tensor.shape[1] != columns or tensor.shape[0] != (rows or tensor.shape[0]):
            wanted = (rows or "vocabulary", columns)
            raise MlxeffError(f"{keys.origin}: tensor {tensor.name!r}: wanted shape {wanted}, got {tensor.shape}")


def _rope_scaling(keys: _Keys, head_dim: int) -> dict | None:
    rule = str(keys.get("rope.scaling.type", "none"))
    if FREQUENCIES in keys.tensors:
        return _llama3_rule(keys, head_dim)
    if rule == "none":
        return None
    if rule not in ("linear", "yarn") or keys.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise MlxeffError(f"{keys.origin}: rope.scaling: wanted linear or yarn without attn_factor, got {rule!r:.60}")
    scaling = {"rope_type": rule, "type": rule, "factor": keys.number("rope.scaling.factor")}
    if rule == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    return scaling


def _llama3_rule(keys: _Keys, head_dim: int) -> dict | None:
    """The llama3 `rope_scaling` whose frequency divisors are those in the file; an error if none is."""
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


def _rows(source: Source, tensor: Tensor, heads: int) -> mx.array:
    """llama.cpp interleaves the two halves of each head's rows for its own RoPE pairing; this order puts them back."""
    count = tensor.shape[0]
    if count % (2 * heads):
        raise MlxeffError(f"{source.path.name}: tensor {tensor.name!r}: wanted rows for {heads} heads, got {count}")
    return mx.arange(count).reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _quantization(found: list[Parameter]) -> dict:
    """mlx-lm's `quantization`: the commonest kind as the default, an entry for every module that differs."""
    matrices = {p.module: p.tensor.bits if p.packed else None for p in found if len(p.tensor.shape) == 2}
    counts = Counter(bits for bits in matrices.values() if bits)
    if not counts:
        return {}
    default = counts.most_common(1)[0][0]
    own = {name: bool(bits) and _affine(bits) for name, bits in matrices.items() if bits != default}
    return {"quantization": _affine(default) | own}


def _affine(bits: int) -> dict:
    return {"group_size": 32, "bits": bits, "mode": "affine"}
