"""Decode speed and time to first token of the whole built-in model with SeedLM weights, beside other 4-bit forms of it.

    python benchmarks/cpu_seedlm_models.py [--seeds FOLDER ...]     # alone; `cpu_seedlm.py` does this after the kernels

Every measurement is a process of `peers.worker`; the arms take turns, round by round. mlx-lm runs on as many threads as
MLX gives it, whatever is asked, and once: it takes minutes. An arm whose model or peer is not there is left out, with a
line.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mlxeff.hub.catalog import cache_dir
from peers import checkpoints
from peers.install import install
from peers.measure import Measurer, reason
from peers.table import EXACT_FLOAT32, FOUR, GENERATED, INT8_FLOAT16

DEPTH = 512  # tokens of the prompt: time to the first token, decoded tokens a second after it
LIMIT = 240.0  # seconds a process
OWN = {"exact": EXACT_FLOAT32, "int8": INT8_FLOAT16}


@dataclass(frozen=True)
class Arm:
    """An engine on one form of the model."""

    name: str
    engine: str  # of `peers.engines.ENGINES`
    path: Path
    options: dict
    python: str = sys.executable
    threaded: bool = True


def default_seeds() -> list[Path]:
    """The model at 4 bits as `seedlm_quality.py` leaves it in the user's cache folder."""
    return [cache_dir().with_name("mlxeff-seedlm") / "SeedLM-4-aware"]


def arms(seeds: list[Path], folder: Path) -> list[Arm]:
    """Those that can be measured here."""
    files, llama = checkpoints.make(FOUR, folder), install("llama.cpp", folder)
    found = []
    for mode, options in OWN.items():
        found += [Arm(f"mlxeff {mode}, {path.name}", "mlxeff", path, options) for path in seeds]
        found.append(Arm(f"mlxeff {mode}, affine 4-bit", "mlxeff", files.gguf, options))
    found.append(Arm("mlx-lm, affine 4-bit", "mlx-lm", files.mlx, {}, threaded=False))
    if llama.present:
        found += [
            Arm(f"llama.cpp Q4_0, {kind} attention", llama.engine, files.q4_0, {"flash_attention": flash}, llama.python)
            for kind, flash in (("flash", True), ("plain", False))
        ]
    for missing in (arm for arm in found if not arm.path.exists()):
        print(f"{missing.name}: not measured: there is no {missing.path}", file=sys.stderr)
    return [arm for arm in found if arm.path.exists()]


def measure(seeds: list[Path], threads: list[int], rounds: int, folder: Path | None = None) -> list[dict]:
    """One sample a round, number of threads and arm: seconds to the first token, tokens a second after it (lists); or
    `error`, one line."""
    folder = folder or cache_dir().with_name("mlxeff-peers")
    folder.mkdir(parents=True, exist_ok=True)
    chosen, measurer, samples = arms(seeds, folder), Measurer(folder, {}, {}, LIMIT), []
    for number in range(rounds):
        for count in threads:
            for arm in chosen:
                if not arm.threaded and (number or count != max(threads)):
                    continue
                task = {"task": "speed", "engine": arm.engine, "path": str(arm.path), "options": arm.options}
                task |= {"threads": count, "depth": DEPTH, "generate": GENERATED}
                samples.append({"arm": arm.name, "threads": count, "round": number, **run(measurer, task, arm)})
    return samples


def run(measurer: Measurer, task: dict, arm: Arm) -> dict:
    """What the process measured, or why it did not."""
    try:
        return measurer.run_task(task, arm.python)
    except subprocess.TimeoutExpired:
        error = f"no answer in {LIMIT:g} s"
    except subprocess.CalledProcessError as failure:
        error = reason(failure)
    print(f"{arm.name}: {error}", file=sys.stderr)
    return {"error": error}


def table(samples: list[dict]) -> str:
    """Medians over rounds and repetitions."""
    lines = [f"{'model':<34} {'threads':>7} {'TTFT ' + str(DEPTH) + ', s':>12} {'decode tok/s':>13}"]
    complete = [s for s in samples if "error" not in s]
    for arm, threads in dict.fromkeys((s["arm"], s["threads"]) for s in complete):
        own = [s for s in complete if (s["arm"], s["threads"]) == (arm, threads)]
        ttft, decode = (median(v for s in own for v in s[key]) for key in ("ttft_s", "decode_tps"))
        lines.append(f"{arm:<34} {threads:>7} {ttft:>12.3f} {decode:>13.1f}")
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
