"""Non-negative least squares of relative errors: constants of terms from measured times."""

from collections.abc import Sequence

import numpy as np

STEPS = 10_000  # more than any of these small problems needs


def constants(terms: Sequence[dict[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """The constants, none below 0, with which the sums of the terms are nearest to the measured `seconds`, by the sum
    of squared relative errors. Of a term that never occurs there is none. The method is Lawson and Hanson's, with a set
    of free constants (Solving Least Squares Problems, 1974, chapter 23)."""
    names = sorted({name for each in terms for name, value in each.items() if value})
    matrix = np.array(
        [[each.get(name, 0.0) / time for name in names] for each, time in zip(terms, seconds, strict=True)]
    )
    found = _nonnegative(matrix, np.ones(len(seconds)))
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def _nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x ≥ 0 with the least |matrix x - target|."""
    scale = np.linalg.norm(matrix, axis=0)
    matrix = matrix / scale
    x, free = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], bool)
    for _ in range(STEPS):
        gradient = matrix.T @ (target - matrix @ x)
        if free.all() or gradient[~free].max(initial=0) < 1e-10:
            break
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if trial[free].min(initial=1) > 0:
                x = trial
                break
            blocked = free & (trial <= 0)
            step = np.min(x[blocked] / (x[blocked] - trial[blocked]))
            x = x + step * (trial - x)
            free &= x > 1e-12
            x[~free] = 0
            if not free.any():
                break
    return x / scale
