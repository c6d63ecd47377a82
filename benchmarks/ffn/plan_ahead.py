"""A plan-ahead router for DynaMoE: the last hidden state of the token before decides on a token's experts in all layers
at once, so that the whole step is known before it begins. To compare its quality with that of a router in each layer.

It is fitted like those: a ridge regression of the logarithms of the experts' errors, here on the normalised last hidden
state of the token before. The first token of a text takes the widest experts.

Shapes: L layers, T tokens, D hidden size, E experts.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlxeff import calibration
from mlxeff.dynamoe import calibrate, fisher, fit
from mlxeff.dynamoe.fractions import Fractions
from mlxeff.dynamoe.install import of, prices
from mlxeff.models.decoder import DecoderModel


class Planner:
    """The routers of a fitted model, fitted again to what the token before tells. `text` (W, T): ids of the
    calibration."""

    def __init__(self, model: DecoderModel, dense: DecoderModel, text: np.ndarray):
        self.networks = of(model)
        self.prices = prices([network.widths for network in self.networks])
        weights = fisher.output_weights(dense, text)
        before = np.concatenate([self.features(dense, window)[:-1] for window in text])
        stream, self._routers, scores = calibration.LayerStream(model, text), [], []
        self.explained: list[float] = []
        for number, (layer, network) in enumerate(zip(model.layers, self.networks, strict=True)):
            errors: list[np.ndarray] = []

            def see(_, x: mx.array, network=network, weights=weights[number], errors=errors) -> None:
                for window in x:
                    errors.append(fit._measured(network, [window.astype(mx.float32)], weights)[0][1:])

            stream.next_layer([layer.FEED_FORWARD], see)
            found = fit.regression(before, np.log(np.concatenate(errors) + fit.LEAST_ERROR))
            self._routers.append(found[:2])
            self.explained += found[2]
            scores.append(before @ found[0].T + found[1])
        self.fractions: Fractions = calibrate.table(scores, self.prices, "lagrangian")

    @staticmethod
    def features(dense: DecoderModel, window: np.ndarray) -> np.ndarray:
        """The normalised last hidden states (T, D)."""
        return np.array(dense.hidden(mx.array(window)[None], dense.new_cache())[0].astype(mx.float32))

    def plan(self, features: np.ndarray, share: float) -> list[np.ndarray]:
        """The number of each token's expert in each layer, (T), for the features of all tokens."""
        dial, plan = self.fractions.dial(share), []
        for (weight, bias), price in zip(self._routers, self.prices, strict=True):
            chosen = calibrate.experts(features[:-1] @ weight.T + bias, price, "lagrangian", dial)
            plan.append(np.concatenate([[len(price) - 1], chosen]))
        return plan

    def follow(self, plan: list[np.ndarray], start: int) -> float:
        """Let the tokens from `start` on take the experts of the plan in the next call. Returns the mean share of the
        neurons."""
        shares = []
        for network, chosen in zip(self.networks, plan, strict=True):
            numbers = mx.array(chosen[start:].astype(np.uint32))
            network._choose = lambda _tokens, _dial, numbers=numbers: numbers
            shares.append(np.array(network.widths)[chosen[start:]].mean() / network.widths[-1])
        return float(np.mean(shares))


def plans(planner: Planner, dense: DecoderModel, windows: np.ndarray, share: float) -> Iterator[list[np.ndarray]]:
    """The plan of each window."""
    for window in windows:
        yield planner.plan(planner.features(dense, window), share)
