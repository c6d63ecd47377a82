"""The techniques, in tables: which of them a checkpoint names, which of them an option of the command line switches on,
and what `mlxeff fit` can fit. A new technique is an entry here; nothing else asks for one by name.

Imports no room at the top: the command line reads these tables for its help.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import MlxeffError
from . import fit_options
from .options import Option, option, positive

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..checkpoint import Source
    from ..decode import Setup
    from ..running import RunOptions
    from .model import Loaded


@dataclass(frozen=True)
class Stored:
    """A technique that a checkpoint names in its config.json by the entry `key`: its modules replace the model's own.

    check(source)                    before the model is built: what the weight files say of themselves
    install(model, config, tensors)  before the weights are put in; `tensors`: the names in the checkpoint, if known
    finish(model, origin)            with the weights read
    in_foreign_models                whether it is installed in models that mlx-lm builds, which quantises itself
    """

    key: str
    install: Callable[["nn.Module", dict, Collection[str] | None], None]
    check: Callable[["Source"], None] = lambda _: None
    finish: Callable[["nn.Module", str], None] = lambda *_: None
    in_foreign_models: bool = True

    def applies(self, config: dict) -> bool:
        """Whether the config names it."""
        return self.key in config


def stored_in(config: dict) -> list[Stored]:
    """The techniques of a config.json, in the order in which they are installed."""
    return [technique for technique in STORED if technique.applies(config)]


def architecture(config: dict) -> dict:
    """A config.json without the entries of techniques: what the model's family reads."""
    return {key: value for key, value in config.items() if key not in {technique.key for technique in STORED}}


@dataclass(frozen=True)
class Switched:
    """A technique that is switched on by `option` and changes how a model is run.

    name         its key in `--json`, where it reports
    verbs        which verbs have the option
    check        (value, all parsed values): refuses contradictions before anything is loaded
    check_timed  value → refuses what makes no difference to the time to the first token
    apply        (setup, base, value, offline) → the setup with the technique in it
    label        value → the name of an arm of a benchmark
    identity     value → what tells one such thing from another of the same name, for samples that are kept
    """

    name: str
    option: Option
    verbs: tuple[str, ...]
    apply: Callable[["Setup", "Loaded", object, bool], "Setup"]
    label: Callable[[object], str]
    identity: Callable[[object], str]
    check: Callable[[object, argparse.Namespace], None] = lambda *_: None
    check_timed: Callable[[object], None] = lambda _: None

    def value(self, values: argparse.Namespace) -> object:
        """What was given, None without the option."""
        return getattr(values, self.option.key, None)


def switched_for(verb: str) -> list[Switched]:
    """The techniques that `verb` has an option for."""
    return [technique for technique in SWITCHED if verb in technique.verbs]


def check_switched(values: argparse.Namespace) -> None:
    """Refuse contradictions before anything is loaded."""
    for technique in SWITCHED:
        if technique.value(values):
            technique.check(technique.value(values), values)


def switch_on(setup: "Setup", base: "Loaded", values: argparse.Namespace) -> "Setup":
    """The setup with the techniques that the parsed values ask for."""
    for technique in SWITCHED:
        if value := technique.value(values):
            setup = technique.apply(setup, base, value, values.offline)
    return setup


@dataclass(frozen=True)
class Fitted:
    """What `mlxeff fit NAME` fits.

    run      (progress, **parsed values of the options) → the report for --json
    lines    report → what people read of it
    """

    name: str
    summary: str
    options: tuple[Option, ...]
    run: Callable[..., dict]
    lines: Callable[[dict], list[str]]


def reports(setup: "Setup") -> dict:
    """What ran beside the plain model, for `--json`: each technique's report, None of one that took no part."""
    return dict.fromkeys(technique.name for technique in SWITCHED) | setup.report()


def run_options(values: argparse.Namespace) -> "RunOptions":
    """What the options of PRECISION say."""
    from ..running import RunOptions

    return RunOptions(compute=values.compute, kv=values.kv_dtype)


# SeedLM


def _check_seedlm(source: "Source") -> None:
    from ..seedlm.install import METADATA, check_metadata

    if METADATA not in source.metadata:
        raise MlxeffError(f"{source.path}: config has seed-encoded modules, the weights no {METADATA!r} header")
    check_metadata(source.metadata[METADATA], str(source.path))


def _install_seedlm(model: "nn.Module", config: dict, _: Collection[str] | None) -> None:
    from ..seedlm.install import install

    install(model, config["seedlm"])


def _finish_seedlm(model: "nn.Module", origin: str) -> None:
    from ..seedlm.install import finish

    finish(model, origin)


# MLX's affine quantisation


def _install_quantization(model: "nn.Module", config: dict, tensors: Collection[str] | None) -> None:
    from .quantization import install

    if config["quantization"]:  # null, and an empty entry, are none
        install(model, config["quantization"], tensors)


# KV Prediction


def parse_pair(text: str) -> tuple[str, int | None, bool]:
    """ "PAIR:keep=8:refine" → ("PAIR", 8, True)."""
    keep, refine = None, False
    while True:
        head, _, last = text.rpartition(":")
        if head and last == "refine":
            refine = True
        elif head and last.startswith("keep="):
            keep = positive(last.removeprefix("keep="))
        else:
            return text, keep, refine
        text = head


def _check_pair(_: object, values: argparse.Namespace) -> None:
    if getattr(values, "prompt_cache", None):
        raise MlxeffError("--kv-predict: predicted KV is not for --prompt-cache: give one of the two")


def _check_timed_pair(value: tuple[str, int | None, bool]) -> None:
    if value[2]:
        raise MlxeffError("bench ttft: :refine changes nothing before the first token: leave it out")


def _apply_pair(setup: "Setup", base: "Loaded", value: tuple[str, int | None, bool], offline: bool) -> "Setup":
    from .pair import load_pair

    name, keep, refine = value
    return replace(setup, reading=load_pair(name, base, offline=offline, keep=keep, refine=refine))


def _pair_label(value: tuple[str, int | None, bool]) -> str:
    name, keep, _ = value
    return name if keep is None else f"{name}:keep={keep}"


def _pair_identity(value: tuple[str, int | None, bool]) -> str:
    from .. import hub
    from ..kvprediction.files import digest

    return digest(hub.resolve_pair(value[0]))


def _fit_kv_predictor(progress: object, **values) -> dict:
    from .fitting import fit_kv_predictor

    return fit_kv_predictor(progress=progress, **values)


PRECISION: tuple[Option, ...] = (
    option(
        "--compute",
        choices=("exact", "bf16", "int8"),
        default="exact",
        help="products of the CPU kernels: exact float32 (default), operands rounded to bf16 where faster (AMX), "
        "or activations rounded to int8",
    ),
    option(
        "--kv-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the KV cache (default: the type that the model computes in, float32 in the CPU kernels)",
    ),
)
STORED: Sequence[Stored] = (
    Stored("seedlm", _install_seedlm, _check_seedlm, _finish_seedlm),
    Stored("quantization", _install_quantization, in_foreign_models=False),
)
SWITCHED: Sequence[Switched] = (
    Switched(
        name="kv_prediction",
        option=option(
            "--kv-predict",
            metavar="PAIR[:keep=K][:refine]",
            type=parse_pair,
            help="predict the prompt's KV with a pair: a folder that `mlxeff fit kv-predictor` made, or a name of "
            "`mlxeff models`; the model itself computes the last K tokens and the first ones (default: the last "
            "token), with refine the others too, while it answers",
        ),
        verbs=("generate", "bench ttft"),
        apply=_apply_pair,
        label=_pair_label,
        identity=_pair_identity,
        check=_check_pair,
        check_timed=_check_timed_pair,
    ),
)
FITTED: Sequence[Fitted] = (
    Fitted(
        name="kv-predictor",
        summary="a pair for `generate --kv-predict`: linear maps from a small model's KV to the base's",
        options=fit_options.KV_PREDICTOR,
        run=_fit_kv_predictor,
        lines=fit_options.kv_predictor_lines,
    ),
)
