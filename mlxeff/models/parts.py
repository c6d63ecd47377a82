"""What a family says of itself: the modules of each layer and of both ends by their role. They are references: there is
no second copy of a model's code or weights. Executors (`plain`, `native`) and techniques read them.

Shapes: B batch, S tokens, D hidden, H query heads, G KV heads, E head size, F feed-forward.
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

Heads = tuple[mx.array, mx.array, mx.array]  # raw queries (B, H, S, E), keys and values (B, G, S, E)


@dataclass(frozen=True)
class Rows:
    """A matrix: the rows [start, stop) of a linear layer or an embedding, all of them by default."""

    module: nn.Module
    start: int = 0
    stop: int | None = None

    @property
    def native(self) -> bool:
        """Whether the native kernels can multiply by it."""
        module = self.module
        if hasattr(module, "native_arrays"):
            return True
        if type(module) in (QuantizedLinear, QuantizedEmbedding):
            return quantized_matrix(module).native
        return type(module) in (Linear, Embedding)

    def arrays(self) -> tuple:
        """Three arrays or None, the numbers that tell how to read them, bias or None, as the native decoder takes them:
        (weight, None, None, (), …), (packed, scales, biases, (group size, bits), …), or what the module says itself."""
        module, part = self.module, slice(self.start, self.stop)
        bias = module.bias[part] if "bias" in module else None
        if hasattr(module, "native_arrays"):
            return (*module.native_arrays(part), bias)
        if type(module) in (Linear, Embedding):
            return (module.weight[part], None, None, (), bias)
        return (module.weight[part], module.scales[part], module.biases[part], (module.group_size, module.bits), bias)


class FeedForwardParts(Protocol):
    """A feed-forward by its matrices. `kind` names the form in which they are put together: the native decoder has one
    member for each kind that it knows."""

    kind: str
    matrices: Mapping[str, Rows]


@dataclass(frozen=True)
class GatedParts:
    """down(silu(gate) · up); gate and up have F rows, down F columns."""

    gate: Rows
    up: Rows
    down: Rows
    kind: str = field(default="gated", init=False)

    @property
    def matrices(self) -> dict[str, Rows]:
        return {"gate": self.gate, "up": self.up, "down": self.down}


@dataclass(frozen=True)
class AttentionParts:
    """Attention by its matrices; the norms of query and key heads are None where the model has none."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    rope: Rope
    heads: int
    groups: int
    window: int | None = None  # tokens, None for full attention

    @property
    def matrices(self) -> dict[str, Rows]:
        return {"query": self.query, "key": self.key, "value": self.value, "output": self.output}


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: x += attention(attention_norm(x)), x += feed_forward(feed_forward_norm(x)).

    `feed_forward` is None where the module has a form that only it can compute.
    """

    attention_norm: RMSNorm
    attention: AttentionParts
    feed_forward_norm: RMSNorm
    feed_forward: FeedForwardParts | None

    @property
    def matrices(self) -> list[Rows]:
        of_feed_forward = self.feed_forward.matrices if self.feed_forward else {}
        return [*self.attention.matrices.values(), *of_feed_forward.values()]

    @property
    def norms(self) -> dict[str, RMSNorm | None]:
        return {
            "attention": self.attention_norm,
            "feed_forward": self.feed_forward_norm,
            "query": self.attention.query_norm,
            "key": self.attention.key_norm,
        }


@dataclass(frozen=True)
class EndParts:
    """What stands before and after the layers."""

    embedding: Rows
    norm: RMSNorm
    head: Rows


def matrices(model: "Described") -> Iterator[Rows]:
    """All matrices of a model."""
    ends = model.end_parts()
    yield from (ends.embedding, ends.head)
    for layer in model.layer_parts():
        yield from layer.matrices


class Described(Protocol):
    """A model that describes itself."""

    def layer_parts(self) -> Iterator[LayerParts]: ...

    def end_parts(self) -> EndParts: ...


class RotaryAttention(nn.Module):
    """What the families' attention shares: optional norms of query and key heads, rotation, the call of the cache.

    A subclass gives `heads`, `groups`, `q_norm` and `k_norm` (or None), `rope`, `scale`, `project(x)` → raw heads,
    `output(attended)` and `parts(window)`.
    """

    @property
    def head_size(self) -> int:
        return self.rope.size

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: CacheLayer,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """Raw queries (B, H, S, E), keys and values (B, G, S, E) of the tokens that follow `cache` → (B, S, D)."""
        batch, _, new, _ = queries.shape
        queries = queries if self.q_norm is None else self.q_norm(queries)
        queries, keys = self.rope(queries, cache.length), self.place(keys, cache.length)
        attended = cache.attend(queries, keys, values, self.scale, options)  # (B, H, S, E)
        return self.output(attended.transpose(0, 2, 1, 3).reshape(batch, new, -1))

    def normed(self, keys: mx.array) -> mx.array:
        """Raw keys (…, E) → normed, where the model norms them."""
        return keys if self.k_norm is None else self.k_norm(keys)

    def place(self, keys: mx.array, position: int) -> mx.array:
        """Raw keys (B, G, S, E) → as the cache holds them, normed and rotated to `position`, `position` + 1, …"""
        return self.rope(self.normed(keys), position)


class DecoderLayer(nn.Module):
    """One decoder layer. A subclass names the parameters that stand for its four parts."""

    ATTENTION: str
    FEED_FORWARD: str
    ATTENTION_NORM: str
    FEED_FORWARD_NORM: str

    @property
    def attention(self) -> RotaryAttention:
        return self[self.ATTENTION]

    @property
    def feed_forward(self) -> nn.Module:
        """`feed_forward(x)` → what is added to x, (B, S, D); it stands at `self[FEED_FORWARD]`.

        One that can compute a part of itself says so by an attribute `fractions`, and is called with the options too.
        """
        return self[self.FEED_FORWARD]

    def project(self, x: mx.array) -> Heads:
        """Hidden states (B, S, D) → raw queries, keys and values."""
        return self.attention.project(self[self.ATTENTION_NORM](x))

    def finish(self, x: mx.array, projected: Heads, cache: CacheLayer, options: RunOptions) -> mx.array:
        """The rest of the layer for hidden states `x` and what `project` made of them."""
        x = x + self.attention.attend(*projected, cache, options)
        normed, feed_forward = self[self.FEED_FORWARD_NORM](x), self.feed_forward
        return x + (feed_forward(normed, options) if hasattr(feed_forward, "fractions") else feed_forward(normed))

    def __call__(self, x: mx.array, cache: CacheLayer, options: RunOptions = EXACT) -> mx.array:
        """Hidden states (B, S, D) of the tokens that follow `cache` → those after the layer."""
        return self.finish(x, self.project(x), cache, options)

    def parts(self, window: int | None = None) -> LayerParts:
        """The layer by its modules; `window`: of its attention, in tokens."""
        describe = getattr(self.feed_forward, "parts", None)
        return LayerParts(
            self[self.ATTENTION_NORM],
            self.attention.parts(window),
            self[self.FEED_FORWARD_NORM],
            describe() if describe else None,
        )

    def cache_shape(self, window: int | None = None) -> LayerShape:
        return LayerShape(self.attention.groups, self.attention.head_size, window)
