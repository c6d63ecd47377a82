"""Measures arms in rounds, for each device and point.

At each point some warm-up passes come first and do not count; then the arms take turns, so that a disturbance of the
machine does not hit one arm only. Every sample is kept at once (`samples`), so an interrupted run can be continued.
This module is handed the arms, builds none, and prints no tables.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .. import kernels
from ..errors import MlxeffError, notices
from .arms import Arm, weight_bytes
from .machine import usable_bytes
from .points import Point
from .prompts import Prompts
from .rows import METRICS, statistics
from .samples import Samples
from .selection import selected

KEYS = ("device", "test", "arm", "round")


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    rounds     passes of each arm at each point that count
    warmup     passes before them that do not count
    steps      tokens that are decoded after a prompt
    step_size  prompt tokens in a chunk of the prefill; None: the default of the device
    memory     bytes that may be used; None: as `machine.usable_bytes` says
    prompts    the tokens that are read
    """

    rounds: int = 3
    warmup: int = 1
    steps: int = 4
    step_size: int | None = None
    memory: float | None = None
    prompts: Prompts = field(default_factory=Prompts)


@dataclass
class Group:
    """Arms that are in memory at the same time, and the points at which they are measured.

    names: of all arms. build: called with some of the names, returns these arms; random weights are not yet evaluated.
    """

    names: list[str]
    build: Callable[[Sequence[str]], list[Arm]]
    points: list[Point]
    loaded: bool = False  # whether the weights are in memory already


@dataclass
class Results:
    """The results: `samples`, one for each pass; `arms`, name → what `Arm.describe` says; `skipped`, a line for each
    measurement that was left out; `failed`, whether one was left out because an arm failed."""

    samples: Samples
    arms: dict[str, dict] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: bool = False

    def skip(self, line: str) -> None:
        """Note that something is left out."""
        self.skipped.append(line)
        notices.warning("skipped: %s", line)

    def fail(self, line: str) -> None:
        """Note that something is left out because it failed."""
        self.failed = True
        self.skip(line)


def run(
    groups: Sequence[Group], devices: Sequence[str], settings: Settings, only: Sequence[str], results: Results
) -> None:
    """Measure the groups on the devices, and add to `results`.

    Only measurements that meet the conditions `only` ("KEY=VALUE" with a key of points.FILTERS, see `selection`) are
    made, and those whose samples `results` holds already are left out. Raises MlxeffError where no measurement meets
    `only`.
    """
    places = ((n, d, p) for g in groups for n in g.names for d in devices for p in g.points)
    if not any(selected(p.fields(n, d), only) for n, d, p in places):
        raise MlxeffError(f"bench: --only {' '.join(only)}: no measurement is left")
    for group in groups:
        for device in devices:
            _run_group(group, device, settings, only, results)
            mx.clear_cache()


def _run_group(group: Group, device: str, settings: Settings, only: Sequence[str], results: Results) -> None:
    """Measure the arms of a group on one device, at the points in the order of their number of tokens."""
    kernels.use_device(device)
    points = sorted(group.points, key=lambda point: point.batch * point.total)
    asked = {point: [n for n in group.names if selected(point.fields(n, device), only)] for point in points}
    names = [name for name in group.names if any(name in each for each in asked.values())]
    if not names:
        return
    arms = {arm.name: arm for arm in group.build(names)}
    results.arms |= {name: arm.describe() for name, arm in arms.items()}
    left = {
        point: [n for n in here if _rounds_left(n, device, point, settings, results)] for point, here in asked.items()
    }
    if not any(left.values()):
        return
    usable = usable_bytes(device) if settings.memory is None else settings.memory
    weights = 0 if group.loaded else weight_bytes(arms.values())
    if weights > usable:
        results.skip(_too_large(f"{', '.join(names)} on {device}", weights, usable))
        return
    for arm in arms.values():
        arm.prepare()
    for point, here in left.items():
        step_size = settings.step_size or kernels.PREFILL_STEP[device]
        fitting = [arms[n] for n in here if _fits(arms[n], device, point, step_size, weights, usable, results)]
        _run_point(fitting, device, point, settings, step_size, results)


def _fits(arm: Arm, device: str, point: Point, step_size: int, weights: float, usable: float, results: Results) -> bool:
    """Whether the memory is enough for a pass. If not, notes the measurement as skipped."""
    needed = weights + arm.working_bytes(point.batch, point.total, step_size)
    if needed > usable:
        results.skip(_too_large(f"{arm.name}, {point.test} on {device}", needed, usable))
    return needed <= usable


def _rounds_left(name: str, device: str, point: Point, settings: Settings, results: Results) -> list[int]:
    """The numbers of the rounds of an arm at a point that have no sample yet."""
    done = results.samples.done()
    return [r for r in range(settings.rounds) if (device, point.test, name, r) not in done]


def _run_point(
    arms: Sequence[Arm], device: str, point: Point, settings: Settings, step_size: int, results: Results
) -> None:
    """Measure arms at one point: warm-up passes, then rounds in which each arm has one pass."""
    left = {arm.name: _rounds_left(arm.name, device, point, settings, results) for arm in arms}
    arms = [arm for arm in arms if left[arm.name]]
    for number in range(-settings.warmup, settings.rounds):
        for arm in list(arms):
            if number >= 0 and number not in left[arm.name]:
                continue
            ids = settings.prompts(point.batch, point.prompt, arm.vocabulary)
            busy = round(os.getloadavg()[0], 2)
            try:
                found = arm.measure(point, ids, step_size, settings.steps)
            except MlxeffError as error:
                arms.remove(arm)
                results.fail(f"{arm.name}, {point.test} on {device}: {error}")
                continue
            if number >= 0:
                results.samples.add(point.fields(arm.name, device) | {"round": number} | found | {"load_average": busy})
    for arm in arms:
        _tell(point.fields(arm.name, device), results)


def _tell(place: dict, results: Results) -> None:
    """A notice with the medians of what was measured at a place."""
    here = [sample["values"] for sample in results.samples.all if place.items() <= sample.items()]
    words = [
        f"{name} {statistics([values[name] for values in here])['median']:.4g} {METRICS[name].unit}"
        for name in (here[0] if here else ())
        if name != "peak_bytes"
    ]
    notices.info("%s, %s on %s: %s", place["arm"], place["test"], place["device"], ", ".join(words))


def _too_large(what: str, needed: float, usable: float) -> str:
    return f"{what}: needs about {needed / 1e9:.3g} GB, {usable / 1e9:.3g} GB may be used (--memory)"
