"""Measures the time to first token (TTFT) of several arms, for each batch size and prompt length.

One pass gives one sample: an empty cache is filled with a prompt of random token ids until the first token is
evaluated, and some decode steps follow. A batch size with a prompt length is a point. At each point, some warm-up
passes come first and do not count; then the arms take turns, so that a disturbance of the machine does not hit one arm
only. Every sample is kept at once (`samples`), so an interrupted run can be continued. This module is handed the arms
and prints no tables.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .. import kernels
from ..errors import MlxeffError, no_notices, notices
from ..kvprediction.flops import parameters
from .arms import Arm, weight_bytes
from .machine import usable_bytes
from .samples import Samples, median_of
from .selection import selected

KEYS = ("device", "batch", "tokens", "arm", "round")
FILTERS = ("arm", "device", "batch", "tokens")
# Token ids are drawn from this share of the vocabulary, its beginning: the last ids are often special or unused.
VOCABULARY_SHARE = 0.9


@dataclass(frozen=True)
class Point:
    """What is measured at one time: `batch` prompts of `tokens` tokens each."""

    batch: int
    tokens: int


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    rounds     passes of each arm at each point that count
    warmup     passes before them that do not count
    steps      decode steps in a pass
    step_size  prompt tokens in a chunk of the prefill; None: the default of the device
    memory     bytes that may be used; None: as `machine.usable_bytes` says
    """

    rounds: int = 3
    warmup: int = 1
    steps: int = 4
    step_size: int | None = None
    memory: float | None = None


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
    """The results: `samples`, one for each pass; `arms`, name → the result of `describe`; `skipped`, a line for each
    measurement that was left out for lack of memory."""

    samples: Samples
    arms: dict[str, dict] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def run(
    groups: Sequence[Group], devices: Sequence[str], settings: Settings, only: Sequence[str], results: Results
) -> None:
    """Measure the groups on the devices, and add to `results`.

    Only measurements that meet the conditions `only` ("KEY=VALUE" with a key of FILTERS, see `selection`) are made, and
    those whose samples `results` holds already are left out. Raises MlxeffError where no measurement meets `only`.
    """
    places = ((n, d, p) for g in groups for n in g.names for d in devices for p in g.points)
    if not any(selected(_fields(*place), only) for place in places):
        raise MlxeffError(f"bench: --only {' '.join(only)}: no measurement is left")
    for group in groups:
        for device in devices:
            _run_group(group, device, settings, only, results)
            mx.clear_cache()


def _run_group(group: Group, device: str, settings: Settings, only: Sequence[str], results: Results) -> None:
    """Measure the arms of a group on one device, at the points in the order of their number of tokens."""
    kernels.use_device(device)
    points = sorted(group.points, key=lambda point: point.batch * point.tokens)
    asked = {point: [n for n in group.names if selected(_fields(n, device, point), only)] for point in points}
    names = [name for name in group.names if any(name in each for each in asked.values())]
    if not names:
        return
    arms = {arm.name: arm for arm in group.build(names)}
    results.arms |= {name: describe(arm) for name, arm in arms.items()}
    left = {
        point: [n for n in here if _rounds_left(n, device, point, settings, results)] for point, here in asked.items()
    }
    if not any(left.values()):
        return
    usable = usable_bytes(device) if settings.memory is None else settings.memory
    weights = 0 if group.loaded else weight_bytes(arms.values())
    if weights > usable:
        _skip(results, f"{', '.join(names)} on {device}", weights, usable)
        return
    for arm in arms.values():
        arm.prepare()
    for point, here in left.items():
        step_size = settings.step_size or kernels.PREFILL_STEP[device]
        fitting = [arms[n] for n in here if _fits(arms[n], device, point, step_size, weights, usable, results)]
        _run_point(fitting, device, point, settings, step_size, results)


def _fits(arm: Arm, device: str, point: Point, step_size: int, weights: float, usable: float, results: Results) -> bool:
    """Whether the memory is enough for a pass. If not, notes the measurement as skipped."""
    needed = weights + arm.working_bytes(point.batch, point.tokens, step_size)
    if needed > usable:
        _skip(results, f"{arm.name}, batch {point.batch} x {point.tokens} tokens on {device}", needed, usable)
    return needed <= usable


def _rounds_left(name: str, device: str, point: Point, settings: Settings, results: Results) -> list[int]:
    """The numbers of the rounds of an arm at a point that have no sample yet."""
    done = results.samples.done()
    return [r for r in range(settings.rounds) if (device, point.batch, point.tokens, name, r) not in done]


def _run_point(
    arms: Sequence[Arm], device: str, point: Point, settings: Settings, step_size: int, results: Results
) -> None:
    """Measure arms at one point: warm-up passes, then rounds in which each arm has one pass."""
    left = {arm.name: _rounds_left(arm.name, device, point, settings, results) for arm in arms}
    for number in range(-settings.warmup, settings.rounds):
        for arm in arms:
            if number >= 0 and number not in left[arm.name]:
                continue
            found = measure(arm, point, step_size, settings.steps)
            if number >= 0:
                results.samples.add(_fields(arm.name, device, point) | {"round": number} | found)
    for arm in arms:
        seconds = median_of(results.samples.all, "ttft_s", **_fields(arm.name, device, point))
        where = f"{device}, batch {point.batch} x {point.tokens} tokens"
        notices.info("%s, %s: TTFT %.3f s", arm.name, where, seconds)


def measure(arm: Arm, point: Point, step_size: int, steps: int) -> dict:
    """One pass of an arm: {"ttft_s": seconds until the first token of every prompt in the batch is evaluated, "step_s":
    mean seconds of a decode step (None without steps), "load_average": of the machine before the pass}."""
    rows = int(arm.base.vocab_size * VOCABULARY_SHARE)
    tokens = mx.random.randint(0, rows, (point.batch, point.tokens), key=mx.random.key(point.batch * point.tokens))
    mx.eval(tokens)
    busy, began = os.getloadavg()[0], time.perf_counter()
    with no_notices():
        cache = arm.setup.new_cache()
        token = mx.argmax(arm.setup.read(tokens, cache, step_size), axis=-1)
        mx.eval(token)
        first = time.perf_counter()
        for _ in range(steps):
            token = mx.argmax(arm.base.last_logits(token[:, None], cache, arm.setup.options), axis=-1)
            mx.eval(token)
    after = (time.perf_counter() - first) / steps if steps else None
    return {"ttft_s": first - began, "step_s": after, "load_average": round(busy, 2)}


def describe(arm: Arm) -> dict:
    """The facts about an arm that need no measurement: the parameter counts of its models, and `flops_512`, the FLOPs
    to the first token after 512 prompt tokens."""
    counts = [parameters(module) for module in arm.modules]
    return dict(zip(("base", "auxiliary", "predictor"), counts)) | {"flops_512": arm.flops(512)}


def _fields(arm: str, device: str, point: Point) -> dict:
    return {"device": device, "batch": point.batch, "tokens": point.tokens, "arm": arm}


def _skip(results: Results, what: str, needed: float, usable: float) -> None:
    line = f"{what}: needs about {needed / 1e9:.3g} GB, {usable / 1e9:.3g} GB may be used (--memory)"
    results.skipped.append(line)
    notices.warning("skipped: %s", line)
