"""`mlxeff eval retrieval` as a Python call: whether a model finds a sentence in a long prompt, by the prompt's length
and the sentence's depth in it ("needle in a haystack", Kamradt 2023; the wording of RULER, arXiv 2404.06654).

A prompt is sentences of a text, among them "The magic number of NAME is NUMBER.", and at its end a question for that
number and the beginning of its answer, so that base models answer too. It is given to the model without a chat
template, and the answer is decoded greedily. It is right where it has the number. Names, numbers and the place in the
text at which the sentences begin follow from a seed and are the same at each depth, so every model is asked the same.
"""

import argparse
import contextlib
import importlib.util
import random
import re
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..assembly.fitting import Progress
from ..calibration import read_text
from ..checkpoint import check_new, temporary_beside
from ..errors import MlxeffError, no_notices
from ..generation import stream_generate
from ..tokenizer import Tokenizer
from .continuations import encode
from .subject import Subject, how, load, require_context, statistics

LENGTHS = (512, 1024, 2048, 4096)  # tokens of prompts, where nothing else is asked for and the model has room for them
DIGITS = 6  # of a number
ANSWER = 16  # tokens of an answer, at most
NAMES = "Amber Birch Cedar Delta Ember Fjord Grove Heron Indigo Jasper Kestrel Lotus Maple Nimbus Onyx Pebble".split()
NEEDLE = "The magic number of {name} is {number}."
QUESTION = "\n\nWhat is the magic number of {name}? The magic number of {name} is"


@dataclass(frozen=True)
class Asked:
    """A prompt of token ids, and the number that its answer should have."""

    ids: list[int]
    number: str


class Haystack:
    """The sentences of a text, of which prompts are made."""

    def __init__(self, text: str, tokenizer: Tokenizer, origin: str):
        self.tokenizer, self.origin = tokenizer, origin
        self.sentences = [each for each in re.split(r"(?<=[.!?])\s+|\n+", text) if each.strip()]
        self.sizes = [len(tokenizer.encode(" " + each, add_special_tokens=False)) for each in self.sentences]

    def prompt(self, length: int, depth: float, seed: str) -> Asked:
        """A prompt of at most `length` tokens, with the needle after the share `depth` of the sentences' tokens. Raises
        MlxeffError where the text is too short, or the length for the needle and the question."""
        chosen = random.Random(seed)
        name, number = chosen.choice(NAMES), str(chosen.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        start = chosen.randrange(len(self.sentences))
        needle, question = NEEDLE.format(name=name, number=number), QUESTION.format(name=name)
        least = len(encode(self.tokenizer, needle + question))
        picked, sizes, total = [], [], least
        for place in range(start, start + len(self.sentences)):
            size = self.sizes[place % len(self.sentences)]
            if total + size > length:
                break
            picked.append(self.sentences[place % len(self.sentences)])
            sizes.append(size)
            total += size
        else:
            raise MlxeffError(f"{self.origin}: wanted a text of about {length} tokens, got {sum(self.sizes)}")
        while picked:
            before = next(n for n in range(len(sizes) + 1) if sum(sizes[:n]) >= depth * sum(sizes))
            text = " ".join([*picked[:before], needle, *picked[before:]]) + question
            ids = encode(self.tokenizer, text)
            if len(ids) <= length:
                return Asked(ids, number)
            picked.pop(), sizes.pop()
        raise MlxeffError(f"--lengths: wanted at least {least + max(self.sizes)} tokens, got {length}")


def eval_retrieval(progress: Progress, model: str, **values) -> dict:
    """Measure where `model` finds needles. `values` are the options of `mlxeff eval retrieval`, see `verbs`. Returns
    the report that the command prints with `--json`, without the notices. Raises MlxeffError."""
    options, began = argparse.Namespace(**values), time.perf_counter()
    picture = _checked_picture(options.plot)
    subject = load(model, options, progress)
    limit = subject.loaded.model.context_length
    lengths = options.lengths or [length for length in LENGTHS if not limit or length + ANSWER <= limit]
    if not lengths:
        raise MlxeffError(f"--lengths: wanted lengths for the context of {limit} tokens, got none")
    require_context([subject], max(lengths) + ANSWER, "--lengths with the answer")
    text, origin = read_text(options.text)
    haystack = Haystack(text, subject.loaded.tokenizer, origin)
    cells, answers = [], []
    with progress("needles", "step") as show:
        total = len(lengths) * len(options.depths) * options.needles
        for length in lengths:
            for depth in options.depths:
                found = []
                for number in range(options.needles):
                    asked = haystack.prompt(length, depth / 100, f"{options.seed} {length} {number}")
                    found.append(_answer(subject, asked))
                    if show:
                        show(len(answers) + len(found), total)
                right = sum(each["right"] for each in found)
                tokens = [each["tokens"] for each in found]
                cells.append({"length": length, "depth": depth, "right": right, "asked": len(found),
                              "tokens": sum(tokens) / len(tokens)})  # fmt: skip
                answers += [{"length": length, "depth": depth, **each} for each in found]
    report = {
        **subject.report(),
        "text": origin,
        "lengths": list(lengths),
        "depths": list(options.depths),
        "needles": options.needles,
        "seed": options.seed,
        "accuracy": sum(each["right"] for each in answers) / len(answers),
        "cells": cells,
        "answers": answers,
        "plot": None if picture is None else str(picture),
        "seconds": round(time.perf_counter() - began, 2),
    }
    if picture is not None:
        draw(report, picture)
    return report


def _answer(subject: Subject, asked: Asked) -> dict:
    """Ask once."""
    setup, tokenizer = subject.setup, subject.loaded.tokenizer
    with no_notices():  # they would come with each prompt
        cache = setup.new_cache()
        answer = stream_generate(
            subject.loaded.model, tokenizer, asked.ids, ANSWER, prompt_cache=cache, stop="\n",
            prefill_step_size=subject.values.prefill_step, reading=setup.reading, following=setup.following,
            options=setup.options,
        )  # fmt: skip
        with contextlib.closing(answer) as responses:
            said = [response.text for response in responses]
    subject.note(cache)
    mx.clear_cache()
    text = "".join(said).strip()
    return {"tokens": len(asked.ids), "number": asked.number, "said": text, "right": asked.number in text}


def _checked_picture(plot: str | None) -> Path | None:
    """The path of the picture. Raises MlxeffError where it cannot be drawn, before anything is measured."""
    if plot is None:
        return None
    path = Path(plot)
    if path.suffix != ".png":
        raise MlxeffError(f"--plot {path}: wanted a name that ends in .png")
    check_new(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise MlxeffError("--plot: wanted matplotlib, which is not installed: pip install 'mlxeff[benchmarks]'")
    return path


def draw(report: dict, path: Path) -> None:
    """Draw the heat map of a report of `eval_retrieval` as a PNG, with matplotlib. Raises MlxeffError where the file
    cannot be written."""
    from matplotlib.figure import Figure

    lengths, depths = report["lengths"], report["depths"]
    shares = [[_share(report, length, depth) for length in lengths] for depth in depths]
    figure = Figure(figsize=(2 + 0.8 * len(lengths), 2 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(lengths)), [str(each) for each in lengths])
    axes.set_yticks(range(len(depths)), [f"{each:g}%" for each in depths])
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the needle")
    axes.set_title(textwrap.fill(how(report), 16 + 10 * len(lengths)), fontsize=9)
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, label="numbers found")
    partial = temporary_beside(path)
    try:
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _share(report: dict, length: int, depth: float) -> float:
    """The share of right answers of a cell."""
    cell = next(each for each in report["cells"] if (each["length"], each["depth"]) == (length, depth))
    return cell["right"] / cell["asked"]


def retrieval_lines(report: dict) -> list[str]:
    """The report of `eval_retrieval` in words, with its table."""
    header = ["depth", *(f"{length} tokens" for length in report["lengths"])]
    rows = [
        [f"{depth:g}%", *(f"{_share(report, length, depth):.0%}" for length in report["lengths"])]
        for depth in report["depths"]
    ]
    asked = f"{len(report['answers'])} numbers found, {report['needles']} a cell, seed {report['seed']}"
    return [
        *_grid([header, *rows]),
        f"{report['accuracy']:.1%} of {asked}, in {report['text']}",
        how(report),
        *statistics(report),
    ]


def _grid(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with the cells of the rows in columns, to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
