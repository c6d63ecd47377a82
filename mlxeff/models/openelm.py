"""OpenELM (Mehta et al., arXiv 2404.14619): a decoder whose layers grow from the first to the last (layer-wise
scaling).

Parameter names and config keys are those of Apple's Hugging Face release. Query and key heads are RMS-normalised before
RoPE; `num_gqa_groups` is the number of query heads a KV head serves. Shapes: B batch, S tokens, D model, H query heads,
G KV heads, E head size, F feed-forward, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..errors import MlxeffError
from ..modules import Embedding, Linear, RMSNorm
from ..ops import swiglu
from .config import read_config, require
from .decoder import DecoderModel
from .parts import AttentionParts, DecoderLayer, EndParts, GatedParts, Heads, RotaryAttention, Rows
from .rope import make_rope

# size → (layers, D, E) of the published models; all else they share.
SIZES = {"270M": (16, 1280, 64), "450M": (20, 1536, 64), "1_1B": (28, 2048, 64), "3B": (36, 3072, 128)}


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to a multiple of `divisor`, at least one, never more than 10 % below `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def multipliers(ends: tuple[float, float], layers: int) -> list[float]:
    """Layer-wise scaling: `layers` values from the first to the last of `ends`, evenly spaced, to two decimals."""
    first, last = ends
    return [round(first + (last - first) * i / max(1, layers - 1), 2) for i in range(layers)]


def published_config(size: str, vocab_size: int = 32000) -> dict:
    """config.json of a published OpenELM, `size` one of 270M, 450M, 1_1B, 3B, with the per-layer lists expanded."""
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
    """config.json of an OpenELM; the three lists have one entry a layer, `max_context_length` is in tokens."""

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
        """Read a config.json dict; refuses unknown and missing keys."""
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
            require(key > 0 and query % key == 0, "openelm", "num_kv_heads", f"a divisor of {query}", key)
        require(self.activation_fn_name == "swish", "openelm", "activation_fn_name", "swish", self.activation_fn_name)
        norm = self.normalization_layer_name
        require(norm == "rms_norm", "openelm", "normalization_layer_name", "rms_norm", norm)

    def ffn_dim(self, layer: int) -> int:
        """Width of a layer's feed-forward."""
        return make_divisible(self.ffn_multipliers[layer] * self.model_dim, self.ffn_dim_divisor)


class Attention(RotaryAttention):
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
        """Normed hidden states (B, S, D) → raw queries (B, H, S, E), keys and values (B, G, S, E)."""
        batch, new, _ = x.shape
        qkv = self.qkv_proj(x).reshape(batch, new, self.heads + 2 * self.groups, -1).transpose(0, 2, 1, 3)
        return tuple(mx.split(qkv, [self.heads, self.heads + self.groups], axis=1))

    def output(self, x: mx.array) -> mx.array:
        """Attended heads (B, S, H·E) → (B, S, D)."""
        return self.out_proj(x)

    def parts(self, window: int | None) -> AttentionParts:
        """The matrices, norms and sizes by their role: query, key and value rows lie together."""
        keys, values = self.heads * self.rope.size, (self.heads + self.groups) * self.rope.size
        rows = [Rows(self.qkv_proj, 0, keys), Rows(self.qkv_proj, keys, values), Rows(self.qkv_proj, values)]
        matrices = (*rows, Rows(self.out_proj))
        return AttentionParts(*matrices, self.q_norm, self.k_norm, self.rope, self.heads, self.groups, window)


class FeedForward(nn.Module):
    """proj_2(silu(gate) · up) with gate | up = proj_1(x), or proj_2(silu(proj_1(x))) without GLU."""

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.width, self.glu = config.ffn_dim(layer), config.ffn_with_glu
        self.proj_1 = Linear(config.model_dim, self.width * (2 if self.glu else 1), bias=False)
        self.proj_2 = Linear(self.width, config.model_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Normed hidden states (B, S, D) → what is added to them, (B, S, D)."""
        inner = self.proj_1(x)
        if self.glu:
            return self.proj_2(swiglu(*mx.split(inner, 2, axis=-1)))
        return self.proj_2(inner * mx.sigmoid(inner))

    def parts(self) -> GatedParts | None:
        """The matrices by their role, gate and up rows of one; None without GLU."""
        if not self.glu:
            return None
        return GatedParts(Rows(self.proj_1, 0, self.width), Rows(self.proj_1, self.width), Rows(self.proj_2))


class Layer(DecoderLayer):
    ATTENTION, FEED_FORWARD = "attn", "ffn"
    ATTENTION_NORM, FEED_FORWARD_NORM = "attn_norm", "ffn_norm"

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)


class Decoder(nn.Module):
    """The parameters that Apple's names begin with `transformer.`; `DecoderModel` runs them."""

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.token_embeddings = Embedding(config.vocab_size, config.model_dim)
        self.layers = [Layer(config, i) for i in range(config.num_transformer_layers)]
        self.norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)


class Model(DecoderModel):
    """OpenELM: token ids (B, S) and a cache → logits (B, S, V)."""

    Config = OpenELMConfig

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.config = config
        self.transformer = Decoder(config)
        if not config.share_input_output_layers:
            self.lm_head = Linear(config.model_dim, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[Layer]:
        return self.transformer.layers

    def pruned(self, layers: Sequence[int]) -> "Model":
        """The model of these layers alone, in the order given; the modules are shared with this one."""
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
        """Tokens of context the model was trained for."""
        return self.config.max_context_length

    def window(self, _layer: int) -> None:
        """None: attention is full in every layer."""
        return

    def end_parts(self) -> EndParts:
        """The modules before and after the layers."""
        embedding = self.transformer.token_embeddings
        head = embedding if self.config.share_input_output_layers else self.lm_head
        return EndParts(Rows(embedding), self.transformer.norm, Rows(head))

    @staticmethod
    def unused(name: str, config: dict) -> bool:
        """True for a head tensor beside shared embeddings."""
        return config.get("share_input_output_layers", True) and name.startswith("lm_head.")
