"""Predicted speed of QuantSpec on Apple chips, from the bytes that a token reads: whether drafting on the upper plane
of an 8-bit KV cache pays, by chip, model and number of cached tokens.

    python benchmarks/quantspec_prediction.py [--overhead 2] [--save]
    python benchmarks/quantspec_prediction.py --report [FILE]

Nothing is measured: every number is PREDICTED. The model:

- A pass takes the time to read its bytes at 80 % of the chip's specified bandwidth, and a fixed `--overhead`, for which
  2 ms are assumed (starting the kernels of a small model's pass on a GPU).
- A pass reads each matrix once, the embedding table only where it is the output head too, and keys and values of all
  cached tokens. A number of these has 2 bytes in a float16 cache, 1.0625 in both planes, 0.5625 in the upper one. That
  the newest tokens are drafted on both planes is left out.
- A draft reads a copy of the weights with 6.5 bits, or the model's own where these have 4.5 (`--draft-weights auto`).
- A round drafts k tokens, one pass each, and verifies them in one pass of M = k + 1 rows. Each drafted token is
  accepted with the same probability, up to the first that is not. k is the best of 1 to 7.
- That pass reads keys and values once and the weights c times: c = 1 for a kernel that keeps the rows of a small M
  together, and c = 1 + 0.3 (M - 1) where the rows read weights anew, an ESTIMATE of what stock MLX does on M1 and M2.

"go": the predicted tokens a second are above 1.1 times those of plain decoding with an int8 KV cache.
"""

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import saving
from mlxeff.bench.tables import card_lines, table
from mlxeff.models.openelm import OpenELMConfig, published_config

SECTION = "quantspec-prediction"  # of RESULTS.md
PATH = saving.RESULTS / "predicted-M1-to-M4-quantspec.json"
USABLE = 0.8  # share of the specified bandwidth
CHIPS = {  # specified GB/s
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 400,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
}
KINDS = {"float16": 2.0, "int8": 1.0625, "draft": 0.5625}  # bytes of a number of keys and values
WEIGHTS = {"float16": 2.0, "4.5 bits": 0.5625}  # bytes of a weight
DRAFTING = {"float16": 0.8125, "4.5 bits": 0.5625}  # bytes of a weight that a draft reads, `--draft-weights auto`
DEPTHS = {"1k": 1024, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}  # cached tokens
ACCEPTANCES = (0.90, 0.95)  # of a drafted token
ANEW = {"c = 1": 0.0, "c = 1 + 0.3 (M - 1)": 0.3}  # share of the weights that each further row reads anew
MOST = 7  # drafted tokens of a round
GO = 1.1
SHOWN = "M2 Pro"  # the chip of the table of speedups


@dataclass(frozen=True)
class Shape:
    """What a pass of one token reads of a model: weights, and numbers of keys and values for each cached token."""

    weights: int
    numbers: int

    def bytes(self, weight: float, kind: str, depth: int, reads: float = 1) -> float:
        """Bytes of a pass after `depth` tokens that reads the weights `reads` times, `weight` bytes each."""
        return reads * self.weights * weight + depth * self.numbers * KINDS[kind]


def llama(layers: int, hidden: int, inner: int, groups: int, size: int, vocabulary: int) -> Shape:
    """A Llama. `groups` are its heads of keys, `size` the numbers of a head; the head or the tied embedding is read."""
    layer = 2 * hidden * hidden + 2 * hidden * groups * size + 3 * hidden * inner + 2 * hidden
    return Shape(layers * layer + vocabulary * hidden + hidden, 2 * layers * groups * size)


def openelm(size: str) -> Shape:
    """An OpenELM, whose layers differ."""
    config = OpenELMConfig.from_dict(published_config(size))
    width, head = config.model_dim, config.head_dim
    total = config.vocab_size * width + width
    for layer, (queries, groups) in enumerate(zip(config.num_query_heads, config.num_kv_heads, strict=True)):
        attention = (2 * queries + 2 * groups) * head * width
        total += attention + 3 * config.ffn_dim(layer) * width + 2 * width + 2 * head
    return Shape(total, 2 * sum(config.num_kv_heads) * head)


MODELS = {
    "SmolLM2-135M": llama(30, 576, 1536, 3, 64, 49152),
    "Llama-3.2-1B": llama(16, 2048, 8192, 8, 64, 128256),
    "OpenELM-1.1B": openelm("1_1B"),
    "Llama-2-7B": llama(32, 4096, 11008, 32, 128, 32000),
}


def committed(width: int, acceptance: float) -> float:
    """Expected tokens of a round that drafts `width`: the accepted ones and the one after them."""
    return sum(acceptance**place for place in range(width + 1))


def predict(
    shape: Shape, weights: str, depth: int, bandwidth: float, acceptance: float, anew: float, overhead: float
) -> dict:
    """PREDICTED milliseconds of plain decoding's tokens, of a token of QuantSpec at its best width, and that width.
    `bandwidth` in GB/s as specified, `overhead` in ms a pass."""

    def ms(read: float) -> float:
        return read / (bandwidth * USABLE * 1e9) * 1e3 + overhead

    draft = ms(shape.bytes(DRAFTING[weights], "draft", depth))

    def token(width: int) -> float:
        verification = ms(shape.bytes(WEIGHTS[weights], "int8", depth, 1 + anew * width))
        return (width * draft + verification) / committed(width, acceptance)

    best = min(range(1, MOST + 1), key=token)
    plain = {kind: ms(shape.bytes(WEIGHTS[weights], kind, depth)) for kind in ("float16", "int8")}
    return plain | {"quantspec": token(best), "width": best}


def samples(overhead: float) -> list[dict]:
    """The predictions. Lists have one number for each depth."""
    found = []
    for model, shape in MODELS.items():
        for weights in WEIGHTS:
            for acceptance in ACCEPTANCES:
                for passes, anew in ANEW.items():
                    for chip, bandwidth in CHIPS.items():
                        each = [
                            predict(shape, weights, depth, bandwidth, acceptance, anew, overhead)
                            for depth in DEPTHS.values()
                        ]
                        about = {"model": model, "weights": weights, "acceptance": acceptance}
                        about |= {"verification": passes, "chip": chip}
                        for kind in ("float16", "int8"):
                            about[f"predicted_speedup_over_{kind}"] = [
                                round(one[kind] / one["quantspec"], 3) for one in each
                            ]
                        found.append(about | {"width": [one["width"] for one in each]})
    return found


def bytes_table() -> str:
    """Megabytes of a token, which no chip changes."""
    rows = []
    for model, shape in MODELS.items():
        for weights in WEIGHTS:
            cells = []
            for depth in DEPTHS.values():
                read = [shape.bytes(WEIGHTS[weights], kind, depth) for kind in ("float16", "int8")]
                read.append(shape.bytes(DRAFTING[weights], "draft", depth))
                cells.append(" / ".join(f"{each / 1e6:.0f}" for each in read))
            rows.append([f"{model}, {weights}", *cells])
    return table(["predicted MB a token: float16 KV / int8 KV / draft", *DEPTHS], rows)


def speedups(found: list[dict]) -> str:
    """Of one chip and a kernel that reads the weights once."""
    rows = []
    for one in found:
        if (one["chip"], one["verification"]) == (SHOWN, "c = 1"):
            parts = zip(
                one["predicted_speedup_over_float16"], one["predicted_speedup_over_int8"], one["width"], strict=True
            )
            cells = [f"{half:.2f} / {eight:.2f} ({width})" for half, eight, width in parts]
            rows.append([f"{one['model']}, {one['weights']}, accepted {one['acceptance']:.2f}", *cells])
    header = f"predicted, {SHOWN}, c = 1: speedup over float16 KV / over int8 KV (drafted tokens)"
    return table([header, *DEPTHS], rows)


def verdicts(found: list[dict], model: str) -> str:
    """Go or no-go of a model at the lower acceptance: a line for each chip."""
    chosen = {
        (one["chip"], one["weights"], one["verification"]): one["predicted_speedup_over_int8"]
        for one in found
        if (one["model"], one["acceptance"]) == (model, min(ACCEPTANCES))
    }
    rows = []
    for chip in CHIPS:
        cells = []
        for weights in WEIGHTS:
            values = [chosen[chip, weights, passes] for passes in ANEW]
            cells += [", ".join(map(verdict, pair)) for pair in zip(*values, strict=True)]
        rows.append([chip, *cells])
    header = [f"{weights} @{depth}" for weights in WEIGHTS for depth in DEPTHS]
    passes = ", ".join(ANEW)
    return table([f"predicted, {model}: {passes}", *header], rows)


def verdict(speedup: float) -> str:
    """ "go" or "no", and the speedup."""
    return f"{'go' if speedup > GO else 'no'} {speedup:.2f}"


def text(document: dict) -> str:
    """The tables, in Markdown."""
    found = document["samples"]
    return "\n\n".join([bytes_table(), speedups(found), *(verdicts(found, model) for model in MODELS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overhead", type=float, default=2.0, help="ms of each pass, assumed; default %(default)g")
    parser.add_argument("--save", action="store_true", help=f"write results/{PATH.name}")
    saving.add_report(parser)
    options = parser.parse_args()
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or PATH), text)
        return
    card = {
        "command": saving.command(),
        "kind": "predicted: counted bytes and specified bandwidths, nothing was measured",
        "host": f"{platform.system()} {platform.machine()}",
        "usable_share_of_bandwidth": USABLE,
        "overhead_ms": options.overhead,
        "depths": list(DEPTHS.values()),
        "chips_gb_per_s": CHIPS,
    }
    document = {"card": card, "samples": samples(options.overhead)}
    print(card_lines(card), text(document), sep="\n\n")
    if options.save:
        saving.write_json(document, PATH)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
