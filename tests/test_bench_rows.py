"""The rows of a benchmark's result: statistics, intervals, ratios, shares of a ceiling. No model; some 0.1 s."""

import numpy as np
import pytest

from mlxeff.bench.intervals import interval_of as interval
from mlxeff.bench.points import Point
from mlxeff.bench.rows import METRICS, ratios, rows, statistics

POINT = Point(1, 8)


def sample(arm, number, point=POINT, **values):
    return point.fields(arm, "cpu") | {"round": number, "values": values, "load_average": 0.0}


def test_statistics_have_known_answers():
    found = statistics([4.0, 1.0, 2.0])
    assert (found["count"], found["median"], found["min"], found["max"]) == (3, 2, 1, 4)
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["stddev"] == pytest.approx(np.sqrt(7 / 3))
    assert (found["p50"], found["p90"], found["p99"]) == (2, None, None)  # of three samples there is no 90th percentile
    many = statistics(np.arange(101))
    assert (many["p50"], many["p90"], many["p99"]) == (50, 90, 99)
    one = statistics([3.0])
    assert (one["median"], one["stddev"], one["low"], one["high"]) == (3, None, None, None)


def test_an_interval_is_that_of_the_median():
    """Of many samples of one distribution, it is near the textbook's: 1.2533 · 1.96 standard errors on each side."""
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(1.2533 * 1.96 * 2 / np.sqrt(400), rel=0.25)
    assert low < np.median(values) < high
    assert interval(values) == (low, high)  # the seed is fixed
    assert interval([1.0, 2.0]) == (None, None)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    drawn = np.random.default_rng(2)
    hits = [low <= 0 <= high for low, high in (interval(drawn.normal(0, 1, 30)) for _ in range(200))]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_each_metric_of_each_arm_and_test_is_a_row():
    deep = Point(1, 4, 16, "tg")
    made = [sample(arm, n, ttft_s=1.0 + n, peak_bytes=7.0) for n in range(3) for arm in "ab"]
    made += [sample("a", n, deep, decode_tps=5.0) for n in range(2)]
    found = rows(made)
    assert [(row["arm"], row["test"], row["metric"]) for row in found] == [
        *(("a", "pp8", "ttft_s"), ("a", "pp8", "peak_bytes"), ("b", "pp8", "ttft_s"), ("b", "pp8", "peak_bytes")),
        ("a", "tg4 @ d16", "decode_tps"),
    ]
    first, last = found[0], found[-1]
    assert (first["unit"], first["better"], first["count"], first["median"]) == ("s", "lower", 3, 2)
    assert (last["batch"], last["tokens"], last["depth"], last["better"]) == (1, 4, 16, "higher")
    assert (last["bytes_moved"], last["share_of_ceiling"]) == (None, None)
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower"}


def test_shares_of_a_ceiling_have_known_answers():
    ceilings = {"cpu": {"read_gbps": 20.0, "gflops": 400.0, "how": ""}}
    made = sample("a", 0, decode_tps=50.0, prompt_tps=1000.0, gbps=5.0, gflops=100.0, ttft_s=1.0)
    made |= {"bytes_moved": 0.2e9, "flops": 0.3e9}
    found = {row["metric"]: row["share_of_ceiling"] for row in rows([made], ceilings)}
    assert found == pytest.approx({"decode_tps": 0.5, "prompt_tps": 0.75, "gbps": 0.25, "gflops": 0.25, "ttft_s": None})
    assert all(row["share_of_ceiling"] is None for row in rows([made]))


def test_a_ratio_is_that_of_medians_of_the_same_rounds():
    """Round 0 of the first arm is missing: the other's, a disturbance, does not count."""
    made = [sample("base", 0, ttft_s=100.0)]
    made += [sample("base", n, ttft_s=float(n)) for n in (1, 2, 3)]
    made += [sample("new", n, ttft_s=float(n) / 2) for n in (1, 2, 3)]
    made += [sample("new", 1, Point(1, 9), ttft_s=1.0)]
    [found] = ratios(made, "base")
    assert (found["arm"], found["against"], found["test"], found["metric"]) == ("new", "base", "pp8", "ttft_s")
    assert (found["ratio"], found["low"], found["high"], found["rounds"]) == (0.5, 0.5, 0.5, 3)


def test_a_ratio_of_noise_has_an_interval_around_one():
    drawn = np.random.default_rng(3)
    made = [sample(arm, n, decode_tps=drawn.normal(50, 5)) for n in range(20) for arm in ("base", "new")]
    [found] = ratios(made, "base")
    assert found["low"] < 1 < found["high"]
    assert found["low"] < found["ratio"] < found["high"]
    assert ratios(made, "another") == []
