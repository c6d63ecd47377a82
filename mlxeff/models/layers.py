"""What the decoder families share: reading a config strictly, the angles of rotary embedding, and the call protocol of
a model.

Sources: RoPE (arXiv 2104.09864) with position interpolation (2306.15595), YaRN (2309.00071) and the frequency rule of
Llama 3.1's release; SwiGLU (2002.05202).
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import UnionType
from typing import get_args, get_origin

import mlx.core as mx
import mlx.nn as nn

from ..cache import KVCache, LayerCache
from ..errors import MlxeffError
from ..ops import Rope

KvPairs = list[tuple[mx.array, mx.array]]  # keys and values (B, G, S, E) of each layer
ROPE_KEYS = frozenset(
    "rope_type type factor rope_theta original_max_position_embeddings low_freq_factor high_freq_factor "
    "beta_fast beta_slow attention_factor".split()
)
RULES = {  # rope_type: the keys it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}

# Keys that Hugging Face and mlx-lm write into config.json and that change nothing in a forward pass.
IGNORED_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id length_penalty
    max_length min_length mlxeff model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    quantization quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    seedlm sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class
    top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
)


def read_config(cls: type, config: dict, ignored: frozenset[str] = frozenset()):
    """The dataclass `cls` filled from a config.json dict; refuses unknown and missing keys and types not annotated."""
    known = {field.name: field for field in fields(cls)}
    kind = config.get("model_type", cls.__name__)
    if unknown := sorted(set(config) - set(known) - IGNORED_KEYS - ignored):
        raise MlxeffError(
            f"{kind} config: unknown keys {unknown}; if they change nothing in the model, delete them from config.json"
        )
    missing = sorted(n for n, f in known.items() if n not in config and f.default is MISSING)
    if missing:
        raise MlxeffError(f"{kind} config: missing keys {missing}")
    for name in sorted(set(known) & set(config)):
        wanted, value = known[name].type, config[name]
        require(fits(value, wanted), kind, name, str(wanted) if get_args(wanted) else wanted.__name__, value)
    return cls(**{name: config[name] for name in known if name in config})


def require(condition: bool, kind: str, key: str, wanted: str, got: object) -> None:
    """Refuse a config value with one line."""
    if not condition:
        raise MlxeffError(f"{kind} config: {key}: wanted {wanted}, got {got!r}")


def fits(value: object, wanted: type) -> bool:
    """Whether a JSON value is of an annotated type; a whole number is a float too, true and false are no numbers."""
    if isinstance(wanted, UnionType):
        return any(fits(value, each) for each in get_args(wanted))
    if get_origin(wanted) is list:
        return isinstance(value, list) and all(fits(each, get_args(wanted)[0]) for each in value)
    return type(value) is wanted or (wanted is float and type(value) is int)


class RotaryAttention(nn.Module):
    """What the families' attention shares: optional norms of query and key heads, rotation, the call of the cache.

    A subclass gives `q_norm` and `k_norm` (or None), `_rope`, `scale`, `project(x)` → raw heads and `output(attended)`.
    """

    @property
    def head_size(self) -> int:
        return self._rope.size

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, cache: LayerCache) -> mx.array:
        """Raw queries (B, H, S, E), keys and values (B, G, S, E) of the tokens that follow `cache` → (B, S, D)."""
        batch, _, new, _ = queries.shape
        queries = queries if self.q_norm is None else self.q_norm(queries)
        queries, keys = self._rope(queries, cache.length), self.place(keys, cache.length)
        attended = cache.attend(queries, keys, values, self.scale)  # (B, H, S, E)
        return self.output(attended.transpose(0, 2, 1, 3).reshape(batch, new, -1))

    def normed(self, keys: mx.array) -> mx.array:
        """Raw keys (…, E) → normed, where the model norms them."""
        return keys if self.k_norm is None else self.k_norm(keys)

    def place(self, keys: mx.array, position: int) -> mx.array:
        """Raw keys (B, G, S, E) → as the cache holds them, normed and rotated to `position`, `position` + 1, …"""
        return self._rope(self.normed(keys), position)


class DecoderModel(nn.Module):
    """The call protocol: a subclass gives `config`, `layers`, `embed(tokens)`, `hidden(tokens, cache)`, `head(hidden)`,
    `new_cache()`, `context_length`, `pruned(layers)`, `layer_parts()` and `end_parts()`.
    """

    seams = frozenset({"cache", "linear", "feed-forward", "kv"})
    gated = True  # whether the feed-forward is silu(gate) · up
    _fused = None  # the whole forward pass as one native call (models/fused.py), where that applies

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.config.vocab_size

    def __call__(self, tokens: mx.array, cache: KVCache) -> mx.array:
        """Token ids (B, S) that follow what `cache` holds → logits (B, S, V)."""
        if self._fused is not None and self._fused.applies(cache):
            return self._fused(tokens, cache, all_rows=True)
        return self.head(self.hidden(tokens, cache))

    def last_logits(self, tokens: mx.array, cache: KVCache) -> mx.array:
        """The same for the last position only, (B, V): the head runs on one row."""
        if self._fused is not None and self._fused.applies(cache):
            return self._fused(tokens, cache, all_rows=False)[:, 0]
        return self.head(self.hidden(tokens, cache)[:, -1])

    @property
    def kv_shapes(self) -> list[tuple[int, int]]:
        """(KV heads G, head size E) of each layer."""
        return [(layer.attention.groups, layer.attention.head_size) for layer in self.layers]

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return self.end_parts().norm.weight.shape[0]

    def layer_states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int] = (), pairs: Sequence[int] = ()
    ) -> tuple[list[mx.array], KvPairs]:
        """For token ids (B, S): the normed hidden states (B, S, D) that each of the layers `inputs` projects, and keys
        and values (B, G, S, E) of each of the layers `pairs`, keys before norm and rotation. Both rise, one may be
        empty.

        Appends to `cache`, but of the last layer only the keys and values are computed and nothing is appended: with
        the head, that work has no consumer here.
        """
        if self._fused is not None and self._fused.applies(cache):
            return self._fused.layer_states(tokens, cache, inputs, pairs)
        return self._chosen(self._read(tokens, cache)[0], inputs, pairs)

    def raw_kv(self, tokens: mx.array, cache: KVCache) -> KvPairs:
        """Keys and values of all layers, see `layer_states`."""
        return self.layer_states(tokens, cache, pairs=range(len(self.layers)))[1]

    def layer_inputs(self, tokens: mx.array, cache: KVCache) -> list[mx.array]:
        """The normed hidden states that each layer projects, see `layer_states`."""
        return self.layer_states(tokens, cache, inputs=range(len(self.layers)))[0]

    def states_and_logits(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int] = (), pairs: Sequence[int] = ()
    ) -> tuple[tuple[list[mx.array], KvPairs], mx.array]:
        """(`layer_states`, logits (B, S, V)) of one pass, operator by operator: with gradients; what is not used is not
        computed."""
        states, x = self._read(tokens, cache, whole=True)
        return self._chosen(states, inputs, pairs), self.head(self.end_parts().norm(x))

    def _read(self, tokens: mx.array, cache: KVCache, whole: bool = False) -> tuple[list, mx.array]:
        """(each layer's hidden states and what it projects of them; those after the layers, the last one only if
        `whole`)."""
        x, states, last = self.embed(tokens), [], len(self.layers) - 1
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            states.append((x, layer.project(x)))
            if whole or index < last:
                x = layer.finish(*states[-1], layer_cache)
        return states, x

    def _chosen(self, states: list, inputs: Sequence[int], pairs: Sequence[int]) -> tuple[list[mx.array], KvPairs]:
        """What `layer_states` gives of the states of all layers."""
        norms = [parts.attention_norm for parts in self.layer_parts()]
        return [norms[i](states[i][0]) for i in inputs], [states[i][1][1:] for i in pairs]

    def normed_kv(self, pairs: KvPairs) -> KvPairs:
        """Raw keys and values of each layer → the same with the keys normed, where the model norms them."""
        return [(layer.attention.normed(k), v) for layer, (k, v) in zip(self.layers, pairs, strict=True)]

    def placed_kv(self, pairs: KvPairs, position: int) -> KvPairs:
        """Raw keys and values of each layer → as a cache holds them from `position` on: keys normed and rotated."""
        return [(layer.attention.place(k, position), v) for layer, (k, v) in zip(self.layers, pairs, strict=True)]

    def append_kv(self, pairs: KvPairs, cache: KVCache) -> None:
        """Append raw keys and values (B, G, S, E) of each layer to `cache`: the keys are normed and rotated here."""
        if self._fused is not None and self._fused.applies(cache):
            self._fused.append_kv(pairs, cache)
        else:
            dtype = self.embed(mx.zeros((1, 1), mx.int32)).dtype  # that of the model's own keys and values
            pairs = [(keys.astype(dtype), values.astype(dtype)) for keys, values in pairs]
            for layer, pair in zip(cache.layers, self.placed_kv(pairs, cache.length), strict=True):
                layer.append(*pair)


def make_rope(size: int, base: float, scaling: dict | None, kind: str) -> Rope:
    """The rotary embedding of Hugging Face's `rope_scaling` dict."""
    scaling = scaling or {}
    rule = scaling.get("rope_type") or scaling.get("type") or "default"
    if unknown := sorted(set(scaling) - ROPE_KEYS):
        raise MlxeffError(f"{kind} config: rope_scaling: unknown keys {unknown}")
    require(isinstance(rule, str) and rule in RULES, kind, "rope_scaling", "default, linear, llama3 or yarn", rule)
    for key in sorted(set(scaling) - {"rope_type", "type"}):
        value = scaling[key]
        require(value is None or (fits(value, float) and value > 0), kind, f"rope_scaling {key}", "above 0", value)
    if rule == "default":
        return Rope(size, base)
    if missing := sorted(key for key in RULES[rule] if scaling.get(key) is None):
        raise MlxeffError(f"{kind} config: rope_scaling of type {rule}: missing keys {missing}")
    if rule == "linear":
        return Rope(size, base, scale=1 / scaling["factor"])
    wavelengths, magnitude = (_llama3 if rule == "llama3" else _yarn)(size, base, scaling)
    return Rope(size, None, wavelengths=wavelengths, magnitude=magnitude)


def _llama3(size: int, base: float, scaling: dict) -> tuple[mx.array, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    periods = base ** (mx.arange(0, size, 2) / size)
    turns = context / (2 * mx.pi * periods)  # full turns over the original context
    smooth = (turns - low) / (high - low)
    blended = periods / ((1 - smooth) / factor + smooth)
    return mx.where(turns < low, periods * factor, mx.where(turns < high, blended, periods)), 1.0


def _yarn(size: int, base: float, scaling: dict) -> tuple[mx.array, float]:
    """Interpolate dimensions that turn seldom, keep those that turn often, ramp between; scale x by ~ln(factor)."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow", 1))), size - 1)
    ramp = mx.clip((mx.arange(size // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    kept = base ** (mx.arange(0, size, 2, dtype=mx.float32) / size)
    stretched = factor * kept
    magnitude = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return stretched * kept / (stretched * (1 - ramp) + kept * ramp), magnitude
