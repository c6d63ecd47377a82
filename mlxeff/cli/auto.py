"""`--auto` of `generate` and `chat`: what is predicted as fastest within the allowed loss becomes the values of the
options."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import MlxeffError, notices
from .plan import here as this_machine

if TYPE_CHECKING:
    from ..assembly.model import Loaded
    from ..plan.auto import Choice, Task
    from ..plan.predict import Predictor
    from ..tokenizer import Tokenizer

OTHER_PROMPT, MOST_ANSWER = 2048, 256  # tokens of a prompt that is not known yet, and of an answer at most
WORDS = {"threads": "threads", "kv_cache": "KV cache", "quantspec": "QuantSpec", "num_draft_tokens": "drafted tokens",
         "kv_predict": "predicted prompt", "prefill_step": "prefill step"}  # fmt: skip


def decide(
    options: argparse.Namespace, loaded: "Loaded", encode: "Callable[[Tokenizer], list[int]] | None"
) -> dict | None:
    """Choose, say it in a line and set the options that the user did not give; returns the report for `--json`, None
    without --auto. `encode` gives the ids of the prompt; None where it comes later. A model that cannot be predicted is
    run with the defaults, and a warning says so."""
    if not options.auto:
        return None
    from ..plan import auto

    asked, tokens = _given(options), len(encode(loaded.tokenizer)) if encode else OTHER_PROMPT
    try:
        task = _task(options, loaded, tokens, asked)
        machines = _machines(options, task)
    except MlxeffError as error:
        notices.warning("auto: nothing is chosen: %s", error)
        return {"chosen": {}, "given": sorted(asked), "reason": str(error)}
    best, plain = auto.choose(task, machines)
    for name, chosen in best.options(task).items():
        _set(options, name, auto.value(name, chosen))
    found = machines[best.threads].constants
    report = {
        "chosen": best.options(task),
        "given": sorted(asked),
        "max_kl": task.most,
        "kl": best.kl,
        "kl_from": list(best.sources),
        "prompt_tokens": task.prompt,
        "answer_tokens": task.answer,
        "predicted_s": _times(best, task),
        "default_s": _times(plain, task),
        "constants": found.kind,
        "reason": _reason(best, plain, task, found.source),
    }
    notices.info("auto: %s", report["reason"])
    return report


def _given(options: argparse.Namespace) -> dict[str, object]:
    """Option → value of those that the user gave, also by an environment variable."""
    names = ("kv_cache", "quantspec", "num_draft_tokens", "kv_predict", "prefill_step")
    found = {name: getattr(options, name) for name in names if getattr(options, name)}
    threads = os.environ.get("MLXEFF_NUM_THREADS")
    return found | ({"threads": threads} if threads else {})


def _task(options: argparse.Namespace, loaded: "Loaded", tokens: int, given: dict[str, object]) -> "Task":
    """What is to be run; `tokens` of the prompt. Raises MlxeffError for a model whose shape cannot be read."""
    from ..plan.auto import Task
    from ..plan.formats import KV_BYTES
    from ..plan.source import describe

    model, limit = describe(str(loaded.path), tuple(options.ignore_keys), offline=True), loaded.model.context_length
    answer = min(options.max_tokens, MOST_ANSWER) if options.max_tokens > 0 else MOST_ANSWER
    own = bool(loaded.model.seams)
    return Task(
        model.shape,
        model.bits,
        loaded.fingerprint,
        KV_BYTES.get(loaded.dtype, 2.0),
        min(tokens, limit) if limit else tokens,
        answer,
        options.sensitivity.value if options.sensitivity else 1.0,
        options.max_kl or 0.0,
        given,
        drafts=own and not (options.draft_model or options.draft or options.prompt_lookup),
        predicts=own and not getattr(options, "prompt_cache", None),
    )


def _machines(options: argparse.Namespace, task: "Task") -> dict[int | None, "Predictor"]:
    """The predictors of this machine: with the default threads, and with other numbers that it is calibrated for."""
    from ..plan import auto, request

    here = this_machine()
    found = request.predictor(request.Request(options.model), here)
    return auto.with_threads(task, found, request.by_threads(here, options.compute))


def _set(options: argparse.Namespace, name: str, chosen: object) -> None:
    if name == "threads":
        from .. import kernels

        kernels.native()[0].set_num_threads(chosen)
    else:
        setattr(options, name, chosen)


def _times(choice: "Choice", task: "Task") -> dict[str, float]:
    """Predicted seconds to the first token and in all, and tokens a second."""
    rounded = {"ttft": choice.ttft, "decode_tps": 1 / choice.token, "total": choice.seconds(task)}
    return {name: float(f"{value:.4g}") for name, value in rounded.items()}


def _reason(best: "Choice", plain: "Choice", task: "Task", source: str) -> str:
    """What was chosen and why, in a line."""
    from ..plan.auto import DRAFTING

    chosen = [f"{WORDS[name]} {'on' if value is True else value}" for name, value in best.options(task).items()]
    allowed = f"a KL divergence up to {task.most:g}" if task.most else "no loss"
    lost = f", of which {best.kl:.2g} is used ({', '.join(dict.fromkeys(best.sources))})" if best.sources else ""
    times = f"{best.ttft:.3g} s to the first token and {1 / best.token:.3g} tokens/s"
    beside = f", {plain.seconds(task) / best.seconds(task):.2f} times as fast as the defaults" if chosen else ""
    if best.kv_cache == DRAFTING and task.drafts and not best.quantspec:
        chosen.append("no drafts, which would not pay for certain")
    kept = f"; given and kept: {', '.join(WORDS[name] for name in task.given)}" if task.given else ""
    measured = ""
    if task.most and not _is_measured(task):
        measured = "; what lossy options cost was measured for the built-in model only, so none is taken"
    what = f"predicted for {task.prompt} + {task.answer} tokens: {times}{beside}"
    return f"{', '.join(chosen) or 'the defaults'}: {what}; allowed: {allowed}{lost}{measured}{kept}; from {source}"


def _is_measured(task: "Task") -> bool:
    from ..plan.auto import known

    return bool(known(task.fingerprint))
