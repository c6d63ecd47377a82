"""Intervals of medians by bootstrap. The random numbers have a fixed seed: the same samples have the same interval."""

from collections.abc import Sequence

import numpy as np

LEAST = 3  # samples that an interval needs
RESAMPLES, SEED, LEVEL = 2000, 0, 0.95


def drawn(count: int, stream: int = 0) -> np.ndarray:
    """The places of RESAMPLES resamples of so many samples, drawn with replacement from a fixed seed, (RESAMPLES,
    count). Another `stream` draws independently."""
    return np.random.default_rng([SEED, stream]).integers(0, count, (RESAMPLES, count))


def resampled(values: Sequence[float], stream: int = 0) -> np.ndarray:
    """The medians of the resamples of `values`."""
    values = np.asarray(values, dtype=np.float64)
    return np.median(values[drawn(len(values), stream)], axis=1)


def interval(medians: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled numbers."""
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return float(low), float(high)


def interval_of(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The interval of the median of `values`; (None, None) for fewer than LEAST."""
    return interval(resampled(values)) if len(values) >= LEAST else (None, None)
