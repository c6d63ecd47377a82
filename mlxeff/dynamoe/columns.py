"""Matrices that are stored by their columns, so that the weights of one input lie together.

A product that leaves out some of its inputs then reads nothing of their columns. `cpu/columns/column_matrix.h` is the
same format in the native kernels. Of N outputs and K inputs:

affine  the codes, scales and biases are those of the matrix in MLX's rows. `weight`, uint32 (K, N · bits / 32), has a
        column in each row, in tiles of 128 outputs (4 bits, the last may have 64) or 64 (8 bits). With W words in a
        tile, word i holds the codes of the outputs i, W + i, 2 W + i, … of the tile, lowest bits first. `scales` and
        `biases` are (K / group, N)
dense   `weight` is (K, N)
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..modules import Linear, QuantizedLinear, quantized_matrix
from ..ops import linear

BITS = (4, 8)  # of affine weights
OUTPUTS, INPUTS = 64, 32  # numbers of outputs and inputs are multiples of these
WORDS = 16  # of a tile


def tile_width(bits: int | None) -> int:
    """The outputs of a tile; `bits` is None for dense weights."""
    return 32 // bits * WORDS if bits else 64


class Columns(nn.Module):
    """A linear layer whose matrix (N, K) is stored by its columns. `bits` and `group_size` are None for a dense one."""

    def __init__(self, outputs: int, inputs: int, bits: int | None, group_size: int | None, bias: bool = False):
        super().__init__()
        self.outputs, self.inputs, self.bits, self.group_size = outputs, inputs, bits, group_size
        self.weight = mx.zeros((inputs, outputs * bits // 32 if bits else outputs), mx.uint32 if bits else mx.float32)
        if bits:
            self.scales = mx.zeros((inputs // group_size, outputs))
            self.biases = mx.zeros((inputs // group_size, outputs))
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
        codes = mx.concatenate([_codes(words, self.bits) for words in self._tiles()], axis=1).astype(mx.float32)
        scales, biases = (
            mx.repeat(each.astype(mx.float32), self.group_size, axis=0) for each in (self.scales, self.biases)
        )
        return codes * scales + biases

    def _tiles(self) -> list[mx.array]:
        """The words of the whole tiles (K, tiles, 16), and of a half tile (K, 1, 8) where there is one."""
        whole = self.weight.shape[1] // WORDS * WORDS
        parts = [self.weight[:, :whole].reshape(self.inputs, -1, WORDS)] if whole else []
        return parts + ([self.weight[:, None, whole:]] if whole < self.weight.shape[1] else [])

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
            codes = np.concatenate([np.array(_codes(words, self.bits)) for words in self._tiles()], axis=1)
            layer = QuantizedLinear(32, 1, False, 32, self.bits)
            layer.group_size = self.group_size
            layer.weight = mx.array(_joined(np.ascontiguousarray(codes.T), self.bits, 1))
            layer.scales, layer.biases = (mx.contiguous(each.T) for each in (self.scales, self.biases))
        if "bias" in self:
            layer.bias = self.bias
        return layer


def _codes(words: mx.array, bits: int) -> mx.array:
    """Words (K, tiles, W) → codes, uint32 (K, outputs)."""
    shifts = mx.arange(32 // bits, dtype=mx.uint32)[:, None] * bits
    return ((words[:, :, None, :] >> shifts) & ((1 << bits) - 1)).reshape(len(words), -1)


def _joined(codes: np.ndarray, bits: int, words: int) -> np.ndarray:
    """Codes uint32 (R, C), in pieces of `words` · 32 / bits → words (R, C · bits / 32), see the module's text. With one
    word a piece this is MLX's packing."""
    parts = codes.astype(np.uint32).reshape(len(codes), -1, 32 // bits, words)
    shifts = np.arange(32 // bits, dtype=np.uint32)[:, None] * np.uint32(bits)
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), -1)


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
        whole = outputs // tile_width(bits) * tile_width(bits)
        parts = [_joined(codes[:, :whole], bits, WORDS)] if whole else []
        parts += [_joined(codes[:, whole:], bits, WORDS // 2)] if whole < outputs else []
        made.weight = mx.array(np.concatenate(parts, axis=1))
        made.scales, made.biases = (mx.contiguous(each[rows].T) for each in (module.scales, module.biases))
    if "bias" in module:
        made.bias = module.bias[rows]
    return made
