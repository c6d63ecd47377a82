"""Suites: models and settings of publications, whose numbers are shown beside ours."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .. import hub, kernels
from ..assembly.options import IGNORE_KEYS, Option, ValueParser
from ..assembly.techniques import PRECISION, switch_options
from ..calibration import TEXT
from ..errors import MlxeffError
from ..eval import verbs as measures
from ..hub.catalog import DEFAULT_MODEL
from . import kvp_paper, model_suites, openelm_paper, quality, request, rounds
from .contenders import Fetching, Loader
from .points import DECODE, Point
from .request import Machine, here, samples
from .result import Result
from .samples import Samples

ACTIVATIONS = "float32 in the native CPU kernels, else the weights' type"


@dataclass(frozen=True)
class SuiteRequest:
    """The options of `mlxeff bench suite`; most as in `request.Request`.

    name         of SUITES, or "all"
    models       of suites that run the user's models; () for the default
    dtype        the type of random weights
    checkpoints  (size of an OpenELM, model): checkpoints in place of random weights
    ignored      entries of config.json to read as absent
    """

    name: str
    models: Sequence[str] = ()
    dtype: str = "float16"
    checkpoints: Sequence[tuple[str, str]] = ()
    ignored: Sequence[str] = ()
    only: Sequence[str] = ()
    settings: rounds.Settings = field(default_factory=rounds.Settings)
    machine: Machine = field(default_factory=Machine)
    out: str | None = None
    offline: bool = False


def measure(asked: SuiteRequest, fetching: Fetching) -> Result:
    """Run a suite. Raises MlxeffError for contradictory options, for a model that cannot be loaded, and for an `out`
    file with samples of another kind."""
    if asked.name == "all":
        return _all(asked, fetching)
    return SUITES[asked.name](asked, fetching)


def _random(module) -> Callable[[SuiteRequest, Fetching], Result]:
    """The suite of a module with `groups` of OpenELM models and `published` numbers."""

    def run(asked: SuiteRequest, _: Fetching) -> Result:
        if asked.models:
            raise MlxeffError(
                f"bench suite {asked.name}: has models of its own: wanted no MODEL, got {asked.models[0]}"
            )
        if asked.ignored and not asked.checkpoints:
            raise MlxeffError("bench suite: --ignore-keys is of --checkpoint: wanted one, got none")
        devices = _devices(asked.machine)
        given = {size: hub.resolve(model, offline=asked.offline) for size, model in asked.checkpoints}
        groups = module.groups(getattr(mx, asked.dtype), given, asked.ignored)
        settings = replace(asked.settings, memory=asked.machine.usable)
        described = {
            "verb": "bench suite",
            "suite": asked.name,
            "weights": f"{asked.dtype}, random" if len(given) < len(kvp_paper.SIZES) else "as stored",
            "checkpoints": {size: str(path) for size, path in given.items()},
            "activations": ACTIVATIONS,
            "prompt": {"origin": settings.prompts.origin},
            "steps": settings.steps,
            "prefill_step": {device: settings.step_size or kernels.PREFILL_STEP[device] for device in devices},
        }
        card = here()
        results = rounds.Results(samples(asked.out, card, described))
        rounds.run(groups, devices, settings, asked.only, results)
        described |= {"rounds": settings.rounds, "warmup": settings.warmup, "only": list(asked.only)}
        result = Result(card, described, results)
        result.published = module.published(result.document(())["results"], results.arms)
        return result

    return run


def _devices(asked: Machine) -> list[str]:
    """The devices to measure on: with "auto" every one. Makes the first one MLX's default device."""
    if asked.device == "auto" and kernels.has_metal():
        return [replace(asked, device="cpu").use(), "gpu"]
    return [asked.use()]


def _parsed(options: Sequence[Option], asked: SuiteRequest, text: str = "") -> argparse.Namespace:
    """The values of options that a text gives, the others' defaults."""
    parser = ValueParser(add_help=False, allow_abbrev=False)
    for each in options:
        parser.add_argument(each.name, *each.aliases, **each.keywords)
    found = parser.parse_text(text)
    found.model, found.offline, found.ignore_keys = None, asked.offline, list(asked.ignored)
    return found


def _decoding(asked: SuiteRequest, fetching: Fetching, model: str, points, ways: Sequence[str]) -> Result:
    """`bench decode` of a model at points, plainly and in some ways, on the package's text."""
    options = [*PRECISION, *switch_options("bench decode"), IGNORE_KEYS]
    plain, *others = (_parsed(options, asked, way) for way in ("", *ways))
    how = {"text": str(TEXT), "only": asked.only, "settings": replace(asked.settings, steps=0)}
    how |= {"machine": asked.machine, "out": asked.out, "ignored": asked.ignored, "offline": asked.offline}
    result = request.measure(request.Request("bench decode", model, plain, others, points=points, **how), fetching)
    result.settings |= {"verb": "bench suite", "suite": asked.name}
    return result


def _one(asked: SuiteRequest, default: str | None) -> str:
    """The one model of a suite."""
    if len(asked.models) > 1 or not (asked.models or default):
        raise MlxeffError(f"bench suite {asked.name}: wanted one MODEL, got {len(asked.models) or 'none'}")
    return asked.models[0] if asked.models else default


def _quantspec(asked: SuiteRequest, fetching: Fetching) -> Result:
    model = _one(asked, DEFAULT_MODEL)
    limit = Loader(fetching, asked.ignored, asked.offline)(model).model.context_length or request.INT_MAX
    ways = ("--kv-cache int8", "--quantspec")
    result = _decoding(asked, fetching, model, model_suites.quantspec_points(limit), ways)
    result.published = model_suites.quantspec(result.document(()))
    return result


def _dynamoe(asked: SuiteRequest, fetching: Fetching) -> Result:
    ways = [f"--sensitivity {each}" for each in model_suites.SENSITIVITIES]
    result = _decoding(asked, fetching, _one(asked, None), [Point(1, 128, 0, DECODE)], ways)
    result.published = model_suites.dynamoe(result.document(()))
    return result


def _seedlm(asked: SuiteRequest, fetching: Fetching) -> Result:
    """Quality of a model and of its conversions."""
    if len(asked.models) < 2:
        raise MlxeffError(
            f"bench suite {asked.name}: wanted a dense MODEL and its SeedLM ones, got {len(asked.models)}"
        )
    options = [*measures.run_options(), *measures.WINDOWS]
    first, *others = (_parsed(options, asked) for _ in asked.models)
    for each, model in zip(others, asked.models[1:], strict=True):
        each.model = model
    how = {"machine": asked.machine, "out": asked.out}
    result = quality.measure(quality.QualityRequest(asked.models[0], first, others, **how), fetching)
    result.settings |= {"verb": "bench suite", "suite": asked.name}
    result.published = model_suites.seedlm(result.document(()))
    return result


def _all(asked: SuiteRequest, fetching: Fetching) -> Result:
    """Every suite that needs no MODEL, in one result; the others are noted as left out."""
    if asked.models:
        raise MlxeffError("bench suite all: wanted no MODEL: those of a suite are named with it")
    if asked.only:
        raise MlxeffError("bench suite all: --only selects a part of one suite: name it")
    joined = rounds.Results(Samples(None, {}, rounds.KEYS))
    whole = Result(here(), {"verb": "bench suite", "suite": "all", "suites": {}}, joined)
    for name, run in SUITES.items():
        if name in OF_MODELS:
            joined.skip(f"{name}: wants models: mlxeff bench suite {name} MODEL")
            continue
        found = run(replace(asked, name=name, out=asked.out and f"{asked.out}.{name}"), fetching)
        whole.settings["suites"][name] = found.settings
        joined.samples.all += found.measured.samples.all
        joined.samples.failed |= found.measured.samples.failed
        joined.arms |= found.measured.arms
        joined.skipped += found.measured.skipped
        joined.failed |= found.measured.failed
        whole.ceilings |= found.ceilings
        whole.published += found.published
        whole.against = found.against or whole.against
    return whole


SUITES: dict[str, Callable[[SuiteRequest, Fetching], Result]] = {
    "kvp-paper": _random(kvp_paper),
    "openelm-paper": _random(openelm_paper),
    "quantspec-paper": _quantspec,
    "seedlm-paper": _seedlm,
    "dynamoe": _dynamoe,
}
OF_MODELS = ("seedlm-paper", "dynamoe")  # suites that have no default model
