"""Time to first token, decode speed, memory and load time of the built-in model on this CPU, side by side with mlx-lm.

    python benchmarks/cpu_peers.py [--prompts 64 512] [--generate 32] [--rounds 3] [--save]

Each measurement is a process of its own; the arms take turns, round by round, and medians are shown. Prompts are random
token ids, decoding is greedy, the weights are the same (4-bit groups of 32, embedding 8-bit). The last line is one JSON
document with every sample; --save writes it to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARMS = {"mlxeff": {}, "mlxeff, 1 thread": {"MLXEFF_NUM_THREADS": "1"}, "mlx-lm": {}}
SEED = 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--worker", nargs=4, metavar=("ARM", "PATH", "PROMPT", "GENERATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arm, path, prompt, generate = options.worker
        print(json.dumps(WORKERS[arm.partition(",")[0]](Path(path), int(prompt), int(generate))))
        return
    results = {"card": card(options), "samples": measure(options)}
    print_table(results)
    if options.save:
        chip = results["card"]["cpu"].replace(" ", "-").replace("(R)", "")
        path = ROOT / "benchmarks/results" / f"{chip}-cpu-peers-mlx-{results['card']['mlx']}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


def card(options) -> dict:
    """What was measured, where."""
    import mlx.core as mx

    import mlxeff
    from mlxeff import kernels

    native, reason = kernels.native()
    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "command": " ".join(["python", "benchmarks/cpu_peers.py", *sys.argv[1:]]),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "native": native.isa() if native else reason,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "mlx": mx.__version__,
        "mlxeff": mlxeff.__version__,
        "mlx_lm": version("mlx-lm"),
        "generated_tokens": options.generate,
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def version(name: str) -> str:
    from importlib.metadata import version as find

    return find(name)


def measure(options) -> list[dict]:
    """All samples, the arms interleaved."""
    from mlxeff.convert import convert

    from mlxeff import hub

    gguf, samples = hub.resolve(hub.DEFAULT_MODEL), []
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "model"
        convert(gguf, converted, dtype="float32")  # MLX's CPU kernels are fastest with float32 scales
        for _ in range(options.rounds):
            for prompt in options.prompts:
                for arm, environment in ARMS.items():
                    path = converted if arm == "mlx-lm" else gguf
                    command = [sys.executable, __file__, "--worker", arm, path, str(prompt), str(options.generate)]
                    run = subprocess.run(
                        command, capture_output=True, text=True, check=True, env=os.environ | environment, cwd=ROOT
                    )
                    sample = {"arm": arm, "prompt": prompt} | json.loads(run.stdout.splitlines()[-1])
                    samples.append(sample)
                    print(f"{arm}, {prompt} tokens: TTFT {sample['ttft_s']:.3f} s", file=sys.stderr)
    return samples


def random_ids(count: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(SEED).integers(100, 40000, count).tolist()


def timed(load, steps, prompt: int, generate: int) -> dict:
    """Seconds to load and to the first token, tokens a second after it, peak resident MiB."""
    began = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    times = []
    for _ in steps(model, random_ids(prompt), generate):
        times.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return {
        "load_s": loaded - began,
        "ttft_s": times[0] - loaded,
        "decode_tps": (len(times) - 1) / (times[-1] - times[0]),
        "rss_mib": peak,
    }


def mlxeff_worker(path: Path, prompt: int, generate: int) -> dict:
    def load():
        from mlxeff.loading import load_path

        return load_path(path).model

    def steps(model, ids, count):
        import mlx.core as mx

        from mlxeff.decode import decode, prefill
        from mlxeff.kernels import PREFILL_STEP, device
        from mlxeff.sampling import make_sampler

        cache = model.new_cache()
        logits = prefill(model, cache, mx.array(ids), PREFILL_STEP[device()])
        return decode(model, cache, logits, make_sampler(), max_tokens=count)

    return timed(load, steps, prompt, generate)


def mlx_lm_worker(path: Path, prompt: int, generate: int) -> dict:
    def load():
        from mlx_lm.utils import load_model

        return load_model(path)[0]

    def steps(model, ids, count):
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        return generate_step(mx.array(ids), model, max_tokens=count)

    return timed(load, steps, prompt, generate)


WORKERS = {"mlxeff": mlxeff_worker, "mlx-lm": mlx_lm_worker}


def print_table(results: dict) -> None:
    for key, value in results["card"].items():
        print(f"{key}: {value}")
    print("\n| engine | prompt | TTFT s | decode tok/s | load s | peak RSS MiB |\n|---|---|---|---|---|---|")
    for arm in ARMS:
        for prompt in sorted({sample["prompt"] for sample in results["samples"]}):
            chosen = [s for s in results["samples"] if (s["arm"], s["prompt"]) == (arm, prompt)]
            ttft, decode, load, rss = (
                statistics.median(sample[key] for sample in chosen)
                for key in ("ttft_s", "decode_tps", "load_s", "rss_mib")
            )
            print(f"| {arm} | {prompt} | {ttft:.3f} | {decode:.1f} | {load:.2f} | {rss:.0f} |")


if __name__ == "__main__":
    main()
