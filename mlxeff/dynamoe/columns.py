"""Matrices that are stored by their columns, so that the weights of one input lie together.

A product that leaves out some of its inputs then reads nothing of their columns. `cpu/columns/column_matrix.h` is the
same format in the native kernels. Of N outputs and K inputs:

affine  the codes, scales and biases are those of the matrix in MLX's rows. Outputs are cut into strips of 256 (4 bits)
        or 128 (8 bits), the last one perhaps less, and a strip has the codes of its outputs for the first input, for
        the second, …: `weight`, uint32 (K · N · bits / 32), is one strip after the other. For each input a strip has a
        tile of W = 2 · bits words for every 64 outputs: word i holds the codes of the outputs i, W + i, 2 W + i, … of
        the tile, lowest bits first. `scales` and `biases`, (K / group · N), lie in the same strips
dense   `weight` is (K, N)
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import kernels
from ..modules import Linear, QuantizedLinear, quantized_matrix
from ..ops import linear

BITS = (4, 8)  # of affine weights
OUTPUTS, INPUTS = 64, 32  # numbers of outputs and inputs are multiples of these; a tile has 64 outputs
STRIP = 1024  # bits of an input in a strip


class Columns(nn.Module):
    """A linear layer whose matrix (N, K) is stored by its columns. `bits` and `group_size` are None for a dense one."""

    def __init__(self, outputs: int, inputs: int, bits: int | None, group_size: int | None, bias: bool = False):
        super().__init__()
        self.outputs, self.inputs, self.bits, self.group_size = outputs, inputs, bits, group_size
        if bits:
            self.weight = mx.zeros((inputs * outputs * bits // 32,), mx.uint32)
            self.scales = mx.zeros((inputs // group_size * outputs,))
            self.biases = mx.zeros((inputs // group_size * outputs,))
        else:
            self.weight = mx.zeros((inputs, outputs))
        if bias:
            self.bias = mx.zeros((outputs,))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """x (…, K) → (…, N)."""
        return linear(x, self.dense().astype(x.dtype).T, self.get("bias"))

    def dense(self) -> mx.array:
        """The columns (K, N) in float32, or in their own type where they are dense."""
        if not self.bits:
            return self.weight
        scales, biases = (
            mx.repeat(self._joined_strips(each, 1).astype(mx.float32), self.group_size, axis=0)
            for each in (self.scales, self.biases)
        )
        return self._codes().astype(mx.float32) * scales + biases

    def _codes(self) -> mx.array:
        """The codes of affine weights, uint32 (K, N)."""
        words = self._joined_strips(self.weight, 32 // self.bits).reshape(self.inputs, -1, 1, 2 * self.bits)
        shifts = mx.arange(32 // self.bits, dtype=mx.uint32)[:, None] * self.bits
        return ((words >> shifts) & ((1 << self.bits) - 1)).reshape(self.inputs, self.outputs)

    def _joined_strips(self, flat: mx.array, outputs: int) -> mx.array:
        """An array in strips → (rows, columns), where a column is for so many `outputs`."""
        rows, whole = flat.size * outputs // self.outputs, STRIP // self.bits // outputs
        parts, end = [], self.outputs // outputs
        for start in range(0, end, whole):
            width = min(whole, end - start)
            parts.append(flat[rows * start : rows * (start + width)].reshape(rows, width))
        return mx.concatenate(parts, axis=1)

    def align(self) -> None:
        """Move the weights to where cache lines hold whole tiles, for the native kernels; elsewhere nothing changes."""
        native, _ = kernels.native()
        if native is not None and kernels.device() == "cpu":
            self.weight = native.aligned(self.weight)

    @property
    def column_bytes(self) -> int:
        """Bytes of the weights of one input, without scales and biases."""
        return self.weight.nbytes // self.inputs

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales and biases, which every token reads."""
        return self.scales.nbytes + self.biases.nbytes if self.bits else 0

    def native_arrays(self, part: slice) -> dict:
        """The matrix by name, as the native decoder takes it; see `models.parts.Rows.matrix`."""
        if part != slice(0, None):
            raise ValueError("wanted the whole matrix: its columns cannot be cut")
        if not self.bits:
            return {"kind": "columns", "weight": self.weight}
        arrays = {name: self[name] for name in ("weight", "scales", "biases")}
        return {"kind": "columns", **arrays, "group_size": self.group_size, "bits": self.bits}

    def rows(self) -> nn.Module:
        """The same matrix as a linear layer in MLX's rows."""
        if not self.bits:
            layer = Linear(1, 1, bias=False)
            layer.weight = mx.contiguous(self.weight.T)
        else:
            codes = np.array(self._codes())
            layer = QuantizedLinear(32, 1, False, 32, self.bits)
            layer.group_size = self.group_size
            layer.weight = mx.array(_joined(np.ascontiguousarray(codes.T), self.bits, 1))
            for name in ("scales", "biases"):
                layer[name] = mx.contiguous(self._joined_strips(self[name], 1).T)
        if "bias" in self:
            layer.bias = self.bias
        return layer


def _joined(codes: np.ndarray, bits: int, words: int) -> np.ndarray:
    """Codes uint32 (R, C), in pieces of `words` · 32 / bits → words (R, C · bits / 32), see the module's text. With one
    word a piece this is MLX's packing."""
    parts = codes.astype(np.uint32).reshape(len(codes), -1, 32 // bits, words)
    shifts = np.arange(32 // bits, dtype=np.uint32)[:, None] * np.uint32(bits)
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), -1)


def _in_strips(matrix: mx.array, width: int) -> mx.array:
    """A matrix (R, C) as strips of `width` columns, one after the other: (R · C)."""
    parts = [matrix[:, start : start + width].reshape(-1) for start in range(0, matrix.shape[1], width)]
    return mx.concatenate(parts)


def refusal(module: nn.Module) -> str | None:
    """Why the matrix of a linear layer cannot be stored by its columns; None where it can."""
    if isinstance(module, nn.QuantizedLinear):
        matrix = quantized_matrix(module)
        if matrix.mode != "affine" or matrix.bits not in BITS:
            return f"affine weights of 4 or 8 bits, got {matrix.bits} bits {matrix.mode}"
        outputs, inputs = module.scales.shape[0], module.scales.shape[1] * matrix.group_size
    elif isinstance(module, nn.Linear):
        outputs, inputs = module.weight.shape
    else:
        return f"dense or affine weights, got {type(module).__name__}"
    if outputs % OUTPUTS or inputs % INPUTS:
        return f"multiples of {OUTPUTS} outputs and {INPUTS} inputs, got {outputs} and {inputs}"
    return None


def form(module: nn.Module) -> tuple[int | None, int | None]:
    """(Bits, group size) of a linear layer's weights; None for dense ones."""
    return (module.bits, module.group_size) if isinstance(module, nn.QuantizedLinear) else (None, None)


def stored_by_columns(module: nn.Module, order: np.ndarray | None = None) -> Columns:
    """The matrix of a linear layer by its columns, with the same values; `order` (N) names the row that becomes each
    output."""
    rows = mx.array(np.arange(module.weight.shape[0]) if order is None else order)
    bits, group = form(module)
    outputs = len(rows)
    if bits is None:
        made = Columns(outputs, module.weight.shape[1], None, None, "bias" in module)
        made.weight = mx.contiguous(module.weight[rows].T)
    else:
        inputs = module.scales.shape[1] * group
        made = Columns(outputs, inputs, bits, group, "bias" in module)
        per_word = np.array(module.weight[rows])[:, :, None] >> (np.arange(32 // bits, dtype=np.uint32) * bits)
        codes = np.ascontiguousarray((per_word & np.uint32((1 << bits) - 1)).reshape(outputs, inputs).T)
        made.weight = _in_strips(mx.array(_joined(codes, bits, 2 * bits)), STRIP // 32)
        made.scales, made.biases = (_in_strips(each[rows].T, STRIP // bits) for each in (module.scales, module.biases))
    if "bias" in module:
        made.bias = module.bias[rows]
    return made
