"""The executor that computes a model operator by operator, by its own modules: on any device, with gradients.

The operations are those of `ops.py`: MLX's, or on a CPU the native kernels one by one. Shapes: B batch, S tokens,
D hidden, G KV heads, E head size, V vocabulary.
"""

from collections.abc import Sequence

import mlx.core as mx

from .. import kernels
from ..cache import KVCache
from ..ops import native_for
from ..running import EXACT, Ran, RunOptions

KvPairs = list[tuple[mx.array, mx.array]]  # keys and values (B, G, S, E) of each layer


class Plain:
    """Runs `model`, a `DecoderModel`."""

    def __init__(self, model):
        self.model = model

    @property
    def backend(self) -> str:
        return f"native {kernels.native()[0].isa()}, unfused" if native_for() else "mlx"

    def forward(self, tokens: mx.array, cache: KVCache, options: RunOptions, last: bool) -> mx.array:
        """Token ids (B, S) that follow what `cache` holds → logits (B, S, V), or (B, V) of the last position."""
        hidden = self.hidden(tokens, cache, options)
        return self.model.head(hidden[:, -1] if last else hidden)

    def hidden(self, tokens: mx.array, cache: KVCache, options: RunOptions = EXACT) -> mx.array:
        """Token ids (B, S) → what the head reads, (B, S, D)."""
        x = self.model.embed(tokens)
        for layer, layer_cache in zip(self.model.layers, cache.layers, strict=True):
            x = layer(x, layer_cache, options)
        self._note(tokens, cache)
        return self.model.end_parts().norm(x)

    def states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions
    ) -> tuple[list[mx.array], KvPairs]:
        """As `DecoderModel.layer_states`."""
        return self._chosen(self._read(tokens, cache, options)[0], inputs, pairs)

    def states_and_logits(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int]
    ) -> tuple[tuple[list[mx.array], KvPairs], mx.array]:
        """As `DecoderModel.states_and_logits`."""
        states, x = self._read(tokens, cache, EXACT, whole=True)
        return self._chosen(states, inputs, pairs), self.model.head(self.model.end_parts().norm(x))

    def append(self, pairs: KvPairs, cache: KVCache, _options: RunOptions) -> None:
        """As `DecoderModel.append_kv`."""
        model = self.model
        dtype = model.embed(mx.zeros((1, 1), mx.int32)).dtype  # that of the model's own keys and values
        pairs = [(keys.astype(dtype), values.astype(dtype)) for keys, values in pairs]
        for layer, pair in zip(cache.layers, model.placed_kv(pairs, cache.length), strict=True):
            layer.append(*pair)

    def _read(
        self, tokens: mx.array, cache: KVCache, options: RunOptions, whole: bool = False
    ) -> tuple[list, mx.array]:
        """(each layer's hidden states and what it projects of them; the hidden states after the layers, of which the
        last layer is computed only if `whole`)."""
        layers = self.model.layers
        x, states, last = self.model.embed(tokens), [], len(layers) - 1
        for index, (layer, layer_cache) in enumerate(zip(layers, cache.layers, strict=True)):
            states.append((x, layer.project(x)))
            if whole or index < last:
                x = layer.finish(*states[-1], layer_cache, options)
        self._note(tokens, cache)
        return states, x

    def _chosen(self, states: list, inputs: Sequence[int], pairs: Sequence[int]) -> tuple[list[mx.array], KvPairs]:
        """What `layer_states` gives of the states of all layers."""
        norms = [parts.attention_norm for parts in self.model.layer_parts()]
        return [norms[i](states[i][0]) for i in inputs], [states[i][1][1:] for i in pairs]

    def _note(self, tokens: mx.array, cache: KVCache) -> None:
        cache.tally[Ran(self.backend, EXACT.compute)] += tokens.shape[1]
