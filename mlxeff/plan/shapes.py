"""The shape of a model, from its config.json: matrices and heads of each layer, and what a pass over it reads and
computes. No weights are needed.

OpenELM is read by its own config class, because its heads and widths differ from layer to layer. All other decoders are
read by the names that Hugging Face's configs share. A matrix is named as in their checkpoints, "mlp.down_proj".

Letters: D hidden size, H query heads, G KV heads, E head size, F width of the feed-forward network, V vocabulary.
"""

from dataclasses import dataclass

from ..errors import MlxeffError, notices
from ..models.config import LARGEST, short
from ..models.openelm import OpenELMConfig

MAX_LAYERS = 1000  # a config with more is refused as damaged
# model_type → layers of which one has full attention and the others a window, where the config does not say it.
PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}
GATED_QUERIES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")  # a gate beside queries
TWO_MATRICES = ("phi", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "starcoder2", "nemotron", "stablelm_epoch", "bloom")
TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2")  # by default
WINDOWED = ("mistral", "ministral", "mixtral", "gemma2", "gemma3", "gemma3_text", "gpt_oss", "phi3", "starcoder2")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "experts_per_token", "moe_topk")
KINDS = ("full_attention", "sliding_attention", "linear_attention")
MLA = ("kv_lora_rank", "q_lora_rank")  # latent attention
STATE_BYTES = 4  # of a number of a recurrent state, float32


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer, or the experts' matrices of one name together. `active`: the share of its `weights` that one
    token reads, below 1 for experts of which a few are chosen."""

    name: str
    weights: int
    active: float = 1.0


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `vectors`: weights of its norms and biases; `window`: tokens that it attends to, None for all;
    `state`: numbers of a recurrent state, which then stands in place of keys and values (`groups` is 0)."""

    matrices: tuple[Matrix, ...]
    vectors: int
    heads: int
    groups: int
    size: int
    window: int | None = None
    state: int = 0

    @property
    def kv_numbers(self) -> int:
        """Numbers that the KV cache keeps of a token: its keys and its values."""
        return 2 * self.groups * self.size

    def attended(self, tokens: int) -> int:
        """How many of `tokens` cached tokens are read."""
        return tokens if self.window is None else min(tokens, self.window)

    def attended_sum(self, first: int, last: int) -> int:
        """The sum of `attended` over the positions from `first` + 1 to `last`: a prompt's tokens see those before."""
        if self.window is None or last <= self.window:
            return (first + 1 + last) * (last - first) // 2
        ramp = max(0, self.window - first)
        return (first + 1 + self.window) * ramp // 2 + (last - first - ramp) * self.window

    def attention_flops(self, first: int, last: int) -> int:
        """FLOPs of the products with keys and with values, of the tokens `first` + 1 to `last` of a sequence. The two
        products have E multiplications and additions for each head and attended token. A recurrent layer reads and
        writes its state once a token instead."""
        if self.state:
            return 6 * self.state * (last - first)
        return 4 * self.heads * self.size * self.attended_sum(first, last)


@dataclass(frozen=True)
class Shape:
    """A model by its layers. `head` is 0 where the embedding is the output head too. `context`: tokens that it was made
    for, None where the config does not say."""

    model_type: str
    layers: tuple[Layer, ...]
    embedding: int
    head: int
    vectors: int
    context: int | None = None

    @property
    def parameters(self) -> int:
        """The number of all weights; a tied embedding counts once."""
        own = sum(sum(m.weights for m in layer.matrices) + layer.vectors for layer in self.layers)
        return own + self.embedding + self.head + self.vectors

    @property
    def last(self) -> int:
        """Weights of the output head, tied or not."""
        return self.head or self.embedding

    @property
    def active(self) -> float:
        """Weights that one token reads: those of the layers, with the chosen experts, and the output head."""
        return sum(m.weights * m.active for layer in self.layers for m in layer.matrices) + self.last

    @property
    def kv_numbers(self) -> int:
        """Numbers of keys and values of one token in all layers, without regard to windows."""
        return sum(layer.kv_numbers for layer in self.layers)

    def cached_numbers(self, tokens: int) -> int:
        """Numbers of keys and values that are read when `tokens` tokens are cached."""
        return sum(layer.kv_numbers * layer.attended(tokens) for layer in self.layers)

    def matrix_flops(self, tokens: int) -> float:
        """FLOPs of the matrix products of the layers for `tokens` tokens, two for each weight and token."""
        return 2.0 * tokens * (self.active - self.last)

    def attention_flops(self, first: int, last: int) -> int:
        """FLOPs of attention of the tokens `first` + 1 to `last` of a sequence."""
        return sum(layer.attention_flops(first, last) for layer in self.layers)


def read_shape(config: dict) -> Shape:
    """The shape that the dict of a config.json describes. Raises MlxeffError that names missing or invalid entries, and
    for architectures whose cost is not predicted (latent attention, recurrent layers other than gated delta rules)."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise MlxeffError(f"config: model_type: wanted the name of an architecture, got {short(kind)}")
    if kind == "openelm":
        names = {field for field in OpenELMConfig.__dataclass_fields__ if field in config}
        return _openelm(OpenELMConfig.from_dict({name: config[name] for name in names} | {"model_type": kind}))
    inner = config.get("text_config")
    return _Reader(config | inner if isinstance(inner, dict) else config).shape()


def _openelm(config: OpenELMConfig) -> Shape:
    width, size, layers = config.model_dim, config.head_dim, []
    for i, (heads, groups) in enumerate(zip(config.num_query_heads, config.num_kv_heads, strict=True)):
        inner = config.ffn_dim(i)
        matrices = (
            Matrix("attn.qkv_proj", (heads + 2 * groups) * size * width),
            Matrix("attn.out_proj", heads * size * width),
            Matrix("ffn.proj_1", (2 if config.ffn_with_glu else 1) * inner * width),
            Matrix("ffn.proj_2", inner * width),
        )
        norms = 2 * width + (2 * size if config.normalize_qk_projections else 0)
        layers.append(Layer(matrices, norms, heads, groups, size))
    embedding = config.vocab_size * width
    head = 0 if config.share_input_output_layers else embedding
    return Shape("openelm", tuple(layers), embedding, head, width, config.max_context_length)


class _Reader:
    """Reads a config by the names that Hugging Face's decoders share."""

    def __init__(self, config: dict):
        self.config, self.kind = config, config["model_type"]
        needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        needed += ["intermediate_size"] if not config.get("moe_intermediate_size") else []
        if missing := [name for name in needed if config.get(name) is None]:
            raise MlxeffError(f"{self.kind} config: missing keys {missing}, which a prediction needs")
        if found := [name for name in MLA if config.get(name)]:
            raise MlxeffError(f"{self.kind} config: {found[0]}: latent attention is not predicted")
        self.hidden, self.heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        self.count = self.integer("num_hidden_layers", MAX_LAYERS)
        self.groups = self.integer("num_key_value_heads", default=self.heads)
        self.size = self.integer("head_dim", default=max(1, self.hidden // self.heads))
        self.experts = self.first(EXPERTS)
        self.chosen = self.first(CHOSEN)
        if self.experts and not self.chosen:
            raise MlxeffError(f"{self.kind} config: missing keys ['{CHOSEN[0]}'], which a prediction needs")
        if self.experts and self.chosen > self.experts:
            raise MlxeffError(f"{self.kind} config: {CHOSEN[0]}: wanted at most {self.experts}, got {self.chosen}")

    def integer(self, name: str, most: int = LARGEST, default: int | None = None) -> int:
        """A positive whole number. Raises MlxeffError."""
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            raise MlxeffError(f"{self.kind} config: {name}: wanted a whole number from 1 to {most}, got {short(value)}")
        return value

    def optional(self, name: str) -> int:
        """A positive whole number, 0 where the config has none or nothing for it. Raises MlxeffError."""
        return self.integer(name) if self.config.get(name) else 0

    def first(self, names: tuple[str, ...]) -> int:
        """The first of these entries that the config has; 0 where it has none."""
        return next((value for name in names if (value := self.optional(name))), 0)

    def shape(self) -> Shape:
        """The shape."""
        rows = self.integer("vocab_size") * self.hidden
        tied = self.config.get("tie_word_embeddings")
        tied = self.kind in TIED if tied is None else bool(tied)
        context = self.config.get("max_position_embeddings")
        layers = tuple(self.layer(i, kind) for i, kind in enumerate(self.kinds()))
        known = type(context) is int and context > 0
        return Shape(self.kind, layers, rows, 0 if tied else rows, self.hidden, context if known else None)

    def kinds(self) -> list[str]:
        """The kind of attention of each layer, a value of KINDS."""
        listed = self.config.get("layer_types")
        if listed is not None:
            wrong = not isinstance(listed, list) or len(listed) != self.count or not set(map(str, listed)) <= {*KINDS}
            if wrong:
                wanted = f"{self.count} of {', '.join(KINDS)}"
                raise MlxeffError(f"{self.kind} config: layer_types: wanted {wanted}, got {short(listed)}")
            return listed
        if self.config.get("linear_num_value_heads"):
            every = self.integer("full_attention_interval", default=4)
            return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(self.count)]
        window = self.config.get("sliding_window") and self.kind in WINDOWED
        every = self.optional("sliding_window_pattern") or PATTERNS.get(self.kind)
        if window and every:
            return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(self.count)]
        if window and self.kind == "gpt_oss":
            return ["full_attention" if i % 2 else "sliding_attention" for i in range(self.count)]
        return ["sliding_attention" if window else "full_attention"] * self.count

    def layer(self, number: int, kind: str) -> Layer:
        """The layer of this number."""
        feed = self.sparse() if self.is_sparse(number) else self.dense()
        norms = 2 * self.hidden
        if kind == "linear_attention":
            return self.recurrent(feed, norms)
        query = self.heads * self.size * (2 if self.kind in GATED_QUERIES else 1)
        matrices = (
            Matrix("self_attn.q_proj", self.hidden * query),
            Matrix("self_attn.k_proj", self.hidden * self.groups * self.size),
            Matrix("self_attn.v_proj", self.hidden * self.groups * self.size),
            Matrix("self_attn.o_proj", self.heads * self.size * self.hidden),
        )
        if self.kind.startswith("qwen3"):
            norms += 2 * self.size
        if self.kind.startswith("qwen2"):
            norms += (self.heads + 2 * self.groups) * self.size
        window = self.integer("sliding_window") if kind == "sliding_attention" else None
        return Layer(matrices + feed, norms, self.heads, self.groups, self.size, window)

    def recurrent(self, feed: tuple[Matrix, ...], norms: int) -> Layer:
        """A layer with a gated delta rule (Qwen3-Next): projections of queries, keys, values, gate and two numbers a
        head, and a state of one matrix (key size, value size) for each value head."""
        keys = self.integer("linear_num_key_heads") * self.integer("linear_key_head_dim")
        heads, size = self.integer("linear_num_value_heads"), self.integer("linear_value_head_dim")
        matrices = (
            Matrix("linear_attn.in_proj_qkvz", self.hidden * 2 * (keys + heads * size)),
            Matrix("linear_attn.in_proj_ba", self.hidden * 2 * heads),
            Matrix("linear_attn.out_proj", heads * size * self.hidden),
        )
        state = heads * size * self.integer("linear_key_head_dim")
        kernel = self.integer("linear_conv_kernel_dim", default=4)
        return Layer(matrices + feed, norms + kernel * (2 * keys + heads * size), 0, 0, size, None, state)

    def is_sparse(self, number: int) -> bool:
        """Whether the layer of this number has experts."""
        leading, listed = self.optional("first_k_dense_replace"), self.config.get("mlp_only_layers") or []
        if not isinstance(listed, list):
            raise MlxeffError(f"{self.kind} config: mlp_only_layers: wanted a list, got {short(listed)}")
        step = self.optional("decoder_sparse_step") or 1
        return bool(self.experts) and number >= leading and number not in listed and (number + 1) % step == 0

    def dense(self) -> tuple[Matrix, ...]:
        """The matrices of a feed-forward network that every token passes."""
        inner = self.integer("intermediate_size")
        names = ("up_proj", "down_proj") if self.kind in TWO_MATRICES else ("gate_proj", "up_proj", "down_proj")
        return tuple(Matrix(f"mlp.{name}", self.hidden * inner) for name in names)

    def sparse(self) -> tuple[Matrix, ...]:
        """The matrices of a mixture of experts: router, experts, and one that all tokens pass, where there is one."""
        inner = self.integer("moe_intermediate_size", default=self.config.get("intermediate_size"))
        share = self.chosen / self.experts
        shared = self.optional("shared_expert_intermediate_size") or self.optional("n_shared_experts") * inner
        found = [Matrix("mlp.gate", self.hidden * self.experts)]
        for name in ("gate_proj", "up_proj", "down_proj"):
            found.append(Matrix(f"mlp.experts.{name}", self.experts * self.hidden * inner, share))
            if shared:
                found.append(Matrix(f"mlp.shared_expert.{name}", self.hidden * shared))
        return tuple(found)


def say_assumed(shape: Shape, known: tuple[str, ...]) -> None:
    """A notice where the architecture is not one of those in `known`, whose shapes are checked by tests."""
    if shape.model_type not in known:
        text = "%s: the matrices are counted as those of a Llama with this config, which may leave some out"
        notices.warning(text, shape.model_type)
