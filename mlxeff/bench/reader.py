"""Reads results of benchmarks: the documents that `mlxeff bench` writes, and the files of samples of its `--out`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import MlxeffError, notices
from ..names import expand
from .machine import FIXED
from .rows import METRICS, rows
from .schema import FORMAT, PARTS, SAMPLES_FORMAT, VERSION, check, key_of


def read(name: str) -> dict:
    """The document in the file `name`, checked. Raises MlxeffError, one line, for anything else."""
    path = expand(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MlxeffError(f"{path}: wanted a result of mlxeff bench in UTF-8: {error}") from error
    first, *others = text.splitlines() or [""]
    identity = _loaded(first)
    if isinstance(identity, dict) and identity.get("format") == SAMPLES_FORMAT:
        samples = [each for each in map(_loaded, others) if isinstance(each, dict)]
        if len(samples) < len(others):
            notices.warning("%s: %d incomplete lines are left out", path, len(others) - len(samples))
        document = _of_samples(identity, samples, path)
    else:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MlxeffError(f"{path}: wanted a result of mlxeff bench, got no complete JSON: {error}") from error
    check(document, path)
    return document


def _loaded(line: str) -> object:
    """The value of a line of JSON; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _of_samples(identity: dict, samples: Sequence[dict], path: Path) -> dict:
    """The document of a file of samples, of which some may be missing. Raises MlxeffError for samples that lack what
    every one has."""
    document = {name: kind() for name, kind in PARTS.items()} | {"format": FORMAT, "version": VERSION}
    document["card"] = {name: value for name, value in identity.items() if name in FIXED}
    document["settings"] = {name: value for name, value in identity.items() if name not in (*FIXED, "format")}
    document["samples"] = list(samples)
    check(document, path)
    for index, sample in enumerate(samples):
        if unknown := set(sample["values"]) - set(METRICS):
            raise MlxeffError(f"{path}: samples[{index}]: wanted metrics of {', '.join(METRICS)}, got {min(unknown)!r}")
    document["arms"] = {sample["arm"]: {} for sample in samples}
    return document | {"results": rows(samples)}


def samples_of(document: dict) -> Callable[[dict], list[float]]:
    """A function that returns the sampled values of a row, in the order of the file; [] where the file has none."""
    found: dict[tuple, list[float]] = {}
    for sample in document["samples"]:
        for metric, value in sample["values"].items():
            if value is not None:
                found.setdefault((sample["arm"], sample["device"], sample["test"], metric), []).append(value)
    return lambda row: found.get(key_of(row), [])
