"""Layers with seed-encoded weights: `SeedLinear` replaces an `nn.Linear`, `SeedEmbedding` an `nn.Embedding`.

The weights stay encoded in memory and are decoded inside of the kernels. At each call the kernels are chosen: Metal on
a GPU, native ones on a CPU, and otherwise the operations of `codec`, which decode the whole matrix and are slow. The
blocks are integers and have no gradient; the gradient for the inputs is computed with the decoded matrix.
"""

import mlx.core as mx
import mlx.nn as nn

from .. import kernels, modules
from ..errors import MlxeffError
from ..ops import FLOATS, activations, native_for
from . import codec, metal, native
from .format import BlockFormat, check_arrays, check_bias


def matmul(fmt: BlockFormat, arrays: dict[str, mx.array], x: mx.array) -> mx.array:
    """x (..., cols) → x Wᵀ (..., rows) in x's type, for the matrix W that is stored as `arrays`."""
    if native_for(x):
        return native.matmul_cpu(fmt, arrays, x)
    if _metal_for(x.dtype):
        return _metal_with_gradient(fmt, arrays, x)
    return codec.matmul_ops(fmt, arrays, x)


def rows(fmt: BlockFormat, cols: int, arrays: dict[str, mx.array], ids: mx.array, dtype: mx.Dtype) -> mx.array:
    """The rows `ids` (...) of the matrix in `dtype`, (..., cols)."""
    if native_for():
        return native.rows_cpu(fmt, cols, arrays, ids, dtype)
    return (metal.rows_metal if _metal_for(dtype) else codec.rows_ops)(fmt, cols, arrays, ids, dtype)


def decode(fmt: BlockFormat, cols: int, arrays: dict[str, mx.array], dtype: mx.Dtype = mx.float32) -> mx.array:
    """The whole matrix (rows, cols) in `dtype`; the result is the same to the bit on every device."""
    if native_for():
        return native.decode_cpu(fmt, cols, arrays, dtype)
    return (metal.decode_metal if _metal_for(dtype) else codec.decode_ops)(fmt, cols, arrays, dtype)


def _metal_for(dtype: mx.Dtype) -> bool:
    """Whether the Metal kernels are chosen for results of this type."""
    return kernels.device() == "gpu" and kernels.has_metal() and dtype in FLOATS


def _metal_with_gradient(fmt: BlockFormat, arrays: dict[str, mx.array], x: mx.array) -> mx.array:
    """The product by the Metal kernel, with a gradient for x."""
    product = mx.custom_function(lambda x: metal.matmul_metal(fmt, arrays, x))
    product.vjp(lambda x, cotangent, _: cotangent @ metal.decode_metal(fmt, x.shape[-1], arrays, x.dtype))
    return product(x)


class SeedModule(nn.Module):
    """A seed-encoded matrix (rows, cols). Its parameters are the arrays that `format` defines, and they stay frozen."""

    def __init__(self, fmt: BlockFormat, rows: int, cols: int):
        super().__init__()
        self.block_format, self.rows, self.cols = fmt, rows, cols
        for name, (shape, dtype) in fmt.arrays(rows, cols).items():
            self[name] = mx.zeros(shape, getattr(mx, dtype))
        self.freeze(keys=self._names, recurse=False)

    @property
    def _names(self) -> list[str]:
        return list(self.block_format.arrays(self.rows, self.cols))

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The stored arrays by name, as in `format`."""
        return {name: self[name] for name in self._names}

    def unfreeze(self, *args, **kwargs) -> "SeedModule":
        """As in MLX, but the stored arrays stay frozen; a bias can be unfrozen."""
        super().unfreeze(*args, **kwargs)
        return self.freeze(keys=self._names, recurse=False)

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The decoded matrix (rows, cols) in `dtype`."""
        return decode(self.block_format, self.cols, self.arrays, dtype)

    def native_arrays(self, part: slice) -> dict:
        """The rows `part` of the matrix by name, as the native decoder takes them (see `models.parts.Rows.matrix`)."""
        fmt = self.block_format
        layout = {"cols": self.cols, "columns": fmt.columns, "states": fmt.states}
        planes = {name: array[part] for name, array in self.arrays.items() if name != "exponent_bias"}
        return {"kind": "seedlm", **planes, **layout, "exponent_bias": self["exponent_bias"].item()}

    def check(self, origin: str) -> None:
        """Raises MlxeffError for arrays with wrong shapes or types, a seed of 0 or an exponent bias out of range.
        `origin` names the module."""
        check_arrays(self.block_format, self.rows, self.cols, self.arrays, origin)
        check_bias(self["exponent_bias"].item(), origin)
        seeds = self["seeds"] if self.block_format.planar else self["blocks"] & 0xFFFF
        if not mx.all(seeds).item():
            place = int(mx.argmin(seeds.reshape(-1)).item())
            row, block = divmod(place, seeds.shape[1])
            raise MlxeffError(f"{origin}: wanted seeds 1 to 65535, got 0 at row {row}, block {block}")

    def _extra_repr(self) -> str:
        return f"input_dims={self.cols}, output_dims={self.rows}, bits={self.block_format.name}, bias={'bias' in self}"


class SeedLinear(SeedModule):
    """x (..., cols) → x Wᵀ + bias (..., rows)."""

    def __init__(self, fmt: BlockFormat, rows: int, cols: int, bias: bool = False):
        super().__init__(fmt, rows, cols)
        if bias:
            self.bias = mx.zeros((rows,))

    def __call__(self, x: mx.array) -> mx.array:
        y = matmul(self.block_format, self.arrays, x)
        return y + self["bias"] if "bias" in self else y

    def to_dense(self, dtype: mx.Dtype = mx.float32) -> nn.Linear:
        """An `nn.Linear` with the decoded weights in `dtype`."""
        return modules.linear_of(self.dense(dtype), self.get("bias"))


class SeedEmbedding(SeedModule):
    """Token ids (...) → rows (..., cols)."""

    dtype = mx.float32  # type of the rows, unless the native kernels are chosen, whose activations are float32

    def __call__(self, tokens: mx.array) -> mx.array:
        return activations(rows(self.block_format, self.cols, self.arrays, tokens, self.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (..., cols) → logits (..., rows)."""
        return matmul(self.block_format, self.arrays, x)

    def to_dense(self, dtype: mx.Dtype = mx.float32) -> nn.Embedding:
        """An `nn.Embedding` with the decoded weights in `dtype`."""
        return modules.embedding_of(self.dense(dtype))
