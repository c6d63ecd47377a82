"""The tables of techniques: STORED (named in a checkpoint's config.json), SWITCHED (switched on by an option of the
command line), FITTED (fitted by `mlxeff fit`) and TRACED (shown by `mlxeff trace`).

A new technique is added by an entry in one or more tables. No other module asks for a technique by name. The packages
of the techniques are imported inside of functions only, because the command line reads these tables for its help.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ..errors import MlxeffError, no_notices
from . import fit_options
from .options import IGNORE_KEYS, Option, integer, option, positive

if TYPE_CHECKING:
    from pathlib import Path

    import mlx.nn as nn

    from ..cache import Layer, LayerShape
    from ..cache.layer import LayerMaker
    from ..checkpoint import Source
    from ..decode import Model, Setup
    from ..running import RunOptions
    from .model import Loaded


@dataclass(frozen=True)
class Stored:
    """A technique that is stored in checkpoints: config.json names it by the entry `key`, and it replaces modules of
    the model.

    check(source)                    called before the model is built, to check the metadata of the weight files
    install(model, config, tensors)  called with the new model, to replace modules; `tensors` are the names of the
                                     tensors in the checkpoint, None where they are not known
    finish(model, origin)            called when the weights are loaded, to check them; `origin` names the checkpoint
    in_foreign_models                whether it is installed in models that mlx-lm builds, too

    The functions raise MlxeffError.
    """

    key: str
    install: Callable[["nn.Module", dict, Collection[str] | None], None]
    check: Callable[["Source"], None] = lambda _: None
    finish: Callable[["nn.Module", str], None] = lambda *_: None
    in_foreign_models: bool = True

    def applies(self, config: dict) -> bool:
        """Whether a config.json names the technique."""
        return self.key in config


def stored_in(config: dict) -> list[Stored]:
    """The techniques that a config.json names, in the order in which they are installed."""
    return [technique for technique in STORED if technique.applies(config)]


def architecture(config: dict) -> dict:
    """A config.json without the entries of techniques, for the class of the model."""
    return {key: value for key, value in config.items() if key not in {technique.key for technique in STORED}}


@dataclass(frozen=True)
class Switched:
    """A technique that an option of the command line switches on, and that changes how a model is run.

    name                               key of its report in the `--json` document
    option                             the option; its value says how the technique is used
    dials                              further options of the technique
    verbs                              the verbs that have the option
    apply(setup, base, value, values)  returns `setup` with the technique; `base` is the loaded model, `values` are
                                       those of all options
    label(value)                       this use of the technique in words, for reports
    spelled(value)                     the value as it is written on the command line
    identity(value)                    identifies the files that the value names, such as by a hash, so that samples of
                                       a benchmark are not mixed with those of other files under the same name
    check(value, values)               called before a model is loaded, with the values of all options too, to refuse
                                       contradictions
    check_model(value, model, values)  called with the model before its weights are read, to refuse one that has no
                                       place for the technique
    check_timed(value)                 called before the time to the first token is measured, to refuse values that
                                       cannot change it
    check_scored(value, base, scored)  called with the model, loaded or not, before given tokens are scored, to refuse
                                       values that cannot change what is predicted

    The functions raise MlxeffError.
    """

    name: str
    option: Option
    verbs: tuple[str, ...]
    apply: Callable[["Setup", "Loaded", object, argparse.Namespace], "Setup"]
    label: Callable[[object], str] = str
    spelled: Callable[[object], str] = str
    identity: Callable[[object], str] = str
    dials: tuple[Option, ...] = ()
    check: Callable[[object, argparse.Namespace], None] = lambda *_: None
    check_model: Callable[[object, "Unloaded", argparse.Namespace], None] = lambda *_: None
    check_timed: Callable[[object], None] = lambda _: None
    check_scored: Callable[[object, "Loaded | Unloaded", "Scored"], None] = lambda *_: None

    def value(self, values: argparse.Namespace) -> object:
        """The value of the option; None where it was not given."""
        return getattr(values, self.option.key, None)


class Unloaded(NamedTuple):
    """A model whose weights are not read yet, as far as its files describe it."""

    model: "Model"  # of our own families with the modules of its techniques; of another one only its config
    path: "Path"
    fingerprint: str  # "" where only loading tells it


class Scored(NamedTuple):
    """How given tokens are read to measure quality."""

    prompt: int | None  # tokens that are read as a prompt; None: their number differs from text to text
    step: int  # tokens of a pass after them, at most


def check_scored(values: argparse.Namespace, base: "Loaded | Unloaded", scored: Scored) -> None:
    """Let each technique refuse values that cannot change a measure of quality. Raises MlxeffError."""
    for technique in SWITCHED:
        if value := technique.value(values):
            technique.check_scored(value, base, scored)


def used(values: argparse.Namespace) -> dict[str, str]:
    """The techniques that the parsed values switch on: name → label of its value."""
    return {each.name: each.label(each.value(values)) for each in SWITCHED if each.value(values)}


def switch_options(verb: str) -> list[Option]:
    """The options of the techniques that the verb has."""
    return [each for technique in switched_for(verb) for each in (technique.option, *technique.dials)]


def switched_for(verb: str) -> list[Switched]:
    """The techniques whose option the verb has."""
    return [technique for technique in SWITCHED if verb in technique.verbs]


def check_switched(values: argparse.Namespace) -> None:
    """Let each technique refuse contradictions between the parsed values. Raises MlxeffError."""
    for technique in SWITCHED:
        if technique.value(values):
            technique.check(technique.value(values), values)
    _check_speculation(values)


def checked_before(values: argparse.Namespace) -> Callable[[Unloaded], None]:
    """A function for `model.load_path` that refuses a model in which the parsed values cannot work, before its weights
    are read: by its architecture, its heads, and the technique that it lacks. It raises MlxeffError."""

    def check(found: Unloaded) -> None:
        if not found.model.seams:
            found.model.check(run_options(values))
        with no_notices():  # the cache that is used gives them
            if values.kv_cache in CACHES:
                found.model.new_cache(values.kv_cache)  # refuses heads that the planes do not support
            for technique in SWITCHED:
                if value := technique.value(values):
                    technique.check_model(value, found, values)

    return check


def switch_on(setup: "Setup", base: "Loaded", values: argparse.Namespace) -> "Setup":
    """The setup with all techniques that the parsed values switch on; `base` is the loaded model."""
    for technique in SWITCHED:
        if value := technique.value(values):
            setup = technique.apply(setup, base, value, values)
    return setup


def spelled(values: argparse.Namespace, verb: str) -> str:
    """The options in PRECISION and those of the techniques that the verb has, as they are written on the command line,
    as far as their values are not the defaults."""
    words = [
        f"{each.name} {value}"
        for each in PRECISION
        if (value := getattr(values, each.key, None)) not in (None, each.keywords.get("default"))
    ]
    for technique in switched_for(verb):
        if value := technique.value(values):
            flag = technique.option.keywords.get("action") == "store_true"
            words.append(technique.option.name + ("" if flag else f" {technique.spelled(value)}"))
        dials = ((dial.name, getattr(values, dial.key, None)) for dial in technique.dials)
        words += [f"{name} {given}" for name, given in dials if given is not None]
    return " ".join(words)


@dataclass(frozen=True)
class Subcommand:
    """Something that `mlxeff VERB NAME` does for a technique, where the verb is `fit` or `trace`.

    name                     NAME
    summary                  one line for the help
    options                  its options
    run(progress, **values)  does it; `values` are the parsed values of the options, of `trace` also the `text`. Returns
                             the report for `--json`
    lines(report)            the report as lines for people
    examples                 whole commands, which the help begins with
    """

    name: str
    summary: str
    options: tuple[Option, ...]
    run: Callable[..., dict]
    lines: Callable[[dict], list[str]]
    examples: tuple[str, ...] = ()


def reports(setup: "Setup") -> dict:
    """The report of each technique for `--json`, by its name; None for a technique that is not in the setup."""
    return dict.fromkeys(technique.name for technique in SWITCHED) | setup.report()


def run_options(values: argparse.Namespace) -> "RunOptions":
    """`RunOptions` from the parsed values of the options in PRECISION."""
    from ..running import RunOptions

    return RunOptions(compute=values.compute, kv=values.kv_cache)


# SeedLM


def _check_seedlm(source: "Source") -> None:
    """Raises MlxeffError where the weight files are not marked as those of this version of SeedLM."""
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

    if config["quantization"]:  # null and {} mean that nothing is quantised
        install(model, config["quantization"], tensors)


# DynaMoE


def _check_dynamoe(source: "Source") -> None:
    """Raises MlxeffError for an architecture whose feed-forward networks are not our own."""
    from .model import MODELS

    kind = source.config and source.config.get("model_type")
    if kind not in MODELS:
        wanted = f"wanted an architecture of our own ({', '.join(sorted(MODELS))}), got {kind!r}"
        raise MlxeffError(f"{source.path}: config: dynamoe: {wanted}")


def _install_dynamoe(model: "nn.Module", config: dict, _: Collection[str] | None) -> None:
    from ..dynamoe import install, sparse_install

    entry = config["dynamoe"]
    (sparse_install if sparse_install.is_sparse(entry) else install).install(model, entry)


def _finish_dynamoe(model: "nn.Module", origin: str) -> None:
    from ..dynamoe import install, sparse_install

    install.finish(model, origin)
    sparse_install.finish(model, origin)


class Sensitivity(NamedTuple):
    """The mean share of the neurons of the feed-forward networks that tokens compute, 0 to 1."""

    value: float


def parse_sensitivity(text: str) -> Sensitivity:
    """The value of `--sensitivity`, a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text!r}")
    return Sensitivity(value)


def parse_draft(text: str) -> Sensitivity:
    """The value of `--draft`: "dynamoe:0.33" → its sensitivity."""
    name, _, rest = text.partition(":")
    if name != "dynamoe":
        raise argparse.ArgumentTypeError(f"wanted dynamoe:S, got {text!r}")
    return parse_sensitivity(rest)


def _check_scored_sensitivity(_: Sensitivity, base: "Loaded | Unloaded", scored: Scored) -> None:
    """Raises MlxeffError where the passes have more tokens than the networks leave out inputs for."""
    from .dynamoe import networks

    most = min(getattr(each, "most_sparse", scored.step) for each in networks(base, "--sensitivity"))
    if scored.step > most:
        text = f"this model leaves out work in passes of at most {most} tokens, as decoding has them"
        raise MlxeffError(f"--sensitivity: {text}: wanted --step {most} or less, got {scored.step}")


def _check_dynamic(option: str) -> Callable[[Sensitivity, Unloaded, argparse.Namespace], None]:
    """The check that a model is a DynaMoE; `option` begins the message."""

    def check(_: Sensitivity, found: Unloaded, __: argparse.Namespace) -> None:
        from .dynamoe import networks

        networks(found, option)

    return check


def _apply_sensitivity(setup: "Setup", base: "Loaded", value: Sensitivity, _: argparse.Namespace) -> "Setup":
    from .dynamoe import with_sensitivity

    return with_sensitivity(setup, base, value.value)


def _apply_dynamoe_draft(setup: "Setup", base: "Loaded", value: Sensitivity, values: argparse.Namespace) -> "Setup":
    from .dynamoe import with_draft

    return with_draft(setup, base, value.value, values.num_draft_tokens)


def _fit_dynamoe(progress: object, **values) -> dict:
    from .fitting_dynamoe import fit_dynamoe

    return fit_dynamoe(progress=progress, **values)


def _trace_dynamoe(progress: object, sensitivity: Sensitivity, **values) -> dict:
    from .tracing import trace_dynamoe

    return trace_dynamoe(progress=progress, sensitivity=sensitivity.value, **values)


def _trace_lines(report: dict) -> list[str]:
    picture = f" and {report['picture']}" if report["picture"] else ""
    what = f"{len(report['tokens'])} tokens, {report['mean_fraction']:.1%} of the feed-forward neurons"
    return [f"{report['page']}{picture}: {what}"]


# KV Prediction


def parse_pair(text: str) -> tuple[str, int | None, bool]:
    """The value of `--kv-predict`: "PAIR:keep=8:refine" → ("PAIR", 8, True)."""
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


# (name of the pair, keep, refine), as `parse_pair` returns it.
PairValue = tuple[str, int | None, bool]


def _check_pair(value: PairValue, values: argparse.Namespace) -> None:
    from .. import hub

    if getattr(values, "prompt_cache", None):
        raise MlxeffError("--kv-predict: predicted KV is not for --prompt-cache: give one of the two")
    hub.resolve_pair(value[0])


def _check_model_of_pair(value: PairValue, found: Unloaded, values: argparse.Namespace) -> None:
    """Raises MlxeffError for a model that has no place for the pair or is not its base, and for a refinement on a kind
    of KV cache that cannot be taken back to every token."""
    from .. import hub
    from ..kvprediction.files import read_config
    from .pair import require_base

    folder = hub.resolve_pair(value[0])
    require_base(folder, read_config(folder), found)
    kind = values.kv_cache
    if value[2] and kind in CACHES and not found.model.new_cache(kind).rewinds_exactly:
        text = f"wanted a KV cache that can be taken back to every token, such as int8, got {kind}"
        raise MlxeffError(f"--kv-predict {value[0]}: refine: {text}")


def _check_timed_pair(value: PairValue) -> None:
    if value[2]:
        raise MlxeffError("bench ttft: :refine changes nothing before the first token: leave it out")


def _check_scored_pair(value: PairValue, _: "Loaded | Unloaded", scored: Scored) -> None:
    """Raises MlxeffError for a prompt of which nothing is predicted, and for a refinement that has no decode steps."""
    from ..kvprediction.predict import SINKS, predicted_range

    name, keep, refine = value
    computed = (1, 0) if keep is None else (keep, SINKS)
    if scored.prompt is not None and len(range(*predicted_range(scored.prompt, *computed))) == 0:
        text = f"wanted --prompt N above {sum(computed)}, of which tokens are predicted"
        raise MlxeffError(f"--kv-predict {name}: {text}, got {scored.prompt}")
    if refine and scored.step != 1:
        raise MlxeffError(
            f"--kv-predict: :refine works between the steps of decoding: wanted --step 1, got {scored.step}"
        )


def _apply_pair(setup: "Setup", base: "Loaded", value: PairValue, values: argparse.Namespace) -> "Setup":
    from .pair import load_pair

    name, keep, refine = value
    return replace(setup, reading=load_pair(name, base, offline=values.offline, keep=keep, refine=refine))


def _pair_label(value: PairValue) -> str:
    name, keep, refine = value
    return name + ("" if keep is None else f":keep={keep}") + (":refine" if refine else "")


def _pair_identity(value: PairValue) -> str:
    from .. import hub
    from ..kvprediction.files import digest

    return digest(hub.resolve_pair(value[0]))


def _fit_kv_predictor(progress: object, **values) -> dict:
    from .fitting import fit_kv_predictor

    return fit_kv_predictor(progress=progress, **values)


# Speculative decoding


def _apply_quantspec(setup: "Setup", base: "Loaded", _: object, values: argparse.Namespace) -> "Setup":
    from .speculation import quantspec

    return quantspec(setup, base, values.draft_weights or "auto", values.num_draft_tokens)


def _check_quantspec(_: object, values: argparse.Namespace) -> None:
    from .speculation import require_kind

    require_kind(values.kv_cache)


def _check_model_of_quantspec(_: object, found: Unloaded, __: argparse.Namespace) -> None:
    from .speculation import require_planes

    require_planes(found.model)


def _apply_draft_model(setup: "Setup", base: "Loaded", value: str, values: argparse.Namespace) -> "Setup":
    from .speculation import draft_model

    return draft_model(setup, base, value, values.offline, values.num_draft_tokens)


def _apply_lookup(setup: "Setup", base: "Loaded", _: object, values: argparse.Namespace) -> "Setup":
    from .speculation import prompt_lookup

    return prompt_lookup(setup, base, values.num_draft_tokens)


def _no_drafts(*_: object) -> None:
    """Raises MlxeffError: drafts are verified, so that they change the speed only."""
    text = "drafts are verified: they change the speed and not what is predicted: leave them out"
    raise MlxeffError(f"{text} (of QuantSpec, --kv-cache int8 measures the cache)")


def _check_speculation(values: argparse.Namespace) -> None:
    """Raises MlxeffError for two drafters, and for dials without one."""
    given = {name: getattr(values, name, None) for name in ("quantspec", "draft_model", "prompt_lookup", "draft")}
    if given["quantspec"] and given["draft_model"]:
        raise MlxeffError("--quantspec: the model drafts itself, so --draft-model has no place: give one of the two")
    if given["draft"] and given["draft_model"]:
        raise MlxeffError(
            "--draft dynamoe: the model drafts itself, so --draft-model has no place: give one of the two"
        )
    if getattr(values, "num_draft_tokens", None) and not any(given.values()):
        drafters = "--quantspec, --draft-model, --draft or --prompt-lookup"
        raise MlxeffError(f"--num-draft-tokens: wanted {drafters} with it, got none")
    if getattr(values, "draft_weights", None) and not given["quantspec"]:
        raise MlxeffError("--draft-weights: wanted --quantspec with it, got none")
    pair = getattr(values, "kv_predict", None)
    if pair and pair[2] and any(given.values()):
        raise MlxeffError("--kv-predict: :refine works between the steps of plain decoding: leave it or drafts out")


# QuantSpec's KV cache


def _plane_layer(kind: str) -> "LayerMaker":
    def make(shape: "LayerShape") -> "Layer":
        from ..quantspec.cache import PlaneLayer

        return PlaneLayer(shape, kind)

    return make


# Kind of KV cache that a technique adds to cache.KINDS → function that makes the cache of one layer.
CACHES = {kind: _plane_layer(kind) for kind in ("int8", "int4", "k8v4")}
MOST_DRAFTED = 7  # as speculation.following.MOST, which is slow to import
# Options of all verbs that run a model.
PRECISION: tuple[Option, ...] = (
    option(
        "--compute",
        choices=("exact", "bf16", "int8"),
        default="exact",
        help="arithmetic of the matrix products in the CPU kernels: exact, float32 (default); bf16, operands rounded "
        "to bfloat16 where the CPU is faster with it (AMX); int8, activations rounded to 8 bits",
    ),
    option(
        "--kv-cache",
        "--kv-dtype",
        choices=("float32", "float16", "bfloat16", *CACHES),
        help="how the KV cache stores a number (default: in the type that the model computes in, float32 in the CPU "
        "kernels); int8 and int4: rotated and quantised, of int4 the newest 64 to 127 tokens in 8 bits; k8v4: keys as "
        "in int8, values as in int4",
    ),
)
STORED: Sequence[Stored] = (
    Stored("dynamoe", _install_dynamoe, _check_dynamoe, _finish_dynamoe, in_foreign_models=False),
    Stored("seedlm", _install_seedlm, _check_seedlm, _finish_seedlm),
    Stored("quantization", _install_quantization, in_foreign_models=False),  # mlx-lm quantises its models itself
)
SWITCHED: Sequence[Switched] = (
    Switched(
        name="kv_prediction",
        option=option(
            "--kv-predict",
            metavar="PAIR[:keep=K][:refine]",
            type=parse_pair,
            help="KV Prediction: read the prompt with a smaller model, and predict the keys and values of the model "
            "from it. PAIR is a folder that `mlxeff fit kv-predictor` made, or a name from `mlxeff models`. The model "
            "itself computes the last prompt token; with keep=K the last K and the first four; with refine also the "
            "others, while it answers",
        ),
        verbs=("generate", "chat", "bench ttft", "bench decode", "eval"),
        apply=_apply_pair,
        label=_pair_label,
        spelled=_pair_label,
        identity=_pair_identity,
        check=_check_pair,
        check_model=_check_model_of_pair,
        check_timed=_check_timed_pair,
        check_scored=_check_scored_pair,
    ),
    Switched(
        name="quantspec",
        option=option(
            "--quantspec",
            action="store_true",
            help="self-speculative decoding: the model drafts tokens on 4 bits of an 8-bit KV cache and verifies them "
            "on all 8, several in one pass; the same answers as with --kv-cache int8",
        ),
        verbs=("generate", "chat", "bench decode", "eval"),
        apply=_apply_quantspec,
        label=lambda _: "on",
        check=_check_quantspec,
        check_model=_check_model_of_quantspec,
        check_scored=_no_drafts,
        dials=(
            option(
                "--draft-weights",
                choices=("auto", "shared", "upper", "q4", "q6"),
                help="weights of QuantSpec's draft: shared, the model's own; upper, the upper halves of the model's "
                "own, which have 8 bits; q4 and q6, a copy in 4 or 6 bits; auto, q6 for weights of 16 bits, q4 for 8, "
                "shared for fewer",
            ),
            option(
                "--num-draft-tokens",
                metavar="N",
                type=lambda text: integer(text, lambda n: 1 <= n <= MOST_DRAFTED, f"1 to {MOST_DRAFTED}"),
                help=f"tokens in each draft, 1 to {MOST_DRAFTED} (default: as many as pay by measurement, none where "
                "plain decoding is faster)",
            ),
        ),
    ),
    Switched(
        name="dynamoe_draft",
        option=option(
            "--draft",
            metavar="dynamoe:S",
            type=parse_draft,
            help="speculative decoding in which a DynaMoE model drafts for itself: drafts compute a share S of the "
            "feed-forward networks (as --sensitivity), with the same weights and KV cache; with --quantspec on top of "
            "its draft",
        ),
        verbs=("generate", "chat", "bench decode", "eval"),
        apply=_apply_dynamoe_draft,
        label=lambda value: f"dynamoe:{value.value:g}",
        check_model=_check_dynamic("--draft dynamoe"),
        spelled=lambda value: f"dynamoe:{value.value:g}",
        check_scored=_no_drafts,
    ),
    Switched(
        name="draft_model",
        option=option(
            "--draft-model",
            metavar="MODEL",
            help="speculative decoding with drafts of a smaller model of the same vocabulary",
        ),
        verbs=("generate", "chat", "bench decode", "eval"),
        apply=_apply_draft_model,
        check_scored=_no_drafts,
    ),
    Switched(
        name="prompt_lookup",
        option=option(
            "--prompt-lookup",
            action="store_true",
            help="speculative decoding with drafts that repeat what followed the same words before; together with "
            "--quantspec or --draft-model, these verify the repeated words first",
        ),
        verbs=("generate", "chat", "bench decode", "eval"),
        apply=_apply_lookup,
        label=lambda _: "on",
        check_scored=_no_drafts,
    ),
    Switched(  # after those that replace the reading of the prompt
        name="dynamoe",
        option=option(
            "--sensitivity",
            metavar="S",
            type=parse_sensitivity,
            help="of a DynaMoE model: the mean share of its feed-forward networks that tokens compute, from 0 (as "
            "little as it can) to 1 (all, the default); easy tokens compute less",
        ),
        verbs=("generate", "chat", "bench ttft", "bench decode", "eval"),
        apply=_apply_sensitivity,
        check_model=_check_dynamic("--sensitivity"),
        check_scored=_check_scored_sensitivity,
        label=lambda value: f"sensitivity {value.value:g}",
        spelled=lambda value: f"{value.value:g}",
        identity=lambda value: f"{value.value:g}",
    ),
)
FITTED: Sequence[Subcommand] = (
    Subcommand(
        name="kv-predictor",
        summary="a pair for `generate --kv-predict`: linear maps from the states of a small model to the keys and "
        "values of a base model",
        options=fit_options.KV_PREDICTOR,
        run=_fit_kv_predictor,
        lines=fit_options.kv_predictor_lines,
        examples=(
            "mlxeff fit kv-predictor smollm2-135m --aux lp:0.5 --out ./pair",
            "mlxeff generate --kv-predict ./pair --file book.txt",
        ),
    ),
    Subcommand(
        name="dynamoe",
        summary="a DynaMoE model for `generate --sensitivity`: each token computes as much of the feed-forward "
        "networks as it needs",
        options=fit_options.DYNAMOE,
        run=_fit_dynamoe,
        lines=fit_options.dynamoe_lines,
        examples=(
            "mlxeff fit dynamoe smollm2-135m --out ./dyn",
            'mlxeff generate --model ./dyn --sensitivity 0.7 "Why is the sky blue?"',
        ),
    ),
)
TRACED: Sequence[Subcommand] = (
    Subcommand(
        name="dynamoe",
        summary="which tokens of a text take how much of a DynaMoE model: a page of HTML, and a picture",
        options=(
            option("model", metavar="DYN", help="the DynaMoE model: a folder or hub id"),
            option("prompt", nargs="?", metavar="TEXT", help="the text; or name a --file"),
            option("--file", metavar="FILE", help="read the text from a UTF-8 file"),
            option("--out", metavar="PAGE.html", required=True, help="the new page; the picture lies beside it"),
            option(
                "--sensitivity",
                metavar="S",
                type=parse_sensitivity,
                default=Sensitivity(0.8),
                help="as of `generate` (default 0.8)",
            ),
            IGNORE_KEYS,
        ),
        run=_trace_dynamoe,
        lines=_trace_lines,
        examples=('mlxeff trace dynamoe ./dyn "The sky is blue." --out page.html',),
    ),
)
