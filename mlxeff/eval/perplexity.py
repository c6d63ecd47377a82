"""`mlxeff eval ppl` and `mlxeff eval kl` as Python calls: how a model predicts a text, alone and beside a reference.

Perplexity is exp of the mean loss over the scored tokens; the windows are those of `windows`, and their tokens are read
as `scoring` says. The KL divergence is KL(reference ‖ model): how many nats the model loses where the reference is
right. Distributions are compared pass by pass, so what is kept is one number for each token.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..assembly.fitting import Progress
from ..assembly.techniques import Scored
from ..calibration import read_text
from ..errors import MlxeffError, notices
from ..tokenizer import Tokenizer
from .measures import Values, divergences, finite, losses, perplexity, same_top
from .scoring import SideBySide
from .subject import Subject, how, load, require_context, run_as, statistics
from .windows import Cut, Window, bos_of, cut_of, text_ids, windows

CONTEXT = 1024  # tokens of a window, where nothing else is asked for and the model has room for them
OWN_TEXT = (
    "measured on the package's own text, which techniques are fitted on where no other is named: "
    "--text FILE names another"
)


@dataclass
class Found:
    """What was found for each scored token: the losses of the model; beside a reference also its losses, the
    divergences from it, and whether the first choices are the same."""

    model: Values = field(default_factory=Values)
    against: Values = field(default_factory=Values)
    kl: Values = field(default_factory=Values)
    same: Values = field(default_factory=Values)


def eval_ppl(progress: Progress, model: str, **values) -> dict:
    """Measure the perplexity of `model` on a text. `values` are the options of `mlxeff eval ppl`, see `verbs`. Returns
    the report that the command prints with `--json`, without the notices. Raises MlxeffError."""
    options, began = argparse.Namespace(**values), time.perf_counter()
    text = read_text(options.text)
    subject = load(model, options, progress, _scored(options))
    report, found = _measure([subject], options, *text, progress)
    return {
        **subject.report(),
        **report,
        **perplexity(found.model),
        "seconds": round(time.perf_counter() - began, 2),
    }


def eval_kl(progress: Progress, model: str, **values) -> dict:
    """Measure how the predictions of `model` differ from those of a reference, another model or the same one with other
    options. `values` are the options of `mlxeff eval kl`, see `verbs`. Returns the report that the command prints with
    `--json`, without the notices. Raises MlxeffError, also for models with different tokenizers."""
    options, began = argparse.Namespace(**values), time.perf_counter()
    text = read_text(options.text)
    name = options.against or model
    other = argparse.Namespace(**(vars(options) | vars(options.against_options)))
    scored = _scored(options)
    subject = load(model, options, progress, scored)
    counted = options.sensitivity or other.sensitivity  # by the networks themselves, which are then not shared
    if name == model and not counted:
        reference = run_as(name, subject.loaded, other, scored)
    else:
        reference = load(name, other, progress, scored)
    if name == model and _same_way(options, other):
        notices.warning("%s is compared with itself: --against names another model, --against-options changes it", name)
    report, found = _measure([subject, reference], options, *text, progress)
    kl = found.kl
    return {
        **subject.report(),
        **report,
        **perplexity(found.model),
        "kl": finite(kl.mean()),
        "kl_error": finite(kl.error()),
        **{f"kl_{name}": finite(kl.quantile(share)) for name, share in (("median", 0.5), ("p99", 0.99), ("max", 1))},
        "same_top": found.same.mean(),
        "not_finite": found.model.not_finite + found.against.not_finite + found.kl.not_finite,
        "against": {**reference.report(), **perplexity(found.against)},
        "seconds": round(time.perf_counter() - began, 2),
    }


def _same_way(first: argparse.Namespace, second: argparse.Namespace) -> bool:
    """Whether both run a model in the same way."""
    return all(getattr(second, key) == value for key, value in vars(first).items())


def _scored(options: argparse.Namespace) -> Scored:
    """How the windows are read."""
    return Scored(options.prompt or 1, options.step)


def _measure(
    subjects: Sequence[Subject], options: argparse.Namespace, text: str, origin: str, progress: Progress
) -> tuple[dict, Found]:
    """(What was read and how, for the report; what was found) for one subject, or for one and its reference, on a text
    with its name and hash, `origin`."""
    main = subjects[0]
    if options.text is None:
        notices.info(OWN_TEXT)
    limits = [each.loaded.model.context_length for each in subjects]
    context = options.context or min([CONTEXT, *(limit for limit in limits if limit)])
    require_context(subjects, context, "--context", options.step)
    cut = cut_of(context, options.stride, options.prompt, None if options.no_bos else bos_of(main.loaded.tokenizer))
    rows = [each.loaded.model.vocab_size for each in subjects]
    ids = text_ids(main.loaded.tokenizer, text, options.tokens, rows[0], origin)
    if len(subjects) > 1:
        _require_same_tokens(subjects, text, ids)
    pieces = windows(ids, cut, origin)
    found = _score(subjects, pieces, options.step, progress)
    for subject, values in zip(subjects, (found.model, found.against)):
        if bad := values.not_finite:
            notices.warning("%s: %d of %d losses are NaN or infinite", subject.name, bad, len(values.all()))
    return _described(origin, ids, pieces, cut, options.step), found


def _described(origin: str, ids: Sequence[int], pieces: Sequence[Window], cut: Cut, step: int) -> dict:
    """What is read, and how, for the report."""
    return {
        "text": origin,
        "text_tokens": len(ids),
        "windows": len(pieces),
        "context": cut.context,
        "stride": cut.stride,
        "prompt": cut.prompt,
        "step": step,
        "bos": cut.bos is not None,
    }


def _score(subjects: Sequence[Subject], pieces: Sequence[Window], step: int, progress: Progress) -> Found:
    """Score all windows."""
    found, setups = Found(), [each.setup for each in subjects]
    total, done = sum(len(piece.ids) - 1 for piece in pieces), 0
    with progress("scoring", "tok") as show:
        for piece in pieces:
            at = piece.prompt
            run = SideBySide(setups, piece.ids, piece.prompt, step, [each.step_size for each in subjects])
            for rows, targets in run:
                skipped = max(0, piece.first - at)  # read, and scored in the window before
                at += len(targets)
                if skipped < len(targets):
                    _add(found, [each[skipped:] for each in rows], targets[skipped:])
                if show:
                    show(done + at - 1, total)
            done += len(piece.ids) - 1
            for subject, cache in zip(subjects, run.caches, strict=True):
                subject.note(cache)
    return found


def _add(found: Found, rows: list, targets) -> None:
    """Add what one pass found: log-probabilities (C, V) of the model, and of the reference if there is one."""
    found.model.add(losses(rows[0], targets))
    if len(rows) > 1:
        model, truth = rows
        found.against.add(losses(truth, targets))
        found.kl.add(divergences(model, truth))
        found.same.add(same_top(model, truth))


def _require_same_tokens(subjects: Sequence[Subject], text: str, ids: Sequence[int]) -> None:
    """Raises MlxeffError where the two models have other vocabularies, or their tokenizers other ids for the text."""
    model, other = subjects
    if model.loaded is other.loaded:
        return
    rows = [each.loaded.model.vocab_size for each in subjects]
    if rows[0] != rows[1]:
        sizes = f"{model.name} has {rows[0]} rows, {other.name} {rows[1]}"
        raise MlxeffError(f"--against: wanted a model of the same vocabulary: {sizes}")
    own = other.loaded.tokenizer.encode(text, add_special_tokens=False)[: len(ids)]
    place = next((n for n, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
    if list(ids) != own:
        got = [_token(each.loaded.tokenizer, found, place) for each, found in zip(subjects, (ids, own), strict=True)]
        text = f"token {place} of the text is {got[0]} for {model.name} and {got[1]} for {other.name}"
        raise MlxeffError(f"--against: wanted a model with the same tokenizer: {text}")


def _token(tokenizer: Tokenizer, ids: Sequence[int], place: int) -> str:
    """A token as it is named in a message."""
    return f"{ids[place]} ({tokenizer.id_to_token(ids[place])!r})" if place < len(ids) else "none"


def ppl_lines(report: dict) -> list[str]:
    """The report of `eval_ppl` in words."""
    return [_how(report), _perplexity(report), *statistics(report)]


def kl_lines(report: dict) -> list[str]:
    """The report of `eval_kl` in words."""
    other = report["against"]
    ratio = report["perplexity"] and other["perplexity"] and f", ratio {report['perplexity'] / other['perplexity']:.5f}"
    mean = f"{_number(report['kl'], '.4e')} ± {_number(report['kl_error'], '.1e')}"
    median, p99, largest = (_number(report[f"kl_{name}"], ".3e") for name in ("median", "p99", "max"))
    return [
        _how(report),
        _perplexity(report),
        f"{_perplexity(other)}{ratio or ''}: the reference",
        f"KL divergence from the reference {mean} nats; median {median}, 99% below {p99}, largest {largest}",
        f"same first choice as the reference {report['same_top']:.2%}",
        *statistics(report),
        *statistics(other),
    ]


def _how(report: dict) -> str:
    """What was read, and how."""
    prompt = report["prompt"]
    read = f"{prompt} of them read as a prompt" if prompt else "those not scored read as a prompt"
    scored = f"{report['tokens']} of {report['text_tokens']} tokens of {report['text']}"
    return (
        f"{scored} scored in {report['windows']} {'window' if report['windows'] == 1 else 'windows'}: "
        f"context {report['context']}, stride {report['stride']}, {read}, passes of {report['step']} at most"
        + (", each begins with BOS" if report["bos"] else "")
    )


def _perplexity(report: dict) -> str:
    """The perplexity, and the model that has it."""
    found = f"{_number(report['perplexity'], '.4f')} ± {_number(report['perplexity_error'], '.4f')}"
    bad = f" ({report['not_finite']} tokens NaN or infinite)" if report["not_finite"] else ""
    return f"perplexity {found}{bad}: {how(report)}"


def _number(value: float | None, form: str) -> str:
    """A number in words."""
    return "not finite" if value is None else format(value, form)
