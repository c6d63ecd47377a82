"""The constants of an engine on Macs, fitted to published speeds (`data/constants.json`, which
`benchmarks/plan_score.py --save` writes), and those of this machine, calibrated by a measurement and kept in the user's
cache folder.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..errors import MlxeffError
from .published import data

KEPT = 32  # machines in the file of calibrations


@dataclass(frozen=True)
class Constants:
    """Constants of terms for both phases, and how far off predictions with them are.

    prefill, decode  name of a term (`costs`) → constant
    errors           "prefill", "decode" → relative half-width of the error bar, as 0.2 for a factor of 1.2 either way
    source           where they come from, in words
    kind             "published", "calibrated" or "probed"
    """

    prefill: dict[str, float]
    decode: dict[str, float]
    errors: dict[str, float]
    source: str
    kind: str


def fitted(engine: str) -> Constants:
    """Those of an engine on Macs."""
    found = json.loads(data("constants.json"))
    errors = {phase: found["errors"][engine][phase]["p90"] for phase in ("prefill", "decode")}
    return Constants(found["prefill"], found["decode"], errors, found["provenance"], "published")


def _file() -> Path:
    return hub.cache_dir() / "plan.json"


def kept(key: str) -> tuple[Constants, dict] | None:
    """(The calibrated constants of a machine, the entry with bandwidth and rate); None where nothing valid is kept."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, MlxeffError):
        entry = json.loads(_file().read_text(encoding="utf-8"))[key]
        parts = ({str(name): float(value) for name, value in entry[part].items()} for part in ("prefill", "decode"))
        errors = {phase: float(entry["errors"][phase]) for phase in ("prefill", "decode")}
        numbers = {name: float(entry[name]) for name in ("bandwidth", "flops")}
        if min(numbers.values()) > 0:
            return Constants(*parts, errors, str(entry["source"]), "calibrated"), numbers
    return None


def keep(key: str, constants: Constants, bandwidth: float, flops: float) -> Path:
    """Keep the calibration of a machine, beside those of others; returns the file. Raises MlxeffError where it cannot
    be written."""
    path = _file()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known = {name: value for name, value in known.items() if name != key}
    except (OSError, ValueError, AttributeError):
        known = {}
    about = {"errors": constants.errors, "source": constants.source, "bandwidth": bandwidth, "flops": flops}
    known[key] = {"prefill": constants.prefill, "decode": constants.decode} | about
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(list(known.items())[-KEPT:]), indent=1), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise MlxeffError(f"{path}: the calibration cannot be kept: {error.strerror or error}") from error
    return path
