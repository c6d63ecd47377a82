"""Compare mlxeff with llama.cpp, mlx-lm and PyTorch on this CPU: speed, memory, correctness, and the machine's
ceilings.

    python benchmarks/cpu_peers.py [--only KEY=VALUE ...] [--rounds 3] [--resume] [--save]

One command regenerates the whole comparison: the peers come from PyPI into a folder of their own, llama.cpp is compiled
there; each measurement is a process; the arms take turns, round by round, and medians are shown. Every sample is kept
as it is made, so a run that was broken off goes on with --resume, and --only measures a part. The last line is one JSON
document with every sample; --save writes it to benchmarks/results/.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median

import saving
from mlxeff.bench.machine import cores
from mlxeff.bench.selection import condition, selected
from mlxeff.checkpoint import open_source
from mlxeff.errors import MlxeffError
from mlxeff.generation import prompt_ids
from mlxeff.tokenizer import from_gguf
from peers import checkpoints
from peers.card import card, current_commit, identity, versions
from peers.install import PEERS, Peer, install, recorded
from peers.measure import COLD_PROMPT, Measurer, Samples, environment, last_line, needed, reason, worker_command
from peers.report import SECTION, Results, report, section
from peers.table import FOUR, GENERATED, Job, jobs
from places import work_folder

FILTERS = tuple(field.name for field in fields(Job))
QUALITY_PROMPTS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List three uses of a paperclip.",
    "Translate into German: the house is on the hill.",
    "What is 17 times 23? Show your steps.",
    "def fibonacci(n):",
    "Summarise the plot of Romeo and Juliet in one paragraph.",
]


def main() -> int:
    options = parse()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.report is not None:
        kept = saving.read_json(Path(options.report or result_path(identity())))["samples"]
        costs = checkpoints.all_costs({s["model"] for s in kept if s["model"]}, options.cache)
        saving.write_section(SECTION, section(Results(kept, costs)))
        return 0
    chosen = [job for job in jobs(options.rounds, options.threads) if selected(asdict(job), options.only)]
    if not chosen:
        raise MlxeffError(f"--only {' '.join(options.only)}: no measurement is left")
    with locked(options.cache):
        results, costs = measure(options, chosen)
    print(report(Results(results["samples"], costs), results["card"]))
    if options.save:
        saving.write_json(results, result_path(results["card"]))
    print(json.dumps(results))
    return int(any("error" in sample for sample in results["samples"]))


def measure(options: argparse.Namespace, chosen: list[Job]) -> tuple[dict, dict]:
    """Return the results document: the card, all samples, and the cost of a token for each model in them."""
    folder = options.cache
    samples = Samples(folder / "samples.jsonl", identity(), options.resume, options.limit)
    peers = {name: install(name, folder) for name in PEERS if any(needed(job) == name for job in chosen)}
    models = {job.model for job in chosen if job.model} | (
        {FOUR} if {"quality", "cold start"} & kinds(chosen) else set()
    )
    files = {name: checkpoints.make(name, folder) for name in sorted(models)}
    measurer = Measurer(folder, files, peers, options.limit)
    prepare(measurer, chosen, folder)
    run(chosen, measurer, samples)
    others = {name: recorded(name, folder) or Peer(name, "", "", "not asked for") for name in PEERS}
    costs = checkpoints.all_costs(samples.models(), folder)
    return {"card": card(others | peers, samples.all, options.limit), "samples": samples.all}, costs


def kinds(chosen: list[Job]) -> set[str]:
    return {job.kind for job in chosen}


def run(chosen: list[Job], measurer: Measurer, samples: Samples) -> None:
    """Measure everything that is not in `samples` yet, and report each measurement as a line on standard error."""
    done, commit = samples.done(), current_commit()
    left = [job for job in chosen if job.key not in done]
    for number, job in enumerate(left, 1):
        if (peer := measurer.absent(job)) is not None:
            what = f"left out, {peer} is not there"
        elif samples.hopeless(job):
            what = "left out, beyond the time limit at this depth or a lesser one"
        else:
            sample = measurer.sample(job) | {"commit": commit}
            samples.add(sample)
            what = summary(sample)
        print(f"[{number}/{len(left)}] {job}: {what}", file=sys.stderr, flush=True)


def summary(sample: dict) -> str:
    """The numbers of a sample as a short text."""
    names = (
        "gbps",
        "gflops",
        "first_token_s",
        "ttft_s",
        "decode_tps",
        "load_s",
        "rss_mib",
        "equal",
        "error",
        "exceeded_s",
    )
    shown = {name: sample[name] for name in names if name in sample}

    def short(value):
        value = median(value) if isinstance(value, (list, tuple)) else value
        return value if isinstance(value, str) else f"{value:.4g}"

    return ", ".join(f"{name} {short(value)}" for name, value in shown.items())


def prepare(measurer: Measurer, chosen: list[Job], folder: Path) -> None:
    """Write the token ids of the cold start and the reference of the correctness check, if `chosen` needs them."""
    if not kinds(chosen) & {"quality", "cold start"}:
        return
    gguf = measurer.files[FOUR].gguf
    tokenizer = from_gguf(open_source(gguf).metadata, str(gguf))
    measurer.cold_ids = prompt_ids(tokenizer, COLD_PROMPT)
    if "quality" not in kinds(chosen):
        return
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in QUALITY_PROMPTS]
    digest = hashlib.sha256(json.dumps([prompts, GENERATED, versions()]).encode()).hexdigest()[:12]
    measurer.reference = folder / f"reference-{digest}.npz"
    if not measurer.reference.exists():
        write_reference(measurer, prompts)


def write_reference(measurer: Measurer, prompts: list[list[int]]) -> None:
    """Write the reference tokens and logits for measurements of the kind "quality"."""
    print("computing the reference of correctness, some minutes", file=sys.stderr, flush=True)
    files = measurer.files[FOUR]
    task = {"task": "reference", "threads": cores(), "prompts": prompts, "generate": GENERATED}
    task |= {"path": str(files.mlx), "own": str(files.gguf), "reference": str(measurer.reference)}
    try:
        last_line(worker_command(task, sys.executable), environment(cores()) | {"MLXEFF_NATIVE": "0"}, limit=None)
    except subprocess.CalledProcessError as error:
        raise MlxeffError(f"reference of correctness: {reason(error)}") from error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores()}), help="default: %(default)s")
    parser.add_argument(
        "--only",
        nargs="+",
        type=condition(FILTERS),
        default=[],
        metavar="KEY=VALUE",
        help=f"measure a part: {', '.join(FILTERS)}; names by a part of them, one key several times: any of its values",
    )
    parser.add_argument("--resume", action="store_true", help="keep the samples of a run broken off, measure the rest")
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="a process; default %(default)g")
    parser.add_argument("--cache", type=Path, default=work_folder("peers"), help="default %(default)s")
    parser.add_argument("--save", action="store_true", help="write the samples to benchmarks/results/")
    saving.add_report(parser)
    options = parser.parse_args()
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds, --threads: wanted numbers above 0")
    return options


@contextlib.contextmanager
def locked(folder: Path):
    """Hold a lock on the folder, so that only one run uses it at a time."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MlxeffError(f"{folder}: another run of cpu_peers is using it") from None
        yield


def result_path(machine: dict) -> Path:
    return saving.result_path(machine["cpu"], f"cpu-peers-mlx-{machine['mlx']}.json")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a normal exit also ends the measured process
    try:
        sys.exit(main())
    except MlxeffError as error:
        sys.exit(f"cpu_peers: {error}")
