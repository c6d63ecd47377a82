"""OpenELM (Mehta et al., arXiv 2404.14619): a decoder with layer-wise scaling, whose number of heads and width of the
feed-forward network grow from the first layer to the last.

Parameter names and config keys are those of Apple's release on Hugging Face. Query and key heads are RMS-normalised
before the rotary embedding. `num_gqa_groups` is the number of query heads that share one KV head.

Shapes: B batch, S tokens, D model_dim, H query heads, G KV heads, E head size, F width of the feed-forward network,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..errors import MlxeffError
from ..modules import Embedding, Linear, RMSNorm
from ..ops import swiglu
from .config import LARGEST, read_config, require
from .decoder import DecoderModel
from .parts import AttentionParts, DecoderLayer, EndParts, GatedParts, Heads, RotaryAttention, Rows
from .rope import make_rope

# Name of a published size → (layers, D, E). The rest of their configs is the same for all.
SIZES = {"270M": (16, 1280, 64), "450M": (20, 1536, 64), "1_1B": (28, 2048, 64), "3B": (36, 3072, 128)}


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, but at least `divisor` and not less than 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def multipliers(ends: tuple[float, float], layers: int) -> list[float]:
    """Layer-wise scaling: one multiplier for each layer, evenly spaced between the two `ends` and rounded to two
    decimals."""
    first, last = ends
    return [round(first + (last - first) * i / max(1, layers - 1), 2) for i in range(layers)]


def published_config(size: str, vocab_size: int = 32000) -> dict:
    """The config.json of a published OpenELM of `size` 270M, 450M, 1_1B or 3B, with the lists that have one entry for
    each layer. Raises MlxeffError for another size."""
    if size not in SIZES:
        raise MlxeffError(f"OpenELM: wanted a size of {', '.join(SIZES)}, got {size!r}")
    layers, model_dim, head_dim = SIZES[size]
    queries = [make_divisible(model_dim * m, head_dim * 4) // head_dim for m in multipliers((0.5, 1.0), layers)]
    return {
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "num_transformer_layers": layers,
        "model_dim": model_dim,
        "head_dim": head_dim,
        "num_gqa_groups": 4,
        "qkv_multipliers": [0.5, 1.0],
        "num_query_heads": queries,
        "num_kv_heads": [q // 4 for q in queries],
        "ffn_multipliers": multipliers((0.5, 4.0), layers),
        "ffn_dim_divisor": 256,
        "ffn_with_glu": True,
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "max_context_length": 2048,
        "vocab_size": vocab_size,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@dataclass(frozen=True)
class OpenELMConfig:
    """The config.json of an OpenELM. The first three lists have one entry for each layer; `max_context_length` is in
    tokens. Raises MlxeffError for values that contradict each other or that the architecture does not cover."""

    num_transformer_layers: int
    model_dim: int
    head_dim: int
    num_query_heads: list[int]
    num_kv_heads: list[int]
    ffn_multipliers: list[float]
    vocab_size: int
    num_gqa_groups: int = 4
    qkv_multipliers: list[float] | float | None = None
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float = 10000
    rope_max_length: int = 4096
    max_context_length: int = 2048
    rms_norm_eps: float = 1e-6

    @classmethod
    def from_dict(cls, config: dict) -> "OpenELMConfig":
        """Read the dict of a config.json. Raises MlxeffError for unknown or missing keys and invalid values."""
        return read_config(cls, config)

    def __post_init__(self):
        layers = self.num_transformer_layers
        for name in ("num_transformer_layers", "model_dim", "head_dim", "vocab_size", "ffn_dim_divisor"):
            value = getattr(self, name)
            require(value > 0, "openelm", name, "a positive whole number", value)
        for name in ("rms_norm_eps", "rope_freq_constant"):
            require(getattr(self, name) > 0, "openelm", name, "above 0", getattr(self, name))
        require(self.head_dim % 2 == 0, "openelm", "head_dim", "an even number", self.head_dim)
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            got = getattr(self, name)
            require(isinstance(got, list) and len(got) == layers, "openelm", name, f"a list of {layers} numbers", got)
        for query, key in zip(self.num_query_heads, self.num_kv_heads, strict=True):
            require(query > 0, "openelm", "num_query_heads", "numbers above 0", query)
            require(key > 0 and query % key == 0, "openelm", "num_kv_heads", f"a divisor of {query}", key)
        require(self.activation_fn_name == "swish", "openelm", "activation_fn_name", "swish", self.activation_fn_name)
        norm = self.normalization_layer_name
        require(norm == "rms_norm", "openelm", "normalization_layer_name", "rms_norm", norm)

        widest = max(
            self.head_dim * max(q + 2 * k for q, k in zip(self.num_query_heads, self.num_kv_heads, strict=True)),
            *(2 * self.ffn_dim(layer) for layer in range(layers)),
        )
        require(widest <= LARGEST, "openelm", "the widest matrix", f"at most {LARGEST} rows", widest)

    def ffn_dim(self, layer: int) -> int:
        """Width F of the feed-forward network of the layer with this number."""
        return make_divisible(self.ffn_multipliers[layer] * self.model_dim, self.ffn_dim_divisor)


class Attention(RotaryAttention):
    """Attention with one projection for queries, keys and values."""

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        size, self.heads, self.groups = config.head_dim, config.num_query_heads[layer], config.num_kv_heads[layer]
        self.scale = size**-0.5
        self.qkv_proj = Linear(config.model_dim, (self.heads + 2 * self.groups) * size, bias=False)
        self.out_proj = Linear(self.heads * size, config.model_dim, bias=False)
        self.q_norm = self.k_norm = None
        if config.normalize_qk_projections:
            self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.rope = make_rope(size, config.rope_freq_constant, None, "openelm")

    def project(self, x: mx.array) -> Heads:
        """Normalised hidden states (B, S, D) → raw queries (B, H, S, E), keys and values (B, G, S, E)."""
        batch, new, _ = x.shape
        qkv = self.qkv_proj(x).reshape(batch, new, self.heads + 2 * self.groups, -1).transpose(0, 2, 1, 3)
        return tuple(mx.split(qkv, [self.heads, self.heads + self.groups], axis=1))

    def output(self, x: mx.array) -> mx.array:
        """The attention output of all heads (B, S, H·E) → (B, S, D)."""
        return self.out_proj(x)

    def parts(self, window: int | None) -> AttentionParts:
        """The attention by its parts: query, key and value matrices are rows of one weight. `window`: sliding window in
        tokens, None for full attention."""
        keys, values = self.heads * self.rope.size, (self.heads + self.groups) * self.rope.size
        rows = [Rows(self.qkv_proj, 0, keys), Rows(self.qkv_proj, keys, values), Rows(self.qkv_proj, values)]
        matrices = (*rows, Rows(self.out_proj))
        return AttentionParts(*matrices, self.q_norm, self.k_norm, self.rope, self.heads, self.groups, window)


class FeedForward(nn.Module):
    """proj_2(silu(gate) · up), where proj_1(x) is gate and up side by side; proj_2(silu(proj_1(x))) without GLU."""

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.width, self.glu = config.ffn_dim(layer), config.ffn_with_glu
        self.proj_1 = Linear(config.model_dim, self.width * (2 if self.glu else 1), bias=False)
        self.proj_2 = Linear(self.width, config.model_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Normalised hidden states (B, S, D) → the (B, S, D) that is added to the hidden states."""
        inner = self.proj_1(x)
        if self.glu:
            return self.proj_2(swiglu(*mx.split(inner, 2, axis=-1)))
        return self.proj_2(inner * mx.sigmoid(inner))

    def parts(self) -> GatedParts | None:
        """The feed-forward network by its matrices, gate and up being rows of one weight; None without GLU."""
        if not self.glu:
            return None
        return GatedParts(Rows(self.proj_1, 0, self.width), Rows(self.proj_1, self.width), Rows(self.proj_2))


class Layer(DecoderLayer):
    """One layer, under Apple's parameter names."""

    ATTENTION, FEED_FORWARD = "attn", "ffn"
    ATTENTION_NORM, FEED_FORWARD_NORM = "attn_norm", "ffn_norm"

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)


class Decoder(nn.Module):
    """Holds the modules whose parameter names begin with `transformer.` in Apple's checkpoints."""

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.token_embeddings = Embedding(config.vocab_size, config.model_dim)
        self.layers = [Layer(config, i) for i in range(config.num_transformer_layers)]
        self.norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)


class Model(DecoderModel):
    """An OpenELM, called as `DecoderModel` says."""

    Config = OpenELMConfig

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.config = config
        self.transformer = Decoder(config)
        if not config.share_input_output_layers:
            self.lm_head = Linear(config.model_dim, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[Layer]:
        """The decoder layers, first to last."""
        return self.transformer.layers

    def pruned(self, layers: Sequence[int]) -> "Model":
        """A model of the layers with these numbers, in this order, with the embedding and head of this model. The
        modules are shared with this model, not copied."""
        lists = ("num_query_heads", "num_kv_heads", "ffn_multipliers")
        shapes = {name: [getattr(self.config, name)[i] for i in layers] for name in lists}
        model = Model(replace(self.config, num_transformer_layers=len(layers), **shapes))
        ours = self.transformer
        model.transformer.token_embeddings, model.transformer.norm = ours.token_embeddings, ours.norm
        model.transformer.layers = [self.layers[i] for i in layers]
        if not self.config.share_input_output_layers:
            model.lm_head = self.lm_head
        return model.eval()

    @property
    def context_length(self) -> int:
        """Tokens of context that the model was trained for."""
        return self.config.max_context_length

    def window(self, _layer: int) -> None:
        """None: every layer has full attention."""
        return

    def end_parts(self) -> EndParts:
        """The parts before and after the layers."""
        embedding = self.transformer.token_embeddings
        head = embedding if self.config.share_input_output_layers else self.lm_head
        return EndParts(Rows(embedding), self.transformer.norm, Rows(head))

    @staticmethod
    def unused(name: str, config: dict) -> bool:
        """Whether the tensor called `name` may be in a checkpoint with this config and is not read: an output head that
        is tied to the embedding."""
        return config.get("share_input_output_layers", True) and name.startswith("lm_head.")
