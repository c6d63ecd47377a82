"""Knowledge distillation of the whole model into its smaller experts (Hinton et al., arXiv 1503.02531).

At each step the model reads a window of the text at a sensitivity of SENSITIVITIES, and its predictions are drawn to
those of the dense model: the loss is their KL divergence, as a share of what the fit gave at this sensitivity, so that
low sensitivities do not outweigh high ones. Routers, attention, gate, up and the whole down-projection are frozen, so
that the widest expert stays the dense network. What is trained: with own down-projections a low-rank term (LoRA, arXiv
2106.09685) for each, which is added to the matrix before that is stored; with low-rank terms their factors, in float32.

Shapes: B windows of a batch, W windows, T tokens of a window, V vocabulary, D hidden size, k neurons of an expert.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import training
from ..modules import dense, plain_linear
from ..ops import log_softmax
from ..running import RunOptions
from ..tuning import LoraLinear
from . import fit
from .feed_forward import DynamicFeedForward, LowRank

SENSITIVITIES = (0.5, 0.65, 0.8, 0.9)
RANK = 16  # of the terms that are added to own down-projections
RATE = 2e-3
WARMUP = 10  # steps
EVERY = 10  # steps between two checkpoints
LEAST = 1e-9  # nats; of a divergence that losses are divided by


class Terms(nn.Module):
    """What is trained: for each layer the modules of its smaller experts, `LoraLinear`s or `LowRank`s."""

    def __init__(self, layers: list[list[nn.Module]]):
        super().__init__()
        self.layers = layers


def trainable(networks: Sequence[DynamicFeedForward], seed: int) -> Terms:
    """Put modules that can be trained in the places of the smaller experts, which compute the same at first. Every
    network has smaller experts with modules of their own."""
    key, layers = mx.random.key(seed), []
    for network in networks:
        for number, expert in enumerate(network.experts):
            key, own = mx.random.split(key)
            network.experts[number] = _copied(expert) if isinstance(expert, LowRank) else LoraLinear(expert, RANK, own)
        layers.append(list(network.experts))
    return Terms(layers)


def _copied(term: LowRank) -> LowRank:
    """The same term in float32."""
    (rank, width), size = term.right.weight.shape, term.left.weight.shape[0]
    copy = LowRank(width, size, rank)
    copy.left, copy.right = (plain_linear(each.weight.astype(mx.float32)) for each in (term.left, term.right))
    return copy


@contextmanager
def installed(model: nn.Module, networks: Sequence[nn.Module]) -> Iterator[None]:
    """`model`, a decoder of `mlxeff.models`, computes with these feed-forward networks, and afterwards with its own."""
    before = [layer.feed_forward for layer in model.layers]
    try:
        for layer, network in zip(model.layers, networks, strict=True):
            layer[layer.FEED_FORWARD] = network
        yield
    finally:
        for layer, network in zip(model.layers, before, strict=True):
            layer[layer.FEED_FORWARD] = network


def log_probabilities(model: nn.Module, tokens: mx.array, sensitivity: float = 1.0) -> mx.array:
    """Token ids (B, T) → log-probabilities of the tokens after them, float32 (B, T, V), with gradients."""
    hidden = model.hidden(tokens, model.new_cache(), RunOptions(fraction=sensitivity))
    return log_softmax(model.head(hidden).astype(mx.float32))


def divergence(true: mx.array, found: mx.array) -> mx.array:
    """The mean KL divergence of log-probabilities (…, V), in nats."""
    return mx.mean(mx.sum(mx.exp(true) * (true - found), axis=-1))


def divergences(
    model: nn.Module,
    networks: Sequence[DynamicFeedForward],
    windows: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """For each of SENSITIVITIES the mean KL divergence of the predictions with `networks` from those of `model` as it
    is, in nats, for windows (W, T)."""
    total = np.zeros(len(SENSITIVITIES))
    for number, window in enumerate(windows):
        tokens = mx.array(window[None])
        true = log_probabilities(model, tokens)
        mx.eval(true)
        with installed(model, networks):
            for place, sensitivity in enumerate(SENSITIVITIES):
                total[place] += divergence(true, log_probabilities(model, tokens, sensitivity)).item()
        if progress:
            progress(number + 1, len(windows))
    return (total / len(windows)).tolist()


def tune(
    model: nn.Module,
    networks: Sequence[DynamicFeedForward],
    windows: np.ndarray,
    before: Sequence[float],
    tokens: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train terms for the smaller experts of `networks`, which are left with them.

    model     a dense decoder of `mlxeff.models`, which is left as it was
    windows   token ids (W, T); the steps read one each, in an order that `seed` gives, `tokens` ≥ T in all
    before    the result of `divergences` for these networks as they were fitted, by which losses are divided
    checkpoint, progress  as in `training.train`

    Raises MlxeffError as `training.train` does.
    """
    terms = trainable(networks, seed)
    steps = tokens // windows.shape[1]
    settings = training.Training(steps=steps, rate=RATE, warmup=WARMUP, seed=seed, every=EVERY)

    def loss(_terms: Terms, tokens: mx.array, true: mx.array, place: int) -> mx.array:
        found = log_probabilities(model, tokens, SENSITIVITIES[place])
        return divergence(true, found) / max(before[place], LEAST)

    gradient = nn.value_and_grad(terms, loss)

    def step(window: np.ndarray, place: int) -> tuple[mx.array, dict]:
        tokens = mx.array(window[None])
        true = log_probabilities(model, tokens)
        mx.eval(true)
        with installed(model, networks):
            return gradient(terms, tokens, true, place)

    def batch(index: int) -> tuple[np.ndarray, int]:
        """The window and the place of the sensitivity of a step. All are drawn once before one is drawn again."""
        drawn = []
        for most in (len(windows), len(SENSITIVITIES)):
            turn, place = divmod(index, most)
            drawn.append(int(np.random.default_rng([seed, most, turn]).permutation(most)[place]))
        return windows[drawn[0]], drawn[1]

    for network in networks:
        network.train()
    training.train(terms, step, batch, (windows, np.array(before)), settings, checkpoint, progress)
    for network in networks:
        network.eval()


def stored(network: DynamicFeedForward, gram: np.ndarray) -> None:
    """Put the smaller experts of `network`, which `tune` trained, into the form in which they are kept: merged, and
    quantised as the whole down-projection is; low-rank terms in float16. `gram` is aᵀa of the values a of the neurons
    (k of the widest of them, the same), the mean of the tokens."""
    for place, (expert, width) in enumerate(zip(network.experts, network.widths, strict=False)):
        if isinstance(expert, LowRank):
            expert.left, expert.right = (
                plain_linear(each.weight.astype(mx.float16)) for each in (expert.left, expert.right)
            )
        else:
            network.experts[place] = fit.stored(matrix(expert), network.down_proj, gram[:width, :width])


def matrix(term: LoraLinear) -> np.ndarray:
    """A down-projection with the trained term, float64 (D, k)."""
    return np.array(dense(term._whole), np.float64) + np.array(term.b, np.float64) @ np.array(term.a, np.float64)
