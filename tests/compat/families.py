"""Architectures, and weights by which the next token is a known function of the present one.

Each row of the embedding is a random vector of ±1, its token's mark. Where the head is a matrix of its own, its row of
a token is the sum of the marks of the tokens before it, so the token that follows scores highest. Where the head is the
embedding, the last feed-forward network is an associative memory: it has a hidden unit for each token, which fires at
the token's mark and adds the mark of the token that follows. These matrices have few distinct values, so no
quantisation changes them much. All other weights are random. What they add to the hidden states shows in the logits, so
that a wrong rotary embedding or a wrong order of rows is seen there, though it does not change the answer.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

HIDDEN, INNER, LAYERS = 64, 384, 2
CONTEXT = 256
SHARED = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INNER, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
}  # fmt: skip
LOGIT_SCALE = 0.25  # of the final norm: the right token's logit is about 16
SIGNAL = 4.0  # length of what the memory adds, in lengths of an embedding row
OUTPUTS = ("o_proj", "out_proj", "dense", "down_proj", "proj_2", "c_proj")  # what adds to the hidden states


@dataclass(frozen=True)
class Family:
    """An architecture.

    own      mlxeff has an implementation; the others run through mlx-lm
    config   entries of config.json beside SHARED
    heads    "tied", "untied": which of them the architecture has
    memory   (gate, up, down) matrices of the last feed-forward network by their names; gate and up may be one matrix
    ropes    the rules of rotary embedding that the architecture has
    whole    whether `config` has all entries, and none of SHARED counts
    tie      the entry that says whether the head is the embedding
    gguf     the architecture's name in GGUF files, "" for none; gguf_ropes: how these say such a rule
    """

    own: bool
    config: dict = field(default_factory=dict)
    heads: tuple[str, ...] = ("tied", "untied")
    memory: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    ropes: tuple[str, ...] = ("none",)
    whole: bool = False
    tie: str = "tie_word_embeddings"
    gguf: str = ""
    gguf_ropes: tuple[str, ...] = ()


ALL_ROPES = ("none", "linear", "llama3", "yarn")
SCALING_KEYS = ("scaling keys linear", "scale_linear key", "scaling keys yarn")
OPENELM = {
    "model_type": "openelm", "num_transformer_layers": LAYERS, "model_dim": HIDDEN, "head_dim": 16,
    "num_query_heads": [4, 8], "num_kv_heads": [1, 2], "ffn_multipliers": [2.0, 6.0], "ffn_dim_divisor": 32,
    "ffn_with_glu": True, "normalize_qk_projections": True, "max_context_length": CONTEXT,
    "rope_max_length": 2 * CONTEXT, "rope_freq_constant": 10000, "normalization_layer_name": "rms_norm",
    "activation_fn_name": "swish",
    "num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0], "initializer_range": 0.02,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "num_hidden_layers": 6, "query_pre_attn_scalar": 16,
    "sliding_window": 64, "sliding_window_pattern": 6, "rms_norm_eps": 1e-6, "rope_local_base_freq": 5000.0,
}  # fmt: skip
MAMBA = {
    "model_type": "mamba", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 128,
    "state_size": 8, "conv_kernel": 4, "time_step_rank": 4, "use_bias": False, "use_conv_bias": True,
}  # fmt: skip
QWEN2_MOE = {
    "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
FAMILIES = {
    "llama": Family(
        True, {"model_type": "llama"}, ropes=ALL_ROPES, gguf="llama", gguf_ropes=(*SCALING_KEYS, "rope_freqs tensor")
    ),
    "mistral": Family(True, {"model_type": "mistral", "sliding_window": None}, ("untied",), ropes=ALL_ROPES),
    "qwen2": Family(True, {"model_type": "qwen2"}, ropes=ALL_ROPES, gguf="qwen2", gguf_ropes=SCALING_KEYS),
    "qwen3": Family(True, {"model_type": "qwen3"}, ropes=ALL_ROPES, gguf="qwen3", gguf_ropes=SCALING_KEYS),
    "openelm": Family(True, OPENELM, memory=("proj_1", "proj_2"), whole=True, tie="share_input_output_layers"),
    "gemma3_text": Family(False, GEMMA3, ("tied",), gguf="gemma3"),
    "phi3": Family(
        False, {"model_type": "phi3"}, ("untied",), ropes=("none", "longrope"), gguf="phi3",
        gguf_ropes=("rope_factors tensors",),
    ),
    "olmo2": Family(
        False, {"model_type": "olmo2"}, ("untied",), ropes=("none", "linear", "yarn"), gguf="olmo2",
        gguf_ropes=SCALING_KEYS,
    ),
    "starcoder2": Family(
        False, {"model_type": "starcoder2", "norm_epsilon": 1e-5}, ("tied",), ("c_fc", "c_proj"), gguf="starcoder2"
    ),
    "cohere": Family(
        False, {"model_type": "cohere", "layer_norm_eps": 1e-5, "logit_scale": 1.0}, ("tied",), gguf="command-r"
    ),
    "qwen2_moe": Family(False, QWEN2_MOE, ("untied",), gguf="qwen2moe"),
    "mamba": Family(False, MAMBA, ("untied",), whole=True, gguf="mamba"),
}  # fmt: skip
ROPES = {
    "none": None,
    "linear": {"rope_type": "linear", "type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 2048},
    "yarn": {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"rope_type": "longrope", "type": "longrope", "original_max_position_embeddings": 64,
                 "short_factor": [1.0] * 8, "long_factor": [1.0 + i / 4 for i in range(8)]},
}  # fmt: skip


def config_of(family: Family, rope: str, tied: bool, vocabulary: int) -> dict:
    """config.json without end tokens."""
    config = ({} if family.whole else SHARED) | family.config | {"vocab_size": vocabulary, family.tie: tied}
    if rope == "longrope":
        config["original_max_position_embeddings"] = ROPES[rope]["original_max_position_embeddings"]
    return config | ({} if ROPES[rope] is None else {"rope_scaling": ROPES[rope]})


def weights_of(family: Family, config: dict, follows: dict[int, int], seed: int) -> dict[str, np.ndarray]:
    """float32 weights under the names of mlx-lm's parameters. `follows`: token → the token after it."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    drawn = np.random.default_rng(seed)
    tied, count = config[family.tie], config["vocab_size"]
    marks = drawn.choice([-1.0, 1.0], (count, HIDDEN)).astype(np.float32)
    heads = np.zeros_like(marks)
    for token, after in follows.items():
        heads[after] += marks[token]
    weights = {}
    for name, value in tree_flatten(model_class(arguments.from_dict(config)).parameters()):
        weights[name] = _draw(name, value, drawn)
        if "embed" in name:
            weights[name] = marks
        elif name == "lm_head.weight":
            weights[name] = heads
    if tied:
        weights.pop("lm_head.weight", None)  # Gemma's model drops its head where the file has none
        _remember(family, weights, marks, follows)
    _scale_norms(config, weights)
    return weights


def _draw(name: str, value: mx.array, drawn: np.random.Generator) -> np.ndarray:
    """Random values for a parameter."""
    module, _, kind = name.rpartition(".")
    if "norm" in name:
        base = 0.0 if kind == "bias" else 1.0
        return (base + 0.1 * drawn.standard_normal(value.shape)).astype(np.float32)
    if value.ndim == 1 or "A_log" in name:  # biases, and a recurrent layer's own parameters as the model sets them
        return np.array(value, np.float32) if kind != "bias" else 0.1 * drawn.standard_normal(value.shape, np.float32)
    scale = 0.014 if module.endswith(OUTPUTS) else 0.2
    return scale * drawn.standard_normal(value.shape, np.float32)


def _remember(family: Family, weights: dict, marks: np.ndarray, follows: dict[int, int]) -> None:
    """Make an associative memory of the last feed-forward network: unit i fires at the mark of token i."""
    last = {name: next(n for n in reversed(weights) if n.endswith(f"{name}.weight")) for name in family.memory}
    *inputs, down = (last[name] for name in family.memory)
    inner = weights[down].shape[1]
    units, outputs = np.zeros((inner, HIDDEN), np.float32), np.zeros((HIDDEN, inner), np.float32)
    for unit, (token, after) in enumerate(follows.items()):
        units[unit] = marks[token] / 8  # the mark gives 8, another token's mark one drawn from N(0, 1)
        outputs[:, unit] = marks[after]
    fires = 8.0 if family.memory[0] == "c_fc" else 64.0  # gelu(8), or silu(8) · 8
    for name in inputs:
        weights[name] = np.concatenate([units] * (weights[name].shape[0] // inner))
    weights[down] = outputs * np.float32(SIGNAL / fires)
    for name in (*inputs, down):
        bias = name.replace("weight", "bias")
        if bias in weights:
            weights[bias] = np.full_like(weights[bias], -2.0 if name in inputs else 0.0)


def _scale_norms(config: dict, weights: dict) -> None:
    """The final norm sets the scale of the logits. Norms after a block set how much the block adds."""
    kind = config["model_type"]
    for name, value in weights.items():
        if "norm" not in name or name.endswith("bias"):
            continue
        scale = 1.0
        if "layers" not in name:
            scale = LOGIT_SCALE
        elif kind == "olmo2" and "post_" in name:
            scale = 0.2
        elif kind == "gemma3_text" and "post_" in name:  # its embeddings are 8 long; its memory is in the last layer
            last = f"layers.{config['num_hidden_layers'] - 1}.post_feedforward"
            scale = 8 * SIGNAL if last in name else 0.8
        value *= scale
        if kind == "gemma3_text":  # its norms multiply by 1 + weight
            value -= 1
