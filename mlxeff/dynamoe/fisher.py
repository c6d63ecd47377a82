"""How much an error of a layer's feed-forward output matters to the model's predictions.

For a small error e of the output (D) of one layer at one token, the KL divergence of the model's predictions from those
without the error is ½ eᵀ F e, where F is the Fisher information of the output. Its diagonal is the mean square of the
gradient of the log-probability of tokens that are drawn from the predictions themselves.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..ops import cross_entropy

WINDOWS = 8  # of the text, one after the other; the estimate is a mean over their tokens


class _Probe(nn.Module):
    """A feed-forward network to whose output an array is added, for the gradient with regard to it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self._added = inner, None

    def __call__(self, x: mx.array) -> mx.array:
        y = self.inner(x)
        return y if self._added is None else y + self._added


def output_weights(
    model: nn.Module, windows: np.ndarray, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """The diagonals of the Fisher information of the feed-forward outputs of all layers, float64 (layers, D), from the
    first windows of `windows`, ids (W, T). `model` is a decoder of `mlxeff.models`, which is left as it was."""
    layers = list(model.layers)
    inner = [layer.feed_forward for layer in layers]
    probes = [_Probe(each) for each in inner]
    chosen, total = windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS], np.zeros((len(layers), model.hidden_size))
    key = mx.random.key(seed)

    def loss(added: list[mx.array], tokens: mx.array, key: mx.array) -> mx.array:
        """The negative log-probability of tokens drawn from the predictions, summed over the positions."""
        for probe, each in zip(probes, added, strict=True):
            probe._added = each
        logits = model.head(model.hidden(tokens, model.new_cache())).astype(mx.float32)
        drawn = mx.stop_gradient(mx.random.categorical(logits, key=key))
        return mx.sum(cross_entropy(logits, drawn))

    gradient = mx.grad(loss)
    try:
        for layer, probe in zip(layers, probes, strict=True):
            layer[layer.FEED_FORWARD] = probe
        for number, window in enumerate(chosen):
            key, own = mx.random.split(key)
            added = [mx.zeros((1, len(window), model.hidden_size))] * len(layers)
            found = gradient(added, mx.array(window[None]), own)
            squares = [mx.mean(mx.square(each[0].astype(mx.float32)), axis=0) for each in found]
            mx.eval(squares)
            total += np.stack([np.array(each, np.float64) for each in squares])
            if progress:
                progress(number + 1, len(chosen))
    finally:
        for layer, each in zip(layers, inner, strict=True):
            layer[layer.FEED_FORWARD] = each
    return total / len(chosen)
