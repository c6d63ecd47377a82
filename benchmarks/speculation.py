"""Speculative decoding of the built-in model on this CPU: tokens a second, what is accepted, and whether the answers
are those of plain decoding.

    python benchmarks/speculation.py [--save] [--rounds 3] [--depths 512 ...] [--weights Q4_1 ...] [--tokens 128]
    python benchmarks/speculation.py --proof TOKENS [--save]
    python benchmarks/speculation.py --report [FILE]

The prompts are the first tokens of `data/jargon-validation.txt`; answers are greedy and go on beyond end tokens. The
arms take turns within a round; those with the same kind of cache share one, which reads the prompt once and is
rewound to it. Weights are those of the built-in file ("Q4_1"), the same dequantised ("float16") and these in 8 bits
("8-bit"). QuantSpec drafts with `--draft-weights auto`, or with those that the name of the weights ends in. An arm that
chooses its widths keeps from round to round what they cost.

--proof compares QuantSpec with plain decoding on the same kind of cache, over many prompts of 200 to 1,500 tokens,
until so many tokens were compared: an answer of 256 tokens each, or up to its first token that differs. Of that one it
tells the gap between the two largest logits of plain decoding.

Samples are kept as they come, so a command goes on where the last one ended. Their file in `--work` is named after the
machine, the compiled kernels and the number of tokens: where these change, a new one is begun.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlxeff.convert import convert

import saving
from mlxeff import hub, kernels
from mlxeff.assembly import speculation as assembled
from mlxeff.assembly.model import Loaded, load_path
from mlxeff.bench.samples import Samples, median_of
from mlxeff.bench.tables import card_lines, table
from mlxeff.cache import Cache
from mlxeff.decode import Following, PlainFollowing, Setup, prefill
from mlxeff.running import RunOptions
from mlxeff.sampling import make_sampler
from mlxeff.speculation.drafters import LookupDraft, SelfDraft
from mlxeff.speculation.following import Speculation
from peers import card
from places import TEXT, work_folder

SECTION, PROOF = "speculation", "speculation-proof"  # of RESULTS.md; of the second result's file
WEIGHTS = {"Q4_1": "auto", "float16": "auto", "float16, q4": "q4", "8-bit": "auto", "8-bit, upper": "upper"}
DEPTHS = (512, 1024, 2048, 4096, 7600)
STEP_SIZE = 512  # of the prefill
KEYS = ("weights", "depth", "arm", "round")
REPORTED = ("acceptance", "acceptance_per_token", "tokens_per_round", "widths", "round_ms", "off")  # of `Speculation`
WARM_UP = 8  # tokens of an answer that is not measured
SHORTEST, LONGEST, PROVED, DRAFTED = 200, 1500, 256, 4  # tokens: prompts, answers and drafts of --proof
PLAIN = ("plain float32", "plain float16", "plain int8")


@dataclass(frozen=True)
class Arm:
    """A way to decode: the kind of the cache, and where drafts come from."""

    kind: str
    quantspec: bool = False
    lookup: bool = False
    fixed: int | None = None

    @property
    def reference(self) -> str:
        """The arm whose answer this one has to give."""
        return f"plain {self.kind}"

    def following(self, draft: SelfDraft, costs: dict[int, float]) -> Following:
        """How it decodes. `draft` is QuantSpec's for this model; `costs` are what rounds cost, and take it."""
        if not self.quantspec and not self.lookup:
            return PlainFollowing()
        lookup = LookupDraft() if self.lookup else None
        drafter = SelfDraft(draft.model, RunOptions(kv=self.kind), lookup) if self.quantspec else lookup
        return Speculation(drafter, SECTION, self.fixed, lambda: costs, costs.update)


ARMS = {name: Arm(name.removeprefix("plain ")) for name in PLAIN}
ARMS |= {"QuantSpec auto": Arm("int8", quantspec=True)}
ARMS |= {f"QuantSpec {width}": Arm("int8", quantspec=True, fixed=width) for width in (2, 3, 4, 6)}
ARMS |= {"prompt lookup": Arm("float32", lookup=True), "QuantSpec + lookup": Arm("int8", quantspec=True, lookup=True)}


def identity(**facts) -> dict:
    """What all samples of a file have in common: this machine, the compiled kernels, and `facts`."""
    native, _ = kernels.native()
    libraries = sorted(Path(native.__file__).parent.glob("*.so")) if native else []
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in libraries)).hexdigest()[:12]
    return card.identity() | {"kernels": digest} | facts


def kept(work: Path, name: str, keys: Sequence[str], common: dict) -> Samples:
    """The samples with the identity `common`, without failures, in a file of their own in `work`."""
    mark = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:8]
    work.mkdir(parents=True, exist_ok=True)
    return Samples(work / f"{name}-{mark}.jsonl", common, keys, lambda sample: "error" not in sample)


def load(weights: str, model: str, work: Path) -> Loaded:
    """The model with these weights; others than those of the file are made once."""
    path = hub.resolve(model)
    work.mkdir(parents=True, exist_ok=True)
    if not weights.startswith("Q4_1"):
        given = path
        path = saving.once(work / "float16", lambda out: convert(given, out, dtype="float16", dequantize=True))
    if weights.startswith("8-bit"):
        dense = path
        path = saving.once(work / "8-bit", lambda out: convert(dense, out, quantize=(8, 64)))
    return load_path(path)


def draft_of(loaded: Loaded, weights: str) -> SelfDraft:
    """QuantSpec's draft of a model."""
    return assembled.quantspec(Setup(loaded.model), loaded, WEIGHTS[weights]).following.drafter


def read(model, kind: str, ids: list[int]) -> tuple[Cache, mx.array]:
    """A cache that holds the prompt `ids`, and the logits after it."""
    cache = model.new_cache(kind)
    logits = prefill(model, cache, mx.array(ids), STEP_SIZE)
    mx.eval(logits, cache.arrays())
    return cache, logits


def answer(
    model, cache: Cache, logits: mx.array, ids: list[int], following: Following, tokens: int
) -> tuple[list[int], dict]:
    """The greedy answer to the prompt `ids`, which `cache` holds before and afterwards; speed and bytes."""
    found, times, history = [], [], mx.array(ids)
    for step in following.follow(model, cache, logits, make_sampler(), history=history, max_tokens=tokens):
        found.append(step.token)
        times.append(time.perf_counter())
    numbers = {"tps": (len(found) - 1) / (times[-1] - times[0]), "kv_bytes": cache.nbytes}
    cache.rewind(len(ids))
    return found, numbers | following.report().get(SECTION, {})


def measure(options: argparse.Namespace, samples: Samples) -> None:
    """Add all samples that are missing."""
    for weights in options.weights:
        left = [depth for depth in options.depths if missing(options.rounds, weights, depth, samples)]
        if not left:
            continue
        loaded = load(weights, options.model, options.work)
        draft, ids = draft_of(loaded, weights), text_ids(loaded)
        for depth in left:
            measure_depth(loaded.model, draft, ids[:depth], options, weights, samples)
            print(f"{weights} weights, {depth} tokens: done", file=sys.stderr, flush=True)


def missing(rounds: int, weights: str, depth: int, samples: Samples) -> list[tuple[str, int]]:
    """(Arm, round) of all samples that are not there yet, in the order of measuring."""
    done = samples.done()
    return [(name, n) for n in range(rounds) for name in ARMS if (weights, depth, name, n) not in done]


def measure_depth(
    model, draft: SelfDraft, ids: list[int], options: argparse.Namespace, weights: str, samples: Samples
) -> None:
    """Add the samples of all arms after the prompt `ids` that are missing."""
    depth = len(ids)
    held = {kind: read(model, kind, ids) for kind in dict.fromkeys(arm.kind for arm in ARMS.values())}
    for arm in ARMS.values():
        answer(model, *held[arm.kind], ids, arm.following(draft, {}), WARM_UP)
    costs = {name: {} for name in ARMS}
    for name, number in missing(options.rounds, weights, depth, samples):
        arm, busy, known = ARMS[name], os.getloadavg()[0], bool(costs[name])
        found, numbers = answer(model, *held[arm.kind], ids, arm.following(draft, costs[name]), options.tokens)
        mark = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
        plain = [s["ids"] for s in samples.all if samples.key(s)[:3] == (weights, depth, arm.reference)]
        sample = {"weights": weights, "depth": depth, "arm": name, "round": number, "ids": mark}
        sample |= {"equal": mark == (plain or [mark])[0], "load_average": busy, "costs_known": known}
        samples.add(sample | {k: v for k, v in numbers.items() if k in ("tps", "kv_bytes", *REPORTED)})


def text_ids(loaded: Loaded) -> list[int]:
    """The ids of the text that prompts are windows of."""
    return loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)


def compare(model, draft: SelfDraft, prompt: list[int]) -> dict:
    """Plain and speculative answers to a prompt: tokens compared, and the first that differs (None), with its gap."""
    cache, logits = read(model, "int8", prompt)
    plain, _ = answer(model, cache, logits, prompt, PlainFollowing(), PROVED)
    following = Arm("int8", quantspec=True, fixed=DRAFTED).following(draft, {})
    found, numbers = answer(model, cache, logits, prompt, following, PROVED)
    other = next((place for place, pair in enumerate(zip(plain, found, strict=True)) if pair[0] != pair[1]), None)
    gap = None
    if other is not None:
        steps = PlainFollowing().follow(model, cache, logits, make_sampler(), max_tokens=other + 1)
        rows = np.sort(np.array(list(steps)[-1].logprobs))
        gap = float(rows[-1] - rows[-2])
    compared = PROVED if other is None else other + 1
    return {"compared": compared, "position": other, "gap": gap} | {k: numbers[k] for k in REPORTED[:3]}


def prove(loaded: Loaded, tokens: int, samples: Samples) -> None:
    """Compare answers until `tokens` tokens were compared; the prompt with a number is always the same."""
    draft, ids, number = draft_of(loaded, "Q4_1"), text_ids(loaded), len(samples.all)
    while sum(sample["compared"] for sample in samples.all) < tokens:
        chosen = np.random.default_rng(number)
        length = int(chosen.integers(SHORTEST, LONGEST + 1))
        start = int(chosen.integers(0, len(ids) - length))
        about = {"number": number, "start": start, "length": length}
        samples.add(about | compare(loaded.model, draft, ids[start : start + length]))
        number += 1
        print(f"prompt {number}: {sum(s['compared'] for s in samples.all)} tokens", file=sys.stderr, flush=True)


def text(document: dict) -> str:
    """The tables, in Markdown."""
    samples = document["samples"]
    weights, depths = (sorted({sample[key] for sample in samples}) for key in KEYS[:2])
    blocks = [speeds(samples, each, depths) for each in weights]
    return "\n\n".join([*blocks, drafts(samples, weights, depths)])


def speeds(samples: list[dict], weights: str, depths: list[int]) -> str:
    """Tokens a second of each arm, and ratios to plain decoding."""

    def cell(name: str, depth: int) -> str:
        found, *plain = (median_of(samples, "tps", weights=weights, depth=depth, arm=each) for each in (name, *PLAIN))
        return "" if None in (found, *plain) else f"{found:.1f} ({' / '.join(f'{found / p:.2f}' for p in plain)})"

    header = f"{weights} weights: tok/s (ratios to plain float32 / float16 / int8)"
    return table([header, *(f"@{depth}" for depth in depths)], [[n, *(cell(n, d) for d in depths)] for n in ARMS])


def drafts(samples: list[dict], weights: list[str], depths: list[int]) -> str:
    """What was accepted of drafts of a fixed width, what the controller chose, and whose answers differ."""
    rows = []
    for kind in weights:
        for depth in depths:
            own = [s for s in samples if (s["weights"], s["depth"]) == (kind, depth)]
            shown = [median_of(own, key, arm=f"QuantSpec {DRAFTED}") for key in REPORTED[:3]]
            chosen = sum((Counter(s["widths"]) for s in own if s["arm"] == "QuantSpec auto"), Counter())
            other = dict.fromkeys(s["arm"] for s in own if not s["equal"])
            sizes = [median_of(own, "kv_bytes", arm=name) for name in PLAIN]
            cells = ["" if value is None else f"{value:.2f}" for value in shown]
            widths = ", ".join(f"{width}: {count}" for width, count in sorted(chosen.items()))
            megabytes = " / ".join("" if size is None else f"{size / 1e6:.0f}" for size in sizes)
            rows.append([f"{kind} @{depth}", *cells, widths, ", ".join(other) or "none", megabytes])
    header = [f"drafts of {DRAFTED}: accepted", "by token", "tokens a round", "auto: rounds by width"]
    return table(["", *header, "other answers than plain", "KV MB float32 / float16 / int8"], rows)


def proof_text(document: dict) -> str:
    """What the comparison of answers found."""
    found = document["samples"]
    other = [sample for sample in found if sample["position"] is not None]
    tokens, accepted = sum(s["compared"] for s in found), np.mean([s["acceptance"] for s in found])
    line = [f"{len(found):,}", f"{tokens:,}", f"{len(other)}", f"{accepted:.2%}"]
    first = table(["prompts", "tokens compared with plain int8", "answers that differ", "accepted"], [line])
    rows = [[*(str(s[key]) for key in ("start", "length", "position")), f"{s['gap']:.2e}"] for s in other]
    return "\n\n".join(
        filter(None, [first, table(["prompt at", "tokens", "first other token", "gap of logits"], rows)])
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--proof", type=int, metavar="TOKENS", help="compare answers token by token instead")
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--work", type=Path, default=work_folder(SECTION), help="samples and float16 weights")
    parser.add_argument(
        "--save", action="store_true", help=f"write results/<processor>-{SECTION}.json or -{PROOF}.json"
    )
    saving.add_report(parser)
    return parser.parse_args()


def report(path: Path, proof: Path) -> None:
    """Write the section of RESULTS.md; with the comparison of answers where there is one."""
    parts = [text(saving.read_json(path))] + ([proof_text(saving.read_json(proof))] if proof.exists() else [])
    saving.write_section(SECTION, "\n\n".join(parts))
    print("\n\n".join(parts))


def main() -> None:
    options = arguments()
    path, proof = (saving.result_path(card.machine()["cpu"], f"{name}.json") for name in (SECTION, PROOF))
    if options.report is not None:
        shown = Path(options.report or path)
        report(shown, shown.with_name(shown.name.replace(f"{SECTION}.json", f"{PROOF}.json")))
        return
    kernels.use_device("cpu")
    common = identity(model=options.model) if options.proof else identity(model=options.model, tokens=options.tokens)
    if options.proof:
        samples, shown, path = kept(options.work, PROOF, ["number"], common), proof_text, proof
        prove(load("Q4_1", options.model, options.work), options.proof, samples)
    else:
        samples, shown = kept(options.work, SECTION, KEYS, common), text
        measure(options, samples)
    document = {"card": common | {"command": saving.command()}, "samples": samples.all}
    print(card_lines(document["card"]), shown(document), sep="\n\n")
    if options.save:
        saving.write_json(document, path)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
