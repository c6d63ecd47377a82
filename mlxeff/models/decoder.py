"""The call protocol of a decoder model, whatever its family: logits, states of its layers, keys and values that are
given, a new cache. What computes is an executor (`plain`, `native`), chosen anew for each call.

Shapes: B batch, S tokens, D hidden, G KV heads, E head size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..cache import KVCache, LayerCache
from ..errors import MlxeffError
from ..running import EXACT, RunOptions
from .native import Native, native_executor
from .parts import DecoderLayer, EndParts, LayerParts
from .plain import KvPairs, Plain


class Executor(Protocol):
    """What runs a model. Each call notes in the cache's tally what computed how many tokens."""

    backend: str  # as in `running.Ran`

    def forward(self, tokens: mx.array, cache: KVCache, options: RunOptions, last: bool) -> mx.array:
        """Token ids (B, S) that follow what `cache` holds → logits (B, S, V), or (B, V) of the last position."""

    def states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions
    ) -> tuple[list[mx.array], KvPairs]:
        """See `DecoderModel.layer_states`."""

    def append(self, pairs: KvPairs, cache: KVCache, options: RunOptions) -> None:
        """See `DecoderModel.append_kv`."""


class DecoderModel(nn.Module):
    """A subclass gives `config`, `layers`, `window(layer)`, `context_length`, `pruned(layers)` and `end_parts()`.

    `native` is the executor that runs whole passes natively; None where it does not apply or was not asked for.
    """

    seams = frozenset({"cache", "linear", "feed-forward", "kv"})
    native: Native | None = None
    layers: list[DecoderLayer]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.config.vocab_size

    def use_native(self) -> bool:
        """Run whole passes by the native CPU kernels if they are here and know all of this model, as it stands; returns
        whether they do. Call it again when modules were replaced."""
        self.native = native_executor(self)
        return self.native is not None

    @property
    def plain(self) -> Plain:
        """The executor that computes operator by operator, with gradients."""
        return Plain(self)

    def executor(self, cache: KVCache, options: RunOptions = EXACT) -> Executor:
        """What runs a call with this cache and these options. Raises MlxeffError for options that nothing here has."""
        if options is not EXACT:
            self.check(options, cache)
        return self.native if self.native is not None and self.native.applies(cache) else self.plain

    def check(self, options: RunOptions, cache: KVCache | None = None) -> None:
        """Refuse, in one line, options that this model does not have here, or that `cache` does not."""
        if options.compute != EXACT.compute and self.native is None:
            text = f"compute: wanted exact products, got {options.compute}"
            raise MlxeffError(f"{text}: rounded ones: only the native CPU kernels have them (see doctor)")
        if options.fraction != 1 and not all(hasattr(layer.feed_forward, "fractions") for layer in self.layers):
            raise MlxeffError(f"feed-forward fraction {options.fraction}: this model's feed-forwards are dense")
        if cache is not None and options.view not in getattr(cache, "views", (options.view,)):
            raise MlxeffError(f"KV cache: wanted a view of {', '.join(cache.views)}, got {options.view!r}")

    def new_cache(self, kind: str | None = None) -> KVCache:
        """An empty cache of `kind`, one of cache.KINDS; None: keys and values in the type that the executor gives."""
        if kind is None:
            return KVCache([LayerCache(self.window(i)) for i in range(len(self.layers))])
        return KVCache.of([layer.cache_shape(self.window(i)) for i, layer in enumerate(self.layers)], kind)

    def __call__(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """Token ids (B, S) that follow what `cache` holds → logits (B, S, V)."""
        return self.executor(cache, options).forward(tokens, cache, options, last=False)

    def last_logits(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """The same for the last position only, (B, V): the head runs on one row."""
        return self.executor(cache, options).forward(tokens, cache, options, last=True)

    def layer_states(
        self,
        tokens: mx.array,
        cache: KVCache,
        inputs: Sequence[int] = (),
        pairs: Sequence[int] = (),
        options: RunOptions = EXACT,
    ) -> tuple[list[mx.array], KvPairs]:
        """For token ids (B, S): the normed hidden states (B, S, D) that each of the layers `inputs` projects, and keys
        and values (B, G, S, E) of each of the layers `pairs`, keys before norm and rotation. Both rise, one may be
        empty.

        Appends to `cache`, but of the last layer only the keys and values are computed and nothing is appended: with
        the head, that work has no consumer here.
        """
        return self.executor(cache, options).states(tokens, cache, inputs, pairs, options)

    def raw_kv(self, tokens: mx.array, cache: KVCache) -> KvPairs:
        """Keys and values of all layers, see `layer_states`."""
        return self.layer_states(tokens, cache, pairs=range(len(self.layers)))[1]

    def states_and_logits(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int] = (), pairs: Sequence[int] = ()
    ) -> tuple[tuple[list[mx.array], KvPairs], mx.array]:
        """(`layer_states`, logits (B, S, V)) of one pass, operator by operator and with gradients. Arrays are lazy: the
        logits cost nothing where they are not evaluated."""
        return self.plain.states_and_logits(tokens, cache, inputs, pairs)

    def hidden(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """Token ids (B, S) → what the head reads, (B, S, D), operator by operator."""
        return self.plain.hidden(tokens, cache, options)

    def append_kv(self, pairs: KvPairs, cache: KVCache, options: RunOptions = EXACT) -> None:
        """Append raw keys and values (B, G, S, E) of each layer to `cache`: the keys are normed and rotated here."""
        self.executor(cache, options).append(pairs, cache, options)

    def normed_kv(self, pairs: KvPairs) -> KvPairs:
        """Raw keys and values of each layer → the same with the keys normed, where the model norms them."""
        return [(layer.attention.normed(k), v) for layer, (k, v) in zip(self.layers, pairs, strict=True)]

    def placed_kv(self, pairs: KvPairs, position: int) -> KvPairs:
        """Raw keys and values of each layer → as a cache holds them from `position` on: keys normed and rotated."""
        return [(layer.attention.place(k, position), v) for layer, (k, v) in zip(self.layers, pairs, strict=True)]

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids (B, S) → hidden states (B, S, D)."""
        return self.end_parts().embedding.module(tokens)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (…, D) → logits (…, V)."""
        module = self.end_parts().head.module
        return module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)

    def layer_parts(self) -> Iterator[LayerParts]:
        """The modules of each layer by their role."""
        return (layer.parts(self.window(i)) for i, layer in enumerate(self.layers))

    def end_parts(self) -> EndParts:
        """The modules before and after the layers."""
        raise NotImplementedError

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None for full attention."""
        raise NotImplementedError

    @property
    def kv_shapes(self) -> list[tuple[int, int]]:
        """(KV heads G, head size E) of each layer."""
        return [(layer.attention.groups, layer.attention.head_size) for layer in self.layers]

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return self.end_parts().norm.weight.shape[0]
