"""Drafts: decoding where a part of the feed-forward weights drafts and all of them verify.

The answers to prompts of 256 tokens of `data/jargon-validation.txt`, greedy, drafts of three tokens. The arms take
turns prompt by prompt: the dense model alone, with QuantSpec, and the fitted models with drafts of some sensitivities.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ffn.fits import fitted, float16
from mlxeff.assembly import speculation as assembled
from mlxeff.assembly.dynamoe import with_draft
from mlxeff.assembly.model import Loaded, load_path
from mlxeff.decode import Setup
from places import TEXT
from speculation import answer, read

PROMPT, DRAFTED = 256, 3  # tokens
WARM_UP = 8  # tokens of an answer that is not measured
EXPERTS, INPUTS = (0.0, 0.5, 0.8), (0.35, 0.5, 0.65, 0.8)


def setups(dense: Loaded, experts: Loaded, inputs: Loaded) -> Iterator[tuple[str, Loaded, Setup]]:
    """(Name, model, setup) of the arms."""
    yield "dense, no drafts", dense, Setup(dense.model)
    yield "dense, QuantSpec", dense, assembled.quantspec(Setup(dense.model), dense, fixed=DRAFTED)
    for name, loaded, shares in (("experts", experts, EXPERTS), ("inputs", inputs, INPUTS)):
        yield f"by {name}, no drafts", loaded, Setup(loaded.model)
        for share in shares:
            yield f"by {name}, drafts of {share:g}", loaded, with_draft(Setup(loaded.model), loaded, share, DRAFTED)


def rows_of(
    dense: Loaded, experts: Loaded, inputs: Loaded, prompts: list[list[int]], rounds: int, steps: int
) -> list[dict]:
    """The measurements of each arm: the median of its answers' speed, and what was accepted of all drafts."""
    arms = list(setups(dense, experts, inputs))
    found: dict[str, list[dict]] = {name: [] for name, _, _ in arms}
    for number in range(rounds):
        for prompt in prompts:
            for name, loaded, setup in arms:
                held = read(loaded.model, setup.options.kv, prompt)
                if not number:
                    answer(loaded.model, *held, prompt, setup.following, WARM_UP)
                speed = answer(loaded.model, *held, prompt, setup.following, steps)[1]
                found[name].append(speed | next(iter(setup.following.report().values()), {}))
    rows = []
    for name, numbers in found.items():
        row = {"arm": name, "tps": statistics.median(each["tps"] for each in numbers)}
        if "acceptance" in numbers[0]:
            row |= {key: statistics.mean(each[key] for each in numbers) for key in ("acceptance", "tokens_per_round")}
        rows.append(row)
    return rows


def measure(options: argparse.Namespace, source: Path, document: dict, save: Callable[[], None]) -> None:
    """Measure drafts with the weights of the source and with those in float16."""
    found = document.setdefault("drafts", {})
    half, work = float16(source, options.work), options.work
    for name, path, prefix, more in (("4 bits", source, "", {}), ("16 bits", half, "float16-", {"tokens": 4096})):
        dense = load_path(path)
        ids = dense.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
        places = np.linspace(0, len(ids) - PROMPT, 4).astype(int)
        prompts = [ids[place : place + PROMPT] for place in places]
        experts = load_path(fitted(f"{prefix}DynaMoE", path, work, **more))
        by_inputs = fitted(f"{prefix}by inputs", path, work, **(more | {"by": "inputs"}))
        rounds = max(1, options.rounds // 3)
        found[f"weights of {name}"] = rows_of(dense, experts, load_path(by_inputs), prompts, rounds, options.steps)
        save()
