"""Run each job of `table` in a process and return its sample, a dictionary of the measured values; store the samples.

The processes see no OpenBLAS override of the caller's, and one number of threads.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mlxeff.bench import samples
from places import HERE, ROOT

from .checkpoints import Files
from .install import Peer
from .table import ARMS, EXACT, GENERATED, Job, arm

READ_MIB, READ_PASSES = 512, 15  # far beyond a core's caches, and beyond the last-level cache of most machines
COLD_STARTS = 5  # a round
OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
COLD_PROMPT = "Explain in two sentences why the sky is blue by day and why it turns red when the sun goes down."


@dataclass(frozen=True)
class Engine:
    """What a worker runs: an engine with its options on one form of a model, and the interpreter that has it."""

    name: str  # of `engines.ENGINES`
    path: Path
    options: dict
    python: str = sys.executable

    def task(self, kind: str, threads: int, depth: int) -> dict:
        """The task for the worker; `kind` is a key of `worker.TASKS`."""
        task = {"task": kind, "engine": self.name, "path": str(self.path), "options": self.options}
        return task | {"threads": threads, "depth": depth, "generate": GENERATED}


class Measurer:
    """Runs jobs. `limit` is the number of seconds that a process may take."""

    def __init__(self, folder: Path, files: dict[str, Files], peers: dict[str, Peer], limit: float):
        self.folder, self.files, self.peers, self.limit = folder, files, peers, limit
        self.bandwidth = compile_bandwidth(folder)
        self.reference: Path | None = None  # set by who wants the kind "quality"
        self.cold_ids: list[int] = []  # of COLD_PROMPT

    def sample(self, job: Job) -> dict:
        """The measured values; or `exceeded_s`, the limit that was exceeded; or `error`, one line."""
        busy = os.getloadavg()[0]
        try:
            found = {"ceiling": self._ceiling, "cold start": self._cold_start}.get(job.kind, self._worker)(job)
        except subprocess.TimeoutExpired:
            found = {"exceeded_s": self.limit}
        except subprocess.CalledProcessError as error:
            found = {"error": reason(error)}
        return asdict(job) | found | {"load_average": busy}

    def absent(self, job: Job) -> str | None:
        """The peer that this job needs, if it is not installed or does not support the job."""
        name = needed(job)
        peer = self.peers.get(name) if name else None
        return name if peer and (not peer.present or (job.kind == "quality" and peer.engine == "xllamacpp")) else None

    def run_task(self, task: dict, python: str = sys.executable) -> dict:
        """Run a worker on `task` and return its answer."""
        return json.loads(last_line(worker_command(task, python), environment(task["threads"]), self.limit))

    def _task(self, job: Job) -> tuple[dict, str]:
        """The task of a job for its worker, and the interpreter that runs it."""
        chosen = arm(job.arm)
        peer = self.peers.get(chosen.peer) if chosen.peer else None
        path, python = getattr(self.files[job.model], chosen.files), peer.python if peer else sys.executable
        engine = Engine(peer.engine if peer else chosen.engine, path, chosen.options, python)
        more = {"reference": str(self.reference), "ids": self.cold_ids}
        return engine.task(job.kind, job.threads, job.depth) | more, engine.python

    def _worker(self, job: Job) -> dict:
        return self.run_task(*self._task(job))

    def _ceiling(self, job: Job) -> dict:
        if job.arm == "memory read":
            if self.bandwidth is None:
                return self.run_task({"task": "read", "threads": job.threads, "mib": READ_MIB})
            command = [self.bandwidth, str(READ_MIB), str(job.threads), str(READ_PASSES)]
            return {"gbps": float(last_line(command, environment(job.threads), self.limit)), "how": "C"}
        python = self.peers["torch"].python if job.arm == "bf16 matmul" else sys.executable
        return self.run_task({"task": "matmul", "arm": job.arm, "threads": job.threads}, python)

    def _cold_start(self, job: Job) -> dict:
        if job.arm == EXACT:
            command = [sys.executable, "-m", "mlxeff", "generate", "--device", "cpu", "--raw", "--quiet"]
            command += ["--max-tokens", "4", "--model", str(self.files[job.model].gguf), COLD_PROMPT]
        else:
            command = worker_command(*self._task(job))
        return {"first_token_s": [first_byte(command, job.threads, self.limit) for _ in range(COLD_STARTS)]}


def last_line(command: list, variables: dict, limit: float | None) -> str:
    """The last line that a process prints; errors of `subprocess` if it fails or takes longer than `limit` seconds."""
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit, env=variables, cwd=ROOT)
    return run.stdout.splitlines()[-1]


def reason(error: subprocess.CalledProcessError) -> str:
    """The reason of a failure as one line: the last output of the process, or how it ended."""
    lines = (error.stderr or "").strip().splitlines()
    return lines[-1] if lines else f"ended with {error.returncode}"


def worker_command(task: dict, python: str) -> list[str]:
    return [python, "-m", "peers.worker", json.dumps(task)]


def environment(threads: int) -> dict:
    """The caller's without OVERRIDES, with `threads` for every library and the modules of this folder."""
    count = str(threads)
    counts = dict.fromkeys(
        ("MLXEFF_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
        count,
    )
    kept = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    return kept | counts | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}


def first_byte(command: list[str], threads: int, limit: float) -> float:
    """Seconds from starting a process to the first byte of its output."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(threads), cwd=ROOT
    ) as process:
        got = process.stdout.read(1)
        seconds = time.perf_counter() - began
        _, errors = process.communicate(timeout=limit)
    if not got or process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors.decode(errors="replace"))
    return seconds


def compile_bandwidth(folder: Path) -> str | None:
    """The program of bandwidth.c, or None where there is no working C compiler: numpy reads then."""
    compiler = os.environ.get("CC", "cc")
    source, program = Path(__file__).with_name("bandwidth.c"), folder / "bandwidth"
    command = [compiler, "-O3", "-march=native", "-pthread", source, "-o", program]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"memory read: no C compiler ({error}): measured with numpy's dot product", file=sys.stderr)
        return None
    return str(program)


class Samples(samples.Samples):
    """The samples of all jobs, in a file; without `resume` it is begun anew, and the old one kept beside it.

    On resuming, what failed and what a lower time limit ended are measured again.
    """

    def __init__(self, path: Path, identity: dict, resume: bool, limit: float):
        def holds(sample: dict) -> bool:
            return "error" not in sample and sample.get("exceeded_s", limit) >= limit

        if path.exists() and not resume:
            path.rename(path.with_suffix(".previous.jsonl"))
        keys = [field.name for field in fields(Job)]
        super().__init__(path, identity, keys, holds, "leave out --resume to begin anew")

    def models(self) -> list[str]:
        """The models that were measured."""
        return sorted({sample["model"] for sample in self.all} - {""})

    def hopeless(self, job: Job) -> bool:
        """Whether this arm exceeded the limit at this depth or a lesser one."""
        return any(self.key(s)[:4] == job.key[:4] and s["depth"] <= job.depth for s in self.all if "exceeded_s" in s)


def needed(job: Job) -> str | None:
    """The peer, of `install.PEERS`, that a job runs on."""
    if job.arm == "bf16 matmul":
        return "torch"
    return next((each.peer for each in ARMS if each.name == job.arm), None)
