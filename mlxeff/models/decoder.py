"""`DecoderModel`, the base class of the models of all families: how a model is called.

It gives logits, the hidden states, keys and values of chosen layers, and new caches, and appends keys and values from
elsewhere to a cache. The computation is the work of an executor (`plain`, `native`), which is chosen for each call.

Shapes: B batch, S tokens, D hidden size, G KV heads, E head size, V vocabulary. Keys are raw until they are normalised
(where the model normalises keys) and rotated; a cache stores them normalised and rotated.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..cache import FLOAT_KINDS, KVCache, LayerCache
from ..errors import MlxeffError
from ..kernels import device
from ..memory import require
from ..modules import chunk_bytes, layer_rows
from ..running import EXACT, RunOptions
from .native import Native, native_executor
from .parts import DecoderLayer, EndParts, LayerParts
from .plain import KvPairs, Plain


class Executor(Protocol):
    """Computes the calls of a model. Each call adds its tokens to the cache's tally."""

    backend: str  # its name, as in `running.Ran`

    def forward(self, tokens: mx.array, cache: KVCache, options: RunOptions, last: bool) -> mx.array:
        """Ids (B, S) of the tokens that follow the cached ones → logits (B, S, V), or with `last` those of the last
        position only, (B, V)."""

    def states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions
    ) -> tuple[list[mx.array], KvPairs]:
        """See `DecoderModel.layer_states`."""

    def append(self, pairs: KvPairs, cache: KVCache, options: RunOptions) -> None:
        """See `DecoderModel.append_kv`."""


class DecoderModel(nn.Module):
    """A decoder-only language model.

    A subclass defines `config`, `layers`, `window(layer)`, `context_length` (tokens), `end_parts()` and
    `pruned(layers)`, which is the model of some of the layers.
    """

    seams = frozenset({"cache", "linear", "feed-forward", "kv"})  # see models/__init__.py
    native: Native | None = None  # the native executor; None where `use_native` was not called or found it impossible
    layers: list[DecoderLayer]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.config.vocab_size

    def use_native(self) -> bool:
        """Run forward passes with the native executor from now on, if the native kernels are installed and support
        every module of this model; returns whether they do. Call it again after modules were replaced."""
        self.native = native_executor(self)
        return self.native is not None

    @property
    def plain(self) -> Plain:
        """The executor that computes operator by operator, and supports gradients."""
        return Plain(self)

    def executor(self, cache: KVCache, options: RunOptions = EXACT) -> Executor:
        """The executor for a call with this cache and these options. Raises MlxeffError for unsupported options."""
        if options is not EXACT:
            self.check(options, cache)
        return self.native if self.native is not None and self.native.applies(cache) else self.plain

    def check(self, options: RunOptions, cache: KVCache | None = None) -> None:
        """Raises MlxeffError for options that this model, this machine or `cache` does not support."""
        if options.compute != EXACT.compute and self.native is None:
            text = f"compute: wanted exact products, got {options.compute}"
            raise MlxeffError(f"{text}: rounded ones: only the native CPU kernels have them (see doctor)")
        if options.fraction != 1 and not all(hasattr(layer.feed_forward, "fractions") for layer in self.layers):
            wanted = "wanted a DynaMoE model (mlxeff fit dynamoe makes one), got one with dense feed-forward networks"
            raise MlxeffError(f"sensitivity {options.fraction:g}: {wanted}")
        if cache is not None and options.view not in getattr(cache, "views", (options.view,)):
            raise MlxeffError(f"KV cache: wanted a view of {', '.join(cache.views)}, got {options.view!r}")

    def new_cache(self, kind: str | None = None) -> KVCache:
        """An empty cache of `kind`, one of cache.KINDS; None: keys and values are stored in the type that the executor
        computes. Raises MlxeffError for an unknown kind."""
        shapes = [layer.cache_shape(self.window(i)) for i, layer in enumerate(self.layers)]
        return KVCache.of(shapes, kind, self._kv_type())

    def layer_cache(self, layer: int) -> LayerCache:
        """An empty cache of one layer, for a caller that runs the layers one by one."""
        return LayerCache(self.window(layer))

    def prefill_bytes(self, cache: KVCache, new: int, step_size: int, options: RunOptions = EXACT) -> int:
        """Bytes that reading `new` more tokens in chunks of `step_size` needs, counted low: the growth of the cache,
        and the largest arrays of a chunk."""
        length, capacity = cache.length + new + 1, LayerCache.step
        name = cache.kind or options.kv or cache.dtype
        width = FLOAT_KINDS[name].size if name in FLOAT_KINDS else 1
        rows = -(-length // capacity) * capacity
        grown = sum(2 * groups * size for groups, size in self.kv_shapes) * width * rows
        held = cache.nbytes
        chunk = min(step_size, new)
        hidden = 4 * chunk * 2 * self.hidden_size  # the input and the output of a layer
        more = 0
        if self.native is None and device() == "cpu":
            more = chunk_bytes(self.layers[0].attention.heads, layer_rows(self.parameters()), chunk, length)
        return (grown if grown > held else 0) + hidden + more

    def require_room(self, cache: KVCache, new: int, options: RunOptions = EXACT, batch: int = 1) -> None:
        """Raises MlxeffError where the memory that this process may use cannot hold the growth of `cache` that `new`
        more tokens of each of `batch` sequences need. What is free is asked only where buffers grow."""
        if cache.length + new <= cache.checked:
            return
        held, before, after = cache.nbytes, cache.capacity, cache.grown(new)
        if after > before:
            name, width = cache.kind or options.kv or cache.dtype, mx.float32.size
            stored = FLOAT_KINDS[name].size if name in FLOAT_KINDS else 1
            dense = batch * sum(2 * groups * size for groups, size in self.kv_shapes)  # numbers of a token
            token = held / before if held else dense * stored
            grown, layer = token * after, batch * max(2 * groups * size for groups, size in self.kv_shapes) * after
            need = grown - held
            if self.native is not None and self.native.applies(cache):
                need += grown if held else 0  # all new buffers are made before the first old one is dropped
            else:
                need += grown / len(self.layers) if held else 0  # the largest copy
                need += chunk_bytes(self.layers[0].attention.heads, layer_rows(self.parameters()), new * batch, after)
                if name not in FLOAT_KINDS and device() == "cpu":
                    need += 4 * width * layer  # planes are decoded
                elif name != cache.dtype:
                    need += width * layer  # they become the type of the queries
            what = f"KV cache: growth from {before} to {after} tokens"
            more = ", more with a smaller --kv-cache" if batch == 1 else f" of {batch} texts at once"
            require(need, what, lambda have: f"about {before or int(have / token)} would fit{more}", tell=False)
        cache.checked = after

    def make_cache(self) -> list[KVCache]:
        """[`new_cache()`]: what mlx-lm's `make_prompt_cache` gives for this model."""
        return [self.new_cache()]

    def _kv_type(self) -> str:
        """The name of the type in which the executor computes keys and values."""
        dtype = mx.float32 if self.native is not None else self.embed(mx.zeros((1, 1), mx.int32)).dtype
        return str(dtype).removeprefix("mlx.core.")

    def __call__(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """Ids (B, S) of the tokens that follow the cached ones → logits (B, S, V). Appends the tokens to `cache`."""
        self.require_room(cache, tokens.shape[1], options, tokens.shape[0])
        return self.executor(cache, options).forward(tokens, cache, options, last=False)

    def last_logits(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """As `__call__`, but the logits of the last position only, (B, V): the output head is computed for one row."""
        self.require_room(cache, tokens.shape[1], options, tokens.shape[0])
        return self.executor(cache, options).forward(tokens, cache, options, last=True)

    def layer_states(
        self,
        tokens: mx.array,
        cache: KVCache,
        inputs: Sequence[int] = (),
        pairs: Sequence[int] = (),
        options: RunOptions = EXACT,
    ) -> tuple[list[mx.array], KvPairs]:
        """Read states of chosen layers for token ids (B, S): (the input of the projections of each layer in `inputs`,
        (B, S, D), which is the normalised hidden state; the keys and values of each layer in `pairs`, (B, G, S, E),
        keys raw). `inputs` and `pairs` are layer numbers in rising order, and may be empty.

        Appends to the cache of all layers but the last. Of the last layer only the projections are computed: nothing
        here needs its attention or the output head.
        """
        self.require_room(cache, tokens.shape[1], options, tokens.shape[0])
        return self.executor(cache, options).states(tokens, cache, inputs, pairs, options)

    def raw_kv(self, tokens: mx.array, cache: KVCache) -> KvPairs:
        """Keys (raw) and values of all layers for token ids (B, S), see `layer_states`."""
        return self.layer_states(tokens, cache, pairs=range(len(self.layers)))[1]

    def states_and_logits(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int] = (), pairs: Sequence[int] = ()
    ) -> tuple[tuple[list[mx.array], KvPairs], mx.array]:
        """(The result of `layer_states`, logits (B, S, V)) of one forward pass, operator by operator and with
        gradients. Appends to the cache of all layers. The logits cost nothing unless they are evaluated."""
        return self.plain.states_and_logits(tokens, cache, inputs, pairs)

    def hidden(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """Token ids (B, S) → the input of the output head (B, S, D), computed operator by operator. Appends to
        `cache`."""
        return self.plain.hidden(tokens, cache, options)

    def append_kv(self, pairs: KvPairs, cache: KVCache, options: RunOptions = EXACT) -> None:
        """Append raw keys and values (B, G, S, E) of each layer to `cache`, which normalises and rotates the keys."""
        batch, _, new, _ = pairs[0][0].shape
        self.require_room(cache, new, options, batch)
        self.executor(cache, options).append(pairs, cache, options)

    def normed_kv(self, pairs: KvPairs) -> KvPairs:
        """Raw keys and values of each layer → the same with the keys normalised, where the model normalises keys."""
        return [(layer.attention.normed(k), v) for layer, (k, v) in zip(self.layers, pairs, strict=True)]

    def placed_kv(self, pairs: KvPairs, position: int) -> KvPairs:
        """Raw keys and values of each layer → the same with the keys normalised and rotated for the positions
        `position`, `position` + 1, …: as a cache stores them."""
        return [(layer.attention.place(k, position), v) for layer, (k, v) in zip(self.layers, pairs, strict=True)]

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids (B, S) → hidden states (B, S, D)."""
        return self.end_parts().embedding.module(tokens)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (…, D) → logits (…, V)."""
        module = self.end_parts().head.module
        return module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)

    def layer_parts(self) -> Iterator[LayerParts]:
        """Each layer by its parts."""
        return (layer.parts(self.window(i)) for i, layer in enumerate(self.layers))

    def end_parts(self) -> EndParts:
        """The parts before and after the layers."""
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
