"""Results of benchmarks as they stand in files: reads and checks the documents that `mlxeff bench` writes, and the
files of samples of `mlxeff bench ttft --out`. Measures nothing.

A document is a dict as docs/json.md describes it. Its "results" are rows: one metric of one arm at one test.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np

from ..errors import MlxeffError, notices
from ..names import expand

FORMAT, VERSION = "mlxeff-bench", 1
SAMPLES_FORMAT = "mlxeff-ttft"  # of the file of `bench ttft --out`
KEY = ("arm", "device", "test", "metric")  # identify a row
PARTS = {
    **dict.fromkeys(("card", "settings", "arms", "ceilings"), dict),
    **dict.fromkeys(("results", "ratios", "published", "samples", "skipped", "notices"), list),
}
NUMBERS = tuple(  # of a row that may be null or missing
    "mean stddev min max p50 p90 p99 low high bytes_moved share_of_ceiling batch tokens depth".split()
)
MACHINE = ("format", "cpu", "memory_gb", "system", "mlxeff", "mlx", "cpu_backend", "threads")  # not settings
LEAST = 3  # samples that an interval needs
RESAMPLES, SEED, LEVEL = 2000, 0, 0.95  # of the bootstrap


def read(name: str) -> dict:
    """The document in the file `name`, checked. Raises MlxeffError, one line, for anything else."""
    path = expand(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MlxeffError(f"{path}: wanted a result of mlxeff bench in UTF-8: {error}") from error
    first = _loaded(text.partition("\n")[0])
    if isinstance(first, dict) and first.get("format") == SAMPLES_FORMAT:
        return _of_samples(path, first, text.splitlines()[1:])
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MlxeffError(f"{path}: wanted a result of mlxeff bench, got no complete JSON: {error}") from error
    _check(document, path)
    return document


def _loaded(line: str) -> object:
    """The value of a line of JSON; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _check(document: object, path: Path) -> None:
    """Raises MlxeffError where `document` is no result of this version, or lacks what every result has."""
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if found != FORMAT:
        got = f"format {found!r}" if isinstance(document, dict) else f"a JSON {found}"
        raise MlxeffError(f'{path}: wanted a result of mlxeff bench (format "{FORMAT}"), got {got}')
    if document.get("version") != VERSION:
        raise MlxeffError(f"{path}: wanted version {VERSION} of the format, got {document.get('version')!r}")
    _typed(document, PARTS, path, "the document")
    text, number = (str,), (int, float)
    for part in ("arms", "ceilings"):
        _typed(document[part], dict.fromkeys(document[part], (dict,)), path, part)
    for device, ceiling in document["ceilings"].items():
        _typed(ceiling, {}, path, f"ceilings: {device}", ("read_gbps", "gflops"))
    wanted = {**dict.fromkeys((*KEY, "unit"), text), "median": number, "count": (int,)}
    for index, row in enumerate(document["results"]):
        _typed(row, wanted, path, f"results[{index}]", NUMBERS)
        if row.get("better") not in ("higher", "lower"):
            got = row.get("better")
            raise MlxeffError(f'{path}: results[{index}]: wanted "better": "higher" or "lower", got {got!r}')
    keys = [key_of(row) for row in document["results"]]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise MlxeffError(f"{path}: wanted one row for each arm, device, test and metric, got two of {twice[0]}")
    for index, sample in enumerate(document["samples"]):
        where = f"samples[{index}]"
        wanted = {"arm": text, "device": text, "test": text, "values": (dict,)}
        _typed(sample, wanted, path, where, ("round", "load_average"))
        _typed(sample["values"], {}, path, f"{where}: values", tuple(sample["values"]))
    for index, ratio in enumerate(document["ratios"]):
        wanted = {**dict.fromkeys((*KEY, "against"), text), "ratio": number}
        _typed(ratio, wanted, path, f"ratios[{index}]", ("low", "high"))
    for index, line in enumerate(document["published"]):
        _typed(line, {"what": text, "label": text}, path, f"published[{index}]", ("ours", "theirs"))


def _typed(
    value: object,
    wanted: dict[str, type | tuple[type, ...]],
    path: Path,
    where: str,
    numbers: tuple[str, ...] = (),
) -> None:
    """Raises MlxeffError unless `value` is a dict whose keys in `wanted` have these types, whose keys in `numbers` are
    numbers, null or not there, and whose numbers are finite."""
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
        if isinstance(entry, float) and not math.isfinite(entry):
            raise MlxeffError(f'{path}: {where}: "{key}": wanted a finite number, got {entry}')


def _named(types: type | tuple[type, ...]) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    return names[types if isinstance(types, type) else types[-1]]


def key_of(row: dict) -> tuple:
    """What identifies a row: (arm, device, test, metric)."""
    return tuple(row[name] for name in KEY)


def samples_of(document: dict) -> Callable[[dict], list[float]]:
    """A function that returns the sampled values of a row, in the order of the file; [] where the file has none."""
    found: dict[tuple, list[float]] = {}
    for sample in document["samples"]:
        for metric, value in sample["values"].items():
            if value is not None:
                found.setdefault((sample["arm"], sample["device"], sample["test"], metric), []).append(value)
    return lambda row: found.get(key_of(row), [])


def resampled(values: Sequence[float], stream: int = 0) -> np.ndarray:
    """The medians of RESAMPLES resamples of `values`, drawn with replacement from a fixed seed. Another `stream` draws
    independently."""
    values = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng([SEED, stream]).integers(0, len(values), (RESAMPLES, len(values)))
    return np.median(values[chosen], axis=1)


def interval(medians: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled numbers."""
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return float(low), float(high)


def _of_samples(path: Path, identity: dict, lines: list[str]) -> dict:
    """A document made of a file of samples of `bench ttft --out`."""
    samples = [each for each in map(_loaded, lines) if isinstance(each, dict)]
    if len(samples) < len(lines):
        notices.warning("%s: %d incomplete lines are left out", path, len(lines) - len(samples))
    rows: dict[tuple, tuple[dict, list[float]]] = {}
    kept = []
    number = (int, float)
    wanted = {"arm": (str,), "device": (str,), "tokens": (int,), "batch": (int,), "round": (int,), "ttft_s": number}
    for index, sample in enumerate(samples):
        _typed(sample, wanted, path, f"sample {index + 1}")
        batch, tokens = sample["batch"], sample["tokens"]
        for test, values in _tests(sample, identity.get("steps")).items():
            place = {"arm": sample["arm"], "device": sample["device"], "test": test}
            kept.append(place | {"round": sample["round"], "values": {name: v[0] for name, v in values.items()}})
            for metric, (value, unit, better) in values.items():
                depth = tokens if metric == "decode_tps" else 0
                more = {"metric": metric, "unit": unit, "better": better, "batch": batch, "depth": depth}
                more["tokens"] = identity.get("steps") if depth else tokens
                rows.setdefault((*place.values(), metric), (place | more, []))[1].append(value)
    document = {name: kind() for name, kind in PARTS.items()} | {"format": FORMAT, "version": VERSION}
    document["card"] = {name: identity[name] for name in MACHINE[1:] if name in identity}
    document["settings"] = {name: value for name, value in identity.items() if name not in MACHINE}
    document["arms"] = {sample["arm"]: {} for sample in samples}
    return document | {"results": [row | summary(values) for row, values in rows.values()], "samples": kept}


def _tests(sample: dict, steps: int | None) -> dict[str, dict[str, tuple[float, str, str]]]:
    """test → metric → (value, unit, what is better) of a sample of `bench ttft --out`."""
    batch, tokens, seconds = sample["batch"], sample["tokens"], sample["ttft_s"]
    also = f" x{batch}" if batch > 1 else ""
    found = {
        f"pp{tokens}{also}": {
            "ttft_s": (seconds, "s", "lower"),
            "prompt_tps": (batch * tokens / seconds, "tok/s", "higher"),
        }
    }
    if sample.get("step_s"):
        found[f"tg{steps} @ d{tokens}{also}"] = {"decode_tps": (batch / sample["step_s"], "tok/s", "higher")}
    return found


def summary(values: list[float]) -> dict:
    """The numbers of a row: count, median, mean, stddev, min, max, and the interval of the median."""
    low, high = interval(resampled(values)) if len(values) >= LEAST else (None, None)
    numbers = {"count": len(values), "median": median(values), "mean": fmean(values)}
    numbers["stddev"] = stdev(values) if len(values) > 1 else None
    return numbers | {"min": min(values), "max": max(values), "low": low, "high": high}
