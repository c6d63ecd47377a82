"""Distillation of the smaller experts layer by layer, in closed form.

For the errors of one layer alone, own down-projections are the optimum of `fit` already, whatever diagonal weights the
errors have, since each row is fitted alone. What is left to gain is what that fit does not know: which tokens take an
expert, and what the layers before it lack. So each layer reads the text as the dynamic model does, at mixed
sensitivities, and an expert is fitted on the tokens that take it, so that the hidden states after the layer come near
to the dense model's.

Shapes: B windows of a batch, W windows, T tokens of a window or of all, D hidden size, k neurons of an expert, r rank.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import calibration
from ..modules import dense, plain_linear
from ..ops import swiglu
from ..running import RunOptions
from .feed_forward import DynamicFeedForward, LowRank
from .fit import low_rank
from .tune import SENSITIVITIES

PRIOR = 1.0  # tokens of all that draw an expert to what it was, for each token that takes it
RIDGE = 1e-2  # of the mean diagonal of the Gram matrix of these
LEAST = 1e-9  # of that diagonal


class _Silent(nn.Module):
    """Takes the place of a feed-forward network: keeps what it reads, and adds nothing to the hidden states."""

    def __call__(self, x: mx.array, _options: RunOptions | None = None) -> mx.array:
        self._read = x
        return mx.zeros_like(x)


class _Seen:
    """Sums over the tokens of one layer: `whole` is aᵀa of the neurons' values a of all tokens (k of the widest of the
    smaller experts, the same); for each smaller expert of `widths`, over the `counts` tokens that take it, `grams` are
    aᵀa (k, k) and `wanted` aᵀy (k, D) of the outputs y that they should have."""

    def __init__(self, widths: tuple[int, ...], size: int):
        self.widths, self.counts, self.tokens = widths, [0] * len(widths), 0
        self.grams = [np.zeros((k, k)) for k in widths]
        self.wanted = [np.zeros((k, size)) for k in widths]
        self.whole = np.zeros((widths[-1], widths[-1]))

    def add(self, values: np.ndarray, chosen: np.ndarray, outputs: np.ndarray) -> None:
        """Add tokens: their neurons' values (T, k), the numbers of their experts (T), the outputs wanted (T, D)."""
        self.whole += values.T @ values
        self.tokens += len(values)
        for place, width in enumerate(self.widths):
            own = values[chosen == place, :width]
            self.grams[place] += own.T @ own
            self.wanted[place] += own.T @ outputs[chosen == place]
            self.counts[place] += len(own)

    def fitted(self, place: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(The down-projection (D, k) of a smaller expert, which is drawn towards the one that it has `before`; the
        mean Gram matrix of a token by which it was fitted.)"""
        width = self.widths[place]
        prior = PRIOR * max(1, self.counts[place]) / self.tokens * self.whole[:width, :width]
        prior += max(RIDGE * float(np.mean(np.diag(prior))), LEAST) * np.eye(width)
        gram, weight = self.grams[place] + prior, (1 + PRIOR) * max(1, self.counts[place])
        return np.linalg.solve(gram, self.wanted[place] + prior @ before.T).T, gram / weight


class Distillation:
    """The text on its way through the dense model and the dynamic one, side by side. At each layer, first to last, the
    smaller experts are fitted, or taken as they are:

        text = Distillation(model, windows)
        for network in networks:
            text.fit(network)         # changes its smaller experts; own down-projections become dense, in float16
            text.next_layer(network)

    In memory are four arrays of the size of the hidden states of all windows.
    """

    def __init__(self, model: nn.Module, windows: np.ndarray):
        """`model`: a dense decoder of `mlxeff.models`, which is left as it was; `windows`: token ids (W, T)."""
        self.model = model
        self._dense = calibration.LayerStream(model, windows)
        self._hidden = list(self._dense.hidden)  # of the dynamic model, for each batch (B, T, D)
        self._batches: list[tuple[mx.array, mx.array]] | None = None

    def read(self) -> list[tuple[mx.array, mx.array]]:
        """For each batch (what the feed-forward network of this layer reads in the dynamic model; what its outputs
        should be), (B, T, D) each."""
        if self._batches is None:
            layer, number, silent, found = self._dense.layer, self._dense.index, _Silent(), []
            own = layer.feed_forward
            try:
                layer[layer.FEED_FORWARD] = silent
                for place, hidden in enumerate(self._hidden):
                    self._hidden[place] = layer(hidden, self.model.layer_cache(number))  # without the network
                    mx.eval(self._hidden[place], silent._read)
                    found.append(silent._read)
            finally:
                layer[layer.FEED_FORWARD] = own
            self._dense.next_layer()
            pairs = zip(found, self._dense.hidden, self._hidden, strict=True)
            self._batches = [(x, after - before) for x, after, before in pairs]
            mx.eval(self._batches)
        return self._batches

    def sensitivities(self, batch: int) -> list[float]:
        """At which the windows of the batch of this number are read."""
        first, count = batch * len(self._hidden[0]), len(self._hidden[batch])
        return [SENSITIVITIES[number % len(SENSITIVITIES)] for number in range(first, first + count)]

    def chosen(self, network: DynamicFeedForward, batch: int) -> np.ndarray:
        """The number of the expert of each token of a batch in this layer, (B · T)."""
        pairs = zip(self.read()[batch][0], self.sensitivities(batch), strict=True)
        return np.concatenate([np.array(network.choose(x, sensitivity)) for x, sensitivity in pairs])

    def fit(self, network: DynamicFeedForward) -> None:
        """Fit the smaller experts of this layer. Each has a module of its own."""
        size, bias = self._hidden[0].shape[-1], network.down_proj.get("bias")
        seen = _Seen(network.widths[:-1], size)
        for number, (read, wanted) in enumerate(self.read()):
            x, y = read.reshape(-1, size), (wanted if bias is None else wanted - bias).reshape(-1, size)
            values = swiglu(network.gate_proj(x), network.up_proj(x))[:, : network.widths[-2]]
            chosen = self.chosen(network, number)
            seen.add(np.array(values.astype(mx.float32)), chosen, np.array(y.astype(mx.float32)))
        for place, (expert, width) in enumerate(zip(network.experts, network.widths, strict=False)):
            if not isinstance(expert, LowRank):
                matrix, _ = seen.fitted(place, np.array(dense(expert), np.float64))
                network.experts[place] = plain_linear(_half(matrix))
                continue
            whole = np.array(dense(network.down_proj)[:, :width], np.float64)
            left, right = (np.array(each.weight, np.float64) for each in (expert.left, expert.right))
            matrix, gram = seen.fitted(place, whole + left @ right)
            factors = low_rank(gram, matrix - whole, len(right))
            expert.left, expert.right = (plain_linear(_half(each)) for each in factors)

    def next_layer(self, network: DynamicFeedForward) -> None:
        """Go on with the outputs of this layer, whose feed-forward network is now `network`."""
        for number, (read, _) in enumerate(self.read()):
            options = [RunOptions(fraction=sensitivity) for sensitivity in self.sensitivities(number)]
            outputs = [network(read[place : place + 1], each) for place, each in enumerate(options)]
            self._hidden[number] = self._hidden[number] + mx.concatenate(outputs)
            mx.eval(self._hidden[number])
        self._batches = None


def _half(matrix: np.ndarray) -> mx.array:
    return mx.array(matrix.astype(np.float16))
