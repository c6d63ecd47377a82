"""Products of a few rows with a matrix, dense or quantised, in one pass over its weights: metal/small_matmul.metal.

Verifying drafted tokens multiplies up to MOST_ROWS rows. MLX 0.32 reads the weights once for all of them on GPUs of
generation 15 (M3) and later. On M1 and M2, generations 13 and 14, it reads quantised ones once for each row, and
computes dense ones in tiles of 16 or 64 rows. No model calls this module: nothing was measured on a Mac, and `wanted`
is a prediction.
"""

import functools
import re

import mlx.core as mx

from . import kernels
from .ops import Quantized

MOST_ROWS = 8
GENERATION_READING_ONCE = 15  # of Apple's GPUs: MLX's own kernels read weights once for a few rows from this one on
BITS, GROUPS, SCALES = (4, 8), (32, 64, 128), (mx.float16, mx.bfloat16, mx.float32)
ROWS_EACH = 16  # rows of the matrix that a threadgroup computes


@functools.cache
def generation(architecture: str | None = None) -> int | None:
    """The generation of an Apple GPU, 13 for M1, from MLX's name of its architecture ("applegpu_g13s"), by default this
    machine's; None for another name."""
    name = architecture if architecture is not None else str(mx.device_info().get("architecture", ""))
    found = re.fullmatch(r"applegpu_g(\d+)[a-z]?", name)
    return int(found.group(1)) if found else None


def supported(x: mx.array, weight: mx.array | Quantized) -> bool:
    """Whether the kernel computes x (…, K) · Wᵀ: up to MOST_ROWS rows, W dense float16, bfloat16 or float32, or affine
    with 4 or 8 bits."""
    rows = x.size // x.shape[-1]
    if not 1 <= rows <= MOST_ROWS or x.dtype not in SCALES:
        return False
    if isinstance(weight, Quantized):
        scheme = weight.mode == "affine" and weight.bits in BITS and weight.group_size in GROUPS
        return scheme and weight.scales.dtype in SCALES
    return weight.dtype in SCALES


def wanted(x: mx.array, weight: mx.array | Quantized, architecture: str | None = None) -> bool:
    """Whether `small_matmul` is predicted to be faster than MLX's product on this machine, or on GPUs of this
    architecture: 2 to MOST_ROWS rows, float16 or narrower weights, a GPU before GENERATION_READING_ONCE.

    One row is left to MLX, which reads the weights once for it; but its kernel adds in another order. Who needs a row
    to have the same bits alone and among others calls `small_matmul` for one row too.
    """
    if architecture is None and kernels.device() != "gpu":
        return False
    number, rows = generation(architecture), x.size // x.shape[-1]
    narrow = isinstance(weight, Quantized) or weight.dtype in (mx.float16, mx.bfloat16)
    return number is not None and number < GENERATION_READING_ONCE and rows > 1 and narrow and supported(x, weight)


def small_matmul(x: mx.array, weight: mx.array | Quantized) -> mx.array:
    """x (…, K) · Wᵀ → (…, N) in x's type, for a matrix (N, K) and up to MOST_ROWS rows; sums are float32. A row's
    result has the same bits alone and among others. Raises ValueError for what `supported` refuses."""
    if not supported(x, weight):
        raise ValueError(f"product of a few rows: x {x.shape} {x.dtype}, weights {getattr(weight, 'mode', 'dense')}")
    vectors = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantized):
        inputs = {"words": weight.weight, "scales": weight.scales, "biases": weight.biases}
        kind = f"Affine<{weight.bits}, {weight.group_size}, decltype(words), decltype(scales)>{{words, scales, biases}}"
        name = f"affine_{weight.bits}_{weight.group_size}"
    else:
        inputs = {"weights": weight}
        kind, name = "Dense<decltype(weights)>{weights}", "dense"
    rows = next(iter(inputs.values())).shape[0]
    body = f"""
        threadgroup float memory[simdgroups * 8 * own_rows];
        small_matmul({kind}, x, x_shape[0], x_shape[1], out_rows, out, memory, threadgroup_position_in_grid.x,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """
    inputs |= {"x": vectors, "out_rows": mx.array(rows, mx.uint32)}
    kernel = kernels.metal_kernel("small_matmul", f"small_matmul_{name}", tuple(inputs), ("out",), body)
    [out] = kernel(
        inputs=list(inputs.values()),
        grid=(-(-rows // ROWS_EACH) * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(vectors.shape[0], rows)],
        output_dtypes=[x.dtype],
    )
    return out.reshape(*x.shape[:-1], rows)
