"""Intervals of medians by bootstrap. The random numbers have a fixed seed: the same samples have the same interval."""

from collections.abc import Sequence
from statistics import fmean, median, stdev

import numpy as np

LEAST = 3  # samples that an interval needs
RESAMPLES, SEED, LEVEL = 2000, 0, 0.95


def resampled(values: Sequence[float], stream: int = 0) -> np.ndarray:
    """The medians of RESAMPLES resamples of `values`, drawn with replacement from a fixed seed. Another `stream` draws
    independently."""
    values = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng([SEED, stream]).integers(0, len(values), (RESAMPLES, len(values)))
    return np.median(values[chosen], axis=1)


def interval(medians: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled numbers."""
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return float(low), float(high)


def summary(values: list[float]) -> dict:
    """The numbers of a row: count, median, mean, stddev, min, max, and the interval of the median."""
    low, high = interval(resampled(values)) if len(values) >= LEAST else (None, None)
    numbers = {"count": len(values), "median": median(values), "mean": fmean(values)}
    numbers["stddev"] = stdev(values) if len(values) > 1 else None
    return numbers | {"min": min(values), "max": max(values), "low": low, "high": high}
