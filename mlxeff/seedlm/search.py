"""The search for the best seed of each block: its definition for all implementations, and the reference in NumPy.

A block w of C weights is encoded as the seed, the P coefficients q and the exponent with the least error
Σ_c h[c] (w[c] - ŵ[c])². h is the metric: the weights of the columns' errors, all 1 in the data-free method. All 65,535
seeds compete, except those whose matrix G is almost singular: with U (C, P), the states of the seed minus 32768 and
divided by 32768, G is Uᵀ diag(h) U.

With unrounded coefficients, the least error of a seed is Σ h w² - energy, where energy = bᵀ G⁻¹ b and
b = Uᵀ diag(h) w. Rounded coefficients can only be worse. So the search has two steps, here as in `cpu/seedlm/` and
`metal/seedlm_encode.metal`. The scan computes the energy of every seed, in any precision that is good to SLACK. The
evaluation rounds coefficients for the seeds that can still be better than the best one so far. It is float32 and fixes
every operation and its order, so that all implementations choose the same seed and coefficients to the bit. Of seeds
with equal errors the lowest is taken. A block for which no seed is better than zeros becomes zeros.

The reference takes about a millisecond per block. It serves tests, and machines without the other implementations.
Letters: N blocks, or pairs of a block and a seed, C columns and P states as in `format`, B blocks of a batch.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ..errors import MlxeffError
from .codec import HALF, Blocks, decode
from .format import CODE_OFFSET, BlockFormat
from .lfsr import expand, step

SEEDS = 65535
SLACK = np.float32(6e-4)  # largest error of an energy in float32, as a share of Σ h w²
MOST_CONDITION = np.float32(4000)  # seeds whose trace(G) trace(G⁻¹) reaches this are excluded by the evaluation
EXCLUDED = 4200  # the same limit in the scan; it is larger, so that rounding in the scan excludes no seed wrongly
# With these limits, nothing underflows in the evaluation that could change its result.
LEAST_WEIGHT = np.float32(2.0**-40)  # smaller scaled weights count as 0
LEAST_METRIC = np.float32(2.0**-7)  # smaller values of the metric are raised to this one
LEAST_MISS = np.float32(2.0**-50)  # smaller differences w - ŵ count as 0
LEAST_EXPONENT = -24  # a scaled block gets no smaller exponent
BATCH = 32  # blocks that are scanned together
CLASSES = 15  # parts of the register's cycle; the seed of most energy in each part is evaluated first
CANDIDATES = 4096  # pairs (block, seed) that are evaluated together


@dataclass(frozen=True)
class Problem:
    """Blocks that are prepared for the search: each is scaled by a power of two, so that its largest weight is in
    [1/2, 1)."""

    scaled: np.ndarray  # the scaled weights, float32 (N, C)
    base: np.ndarray  # the exponent of code 0 for the scaled block, int32 (N); 0 for a block that becomes zeros
    metric: np.ndarray  # h, float32 (C), with mean 1


@functools.cache
def cycle() -> np.ndarray:
    """All states of the register in the order in which they follow each other, from 1 on: uint16 (65,535)."""
    states, state = np.empty(SEEDS, np.uint16), 1
    for n in range(SEEDS):
        states[n], state = state, step(state)
    return states


def problem(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int) -> Problem:
    """The blocks of a float32 matrix (rows, cols), row by row, for the exponent bias `bias`. Without a diagonal, the
    metric is 1 and a row has NB blocks. A diagonal (C) is the metric up to its scale; the matrix then is one column of
    blocks, with cols ≤ C. Raises MlxeffError for weights that are not finite."""
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
    """The metric h, float32 (C): the diagonal scaled to mean 1; ones without a diagonal."""
    if diagonal is None:
        return np.ones(fmt.columns, np.float32)
    mean = 0.0  # summed in this order, as in the other implementations
    for value in diagonal.tolist():
        mean += value / fmt.columns
    return np.maximum((diagonal.astype(np.float64) / mean).astype(np.float32), LEAST_METRIC)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c for float32 arrays, rounded to float32 once. The sum is computed in float64 and rounded to odd there,
    which makes the second rounding, to float32, correct (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # exactly the rounding error of `total` (Knuth's two-sum)
    bits = total.view(np.int64)
    even = (rest != 0) & (bits & 1 == 0)
    return (bits + np.where(even, np.where((rest > 0) == (total > 0), 1, -1), 0)).view(np.float64).astype(np.float32)


def search_numpy(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int, refine: bool) -> tuple:
    """Search the blocks of a float32 matrix (rows, cols): (seeds uint16 (rows, NB), coefficients int8 (rows, NB, P),
    exponent codes uint8 (rows, NB), decoded weights float32 (rows, cols)).

    diagonal  as in `problem`; with it NB is 1
    bias      the exponent bias of the matrix
    refine    see `encode.encode`

    The native `seedlm_encode` and `metal_search.search_metal` have the same arguments and results.
    """
    blocks = problem(fmt, weight, diagonal, bias)
    best = Best.zeros(fmt, blocks)
    searched = np.flatnonzero(blocks.base < 0)  # the others become zeros
    for first in range(0, len(searched), BATCH):
        _search_batch(fmt, blocks, searched[first : first + BATCH], refine, best)
    rows, cols = weight.shape
    seeds = np.maximum(best.seed, 1).astype(np.uint16).reshape(rows, -1)
    codes = (best.exponent - blocks.base).astype(np.uint8).reshape(rows, -1)
    coefficients = best.coefficients.astype(np.int8).reshape(rows, -1, fmt.states)
    decoded = decode(fmt, Blocks(seeds, coefficients, codes, bias), cols)
    return seeds, coefficients, codes, np.ascontiguousarray(decoded)


@dataclass
class Best:
    """The best encoding of each block so far; the seed 0 stands for zeros."""

    error: np.ndarray  # Σ h (w - ŵ)², float32 (N)
    seed: np.ndarray  # int64 (N)
    coefficients: np.ndarray  # int64 (N, P)
    exponent: np.ndarray  # int64 (N), of the scaled block

    @classmethod
    def zeros(cls, fmt: BlockFormat, blocks: Problem) -> "Best":
        """All blocks encoded as zeros."""
        count, error = len(blocks.scaled), np.zeros(len(blocks.scaled), np.float32)
        for c in range(fmt.columns):
            error = fma(blocks.metric[c] * blocks.scaled[:, c], blocks.scaled[:, c], error)
        zeros = np.zeros((count, fmt.states), np.int64)
        return cls(error, np.zeros(count, np.int64), zeros, blocks.base.astype(np.int64))

    def take(self, block: np.ndarray, error: np.ndarray, seed: np.ndarray, q: np.ndarray, exponent: np.ndarray) -> None:
        """Replace encodings by better ones. The candidates are given by the number of their block, error, seed,
        coefficients q and exponent; a pair (block, seed) occurs once."""
        order = np.lexsort((seed, error, block))
        first = order[np.unique(block[order], return_index=True)[1]]
        at, new, old = block[first], error[first], self.error[block[first]]
        first = first[(new < old) | ((new == old) & (seed[first] < self.seed[at]))]
        at = block[first]
        self.error[at], self.seed[at] = error[first], seed[first]
        self.coefficients[at], self.exponent[at] = q[first], exponent[first]


def _states(fmt: BlockFormat, seeds: np.ndarray) -> np.ndarray:
    """Seeds, int64 (N) → their states minus 32768, int64 (N, C, P)."""
    windows = expand(seeds)[:, None] >> np.arange(fmt.columns * fmt.states, dtype=np.uint64) & np.uint64(0xFFFF)
    return windows.astype(np.int64).reshape(-1, fmt.columns, fmt.states) - HALF


@functools.lru_cache(4)
def _tables(fmt: BlockFormat, metric: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The tables of the scan for a metric, given by its bytes: (scaled states u (65,535 + P - 1, C), G⁻¹ (P, P, 65,535)
    of each seed, 0 for excluded seeds). Seeds are in the order of the register's cycle. Since state c·P + p of the seed
    at place n is the state at place n + c·P + p, column p of its matrix U is row n + p of u."""
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
    """The energy bᵀ G⁻¹ b of all seeds for blocks with h·w = `hw` (B, C), float32 (B, 65,535). The other arguments are
    the result of `_tables`."""
    products = hw @ states.T  # one product serves as component p of b for the seed p places before it
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
    """Search the blocks with the numbers `batch` (B), and enter their best encodings into `best`."""
    states, inverse = _tables(fmt, blocks.metric.tobytes())
    energy, norm = _energies(states, inverse, blocks.metric * blocks.scaled[batch]), best.error[batch]

    def evaluate(rows: np.ndarray, places: np.ndarray) -> None:
        """Evaluate pairs of a row of `batch` and a place in the cycle."""
        for first in range(0, len(rows), CANDIDATES):
            part = slice(first, first + CANDIDATES)
            _evaluate(fmt, blocks, batch[rows[part]], cycle()[places[part]].astype(np.int64), refine, best)

    tops = energy.reshape(len(batch), CLASSES, -1).argmax(2) + np.arange(CLASSES) * (SEEDS // CLASSES)
    evaluate(np.repeat(np.arange(len(batch)), CLASSES), tops.ravel())
    # A seed with less energy than this has a larger error than the best one, even if its energy is off by the slack.
    evaluate(*np.nonzero(energy > ((1 - SLACK) * norm - best.error[batch])[:, None]))


def _evaluate(fmt: BlockFormat, blocks: Problem, block: np.ndarray, seed: np.ndarray, refine: bool, best: Best) -> None:
    """Evaluate pairs of a block's number and a seed (N), and enter those that are better into `best`. All
    implementations have the same float32 operations in the same order."""
    w, h, v = blocks.scaled[block], blocks.metric, _states(fmt, seed)
    fit = _solve(w, h, v)
    kept = np.flatnonzero(fit.condition < MOST_CONDITION)
    if not len(kept):
        return
    w, v, block, seed, fit = w[kept], v[kept], block[kept], seed[kept], fit.part(kept)
    lowest = np.maximum(blocks.base[block], LEAST_EXPONENT)
    fitting = np.frexp(np.abs(fit.t).max(1))[1] - 3  # brings the largest coefficient to 4 … 8
    exponent = np.clip(fitting, lowest, blocks.base[block] + 15).astype(np.int64)
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
    """The least-squares solution of N pairs of a block and a seed, with the factors of G = L D Lᵀ."""

    L: np.ndarray  # unit lower triangular, float32 (N, P, P)
    D: np.ndarray  # diagonal, float32 (N, P)
    t: np.ndarray  # unrounded coefficients, float32 (N, P)
    condition: np.ndarray  # trace(G) trace(G⁻¹), float32 (N); infinite where G is singular

    def part(self, kept: np.ndarray) -> "Fit":
        """The solutions with the numbers `kept`."""
        return Fit(self.L[kept], self.D[kept], self.t[kept], self.condition[kept])


def _solve(w: np.ndarray, h: np.ndarray, v: np.ndarray) -> Fit:
    """The solutions for scaled blocks w (N, C) with the metric h (C) and states v (N, C, P), which are V - 32768."""
    count, C, P = v.shape
    u = v.astype(np.float32) * np.float32(2.0**-15)
    G, b = np.zeros((P, P, count), np.float32), np.zeros((P, count), np.float32)
    for c in range(C):
        for i in range(P):
            hu = h[c] * u[:, c, i]
            b[i] = fma(h[c] * w[:, c], u[:, c, i], b[i])
            for j in range(i + 1):
                G[i, j] = fma(hu, u[:, c, j], G[i, j])
    with np.errstate(all="ignore"):  # the caller drops singular matrices by their condition
        L, D, condition = _factor(G)
        for i in range(P):
            for k in range(i):
                b[i] = fma(-L[i, k], b[k], b[i])
        t = np.empty_like(b)
        for i in reversed(range(P)):
            t[i] = b[i] / D[i]
            for j in range(i + 1, P):
                t[i] = fma(-L[j, i], t[j], t[i])
        t = fma(np.float32(-(2.0**-15)), t, t)  # u is v / 32768, and a block decodes with v / 32767
    return Fit(L.transpose(2, 0, 1), D.T, t.T, condition)


def _factor(G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lower triangles of matrices G (P, P, N) → (L (P, P, N), D (P, N), trace(G) trace(G⁻¹) (N)). Until G is
    factored, M is L D."""
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
    """(The integer coefficients q (N, P), int64, within `reach` of the rounded t / 2^exponent with the least cost, the
    costs (N)). The cost is (q 2^exponent - t)ᵀ G (q 2^exponent - t): by how much the error grows over the unrounded
    coefficients."""
    P = fit.t.shape[1]
    offsets = np.array([0, -1, 1])[: 2 * reach + 1]
    unit = np.ldexp(np.float32(1), exponent).astype(np.float32)[:, None]
    middle = np.clip(np.rint(fit.t / unit), -8, 7).astype(np.int64)
    # All combinations of offsets, (P, 3^P); the offset of coefficient P - 1 varies slowest. The first of equal costs
    # is chosen.
    choices = offsets[np.indices((len(offsets),) * P).reshape(P, -1)[::-1]]
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
