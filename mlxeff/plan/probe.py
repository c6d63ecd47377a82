"""A probe of this machine's memory bandwidth and arithmetic, which takes about a second: a stand-in until it is
calibrated."""

import time

import mlx.core as mx
import numpy as np

SIZE = 1024  # rows and columns of the matrices
WORDS = 1 << 25  # float32 numbers that are read, 128 MB
TRIES = 4
ERROR = 0.5  # half-width of the error bars of predictions from a probe
# Share of the probed rates that a model's passes are taken to reach, an ESTIMATE.
REACHED = 0.7


def probe(device: str) -> tuple[float, float]:
    """(Bytes a second that are read, FLOP/s of a float32 product) on a "cpu" or "gpu", the best of some tries."""
    return (_gpu if device == "gpu" else _cpu)()


def constants() -> dict[str, dict[str, float]]:
    """The constants that stand in for fitted ones."""
    cost = 1 / REACHED
    products = dict.fromkeys(("dense", "quantised", "k-quant", "emulated", "accelerated"), cost)
    return {"prefill": products | {"attention": cost}, "decode": {"bytes": cost, "kv": cost}}


def _best(work) -> float:
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def _cpu() -> tuple[float, float]:
    words, square = np.ones(WORDS, np.float32), np.ones((SIZE, SIZE), np.float32)
    return words.nbytes / _best(lambda: np.max(words)), 2 * SIZE**3 / _best(lambda: square @ square)


def _gpu() -> tuple[float, float]:
    words, square = mx.ones(WORDS), mx.ones((SIZE, SIZE))
    mx.eval(words, square)
    return words.nbytes / _best(lambda: mx.eval(mx.max(words))), 2 * SIZE**3 / _best(lambda: mx.eval(square @ square))
