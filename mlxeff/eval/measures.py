"""Measures of next-token distributions: of a text that a model predicts, and beside those of another model.

Log-probabilities are natural logarithms, so likelihoods and divergences are in nats. C tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from ..ops import log_softmax


def log_probabilities(logits: mx.array) -> mx.array:
    """Logits (…, V) of any float type → float32 log-probabilities (…, V)."""
    return log_softmax(logits.astype(mx.float32))


def losses(found: mx.array, targets: np.ndarray) -> mx.array:
    """The negative log-likelihoods (C,) of the C tokens `targets`, in nats, from log-probabilities (C, V)."""
    return -mx.take_along_axis(found, mx.array(targets)[:, None], axis=-1)[:, 0]


def divergences(found: mx.array, truth: mx.array) -> mx.array:
    """KL(truth ‖ found) in nats for each of the C rows of log-probabilities (C, V). A token that is impossible in
    `truth` adds nothing; one that is impossible in `found` only makes it infinite."""
    terms = mx.exp(truth) * (truth - found)
    return mx.where(truth == -mx.inf, 0.0, terms).sum(-1)


def same_top(found: mx.array, truth: mx.array) -> mx.array:
    """For each of the C rows of log-probabilities (C, V), whether both have the same most likely token."""
    return mx.argmax(found, axis=-1) == mx.argmax(truth, axis=-1)


def compare(found: mx.array, truth: mx.array, targets: np.ndarray) -> dict:
    """Compare log-probabilities (C, V) at the C tokens `targets`. Returns sums over the tokens of the negative
    log-likelihood, of KL(truth ‖ found), both in nats, and of equal most likely tokens; and the KL and agreement of the
    first token.
    """
    nll, kl, same = losses(found, targets), divergences(found, truth), same_top(found, truth)
    mx.eval(nll, kl, same)
    return {
        "tokens": len(targets),
        "nll": nll.sum().item(),
        "kl": kl.sum().item(),
        "same": same.sum().item(),
        "first_kl": kl[0].item(),
        "first_same": int(same[0].item()),
    }


def means(compared: Sequence[dict]) -> dict:
    """Perplexity, mean KL divergence and share of equal first choices over all tokens of some `compare`s."""
    tokens, nll, kl, same = (sum(each[key] for each in compared) for key in ("tokens", "nll", "kl", "same"))
    return {"perplexity": exponential(nll / tokens), "kl": kl / tokens, "agreement": same / tokens}


def exponential(value: float) -> float:
    """exp(value); infinite where that is above the largest number."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class Values:
    """One number for each token, such as its loss: collected in pieces, summed in float64."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []

    def add(self, values: mx.array) -> None:
        """Add the numbers (C,) of the next tokens; evaluates them."""
        self._pieces.append(np.array(values, np.float64))

    def all(self) -> np.ndarray:
        """The numbers of all tokens, float64."""
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0)

    @property
    def not_finite(self) -> int:
        """How many of them are NaN or infinite."""
        return int(sum((~np.isfinite(piece)).sum() for piece in self._pieces))

    def mean(self) -> float:
        """Their mean; NaN where one of them is NaN, or there is none."""
        found = self.all()
        return float(found.mean()) if len(found) else math.nan

    def error(self) -> float:
        """The standard error of the mean, as of independent numbers; NaN for fewer than two, and where one is not
        finite."""
        found = self.all()
        if len(found) < 2 or self.not_finite:
            return math.nan
        return float(found.std(ddof=1) / math.sqrt(len(found)))

    def quantile(self, share: float) -> float:
        """The number that this share of them does not exceed; NaN where one is not finite."""
        return math.nan if self.not_finite else float(np.quantile(self.all(), share))


def perplexity(values: Values) -> dict:
    """Of the losses of all tokens: `tokens`, `nll` (the mean), `perplexity` = exp(nll), its standard error by the first
    derivative, and how many losses are `not_finite`. Numbers that are not finite are None, as JSON has none."""
    nll = values.mean()
    found = exponential(nll)
    return {
        "tokens": len(values.all()),
        "nll": finite(nll),
        "perplexity": finite(found),
        "perplexity_error": finite(found * values.error()),
        "not_finite": values.not_finite,
    }


def finite(value: float) -> float | None:
    """The number; None where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def mean_report(reports: Iterable[object]) -> object:
    """Reports of one shape, such as those of `Setup.report` after each window, as one: of each number the mean, of
    anything else the last one."""
    reports = list(reports)
    last = reports[-1]
    if isinstance(last, dict):
        return {key: mean_report([each[key] for each in reports if key in each]) for key in last}
    if isinstance(last, list) and all(isinstance(each, list) and len(each) == len(last) for each in reports):
        return [mean_report(parts) for parts in zip(*reports, strict=True)]
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in reports):
        mean = sum(reports) / len(reports)
        return int(mean) if mean == int(mean) else round(mean, 6)
    return last
