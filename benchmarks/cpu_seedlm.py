"""Speed of SeedLM on this CPU: its matrix products compared with the 4-bit affine products of mlxeff and MLX, its
encoder, and the whole built-in model compared with other engines (`cpu_seedlm_models.py`).

    python benchmarks/cpu_seedlm.py [--threads 1 2] [--isa NAME] [--shape 576x576 ...] [--no-models] [--save]

Gw/s means billions of matrix weights per second, for one call with M rows of x. The arms take turns, round by round;
each number is the median over the rounds. Weights are cold: successive calls cycle through matrices of more than 64 MB
in total. MLX's product always runs on one thread. The encoder is timed on Gaussian weights, in millions of weights per
second.

A product with one row has two ceilings, in Gw/s: the memory ceiling is the read bandwidth of an fp32 dot product
divided by the bytes per weight; the instruction ceiling is the number of multiply-add instructions per second of an
fp32 matrix product divided by the vector instructions per weight. The vector instructions are counted in the inner
loops of the object code (g++ 12), for AVX-512 only.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read by numpy when it is imported
import mlx.core as mx
import numpy as np

import cpu_seedlm_models
import saving
from cpu_matmul import ColdWeights, read_bandwidth, sgemm_rate
from places import TESTS

sys.path.insert(0, str(TESTS))
from cpu_library import COMPUTE_INT8, EXACT, F32, OK, address, lib, set_threads
from kernel_timing import add_isa, median_time, use_isa
from mlxeff.bench import machine
from mlxeff.seedlm.format import FORMATS
from seedlm_calls import Seeded, SeedWeight, encode

SHAPES = ("576x576", "1536x576", "576x1536", "2048x2048")
COLD_BYTES = 64 << 20
MODES = {"exact": EXACT, "int8": COMPUTE_INT8}
AFFINE, MLX = "affine 4 g64", "mlx 4 g64"
LANES = 16  # fp32 lanes of a vector, of AVX-512
# Vector instructions without moves for one vector of 16 blocks or packed words, and the number of weights in it.
INSTRUCTIONS = {
    ("seedlm 4", "exact"): (79, 128),
    ("seedlm 4.5", "exact"): (107, 128),
    ("seedlm 3", "exact"): (152, 192),
    ("seedlm 4", "int8"): (37, 128),
    ("seedlm 4.5", "int8"): (50, 128),
    ("seedlm 3", "int8"): (64, 192),
    (AFFINE, "exact"): (26, 128),
}


class ColdSeeds:
    """Copies of one random encoded matrix; `call(i, x, y, mode)` multiplies by copy i."""

    def __init__(self, name, n, k):
        weight = Seeded.random(name, np.random.default_rng(0), n, k)
        arrays = [a for key, a in weight.arrays.items() if key != "exponent_bias"]
        copies = max(2, -(-COLD_BYTES // sum(a.nbytes for a in arrays)))
        self.held = [[a.copy() for a in arrays] for _ in range(copies)]
        self.weights = []
        for copied in self.held:
            c = SeedWeight.from_buffer_copy(weight.c)
            for field, array in zip(("seeds", "coefficients", "exponents"), copied):
                setattr(c, field, address(array))
            self.weights.append(c)

    def __call__(self, i, x, y, mode):
        (m, k), n = x.shape, y.shape[1]
        weight = self.weights[i % len(self.weights)]
        assert lib.mlxeff_seedlm_matmul(ctypes.byref(weight), address(x), k, F32, address(y), n, F32, m, mode, 0) == OK


class ColdMlx:
    """Cold weights for mx.quantized_matmul on the CPU, with float32 scales (MLX's fast case on a CPU)."""

    def __init__(self, n, k):
        mx.set_default_device(mx.cpu)
        copies = max(2, -(-COLD_BYTES // (n * k * 5 // 8)))
        self.held = [mx.quantize(mx.random.normal((n, k)), group_size=64, bits=4) for _ in range(copies)]
        mx.eval(self.held)

    def __call__(self, i, x, _y, _mode):
        mx.eval(mx.quantized_matmul(mx.array(x), *self.held[i % len(self.held)], group_size=64, bits=4))


def products(options, ceilings):
    """Measure the products: one result row for each shape, M, number of threads, kernel and mode."""
    rows = []
    for shape in options.shape:
        n, k = map(int, shape.split("x"))
        kernels = {f"seedlm {name}": ColdSeeds(name, n, k) for name in FORMATS}
        kernels |= {AFFINE: ColdWeights(n, k, 4, 64, COLD_BYTES), MLX: ColdMlx(n, k)}
        for m in options.rows:
            x, y = np.random.default_rng(1).standard_normal((m, k), np.float32), np.empty((m, n), np.float32)
            for threads in options.threads:
                set_threads(threads)
                arms = {(kernel, mode): call for kernel, call in kernels.items() for mode in MODES}
                arms = {key: call for key, call in arms.items() if key[0] != MLX or (key[1], threads) == ("exact", 1)}
                seconds = interleaved(arms, x, y, options)
                for (kernel, mode), samples in seconds.items():
                    row = {"shape": shape, "kernel": kernel, "mode": mode, "M": m, "threads": threads}
                    rows.append(row | {"seconds": samples} | (ceilings(kernel, mode, threads) if m == 1 else {}))
                    print(line(rows[-1], n * k), flush=True)
    return rows


def interleaved(arms, x, y, options):
    """Time the arms in turn, one call of each per round: arm → median seconds of a call."""
    found = {key: [] for key in arms}
    for _ in range(options.rounds):
        for key, call in arms.items():
            mode = MODES[key[1]]
            found[key].append(median_time(lambda i: call(i, x, y, mode), options.seconds))  # noqa: B023
    return found


def line(row, weights):
    """A row of the table."""
    seconds = median(row["seconds"])
    keys = ("gw_per_s_by_bytes", "gw_per_s_by_instructions")
    shares = [f"{row[key]:8.2f}" if key in row else " " * 8 for key in keys]
    left = f"{row['shape']:>10} {row['kernel']:>12} {row['mode']:>5} {row['M']:4} {row['threads']:3}"
    return f"{left} {seconds * 1e6:9.1f} {weights / seconds / 1e9:7.2f} {' '.join(shares)}"


def ceilings_of(bandwidth, multiply_adds):
    """(kernel, mode, threads) → ceilings in Gw/s, given GB/s and GFLOPS by threads."""
    bits = {f"seedlm {name}": fmt.bits for name, fmt in FORMATS.items()} | {AFFINE: 4.5, MLX: 5}

    def ceilings(kernel, mode, threads):
        found = {"gw_per_s_by_bytes": bandwidth[threads] / bits[kernel] * 8}
        if lib.mlxeff_isa() in (b"avx512", b"amx") and (kernel, mode) in INSTRUCTIONS:
            count, weights = INSTRUCTIONS[kernel, mode]
            found["gw_per_s_by_instructions"] = multiply_adds[threads] / (2 * LANES) / count * weights
        return found

    return ceilings


def encoders(options):
    """Speed of the encoder in millions of weights per second."""
    rows = []
    for threads in options.threads:
        set_threads(threads)
        for name, fmt in FORMATS.items():
            weights = np.random.default_rng(2).standard_normal((256, 16 * fmt.columns)).astype(np.float32)
            for refine in (False, True):
                start = time.perf_counter()
                _, decoded, _ = encode(name, weights, -2, refine)
                rate = weights.size / (time.perf_counter() - start) / 1e6
                error = float(np.linalg.norm(weights - decoded) / np.linalg.norm(weights))
                rounding = "refined" if refine else "plain"
                rows.append(
                    {"format": name, "rounding": rounding, "threads": threads, "mw_per_s": rate, "error": error}
                )
                print(f"encode {name:>4} bit {rounding:>8} {threads:3} {rate:7.3f} Mw/s, error {error:.4f}", flush=True)
    return rows


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    add_isa(parser)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="rows x columns of W")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 64], help="of x")
    parser.add_argument("--seconds", type=float, default=0.05, help="a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-models", action="store_true", help="the kernels and the encoder only")
    parser.add_argument("--seeds", type=Path, nargs="+", default=cpu_seedlm_models.default_seeds(),
                        help="folders that convert --seedlm made of the built-in model; %(default)s")  # fmt: skip
    parser.add_argument("--save", action="store_true", help="write results/<processor>-cpu-seedlm-mlx-<version>.json")
    return parser.parse_args()


def main():
    options = parse()
    isa = use_isa(options.isa)
    bandwidth, multiply_adds = ({t: f(t) for t in options.threads} for f in (read_bandwidth, sgemm_rate))
    card = machine.card() | {
        "isa": isa,
        "command": saving.command(),
        "read_gb_per_s": bandwidth,
        "multiply_add_gflops": multiply_adds,
    }
    print(json.dumps(card))
    titles = f"{'N x K':>10} {'kernel':>12} {'mode':>5} {'M':>4} {'thr':>3} {'us':>9} {'Gw/s':>7}"
    print(titles, f"{'by bytes':>8} {'by instr':>8}")
    ceilings = ceilings_of(bandwidth, multiply_adds)
    document = {**card, "products": products(options, ceilings), "encoder": encoders(options)}
    if not options.no_models:
        document["models"] = cpu_seedlm_models.measure(options.seeds, options.threads, options.rounds)
        print(cpu_seedlm_models.table(document["models"]))
    if options.save:
        saving.write_json(document, saving.result_path(document["cpu"], f"cpu-seedlm-mlx-{mx.__version__}.json"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
