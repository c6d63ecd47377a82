"""Write the tables of committed results that no measuring script writes: the README's and four sections of RESULTS.md.

    python benchmarks/summary.py [--machine Intel-Xeon-Processor]

Reads `results/<machine>-*`, and the predictions for Apple chips, and measures nothing. The other sections of RESULTS.md
are written by the scripts that measured them, with `--report`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import saving
from kvp.pairs import SHIPPED
from kvp.report import times
from mlxeff.bench import kvp_paper
from mlxeff.bench.rows import rows as statistics_of
from mlxeff.bench.samples import median_of
from mlxeff.bench.tables import table
from peers.report import LLAMA, LLAMA_Q4_0, Results, short
from peers.table import COLD_START, EXACT, FAST, FOUR

MACHINE = "Intel-Xeon-Processor"
CACHE_MACHINE = "AMD-EPYC"  # measured the kinds of KV cache
DYNAMOE_MACHINE = "Intel-Xeon-Processor-2-80GHz"  # measured DynaMoE
DYNAMOE_SHARE = 0.8  # of the feed-forward weights, at which the README shows it
DYNAMOE_RIVALS = {"WINA": "wina", "TEAL": "teal", "nested experts": "DynaMoE"}  # name → arm
SUMMARY = "summary"  # of the README
SEED_PEERS = {  # bits a weight of SeedLM → a peer's name and its arm; all peers of a row have the same bits
    "4.5": {"MLX affine": "affine 4 g64", "mlx-lm AWQ": "mlx-lm AWQ 4 g64", "llama.cpp IQ4_NL": "llama.cpp IQ4_NL"},
    "3": {"MLX affine": "affine 3 g64", "mlx-lm AWQ": "mlx-lm AWQ 3 g64"},
}
TRAINED = "1x32"  # batch x tokens of the training step that the README shows
FLASH, PLAIN = LLAMA_Q4_0
SEED_ARMS = {  # a row of the SeedLM speeds: the arms of which each number is the best
    "mlxeff SeedLM 4": ["mlxeff exact, SeedLM-4-aware"],
    "mlxeff SeedLM 4, int8 products, float16 KV cache": ["mlxeff int8, SeedLM-4-aware"],
    "mlxeff affine 4-bit (Q4_1)": ["mlxeff exact, affine 4-bit"],
    "mlxeff affine 4-bit, int8 products, float16 KV cache": ["mlxeff int8, affine 4-bit"],
    "llama.cpp Q4_0, the better attention for each number": [FLASH, PLAIN],
    "mlx-lm affine 4-bit": ["mlx-lm, affine 4-bit"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=MACHINE, help="how the result files' names begin (default: %(default)s)")
    machine = parser.parse_args().machine
    saving.write_section(SUMMARY, summary(machine), saving.README)
    for name, text in sections(machine).items():
        saving.write_section(name, text, saving.REPORT)


def sections(machine: str) -> dict[str, str]:
    """Section of RESULTS.md → its text."""
    seeds = load(machine, "cpu-seedlm-mlx-*.json")
    return {
        "cpu-seedlm": "\n\n".join([seed_speeds(seeds["models"]), encoder_speeds(seeds["encoder"])]),
        "kvp-paper": paper(lines(machine, "kvp-paper.jsonl")[1:]),
        "cpu-training": training(load(machine, "cpu-training-mlx-*.json")["samples"]),
        "metal-prediction": prediction(load("predicted-M1-to-M4", "metal-seedlm.json")),
    }


def load(machine: str, pattern: str) -> dict:
    """The one result of `machine` whose file name continues with `pattern`."""
    return json.loads(_found(machine, pattern).read_text(encoding="utf-8"))


def lines(machine: str, pattern: str) -> list[dict]:
    """The results in a file of `machine` that holds one JSON document per line."""
    return [json.loads(line) for line in _found(machine, pattern).read_text(encoding="utf-8").splitlines()]


def _found(machine: str, pattern: str) -> Path:
    found = sorted(saving.RESULTS.glob(f"{machine}-{pattern}"))
    if len(found) != 1:
        raise SystemExit(f"{saving.RESULTS}: wanted one file {machine}-{pattern}, got {len(found)}")
    return found[0]


def summary(machine: str) -> str:
    """The README's table, and the machine."""
    peers, card = (load(machine, "cpu-peers-mlx-*.json")[key] for key in ("samples", "card"))
    results = Results(peers, {})
    rows = [*_speeds(results), *_seeds(load(machine, "seedlm-quality.json")["arms"])]
    rows += _predictions(load(machine, "kvp-quality.json")["arms"])
    rows += _caches(load(CACHE_MACHINE, "kv-cache.json"))
    rows += _dynamoe(load(DYNAMOE_MACHINE, "dynamoe.json"))
    rows.append(_training(load(machine, "cpu-training-mlx-*.json")["samples"]))
    where = f"{card['cpu']}, {max(results.threads)} threads, {card['native']} kernels, MLX {card['mlx']}"
    return "\n\n".join([table(["what", "mlxeff", "compared with"], rows), f"Measured on: {where}."])


def _speeds(results: Results) -> Iterable[list[str]]:
    threads = max(results.threads)

    def best(metric: str, depth: int, arms: Sequence[str]) -> str:
        return short(results.best(metric, FOUR, threads, depth, arms))

    for depth in (512, 2048):
        fast, exact, q4_0, q4_1, mlx = (
            best("ttft_s", depth, arms) for arms in ([FAST], [EXACT], LLAMA_Q4_0, LLAMA, ["mlx-lm"])
        )
        others = f"llama.cpp {q4_0} s (Q4_0), {q4_1} s (Q4_1)" + (f"; mlx-lm {mlx} s" if mlx else "")
        yield [f"first token of a prompt of {depth} tokens", f"**{fast} s**, exact {exact} s", others]
    fast, exact, q4_0, q4_1 = (best("decode_tps", 2048, arms) for arms in ([FAST], [EXACT], LLAMA_Q4_0, LLAMA))
    others = f"llama.cpp {q4_0} (Q4_0), {q4_1} (Q4_1)"
    yield ["decoding after 2048 tokens, tokens/s", f"**{fast}**, exact {exact}", others]
    mine, theirs = (results.get("first_token_s", "cold start", arm, FOUR, threads, 20) for arm in COLD_START)
    yield ["from starting the program to the first word", f"**{mine:.2f} s**", f"llama-cpp-python {theirs:.2f} s"]


def _seeds(arms: dict[str, dict]) -> Iterable[list[str]]:
    for bits, peers in SEED_PEERS.items():
        mine = arms[f"SeedLM {bits} aware"]["kl"]
        others = (f"{name} {arms[arm]['kl']:.3f}" for name, arm in peers.items())
        theirs = next(arms[arm]["bits"] for arm in peers.values())
        what = f"SeedLM, {bits} bits a weight: KL divergence from the dense model, lower is better"
        yield [what, f"**{mine:.3f}**", f"at {theirs:g} bits: {', '.join(others)}"]


def _predictions(arms: dict[str, dict]) -> Iterable[list[str]]:
    base = arms["base"]
    whole = times(base)[1, 2048]
    for name, recipe in SHIPPED.items():
        found = arms[f"KVP {recipe}"]
        gain = f"**{times(found)[1, 2048] / whole:.2f}** of the model's time"
        cost = (
            f"the model alone answers {base['exact']:.0%} of the questions right, with the pair {found['exact']:.0%}; "
        )
        cost += f"next tokens are the same for {found['agreement']:.0%}"
        yield [f"KV Prediction, pair `{name}`: first token of a prompt of 2048 tokens", gain, cost]


def _caches(result: dict) -> Iterable[list[str]]:
    """The kinds of KV cache at the largest depth, which another machine measured."""
    samples, quality = result["samples"], result["quality"]
    depth = max(sample["depth"] for sample in samples)

    def speed(kind: str) -> float:
        return 1e3 / median([ms for s in samples if (s["kind"], s["depth"]) == (kind, depth) for ms in s["ms"]])

    others = ", ".join(f"{kind} {speed(kind):.0f}" for kind in ("float16", "float32"))
    for kind in ("int8", "int4"):
        share = quality[kind]["bytes"] / quality["float32"]["bytes"]
        cost = f"{share:.2f} of float32's bytes, KL divergence {quality[kind]['kl']:.1e}"
        what = f"KV cache `{kind}`, decoding after {depth} tokens, tokens/s ({result['card']['cpu']})"
        yield [what, f"**{speed(kind):.0f}**", f"{others}; {cost}"]


def _dynamoe(result: dict) -> Iterable[list[str]]:
    """Divergence and time at one share, which another machine measured."""

    def divergence(arm: str) -> float:
        rows = [row for row in result["arms"][arm] if (row["wanted"], row["mode"]) == (DYNAMOE_SHARE, "all")]
        return rows[0]["kl"]

    others = ", ".join(f"{name} {divergence(arm):.3f}" for name, arm in DYNAMOE_RIVALS.items())
    what = f"DynaMoE by inputs, {DYNAMOE_SHARE:.0%} of the feed-forward weights: KL divergence from the dense model"
    yield [what, f"**{divergence('by inputs'):.3f}**", others]
    dense, *rows = result["speed"]["weights of 16 bits, by inputs"]
    row = next(row for row in rows if row["arm"] == f"sensitivity {DYNAMOE_SHARE:g}")
    what = f"the same, decoding with weights of 16 bits, tokens/s ({result['card']['cpu']})"
    yield [what, f"**{row['tps']:.0f}**", f"dense {dense['tps']:.0f}"]


def _training(samples: list[dict]) -> list[str]:
    mine, theirs = (median_of(samples, "seconds", arm=arm, shape=TRAINED) for arm in ("native", "MLX"))
    return ["training step, all weights, 32 tokens", f"**{mine:.2f} s**", f"MLX's own operations {theirs:.2f} s"]


def seed_speeds(samples: list[dict]) -> str:
    """The medians for each number of threads, largest number first."""
    counts = sorted({sample["threads"] for sample in samples}, reverse=True)
    rows = []
    for name, arms in SEED_ARMS.items():
        cells = [name]
        for metric, best in (("ttft_s", min), ("decode_tps", max)):
            for threads in counts:
                found = [median_of(samples, metric, arm=arm, threads=threads) for arm in arms]
                cells.append(short(best((value for value in found if value is not None), default=None)))
        rows.append(cells)
    header = [f"{what}, {n} thread{'s' * (n > 1)}" for what in ("TTFT 512, s", "tok/s @512") for n in counts]
    return table(["", *header], rows)


def encoder_speeds(samples: list[dict]) -> str:
    """The encoder's speeds with refined rounding, which `mlxeff convert` uses."""
    found = {(s["format"], s["threads"]): s["mw_per_s"] for s in samples if s["rounding"] == "refined"}
    counts = sorted({threads for _, threads in found}, reverse=True)
    rows = [[form, *(short(found[form, n]) for n in counts)] for form in dict.fromkeys(form for form, _ in found)]
    header = [f"{n} thread{'s' * (n > 1)}" for n in counts]
    return table(["encoder, millions of weights a second: bits a weight", *header], rows)


def paper(samples: list[dict]) -> str:
    """Ours, in brackets the base's time over it; beside it what the paper prints of 64 prompts of 59 tokens."""
    measured = [row for row in statistics_of(samples) if row["metric"] == "ttft_s"]
    found = {(row["device"], row["batch"], row["tokens"], row["arm"]): row for row in measured}
    points = sorted({key[1:3] for key in found})
    passes = {point: min(row["count"] for key, row in found.items() if key[1:3] == point) for point in points}
    rows = []
    for arm, theirs in kvp_paper.TABLE_5.items():
        cells = [_reduced(found, ("cpu", *point), arm) for point in points]
        if any(cells):
            rows.append([arm, *cells, f"{theirs.ttft_s:.2f} ({theirs.reduction:.2f})", f"{theirs.flops:.2f}"])
    header = [f"{batch} x {tokens}, passes: {passes[batch, tokens]}" for batch, tokens in points]
    return table(
        ["TTFT, s", *header, f"64 x 59, the paper's ({kvp_paper.MACHINE})", "FLOPs reduction, the paper's"], rows
    )


def _reduced(found: dict[tuple, dict], place: tuple, arm: str) -> str:
    base, mine = (found.get((*place, name)) for name in ("OE1.1B", arm))
    if mine is None:
        return ""
    return short(mine["median"]) + (f" ({base['median'] / mine['median']:.2f})" if base else "")


def training(samples: list[dict]) -> str:
    """The table of medians of the training passes."""
    rows = []
    for shape, arm in dict.fromkeys((s["shape"], s["arm"]) for s in samples):
        batch, tokens = map(int, shape.split("x"))
        seconds = median_of(samples, "seconds", arm=arm, shape=shape)
        rows.append([f"{batch} x {tokens}", arm, f"{seconds:.2f}", short(batch * tokens / seconds)])
    return table(["batch x tokens", "operations", "s, forward and backward pass", "tokens/s"], rows)


def prediction(document: dict) -> str:
    """Of the products the form that the kernels have, which needs no shifts."""
    products = {s["format"]: s["predicted"] for s in document["samples"] if s["form"] == "AND only"}
    encoder = {s["format"]: s["predicted"] for s in document["encoder"]}
    header = ["predicted, nothing was measured", *(f"share of bandwidth, {name} bits" for name in products)]
    header += [f"encoder, s, {name} bits" for name in encoder]
    rows = []
    for number, each in enumerate(encoder["4"]):
        shares = [f"{of[number]['predicted_share_of_bandwidth']:.0%}" for of in products.values()]
        rows.append([each["chip"], *shares, *(short(of[number]["predicted_seconds"]) for of in encoder.values())])
    return table(header, rows)


if __name__ == "__main__":
    main()
