"""Affine quantisation that minimises the error of a product instead of that of the weights (GPTQ, Frantar et al., arXiv
2210.17323): what rounding a column does to the outputs is made up for by the columns that are not rounded yet.

Shapes: N rows, K columns of a matrix W; the Gram matrix (K, K) is xᵀx of the vectors x that W multiplies.
"""

import mlx.core as mx
import numpy as np

from ..checkpoint.gguf_packing import pack_codes
from ..modules import QuantizedLinear

DAMPING = 1e-2  # of the mean diagonal of the Gram matrix
BLOCK = 128  # columns between two updates of all columns after them


def quantised(matrix: np.ndarray, gram: np.ndarray, bits: int, group: int, dtype: mx.Dtype) -> QuantizedLinear:
    """A quantised linear layer without bias whose matrix has the outputs of `matrix`, float64 (N, K), as nearly as
    `bits` bits allow. Scales and biases of each `group` columns have the type `dtype`."""
    factor = _factor(gram)
    rest, (rows, columns) = matrix.copy(), matrix.shape
    codes = np.zeros((rows, columns), np.uint8)
    scales, biases = np.zeros((2, rows, columns // group))
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.zeros((rows, stop - start))
        for column in range(start, stop):
            number = column // group
            if column % group == 0:
                scales[:, number], biases[:, number] = _grid(rest[:, column : column + group], bits, dtype)
            scale, bias = scales[:, number], biases[:, number]
            code = np.clip(np.rint((rest[:, column] - bias) / scale), 0, (1 << bits) - 1)
            codes[:, column] = code
            error = (rest[:, column] - (code * scale + bias)) / factor[column, column]
            rest[:, column:stop] -= np.outer(error, factor[column, column:stop])
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    layer = QuantizedLinear(group, 1, False, group, bits)
    words = pack_codes(codes.reshape(-1, group), bits).reshape(rows, -1)
    layer.weight = mx.array(np.ascontiguousarray(words).view("<u4"))
    layer.scales, layer.biases = (mx.array(each.astype(np.float32)).astype(dtype) for each in (scales, biases))
    return layer


def _factor(gram: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped Gram matrix."""
    damping = DAMPING * max(float(np.mean(np.diag(gram))), 1e-12)
    inverse = np.linalg.inv(gram + damping * np.eye(len(gram)))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _grid(weights: np.ndarray, bits: int, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases (N), as `dtype` holds them, of the grids that reach from the least to the largest of the
    weights (N, group). A row of equal weights gets a scale that is not 0."""
    low, high = weights.min(axis=1), weights.max(axis=1)
    scale = np.maximum((high - low) / ((1 << bits) - 1), 1e-7)
    return tuple(
        np.array(mx.array(each.astype(np.float32)).astype(dtype).astype(mx.float32), np.float64)
        for each in (scale, low)
    )
