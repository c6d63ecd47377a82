"""Other engines as arms, where they are installed: mlx-lm in a process of its own, and llama.cpp through llama-bench.

llama.cpp takes its own random tokens, and leaves out the choice of a token; mlx-lm gets ours.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ..errors import MlxeffError
from .points import PROMPT, Point

LLAMA_BENCH = "llama-bench"
LIMIT = 3600.0  # seconds that a pass may take


class Peer:
    """An arm of another engine, see `arms.Arm`. Its weights are not in this process."""

    engine = ""
    modules = ()

    def __init__(self, path: Path, vocabulary: int, device: str, threads: int):
        self.path, self.vocabulary, self.device, self.threads = path, vocabulary, device, threads
        self.name, self.version = f"{self.engine} {path.name}", ""
        self.pair = None

    def prepare(self) -> None:
        """Nothing: the other process has the weights."""

    def working_bytes(self, *_: int) -> int:
        """0: the memory of the other process is not this one's."""
        return 0

    def describe(self) -> dict:
        """The engine and its version."""
        return {"engine": self.engine, "engine_version": self.version, "model": str(self.path)}

    def close(self) -> None:
        """End the other process."""


class MlxLm(Peer):
    """mlx-lm, in a process that lives as long as the arm."""

    engine = "mlx-lm"

    def __init__(self, path: Path, vocabulary: int, device: str, threads: int):
        super().__init__(path, vocabulary, device, threads)
        if importlib.util.find_spec("mlx_lm") is None:
            raise MlxeffError("mlx-lm is not installed (pip install mlx-lm)")
        if not path.is_dir():
            raise MlxeffError(
                f"mlx-lm loads folders, not {path.name}: `mlxeff convert` makes one: --peer mlx-lm=FOLDER"
            )
        command = [sys.executable, "-m", "mlxeff.bench.peer_worker", device, str(path)]
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.words, env=variables, text=True)
        self.version = self._answer()["version"]

    def measure(self, point: Point, ids: np.ndarray, _step_size: int, steps: int) -> dict:
        """One pass, with the values of `passes.measure`."""
        if point.batch > 1:
            raise MlxeffError("one prompt at a time is measured")
        prompt = point.kind == PROMPT
        job = {"ids": ids[0].tolist(), "depth": point.depth if prompt else 0}
        job["tokens"] = 1 + steps if prompt else point.tokens
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the process has ended, which the answer says
        found = self._answer()
        if (got := len(found["times"])) != job["tokens"]:
            raise MlxeffError(f"wanted {job['tokens']} tokens, got {got}")
        return {"values": self.values(point, found["times"]) | {"peak_bytes": found["peak_bytes"]}}

    @staticmethod
    def values(point: Point, times: list[float]) -> dict[str, float]:
        """The values of a pass whose tokens came at `times`, in seconds from the beginning of the prompt."""
        prompt, values = point.kind == PROMPT, {}
        if prompt:
            values |= {"ttft_s": times[0], "prompt_tps": point.tokens / times[0]}
        if len(times) > 1:
            values["decode_tps"] = (len(times) - 1) / (times[-1] - times[0])
        if point.depth and not prompt:
            values["ttft_s"] = times[0]
        return values

    def _answer(self) -> dict:
        """The next line of the process. Raises MlxeffError with its last words where it has ended or failed."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.words.seek(0)
            words = self.words.read().strip().splitlines()
            raise MlxeffError(words[-1] if words else f"ended with {code}")
        found = json.loads(line)
        if "error" in found:
            raise MlxeffError(found["error"])
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
        self.words.close()


class LlamaCpp(Peer):
    """llama.cpp: each pass is a call of llama-bench, which has a warm-up of its own."""

    engine = "llama.cpp"

    def __init__(self, path: Path, vocabulary: int, device: str, threads: int):
        super().__init__(path, vocabulary, device, threads)
        if shutil.which(LLAMA_BENCH) is None:
            raise MlxeffError(f"{LLAMA_BENCH} is not installed or not on the PATH (brew install llama.cpp)")
        if path.suffix != ".gguf":
            raise MlxeffError(f"llama.cpp loads .gguf files, not {path.name}: --peer llama.cpp=FILE.gguf")

    def measure(self, point: Point, _ids: np.ndarray, _step_size: int, _steps: int) -> dict:
        """One pass, with the values of `passes.measure`."""
        if point.batch > 1:
            raise MlxeffError("one prompt at a time is measured")
        counts = (point.tokens, 0) if point.kind == PROMPT else (0, point.tokens)
        asked = {"-m": self.path, "-p": counts[0], "-n": counts[1], "-d": point.depth, "-r": 1, "-t": self.threads}
        asked |= {"-ngl": 999 if self.device == "gpu" else 0, "-o": "json"}
        command = [LLAMA_BENCH, *(str(word) for pair in asked.items() for word in pair)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT)
        except subprocess.CalledProcessError as error:
            words = (error.stderr or "").strip().splitlines()
            raise MlxeffError(words[-1] if words else f"{LLAMA_BENCH} ended with {error.returncode}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MlxeffError(f"{LLAMA_BENCH}: {error}") from None
        try:
            [found] = json.loads(run.stdout)
            seconds, rate = found["samples_ns"][0] / 1e9, found["samples_ts"][0]
            self.version = f"{found['build_commit']} ({found['build_number']})"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise MlxeffError(
                f"{LLAMA_BENCH}: wanted its JSON of one test, got {type(error).__name__} {error}"
            ) from None
        return {"values": {"ttft_s": seconds, "prompt_tps": rate} if counts[0] else {"decode_tps": rate}}


PEERS = {peer.engine: peer for peer in (MlxLm, LlamaCpp)}
