"""Launches of the native CPU kernels for seed-encoded matrices (`cpu/seedlm/`).

Each function has the arguments and the result of the function with the suffix `_ops` in `codec`. Weights are decoded
exactly, and products are summed in float32 whatever the type of x. Callers have to know that the extension is
installed (`kernels.native()`): without it, these functions raise RuntimeError.
"""

from collections.abc import Mapping
from types import ModuleType

import mlx.core as mx

from .. import kernels
from .format import BlockFormat


def decode_cpu(fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array], dtype: mx.Dtype = mx.float32) -> mx.array:
    """The stored arrays of a matrix → its weights (rows, cols) in `dtype`."""
    return _native().seedlm_decode(_planes(fmt, arrays), None, **_layout(fmt, cols, arrays), dtype=dtype)


def rows_cpu(
    fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array], ids: mx.array, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """The rows `ids` (...) of the matrix in `dtype`, (..., cols). Evaluation raises for an id outside of the matrix."""
    return _native().seedlm_decode(_planes(fmt, arrays), ids, **_layout(fmt, cols, arrays), dtype=dtype)


def matmul_cpu(fmt: BlockFormat, arrays: Mapping[str, mx.array], x: mx.array, bfloat16: bool = False) -> mx.array:
    """x (..., cols) → x Wᵀ (..., rows) in x's dtype. With `bfloat16` the operands may be rounded to that type where the
    CPU multiplies it faster."""
    native = _native()
    mode = native.COMPUTE_BF16 if bfloat16 else native.EXACT
    return native.seedlm_matmul(x, _planes(fmt, arrays), **_layout(fmt, x.shape[-1], arrays), mode=mode)


def _native() -> ModuleType:
    native, reason = kernels.native()
    if native is None:
        raise RuntimeError(f"native kernels: {reason}")
    return native


def _planes(fmt: BlockFormat, arrays: Mapping[str, mx.array]) -> list[mx.array]:
    """The stored arrays with one entry or row for each row of the matrix, in the kernels' order."""
    names = ("seeds", "coefficients", "exponents") if fmt.planar else ("blocks",)
    return [arrays[name] for name in names]


def _layout(fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array]) -> dict[str, int]:
    """The kernels' arguments that say how to read these arrays."""
    rows = arrays["seeds" if fmt.planar else "blocks"].shape[0]
    bias = arrays["exponent_bias"].item()
    return {"rows": rows, "cols": cols, "columns": fmt.columns, "states": fmt.states, "exponent_bias": bias}
