"""One measurement in a process of its own: `python -m peers.worker JOB`, JOB a JSON document; the last line answers.

Every engine gets the same token ids, greedy decoding and a short warm-up. A prompt is repeated until REPEATS
repetitions are done or SECONDS have passed.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from .engines import ENGINES, Mlxeff, MlxLm
from .table import EXACT_FLOAT32

SEED = 0
REPEATS, SECONDS = 3, 10.0
WARM_UP = 16  # prompt tokens


def random_ids(count: int) -> list[int]:
    return np.random.default_rng(SEED).integers(100, 40000, count).tolist()


def timed(engine, ids: list[int], count: int) -> tuple[float, float]:
    """Seconds to the first token; tokens a second after it."""
    if hasattr(engine, "timed"):
        return engine.timed(ids, count)
    began, times = time.perf_counter(), []
    for _ in engine.generate(ids, count):
        times.append(time.perf_counter())
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0])


def speed(job: dict) -> dict:
    """Seconds to load and to the first token, tokens a second after it (lists), resident MiB at most for one prompt."""
    began = time.perf_counter()
    engine = ENGINES[job["engine"]](job | {"context": max(job["depth"] + job["generate"] + 8, 256)})
    loaded = time.perf_counter()
    timed(engine, random_ids(WARM_UP), 4)
    ids = random_ids(job["depth"])
    began_prompts, samples = time.perf_counter(), [timed(engine, ids, job["generate"])]
    peak = peak_rss()
    while len(samples) < REPEATS and time.perf_counter() - began_prompts < SECONDS:
        samples.append(timed(engine, ids, job["generate"]))
    ttft, decode = zip(*samples, strict=True)
    return {"load_s": loaded - began, "ttft_s": ttft, "decode_tps": decode, "rss_mib": peak, "note": engine.note}


def peak_rss() -> float:
    """MiB resident at most, of this program only: Linux's `ru_maxrss` begins with what the parent held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # macOS counts bytes
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def cold_start(job: dict) -> dict:
    """Load the model, generate one token and print a word at once; the parent process measures the time."""
    engine = ENGINES[job["engine"]](job | {"context": 256})
    if hasattr(engine, "complete"):
        engine.complete(job["ids"], 1)
    else:
        next(engine.generate(job["ids"], 1))
    print("first token", flush=True)
    return {}


def quality(job: dict) -> dict:
    """Prompts whose greedy tokens equal the reference's; error of the logits in passes over many rows and over one.

    Errors are root mean square, relative to that of the reference logits.
    """
    engine = ENGINES[job["engine"]](job | {"context": 512})
    with np.load(job["reference"]) as reference:
        prompts = [reference[f"prompt{number}"].tolist() for number in range(len(reference.files) // 3)]
        answers = [reference[f"answer{number}"].tolist() for number in range(len(prompts))]
        equal, sums = 0, np.zeros((2, 2))
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            equal += list(engine.generate(prompt, len(answer))) == answer
            got = engine.logits([prompt, *([token] for token in answer[:-1])]).astype(np.float64)
            want = reference[f"logits{number}"].astype(np.float64)
            for part, rows in enumerate((slice(0, len(prompt)), slice(len(prompt), None))):
                sums[part] += np.sum((got[rows] - want[rows]) ** 2), np.sum(want[rows] ** 2)
    errors = np.sqrt(sums[:, 0] / sums[:, 1])
    return {"equal": equal, "prompts": len(prompts), "prefill_error": errors[0], "decode_error": errors[1]}


def reference(job: dict) -> dict:
    """Write the reference: mlx-lm's greedy tokens in float32; logits of our model by MLX's own kernels over both."""
    oracle = MlxLm(job)
    model = Mlxeff({"path": job["own"], "options": EXACT_FLOAT32})
    if model.note != "mlx":
        raise SystemExit(f"reference: wanted MLX's own kernels, got {model.note}")
    arrays = {}
    for number, prompt in enumerate(job["prompts"]):
        answer = list(oracle.generate(prompt, job["generate"]))
        arrays[f"prompt{number}"], arrays[f"answer{number}"] = np.array(prompt), np.array(answer)
        arrays[f"logits{number}"] = model.logits([prompt + answer[:-1]])
    partial = Path(job["reference"]).with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, job["reference"])
    return {}


def matmul(job: dict) -> dict:
    """Multiply-add peak in GFLOPS: the best of the passes over a square matrix product."""
    size, torch = 2048, None
    if job["arm"] == "bf16 matmul":
        import torch

        torch.set_num_threads(job["threads"])
        left = right = torch.ones((size, size), dtype=torch.bfloat16)
    else:
        left = right = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    how = f"torch {torch.__version__}" if torch else f"numpy {np.__version__}"
    return {"gflops": 2 * size**3 / best / 1e9, "how": how}


def read(job: dict) -> dict:
    """Read bandwidth in GB/s where no C compiler is there: dot products of a large array, a thread a part."""
    from concurrent.futures import ThreadPoolExecutor

    parts = np.array_split(np.ones(job["mib"] << 18, np.float32), job["threads"])
    best = float("inf")
    with ThreadPoolExecutor(job["threads"]) as pool:
        for _ in range(15):
            began = time.perf_counter()
            list(pool.map(lambda part: part.dot(part), parts))
            best = min(best, time.perf_counter() - began)
    return {"gbps": (job["mib"] << 20) / best / 1e9, "how": f"numpy {np.__version__} dot"}


TASKS = {
    "speed": speed, "cold start": cold_start, "quality": quality, "reference": reference, "matmul": matmul, "read": read
}  # fmt: skip

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(TASKS[job["task"]](job)))
