"""Comparisons of results as text: tables in Markdown, or with aligned columns for a terminal."""

from collections.abc import Sequence
from string import ascii_uppercase

from .compare import UNDECIDED, Change, Comparison, summary
from .intervals import LEAST
from .tables import aligned, table
from .words import percent, plain, shown

HEADER = ("arm", "test", "metric", "A", "B", "change", "95 % interval", "verdict")
CAUSE = f"a row needs {LEAST} samples in both files for an interval"


def report(comparisons: Sequence[Comparison], names: Sequence[str], threshold: float, markdown: bool) -> str:
    """The comparisons of the second and later results with the first one; `names` are the names of the files."""
    letters = [letter_of(index) for index in range(len(names))]
    files = [f"{letter}: {name}" for letter, name in zip(letters, names)]
    rule = f"noise: every change whose 95 % interval is not wholly beyond {100 * threshold:g} %"
    parts = [_lines([*files, rule], markdown)]
    for letter, comparison in zip(letters[1:], comparisons):
        if len(comparisons) > 1:
            parts.append(f"{'## ' if markdown else ''}{letter} beside A")
        several = len({each.device for each in comparison.changes}) > 1
        rows = [_row(change, several) for change in comparison.changes]
        draw = table if markdown else aligned
        parts += [draw([letter if name == "B" else name for name in HEADER], rows)]
        lines = [summary(comparison)]
        lines += [CAUSE] if comparison.of(UNDECIDED) else []
        lines += [f"differs: {line}" for line in comparison.differences]
        lines += [f"only in A: {name}" for name in comparison.only_before]
        lines += [f"only in {letter}: {name}" for name in comparison.only_after]
        parts.append(_lines(lines, markdown))
    return "\n\n".join(parts)


def letter_of(index: int) -> str:
    """A short name of the result at this place: A, B, …, Z, AA, BB, …"""
    return ascii_uppercase[index % 26] * (index // 26 + 1)


def _row(change: Change, several: bool) -> list[str]:
    """The cells of a row; `several`: with the device, because there are several."""
    interval = "" if change.low is None else f"{percent(change.low)} to {percent(change.high)}"
    test = plain(f"{change.test} ({change.device})" if several else change.test)
    medians = [shown(value, change.unit) for value in (change.before, change.after)]
    return [plain(change.arm), test, plain(change.metric), *medians, percent(change.change), interval, change.verdict]


def _lines(lines: Sequence[str], markdown: bool) -> str:
    return "\n".join(("- " if markdown else "") + plain(line) for line in lines)
