"""The plain executor: it calls a model's own modules one after the other, on any device and with gradients.

The modules compute with the operations of `ops.py`: MLX's own, or single native kernels on a CPU. Shapes: B batch,
S tokens, D hidden size, G KV heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from .. import kernels
from ..cache import KVCache
from ..ops import native_for
from ..running import EXACT, Ran, RunOptions
from .parts import Heads

if TYPE_CHECKING:
    from .decoder import DecoderModel

KvPairs = list[tuple[mx.array, mx.array]]  # keys and values (B, G, S, E) of each layer


class Plain:
    """Computes the calls of `model`, see `decoder.Executor`."""

    def __init__(self, model: DecoderModel):
        self.model = model

    @property
    def backend(self) -> str:
        """Its name, as in `running.Ran`."""
        return f"native {kernels.native()[0].isa()}, unfused" if native_for() else "mlx"

    def forward(self, tokens: mx.array, cache: KVCache, options: RunOptions, last: bool) -> mx.array:
        """See `decoder.Executor.forward`."""
        hidden = self.hidden(tokens, cache, options)
        return self.model.head(hidden[:, -1] if last else hidden)

    def hidden(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """See `DecoderModel.hidden`."""
        x = self.model.embed(tokens)
        for layer, layer_cache in zip(self.model.layers, cache.layers, strict=True):
            x = layer(x, layer_cache, options)
        self._note(tokens, cache, options)
        return self.model.end_parts().norm(x)

    def states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions
    ) -> tuple[list[mx.array], KvPairs]:
        """See `DecoderModel.layer_states`."""
        layers, _ = self._read(tokens, cache, options)
        return self._chosen(layers, inputs, pairs)

    def states_and_logits(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int]
    ) -> tuple[tuple[list[mx.array], KvPairs], mx.array]:
        """See `DecoderModel.states_and_logits`."""
        layers, x = self._read(tokens, cache, EXACT, whole=True)
        return self._chosen(layers, inputs, pairs), self.model.head(self.model.end_parts().norm(x))

    def append(self, pairs: KvPairs, cache: KVCache, _options: RunOptions) -> None:
        """See `DecoderModel.append_kv`."""
        model = self.model
        dtype = model.embed(mx.zeros((1, 1), mx.int32)).dtype  # the type of the keys and values that the model computes
        pairs = [(keys.astype(dtype), values.astype(dtype)) for keys, values in pairs]
        for layer, pair in zip(cache.layers, model.placed_kv(pairs, cache.length), strict=True):
            layer.append(*pair)

    def _read(
        self, tokens: mx.array, cache: KVCache, options: RunOptions, whole: bool = False
    ) -> tuple[list[tuple[mx.array, Heads]], mx.array]:
        """A forward pass up to the last norm: ((hidden states before the layer, its raw heads) for each layer; the
        hidden states after all layers). Unless `whole`, the last layer's attention and feed-forward network are left
        out, and the hidden states are those before it."""
        layers = self.model.layers
        x, read, last = self.model.embed(tokens), [], len(layers) - 1
        for index, (layer, layer_cache) in enumerate(zip(layers, cache.layers, strict=True)):
            heads = layer.project(x)
            read.append((x, heads))
            if whole or index < last:
                x = layer.finish(x, heads, layer_cache, options)
        self._note(tokens, cache, options)
        return read, x

    def _chosen(
        self, layers: list[tuple[mx.array, Heads]], inputs: Sequence[int], pairs: Sequence[int]
    ) -> tuple[list[mx.array], KvPairs]:
        """The result of `DecoderModel.layer_states` from what `_read` gave of all layers."""
        norms = [parts.attention_norm for parts in self.model.layer_parts()]
        hidden = [norms[i](layers[i][0]) for i in inputs]
        return hidden, [layers[i][1][1:] for i in pairs]

    def _note(self, tokens: mx.array, cache: KVCache, options: RunOptions) -> None:
        """Count the tokens in the cache's tally."""
        cache.tally[Ran(self.backend, EXACT.compute, options.fraction)] += tokens.shape[1]
