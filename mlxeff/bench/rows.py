"""The rows of a result: for each arm, device and test the statistics of each metric over its samples, with intervals
by bootstrap; and the ratios of two arms. Pure functions on samples, which know no model and measure nothing.

A sample is {"arm", "device", "test", "batch", "tokens", "depth", "round", "values": {metric: number}, "load_average"},
and where they are known "bytes_moved", of memory read for each decoded token, "flops", for each prompt token,
and "errors" {metric: standard error}, of which a single sample has its interval. What a benchmark does not have is left
out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .intervals import LEAST, drawn, interval, interval_of

NORMAL = 1.96  # standard errors on each side of a normal distribution that cover it
# Percentile → the least number of samples of which it is given: fewer have none above it but the largest.
PERCENTILES = {50: 1, 90: 10, 99: 100}
IDENTITY = ("arm", "device", "test")
SIZES = ("batch", "tokens", "depth")


class Metric(NamedTuple):
    """A metric's unit and which of two values is the better one, "higher" or "lower"."""

    unit: str
    better: str


METRICS = {
    "ttft_s": Metric("s", "lower"),
    "prompt_tps": Metric("tok/s", "higher"),
    "decode_tps": Metric("tok/s", "higher"),
    "peak_bytes": Metric("bytes", "lower"),
    "acceptance": Metric("share", "higher"),
    "gbps": Metric("GB/s", "higher"),
    "gflops": Metric("GFLOP/s", "higher"),
    "seconds": Metric("s", "lower"),
    "ppl": Metric("", "lower"),
    "kl": Metric("nats/token", "lower"),
    "agreement": Metric("share", "higher"),
}


def rows(samples: Iterable[dict], ceilings: Mapping[str, Mapping] | None = None) -> list[dict]:
    """A row for each metric of each arm, device and test, in the order of the samples.

    ceilings: device → {"read_gbps", "gflops"}, of which rows get their share.
    """
    found: dict[tuple, list[dict]] = {}
    for sample in samples:
        found.setdefault(tuple(sample[name] for name in IDENTITY), []).append(sample)
    ceilings = ceilings or {}
    return [
        _row(identity, metric, group, ceilings.get(identity[1], {}))
        for identity, group in found.items()
        for metric in dict.fromkeys(name for sample in group for name in sample["values"])
    ]


def _row(identity: tuple, metric: str, samples: Sequence[dict], ceiling: Mapping) -> dict:
    values = [sample["values"][metric] for sample in samples if metric in sample["values"]]
    moved = samples[0].get("bytes_moved") if metric in ("decode_tps", "gbps") else None
    found = statistics(values)
    if len(values) == 1 and (error := samples[0].get("errors", {}).get(metric)) is not None:
        found |= {"low": values[0] - NORMAL * error, "high": values[0] + NORMAL * error}
    return {
        **dict(zip(IDENTITY, identity, strict=True)),
        **{name: samples[0][name] for name in SIZES if name in samples[0]},
        "metric": metric,
        **METRICS[metric]._asdict(),
        **found,
        "bytes_moved": moved,
        "share_of_ceiling": _share(metric, found["median"], moved, samples[0].get("flops"), ceiling),
    }


def statistics(values: Sequence[float]) -> dict:
    """Count, median, mean, standard deviation (of a sample), extremes, percentiles (None where the samples are too
    few, see PERCENTILES) and the interval of the median."""
    array = np.asarray(values, float)
    low, high = interval_of(array)
    return {
        "count": len(array),
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "stddev": float(array.std(ddof=1)) if len(array) > 1 else None,
        "min": float(array.min()),
        "max": float(array.max()),
        **{f"p{p}": float(np.percentile(array, p)) if len(array) >= n else None for p, n in PERCENTILES.items()},
        "low": low,
        "high": high,
    }


def _share(metric: str, median: float, moved: float | None, flops: float | None, ceiling: Mapping) -> float | None:
    """The share of what the machine can do at most: of its memory bandwidth or its arithmetic."""
    reads, products = ceiling.get("read_gbps"), ceiling.get("gflops")
    if metric == "gbps" and reads:
        return median / reads
    if metric == "gflops" and products:
        return median / products
    if metric == "decode_tps" and reads and moved:
        return moved * median / 1e9 / reads
    if metric == "prompt_tps" and products and flops:
        return flops * median / 1e9 / products
    return None


def ratios(samples: Iterable[dict], against: str) -> list[dict]:
    """The ratio of each arm to the arm `against`, for each device, test and metric that both have: the median of the
    arm's values divided by that of the other's, over the rounds that both have, with its interval, for which whole
    rounds are drawn. Arms take turns in a round, so a disturbance of the machine hits both."""
    found: dict[tuple, dict[str, dict[int, float]]] = {}
    for sample in samples:
        for metric, value in sample["values"].items():
            place = found.setdefault((sample["device"], sample["test"], metric), {})
            place.setdefault(sample["arm"], {})[sample["round"]] = value
    return [
        {"arm": arm, "against": against, "device": device, "test": test, "metric": metric, **ratio}
        for (device, test, metric), arms in found.items()
        for arm in arms
        if arm != against and against in arms and (ratio := _ratio(arms[arm], arms[against]))
    ]


def _ratio(mine: dict[int, float], theirs: dict[int, float]) -> dict | None:
    """The ratio over the rounds of both; None without one, or where the other median is 0."""
    both = sorted(set(mine) & set(theirs))
    ours, others = (np.array([each[number] for number in both], float) for each in (mine, theirs))
    if not both or not np.median(others):
        return None
    low, high = None, None
    if len(both) >= LEAST:
        rounds = drawn(len(both))
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(np.median(ours[rounds], axis=1) / np.median(others[rounds], axis=1))
    return {"ratio": float(np.median(ours) / np.median(others)), "low": low, "high": high, "rounds": len(both)}
