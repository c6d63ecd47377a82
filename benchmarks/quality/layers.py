"""Relative error of the outputs of single layers with random weights. The built-in model used by the other measures was
itself rounded to a 4-bit grid, which favours formats with a similar grid; random weights favour none.
"""

import mlx.core as mx
import numpy as np

from mlxeff.seedlm.encode import encode
from mlxeff.seedlm.format import FORMATS

from .arms import AFFINE, SEEDS


def single_layers(rows: int = 128, cols: int = 768, samples: int = 4096) -> dict[str, dict[str, float]]:
    """Kind of weights → arm → relative error. Weights are N(0, 1) or Student t3; inputs have a power-law spectrum."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    shape = (basis * np.arange(1, cols + 1) ** -0.25) @ basis.T * np.exp(0.3 * rng.standard_normal(cols))
    seen, fresh = (rng.standard_normal((samples, cols)) @ shape for _ in range(2))
    found_of = {}
    for kind, w in (("Gaussian", rng.standard_normal((rows, cols))), ("Student t3", rng.standard_t(3, (rows, cols)))):
        w = w.astype(np.float32)
        error = lambda got, w=w: float(np.linalg.norm(fresh @ (got - w).T) / np.linalg.norm(fresh @ w.T))  # noqa: E731
        found = {}
        for name, (bits, group) in AFFINE.items():
            parts = mx.quantize(mx.array(w).astype(mx.float16), group, bits)
            found[name] = error(np.array(mx.dequantize(*parts, group, bits).astype(mx.float32)))
        for name, (bits, data_free) in SEEDS.items():
            found[name] = error(encode(FORMATS[bits], w, None if data_free else seen.T @ seen).decoded)
        found_of[kind] = found
    return found_of
