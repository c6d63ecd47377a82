"""Speed of the native SeedLM kernels: products beside our own and MLX's 4-bit affine product, and the encoder.

    python benchmarks/cpu_seedlm.py [--threads 1 2] [--isa NAME] [--shape 4096x1024 ...] [--save]

Gw/s: billions of weights of the matrix a second, for one call with M rows of x; times are medians. Weights are cold:
each call takes the next of enough matrices to exceed 64 MB. MLX's product runs on one thread whatever is asked. The
encoder is timed on Gaussian weights, in millions of weights a second. The ceiling of a product with one row is the
read bandwidth of an fp32 matrix-vector product in the same run over the bytes a weight.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cpu_library import EXACT, F16, F32, OK, QuantizedWeight, address, lib
from cpu_matmul import median_time, read_bandwidth
from mlxeff import __version__
from mlxeff.seedlm.format import FORMATS
from seedlm_calls import Seeded, SeedWeight, encode

SHAPES = ("1024x4096", "1536x576", "576x1536")
COLD_BYTES = 64 << 20
AFFINE = "affine 4 g64"


class ColdSeeds:
    """Copies of one random encoded matrix; `call(i, x, y)` multiplies by one of them."""

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

    def __call__(self, i, x, y):
        (m, k), n = x.shape, y.shape[1]
        weight = self.weights[i % len(self.weights)]
        assert lib.mlxeff_seedlm_matmul(ctypes.byref(weight), address(x), k, F32, address(y), n, F32, m, EXACT) == OK


class ColdAffine:
    """The same for our 4-bit affine product, groups of 64, fp16 scales."""

    def __init__(self, n, k):
        rng = np.random.default_rng(0)
        copies = max(2, -(-COLD_BYTES // (n * k * 9 // 16)))
        one = rng.integers(0, 1 << 32, (n, k // 8), np.uint32)
        self.held = [
            (one + np.uint32(i), *rng.uniform(0.01, 0.02, (2, n, k // 64)).astype(np.float16)) for i in range(copies)
        ]
        self.weights = [QuantizedWeight(*(address(a) for a in arrays), n, k, 4, 64, F16) for arrays in self.held]

    def __call__(self, i, x, y):
        (m, k), n = x.shape, y.shape[1]
        weight = self.weights[i % len(self.weights)]
        assert lib.mlxeff_qmm(ctypes.byref(weight), address(x), k, F32, address(y), n, F32, m, EXACT) == OK


class ColdMlx:
    """The same for mx.quantized_matmul on the CPU, with float32 scales (its fast case there)."""

    def __init__(self, n, k):
        mx.set_default_device(mx.cpu)
        copies = max(2, -(-COLD_BYTES // (n * k * 5 // 8)))
        self.held = [mx.quantize(mx.random.normal((n, k)), group_size=64, bits=4) for _ in range(copies)]
        mx.eval(self.held)

    def __call__(self, i, x, _):
        mx.eval(mx.quantized_matmul(mx.array(x), *self.held[i % len(self.held)], group_size=64, bits=4))


def products(options, bandwidth):
    """One line a shape, kernel, M and number of threads."""
    rows = []
    for shape in options.shape:
        n, k = map(int, shape.split("x"))
        arms = {f"seedlm {name}": ColdSeeds(name, n, k) for name in FORMATS}
        arms |= {AFFINE: ColdAffine(n, k), "mlx 4 g64": ColdMlx(n, k)}
        bytes_a_weight = {f"seedlm {name}": fmt.bits / 8 for name, fmt in FORMATS.items()} | {AFFINE: 4.5 / 8}
        for m in options.rows:
            x, y = np.random.default_rng(1).standard_normal((m, k), np.float32), np.empty((m, n), np.float32)
            for threads in options.threads:
                assert lib.mlxeff_set_num_threads(threads) == OK
                for arm, call in arms.items():
                    if arm.startswith("mlx") and (threads > 1 or m > 8):
                        continue
                    seconds = median_time(lambda i: call(i, x, y), options.seconds)  # noqa: B023
                    rate = n * k / seconds / 1e9
                    share = rate * bytes_a_weight.get(arm, 0) / bandwidth[threads]
                    rows.append({"shape": shape, "kernel": arm, "M": m, "threads": threads, "seconds": seconds})
                    print(
                        f"{shape:>10} {arm:>12} {m:4} {threads:3} {seconds * 1e6:9.1f} {rate:7.2f} {share:8.1%}",
                        flush=True,
                    )
    return rows


def encoders(options):
    """Millions of weights a second of the encoder."""
    rows = []
    for threads in options.threads:
        assert lib.mlxeff_set_num_threads(threads) == OK
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="rows x columns of W")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 64], help="of x")
    parser.add_argument("--seconds", type=float, default=0.15, help="a measurement")
    parser.add_argument("--save", action="store_true", help="write results/<processor>-cpu-seedlm-mlx-<version>.json")
    options = parser.parse_args()
    if options.isa and lib.mlxeff_set_isa(options.isa.encode()) != OK:
        parser.error(f"{options.isa} is not usable here; there are {lib.mlxeff_isa_available().decode()}")
    bandwidth = {t: read_bandwidth(t) for t in options.threads}
    card = {
        "isa": lib.mlxeff_isa().decode(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlxeff": __version__,
        "command": "benchmarks/cpu_seedlm.py " + " ".join(sys.argv[1:]),
        "read_gb_per_s": bandwidth,
    }
    print(json.dumps(card))
    print(f"{'N x K':>10} {'kernel':>12} {'M':>4} {'thr':>3} {'us':>9} {'Gw/s':>7} {'of read':>8}")
    document = {**card, "products": products(options, bandwidth), "encoder": encoders(options)}
    if options.save:
        name = f"{document['processor'].replace(' ', '-')}-cpu-seedlm-mlx-{mx.__version__}.json"
        (Path(__file__).parent / "results" / name).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def processor():
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
