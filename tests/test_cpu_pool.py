"""The thread pool of the native kernels from outside: environment, affinity, fork, a busy neighbour, many callers."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cpu_library import BAD_ARGUMENT, LEVELS, OK, matmul

CALLS = "import sys; sys.path.insert(0, sys.argv[1]); from cpu_library import lib; "


def in_process(code, **environment):
    """What a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", CALLS + code, str(Path(__file__).parent)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return run.stdout.strip(), run.stderr


def product_is_right(repeats=20):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 256), np.float32), rng.standard_normal((512, 256), np.float32)
    want = x @ w.T
    return all(np.allclose(matmul("matmul", x, w, (64, 512), (64, 512, 256)), want, atol=1e-3) for _ in range(repeats))


def test_number_of_threads():
    count = "print(lib.mlxeff_num_threads())"
    assert in_process(count, MLXEFF_NUM_THREADS="3")[0] == "3"
    assert int(in_process(count, MLXEFF_NUM_THREADS="")[0]) <= os.cpu_count()
    if hasattr(os, "sched_setaffinity"):
        one = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "
        assert in_process(one + count, MLXEFF_NUM_THREADS="")[0] == "1"
    assert in_process("print(lib.mlxeff_set_num_threads(-1))")[0] == str(BAD_ARGUMENT)


def test_instruction_set_from_the_environment():
    for level in LEVELS:
        assert in_process("print(lib.mlxeff_isa().decode())", MLXEFF_CPU_ISA=level)[0] == level
    name, errors = in_process("print(lib.mlxeff_isa().decode())", MLXEFF_CPU_ISA="mmx")
    assert name == LEVELS[-1]
    assert errors.count("\n") == 1
    assert "mmx" in errors
    assert in_process(
        "lib.mlxeff_isa(); print(lib.mlxeff_set_isa(b'amx' if lib.mlxeff_isa() != b'amx' else b'x'))",
        MLXEFF_CPU_ISA="scalar",
    )[0] != str(OK)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use():
    assert product_is_right()
    for _ in range(3):
        child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if product_is_right() else 1))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    assert product_is_right()


def test_several_callers():
    results = []
    callers = [threading.Thread(target=lambda: results.append(product_is_right())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert results == [True] * 4


def test_busy_neighbours_do_not_stall_it():
    """With every CPU taken by another process, work takes a few times longer, not orders of magnitude."""

    def seconds():
        start = time.perf_counter()
        assert product_is_right(200)
        return time.perf_counter() - start

    seconds()
    quiet = min(seconds() for _ in range(3))
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        busy = min(seconds() for _ in range(3))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert busy < 20 * quiet + 0.5, f"{quiet:.3f} s alone, {busy:.3f} s with a neighbour on each CPU"
