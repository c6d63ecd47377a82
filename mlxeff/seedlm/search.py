"""The search for a block's seed: what all its implementations share, and the reference in NumPy.

A block w of C weights becomes the seed, P coefficients q and exponent of least error Σ h (w - ŵ)², of all 65,535 seeds
whose columns are not almost dependent. Two steps, in `cpu/seedlm/`, `metal/seedlm_encode.metal` and here:
a bound for every seed, which only has to be a bound, and for the seeds that it leaves an evaluation in float32 that
fixes every operation, so that all of them choose the same seed and coefficients, to the bit. Of seeds with equal
errors the lowest is taken; zeros where no seed is better.

The reference takes about a millisecond a block; it is for tests, and for machines without the other two.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ..errors import MlxeffError
from .codec import HALF, Blocks, decode
from .format import CODE_OFFSET, BlockFormat
from .lfsr import expand, step

SEEDS = 65535
SLACK = np.float32(6e-4)  # of |w|²: what energies in float32 may be off
MOST_CONDITION = np.float32(4000)  # trace(G) trace(G⁻¹) of the seeds that are considered
EXCLUDED = 4200  # the same in the first step, whatever its rounding
LEAST_WEIGHT, LEAST_METRIC, LEAST_MISS = np.float32(2.0**-40), np.float32(2.0**-7), np.float32(2.0**-50)
LEAST_EXPONENT = -24  # of coefficients of a scaled block; with these limits nothing underflows that matters
BATCH = 32  # blocks that are searched together
CLASSES = 15  # parts of the cycle whose best seeds are evaluated first
CANDIDATES = 4096  # (block, seed) pairs that are evaluated at a time


@dataclass(frozen=True)
class Problem:
    """Blocks as they are searched."""

    scaled: np.ndarray  # float32 (N, C): the weights times a power of two, the largest in [1/2, 1)
    base: np.ndarray  # int32 (N): the exponent of code 0 in that scale; 0 of blocks that are left as zeros
    metric: np.ndarray  # float32 (C): h, of mean 1


@functools.cache
def cycle() -> np.ndarray:
    """uint16 (65,535): the register's states from 1 on."""
    found, state = np.empty(SEEDS, np.uint16), 1
    for n in range(SEEDS):
        found[n], state = state, step(state)
    return found


def problem(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int) -> Problem:
    """Of a float32 matrix (rows, cols), whose row becomes NB blocks; with a diagonal (C), one, of cols ≤ C columns."""
    if not np.isfinite(weight).all():
        raise MlxeffError("SeedLM search: wanted finite weights, got others")
    rows, cols = weight.shape
    count = fmt.blocks(cols) if diagonal is None else 1
    blocks = np.zeros((rows, count * fmt.columns), np.float32)
    blocks[:, :cols] = weight
    blocks = blocks.reshape(-1, fmt.columns)
    largest = np.abs(blocks).max(1)
    scale = np.frexp(largest)[1].astype(np.int32)
    scaled = np.ldexp(blocks, -scale[:, None])
    scaled[np.abs(scaled) < LEAST_WEIGHT] = 0
    base = np.int32(bias - CODE_OFFSET) - scale
    base[(largest == 0) | (base > 0) | (base + 15 < LEAST_EXPONENT)] = 0
    return Problem(scaled, base, metric(fmt, diagonal))


def metric(fmt: BlockFormat, diagonal: np.ndarray | None) -> np.ndarray:
    """The weights of a block's columns, of mean 1."""
    if diagonal is None:
        return np.ones(fmt.columns, np.float32)
    mean = 0.0
    for each in diagonal.tolist():
        mean += each / fmt.columns
    return np.maximum((diagonal.astype(np.float64) / mean).astype(np.float32), LEAST_METRIC)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32 arrays, rounded once: in float64, rounded to odd, and then to float32."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # what the sum lost, exactly
    bits = total.view(np.int64)
    even = (rest != 0) & (bits & 1 == 0)
    return (bits + np.where(even, np.where((rest > 0) == (total > 0), 1, -1), 0)).view(np.float64).astype(np.float32)


def search_numpy(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int, refine: bool) -> tuple:
    """→ (seeds uint16 (rows, NB), coefficients int8 (rows, NB, P), codes uint8 (rows, NB), decoded float32 of weight).

    The arguments and results of the native `seedlm_encode`.
    """
    blocks = problem(fmt, weight, diagonal, bias)
    best = Best.zeros(fmt, blocks)
    wanted = np.flatnonzero(blocks.base < 0)
    for first in range(0, len(wanted), BATCH):
        _search_batch(fmt, blocks, wanted[first : first + BATCH], refine, best)
    rows, cols = weight.shape
    seeds = np.maximum(best.seed, 1).astype(np.uint16).reshape(rows, -1)
    codes = (best.exponent - blocks.base).astype(np.uint8).reshape(rows, -1)
    coefficients = best.coefficients.astype(np.int8).reshape(rows, -1, fmt.states)
    decoded = decode(fmt, Blocks(seeds, coefficients, codes, bias), cols)
    return seeds, coefficients, codes, np.ascontiguousarray(decoded)


@dataclass
class Best:
    """The best found for each block; seed 0: zeros."""

    error: np.ndarray  # float32 (N)
    seed: np.ndarray  # int64 (N)
    coefficients: np.ndarray  # int64 (N, P)
    exponent: np.ndarray  # int64 (N), of the scaled block

    @classmethod
    def zeros(cls, fmt: BlockFormat, blocks: Problem) -> "Best":
        count, error = len(blocks.scaled), np.zeros(len(blocks.scaled), np.float32)
        for c in range(fmt.columns):
            error = fma(blocks.metric[c] * blocks.scaled[:, c], blocks.scaled[:, c], error)
        zeros = np.zeros((count, fmt.states), np.int64)
        return cls(error, np.zeros(count, np.int64), zeros, blocks.base.astype(np.int64))

    def take(self, block: np.ndarray, error: np.ndarray, seed: np.ndarray, q: np.ndarray, exponent: np.ndarray) -> None:
        """Keep the best of candidates, one a (block, seed), where they are better."""
        order = np.lexsort((seed, error, block))
        first = order[np.unique(block[order], return_index=True)[1]]
        at, new, old = block[first], error[first], self.error[block[first]]
        first = first[(new < old) | ((new == old) & (seed[first] < self.seed[at]))]
        at = block[first]
        self.error[at], self.seed[at] = error[first], seed[first]
        self.coefficients[at], self.exponent[at] = q[first], exponent[first]


def _states(fmt: BlockFormat, seeds: np.ndarray) -> np.ndarray:
    """int64 (N) → V - 32768, int64 (N, C, P)."""
    windows = expand(seeds)[:, None] >> np.arange(fmt.columns * fmt.states, dtype=np.uint64) & np.uint64(0xFFFF)
    return windows.astype(np.int64).reshape(-1, fmt.columns, fmt.states) - HALF


@functools.lru_cache(4)
def _tables(fmt: BlockFormat, metric: bytes) -> tuple[np.ndarray, np.ndarray]:
    """u (65,535 + P - 1, C) along the cycle; the Gram matrices' inverses (P, P, 65,535), 0 of the excluded."""
    h = np.frombuffer(metric, np.float32).astype(np.float64)
    C, P = fmt.columns, fmt.states
    values = (np.resize(cycle(), SEEDS + C * P).astype(np.float64) - HALF) / HALF
    u = np.stack([values[c * P : c * P + SEEDS + P - 1] for c in range(C)], 1)
    gram = np.empty((SEEDS, P, P))
    for i in range(P):
        for j in range(P):
            gram[:, i, j] = np.einsum("nc,nc,c->n", u[i : i + SEEDS], u[j : j + SEEDS], h)
    regular = np.linalg.det(gram) > 1e-12 * np.prod(np.diagonal(gram, axis1=1, axis2=2), 1)
    inverse = np.zeros_like(gram)
    inverse[regular] = np.linalg.inv(gram[regular])
    condition = np.trace(gram, axis1=1, axis2=2) * np.trace(inverse, axis1=1, axis2=2)
    inverse[condition >= EXCLUDED] = 0
    return u.astype(np.float32), np.ascontiguousarray(inverse.transpose(1, 2, 0), np.float32)


def _energies(states: np.ndarray, inverse: np.ndarray, hw: np.ndarray) -> np.ndarray:
    """bᵀG⁻¹b of all seeds for blocks (B, C) of metric times weights, float32 (B, 65,535)."""
    products = hw @ states.T
    P = len(inverse)
    b = [products[:, p : p + SEEDS] for p in range(P)]
    energy = np.zeros_like(b[0])
    for i in range(P):
        row = inverse[i, i] * b[i]
        for j in range(i + 1, P):
            row += 2 * inverse[i, j] * b[j]
        energy += row * b[i]
    return energy


def _search_batch(fmt: BlockFormat, blocks: Problem, batch: np.ndarray, refine: bool, best: Best) -> None:
    """Blocks `batch` (B) of the problem, into `best`."""
    states, inverse = _tables(fmt, blocks.metric.tobytes())
    energy, norm = _energies(states, inverse, blocks.metric * blocks.scaled[batch]), best.error[batch]

    def evaluate(rows, places):
        for first in range(0, len(rows), CANDIDATES):
            part = slice(first, first + CANDIDATES)
            _evaluate(fmt, blocks, batch[rows[part]], cycle()[places[part]].astype(np.int64), refine, best)

    tops = energy.reshape(len(batch), CLASSES, -1).argmax(2) + np.arange(CLASSES) * (SEEDS // CLASSES)
    evaluate(np.repeat(np.arange(len(batch)), CLASSES), tops.ravel())
    evaluate(*np.nonzero(energy > ((1 - SLACK) * norm - best.error[batch])[:, None]))


def _evaluate(fmt, blocks, block, seed, refine, best) -> None:
    """Candidates: `block` (N) indices and `seed` (N). The float32 operations and their order are the format's."""
    w, h, v = blocks.scaled[block], blocks.metric, _states(fmt, seed)
    fit = _solve(w, h, v)
    kept = np.flatnonzero(fit.condition < MOST_CONDITION)
    if not len(kept):
        return
    w, v, block, seed, fit = w[kept], v[kept], block[kept], seed[kept], fit.part(kept)
    lowest = np.maximum(blocks.base[block], LEAST_EXPONENT)
    wanted = np.frexp(np.abs(fit.t).max(1))[1] - 3
    exponent = np.clip(wanted, lowest, blocks.base[block] + 15).astype(np.int64)
    q, cost = _round(fit, exponent, int(refine))
    if refine:
        lower, lower_cost = _round(fit, exponent - 1, 1)
        better = (lower_cost < cost) & (exponent > lowest)
        q, exponent = np.where(better[:, None], lower, q), exponent - better
    scale = np.ldexp(np.float32(1 / 32767), exponent).astype(np.float32)
    sums, error = (v * q[:, None]).sum(-1).astype(np.float32), np.zeros(len(w), np.float32)
    for c in range(fmt.columns):
        miss = fma(-sums[:, c], scale, w[:, c])
        miss[np.abs(miss) < LEAST_MISS] = 0
        error = fma(h[c] * miss, miss, error)
    best.take(block, error, seed, q, exponent)


@dataclass(frozen=True)
class Fit:
    """Least-squares coefficients t (N, P), G = L D Lᵀ, and trace(G) trace(G⁻¹) (infinite where G is singular)."""

    L: np.ndarray  # float32 (N, P, P)
    D: np.ndarray  # float32 (N, P)
    t: np.ndarray
    condition: np.ndarray

    def part(self, kept: np.ndarray) -> "Fit":
        return Fit(self.L[kept], self.D[kept], self.t[kept], self.condition[kept])


def _solve(w: np.ndarray, h: np.ndarray, v: np.ndarray) -> Fit:
    """The fit of blocks w (N, C), under the metric h (C), with states v (N, C, P)."""
    count, C, P = v.shape
    u = v.astype(np.float32) * np.float32(2.0**-15)
    G, b = np.zeros((P, P, count), np.float32), np.zeros((P, count), np.float32)
    for c in range(C):
        for i in range(P):
            hu = h[c] * u[:, c, i]
            b[i] = fma(h[c] * w[:, c], u[:, c, i], b[i])
            for j in range(i + 1):
                G[i, j] = fma(hu, u[:, c, j], G[i, j])
    with np.errstate(all="ignore"):  # singular ones are dropped by their condition
        L, D, condition = _factor(G)
        for i in range(P):
            for k in range(i):
                b[i] = fma(-L[i, k], b[k], b[i])
        t = np.empty_like(b)
        for i in reversed(range(P)):
            t[i] = b[i] / D[i]
            for j in range(i + 1, P):
                t[i] = fma(-L[j, i], t[j], t[i])
        t = fma(np.float32(-(2.0**-15)), t, t)  # of states / 32767
    return Fit(L.transpose(2, 0, 1), D.T, t.T, condition)


def _factor(G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G (P, P, N), its lower part → L, D, trace(G) trace(G⁻¹)."""
    P = len(G)
    L, M, D = np.zeros_like(G), np.zeros_like(G), np.empty_like(G[0])
    trace, inverse_trace = np.zeros_like(G[0, 0]), np.zeros_like(G[0, 0])
    for j in range(P):
        D[j] = G[j, j]
        for k in range(j):
            D[j] = fma(-M[j, k], L[j, k], D[j])
        trace = trace + G[j, j]
        for i in range(j + 1, P):
            M[i, j] = G[i, j]
            for k in range(j):
                M[i, j] = fma(-M[i, k], L[j, k], M[i, j])
            L[i, j] = M[i, j] / D[j]
    for j in range(P):  # M becomes the inverse of L
        inverse_trace = inverse_trace + 1 / D[j]
        for i in range(j + 1, P):
            total = L[i, j]
            for k in range(j + 1, i):
                total = fma(L[i, k], M[k, j], total)
            M[i, j] = -total
            inverse_trace = fma(total / D[i], total, inverse_trace)
    return L, D, np.where((D > 0).all(0), trace * inverse_trace, np.float32(np.inf))


def _round(fit: Fit, exponent: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest coefficients within `reach` of t / 2^e, int64 (N, P), and their cost |q 2^e - t|² under G."""
    P = fit.t.shape[1]
    offsets = np.array([0, -1, 1])[: 2 * reach + 1]
    unit = np.ldexp(np.float32(1), exponent).astype(np.float32)[:, None]
    middle = np.clip(np.rint(fit.t / unit), -8, 7).astype(np.int64)
    choices = offsets[np.indices((len(offsets),) * P).reshape(P, -1)[::-1]]  # coefficient P - 1 varies slowest
    q = middle[:, :, None] + choices
    misses = fma(q.astype(np.float32), unit[:, :, None], -fit.t[:, :, None])
    cost = np.zeros(q[:, 0].shape, np.float32)
    for p in reversed(range(P)):
        miss = misses[:, p]
        for j in range(p + 1, P):
            miss = fma(fit.L[:, j, p, None], misses[:, j], miss)
        cost = fma(fit.D[:, p, None] * miss, miss, cost)
    cost[((q < -8) | (q > 7)).any(1)] = np.inf
    first = cost.argmin(1)
    rows = np.arange(len(first))
    return q[rows, :, first], cost[rows, first]
