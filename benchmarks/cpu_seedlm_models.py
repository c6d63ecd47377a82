"""Decode speed and time to first token of the built-in model with SeedLM weights, compared with its other 4-bit
formats.

    python benchmarks/cpu_seedlm_models.py [--seeds FOLDER ...]     # alone; `cpu_seedlm.py` does this after the kernels

Every measurement is a process of `peers.worker`; the arms take turns, round by round. mlx-lm has no option for the
number of threads and takes minutes, so it is measured once. An arm whose model or engine is not installed is skipped
with a message.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mlxeff.bench.samples import median_of
from peers import checkpoints
from peers.install import install
from peers.measure import Engine, Measurer, reason
from peers.report import LLAMA_Q4_0
from peers.table import EXACT_FLOAT32, FOUR, INT8_FLOAT16, UNTHREADED, arm
from places import work_folder

DEPTH = 512  # tokens of the prompt that is timed to its first token; decode speed is measured after it
LIMIT = 240.0  # seconds that one process may take
OWN = {"exact": EXACT_FLOAT32, "int8": INT8_FLOAT16}


def default_seeds() -> list[Path]:
    """The 4-bit SeedLM model that `seedlm_quality.py` leaves in the user's cache folder."""
    return [work_folder("seedlm") / "SeedLM-4-aware"]


def arms(seeds: list[Path], folder: Path) -> dict[str, Engine]:
    """The arms that can be measured on this machine, by name."""
    files, llama = checkpoints.make(FOUR, folder), install("llama.cpp", folder)
    found = {}
    for mode, options in OWN.items():
        found |= {f"mlxeff {mode}, {path.name}": Engine("mlxeff", path, options) for path in seeds}
        found[f"mlxeff {mode}, affine 4-bit"] = Engine("mlxeff", files.gguf, options)
    found["mlx-lm, affine 4-bit"] = Engine("mlx-lm", files.mlx, {})
    if llama.present:
        settings = {name: arm(name).options for name in LLAMA_Q4_0}
        found |= {name: Engine(llama.engine, files.q4_0, each, llama.python) for name, each in settings.items()}
    for name, engine in found.items():
        if not engine.path.exists():
            print(f"{name}: not measured: there is no {engine.path}", file=sys.stderr)
    return {name: engine for name, engine in found.items() if engine.path.exists()}


def measure(seeds: list[Path], threads: list[int], rounds: int) -> list[dict]:
    """One sample a round, number of threads and arm: seconds to the first token, tokens a second after it (lists); or
    `error`, one line."""
    folder = work_folder("peers")
    folder.mkdir(parents=True, exist_ok=True)
    chosen, measurer, samples = arms(seeds, folder), Measurer(folder, {}, {}, LIMIT), []
    for number in range(rounds):
        for count in threads:
            for name, engine in chosen.items():
                if engine.name in UNTHREADED and (number or count != max(threads)):
                    continue
                found = run(measurer, name, engine, count)
                samples.append({"arm": name, "threads": count, "round": number, **found})
    return samples


def run(measurer: Measurer, name: str, engine: Engine, threads: int) -> dict:
    """Measure the arm `name` in a process: its results, or the reason of its failure."""
    try:
        return measurer.run_task(engine.task("speed", threads, DEPTH), engine.python)
    except subprocess.TimeoutExpired:
        error = f"no answer in {LIMIT:g} s"
    except subprocess.CalledProcessError as failure:
        error = reason(failure)
    print(f"{name}: {error}", file=sys.stderr)
    return {"error": error}


def table(samples: list[dict]) -> str:
    """The table of medians over rounds and repetitions."""
    lines = [f"{'model':<34} {'threads':>7} {'TTFT ' + str(DEPTH) + ', s':>12} {'decode tok/s':>13}"]
    for name, threads in dict.fromkeys((s["arm"], s["threads"]) for s in samples if "error" not in s):
        ttft, decode = (median_of(samples, each, arm=name, threads=threads) for each in ("ttft_s", "decode_tps"))
        lines.append(f"{name:<34} {threads:>7} {ttft:>12.3f} {decode:>13.1f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=Path, nargs="+", default=default_seeds(), help="folders that convert made")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    samples = measure(options.seeds, options.threads, options.rounds)
    print(table(samples))
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
