"""Native sampling against mlxeff/sampling.py's semantics written out in float64 numpy, and against its distribution."""

import ctypes as C

import numpy as np
import pytest

from cpu_library import BAD_ARGUMENT, BF16, F16, F32, NativeError, call, cast, widen

pytestmark = pytest.mark.usefixtures("level")


def sample(logits, u, temp=1.0, top_k=0, top_p=0.0, min_p=0.0, dtype=F32) -> int:
    token = C.c_int32(-1)
    call(
        "mlxeff_sample",
        logits,
        C.c_int(dtype),
        logits.size,
        float(temp),
        top_k,
        float(top_p),
        float(min_p),
        C.c_double(u),
        C.byref(token),
    )
    return token.value


def kept_tokens(logits, top_k=0, top_p=0.0, min_p=0.0):
    """Top-p, then min-p, then top-k; equal logits rank by id. Also how close the nearest decision on a token was: one
    that sums in fp32 could take otherwise, of a token that is heavy enough to be drawn. (min_p = 1 keeps what equals
    the maximum: there is no rounding in that.)"""
    x = widen(logits)
    order = np.argsort(-x, kind="stable")
    p = np.exp(x - x.max())
    p /= p.sum()
    kept, margin = np.ones(x.size, bool), np.inf
    if 0 < top_p < 1:
        mass_before = np.cumsum(p[order]) - p[order]
        kept[order] = mass_before < np.float32(top_p)
        margin = np.abs(mass_before - np.float32(top_p))[p[order] > 1e-6].min()
    if min_p > 0:
        floor = np.float32(x.max()) + np.log(np.float32(min_p))
        kept &= x >= floor
        margin = min(margin, np.abs(x - floor).min()) if min_p < 1 else margin
    if 0 < top_k < x.size:
        ranked = order[kept[order]]
        kept[ranked[top_k:]] = False
    return kept, margin


def distribution(logits, temp, **filters):
    kept, margin = kept_tokens(logits, **filters)
    x = np.where(kept, widen(logits), -np.inf)
    p = np.exp((x - x.max()) / temp)
    return p / p.sum(), margin


FILTERS = [
    {}, {"top_k": 1}, {"top_k": 7}, {"top_k": 500}, {"top_p": 0.9}, {"top_p": 0.5}, {"top_p": 0.05}, {"top_p": 0.999},
    {"min_p": 0.05}, {"min_p": 1.0}, {"top_p": 0.95, "min_p": 0.02}, {"top_p": 0.9, "top_k": 40},
    {"min_p": 0.01, "top_k": 20},
    {"top_p": 0.8, "min_p": 0.001, "top_k": 300}, {"top_p": 1.0}, {"top_k": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("V", "scale"), [(1, 1), (2, 1), (33, 2), (1000, 3), (5000, 0.01), (49152, 2.5), (151936, 6), (3000, 40)]
)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_token_for_given_u(filters, V, scale, dtype):
    for seed in range(V, V + 10):  # where a filter decides within fp32 rounding, either answer would be right
        rng = np.random.default_rng(seed)
        logits = cast((rng.standard_normal(V) * scale).astype(np.float32), dtype)
        if distribution(logits, 1.0, **filters)[1] >= 1e-6:
            break
    else:
        pytest.fail("ten draws without a decision that is beyond doubt")
    for temp in (1.0, 0.6, 1.7):
        p, _ = distribution(logits, temp, **filters)
        cumulative = np.cumsum(p)
        for u in (0.0, 0.25, 0.5, 0.9, 0.999999, rng.random()):
            want = min(int(np.searchsorted(cumulative, u, side="right")), int(np.flatnonzero(p)[-1]))
            got = sample(logits, u, temp, dtype=dtype, **filters)
            # Sums in fp32 may cross u a neighbour earlier or later when u lies that close to a step.
            close = p[got] > 0 and cumulative[got] - p[got] - 2e-6 <= u <= cumulative[got] + 2e-6
            assert got == want or close, (got, want, u, temp)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_equal_logits_rank_by_id(filters):
    """Many ties, where the filters cut among equals: the kept set is exact, seen by sweeping u."""
    logits = np.repeat(np.array([0.0, 2.0, 1.0, 2.0], np.float32), 30)
    kept, margin = kept_tokens(logits, **filters)
    if margin < 1e-6:
        pytest.skip("the mass at a step equals top_p to rounding")
    seen = {sample(logits, u, 1.0, **filters) for u in (np.arange(2000) + 0.5) / 2000}
    assert seen == set(np.flatnonzero(kept).tolist())


def test_chi_square():
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal(200) * 1.5).astype(np.float32)
    filters = {"top_p": 0.9, "min_p": 0.01, "top_k": 60}
    p, _ = distribution(logits, 0.8, **filters)
    draws = 20000
    counts = np.bincount([sample(logits, u, 0.8, **filters) for u in rng.random(draws)], minlength=200)
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * draws
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = (p > 0).sum() - 1
    assert statistic < freedom + 4.5 * np.sqrt(2 * freedom)  # beyond 4.5 sigma: about 1 in 10^5


def test_greedy_and_extremes():
    x = np.array([1, 7, 7, -np.inf, 3], np.float32)
    assert sample(x, 0.99, temp=0.0) == 1
    assert sample(x, 0.99, temp=1e-7) == 1
    peaked = np.full(3000, -1e5, np.float32)
    peaked[1234] = 1e5
    for filters in FILTERS:
        assert sample(peaked, 0.5, **filters) == 1234
    assert sample(peaked, 0.999999, temp=1e-5) == 1234
    nearly_all_masked = np.full(5000, -np.inf, np.float32)
    nearly_all_masked[[17, 4000]] = 2.0
    for u, want in ((0.0, 17), (0.4, 17), (0.6, 4000), (0.999, 4000)):
        assert sample(nearly_all_masked, u, top_p=0.9999) == want
        assert sample(nearly_all_masked, u, top_k=3) == want


def test_bad_arguments():
    x = np.zeros(4, np.float32)
    bad = [{"temp": -1.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}, {"temp": float("nan")}]
    for arguments in bad:
        with pytest.raises(NativeError) as error:
            sample(x, 0.5, **arguments)
        assert error.value.code == BAD_ARGUMENT
    for u in (1.0, -0.1, float("nan")):
        with pytest.raises(NativeError):
            sample(x, u)
    for value in (np.nan, np.inf):
        x[2] = value
        with pytest.raises(NativeError):
            sample(x, 0.5, top_p=0.9)
    with pytest.raises(NativeError):
        sample(np.full(4, -np.inf, np.float32), 0.5)
