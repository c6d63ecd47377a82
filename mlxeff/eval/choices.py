"""`mlxeff eval choices` as a Python call: multiple choice, by the log-likelihood of the choices.

A file has one JSON object a line, a question, in the shape of lm-evaluation-harness: `query` (or `ctx`) is the text
before the choices, `choices` (or `endings`) the texts that may follow, `gold` (or `label`) the number of the right one,
from 0. Other keys are passed over. Each choice is scored after the query and a delimiter. The answer is the choice with
the largest log-likelihood; the length-normalised one is that with the largest log-likelihood by character.

Examples, questions with their right choices, may go before each question (few-shot), and all of that may be asked as
one message in the model's chat template, after which a choice follows without a delimiter: both as in the harness.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..assembly.fitting import Progress
from ..assembly.techniques import Scored
from ..errors import MlxeffError, notices
from .continuations import encode_pair, likelihoods
from .measures import finite
from .subject import Subject, how, load, require_context, statistics

BETWEEN = "\n\n"  # examples, and the question after them
KEYS = {"query": ("query", "ctx"), "choices": ("choices", "endings"), "gold": ("gold", "label")}


@dataclass(frozen=True)
class Question:
    """One question; `place` names its file and line."""

    place: str
    query: str
    choices: list[str]
    gold: int


def read(path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file, the first `limit` of them. Raises MlxeffError for a file that cannot be read, and
    for a line that is damaged."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MlxeffError(f"{path}: wanted UTF-8 text, got {error.reason} at byte {error.start}") from error
    found = [_question(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise MlxeffError(f"{path}: wanted a question a line, got none")
    return found[:limit]


def _question(line: str, place: str) -> Question:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise MlxeffError(f"{place}: wanted a JSON object, got: {error}") from None
    if not isinstance(entry, dict):
        raise MlxeffError(f"{place}: wanted a JSON object, got {type(entry).__name__}")
    values = {}
    for key, names in KEYS.items():
        name = next((name for name in names if name in entry), None)
        if name is None:
            raise MlxeffError(f"{place}: wanted the key {' or '.join(names)}, got {', '.join(entry) or 'no key'}")
        values[key] = entry[name]
    query, choices, gold = values["query"], values["choices"], values["gold"]
    if not isinstance(query, str):
        raise MlxeffError(f"{place}: query: wanted a text, got {query!r:.60}")
    texts = isinstance(choices, list) and all(isinstance(each, str) and each for each in choices)
    if not texts or len(choices) < 2:
        raise MlxeffError(f"{place}: choices: wanted a list of at least two texts, got {choices!r:.60}")
    if isinstance(gold, str) and gold.isdecimal():
        gold = int(gold)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise MlxeffError(f"{place}: gold: wanted a number from 0 to {len(choices) - 1}, got {gold!r:.60}")
    return Question(place, query, choices, gold)


def eval_choices(progress: Progress, model: str, **values) -> dict:
    """Measure how often `model` chooses right. `values` are the options of `mlxeff eval choices`, see `verbs`. Returns
    the report that the command prints with `--json`, without the notices. Raises MlxeffError."""
    options, began = argparse.Namespace(**values), time.perf_counter()
    every = read(options.questions)
    questions = every[: options.limit]
    examples = read(options.fewshot) if options.fewshot else every
    require_examples(examples, options.num_fewshot, options.fewshot or options.questions, bool(options.fewshot))
    subject = load(model, options, progress, Scored(None, options.step))
    if options.chat_template and not subject.loaded.tokenizer.has_chat_template:
        raise MlxeffError(f"{subject.name}: --chat-template: wanted a model with a chat template, got one without")
    delimiter = "" if options.chat_template else options.delimiter
    answers = []
    with progress("questions", "step") as show:
        for number, question in enumerate(questions):
            before = itertools.islice((each for each in examples if each is not question), options.num_fewshot)
            asked = prompt(question, before, options.delimiter)
            if options.chat_template:
                asked = in_template(subject, asked)
            answers.append(answer(subject, replace(question, query=asked), delimiter, options.step))
            if show:
                show(number + 1, len(questions))
    bad = sum(not math.isfinite(each) for found in answers for each in found["loglikelihoods"])
    if bad:
        notices.warning("%s: %d log-likelihoods are NaN or infinite", subject.name, bad)
    for found in answers:
        found["loglikelihoods"] = [finite(each) for each in found["loglikelihoods"]]
    return {
        **subject.report(),
        "file": str(options.questions),
        "questions": len(answers),
        "delimiter": delimiter,
        "num_fewshot": options.num_fewshot,
        "fewshot": options.fewshot and str(options.fewshot),
        "chat_template": options.chat_template,
        "step": options.step,
        **_share("accuracy", [each["chosen"] == each["gold"] for each in answers]),
        **_share("accuracy_norm", [each["chosen_norm"] == each["gold"] for each in answers]),
        "chance": sum(1 / len(each.choices) for each in questions) / len(questions),
        "not_finite": bad,
        "answers": answers,
        "seconds": round(time.perf_counter() - began, 2),
    }


def require_examples(examples: list[Question], wanted: int, file: str, apart: bool) -> None:
    """Raises MlxeffError where there are not so many examples in `file`, which has the questions themselves unless it
    is `apart`."""
    others = len(examples) - (not apart)
    if wanted > others:
        what = "examples" if apart else "other questions"
        raise MlxeffError(f"{file}: --num-fewshot: wanted {wanted} {what}, got {others}")


def prompt(question: Question, examples: Iterable[Question], delimiter: str) -> str:
    """The text before the choices of a question: the examples with their right choices, and its query."""
    solved = [each.query + delimiter + each.choices[each.gold] for each in examples]
    return BETWEEN.join([*solved, question.query])


def in_template(subject: Subject, text: str) -> str:
    """A text as a user's message in the model's chat template, up to where the answer begins."""
    return subject.loaded.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)


def answer(subject: Subject, question: Question, delimiter: str, step: int) -> dict:
    """The log-likelihoods of the choices, and which of them are chosen."""
    tokenizer, setup = subject.loaded.tokenizer, subject.setup
    pairs = [encode_pair(tokenizer, question.query, delimiter + each) for each in question.choices]
    longest = max(len(context) + len(tokens) - 1 for context, tokens in pairs)
    most = max(len(tokens) for _, tokens in pairs)
    require_context([subject], longest, f"{question.place}: the tokens of a choice and its query", min(step, most))
    tokens = [tokens for _, tokens in pairs]
    found, cache = likelihoods(setup, pairs[0][0], tokens, step, subject.step_size)
    subject.note(cache)
    totals = np.array([each.total for each in found])
    lengths = np.array([len(each) for each in question.choices])
    return {
        "gold": question.gold,
        "chosen": int(np.argmax(totals)),
        "chosen_norm": int(np.argmax(totals / lengths)),
        "loglikelihoods": totals.tolist(),
    }


def _share(name: str, right: list[bool]) -> dict:
    """The share of the right ones, and its standard error."""
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
    return {name: share, f"{name}_error": error}


def choices_lines(report: dict) -> list[str]:
    """The report of `eval_choices` in words."""
    names = {"accuracy": "accuracy", "accuracy_norm": "length-normalised accuracy"}
    lines = [f"{report['questions']} questions of {report['file']}, passes of {report['step']} tokens at most"]
    if report["num_fewshot"]:
        lines.append(f"{report['num_fewshot']} examples before each, of {report['fewshot'] or 'the same file'}")
    if report["chat_template"]:
        lines.append("asked in the model's chat template")
    for key, name in names.items():
        error = "" if report[f"{key}_error"] is None else f" ± {report[f'{key}_error']:.2%}"
        lines.append(f"{name} {report[key]:.2%}{error}")
    return [*lines, f"by chance {report['chance']:.2%}", how(report), *statistics(report)]
