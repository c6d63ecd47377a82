"""Tuning of the smaller experts after the closed form: distillation layer by layer, then of the whole model.

1. `Distillation`, for own down-projections and in closed form. For errors of one layer alone they are the optimum
   already, whatever diagonal weights the errors have, since each row is fitted alone. What is left to gain is what
   that fit does not know: which tokens take an expert, and what the layers before it lack. So each layer reads the
   text as the dynamic model does, at mixed sensitivities, and an expert is fitted on the tokens that take it, so that
   the hidden states after the layer come near to the dense model's.
2. `tune`, knowledge distillation of the whole model by gradient steps (Hinton et al., arXiv 1503.02531).

At each step of the second the model reads a window of the text at a sensitivity of SENSITIVITIES, and its predictions
are drawn to those of the dense model: the loss is their KL divergence, as a share of what it was at this sensitivity
before, so that low sensitivities do not outweigh high ones. Routers, attention, gate, up and the whole down-projection
are frozen, so that the widest expert stays the dense network. What is trained: with own down-projections a low-rank
term (LoRA, arXiv 2106.09685) for each, which is added to the matrix before that is stored; with low-rank terms their
factors, in float32.

Shapes: B windows of a batch, W windows, T tokens of a window, V vocabulary, D hidden size, k neurons of an expert.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import calibration, training
from ..modules import dense, plain_linear
from ..ops import log_softmax, swiglu
from ..running import RunOptions
from ..tuning import LoraLinear
from .feed_forward import DynamicFeedForward, LowRank

SENSITIVITIES = (0.5, 0.65, 0.8, 0.9)
RANK = 16  # of the terms that are added to own down-projections
RATE = 2e-3
WARMUP = 10  # steps
EVERY = 10  # steps between two checkpoints
LEAST = 1e-9  # nats; of a divergence that losses are divided by
PRIOR = 1.0  # tokens on which an expert is drawn to what it was, for each token that takes it
RIDGE = 1e-2  # of the mean diagonal of their Gram matrix


class _Silent(nn.Module):
    """Takes the place of a feed-forward network: keeps what it reads, and adds nothing to the hidden states."""

    def __call__(self, x: mx.array, _options: RunOptions | None = None) -> mx.array:
        self._read = x
        return mx.zeros_like(x)


class Distillation:
    """The text on its way through the dense model and the dynamic one, side by side. At each layer, first to last, the
    smaller experts are fitted, or taken as they are:

        text = Distillation(model, windows)
        for network in networks:
            text.fit(network)     # changes its own down-projections, which become float16 and dense
            text.next_layer(network)
    """

    def __init__(self, model: nn.Module, windows: np.ndarray):
        """`model`: a dense decoder of `mlxeff.models`, which is left as it was; `windows`: token ids (W, T)."""
        self.model = model
        self._dense = calibration.LayerStream(model, windows)
        self._hidden = list(self._dense.hidden)  # of the dynamic model, for each batch (B, T, D)
        self._read: list[tuple[mx.array, mx.array]] | None = None

    def _batches(self) -> list[tuple[mx.array, mx.array]]:
        """For each batch (what the feed-forward network of this layer reads in the dynamic model; the hidden states
        that its output is added to), (B, T, D) each. Afterwards the dense stream has the layer's outputs."""
        if self._read is None:
            layer, number, silent, self._read = self._dense.layer, self._dense.index, _Silent(), []
            own = layer.feed_forward
            try:
                layer[layer.FEED_FORWARD] = silent
                for hidden in self._hidden:
                    after = layer(hidden, self.model.layer_cache(number))
                    mx.eval(after, silent._read)
                    self._read.append((silent._read, after))
            finally:
                layer[layer.FEED_FORWARD] = own
            self._dense.next_layer()
        return self._read

    def fit(self, network: DynamicFeedForward) -> None:
        """Fit the own down-projections of the smaller experts of this layer."""
        widths = network.widths[:-1]
        size, most = self._hidden[0].shape[-1], widths[-1]
        grams, wanted = [np.zeros((k, k)) for k in widths], [np.zeros((k, size)) for k in widths]
        counts, whole, tokens = [0] * len(widths), np.zeros((most, most)), 0
        bias = network.down_proj.get("bias")
        for number, (read, after) in enumerate(self._batches()):
            x, target = read.reshape(-1, size), (self._dense.hidden[number] - after).reshape(-1, size)
            target = np.array((target if bias is None else target - bias).astype(mx.float32))
            first = number * len(self._hidden[0])  # window of the batch
            chosen = [network.choose(row, _sensitivity(first + place)) for place, row in enumerate(read)]
            chosen = np.array(mx.concatenate(chosen))
            a = np.array(swiglu(network.gate_proj(x), network.up_proj(x))[:, :most].astype(mx.float32))
            whole += a.T @ a
            tokens += len(a)
            for place, width in enumerate(widths):
                own = a[chosen == place, :width]
                grams[place] += own.T @ own
                wanted[place] += own.T @ target[chosen == place]
                counts[place] += len(own)
        for place, width in enumerate(widths):
            before = np.array(dense(network.experts[place]), np.float64)
            prior = PRIOR * max(1, counts[place]) / tokens * whole[:width, :width]
            prior += max(RIDGE * float(np.mean(np.diag(prior))), LEAST) * np.eye(width)
            new = np.linalg.solve(grams[place] + prior, wanted[place] + prior @ before.T).T
            network.experts[place] = plain_linear(mx.array(new.astype(np.float16)))

    def next_layer(self, network: DynamicFeedForward) -> None:
        """Go on with the outputs of this layer, whose feed-forward network is now `network`."""
        for number, (read, after) in enumerate(self._batches()):
            first = number * len(self._hidden[0])
            options = [RunOptions(fraction=_sensitivity(first + place)) for place in range(len(read))]
            outputs = [network(read[place : place + 1], each) for place, each in enumerate(options)]
            self._hidden[number] = after + mx.concatenate(outputs)
            mx.eval(self._hidden[number])
        self._read = None


def _sensitivity(number: int) -> float:
    """At which the window of this number is read."""
    return SENSITIVITIES[number % len(SENSITIVITIES)]


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
) -> list[list[nn.Module]]:
    """Train terms for the smaller experts of `networks`, which are left with them.

    model     a dense decoder of `mlxeff.models`, which is left as it was
    windows   token ids (W, T); the steps read one each, in an order that `seed` gives, `tokens` ≥ T in all
    before    the result of `divergences` for these networks
    checkpoint, progress  as in `training.train`

    Returns for each layer what was trained for its smaller experts, for `fit.fit_layer`. Raises MlxeffError as
    `training.train` does.
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
    return terms.layers


def matrix(term: LoraLinear) -> np.ndarray:
    """A down-projection with the trained term, float64 (D, k)."""
    return np.array(dense(term._whole), np.float64) + np.array(term.b, np.float64) @ np.array(term.a, np.float64)


def halved(term: LowRank) -> LowRank:
    """A trained term in float16, as it is stored."""
    for module in (term.left, term.right):
        module.weight = module.weight.astype(mx.float16)
    return term
