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
from mlxeff.models.openelm import published_config
from mlxeff.plan import chips
from mlxeff.plan.formats import KV_BYTES
from mlxeff.plan.shapes import read_shape
from mlxeff.plan.techniques import committed

SECTION = "quantspec-prediction"  # of RESULTS.md
PATH = saving.RESULTS / "predicted-M1-to-M4-quantspec.json"
USABLE = 0.8  # share of the specified bandwidth
NAMES = ("m1", "m1-pro", "m1-max", "m2", "m2-pro", "m2-max", "m3", "m3-pro", "m3-max", "m4", "m4-pro", "m4-max")
CHIPS = {chip.name: chip.bandwidth[chip.most_cores] for chip in map(chips.find, NAMES)}  # specified GB/s
KINDS = {kind: KV_BYTES[kind] for kind in ("float16", "int8", "draft")}  # bytes of a number of keys and values
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


def shape(config: dict) -> Shape:
    """The shape of the model with this config.json. Norms are read too."""
    found = read_shape(config)
    vectors = found.vectors + sum(layer.vectors for layer in found.layers)
    return Shape(round(found.active) + vectors, found.kv_numbers)


def llama(layers: int, hidden: int, inner: int, heads: int, groups: int, vocabulary: int, tied: bool) -> dict:
    """The config.json of a Llama with `heads` heads, of keys and values `groups`."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "SmolLM2-135M": shape(llama(30, 576, 1536, 9, 3, 49152, True)),
    "Llama-3.2-1B": shape(llama(16, 2048, 8192, 32, 8, 128256, True)),
    "OpenELM-1.1B": shape(published_config("1_1B")),
    "Llama-2-7B": shape(llama(32, 4096, 11008, 32, 32, 32000, False)),
}


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
