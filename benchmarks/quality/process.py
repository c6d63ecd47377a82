"""Run a worker in a process of its own with low priority and a limit of CPU time; wall time is unreliable, since the
machine may be shared. The folder that the worker writes is renamed when it is complete.
"""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlxeff.errors import MlxeffError
from places import HERE, ROOT

NICE = 10
NOTE = "made.json"


def make(place: Path, module: str, task: dict, limit: float, python: str = sys.executable) -> dict:
    """Make the folder `place` with `python -m module`, which reads the task and its `destination`; return the worker's
    answer.

    Does nothing if the folder exists, and waits if another process is making it. Raises MlxeffError if the worker fails
    or uses too many CPU seconds.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.parent / f".{place.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            fill(place, module, task, limit, python)
    return json.loads((place / NOTE).read_text())


def fill(place: Path, module: str, task: dict, limit: float, python: str) -> None:
    partial = place.with_name(f"partial-{place.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    began = time.monotonic()
    note = run(module, task | {"destination": str(partial)}, limit, python)
    note |= {"cpu_s": round(note["cpu_s"]), "clock_s": round(time.monotonic() - began)}
    (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n")
    partial.rename(place)


def run(module: str, task: dict, limit: float, python: str) -> dict:
    """The last line that the worker prints, with the CPU seconds that it took as `cpu_s`."""
    paths = [str(HERE)] + ([os.environ.get("PYTHONPATH", "")] if python == sys.executable else [])
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def prepare():
        os.nice(max(0, NICE - os.nice(0)))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))

    command, pipe = [python, "-m", module], {"input": json.dumps(task), "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run(command, **pipe, cwd=ROOT, env=variables, preexec_fn=prepare, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise MlxeffError(f"{module}: beyond {limit:g} CPU seconds")
    if done.returncode:
        raise MlxeffError(f"{module}: ended with {done.returncode}: its last lines say why")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]) | {"cpu_s": spent}
