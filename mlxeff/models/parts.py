"""How a decoder model describes itself: its modules by their role, and the base classes of layers and attention.

Executors (`plain`, `native`) and techniques work on these descriptions and need no knowledge of the model's family.
A description refers to the model's own modules, so weights exist once.

Shapes: B batch, S tokens, D hidden size, H query heads, G KV heads, E head size, F width of the feed-forward network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..cache import Layer as CacheLayer
from ..cache import LayerShape
from ..modules import Embedding, Linear, QuantizedEmbedding, QuantizedLinear, RMSNorm, quantized_matrix
from ..ops import Rope
from ..running import EXACT, RunOptions

# Queries (B, H, S, E), keys and values (B, G, S, E). Queries and keys are raw: not yet normalised and rotated.
Heads = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class Rows:
    """A matrix that is some rows of a linear layer's weight or of an embedding table: rows `start` up to, but without,
    `stop`. By default it is the whole weight."""

    module: nn.Module
    start: int = 0
    stop: int | None = None

    @property
    def native(self) -> bool:
        """Whether the native kernels can multiply by this matrix."""
        module = self.module
        if hasattr(module, "native_arrays"):
            return True
        if type(module) in (QuantizedLinear, QuantizedEmbedding):
            return quantized_matrix(module).native
        return type(module) in (Linear, Embedding)

    def matrix(self) -> dict:
        """The matrix by name, as the native decoder takes it (`cpu/python/weights.h`): its "kind", the arrays and
        numbers of that kind, and "bias" (None without one).

        dense     weight
        affine    weight (packed), scales, biases, group_size, bits
        others    what their method `native_arrays(rows)` returns
        """
        module, part = self.module, slice(self.start, self.stop)
        bias = module.bias[part] if "bias" in module else None
        if hasattr(module, "native_arrays"):
            return {**module.native_arrays(part), "bias": bias}
        if type(module) in (Linear, Embedding):
            return {"kind": "dense", "weight": module.weight[part], "bias": bias}
        arrays = {name: module[name][part] for name in ("weight", "scales", "biases")}
        return {"kind": "affine", **arrays, "group_size": module.group_size, "bits": module.bits, "bias": bias}


class FeedForwardParts(Protocol):
    """A feed-forward network by its matrices. `kind` names the formula that combines them, as the native decoder knows
    it."""

    kind: str
    matrices: Mapping[str, Rows]  # by their role in the formula

    def native(self) -> dict:
        """The network by name, as the native decoder takes it: "kind" and what that kind needs."""


@dataclass(frozen=True)
class GatedParts:
    """A gated feed-forward network: down(silu(gate(x)) · up(x)). Gate and up have F rows, down has F columns."""

    gate: Rows
    up: Rows
    down: Rows
    kind: str = field(default="gated", init=False)

    @property
    def matrices(self) -> dict[str, Rows]:
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def native(self) -> dict:
        """See `FeedForwardParts.native`."""
        return {"kind": self.kind, **{name: rows.matrix() for name, rows in self.matrices.items()}}


@dataclass(frozen=True)
class AttentionParts:
    """Attention by its matrices, the norms of query and key heads (None where the model has none) and its sizes."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    rope: Rope
    heads: int  # H
    groups: int  # G
    window: int | None = None  # sliding window in tokens, None for full attention

    @property
    def matrices(self) -> dict[str, Rows]:
        return {"query": self.query, "key": self.key, "value": self.value, "output": self.output}


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: x += attention(attention_norm(x)), x += feed_forward(feed_forward_norm(x)).

    `feed_forward` is None where the module cannot be described by matrices, so that only the module itself can
    compute it.
    """

    attention_norm: RMSNorm
    attention: AttentionParts
    feed_forward_norm: RMSNorm
    feed_forward: FeedForwardParts | None

    @property
    def matrices(self) -> list[Rows]:
        """All described matrices of the layer."""
        feed_forward = self.feed_forward.matrices if self.feed_forward else {}
        return [*self.attention.matrices.values(), *feed_forward.values()]

    @property
    def norms(self) -> dict[str, RMSNorm | None]:
        """The norms by what they normalise; None for one that the model does not have."""
        return {
            "attention": self.attention_norm,
            "feed_forward": self.feed_forward_norm,
            "query": self.attention.query_norm,
            "key": self.attention.key_norm,
        }

    def native(self) -> dict:
        """The layer by name, as `add_layer` of the native decoder takes it."""
        return {
            "norms": {name: None if norm is None else norm.weight for name, norm in self.norms.items()},
            "attention": {name: rows.matrix() for name, rows in self.attention.matrices.items()},
            "heads": self.attention.heads,
            "groups": self.attention.groups,
            "window": self.attention.window or 0,
            "feed_forward": self.feed_forward.native(),
        }


@dataclass(frozen=True)
class EndParts:
    """The parts of a model before and after its layers: embedding table, last norm, output head (logits)."""

    embedding: Rows
    norm: RMSNorm
    head: Rows


def matrices(model: "Described") -> Iterator[Rows]:
    """All described matrices of a model."""
    ends = model.end_parts()
    yield from (ends.embedding, ends.head)
    for layer in model.layer_parts():
        yield from layer.matrices


class Described(Protocol):
    """A model that describes itself."""

    def layer_parts(self) -> Iterator[LayerParts]:
        """Each layer by its parts."""

    def end_parts(self) -> EndParts:
        """The parts before and after the layers."""


class RotaryAttention(nn.Module):
    """The attention that all families share: optional norms of query and key heads, rotary embedding, the KV cache.

    A subclass defines the attributes `heads`, `groups`, `q_norm` and `k_norm` (None where the model has no such norm),
    `rope` and `scale` (of the scores), and the methods `project(x)` → raw heads, `output(attended)` → (B, S, D) and
    `parts(window)` → `AttentionParts`.
    """

    @property
    def head_size(self) -> int:
        return self.rope.size

    @property
    def biased(self) -> bool:
        """Whether the projection of the keys has a bias."""
        return "bias" in self.parts(None).key.module

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: CacheLayer,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """Raw queries (B, H, S, E), keys and values (B, G, S, E) of the tokens that follow the cached ones → the output
        of attention, (B, S, D). Appends the keys and values to `cache`."""
        batch, _, new, _ = queries.shape
        queries = queries if self.q_norm is None else self.q_norm(queries)
        queries, keys = self.rope(queries, cache.length), self.place(keys, cache.length)
        attended = cache.attend(queries, keys, values, self.scale, options)  # (B, H, S, E)
        return self.output(attended.transpose(0, 2, 1, 3).reshape(batch, new, -1))

    def normed(self, keys: mx.array) -> mx.array:
        """Raw keys (…, E) → the same, normalised where the model normalises keys."""
        return keys if self.k_norm is None else self.k_norm(keys)

    def place(self, keys: mx.array, position: int) -> mx.array:
        """Raw keys (B, G, S, E) → keys as a cache stores them: normalised, and rotated for the positions `position`,
        `position` + 1, …"""
        return self.rope(self.normed(keys), position)


class DecoderLayer(nn.Module):
    """One decoder layer. A subclass sets the names of the attributes that hold its four modules."""

    ATTENTION: str
    FEED_FORWARD: str
    ATTENTION_NORM: str
    FEED_FORWARD_NORM: str

    @property
    def attention(self) -> RotaryAttention:
        return self[self.ATTENTION]

    @property
    def feed_forward(self) -> nn.Module:
        """The feed-forward network: a module from normalised hidden states (B, S, D) to the (B, S, D) that is added to
        the hidden states.

        A module that can compute with a part of its neurons has an attribute `fractions`. It is called with
        (x, options), all others with (x).
        """
        return self[self.FEED_FORWARD]

    def project(self, x: mx.array) -> Heads:
        """Hidden states (B, S, D) → raw queries, keys and values, see `Heads`."""
        return self.attention.project(self[self.ATTENTION_NORM](x))

    def finish(self, x: mx.array, projected: Heads, cache: CacheLayer, options: RunOptions) -> mx.array:
        """The rest of the layer after `project`: hidden states `x` (B, S, D) and `projected`, which `project` made of
        them → the hidden states after the layer. Appends to `cache`."""
        x = x + self.attention.attend(*projected, cache, options)
        normed, feed_forward = self[self.FEED_FORWARD_NORM](x), self.feed_forward
        if hasattr(feed_forward, "fractions"):
            return x + feed_forward(normed, options)
        return x + feed_forward(normed)

    def __call__(self, x: mx.array, cache: CacheLayer, options: RunOptions = EXACT) -> mx.array:
        """Hidden states (B, S, D) of the tokens that follow the cached ones → the hidden states after the layer.
        Appends to `cache`."""
        return self.finish(x, self.project(x), cache, options)

    def parts(self, window: int | None = None) -> LayerParts:
        """The layer by its parts. `window`: sliding window of its attention in tokens, None for full attention."""
        describe = getattr(self.feed_forward, "parts", None)
        return LayerParts(
            self[self.ATTENTION_NORM],
            self.attention.parts(window),
            self[self.FEED_FORWARD_NORM],
            describe() if describe else None,
        )

    def cache_shape(self, window: int | None = None) -> LayerShape:
        """The sizes that the layer's KV cache depends on; `window` as in `parts`."""
        attention = self.attention
        return LayerShape(attention.groups, attention.head_size, window, attention.biased)
