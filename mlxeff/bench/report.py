"""A document of `mlxeff bench` as text: Markdown for people, CSV and JSON lines for other programs. Reads nothing but
the document (see `result`), and measures nothing."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from ..names import json_text
from .tables import card_lines, table

FORMATS = ("md", "csv", "json", "jsonl")
# Entries of card and settings that each line of CSV and JSON lines begins with.
COMMON = (("card", "cpu"), ("card", "cpu_backend"), ("card", "threads"), ("card", "mlxeff"), ("card", "mlx"))
PERCENTILES = ("p90", "p99")
TITLES = {"ttft_s": "TTFT", "prompt_tps": "prompt", "decode_tps": "decode", "peak_bytes": "peak memory"}


def text(document: dict, form: str) -> str:
    """The document in one of FORMATS but "json"."""
    return {"md": markdown, "csv": comma_separated, "jsonl": json_lines}[form](document)


def markdown(document: dict) -> str:
    """Machine and settings as lines, tables of the rows, of ratios and of published numbers, and what was skipped."""
    parts = [card_lines(document["card"] | document["settings"])]
    parts += [_ceilings(document["ceilings"]), _rows(document["results"]), _ratios(document["ratios"])]
    parts += [_published(document["published"]), *(f"skipped: {line}" for line in document["skipped"])]
    return "\n\n".join(part for part in parts if part)


def _ceilings(ceilings: dict[str, dict]) -> str:
    rows = [
        [device, f"{each['read_gbps']:.1f}", f"{each['gflops']:.0f}", each["how"]] for device, each in ceilings.items()
    ]
    return table(["ceiling of the", "reads, GB/s", "GFLOP/s", "measured with"], rows)


def _rows(rows: Iterable[dict]) -> str:
    """A line for each arm, device and test, a column for each metric: the median, the interval in brackets."""
    return _pivot(rows, ("arm", "device", "test"), _cell)


def _pivot(entries: Iterable[dict], identity: Sequence[str], cell: Callable[[dict], str]) -> str:
    """A table with a line for each value of the fields `identity`, and a column for each metric."""
    found: dict[tuple, dict[str, str]] = {}
    for each in entries:
        found.setdefault(tuple(each[name] for name in identity), {})[each["metric"]] = cell(each)
    metrics = list(dict.fromkeys(metric for cells in found.values() for metric in cells))
    lines = [[*key, *(cells.get(metric, "") for metric in metrics)] for key, cells in found.items()]
    return table([*identity, *(TITLES.get(metric, metric) for metric in metrics)], lines)


def _cell(row: dict) -> str:
    """ "120.3 tok/s (118.0 tok/s – 121.9 tok/s), 81% of ceiling", as far as it is known."""
    unit = row["unit"]
    words = [amount(row["median"], unit)]
    if row["low"] is not None and row["low"] != row["high"]:
        words[0] += f" ({amount(row['low'], unit)} – {amount(row['high'], unit)})"
    words += [f"{p} {amount(row[p], unit)}" for p in PERCENTILES if row[p] is not None and row["metric"] == "ttft_s"]
    if row["share_of_ceiling"] is not None:
        words.append(f"{row['share_of_ceiling']:.0%} of ceiling")
    return ", ".join(words)


def amount(value: float | None, unit: str) -> str:
    """A number with its unit; "" for None."""
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value / 1e9:.3f} GB"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "s" and value < 0.1:
        return f"{value * 1e6:.4g} µs" if value < 1e-3 else f"{value * 1e3:.4g} ms"
    return f"{value:.4g} {unit}".strip() if value < 1e4 else f"{value:.0f} {unit}".strip()


def _ratios(ratios: Iterable[dict]) -> str:
    """Each arm by the one that it is compared with."""
    shown = [each | {"ratio of": each["arm"], "to": each["against"]} for each in ratios]
    return _pivot(shown, ("ratio of", "to", "device", "test"), _ratio)


def _ratio(each: dict) -> str:
    interval = "" if each["low"] is None else f" ({each['low']:.3f} – {each['high']:.3f})"
    return f"{each['ratio']:.3f}{interval}"


def _published(lines: Iterable[dict]) -> str:
    """Published numbers beside ours, and under them where they come from."""
    lines = list(lines)
    numbers = {source: str(n) for n, source in enumerate(dict.fromkeys(line["source"] for line in lines), 1)}
    rows = [
        [
            line["what"],
            line["arm"],
            line["device"] or "",
            line["test"],
            "not measured" if line["ours"] is None else amount(line["ours"], line["unit"]),
            _theirs(line),
            line["label"],
            numbers[line["source"]],
        ]
        for line in lines
    ]
    shown = table(["", "arm", "device", "test", "here", "theirs", "label", "source"], rows)
    return "\n\n".join([shown, "\n".join(f"source {n}: {source}" for source, n in numbers.items())]) if rows else ""


def _theirs(line: dict) -> str:
    theirs = line["theirs"]
    if theirs is None:
        return "not printed"
    return theirs if isinstance(theirs, str) else amount(theirs, line["unit"])


def _common(document: dict) -> dict:
    return {name: document[part][name] for part, name in COMMON}


def comma_separated(document: dict) -> str:
    """The rows as CSV; the first line has the names of the columns."""
    rows = [_common(document) | row for row in document["results"]]
    target = io.StringIO()
    writer = csv.DictWriter(target, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue().rstrip("\n")


def json_lines(document: dict) -> str:
    """The rows, one JSON object a line."""
    return "\n".join(json_text(_common(document) | row) for row in document["results"])
