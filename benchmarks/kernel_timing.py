"""What the microbenchmarks of single native kernels share: the C functions, which the tests call too, the instruction
set, and the time of a call."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from places import TESTS

sys.path.insert(0, str(TESTS))
from cpu_library import LEVELS, lib, set_isa


def add_isa(parser: argparse.ArgumentParser) -> None:
    """The option `--isa`."""
    parser.add_argument("--isa", choices=LEVELS, help="instruction-set level (default: the best)")


def use_isa(name: str | None) -> str:
    """Compute with the level that `--isa` names, if any; returns the level that computes."""
    if name:
        set_isa(name)
    return lib.mlxeff_isa().decode()


def median_time(
    call: Callable[[int], object], seconds: float = 0.3, least: int = 7, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds, by `clock`, of call(1), call(2), … after an uncounted call(0): as many as `seconds` have room
    for, at least `least`."""
    call(0)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < stop:
        start = clock()
        call(len(times) + 1)
        times.append(clock() - start)
    return statistics.median(times)
