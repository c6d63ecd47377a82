"""Router scores of calibration tokens → the table of dials of a checkpoint.

Shapes: L layers, T tokens, E experts, R rows of a router.
"""

from collections.abc import Sequence

import numpy as np

from .fractions import LARGEST, Fractions

# Mean fractions of the table, where the routers reach them.
FRACTIONS = (*(round(0.05 * step, 2) for step in range(6, 20)), 0.975, 0.99)
STEPS = 60  # of the bisection
BETWEEN = {"lagrangian": (1e-12, 1e12), "tail": (1e-30, 2.0)}  # where it looks for dials


def experts(scores: np.ndarray, prices: Sequence[float], rule: str, dial: float) -> np.ndarray:
    """The number of each token's expert in one layer, (T), for scores (T, R); see `feed_forward.Router.choose`."""
    return _cheapest(_weighed(scores, rule), prices, rule, dial)


def _weighed(scores: np.ndarray, rule: str) -> np.ndarray:
    """What does not depend on the dial, (T, E): the predicted errors, or the probabilities that a wider expert
    is needed."""
    if rule == "lagrangian":
        with np.errstate(over="ignore"):
            return np.concatenate([np.exp(scores), np.zeros((len(scores), 1))], axis=1)
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    return np.concatenate([np.cumsum(shares[:, :0:-1], axis=1)[:, ::-1], np.zeros((len(scores), 1))], axis=1)


def _cheapest(weighed: np.ndarray, prices: Sequence[float], rule: str, dial: float) -> np.ndarray:
    """The number of each token's expert, (T), for the result of `_weighed`."""
    if rule == "lagrangian":
        return len(prices) - 1 - np.argmin((weighed + dial * np.asarray(prices))[:, ::-1], axis=1)
    return np.argmax(weighed <= dial, axis=1)  # the widest has no wider one: 0


def mean_fraction(scores: Sequence[np.ndarray], prices: Sequence[Sequence[float]], rule: str, dial: float) -> float:
    """The mean share of all neurons that the tokens compute."""
    return _mean([_weighed(each, rule) for each in scores], prices, rule, dial)


def _mean(weighed: Sequence[np.ndarray], prices: Sequence[Sequence[float]], rule: str, dial: float) -> float:
    """`mean_fraction` for the results of `_weighed`."""
    pairs = zip(weighed, prices, strict=True)
    return float(np.mean([np.asarray(price)[_cheapest(each, price, rule, dial)].mean() for each, price in pairs]))


def table(scores: Sequence[np.ndarray], prices: Sequence[Sequence[float]], rule: str) -> Fractions:
    """The dials for the mean fractions in FRACTIONS that the routers can reach, and for the smallest one, by bisection.
    `scores` (T, R) and `prices` (E) are those of each layer."""
    weighed = [_weighed(each, rule) for each in scores]
    smallest = float(np.mean([price[0] for price in prices]))
    rows = [(smallest, LARGEST[rule])]
    for wanted in FRACTIONS:
        if wanted <= smallest:
            continue
        low, high = BETWEEN[rule]
        for _ in range(STEPS):
            dial = (low * high) ** 0.5
            above = _mean(weighed, prices, rule, dial) > wanted
            low, high = (dial, high) if above else (low, dial)
        rows.append((wanted, high))
    return Fractions(rule, tuple(rows))
