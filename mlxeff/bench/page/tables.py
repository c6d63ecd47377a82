"""The tables of the page: results, ratios, published numbers, ceilings, arms, samples."""

from collections.abc import Callable, Sequence

from ..words import digits, in_order, scale, shown, title_of
from .markup import badge, table, text

LABELS = {
    "published": "printed in the source",
    "reconstructed": "computed from what the source prints",
    "recalled": "from memory, not checked in the source",
    "unknown": "of unknown origin",
}


def results(document: dict) -> list[str]:
    """A table for each metric, in one unit; columns without any number are left out."""
    parts, rows = [], document["results"]
    devices = len({row["device"] for row in rows}) > 1
    for metric in in_order(row["metric"] for row in rows):
        chosen = [row for row in rows if row["metric"] == metric]
        factor, unit = scale(chosen[0]["unit"], max(abs(row["median"]) for row in chosen))
        columns: dict[str, Callable[[dict], object]] = {"test": lambda row: row["test"]}
        columns |= {"device": lambda row: row["device"]} if devices else {}
        columns |= {"median": _number("median", factor), "95 % interval": _interval(factor)}
        columns |= {"mean": _number("mean", factor), "± sd": _number("stddev", factor)}
        columns |= {name: _number(name, factor) for name in ("min", "max", "p90", "p99")}
        columns |= {"samples": lambda row: row["count"], "of the ceiling": _share}
        columns |= {"moved": lambda row: "" if row.get("bytes_moved") is None else shown(row["bytes_moved"], "bytes")}
        cells = {name: [column(row) for row in chosen] for name, column in columns.items()}
        kept = {name: each for name, each in cells.items() if any(value != "" for value in each)}
        lines = [[row["arm"], *each] for row, each in zip(chosen, zip(*kept.values()))]
        words = f"{title_of(metric)}{f' in {unit}' if unit else ''} ({metric}), {chosen[0]['better']} is better"
        parts.append(table(words, ["arm", *kept], lines, range(2 + devices, len(kept) + 1)))
    return parts


def _number(name: str, factor: float) -> Callable[[dict], str]:
    """The cell of a row with the number `name` times `factor`; "" where there is none."""
    return lambda row: "" if row.get(name) is None else digits(row[name] * factor)


def _interval(factor: float) -> Callable[[dict], str]:
    low, high = _number("low", factor), _number("high", factor)
    return lambda row: f"{low(row)} to {high(row)}" if low(row) and high(row) else ""


def _share(row: dict) -> str:
    share = row.get("share_of_ceiling")
    return "" if share is None else f"{100 * share:.0f} %"


def ratios(lines: Sequence[dict]) -> str:
    """Ratios to another arm, as the result has them."""
    rows = []
    for each in lines:
        ends = each.get("low"), each.get("high")
        interval = "" if None in ends else f"{digits(ends[0])} to {digits(ends[1])}"
        rows.append([each["arm"], each["against"], each["test"], each["metric"], digits(each["ratio"]), interval])
    header = ["arm", "divided by", "test", "metric", "ratio", "95 % interval"]
    return table("Medians of arms divided by those of another arm", header, rows, (4, 5))


def published(lines: Sequence[dict]) -> str:
    """Published numbers beside ours, with what their labels mean."""
    rows = []
    for each in lines:
        ours, theirs, unit = each.get("ours"), each.get("theirs"), each.get("unit") or ""
        number = theirs if not isinstance(theirs, str) else None
        ratio = f"{ours / number:.2f}" if ours is not None and number else ""
        where = each.get("arm"), each.get("test")
        cells = [each["what"], *(part or "" for part in where), "" if ours is None else shown(ours, unit)]
        rows.append(
            [
                *cells,
                theirs if number is None and theirs else shown(number, unit),
                ratio,
                badge(each["label"]),
                each.get("source") or "",
            ]
        )
    header = ["what", "arm", "test", "ours", "theirs", "ours / theirs", "label", "source"]
    found = table("Our numbers and published ones", header, rows, (3, 4, 5))
    labels = [f"{label}: {LABELS[label]}" for label in LABELS if any(each["label"] == label for each in lines)]
    return found and found + f'<p class="legend">Labels. {text("; ".join(labels))}.</p>' if labels else found


def ceilings(devices: dict) -> str:
    """What the machine can do at most, by device."""
    rows = [
        [device, *(shown(each.get(name), unit) for name, unit in (("read_gbps", "GB/s"), ("gflops", "GFLOP/s"))),
         each.get("how") or ""]
        for device, each in devices.items()
    ]  # fmt: skip
    return table("Ceilings of the machine", ["device", "reads", "arithmetic", "how they were measured"], rows, (1, 2))


def arms(known: dict) -> str:
    """The facts about the arms."""
    names = list(dict.fromkeys(name for each in known.values() for name in each))
    rows = [[arm, *(_fact(name, each.get(name)) for name in names)] for arm, each in known.items()]
    return table("What is known of the arms without a measurement", ["arm", *names], rows)


def _fact(name: str, value: object) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes") and isinstance(value, int | float):
        return shown(value, "bytes")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def samples(taken: Sequence[dict]) -> str:
    """Every sample."""
    metrics = in_order(metric for each in taken for metric in each["values"])
    rows = []
    for each in taken:
        values = (each["values"].get(metric) for metric in metrics)
        numbers = ["" if value is None else digits(value) for value in values]
        place = [each[name] for name in ("arm", "test", "device")]
        rows.append([*place, each.get("round", ""), *numbers, each.get("load_average", "")])
    header = ["arm", "test", "device", "round", *metrics, "load average"]
    return table("Samples, in base units", header, rows, range(3, len(header)))
