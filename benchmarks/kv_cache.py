"""The kinds of KV cache of the built-in model on this CPU: bytes, what the rounding changes, and speed.

    python benchmarks/kv_cache.py [--save] [--rounds 4]
    python benchmarks/kv_cache.py --report [FILE]

quality   perplexity, KL divergence from the model with a float32 cache and equal first choices, on the tokens after
          the first 512 of windows of `data/jargon-validation.txt`, teacher-forced 16 at a time
speed     milliseconds for one decoded token after some numbers of cached ones. The kinds take turns, each with a
          cache of its own, of which the decoded tokens are dropped again
answers   greedy answers of 64 tokens to 64 prompts of 300 tokens: the share that is the float32 cache's, and the share
          of tokens before the first other one
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

import saving
from mlxeff import hub, kernels
from mlxeff.assembly.model import load_path
from mlxeff.bench.tables import card_lines, table
from mlxeff.cache import common_prefix
from mlxeff.decode import decode, prefill
from mlxeff.eval.measures import compare, means
from mlxeff.models.decoder import DecoderModel
from mlxeff.ops import log_softmax
from mlxeff.sampling import make_sampler
from peers import card
from places import TEXT

SECTION = "kv-cache"  # of RESULTS.md
KINDS = ("float32", "float16", "int8", "k8v4", "int4")
PROMPT, WINDOW, CHUNK = 512, 2048, 16  # tokens
STEPS = 24  # decoded tokens of a round
ASKED, ANSWER = 300, 64  # tokens of a prompt and of its answer
STEP_SIZE = 512  # of the prefill


def quality(model, ids: list[int], windows: int) -> dict:
    """Kind → `measures.means` over all windows, and bytes of the cache at the end of a window."""
    found = {kind: [] for kind in KINDS}
    for start in range(0, windows * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        caches = {kind: model.new_cache(kind) for kind in KINDS}
        for held in caches.values():
            mx.eval(prefill(model, held, mx.array(window[:PROMPT]), STEP_SIZE))
        for at in range(PROMPT, WINDOW - CHUNK, CHUNK):
            tokens, targets = mx.array([window[at : at + CHUNK]]), np.array(window[at + 1 : at + CHUNK + 1])
            rows = {kind: log_softmax(model(tokens, held)[0]) for kind, held in caches.items()}
            for kind in KINDS:
                found[kind].append(compare(rows[kind], rows["float32"], targets))
        print(f"window {start // WINDOW + 1} of {windows}", file=sys.stderr)
    return {kind: means(each) | {"bytes": caches[kind].nbytes} for kind, each in found.items()}


def speed(model, ids: list[int], depths: list[int], rounds: int) -> list[dict]:
    """The samples: milliseconds for each decoded token."""
    samples = []
    for depth in depths:
        caches, first = {}, {}
        for kind in KINDS:
            caches[kind] = model.new_cache(kind)
            began = time.perf_counter()
            mx.eval(prefill(model, caches[kind], mx.array(ids[:depth]), STEP_SIZE))
            first[kind] = time.perf_counter() - began
        for number in range(rounds):
            for kind, held in caches.items():
                busy, times = os.getloadavg()[0], []
                for token in ids[depth : depth + STEPS]:
                    began = time.perf_counter()
                    mx.eval(model.last_logits(mx.array([[token]]), held))
                    times.append(1e3 * (time.perf_counter() - began))
                held.rewind(depth)
                about = {"kind": kind, "depth": depth, "round": number, "load_average": busy, "prefill_s": first[kind]}
                samples.append(about | {"ms": times, "bytes": held.nbytes})
        print(f"after {depth} tokens: done", file=sys.stderr)
    return samples


def answers(model, ids: list[int], prompts: int) -> dict:
    """Kind → shares of equal answers and of tokens before the first difference."""
    found = {kind: [] for kind in KINDS}
    for start in range(0, prompts * ASKED, ASKED):
        for kind in KINDS:
            held = model.new_cache(kind)
            logits = prefill(model, held, mx.array(ids[start : start + ASKED]), STEP_SIZE)
            found[kind].append([step.token for step in decode(model, held, logits, make_sampler(), max_tokens=ANSWER)])
    shares = {}
    for kind, given in found.items():
        pairs = list(zip(given, found["float32"], strict=True))
        same = [common_prefix(*pair) / ANSWER for pair in pairs]
        shares[kind] = {"same": float(np.mean([share == 1 for share in same])), "tokens": float(np.mean(same))}
    return shares


def text(document: dict) -> str:
    """The table, in Markdown."""
    samples, rows = document["samples"], []
    depths = sorted({sample["depth"] for sample in samples})

    def middle(kind: str, depth: int) -> float:
        return float(np.median([ms for s in samples if (s["kind"], s["depth"]) == (kind, depth) for ms in s["ms"]]))

    for kind in KINDS:
        found, base = document["quality"][kind], document["quality"]["float32"]["bytes"]
        speeds = [f"{1e3 / middle(kind, depth):.0f}" for depth in depths]
        exact = kind == "float32"
        change = ["", "", ""] if exact else [f"{found['kl']:.1e}", f"{found['agreement']:.2%}"]
        if not exact:
            change.append(f"{document['answers'][kind]['same']:.0%}")
        rows.append([kind, f"{found['bytes'] / base:.3f}", f"{found['perplexity']:.3f}", *change, *speeds])
    header = [
        "kind",
        "bytes",
        "perplexity",
        "KL",
        "same first token",
        "same answers",
        *(f"tok/s @{depth}" for depth in depths),
    ]
    return table(header, rows)


def run(
    parser: argparse.ArgumentParser,
    section: str,
    text: Callable[[dict], str],
    measure: Callable[[DecoderModel, list[int], argparse.Namespace], dict],
) -> None:
    """Parse the arguments and do what they say: with `--report` write the table `text` of a saved result into
    `section` of RESULTS.md, else print what `measure` gives for the model and the ids of the text, and save it."""
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--save", action="store_true", help=f"write results/<processor>-{section}.json")
    saving.add_report(parser)
    options = parser.parse_args()
    path = saving.result_path(card.machine()["cpu"], f"{section}.json")
    if options.report is not None:
        saving.write_report(section, Path(options.report or path), text)
        return
    kernels.use_device("cpu")
    loaded = load_path(hub.resolve(options.model))
    ids = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    document = {"card": card.identity() | {"command": saving.command()}, "windows": options.windows}
    document |= measure(loaded.model, ids, options)
    print(card_lines(document["card"]), text(document), sep="\n\n")
    if options.save:
        saving.write_json(document, path)
    print(json.dumps(document))


def measured(model: DecoderModel, ids: list[int], options: argparse.Namespace) -> dict:
    """The document without its card."""
    samples = speed(model, ids, options.depths, options.rounds)
    quality_ = quality(model, ids, options.windows)
    return {"samples": samples, "quality": quality_, "answers": answers(model, ids, options.prompts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--depths", type=int, nargs="+", default=[1024, 4096, 7800])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    run(parser, SECTION, text, measured)


if __name__ == "__main__":
    main()
