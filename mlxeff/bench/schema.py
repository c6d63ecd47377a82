"""What the document of a result holds, and the checks of it. "results" are rows: a metric of an arm at a test."""

import math
from collections import Counter
from pathlib import Path

from ..errors import MlxeffError

FORMAT, VERSION = "mlxeff-bench", 1
SAMPLES_FORMAT = "mlxeff-bench-samples"  # of the files of `--out`
KEY = ("arm", "device", "test", "metric")  # identify a row
PARTS = {
    **dict.fromkeys(("card", "settings", "arms", "ceilings"), dict),
    **dict.fromkeys(("results", "ratios", "published", "samples", "skipped", "notices"), list),
}
NUMBERS = tuple(  # of a row that may be null or missing
    "mean stddev min max p50 p90 p99 low high bytes_moved share_of_ceiling batch tokens depth".split()
)


def key_of(row: dict) -> tuple:
    """What identifies a row: (arm, device, test, metric)."""
    return tuple(row[name] for name in KEY)


def check(document: object, path: Path) -> None:
    """Raises MlxeffError where `document` is no result of this version, or lacks what every result has."""
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if found != FORMAT:
        got = f"format {found!r}" if isinstance(document, dict) else f"a JSON {found}"
        raise MlxeffError(f'{path}: wanted a result of mlxeff bench (format "{FORMAT}"), got {got}')
    if document.get("version") != VERSION:
        raise MlxeffError(f"{path}: wanted version {VERSION} of the format, got {document.get('version')!r}")
    typed(document, PARTS, path, "the document")
    text, number = (str,), (int, float)
    for part in ("arms", "ceilings"):
        typed(document[part], dict.fromkeys(document[part], (dict,)), path, part)
    for device, ceiling in document["ceilings"].items():
        typed(ceiling, {}, path, f"ceilings: {device}", ("read_gbps", "gflops"))
    wanted = {**dict.fromkeys((*KEY, "unit"), text), "median": number, "count": (int,)}
    for index, row in enumerate(document["results"]):
        typed(row, wanted, path, f"results[{index}]", NUMBERS)
        if row.get("better") not in ("higher", "lower"):
            got = row.get("better")
            raise MlxeffError(f'{path}: results[{index}]: wanted "better": "higher" or "lower", got {got!r}')
    keys = [key_of(row) for row in document["results"]]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise MlxeffError(f"{path}: wanted one row for each arm, device, test and metric, got two of {twice[0]}")
    for index, sample in enumerate(document["samples"]):
        where = f"samples[{index}]"
        wanted = {"arm": text, "device": text, "test": text, "values": (dict,)}
        typed(sample, wanted, path, where, ("round", "load_average"))
        typed(sample["values"], {}, path, f"{where}: values", tuple(sample["values"]))
    for index, ratio in enumerate(document["ratios"]):
        wanted = {**dict.fromkeys((*KEY, "against"), text), "ratio": number}
        typed(ratio, wanted, path, f"ratios[{index}]", ("low", "high"))
    for index, line in enumerate(document["published"]):
        text_given = isinstance(line, dict) and isinstance(line.get("theirs"), str)  # such as "up to 2.5"
        numbers = ("ours",) if text_given else ("ours", "theirs")
        typed(line, {"what": text, "label": text}, path, f"published[{index}]", numbers)


def typed(
    value: object,
    wanted: dict[str, type | tuple[type, ...]],
    path: Path,
    where: str,
    numbers: tuple[str, ...] = (),
    above: tuple[str, ...] = (),
) -> None:
    """Raises MlxeffError unless `value` is a dict whose keys in `wanted` have these types, whose keys in `numbers` are
    numbers, null or not there, whose numbers are finite, and those in `above` above 0."""
    if not isinstance(value, dict):
        raise MlxeffError(f"{path}: {where}: wanted a JSON object, got {type(value).__name__}")
    for key, types in wanted.items():
        if key not in value:
            raise MlxeffError(f'{path}: {where}: wanted a key "{key}", got {", ".join(map(str, value)) or "no key"}')
        if not isinstance(value[key], types) or isinstance(value[key], bool):
            raise MlxeffError(f'{path}: {where}: "{key}": wanted {_named(types)}, got {value[key]!r}')
    for key, entry in value.items():
        if key in numbers and entry is not None and (not isinstance(entry, int | float) or isinstance(entry, bool)):
            raise MlxeffError(f'{path}: {where}: "{key}": wanted a number or null, got {entry!r}')
        if key in above and entry is not None and not entry > 0:
            raise MlxeffError(f'{path}: {where}: "{key}": wanted a number above 0, got {entry}')
        if isinstance(entry, float) and not math.isfinite(entry):
            raise MlxeffError(f'{path}: {where}: "{key}": wanted a finite number, got {entry}')


def _named(types: type | tuple[type, ...]) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    return names[types if isinstance(types, type) else types[-1]]
