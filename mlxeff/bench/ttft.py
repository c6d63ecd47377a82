"""Time to first token: arms × batches × prompt lengths, medians of repetitions in which the arms take turns.

A sample is one pass: a new cache, random token ids, the prompt up to the evaluated first token, then some decode steps.
Each point begins with uncounted passes. Every sample is kept (`samples`), so a run that was broken off goes on.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import mlx.core as mx

from .. import kernels
from ..errors import MlxeffError, notices
from ..kvprediction.flops import parameters
from .arms import Arm, weight_bytes
from .machine import usable_bytes
from .samples import Samples

KEYS = ("device", "batch", "tokens", "arm", "round")
FILTERS = ("arm", "device", "batch", "tokens")
VOCABULARY_SHARE = 0.9  # token ids are drawn from the first rows: the last ones are often special or unused


@dataclass(frozen=True)
class Point:
    """A batch of prompts of `tokens` tokens."""

    batch: int
    tokens: int


@dataclass(frozen=True)
class Settings:
    """`rounds` counted passes of each arm at each point after `warmup` uncounted ones; `steps` decode steps a pass;
    `step_size`: prompt tokens a chunk, None for the device's own; `memory`: bytes that may be used, None to ask."""

    rounds: int = 3
    warmup: int = 1
    steps: int = 4
    step_size: int | None = None
    memory: float | None = None


@dataclass
class Group:
    """Arms that are in memory together. `build(names)` makes some of them, random weights unevaluated."""

    names: list[str]
    build: Callable[[Sequence[str]], list[Arm]]
    points: list[Point]
    loaded: bool = False  # whether the weights are in memory already


@dataclass
class Results:
    """`samples`: one dictionary a pass; `arms`: what is known of each; `skipped`: a line for each thing left out."""

    samples: Samples
    arms: dict[str, dict] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def run(
    groups: Sequence[Group], devices: Sequence[str], settings: Settings, only: Sequence[str], results: Results
) -> None:
    """Measure what passes `only` ("KEY=VALUE", keys of FILTERS) and is not in `results.samples` yet."""
    chosen = [selected({"arm": n, "device": d, "batch": p.batch, "tokens": p.tokens}, only)
              for g in groups for n in g.names for d in devices for p in g.points]  # fmt: skip
    if not any(chosen):
        raise MlxeffError(f"bench: --only {' '.join(only)}: no measurement is left")
    for group in groups:
        for device in devices:
            _run_group(group, device, settings, only, results)
            mx.clear_cache()


def _run_group(group: Group, device: str, settings: Settings, only: Sequence[str], results: Results) -> None:
    kernels.use_device(device)
    wanted = {
        point: names
        for point in group.points
        if (names := [n for n in group.names if selected(_fields(n, device, point), only)])
    }
    names = [name for name in group.names if any(name in each for each in wanted.values())]
    if not names:
        return
    arms = {arm.name: arm for arm in group.build(names)}
    results.arms |= {name: describe(arm) for name, arm in arms.items()}
    usable = usable_bytes() if settings.memory is None else settings.memory
    weights = 0 if group.loaded else weight_bytes(arms.values())
    if weights > usable:
        _skip(results, f"{', '.join(names)} on {device}", weights, usable)
        return
    for arm in arms.values():
        arm.prepare()
    for point, here in sorted(wanted.items(), key=lambda item: item[0].batch * item[0].tokens):
        step_size = settings.step_size or kernels.PREFILL_STEP[device]
        fitting = []
        for name in here:
            needed = weights + arms[name].working_bytes(point.batch, point.tokens, step_size)
            if needed > usable:
                _skip(results, f"{name}, batch {point.batch} x {point.tokens} tokens on {device}", needed, usable)
            else:
                fitting.append(arms[name])
        _run_point(fitting, device, point, settings, step_size, results.samples)


def _run_point(
    arms: Sequence[Arm], device: str, point: Point, settings: Settings, step_size: int, samples: Samples
) -> None:
    done = samples.done()

    def left(arm: Arm, number: int) -> bool:
        return (device, point.batch, point.tokens, arm.name, number) not in done

    arms = [arm for arm in arms if any(left(arm, number) for number in range(settings.rounds))]
    for number in range(-settings.warmup, settings.rounds):
        for arm in arms:
            if number >= 0 and not left(arm, number):
                continue
            found = measure(arm, point, step_size, settings.steps)
            if number >= 0:
                samples.add(_fields(arm.name, device, point) | {"round": number} | found)
    for arm in arms:
        times = [s["ttft_s"] for s in samples.all if samples.key(s)[:4] == (device, *_sizes(point), arm.name)]
        where = f"{device}, batch {point.batch} x {point.tokens} tokens"
        notices.info("%s, %s: TTFT %.3f s", arm.name, where, median(times))


def measure(arm: Arm, point: Point, step_size: int, steps: int) -> dict:
    """One pass: seconds to the first token of each of the batch's prompts, and seconds a decode step after it."""
    rows = int(arm.base.vocab_size * VOCABULARY_SHARE)
    tokens = mx.random.randint(0, rows, (point.batch, point.tokens), key=mx.random.key(point.batch * point.tokens))
    mx.eval(tokens)
    busy, began = os.getloadavg()[0], time.perf_counter()
    cache = arm.base.new_cache()
    token = mx.argmax(arm.first_logits(tokens, cache, step_size), axis=-1)
    mx.eval(token)
    first = time.perf_counter()
    for _ in range(steps):
        token = mx.argmax(arm.base.last_logits(token[:, None], cache), axis=-1)
        mx.eval(token)
    after = (time.perf_counter() - first) / steps if steps else None
    return {"ttft_s": first - began, "step_s": after, "load_average": round(busy, 2)}


def describe(arm: Arm) -> dict:
    """What does not depend on the time: parameter counts, the weights' type."""
    counts = [parameters(module) for module in arm.modules]
    return dict(zip(("base", "auxiliary", "predictor"), counts)) | {"flops_512": arm.flops(512)}


def selected(fields: dict, only: Iterable[str]) -> bool:
    """Whether each key that is named has one of its values; names match by a part, numbers whole."""
    wanted: dict[str, list[str]] = {}
    for text in only:
        key, _, value = text.partition("=")
        wanted.setdefault(key, []).append(value)

    def matches(got, value: str) -> bool:
        return value in got if isinstance(got, str) else str(got) == value

    return all(any(matches(fields[key], value) for value in values) for key, values in wanted.items())


def _fields(arm: str, device: str, point: Point) -> dict:
    return {"device": device, "batch": point.batch, "tokens": point.tokens, "arm": arm}


def _sizes(point: Point) -> tuple[int, int]:
    return point.batch, point.tokens


def _skip(results: Results, what: str, needed: float, usable: float) -> None:
    line = f"{what}: needs about {needed / 1e9:.3g} GB, {usable / 1e9:.3g} GB may be used (--memory)"
    results.skipped.append(line)
    notices.warning("skipped: %s", line)
