"""GGUF files of llama.cpp's quantised types here: memory, what the packing changes, and speed beside llama.cpp.

    python benchmarks/gguf_quality.py [--files Q4_K_M ...] [--phase quality | speed] [--rounds 3] [--save]
    python benchmarks/gguf_quality.py --report [FILE]

The files are made from the built-in model's weights in float16 by llama.cpp's own quantiser, without an importance
matrix. Rows of 576 weights are no multiple of 256, so most matrices have types with blocks of 32; the table names the
types and their shares.

quality   bytes of the file and of the model's arrays; KL divergence from the model with the file's weights dequantised
          in float32, and how often both have the same first choice, on windows of `data/jargon-validation.txt`
speed     time to first token of 512 tokens and tokens a second after them, as `cpu_peers.py` measures them, the engines
          taking turns; it needs a quiet machine, and each sample holds the load average before it

With --save the document is written after every part, and a phase that was measured alone is put into what is there.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
from mlx.utils import tree_flatten

import saving
from mlxeff import hub
from mlxeff.assembly.model import load_path
from mlxeff.bench.samples import median_of
from mlxeff.bench.tables import card_lines, table
from mlxeff.checkpoint import open_source
from peers import card, checkpoints, install
from peers.measure import Engine, environment, last_line, worker_command
from peers.report import short
from peers.table import EXACT_FLOAT32, INT8_FLOAT16
from places import TEXT, work_folder
from quality import llama_quant
from seedlm_quality import WINDOW, Truth, measure

FILES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "IQ4_XS")
SECTION = "gguf-quality"  # of RESULTS.md
DEPTH = 512
MINE, FAST, LLAMA = "mlxeff", "mlxeff, fast", "llama.cpp"
PHASES = ("quality", "speed")


class Files:
    """Makes the files in `folder`, with the peers that lie in `peers`."""

    def __init__(self, folder: Path, peers: Path, model: str, limit: float):
        self.folder, self.limit = folder, limit
        self.peer = install.install("llama.cpp", peers)
        if self.peer.engine != "llama.cpp":
            raise SystemExit(f"llama.cpp: wanted llama-cpp-python, got {self.peer.engine or self.peer.how}")
        folder.mkdir(parents=True, exist_ok=True)
        source, half = hub.resolve(model), gguf.GGMLQuantizationType.F16
        self.half = saving.once(folder / "F16.gguf", lambda path: checkpoints.requantise(source, path, half))

    def quantised(self, name: str) -> Path:
        """The file of llama.cpp's type `name`."""
        return llama_quant.make(name, self.half, None, self.folder, self.peer.python, self.limit)[0]

    def dequantised(self, name: str) -> Path:
        """The same weights in float32."""
        source, single = self.quantised(name), gguf.GGMLQuantizationType.F32
        place = self.folder / f"{name}.F32.gguf"
        return saving.once(place, lambda path: checkpoints.requantise(source, path, single))


def quality(files: Files, name: str, windows: np.ndarray) -> dict:
    """Sizes of the file `name` and what the packing changes in its distributions on windows (W, T) of tokens."""
    path, exact = files.quantised(name), files.dequantised(name)
    truth, model = Truth(load_path(exact).model, windows), load_path(path).model
    found = measure(truth, model, windows)
    exact.unlink()
    shares, tensors = Counter(), open_source(path).tensors.values()
    for tensor in tensors:
        shares[tensor.kind] += tensor.size if len(tensor.shape) > 1 else 0
    total = sum(shares.values())
    return {
        "types": {kind: round(count / total, 3) for kind, count in shares.most_common() if count},
        "file_bytes": path.stat().st_size,
        "memory_bytes": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        "float16_bytes": 2 * sum(tensor.size for tensor in tensors),
        "kl": found["kl"],
        "top1": found["top1"],
    }


def arms(files: Files, path: Path) -> list[tuple[str, Engine]]:
    """(row of the samples, what is run) on one file. llama.cpp runs with flash attention on and off."""
    peer = files.peer
    return [
        (MINE, Engine("mlxeff", path, EXACT_FLOAT32)),
        (FAST, Engine("mlxeff", path, INT8_FLOAT16)),
        *((LLAMA, Engine(peer.engine, path, {"flash_attention": flash}, peer.python)) for flash in (True, False)),
    ]


def speed(files: Files, names: list[str], rounds: int, threads: int, limit: float) -> list[dict]:
    """The samples of all files and of the float16 one, the engines taking turns on each."""
    samples = []
    for number in range(rounds):
        for name in ("F16", *names):
            path = files.half if name == "F16" else files.quantised(name)
            for arm, engine in arms(files, path):
                busy, task = os.getloadavg()[0], engine.task("speed", threads, DEPTH)
                found = json.loads(last_line(worker_command(task, engine.python), environment(threads), limit))
                print(f"round {number + 1}, {name}, {arm}: load average {busy:.1f}", file=sys.stderr)
                about = {"file": name, "arm": arm, "options": engine.options, "round": number, "threads": threads}
                samples.append(about | found | {"load_average": busy})
    return samples


def best(samples: list[dict], metric: str, name: str, arm: str) -> str:
    """The median over all rounds; of an arm with several settings the better one's."""
    choose = min if metric == "ttft_s" else max
    settings = [each["options"] for each in samples if each["arm"] == arm]
    medians = [median_of(samples, metric, file=name, arm=arm, options=options) for options in settings]
    return short(choose((value for value in medians if value is not None), default=None))


def text(document: dict) -> str:
    """The tables, in Markdown."""
    rows = []
    for name, found in document["files"].items():
        sizes = [f"{found[key] / 1e6:.0f}" for key in ("file_bytes", "memory_bytes", "float16_bytes")]
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in found["types"].items())
        rows.append([name, kinds, *sizes, f"{found['kl']:.1e}", f"{found['top1']:.2%}"])
    header = ["file", "types of its weights", "MB", "MB in memory", "MB as float16", "KL", "same first token"]
    tables, samples = [table(header, rows)], document["samples"]
    rows = []
    for name in dict.fromkeys(sample["file"] for sample in samples):
        cells = [best(samples, metric, name, arm) for metric in ("ttft_s", "decode_tps") for arm in (MINE, FAST, LLAMA)]
        rows.append([name, *cells])
    header = [f"{what}: {arm}" for what in (f"TTFT {DEPTH}, s", f"tok/s @{DEPTH}") for arm in (MINE, FAST, LLAMA)]
    return "\n\n".join(filter(None, [*tables, table(["file", *header], rows)]))


def stem() -> Path:
    return saving.result_path(card.machine()["cpu"], "gguf-quality.json")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=FILES, metavar="TYPE", help=f"default: {', '.join(FILES)}")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--phase", choices=PHASES, help="only this one, put into the saved results")
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, help="whose weights are quantised")
    parser.add_argument("--work", type=Path, default=work_folder("gguf"), help="the files")
    parser.add_argument("--cache", type=Path, default=work_folder("peers"), help="the peers")
    parser.add_argument("--limit", type=float, default=5400, help="seconds that quantising a file or a sample may take")
    parser.add_argument("--save", action="store_true", help="write results/<processor>-gguf-quality.json")
    saving.add_report(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or stem()), text)
        return
    begun = saving.read_json(stem()) if options.phase and stem().exists() else {"files": {}, "samples": []}
    phases = (options.phase,) if options.phase else PHASES
    cards = begun.get("cards", {}) | dict.fromkeys(phases, card.identity() | {"command": saving.command()})
    document = begun | {"cards": cards}
    files = Files(options.work, options.cache, options.model, options.limit)
    if "quality" in phases:
        ids = load_path(files.half).tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
        count = min(options.tokens, len(ids)) // WINDOW
        windows = np.array(ids[: count * WINDOW], np.int32).reshape(count, WINDOW)
        document["tokens"] = windows.size
        for name in options.files:
            print(name, file=sys.stderr)
            document["files"][name] = quality(files, name, windows)
            if options.save:
                saving.write_json(document, stem())
    if "speed" in phases:
        document["samples"] = speed(files, options.files, options.rounds, options.threads, options.limit)
    print(card_lines(cards[phases[-1]]), text(document), sep="\n\n")
    if options.save:
        saving.write_json(document, stem())
    print(json.dumps(document))


if __name__ == "__main__":
    main()
