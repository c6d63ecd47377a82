"""Which plots follow from the rows of a result, as data: a plot is made of series of points, or of bars. Draws nothing.

A metric that was measured at several prompt lengths or depths is a plot of lines; every other metric is one of bars.
Then come ratios, published numbers, shares of the ceiling, and every sample over the rounds.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ..compare import Comparison
from ..intervals import LEAST
from ..reader import samples_of
from ..schema import KEY
from ..words import SHORT, digits, in_order, metric_name, scale, shown, title_of

MOST = 36  # bars or intervals in a plot; the table has them all
AXES = {  # field of a row → (what it is in a title, what it is on an axis)
    "tokens": ("prompt length", "tokens of the prompt"),
    "depth": ("depth", "tokens in the KV cache"),
}
DECODED = ("answer length", "tokens of the answer")  # of a test that decodes, in place of "tokens"


@dataclass(frozen=True)
class Point:
    """A number with its interval `low` to `high`, where there is one. `x`: its place in a plot of lines. `group`: its
    test, in a plot of bars."""

    value: float
    low: float | None = None
    high: float | None = None
    x: float = 0
    group: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot. `series` maps names of arms to points, `kind` is "lines", "bars", "ratios" or "rounds"; `value_axis` and
    `x_axis` say what is on them. `note`: what is left out, or how to read it."""

    name: str
    title: str
    kind: str
    series: dict[str, list[Point]]
    value_axis: str
    x_axis: str = ""
    note: str = ""

    @property
    def described(self) -> str:
        """All points in words, for those who do not see the plot."""
        parts = []
        for arm, points in self.series.items():
            each = [f"{point.group or f'{point.x:g}'}: {digits(point.value)}" for point in points]
            parts.append(f"{arm}: {', '.join(each)}")
        return f"{self.title}. {self.value_axis}. {'; '.join(parts)}."


def plots(document: dict) -> list[Plot]:
    """The plots of a result, the most telling ones first. Their names are unique, and good in file names and ids."""
    found: dict[str, Plot] = {}
    for plot in _all(document):
        slug = re.sub(r"[^a-z0-9]+", "-", plot.name.lower()).strip("-")
        name = next(
            name for count in itertools.count(1) if (name := f"{slug}-{count}" if count > 1 else slug) not in found
        )
        found[name] = replace(plot, name=name)
    return list(found.values())


def _all(document: dict) -> list[Plot]:
    rows, found = document["results"], []
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for device in devices:
        here = [row for row in rows if row["device"] == device]
        also = f" on {device}" if len(devices) > 1 else ""
        for metric in in_order(row["metric"] for row in here):
            of_metric = [row for row in here if row["metric"] == metric]
            found += _metric(metric, of_metric, f"{device}-{metric}", also)
        found += _ratios([each for each in document["ratios"] if each["device"] == device], here, device, also)
        found += _shares(here, device, also)
        found += _rounds(here, samples_of(document), device, also)
    return [*found, *_published(document["published"])]


def _metric(metric: str, rows: list[dict], name: str, also: str) -> Iterator[Plot]:
    """The plots of one metric on one device."""
    factor, unit = scale(rows[0]["unit"], max(abs(row["median"]) for row in rows))
    better = rows[0]["better"]
    axis = f"{unit or metric_name(metric)}, {better} is better"
    left = list(rows)
    for key, words in AXES.items():
        other = "tokens" if key == "depth" else "depth"
        facets: dict[tuple, list[dict]] = {}
        for row in left:
            if isinstance(row.get(key), int | float):
                facets.setdefault((row.get("batch"), row.get(other)), []).append(row)
        for (batch, held), chosen in facets.items():
            if len({row[key] for row in chosen}) < 2:
                continue
            left = [row for row in left if row not in chosen]
            several = sum(len({row[key] for row in each}) > 1 for each in facets.values()) > 1
            what, label = DECODED if key == "tokens" and chosen[0]["test"].startswith("tg") else words
            title = f"{title_of(metric)} by {what}{also}"
            if batch is not None and batch != 1:
                title += f", batch {batch}"
            if several and held:
                title += f", {held} {'deep' if other == 'depth' else 'tokens'}"
            series = _series(chosen, lambda row: _point(row, factor, x=row[key]))  # noqa: B023, used at once
            ordered = {arm: sorted(points, key=lambda point: point.x) for arm, points in series.items()}
            yield Plot(f"{name}-by-{key}-{batch}-{held}", title, "lines", ordered, axis, label)
    if left:
        kept, note = _most(left)
        series = _series(kept, lambda row: _point(row, factor, group=row["test"]))
        yield Plot(name, f"{title_of(metric)}{also}", "bars", series, axis, note=note)


def _point(row: dict, factor: float, **place) -> Point:
    ends = [None if row.get(name) is None else row[name] * factor for name in ("low", "high")]
    return Point(row["median"] * factor, *ends, **place)


def _series(rows: Iterable[dict], point: Callable[[dict], Point]) -> dict[str, list[Point]]:
    """Arm → the points of its rows."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(point(row))
    return found


def _most(rows: list[dict]) -> tuple[list[dict], str]:
    """(The first MOST of the rows, a note where that is not all of them)."""
    note = f"The first {MOST} of {len(rows)} rows; the table has all of them." if len(rows) > MOST else ""
    return rows[:MOST], note


def _ratios(ratios: list[dict], rows: list[dict], device: str, also: str) -> Iterator[Plot]:
    """A plot for each arm to which others are compared."""
    better = {row["metric"]: row["better"] for row in rows}
    known = [each | {"better": better[each["metric"]]} for each in ratios if each["metric"] in better]
    for index, against in enumerate(dict.fromkeys(each["against"] for each in known)):
        chosen = [each for each in known if each["against"] == against]
        yield from _gains(chosen, f"{device}-ratios-{index}", f"Against {against}{also}", against)


def changes(comparison: Comparison, letter: str) -> list[Plot]:
    """The plot of a result beside the first one; none where nothing can be divided."""
    ratios, several = [], len({each.device for each in comparison.changes}) > 1
    for each in comparison.changes:
        if each.change is not None:
            numbers = {"ratio": each.change, "low": each.low, "high": each.high}
            place = {key: getattr(each, key) for key in (*KEY, "better")}
            place["test"] += f" {each.device}" if several else ""
            ratios.append(place | {name: None if value is None else 1 + value for name, value in numbers.items()})
    return list(_gains(ratios, "changes", f"{letter} against A", "A"))


def _gains(ratios: list[dict], name: str, title: str, against: str) -> Iterator[Plot]:
    """A plot of ratios. Where less is better they are inverted, so that above 1 is better everywhere; what follows from
    another metric of the same test is left out."""
    timed = {(each["arm"], each["test"]) for each in ratios if each["metric"] == "ttft_s"}
    known = [each for each in ratios if each["metric"] != "prompt_tps" or (each["arm"], each["test"]) not in timed]
    order = in_order(each["metric"] for each in known)
    known = sorted((each for each in known if each["ratio"] > 0), key=lambda each: order.index(each["metric"]))
    kept, note = _most(known)
    if kept:
        axis = f"times as good as {against}: above 1 is better"
        yield Plot(name, title, "ratios", _series(kept, _gain), axis, note=note)


def _gain(ratio: dict) -> Point:
    """A ratio as a point, inverted where less is better."""
    numbers = [ratio["ratio"], ratio.get("low"), ratio.get("high")]
    if ratio["better"] == "lower":
        value, low, high = (1 / number if number else None for number in numbers)
        numbers = [value, high, low]
    return Point(*numbers, group=f"{ratio['test']} {SHORT.get(ratio['metric'], ratio['metric'])}")


def _shares(rows: list[dict], device: str, also: str) -> Iterator[Plot]:
    """The shares of the machine's ceiling."""
    having = [row for row in rows if row.get("share_of_ceiling") is not None]
    if having:
        kept, note = _most(having)
        names = {row["metric"] for row in having}
        series = _series(
            kept,
            lambda row: Point(
                100 * row["share_of_ceiling"], group=row["test"] + (f", {row['metric']}" if len(names) > 1 else "")
            ),
        )
        title = f"Share of the machine's ceiling{also}"
        yield Plot(f"{device}-ceiling", title, "bars", series, "% of the ceiling, higher is better", note=note)


def _rounds(rows: list[dict], values: Callable[[dict], list[float]], device: str, also: str) -> Iterator[Plot]:
    """Every sample by the median of its row, over the rounds; of what follows from another metric, not."""
    metrics = in_order(row["metric"] for row in rows)
    for metric in metrics:
        if (metric == "prompt_tps" and "ttft_s" in metrics) or metric.endswith("_bytes"):
            continue
        series: dict[str, list[Point]] = {}
        for row in rows:
            found = values(row) if row["metric"] == metric else []
            if len(found) >= LEAST and row["median"]:
                points = [Point(v / row["median"], x=i + 1, group=row["test"]) for i, v in enumerate(found)]
                series.setdefault(row["arm"], []).extend(points)
        if series:
            note = "A line for each test. A slope or a step is a disturbance of the machine."
            title = f"{title_of(metric)}: every sample{also}"
            yield Plot(f"{device}-{metric}-rounds", title, "rounds", series, "sample by median", "round", note)


def _published(lines: list[dict]) -> Iterator[Plot]:
    """Our numbers by published ones, where both are known."""
    both = [each for each in lines if each.get("ours") and each.get("theirs") and not isinstance(each["theirs"], str)]
    if both:
        kept, note = _most(both)
        series = {"ours by published": [Point(each["ours"] / each["theirs"], group=each["what"]) for each in kept]}
        conditions = "Machines and software differ: the table has each source."
        axis = "our number divided by the published one"
        yield Plot("published", "Our numbers by published ones", "ratios", series, axis, note=f"{conditions} {note}")


def headline(document: dict, metrics: Iterable[str]) -> list[tuple[str, str, str, list[tuple[str, str, str]]]]:
    """The numbers to see first, for each of the `metrics` that was measured, at the test with the longest prompt or the
    greatest depth: (metric, test, device, [(arm, value, ratio to another arm)], the best arm first)."""
    found = []
    for metric in metrics:
        rows = [row for row in document["results"] if row["metric"] == metric]
        for device in dict.fromkeys(row["device"] for row in rows):
            here = [row for row in rows if row["device"] == device]
            first = max(here, key=lambda row: (row.get("depth") or 0, row.get("tokens") or 0, -(row.get("batch") or 1)))
            chosen = [row for row in here if row["test"] == first["test"]]
            chosen.sort(key=lambda row: row["median"], reverse=first["better"] == "higher")
            arms = [(row["arm"], shown(row["median"], row["unit"]), _against(row, document)) for row in chosen]
            found.append((metric, first["test"], device, arms))
    return found


def _against(row: dict, document: dict) -> str:
    """The ratio of a row to another arm in words, "" where there is none."""
    for each in document["ratios"]:
        if all(each[key] == row[key] for key in ("arm", "device", "test", "metric")):
            ends = f" ({digits(each['low'])} to {digits(each['high'])})" if each.get("low") is not None else ""
            return f"{digits(each['ratio'])} × that of {each['against']}{ends}"
    return ""
