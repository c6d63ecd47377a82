"""Constants of this machine from a measurement, and how far predictions are from one.

The measurement is the document of `mlxeff bench ttft --json` of the same version of mlxeff. With one model, times tell
a rate of matrix products, a rate of attention, a rate at which weights are read and one for keys and values; the work
between products is part of these rates.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from .. import __version__
from ..errors import MlxeffError
from ..names import expand
from . import costs, fit
from .chips import Machine
from .constants import Constants
from .costs import Bits, Engine
from .formats import KV_BYTES
from .predict import Predictor
from .shapes import Shape

LEAST_ERROR = 0.05  # half-width of an error bar that few points cannot undercut
ALIKE = ("dense", "quantised", "k-quant", "emulated", "accelerated")  # products that a calibration gives one rate
TARGETS = {"published decode": 0.12, "published prefill": 0.20, "own": 0.15}  # MAPE that is aimed at


@dataclass(frozen=True)
class Point:
    """A measured median. `phase`: "prefill" or "decode"; `tokens`: of the prompt, after which decoding began."""

    phase: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A result of `mlxeff bench ttft`. `step`: prompt tokens computed at once; `kv`: kind of KV cache; `key`: what
    identifies machine, backend and arithmetic; `parameters`: of the model; `steps`: decode steps after each prompt."""

    path: str
    model: str
    parameters: int
    device: str
    step: int
    steps: int
    kv: str
    key: str
    cpu: str
    points: tuple[Point, ...]


def read(name: str) -> Measured:
    """The measurement in a file. Raises MlxeffError for one that is something else, of another version of mlxeff, of
    several prompts at once only, or damaged."""
    path = expand(name)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError:
        raise MlxeffError(f"{path}: wanted the document of `mlxeff bench ttft --json`, got no JSON document") from None
    try:
        card, settings = document["card"], document["settings"]
        version, model = card["mlxeff"], settings.get("model")
        parts = {"card": card, "settings": settings, "results": document["results"], "arms": document["arms"]}
    except (KeyError, TypeError, AttributeError):
        raise MlxeffError(f"{path}: wanted the document of `mlxeff bench ttft --json`, got other JSON") from None
    if version != __version__:
        raise MlxeffError(f"{path}: measured by mlxeff {version}, this is {__version__}: measure again")
    if not isinstance(model, str):
        raise MlxeffError(f"{path}: wanted a measurement of a MODEL, got one of the suite {settings.get('suite')!r}")
    if (verb := settings.get("verb")) != "bench ttft":
        raise MlxeffError(f"{path}: wanted a result of `mlxeff bench ttft MODEL`, got one of {verb!r}")
    try:
        return _measured(str(path), model, parts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MlxeffError(f"{path}: damaged result: {type(error).__name__} {error}") from None


def _measured(path: str, model: str, parts: dict) -> Measured:
    card, settings = parts["card"], parts["settings"]
    own = [row for row in parts["results"] if row["arm"] == settings["arm"] and row["batch"] == 1 and not row["depth"]]
    if not own:
        raise MlxeffError(f"{path}: wanted results of {model} with one prompt at a time, got none")
    device, points = own[0]["device"], []
    for row in own:
        if row["device"] != device or not row["test"].startswith("pp"):
            continue
        if row["metric"] == "ttft_s":
            points.append(Point("prefill", int(row["tokens"]), _positive(row["median"])))
        if row["metric"] == "decode_tps":
            points.append(Point("decode", int(row["tokens"]), 1 / _positive(row["median"])))
    return Measured(
        path,
        model,
        int(parts["arms"][settings["arm"]]["base"]),
        str(device),
        int(settings["prefill_step"][device]),
        int(settings["steps"]),
        str(settings["kv_dtype"]),
        machine_key(card, device, settings["compute"]),
        str(card["cpu"]),
        tuple(points),
    )


def _positive(value: object) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"wanted a number above 0, got {value!r}")
    return float(value)


def machine_key(card: dict, device: str, compute: str = "exact") -> str:
    """What identifies the constants of a machine: processor, backend, threads, device, arithmetic."""
    return f"{card['cpu']} | {card['cpu_backend']} | {card['threads']} threads | {device} | {compute}"


def check_model(measured: Measured, shape: Shape) -> None:
    """Raises MlxeffError where the measurement is of a model of another size than `shape`, up to a hundredth: norms and
    biases may be counted otherwise."""
    if not math.isclose(measured.parameters, shape.parameters, rel_tol=0.01):
        what = f"{measured.parameters} parameters ({measured.model})"
        raise MlxeffError(
            f"{measured.path}: wanted a result of MODEL, {shape.parameters} parameters, got one of {what}"
        )


def terms(measured: Measured, point: Point, shape: Shape, bits: Bits, machine: Machine, engine: Engine) -> dict:
    """The terms that predict a point's seconds."""
    if point.phase == "decode":
        depth = point.tokens + measured.steps / 2
        return costs.decode_terms(shape, bits, machine, engine, depth, KV_BYTES.get(measured.kv, 2.0))
    found: dict[str, float] = {}
    for first in range(0, point.tokens, measured.step):
        chunk = costs.prefill_terms(shape, bits, machine, engine, first, min(first + measured.step, point.tokens))
        for name, value in chunk.items():
            found[name] = found.get(name, 0.0) + value
    return found


def _reduced(found: dict[str, float], phase: str) -> dict[str, float]:
    """The terms that one model's times can tell apart."""
    if phase == "decode":
        kept = {name: value for name, value in found.items() if name.startswith("kv")}
        return {"bytes": found["bytes"], **kept}
    products = sum(found.get(name, 0.0) for name in ALIKE)
    return {"quantised": products, "attention": sum(v for name, v in found.items() if name.startswith("attention"))}


def calibrate(measured: Measured, shape: Shape, bits: Bits, machine: Machine, engine: Engine) -> Constants:
    """The constants of the machine with which predictions are nearest to the measurement. Raises MlxeffError for one
    with fewer than two prompt lengths or without decode steps."""
    fitted, errors = {}, {}
    for phase in ("prefill", "decode"):
        points = [point for point in measured.points if point.phase == phase]
        if len({point.tokens for point in points}) < 2:
            wanted = "results of two prompt lengths at least, with decode steps (--steps)"
            raise MlxeffError(f"{measured.path}: wanted {wanted}, got {len(points)} of {phase}")
        rows = [_reduced(terms(measured, point, shape, bits, machine, engine), phase) for point in points]
        seconds = [point.seconds for point in points]
        found = fit.constants(rows, seconds)
        left = [_left_out(rows, seconds, i) for i in range(len(points))]
        fitted[phase], errors[phase] = found, max(LEAST_ERROR, median(left), _spread(rows, seconds, found))
    rate = fitted["prefill"]["quantised"]
    prefill = dict.fromkeys(ALIKE, rate) | {"attention": fitted["prefill"].get("attention", 0.0)}
    source = f"calibrated by {Path(measured.path).name}, {measured.model}"
    return Constants(prefill, fitted["decode"], errors, source, "calibrated")


def _left_out(rows: Sequence[dict], seconds: Sequence[float], index: int) -> float:
    """The relative error at a point of the constants that the other points give."""
    others = [i for i in range(len(rows)) if i != index]
    found = fit.constants([rows[i] for i in others], [seconds[i] for i in others])
    return abs(costs.total(rows[index], found) / seconds[index] - 1)


def _spread(rows: Sequence[dict], seconds: Sequence[float], found: dict[str, float]) -> float:
    """The largest relative error of the constants at the points that they were fitted to."""
    return max(abs(costs.total(row, found) / time - 1) for row, time in zip(rows, seconds, strict=True))


@dataclass(frozen=True)
class Scored:
    """A point with its prediction, both in seconds."""

    phase: str
    tokens: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the predicted speed, relative to the measured one: above 0 where it was predicted too fast."""
        return self.measured / self.predicted - 1


def score(predictor: Predictor, measured: Measured, shape: Shape, bits: Bits) -> list[Scored]:
    """The prediction of each point of a measurement, which need not be the one that the constants come from."""
    found = []
    for point in measured.points:
        constants = getattr(predictor.constants, point.phase)
        row = terms(measured, point, shape, bits, predictor.machine, predictor.engine)
        found.append(Scored(point.phase, point.tokens, point.seconds, costs.total(row, constants)))
    return found


def mape(found: Sequence[Scored], chosen: Callable[[Scored], bool] = lambda _: True) -> float | None:
    """The mean absolute error of the predicted speeds, relative to the measured ones; None without a point."""
    errors = [abs(each.error) for each in found if chosen(each)]
    return sum(errors) / len(errors) if errors else None


def with_rates(machine: Machine, numbers: dict[str, float]) -> Machine:
    """The machine with the bandwidth and rate that its calibration is relative to."""
    return replace(machine, bandwidth=numbers["bandwidth"], flops=numbers["flops"], accelerated=None)
