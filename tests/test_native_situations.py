"""The command with the native kernels where the machine or the installation is not as it should be: right words, and
one clear line where the kernels cannot be used. Right are the words of plain MLX on the same tiny model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxeff import kernels
from tiny_model import quantise_folder, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
native, reason = kernels.native()
pytestmark = pytest.mark.skipif(native is None or kernels.device() != "cpu", reason=reason or "the device is a GPU")
LEVELS = native.isa_available().split() if native else []
MAIN = "import sys; from mlxeff.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return quantise_folder(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def start(folder, before="", code=MAIN, **environment):
    """`mlxeff generate` in a process that first runs `before`."""
    arguments = ["generate", "--model", str(folder), "Hello", "--max-tokens", "24", "--temp", "0", "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", before + code, *arguments],
        cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    """(the text, the backend, the notices)."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(out)
    return result["text"], result["timings"]["backend"], result["notices"]


@pytest.fixture(scope="module")
def words(folder):
    text, backend, _ = finish(start(folder, MLXEFF_NATIVE="0"))
    assert backend == "mlx"
    assert text
    return text


@pytest.mark.parametrize("level", LEVELS)
def test_older_cpu(folder, words, level):
    assert finish(start(folder, MLXEFF_CPU_ISA=level)) == (words, f"native {level}", [])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_one_core(folder, words):
    one = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    assert finish(start(folder, one)) == (words, f"native {native.isa()}", [])
    assert finish(start(folder, one, MLXEFF_NUM_THREADS="4")) == (words, f"native {native.isa()}", [])


def test_more_threads_than_cores(folder, words):
    threads = str(3 * os.cpu_count() + 1)
    assert finish(start(folder, MLXEFF_NUM_THREADS=threads)) == (words, f"native {native.isa()}", [])


def test_busy_neighbours(folder, words):
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        assert finish(start(folder)) == (words, f"native {native.isa()}", [])
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_two_processes_at_once(folder, words):
    both = [start(folder), start(folder)]
    assert [finish(process) for process in both] == [(words, f"native {native.isa()}", [])] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_import(folder, words):
    code = """if True:
        import os, sys
        import mlx.core, mlxeff.kernels
        from mlxeff.cli import main
        assert mlxeff.kernels.native()[0]
        child = os.fork()
        if child == 0:
            sys.exit(main())
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert finish(start(folder, code=code)) == (words, f"native {native.isa()}", [])


def one_notice(process, words):
    text, backend, notices = finish(process)
    assert (text, backend) == (words, "mlx")
    assert len(notices) == 1, notices
    return notices[0]


ANOTHER_VERSION = "import mlx.core as mx; mx.__version__ = '0.0.1'\n"
MISSING_SYMBOL = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mlxeff._native":
            raise ImportError("undefined symbol: xyz", name="libmlx")
sys.meta_path.insert(0, Broken())
"""
ANOTHER_NANOBIND = """
import sys, types
import mlx.core as mx, mlxeff
def accepts(array):
    raise TypeError("incompatible function arguments")
mlxeff._native = sys.modules["mlxeff._native"] = types.ModuleType("mlxeff._native")
mlxeff._native.mlx_version, mlxeff._native.accepts = mx.__version__, accepts
"""


def test_another_version_of_mlx(folder, words):
    notice = one_notice(start(folder, ANOTHER_VERSION), words)
    assert f"built for MLX {mx.__version__}, not for 0.0.1: install mlxeff again" in notice


def test_an_extension_that_does_not_load(folder, words):
    """What the import of a library with a missing symbol raises."""
    assert "undefined symbol: xyz" in one_notice(start(folder, MISSING_SYMBOL), words)


def test_a_nanobind_of_another_abi(folder, words):
    """Functions of such an extension do not know MLX's array type: nanobind raises TypeError at each call with one."""
    notice = one_notice(start(folder, ANOTHER_NANOBIND), words)
    assert "built with a nanobind that does not match MLX's" in notice
