"""The family of dense decoders: Llama 2 and 3.x, SmolLM and SmolLM2, Mistral, Qwen2, Qwen3.

All are the same architecture: pre-norm layers with RMSNorm, rotary embedding, grouped-query attention and SwiGLU. What
differs between them is a field of the config. Parameter names are Hugging Face's. Sources: Llama (arXiv 2302.13971,
2407.21783), Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388) and the config.json of their releases.

Shapes: B batch, S tokens, D hidden size, H query heads, G KV heads, E head size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..modules import Embedding, Linear, RMSNorm
from ..ops import swiglu
from .config import LARGEST, fits, read_config, require
from .decoder import DecoderModel
from .parts import AttentionParts, DecoderLayer, EndParts, GatedParts, Heads, RotaryAttention, Rows
from .rope import make_rope, rule_of

# model_type → fields of `LlamaConfig` that are fixed for it and not written in its config.json.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
MAX_LAYERS = 1000  # a config with more is refused as damaged; the largest model of the family has 126
# `from_dict` turns them into `layer_types` for Qwen; the other families do not read them.
WINDOW_KEYS = frozenset({"max_window_layers", "use_sliding_window"})


@dataclass(frozen=True)
class LlamaConfig:
    """The config.json of a dense decoder, with Hugging Face's names. `max_position_embeddings` and `sliding_window` are
    in tokens. Raises MlxeffError for values that contradict each other or that this architecture does not cover."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    rms_norm_eps: float
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleaved: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    use_mrope: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """Read the dict of a config.json in the form of Hugging Face (transformers 4 and 5) or mlx-lm. Raises
        MlxeffError for unknown or missing keys and invalid values."""
        config = {key: value for key, value in config.items() if key not in cls.unread(config)}
        kind = config["model_type"]
        if parameters := config.pop("rope_parameters", None):
            require(isinstance(parameters, dict), kind, "rope_parameters", "dict", parameters)
            config.setdefault("rope_theta", parameters.get("rope_theta", 10000.0))
            config["rope_scaling"] = config.get("rope_scaling") or parameters
        if kind.startswith("qwen") and not config.get("use_sliding_window"):
            config["sliding_window"] = None
        elif kind.startswith("qwen") and not config.get("layer_types"):
            full, layers = config.get("max_window_layers", 28), config.get("num_hidden_layers", 0)
            require(fits(full, int), kind, "max_window_layers", "int", full)
            require(fits(layers, int) and layers <= MAX_LAYERS, kind, "num_hidden_layers", "int", layers)
            config["layer_types"] = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
        return read_config(cls, config | FAMILIES[kind], WINDOW_KEYS)

    @staticmethod
    def unread(config: dict) -> set[str]:
        """The keys of the dict of a config.json that this class has and does not read: a model of the type "llama"
        attends to all tokens, unless its layers are listed with their kinds of attention."""
        windowed = config.get("sliding_window") is not None and not config.get("layer_types")
        return {"sliding_window"} if windowed and config.get("model_type") == "llama" else set()

    def __post_init__(self):
        kind, heads = self.model_type, self.num_attention_heads
        sizes = "hidden_size num_hidden_layers intermediate_size num_attention_heads vocab_size max_position_embeddings"
        for name in sizes.split():
            value = getattr(self, name)
            require(value > 0, kind, name, "a positive whole number", value)
        for name in ("rms_norm_eps", "rope_theta"):
            require(getattr(self, name) > 0, kind, name, "above 0", getattr(self, name))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        groups = self.num_key_value_heads
        require(groups > 0 and heads % groups == 0, kind, "num_key_value_heads", f"a divisor of {heads}", groups)
        require(self.head_dim > 0 and self.head_dim % 2 == 0, kind, "head_dim", "an even number", self.head_dim)
        window = self.sliding_window
        require(window is None or window > 0, kind, "sliding_window", "a positive whole number", window)
        layers = self.num_hidden_layers
        require(layers <= MAX_LAYERS, kind, "num_hidden_layers", f"at most {MAX_LAYERS}", layers)
        require(self.hidden_act == "silu", kind, "hidden_act", "silu", self.hidden_act)
        require(not self.rope_interleaved, kind, "rope_interleaved", "false", self.rope_interleaved)
        require(not self.use_mrope, kind, "use_mrope", "false", self.use_mrope)
        rows = heads * self.head_dim
        require(rows <= LARGEST, kind, "num_attention_heads x head_dim", f"at most {LARGEST}", rows)
        types = self.layer_types
        valid = types is None or (
            len(types) == self.num_hidden_layers and set(types) <= {"full_attention", "sliding_attention"}
        )
        require(valid, kind, "layer_types", f"{self.num_hidden_layers} of full_attention or sliding_attention", types)

    def window(self, layer: int) -> int | None:
        """Sliding window of the layer with this number in tokens; None for full attention."""
        if self.layer_types and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window


def rope_of_mlx_lm(config: dict) -> str | None:
    """The rule of the rotary embedding, in words, of a config.json of these families that mlx-lm computes and this
    module does not; None for others. Raises MlxeffError where the config has anything else that is not supported."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    dynamic = isinstance(scaling, dict) and rule_of(scaling) == "dynamic" and "max_position_embeddings" in config
    dynamic = dynamic and fits(scaling.get("factor"), float) and scaling["factor"] > 0
    traditional = config.get("rope_traditional") is True and config.get("model_type") in ("llama", "mistral", "qwen2")
    if not (dynamic or traditional):
        return None
    left_out = {"rope_traditional"} | ({"rope_scaling", "rope_parameters"} if dynamic else set())
    own = LlamaConfig.from_dict({key: value for key, value in config.items() if key not in left_out})
    if any(own.window(layer) for layer in range(own.num_hidden_layers)):
        return None  # mlx-lm does not read all windows
    make_rope(own.head_dim, own.rope_theta, own.rope_scaling, own.model_type, own.max_position_embeddings)
    return " and ".join([*(["dynamic"] if dynamic else []), *(["rope_traditional"] if traditional else [])])


class Attention(RotaryAttention):
    """Attention with separate projections for queries, keys and values."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.heads, self.groups, self.scale = config.num_attention_heads, config.num_key_value_heads, size**-0.5
        qkv_bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(hidden, self.heads * size, bias=qkv_bias)
        self.k_proj = Linear(hidden, self.groups * size, bias=qkv_bias)
        self.v_proj = Linear(hidden, self.groups * size, bias=qkv_bias)
        self.o_proj = Linear(self.heads * size, hidden, bias=config.attention_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)
        context = config.max_position_embeddings
        self.rope = make_rope(size, config.rope_theta, config.rope_scaling, config.model_type, context)

    def project(self, x: mx.array) -> Heads:
        """Normalised hidden states (B, S, D) → raw queries (B, H, S, E), keys and values (B, G, S, E)."""
        batch, new, _ = x.shape
        parts = (self.q_proj, self.heads), (self.k_proj, self.groups), (self.v_proj, self.groups)
        return tuple(linear(x).reshape(batch, new, count, -1).transpose(0, 2, 1, 3) for linear, count in parts)

    def output(self, x: mx.array) -> mx.array:
        """The attention output of all heads (B, S, H·E) → (B, S, D)."""
        return self.o_proj(x)

    def parts(self, window: int | None) -> AttentionParts:
        """The attention by its parts; `window`: sliding window in tokens, None for full attention."""
        matrices = (Rows(linear) for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        return AttentionParts(*matrices, self.q_norm, self.k_norm, self.rope, self.heads, self.groups, window)


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Normalised hidden states (B, S, D) → the (B, S, D) that is added to the hidden states."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    def parts(self) -> GatedParts:
        """The feed-forward network by its matrices."""
        return GatedParts(Rows(self.gate_proj), Rows(self.up_proj), Rows(self.down_proj))


class Layer(DecoderLayer):
    """One layer, under Hugging Face's parameter names."""

    ATTENTION, FEED_FORWARD = "self_attn", "mlp"
    ATTENTION_NORM, FEED_FORWARD_NORM = "input_layernorm", "post_attention_layernorm"

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Decoder(nn.Module):
    """Holds the modules whose parameter names begin with `model.` in Hugging Face's checkpoints."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Model(DecoderModel):
    """A dense decoder, called as `DecoderModel` says."""

    Config = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[Layer]:
        """The decoder layers, first to last."""
        return self.model.layers

    def pruned(self, layers: Sequence[int]) -> "Model":
        """A model of the layers with these numbers, in this order, with the embedding and head of this model. The
        modules are shared with this model, not copied."""
        types = self.config.layer_types and [self.config.layer_types[i] for i in layers]
        model = Model(replace(self.config, num_hidden_layers=len(layers), layer_types=types))
        model.model.embed_tokens, model.model.norm = self.model.embed_tokens, self.model.norm
        model.model.layers = [self.layers[i] for i in layers]
        if not self.config.tie_word_embeddings:
            model.lm_head = self.lm_head
        return model.eval()

    @property
    def context_length(self) -> int:
        """Tokens of context that the model was trained for."""
        return self.config.max_position_embeddings

    def window(self, layer: int) -> int | None:
        """Sliding window of the layer with this number in tokens; None for full attention."""
        return self.config.window(layer)

    def end_parts(self) -> EndParts:
        """The parts before and after the layers."""
        embedding = self.model.embed_tokens
        head = embedding if self.config.tie_word_embeddings else self.lm_head
        return EndParts(Rows(embedding), self.model.norm, Rows(head))

    @staticmethod
    def unused(name: str, config: dict) -> bool:
        """Whether the tensor called `name` may be in a checkpoint with this config and is not read: a table of rotary
        frequencies, which are computed, or an output head that is tied to the embedding."""
        tied = LlamaConfig.from_dict(config).tie_word_embeddings
        return name.endswith("rotary_emb.inv_freq") or (tied and name.startswith("lm_head."))
