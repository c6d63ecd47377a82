"""Speed of the native matmul kernels against this machine's read bandwidth and multiply-add peak.

    python benchmarks/cpu_matmul.py [--threads 1 2] [--isa NAME] [--shape 2048x2048x4 ...] [--json FILE]

Weights are cold: successive calls cycle through matrices of more than 256 MB in total. GB/s counts the packed words,
scales and biases. Times are medians; the machine should be otherwise idle. The ceilings are measured in the same run
with numpy's single-threaded BLAS in each of the given number of Python threads: for one row, the read bandwidth of
sdot(a, a) over 256 MB per thread; for many rows, the rate of a 1024 x 1024 x 1024 sgemm.
"""

import argparse
import ctypes
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read by numpy when it is imported
import numpy as np

import saving
from places import TESTS

sys.path.insert(0, str(TESTS))
from cpu_library import COMPUTE_BF16, COMPUTE_INT8, EXACT, F16, F32, OK, QuantizedWeight, address, lib, set_threads
from kernel_timing import add_isa, median_time, use_isa

SHAPES = ("1536x576x4", "576x1536x4", "2048x2048x4", "8192x2048x4", "49152x576x8")
MODES = {"exact": EXACT, "int8": COMPUTE_INT8, "bf16": COMPUTE_BF16}


class ColdWeights:
    """Copies of one random quantised matrix, larger than the CPU caches together; `call(i, x, y, mode)` multiplies by
    copy i.
    """

    def __init__(self, n, k, bits, group=32, total=256 << 20):
        self.bytes = n * k * bits // 8 + 2 * 2 * n * k // group
        count = max(2, -(-total // self.bytes))
        rng = np.random.default_rng(0)
        one = rng.integers(0, 1 << 32, (n, k * bits // 32), np.uint32)
        self.arrays = [
            (one + np.uint32(i), *(rng.uniform(0.01, 0.02, (2, n, k // group)).astype(np.float16)))
            for i in range(count)
        ]
        self.weights = [
            QuantizedWeight(*(address(a) for a in arrays), n, k, k, bits, group, F16) for arrays in self.arrays
        ]

    def __call__(self, i, x, y, mode):
        (m, k), n = x.shape, y.shape[1]
        weight = self.weights[i % len(self.weights)]
        assert lib.mlxeff_qmm(ctypes.byref(weight), address(x), k, F32, address(y), n, F32, m, mode, 0) == OK


def on_each_thread(threads, work):
    """Run work(i) at the same time for i = 0, 1, ..., one thread each, and return the median seconds."""
    with ThreadPoolExecutor(threads) as pool:
        return median_time(lambda _: list(pool.map(work, range(threads))))


def read_bandwidth(threads):
    """Read bandwidth in GB/s of `threads` threads together."""
    arrays = [np.ones(64 << 20, np.float32) for _ in range(threads)]
    return sum(a.nbytes for a in arrays) / on_each_thread(threads, lambda i: np.dot(arrays[i], arrays[i])) / 1e9


def sgemm_rate(threads):
    """Rate of float32 matrix products in GFLOPS of `threads` threads together."""
    a, outs = np.ones((1024, 1024), np.float32), [np.empty((1024, 1024), np.float32) for _ in range(threads)]
    return threads * 2 * 1024**3 / on_each_thread(threads, lambda i: np.matmul(a, a, out=outs[i])) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    add_isa(parser)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="NxKxbits")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 512])
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    isa = use_isa(options.isa)
    ceilings = {t: (read_bandwidth(t), sgemm_rate(t)) for t in options.threads}
    card = {
        "host": platform.node(),
        "isa": isa,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    for t, (bandwidth, peak) in ceilings.items():
        print(f"{t} thread(s): read {bandwidth:.1f} GB/s, sgemm {peak:.0f} GFLOPS ({isa})")
        card[f"ceiling_{t}"] = {"gb_per_s": bandwidth, "gflops": peak}
    print(
        f"{'N x K x bits':>14} {'M':>4} {'mode':>6} {'thr':>3} {'us':>9} {'GB/s':>6} "
        f"{'of read':>7} {'GFLOPS':>7} {'of sgemm':>8}"
    )
    rows = []
    for shape in options.shape:
        n, k, bits = map(int, shape.split("x"))
        weights = ColdWeights(n, k, bits)
        for m in options.rows:
            if m * n > 1 << 24:
                continue
            x, y = np.random.default_rng(1).standard_normal((m, k), np.float32), np.empty((m, n), np.float32)
            for mode in options.modes:
                for threads in options.threads:
                    set_threads(threads)
                    seconds = median_time(lambda i: weights(i, x, y, MODES[mode]))  # noqa: B023
                    rate, flops = weights.bytes / seconds / 1e9, 2 * m * n * k / seconds / 1e9
                    bandwidth, peak = ceilings[threads]
                    rows.append({"shape": shape, "M": m, "mode": mode, "threads": threads, "seconds": seconds})
                    print(f"{shape:>14} {m:4} {mode:>6} {threads:3} {seconds * 1e6:9.1f} {rate:6.1f} "
                          f"{rate / bandwidth:7.0%} "
                          f"{flops:7.0f} {flops / peak:8.0%}", flush=True)  # fmt: skip
    if options.json:
        saving.write_json({**card, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
