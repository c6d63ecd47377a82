"""Plots as figures of matplotlib, as wide as a phone's screen: the page enlarges them on larger ones."""

import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..words import digits, plain
from .plots import Plot, Point
from .svg import GRID, INK, PAPER, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.9  # inches, of 72 units each in the SVG
MARKERS, DASHES, HATCHES = "osD^vPX*", ("-", "--", ":", "-."), ("", "///", "...", "xxx")
BAR, LEGEND = 0.28, 0.22  # inches of a bar and of an entry of the legend
NAME, TEST = 48, 22  # characters of an arm in a legend, and of a line of a test on an axis


def draw(plot: Plot, colours: dict[str, int]) -> "Figure":
    """The figure of a plot; `colours` maps arms to the numbers of their colours, so that an arm looks the same
    everywhere. To be called inside `svg.style`."""
    from matplotlib.figure import Figure

    kind: Callable[[Plot, Axes, dict[str, int]], Iterable] = KINDS[plot.kind]
    entries = len(plot.series) if len(colours) > 1 and colours.keys() >= plot.series.keys() else 0
    flat = plot.kind in ("bars", "ratios")
    bars = sum(map(len, plot.series.values())) + 0.6 * len(_tests(plot))
    height = (0.9 + BAR * bars if flat else 2.9) + LEGEND * entries
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    handles = kind(plot, axes, colours)
    if entries:
        names = ["\u2009" + plain(arm, NAME) for arm in plot.series]  # matplotlib hides names that begin with "_"
        figure.legend(handles, names, loc="outside lower left", labelspacing=0.3, handlelength=1.6)
    return figure


def titled(figure: "Figure", title: str) -> "Figure":
    """The same figure with a title of its own, as a picture needs that stands alone."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(plain(title), 50)
    figure.set_size_inches(width, height + 0.22 * len(lines))
    figure.suptitle("\n".join(lines), fontsize=12, x=0.02, ha="left")
    return figure


def _colour(arm: str, colours: dict[str, int]) -> str:
    return SERIES[colours.get(arm, 0) % len(SERIES)]


def _look(arm: str, colours: dict[str, int]) -> dict:
    """Colour, marker and dash of an arm: beside the colour another cue, for those who do not tell colours apart."""
    number = colours.get(arm, 0)
    dash = DASHES[number // len(SERIES) % len(DASHES)]
    return {"color": _colour(arm, colours), "marker": MARKERS[number % len(MARKERS)], "linestyle": dash}


def _tests(plot: Plot) -> list[str]:
    return list(dict.fromkeys(point.group for points in plot.series.values() for point in points))


def _lines(plot: Plot, axes: "Axes", colours: dict[str, int]) -> list:
    """A line for each arm over prompt length or depth, with intervals."""
    handles, every = [], [point for points in plot.series.values() for point in points]
    for arm, points in plot.series.items():
        spread = _errors(points)
        look = _look(arm, colours)
        drawn = axes.errorbar(
            [p.x for p in points], [p.value for p in points], spread, **look, capsize=3, markersize=5, linewidth=1.8
        )
        handles.append(drawn)
    places = sorted({point.x for point in every})
    if places[0] > 0 and places[-1] / places[0] >= 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(_apart(places, axes.get_xscale() == "log"), minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    values = [point.value for point in every]
    if min(values) > 0 and max(values) / min(values) >= 20:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(min(0, 1.1 * min(values)), 1.08 * max(p.high or p.value for p in every) or 1)
    axes.grid(axis="y")
    axes.set_xlabel(plot.x_axis)
    _name_values(plot, axes)
    return handles


def _apart(places: list[float], log: bool) -> list[float]:
    """The places that have room for a label, the last one among them."""
    size = (lambda a, b: b / a >= 1.6) if log else (lambda a, b: b - a >= 0.13 * (places[-1] - places[0]))
    kept = [places[-1]]
    for place in reversed(places[:-1]):
        if size(place, kept[-1]):
            kept.append(place)
    return kept[::-1]


def _errors(points: list[Point]) -> list[list[float]] | None:
    """The lengths of intervals below and above their points; None where no point has one."""
    if all(point.low is None or point.high is None for point in points):
        return None
    below = [0 if p.low is None else max(0, p.value - p.low) for p in points]
    return [below, [0 if p.high is None else max(0, p.high - p.value) for p in points]]


def _name_values(plot: Plot, axes: "Axes") -> None:
    """The name of the value axis above it, where it does not have to be turned."""
    axes.set_title(
        textwrap.fill(plain(plot.value_axis), 48), loc="left", fontsize=11, color=axes.xaxis.label.get_color()
    )


def _rows(plot: Plot) -> tuple[list[tuple[float, str, Point]], dict[str, float]]:
    """((place from above, arm, point) of each bar, test → the middle of its bars): bars of a test are together."""
    found, middles, place = [], {}, 0.0
    for test in _tests(plot):
        first = place
        for arm, points in plot.series.items():
            for point in points:
                if point.group == test:
                    found.append((place, arm, point))
                    place += 1
        middles[test] = (first + place - 1) / 2
        place += 0.6
    return found, middles


def _flat(plot: Plot, axes: "Axes", middles: dict[str, float], last: float) -> None:
    """Axes of horizontal bars or intervals from 0 to `last`, with the tests on the left."""
    axes.set_yticks(list(middles.values()), [textwrap.fill(plain(test, 2 * TEST), TEST) for test in middles])
    axes.tick_params(axis="y", length=0)
    axes.spines.left.set_visible(False)
    axes.set_ylim(last + 0.7, -0.7)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(textwrap.fill(plain(plot.value_axis), 32))


def _bars(plot: Plot, axes: "Axes", colours: dict[str, int]) -> list:
    """A bar for each arm at each test, with its value at the end."""
    rows, middles = _rows(plot)
    handles = {}
    for place, arm, point in rows:
        hatch = HATCHES[colours.get(arm, 0) // len(SERIES) % len(HATCHES)]
        bar = axes.barh(place, point.value, 0.78, color=_colour(arm, colours), hatch=hatch, edgecolor=PAPER)
        handles.setdefault(arm, bar)
        if None not in (point.low, point.high):
            axes.errorbar(point.value, place, xerr=_only(point), color=INK, capsize=2, linewidth=1)
        end = max(point.value, point.high or 0)
        axes.annotate(digits(point.value), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=10)
    _flat(plot, axes, middles, rows[-1][0])
    largest = max(max(point.value, point.high or 0) for _, _, point in rows)
    axes.set_xlim(min(0, 1.15 * min(point.value for _, _, point in rows)), 1.15 * largest or 1)
    return [handles[arm] for arm in plot.series]


def _only(point: Point) -> list[list[float]]:
    return [[max(0, point.value - point.low)], [max(0, point.high - point.value)]]


def _ratios(plot: Plot, axes: "Axes", colours: dict[str, int]) -> list:
    """A mark with its interval for each ratio, and a line at 1."""
    rows, middles = _rows(plot)
    handles = {}
    for place, arm, point in rows:
        look = _look(arm, colours) | {"linestyle": "none"}
        spread = None if None in (point.low, point.high) else _only(point)
        handles.setdefault(arm, axes.errorbar(point.value, place, xerr=spread, **look, capsize=3, markersize=5))
        text = f"{digits(point.value)} ×"
        axes.annotate(text, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=10)
    axes.axvline(1, color=INK, linewidth=1.2, zorder=1)
    _flat(plot, axes, middles, rows[-1][0])
    ends = [each for _, _, point in rows for each in (point.low, point.high, point.value) if each is not None] + [1]
    room = max(ends) - min(ends) or 1
    axes.set_xlim(min(ends) - 0.08 * room, max(ends) + 0.28 * room)
    return [handles[arm] for arm in plot.series]


def _rounds(plot: Plot, axes: "Axes", colours: dict[str, int]) -> list:
    """The samples of each test as a thin line over the rounds."""
    handles = {}
    for arm, points in plot.series.items():
        look = _look(arm, colours)
        for test in dict.fromkeys(point.group for point in points):
            chosen = [point for point in points if point.group == test]
            (line,) = axes.plot(
                [p.x for p in chosen], [p.value for p in chosen], **look, linewidth=1, markersize=4, alpha=0.75
            )
            handles.setdefault(arm, line)
    axes.axhline(1, color=GRID, linewidth=1.2, zorder=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    axes.set_xlabel(plot.x_axis)
    _name_values(plot, axes)
    return list(handles.values())


KINDS = {"lines": _lines, "bars": _bars, "ratios": _ratios, "rounds": _rounds}
