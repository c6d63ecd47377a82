"""Launches of the native CPU kernels (`cpu/seedlm/`), with the arguments of their twins in `codec`.

Weights are decoded exactly and products summed in float32, whatever x's type. Where the extension is missing
(`kernels.native()`), callers use the twins.
"""

from collections.abc import Mapping

import mlx.core as mx

from .. import kernels
from .format import BlockFormat


def decode_cpu(fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array], dtype: mx.Dtype = mx.float32) -> mx.array:
    """All of a matrix → (rows, cols)."""
    return _native().seedlm_decode(_planes(fmt, arrays), None, **_layout(fmt, cols, arrays), dtype=dtype)


def rows_cpu(fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array], ids: mx.array, dtype=mx.float32) -> mx.array:
    """Rows `ids` (...) of the matrix → (..., cols). An id outside the matrix fails when the result is evaluated."""
    return _native().seedlm_decode(_planes(fmt, arrays), ids, **_layout(fmt, cols, arrays), dtype=dtype)


def matmul_cpu(fmt: BlockFormat, arrays: Mapping[str, mx.array], x: mx.array, bfloat16: bool = False) -> mx.array:
    """x (..., cols) → x Wᵀ (..., rows) in x's dtype. `bfloat16`: operands may be rounded to it where that is faster."""
    native = _native()
    mode = native.COMPUTE_BF16 if bfloat16 else native.EXACT
    return native.seedlm_matmul(x, _planes(fmt, arrays), **_layout(fmt, x.shape[-1], arrays), mode=mode)


def _native():
    native, reason = kernels.native()
    if native is None:
        raise RuntimeError(f"native kernels: {reason}")
    return native


def _planes(fmt: BlockFormat, arrays: Mapping[str, mx.array]) -> list[mx.array]:
    names = ("seeds", "coefficients", "exponents") if fmt.planar else ("blocks",)
    return [arrays[name] for name in names]


def _layout(fmt: BlockFormat, cols: int, arrays: Mapping[str, mx.array]) -> dict[str, int]:
    rows = arrays["seeds" if fmt.planar else "blocks"].shape[0]
    bias = arrays["exponent_bias"].item()
    return {"rows": rows, "cols": cols, "columns": fmt.columns, "states": fmt.states, "exponent_bias": bias}
