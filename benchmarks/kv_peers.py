"""The kinds of KV cache beside those of llama.cpp and mlx-lm on this CPU: decoding speed after long prompts, and what
the rounding of keys and values changes.

    python benchmarks/kv_peers.py [--cache FOLDER] [--rounds 3] [--save]
    python benchmarks/kv_peers.py --phase quality --save           # or speed; put into the saved results
    python benchmarks/kv_peers.py --report [FILE]

speed     tokens a second for 32 tokens after random prompts, a process each; the arms take turns, round by round.
          llama.cpp has flash attention on, and reads the same Q4_1 file or its Q4_0 form, for which it has faster
          kernels. A process beyond `--limit` seconds is ended
quality   KL divergence and equal first choices on windows of `data/jargon-validation.txt`, as in `kv_cache.py`: 512
          tokens, then teacher-forced 16 at a time up to 2,048. Each engine is compared with itself: ours with a
          float32 cache, llama.cpp with f16, to which its flash attention converts f32 too. Its products round
          activations to 8 bits, so that any small change has an effect: "f32, plain attention" shows how large

Samples are kept as they come, in a file in `--cache` that is named after the machine and the compiled kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

import kv_cache
import saving
from mlxeff import kernels
from mlxeff.assembly.model import load_path
from mlxeff.bench.machine import cores
from mlxeff.bench.samples import Samples, median_of
from mlxeff.bench.tables import card_lines, table
from mlxeff.errors import MlxeffError
from mlxeff.eval.measures import compare, means
from mlxeff.ops import log_softmax
from peers import card, checkpoints
from peers.install import Peer, install
from peers.measure import Engine, environment, last_line, reason, worker_command
from peers.table import FOUR
from places import TEXT, work_folder
from speculation import identity, kept

SECTION = "kv-peers"  # of RESULTS.md
PHASES = ("speed", "quality")
KEYS = ("arm", "depth", "round")
DEPTHS = (1024, 4096, 7800)
OURS = {"float32": 4.0, "float16": 2.0, "int8": 1.0625, "int4": 0.5625}  # bytes of a number, scales included
LLAMA = {"f16": 2.0, "q8_0": 1.0625, "q4_0": 0.5625}
EQUAL = {"float16": "f16", "int8": "q8_0", "int4": "q4_0"}  # the same bytes
ROTATION = "LLAMA_ATTN_ROT_DISABLE"  # llama.cpp's variable; a build that has it rotates by default
UNROTATED = "q4_0, not rotated"
TRUTH, NOISE = "f16", "f32, plain attention"  # what llama.cpp's kinds are compared with, and the effect of any change


@dataclass(frozen=True)
class Arm:
    """An engine with a kind of KV cache. `files`: the form of the model, a key of `checkpoints.Files`."""

    engine: str
    kv_bytes: float
    options: dict = field(default_factory=dict)
    files: str = "gguf"
    deepest: int = max(DEPTHS)

    def runs(self, files: checkpoints.Files, peer: Peer) -> Engine:
        """What its worker runs."""
        python = peer.python if self.engine == "llama.cpp" else sys.executable
        return Engine(self.engine, getattr(files, self.files), self.options, python)


def llama_options(kind: str) -> dict:
    """The options of llama.cpp for this kind of cache."""
    return {"flash_attention": kind != NOISE, "kv": kind.split(",")[0]}


ARMS = {f"mlxeff {kind}": Arm("mlxeff", size, {"compute": "exact", "kv": kind}) for kind, size in OURS.items()}
ARMS |= {f"llama.cpp {kind}": Arm("llama.cpp", size, llama_options(kind)) for kind, size in LLAMA.items()}
ARMS |= {
    f"llama.cpp {kind}, Q4_0 weights": Arm("llama.cpp", size, llama_options(kind), "q4_0")
    for kind, size in LLAMA.items()
}
ARMS["mlx-lm float32"] = Arm("mlx-lm", 4.0, files="mlx", deepest=DEPTHS[0])
ARMS["mlx-lm kv_bits=8"] = Arm("mlx-lm", 1.125, {"kv_bits": 8}, "mlx", DEPTHS[0])


def rotates(peer: Peer) -> bool:
    """Whether this build of llama.cpp rotates keys and values that it quantises: the library names the variable."""
    libraries = Path(peer.python).parent.parent.glob("lib/python*/site-packages/llama_cpp/lib/libllama.*")
    return any(ROTATION.encode() in path.read_bytes() for path in libraries)


def run(task: dict, python: str, threads: int, limit: float, variables: dict | None = None) -> dict:
    """The answer of a worker; or `exceeded_s`, the limit that was exceeded; or `error`, one line."""
    try:
        return json.loads(last_line(worker_command(task, python), environment(threads) | (variables or {}), limit))
    except subprocess.TimeoutExpired:
        return {"exceeded_s": limit}
    except subprocess.CalledProcessError as error:
        return {"error": reason(error)}


def speed(options: argparse.Namespace, files: checkpoints.Files, peer: Peer, samples: Samples) -> None:
    """Add the samples that are missing. An arm that exceeded the limit is not tried again, but with a larger one."""
    for number in range(options.rounds):
        for depth in options.depths:
            for name, arm in ARMS.items():
                own = [
                    s for s in samples.all if s["arm"] == name and s.get("exceeded_s", options.limit) >= options.limit
                ]
                beyond = any(s["depth"] <= depth for s in own if "exceeded_s" in s)
                there = any((s["depth"], s["round"]) == (depth, number) for s in own)
                if there or beyond or depth > arm.deepest:
                    continue
                busy, engine = os.getloadavg()[0], arm.runs(files, peer)
                task = engine.task("speed", options.threads, depth)
                found = run(task, engine.python, options.threads, options.limit)
                samples.add({"arm": name, "depth": depth, "round": number, "load_average": busy} | found)
                print(f"round {number + 1}, {depth} tokens, {name}: load average {busy:.1f}", file=sys.stderr)


def pieces(window: list[int]) -> list[list[int]]:
    """The prompt of a window, then what is scored, in the chunks of `kv_cache.quality`."""
    starts = range(kv_cache.PROMPT, kv_cache.WINDOW - kv_cache.CHUNK, kv_cache.CHUNK)
    return [window[: kv_cache.PROMPT], *(window[at : at + kv_cache.CHUNK] for at in starts)]


def logits(kind: str, window: list[int], path: Path, engine: Engine, options: argparse.Namespace) -> np.ndarray:
    """llama.cpp's logits after the prompt with this kind of cache. Raises CalledProcessError where it fails."""
    task = engine.task("logits", options.threads, kv_cache.WINDOW)
    task |= {"options": llama_options(kind), "pieces": pieces(window), "logits": str(path)}
    task["context"] = kv_cache.WINDOW
    variables = environment(options.threads) | ({ROTATION: "1"} if kind == UNROTATED else {})
    last_line([engine.python, "-m", "peers.engines", json.dumps(task)], variables, options.limit)
    return np.load(path, mmap_mode="r")[kv_cache.PROMPT :]


def differences(rows: dict[str, np.ndarray], window: list[int], truth: str) -> dict[str, list[dict]]:
    """Kind → `measures.compare` of each chunk of a window with the kind `truth`."""
    found = {kind: [] for kind in rows}
    for at in range(0, len(rows[truth]), kv_cache.CHUNK):
        after = kv_cache.PROMPT + at + 1
        targets = np.array(window[after : after + kv_cache.CHUNK])
        part = {kind: log_softmax(mx.array(each[at : at + kv_cache.CHUNK])) for kind, each in rows.items()}
        for kind, each in part.items():
            found[kind].append(compare(each, part[truth], targets))
    return found


def quality(options: argparse.Namespace, files: checkpoints.Files, peer: Peer) -> dict:
    """Arm → `measures.means` over all windows: of ours, and of llama.cpp on the Q4_1 file."""
    loaded = load_path(files.gguf)
    ids = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    kinds = [*LLAMA, NOISE, *([UNROTATED] if rotates(peer) else [])]
    found = {kind: [] for kind in kinds}
    for start in range(0, options.windows * kv_cache.WINDOW, kv_cache.WINDOW):
        window = ids[start : start + kv_cache.WINDOW]
        with tempfile.TemporaryDirectory(dir=options.cache) as folder:
            engine = Engine("llama.cpp", files.gguf, {}, peer.python)
            rows = {kind: logits(kind, window, Path(folder) / f"{kind}.npy", engine, options) for kind in kinds}
            for kind, compared in differences(rows, window, TRUTH).items():
                found[kind] += compared
        print(f"llama.cpp: window {start // kv_cache.WINDOW + 1} of {options.windows}", file=sys.stderr)
    mine = kv_cache.quality(loaded.model, ids, options.windows)
    return {f"mlxeff {kind}": mine[kind] for kind in OURS} | {
        f"llama.cpp {k}": means(each) for k, each in found.items()
    }


def text(document: dict) -> str:
    """The tables, in Markdown."""
    turned = [each["llama.cpp rotates"] for each in document["cards"].values()]
    line = (
        f"This build of llama.cpp {'rotates' if all(turned) else 'does not rotate'} keys and values that it quantises."
    )
    parts = [speeds(document["samples"]), ratios(document["samples"]), qualities(document.get("quality", {})), line]
    return "\n\n".join(filter(None, parts))


def speeds(samples: list[dict]) -> str:
    """Tokens a second; why there are none."""
    depths, rows = sorted({s["depth"] for s in samples}), []

    def cell(name: str, depth: int) -> str:
        own = [s for s in samples if (s["arm"], s["depth"]) == (name, depth)]
        if (value := median_of(own, "decode_tps")) is not None:
            return f"{value:.1f}"
        return next((f"above {s['exceeded_s']:g} s" for s in own if "exceeded_s" in s), "failed" if own else "")

    for name, arm in ARMS.items():
        rows.append([name, f"{arm.kv_bytes:.2f}", *(cell(name, depth) for depth in depths)])
    return table(["KV cache", "bytes a number", *(f"tok/s @{depth}" for depth in depths)], rows)


def ratios(samples: list[dict]) -> str:
    """Ours by llama.cpp's with the same bytes a number, the better of its two files."""
    depths, rows = sorted({s["depth"] for s in samples}), []
    for mine, theirs in EQUAL.items():
        cells = []
        for depth in depths:
            names = (f"mlxeff {mine}", f"llama.cpp {theirs}", f"llama.cpp {theirs}, Q4_0 weights")
            own, *others = (median_of(samples, "decode_tps", depth=depth, arm=name) for name in names)
            best = max(filter(None, others), default=None)
            cells.append("" if None in (own, best) else f"{own / best:.2f}")
        rows.append([f"{mine} / {theirs}", *cells])
    return table(["mlxeff / llama.cpp at equal bytes", *(f"tok/s @{depth}" for depth in depths)], rows)


def qualities(found: dict) -> str:
    """What the rounding changes, of each engine against itself."""
    rows = []
    for name, numbers in found.items():
        exact = name in ("mlxeff float32", f"llama.cpp {TRUTH}")
        change = ["", ""] if exact else [f"{numbers['kl']:.1e}", f"{numbers['agreement']:.2%}"]
        rows.append([name, f"{numbers['perplexity']:.3f}", *change])
    return table(
        ["KV cache", "perplexity", "KL to the engine's own float32 (llama.cpp: f16) cache", "same first token"], rows
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--phase", choices=PHASES, help="only this one, put into the saved results")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a process; default %(default)g")
    parser.add_argument("--cache", type=Path, default=work_folder("peers"), help="the peers; default %(default)s")
    parser.add_argument("--save", action="store_true", help=f"write results/<processor>-{SECTION}.json")
    saving.add_report(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    path = saving.result_path(card.machine()["cpu"], f"{SECTION}.json")
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or path), text)
        return
    kernels.use_device("cpu")
    options.cache.mkdir(parents=True, exist_ok=True)
    peer, common = install("llama.cpp", options.cache), identity(threads=options.threads)
    if peer.engine != "llama.cpp" or not peer.present:
        raise MlxeffError(f"kv_peers: wanted llama.cpp from source, got {peer.how}")
    files, samples = checkpoints.make(FOUR, options.cache), kept(options.cache, SECTION, KEYS, common)
    document = saving.read_json(path) if options.phase and path.exists() else {"cards": {}, "samples": []}
    about = common | {"command": saving.command(), "llama.cpp rotates": rotates(peer)}
    document["cards"] |= dict.fromkeys([options.phase] if options.phase else PHASES, about)
    if options.phase != "quality":
        speed(options, files, peer, samples)
        document["samples"] = samples.all
    if options.phase != "speed":
        document |= {"windows": options.windows, "quality": quality(options, files, peer)}
    print(card_lines(about), text(document), sep="\n\n")
    if options.save:
        saving.write_json(document, path)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
