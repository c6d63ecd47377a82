"""Reads results of benchmarks: the documents that `mlxeff bench` writes, and the files of `mlxeff bench ttft --out`."""

import json
from collections.abc import Callable

from ..errors import MlxeffError, notices
from ..names import expand
from . import ttft_results
from .schema import check, key_of

SAMPLES_FORMAT = "mlxeff-ttft"  # of the file of `bench ttft --out`


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
        document = ttft_results.of_file(identity, samples, path)
    else:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MlxeffError(f"{path}: wanted a result of mlxeff bench, got no complete JSON: {error}") from error
        if ttft_results.is_document(document):
            document = ttft_results.of_document(document, path)
    check(document, path)
    return document


def _loaded(line: str) -> object:
    """The value of a line of JSON; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def samples_of(document: dict) -> Callable[[dict], list[float]]:
    """A function that returns the sampled values of a row, in the order of the file; [] where the file has none."""
    found: dict[tuple, list[float]] = {}
    for sample in document["samples"]:
        for metric, value in sample["values"].items():
            if value is not None:
                found.setdefault((sample["arm"], sample["device"], sample["test"], metric), []).append(value)
    return lambda row: found.get(key_of(row), [])
