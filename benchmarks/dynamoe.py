"""DynaMoE: quality and speed at each mean share of the feed-forward neurons, beside static widths and its rivals.

    python benchmarks/dynamoe.py [--save] [--phase quality speed drafts] [--arms NAME ...] [--windows 16] [--add]
    python benchmarks/dynamoe.py --report [FILE]

quality  perplexity, KL divergence and first choices, with the dense model as the reference. "share" is that of the
         feed-forward weights which tokens compute, of our own arms as it was counted; "bytes" is the share of the bytes
         that kernels read for it: who leaves out inputs of quantised weights still reads all scales
speed    the native decoder at each sensitivity and the dense model, taking turns: tokens a second in decoding after a
         short prompt, bytes of feed-forward weights a token as the kernels counted them, and how much of the time is
         saved that the bytes predict: those of all weights that a token reads
drafts   decoding at all neurons with drafts of a part (`--draft dynamoe:S`), beside plain decoding and QuantSpec

The models are fitted on the package's calibration text, which is another one, by `fit_dynamoe` under --work, and used
again; that takes some minutes a piece.
"""

import argparse
from pathlib import Path

import saving
from ffn import drafts, quality, speed
from mlxeff import hub
from mlxeff.bench.tables import table
from peers import card
from places import work_folder

SECTION = "dynamoe"  # of RESULTS.md
PHASES = {"quality": quality.measure, "speed": speed.measure, "drafts": drafts.measure}
CLEAR = 0.1  # share of the bytes that must be saved, so that the time tells more than its noise


def quality_table(document: dict, mode: str) -> str:
    dense = document["dense"][mode]
    rows = [["dense", "1.000", "1.000", f"{dense['perplexity']:.2f}", "", "0", "100 %"]]
    for name, measured in document["arms"].items():
        for row in measured:
            if row["mode"] != mode:
                continue
            worse = row["perplexity"] / dense["perplexity"] - 1
            numbers = [f"{row['perplexity']:.2f}", f"{worse:+.1%}", f"{row['kl']:.4f}", f"{row['agreement']:.1%}"]
            rows.append([name, f"{row['share']:.3f}", f"{row.get('bytes', row['share']):.3f}", *numbers])
    return table(["", "share", "bytes", "perplexity", "", "KL", "same first choice"], rows)


def speed_table(rows: list[dict]) -> str:
    lines, whole = [], rows[0]["bytes"]
    for row in rows:
        share = f"{row['share']:.3f}" if "share" in row else ""
        known = row.get("of_predicted") is not None and row["bytes"] < (1 - CLEAR) * whole
        of_predicted = f"{row['of_predicted']:.0%}" if known else ""
        megabytes = [f"{row[key] / 1e6:.1f}" for key in ("feed_forward_bytes", "bytes")]
        lines.append([row["arm"], share, f"{row['tps']:.1f}", *megabytes, f"{row.get('time', 1):.3f}", of_predicted])
    return table(["", "share", "tokens/s", "MB feed-forward", "MB in all", "time", "of what the bytes predict"], lines)


def drafts_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        accepted = [f"{row['acceptance']:.0%}", f"{row['tokens_per_round']:.2f}"] if "acceptance" in row else ["", ""]
        lines.append([row["arm"], *accepted, f"{row['tps']:.1f}", f"{row['tps'] / rows[0]['tps']:.2f}"])
    return table(["", "accepted", "tokens a round", "tokens/s", "of the first"], lines)


def text(document: dict) -> str:
    """The section of RESULTS.md."""
    own = document["card"]
    parts = [f"{own['cpu']}, {own['cores']} cores, MLX {own['mlx']}: `{own['command']}`"]
    if "dense" in document:
        parts += [
            f"Every token of {document['windows']} windows of {quality.WINDOW} tokens at the share:",
            quality_table(document, "all"),
            f"The first {quality.PROMPT} tokens of each window read with all neurons, what follows at the share:",
            quality_table(document, "after"),
        ]
    for name, rows in document.get("speed", {}).items():
        parts += [f"Decoding, {name}:", speed_table(rows)]
    if "prefill" in document:
        rows = [[row["arm"], f"{row['tps']:.0f}"] for row in document["prefill"]]
        parts += ["Reading a prompt, weights of 4 bits:", table(["", "tokens/s"], rows)]
    for name, rows in document.get("drafts", {}).items():
        parts += [f"Decoding with drafts of {drafts.DRAFTED} tokens, {name}:", drafts_table(rows)]
    return "\n\n".join(parts)


def stem() -> Path:
    """The path, without extension, of this machine's result."""
    return saving.result_path(card.machine()["cpu"], SECTION)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--phase", nargs="+", default=[*PHASES], choices=PHASES)
    parser.add_argument("--arms", nargs="+", default=quality.NAMES, choices=quality.NAMES, metavar="NAME")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens of a round")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--work", type=Path, default=work_folder("dynamoe"))
    parser.add_argument("--add", action="store_true", help="keep what the saved result has")
    parser.add_argument("--save", action="store_true", help="write results/<processor>-dynamoe.json")
    saving.add_report(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    path = stem().with_suffix(".json")
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or path).resolve(), text)
        return
    source = hub.resolve(options.model)
    document = saving.read_json(path) if options.add and path.exists() else {"arms": {}}
    document["card"] = card.identity() | {"command": saving.command()}
    save = (lambda: saving.write_json(document, path)) if options.save else (lambda: None)
    for phase in options.phase:
        PHASES[phase](options, source, document, save)
    print(text(document))
    save()


if __name__ == "__main__":
    main()
