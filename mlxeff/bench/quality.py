"""`mlxeff bench quality`: perplexity of each arm, and how far its predictions are from those of the first one. The
numbers are those of `mlxeff eval ppl` and `eval kl`, in the format of the other benchmarks.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..assembly.techniques import check_switched, spelled
from ..errors import MlxeffError
from ..eval.perplexity import eval_kl, eval_ppl
from .contenders import Fetching
from .request import Machine, here, samples
from .result import Result
from .rounds import Results

VERB = "eval"  # the verb of `eval`, whose options the arms have


@dataclass(frozen=True)
class QualityRequest:
    """The options of `mlxeff bench quality`.

    model   the first arm
    values  all options of `mlxeff eval kl`, as parsed: those that say what is read, and how `model` is run
    others  the options of each --vs that say how it is run, with the attribute `model`
    """

    model: str
    values: argparse.Namespace
    others: Sequence[argparse.Namespace] = ()
    machine: Machine = field(default_factory=Machine)
    out: str | None = None


def measure(request: QualityRequest, fetching: Fetching) -> Result:
    """Run the request. Raises MlxeffError for contradictory options and for models with different tokenizers."""
    device = request.machine.use()
    arms = [(request.model, request.values)]
    arms += [(each.model or request.model, _merged(request.values, each)) for each in request.others]
    names = [f"{model} {spelled(values, VERB)}".strip() for model, values in arms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MlxeffError(f"bench quality: --vs: wanted another model or other options, got {twice!r} twice")
    for _, values in arms:
        check_switched(values)
    reading = ("text", "tokens", "context", "stride", "prompt", "step", "no_bos")
    described = {
        "verb": "bench quality",
        "model": request.model,
        "arm": names[0],
        "device": device,
        "reading": {name: getattr(request.values, name) for name in reading},
    }
    card = here()
    results = Results(samples(request.out, card, described))
    for place, (model, values) in enumerate(arms):
        name = names[place]
        found = next((each for each in results.samples.all if each["arm"] == name), None)
        if found is None:
            report = _report(arms[0], model, values, place == 0, fetching)
            found = _sample(name, report, device)
            results.samples.add(found)
        results.arms[name] = found["about"]
        if bad := found["about"]["not_finite"]:
            results.fail(f"{name}: {bad} losses are not finite")
    return Result(card, described, results, against=names[0])


def _merged(values: argparse.Namespace, other: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**(vars(values) | vars(other)))


def _report(first: tuple, model: str, values: argparse.Namespace, alone: bool, fetching: Fetching) -> dict:
    """The report of `eval`: of the first arm its perplexity, of another one also how it differs from the first."""
    given = {name: value for name, value in vars(values).items() if name != "model"}
    if alone:
        return eval_ppl(fetching, model, **given)
    against, options = first
    return eval_kl(fetching, model, **given, against=against, against_options=options)


def _sample(name: str, report: dict, device: str) -> dict:
    """The numbers of an arm, with their standard errors, and what is said `about` it."""
    values = {"ppl": report["perplexity"], "kl": report.get("kl"), "agreement": report.get("same_top")}
    errors = {"ppl": report["perplexity_error"], "kl": report.get("kl_error")}
    test = f"{report['tokens']} tokens in {report['windows']} windows of {report['context']}"
    facts = ("model", "fingerprint", "dtype", "kv_dtype", "compute", "backend", "techniques", "statistics", "text")
    return {
        "arm": name,
        "device": device,
        "test": test,
        "round": 0,
        "values": {metric: value for metric, value in values.items() if value is not None},
        "errors": {metric: error for metric, error in errors.items() if error is not None},
        "about": {"engine": "mlxeff", **{fact: report[fact] for fact in (*facts, "not_finite")}},
    }
