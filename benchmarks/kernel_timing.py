"""Helpers of the microbenchmarks of single native kernels: the C functions, which the tests call too, the choice of the
instruction-set level, and the timing of a call.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from places import TESTS

sys.path.insert(0, str(TESTS))
from cpu_library import LEVELS, lib, set_isa


def add_isa(parser: argparse.ArgumentParser) -> None:
    """Add the option `--isa` to the parser."""
    parser.add_argument("--isa", choices=LEVELS, help="instruction-set level (default: the best)")


def use_isa(name: str | None) -> str:
    """Select the instruction-set level `name` if it is given; return the level in use."""
    if name:
        set_isa(name)
    return lib.mlxeff_isa().decode()


def median_time(
    call: Callable[[int], object], seconds: float = 0.3, least: int = 7, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds, measured by `clock`, of call(1), call(2), … after an untimed call(0). Makes as many calls as fit
    into `seconds`, and at least `least`.
    """
    call(0)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < stop:
        start = clock()
        call(len(times) + 1)
        times.append(clock() - start)
    return statistics.median(times)
