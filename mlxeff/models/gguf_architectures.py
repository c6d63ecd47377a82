"""The architectures that mlx-lm computes from GGUF files: which keys of the metadata are which entries of mlx-lm's
config.json, and what llama.cpp's converter does to the tensors.

Sources: the converter (conversion/*.py) and the models (src/models/*.cpp) of https://github.com/ggml-org/llama.cpp for
the keys, their defaults and the changes; the classes `ModelArgs` of mlx-lm for the config. What llama.cpp computes of
each is recorded by benchmarks/gguf_architectures.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint import Tensor
from ..errors import MlxeffError, notices
from .gguf import interleaved_rows
from .gguf_keys import Keys

Entries = Callable[[Keys, dict], dict]
LINEAR, ALL = ("linear",), ("linear", "yarn", "llama3")


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`.

    model_type  mlx-lm's name of the architecture
    more        (keys, the entries so far) → further entries of the config; a number of them replaces the earlier one
    epsilon     the config's name of the norms' epsilon
    partial     the config's name of the rotated share of a head; None where a whole head is rotated
    rope_rules  values of rope_scaling's `rope_type` that mlx-lm's model has
    rename      (part of a parameter's name in mlx-lm, the same in the `gguf` library's tables)
    shifted     endings of tensors to whose values the converter adds 1
    permuted    whether the converter interleaves the rows of the query and key projections, as in Llama
    changes     end of a tensor's name → (value, config) → the parameter
    recurrent   whether it has no attention and no feed-forward networks
    mixed       whether the layers have different numbers of KV heads
    finish      what has to be done to the new model before its weights are loaded
    """

    model_type: str
    more: Entries | None = None
    epsilon: str = "rms_norm_eps"
    partial: str | None = None
    rope_rules: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    shifted: tuple[str, ...] = ()
    permuted: bool = False
    changes: tuple[tuple[str, Callable[[mx.array, dict], mx.array]], ...] = ()
    recurrent: bool = False
    mixed: bool = False
    finish: Callable[[nn.Module], None] | None = None

    def entries(self, keys: Keys, config: dict) -> dict:
        """The further entries of the config."""
        return self.more(keys, config) if self.more else {}

    def change(self, name: str, tensor: Tensor, parameter: mx.array, config: dict) -> Callable | None:
        """What makes the parameter of the values of the tensor `name`; None where they are the same. A function whose
        attribute `by_rows` is true only puts the rows in another order."""
        if self.permuted and (part := name.split(".")[-2]) in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            return _in_order(interleaved_rows(tensor, heads), tensor)
        if name.endswith(self.shifted or ("\0",)):
            return lambda value: value - 1
        for ending, change in self.changes:
            if name.endswith(ending):
                if getattr(change, "rows_of", None):
                    return _in_order(change.rows_of(config), tensor)
                return lambda value: change(value, config)
        if tensor.shape != parameter.shape and tensor.size == parameter.size:
            return lambda value: value.reshape(parameter.shape)  # dimensions of length 1
        return None


def _in_order(rows: mx.array, tensor: Tensor) -> Callable[[mx.array], mx.array]:
    """The function that puts the rows of `tensor` in this order. Raises MlxeffError where it has another number of
    rows."""
    if rows.size != tensor.shape[0]:
        what = f"{tensor.origin.name}: tensor {tensor.name!r}"
        raise MlxeffError(f"{what}: wanted {rows.size} rows, got {tensor.shape[0]}")

    def change(value: mx.array) -> mx.array:
        return value[rows]

    change.by_rows = True
    return change


def _query_scale(keys: Keys, config: dict, layers_27b: int) -> float:
    """Gemma's query_pre_attn_scalar, which the file does not have: that of the 27B models is the width of a head in the
    hidden state."""
    if keys.integer("block_count") == layers_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _gemma2(keys: Keys, config: dict) -> dict:
    return {
        "query_pre_attn_scalar": _query_scale(keys, config, 46),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys, config: dict) -> dict:
    if keys.get("final_logit_softcapping"):
        raise keys.wrong("final_logit_softcapping", "none, as in mlx-lm", keys.get("final_logit_softcapping"))
    local = {"rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0)}
    return {"query_pre_attn_scalar": _query_scale(keys, config, 62)} | local | _window(keys, 6)


def _window(keys: Keys, period: int) -> dict:
    """The entries of layers of which every `period`-th one sees all tokens, and the others a sliding window."""
    window = keys.get("attention.sliding_window", 0)
    if not window:  # mlx-lm's pattern of period 1: no layer has a window
        return {"sliding_window": keys.integer("context_length"), "sliding_window_pattern": 1}
    pattern = keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray):
        full = [index + 1 for index, local in enumerate(pattern) if not local]
        period = full[0] if full else len(pattern) + 1
        if [(index + 1) % period != 0 for index in range(len(pattern))] != pattern.tolist():
            raise keys.wrong("attention.sliding_window_pattern", "a full layer at equal distances", pattern.tolist())
        pattern = period
    return {"sliding_window": keys.integer("attention.sliding_window"), "sliding_window_pattern": pattern}


def _experts(total: str) -> Entries:
    """The entries of a mixture of experts; `total` is mlx-lm's name of the number of experts."""

    def entries(keys: Keys, config: dict) -> dict:
        del config
        return {total: keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}

    return entries


def _qwen2_moe(keys: Keys, config: dict) -> dict:
    return _experts("num_experts")(keys, config) | {
        "moe_intermediate_size": _expert_width(keys, config),
        "shared_expert_intermediate_size": keys.integer("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }


def _expert_width(keys: Keys, config: dict) -> int:
    """The number of neurons of an expert."""
    return keys.integer("expert_feed_forward_length", config["intermediate_size"])


def _qwen3_moe(keys: Keys, config: dict) -> dict:
    return _experts("num_experts")(keys, config) | {
        "moe_intermediate_size": _expert_width(keys, config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _phi3(keys: Keys, config: dict) -> dict:
    key = "rope.scaling.original_context_length"
    entries = {"original_max_position_embeddings": keys.integer(key, config["max_position_embeddings"])}
    factors = [keys.tensors.get(f"rope_factors_{which}.weight") for which in ("long", "short")]
    keys.get("rope.scaling.attn_factor")
    if all(factors):
        long, short = ([float(str(value)) for value in np.array(each.read(), np.float32)] for each in factors)
        scaling = {"type": "longrope", "rope_type": "longrope", "long_factor": long, "short_factor": short}
        entries["rope_scaling"] = scaling
        text = "%s: rotary factors of long contexts are used at every length, as in mlx-lm and llama.cpp's own context"
        notices.warning(text, keys.origin)
    return entries


def _olmo2(keys: Keys, config: dict) -> dict:
    if not keys.get("attention.sliding_window"):
        return {}
    keys.get("rope.freq_base_swa")
    pattern = keys.get("attention.sliding_window_pattern")
    local = pattern.tolist() if isinstance(pattern, np.ndarray) else None
    local = local or [(index + 1) % 4 != 0 for index in range(config["num_hidden_layers"])]
    return {
        "model_type": "olmo3",
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
    }


def _exaone4(keys: Keys, config: dict) -> dict:
    if not keys.get("attention.sliding_window"):
        return {"sliding_window": 0, "sliding_window_pattern": None, "rope_scaling": config.get("rope_scaling") or {}}
    period = _window(keys, 4)["sliding_window_pattern"]
    return {
        "sliding_window": keys.integer("attention.sliding_window"),
        "sliding_window_pattern": "L" * (period - 1) + "G",
        "rope_scaling": config.get("rope_scaling") or {"rope_type": "default"},
    }


def _granite(keys: Keys, config: dict) -> dict:
    del config
    return {
        "logits_scaling": keys.number("logit_scale"),
        "attention_multiplier": keys.number("attention.scale"),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
    }


def _granite_moe(keys: Keys, config: dict) -> dict:
    return _granite(keys, config) | _experts("num_local_experts")(keys, config)


def _stablelm(keys: Keys, config: dict) -> dict:
    del config
    keys.get("use_parallel_residual")  # the norms say it
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in keys.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in keys.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in keys.tensors,
    }


def _cohere(keys: Keys, config: dict) -> dict:
    del config
    norm = "blk.0.attn_q_norm.weight" in keys.tensors
    return {"logit_scale": keys.number("logit_scale"), "use_qk_norm": norm, "layer_norm_bias": False}


def _smollm3(keys: Keys, config: dict) -> dict:
    del keys, config
    return {"no_rope_layer_interval": 4}


def _nemotron(keys: Keys, config: dict) -> dict:
    del keys, config
    return {"hidden_act": "relu2"}


def _gpt2(keys: Keys, config: dict) -> dict:
    return {
        "n_ctx": config["max_position_embeddings"],
        "n_positions": config["max_position_embeddings"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"],
        "n_inner": config["intermediate_size"],
        "multi_query": keys.integer("attention.head_count_kv", config["num_attention_heads"]) == 1,
        "attention_bias": "blk.0.attn_qkv.bias" in keys.tensors,
    }


def _gpt_neox(keys: Keys, config: dict) -> dict:
    return {
        "rotary_emb_base": config["rope_theta"],
        "use_parallel_residual": keys.flag("use_parallel_residual", True),
    }


def _fused_rows(config: dict) -> mx.array:
    """Rows of [all queries, all keys, all values] in the order [query, key, value of head 0, …] of GPT-NeoX."""
    heads = config["num_attention_heads"]
    width = config["hidden_size"] // heads
    return mx.arange(3 * heads * width).reshape(3, heads, width).swapaxes(0, 1).reshape(-1)


def _fused(value: mx.array, config: dict) -> mx.array:
    return value[_fused_rows(config)]


_fused.rows_of = _fused_rows


def _negative_log(value: mx.array, config: dict) -> mx.array:
    """A_log, of which the file has -exp(A_log)."""
    del config
    return mx.log(-value).squeeze()


def _mamba(keys: Keys, config: dict) -> dict:
    del config
    if keys.get("ssm.dt_b_c_rms"):
        raise keys.wrong("ssm.dt_b_c_rms", "false", True)
    return {
        "intermediate_size": keys.integer("ssm.inner_size"),
        "state_size": keys.integer("ssm.state_size"),
        "conv_kernel": keys.integer("ssm.conv_kernel"),
        "time_step_rank": keys.integer("ssm.time_step_rank"),
        "use_bias": "blk.0.ssm_in.bias" in keys.tensors,
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in keys.tensors,
    }


def _mamba2(keys: Keys, config: dict) -> dict:
    groups, heads = keys.integer("ssm.group_count"), keys.integer("ssm.time_step_rank")
    if groups != 1:  # mlx-lm normalises over all groups together, llama.cpp within each
        raise keys.wrong("ssm.group_count", "1, as mlx-lm has no norm of several groups", groups)
    inner = keys.integer("ssm.inner_size")
    del config
    return {
        "num_heads": heads,
        "head_dim": inner // heads,
        "intermediate_size": inner,
        "state_size": keys.integer("ssm.state_size"),
        "conv_kernel": keys.integer("ssm.conv_kernel"),
        "n_groups": groups,
        "time_step_rank": heads,
        "time_step_limit": (0.0, 3.0e38),
        "use_bias": "blk.0.ssm_in.bias" in keys.tensors,
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in keys.tensors,
    }


def _lfm2(keys: Keys, config: dict) -> dict:
    groups = keys.get("attention.head_count_kv")
    if not isinstance(groups, np.ndarray) or not groups.any():
        raise keys.wrong("attention.head_count_kv", "a number for each layer", groups)
    return {
        "num_key_value_heads": int(groups.max()),
        "layer_types": ["full_attention" if count else "conv" for count in groups.tolist()],
        "conv_L_cache": keys.integer("shortconv.l_cache"),
        "conv_bias": "blk.0.shortconv.conv.bias" in keys.tensors,
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    }


def _gpt_oss(keys: Keys, config: dict) -> dict:
    return _experts("num_local_experts")(keys, config) | {
        "intermediate_size": _expert_width(keys, config),
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])],
    }


def _tie(model: nn.Module) -> None:
    """mlx-lm's Gemma 3 shares the embedding with the head only when it is given weights without a head."""
    model.sanitize({})


def _has(entry: str, tensor: str) -> Entries:
    """The entry that says whether there is this tensor."""
    return lambda keys, _: {entry: tensor in keys.tensors}


_NORMS = ("norm.weight",)
_PARTIAL = "partial_rotary_factor"
_NEOX = (("model.embed_out", "embed_out"), ("model.h.", "gpt_neox.layers."), ("model.", "gpt_neox."))
_FUSED = tuple((f"attn_qkv.{kind}", _fused) for kind in ("weight", "bias"))
_RECURRENT = {"epsilon": "layer_norm_epsilon", "recurrent": True, "changes": (("ssm_a", _negative_log),)}
# Value of general.architecture → how it is run. "llama" is only for files with experts.
ARCHITECTURES = {
    "command-r": Architecture("cohere", _cohere, "layer_norm_eps"),
    "cohere2": Architecture("cohere2", lambda keys, c: _cohere(keys, c) | _window(keys, 4), "layer_norm_eps"),
    "ernie4_5": Architecture("ernie4_5", _has("use_bias", "blk.0.attn_q.bias")),
    "exaone4": Architecture("exaone4", _exaone4, rope_rules=ALL),
    "gemma": Architecture("gemma", shifted=_NORMS),
    "gemma2": Architecture("gemma2", _gemma2, shifted=_NORMS),
    "gemma3": Architecture("gemma3_text", _gemma3, rope_rules=LINEAR, shifted=_NORMS, finish=_tie),
    "glm4": Architecture("glm4", partial=_PARTIAL),
    "gpt-oss": Architecture("gpt_oss", _gpt_oss, rope_rules=("yarn",)),
    "gpt2": Architecture("gpt2", _gpt2, "layer_norm_epsilon", rename=(("model.h.", "h."), ("model.", ""))),
    "gptneox": Architecture("gpt_neox", _gpt_neox, "layer_norm_eps", "rotary_pct", rename=_NEOX, changes=_FUSED),
    "granite": Architecture("granite", _granite, rope_rules=ALL, permuted=True),
    "granitemoe": Architecture("granitemoe", _granite_moe, rope_rules=ALL, permuted=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", _has("use_qk_norm", "blk.0.attn_q_norm.weight")),
    "lfm2": Architecture("lfm2", _lfm2, "norm_eps", mixed=True),
    "llama": Architecture("mixtral", _experts("num_local_experts"), permuted=True),
    "mamba": Architecture("mamba", _mamba, **_RECURRENT),
    "mamba2": Architecture("mamba2", _mamba2, rename=(("dt_bias", "dt_proj.bias"),), **_RECURRENT),
    "nemotron": Architecture("nemotron", _nemotron, "norm_eps", _PARTIAL, LINEAR, shifted=_NORMS),
    "olmo2": Architecture("olmo2", _olmo2, rope_rules=ALL),
    "olmoe": Architecture("olmoe", _experts("num_experts"), rope_rules=ALL),
    "phi2": Architecture("phi", None, "layer_norm_eps", _PARTIAL),
    "phi3": Architecture("phi3", _phi3, partial=_PARTIAL),
    "qwen2moe": Architecture("qwen2_moe", _qwen2_moe, rope_rules=LINEAR),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, rope_rules=ALL),
    "seed_oss": Architecture("seed_oss", rope_rules=ALL),
    "smollm3": Architecture("smollm3", _smollm3, rope_rules=ALL, permuted=True),
    "stablelm": Architecture("stablelm", _stablelm, "layer_norm_eps", _PARTIAL),
    "starcoder": Architecture("gpt_bigcode", _gpt2, "layer_norm_epsilon"),
    "starcoder2": Architecture("starcoder2", None, "norm_epsilon"),
}
