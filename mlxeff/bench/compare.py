"""`mlxeff bench compare`: results of benchmarks row by row, and which rows became better or worse by more than the
noise of both measurements. Measures nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from ..errors import MlxeffError, one_line, some
from .intervals import LEAST, interval, resampled
from .reader import samples_of
from .schema import KEY, key_of

REGRESSION, IMPROVEMENT, NOISE, UNDECIDED = "regression", "improvement", "within noise", "too few samples"
TIMED = ("ms", "us", "W", "J")  # units of what differs from pass to pass, beside "s" and all units by the second
LONGEST = 60  # characters of a fact in a line about what differs


@dataclass(frozen=True)
class Change:
    """A row that both results have. `before` and `after` are medians, `samples` their numbers of samples; `change` is
    after by before, less 1, with its 95 % interval `low` to `high`. None: not known, as where `before` is 0."""

    arm: str
    device: str
    test: str
    metric: str
    unit: str
    better: str
    before: float
    after: float
    samples: tuple[int, int]
    change: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A result beside the first one: the rows that both have, a line for each difference of machine and settings, and
    the names of rows that only one of them has."""

    changes: list[Change]
    differences: list[str]
    only_before: list[str]
    only_after: list[str]

    def of(self, verdict: str) -> list[Change]:
        """The rows with this verdict."""
        return [each for each in self.changes if each.verdict == verdict]

    def document(self) -> dict:
        """The comparison as in the output of --json."""
        return {
            "rows": [asdict(each) for each in self.changes],
            "differences": self.differences,
            "only_before": self.only_before,
            "only_after": self.only_after,
            "regressions": len(self.of(REGRESSION)),
            "improvements": len(self.of(IMPROVEMENT)),
        }


def compare(before: dict, after: dict, threshold: float, names: tuple[str, str]) -> Comparison:
    """The result `after` beside the result `before`; a change of up to `threshold` (a share) is noise. Raises
    MlxeffError where they have no row in common; `names` are those of the files."""
    first, second = ({key_of(row): row for row in each["results"]} for each in (before, after))
    if not set(first) & set(second):
        rows = [
            f"{name} has {some(map(row_name, each.values())) or 'none'}" for name, each in zip(names, (first, second))
        ]
        raise MlxeffError(f"bench compare: wanted results with a row in common; {'; '.join(rows)}", 600)
    values = samples_of(before), samples_of(after)
    changes = [
        _change(row, second[key], values[0](row), values[1](second[key]), threshold)
        for key, row in first.items()
        if key in second
    ]
    return Comparison(
        changes,
        list(_differences(before, after)),
        [row_name(row) for key, row in first.items() if key not in second],
        [row_name(row) for key, row in second.items() if key not in first],
    )


def row_name(row: dict) -> str:
    """A row in words: "ARM, TEST, METRIC on DEVICE"."""
    return f"{row['arm']}, {row['test']}, {row['metric']} on {row['device']}"


def _change(first: dict, second: dict, before: list[float], after: list[float], threshold: float) -> Change:
    """Two rows beside each other; `before` and `after` are their samples."""
    low = high = None
    old, new = first["median"], second["median"]
    change = 0.0 if old == new else (new - old) / abs(old) if old else None
    if min(len(before), len(after)) >= LEAST:
        medians = resampled(before, 1)
        if (medians != 0).all():
            low, high = interval((resampled(after, 2) - medians) / abs(medians))
    if first["unit"] != second["unit"] or first["better"] != second["better"]:
        raise MlxeffError(
            f"bench compare: {row_name(first)}: wanted one unit, got {first['unit']} ({first['better']} is better) and "
            f"{second['unit']} ({second['better']} is better)"
        )
    counts = first["count"], second["count"]
    verdict = _verdict(first, new - old, change, low, high, threshold)
    row = {name: first[name] for name in (*KEY, "unit", "better")}
    return Change(**row, before=old, after=new, samples=counts, change=change, low=low, high=high, verdict=verdict)


def _verdict(
    row: dict, difference: float, change: float | None, low: float | None, high: float | None, threshold: float
) -> str:
    """Whether a change is more than noise: its whole interval is beyond the threshold. What is the same in each pass,
    such as perplexity, needs no interval: the change itself has to be beyond the threshold."""
    if low is None and (row["unit"] in TIMED or row["unit"] == "s" or "/s" in row["unit"]):
        return UNDECIDED
    ends = (change, change) if low is None else (low, high)
    if not difference or (change is not None and ends[0] <= threshold and ends[1] >= -threshold):
        return NOISE
    return IMPROVEMENT if (difference > 0) == (row["better"] == "higher") else REGRESSION


def _differences(before: dict, after: dict) -> Iterator[str]:
    """A line for each fact about models, machine, settings and arms that differs."""
    prints = [each["settings"].get("fingerprint") for each in (before, after)]
    if prints[0] != prints[1]:
        models = [each["settings"].get("model", "not named") for each in (before, after)]
        described = [f"{model} (fingerprint {_short(print_)})" for model, print_ in zip(models, prints)]
        yield f"different models: {' → '.join(described)}"
    for part in ("card", "settings", "arms", "ceilings"):
        old, new = (dict(_flat(each[part])) for each in (before, after))
        for key in dict.fromkeys([*old, *new]):
            of_arm = part == "arms" and key[0] not in set(before["arms"]) & set(after["arms"])
            if old.get(key) != new.get(key) and key != ("fingerprint",) and not of_arm:
                yield f"{part}: {'.'.join(key)}: {_short(old.get(key))} → {_short(new.get(key))}"
    loads = [median(found) if (found := _loads(each)) else None for each in (before, after)]
    if None not in loads and abs(loads[0] - loads[1]) > 0.5:
        yield f"samples: median load average before a pass: {loads[0]:.2f} → {loads[1]:.2f}"


def _loads(document: dict) -> list[float]:
    return [each["load_average"] for each in document["samples"] if isinstance(each.get("load_average"), int | float)]


def _flat(value: dict, path: Sequence[str] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(Names of the keys, value) of each entry of a dict of dicts that is no dict."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, (*path, key))
        else:
            yield (*path, key), entry


def _short(value: object) -> str:
    return "none" if value is None else one_line(str(value), LONGEST)


def summary(comparison: Comparison) -> str:
    """How many rows became worse, better, or neither, as one sentence."""
    counts = [(len(comparison.of(verdict)), verdict) for verdict in (REGRESSION, IMPROVEMENT, NOISE, UNDECIDED)]
    plural = {REGRESSION: "regressions", IMPROVEMENT: "improvements", NOISE: NOISE, UNDECIDED: "with too few samples"}
    words = [f"{n} {word if n == 1 and word in (REGRESSION, IMPROVEMENT) else plural[word]}" for n, word in counts if n]
    return f"{len(comparison.changes)} rows: {', '.join(words)}"


def total(comparisons: Iterable[Comparison], verdict: str) -> int:
    """How many rows of all comparisons have this verdict."""
    return sum(len(each.of(verdict)) for each in comparisons)
