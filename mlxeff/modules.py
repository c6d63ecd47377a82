"""MLX's layers, computed by the operations of `ops.py`.

Each class is a subclass of the layer of the same name in `mlx.nn`, with the same parameters and initial values, and
overrides `__call__`. So code that looks for an `nn.Linear` to quantise, wrap or replace finds these too.
"""

import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import ops

PARTS = ("weight", "scales", "biases")  # parameters of a quantised layer
LAYER = re.compile(r"\blayers\.\d+\b")  # in the name of a parameter


def quantized_matrix(module: nn.Module) -> ops.Quantized:
    """The matrix of a quantised linear layer or embedding."""
    return ops.Quantized(
        module["weight"], module["scales"], module.get("biases"), module.group_size, module.bits, module.mode
    )


def is_matrix(module: nn.Module) -> bool:
    """Whether a module has one matrix, as a linear layer has: dense, quantised or seed-encoded."""
    return isinstance(module, (nn.Linear, nn.QuantizedLinear)) or hasattr(module, "to_dense")


def dense(module: nn.Module) -> mx.array:
    """The matrix (N, K) of a linear layer or an embedding in float32, decoded where it is quantised or seed-encoded.

    Affine scales and biases in half precision are widened to float32 before they are multiplied, so that the weights
    are the ones that the native kernels multiply by.
    """
    if hasattr(module, "to_dense"):
        return module.dense(mx.float32)
    if "scales" not in module:
        return module["weight"].astype(mx.float32)
    return dequantized(quantized_matrix(module))


def dequantized(matrix: ops.Quantized) -> mx.array:
    """A quantised matrix (N, K) in float32, see `dense`."""
    parts = [matrix.scales, matrix.biases]
    if matrix.mode == "affine":
        parts = [part.astype(mx.float32) for part in parts]
    return mx.dequantize(matrix.weight, *parts, matrix.group_size, matrix.bits, matrix.mode).astype(mx.float32)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of a module and of those below it."""
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def plain_linear(weight: mx.array, bias: mx.array | None = None) -> "Linear":
    """A `Linear` with this matrix (N, K) and bias (N)."""
    layer = Linear(1, 1, bias=False)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def linear_of(weight: mx.array, bias: mx.array | None = None) -> nn.Linear:
    """MLX's linear layer with this matrix (N, K) and bias (N)."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def embedding_of(weight: mx.array) -> nn.Embedding:
    """MLX's embedding with this table (rows, dims)."""
    embedding = nn.Embedding(1, 1)
    embedding.weight = weight
    return embedding


def layer_rows(parameters: dict) -> int:
    """Rows of all matrices of a layer, of the layer that has the most: how many numbers the matrix products of a layer
    make of one token. `parameters` as `mlx.nn.Module.parameters`."""
    rows = Counter()
    for name, value in tree_flatten(parameters):
        layer = LAYER.search(name)
        if layer and value.ndim == 2 and not name.endswith((".scales", ".biases")):
            rows[layer[0]] += value.shape[0]
    return max(rows.values(), default=0)


def chunk_bytes(heads: int, rows: int, chunk: int, length: int) -> int:
    """Bytes of what MLX's own operations hold on a CPU while a layer computes `chunk` tokens after which `length` are
    cached, in float32: the scores of all `heads`, which its attention makes at once, and the results of the matrix
    products (`layer_rows`) with what is computed from them, twice their size by measurement."""
    return 4 * chunk * (heads * length + 2 * rows)


def settle_random_state() -> None:
    """Evaluate MLX's random state, to be called when layers were made whose initial weights are replaced. Each random
    number that was asked for is a node of the state's graph, which would grow with every model until one is drawn."""
    mx.eval(list(mx.random.state))


class QuantizedLinear(nn.QuantizedLinear):
    """x (…, K) → x Wᵀ + bias (…, N) with a quantised W."""

    def __call__(self, x: mx.array, compute: str = "exact") -> mx.array:
        """`compute` as in `ops.quantized_linear`."""
        y = ops.quantized_linear(x, quantized_matrix(self), compute)
        return y + self["bias"] if "bias" in self else y


class Linear(nn.Linear):
    """x (…, K) → x Wᵀ + bias (…, N)."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.linear(x, self["weight"], self.get("bias"))

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", quantize_input: bool = False
    ) -> nn.Module:
        """The layer with its weight quantised, as in MLX. With `quantize_input` it is MLX's own class, which quantises
        the activations too."""
        if quantize_input:
            return super().to_quantized(group_size, bits, mode, quantize_input)
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """An embedding table (rows, dims), quantised."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Token ids (…) → rows (…, dims)."""
        packed, scales, biases = (None if part is None else part[tokens] for part in map(self.get, PARTS))
        if self.mode == "affine":
            scales, biases = ops.activations(scales), ops.activations(biases)
        return mx.dequantize(packed, scales, biases, self.group_size, self.bits, self.mode)

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (…, dims) → logits (…, rows)."""
        return ops.quantized_linear(x, quantized_matrix(self))


class Embedding(nn.Embedding):
    """An embedding table (rows, dims)."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Token ids (…) → rows (…, dims)."""
        return ops.activations(super().__call__(tokens))

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (…, dims) → logits (…, rows)."""
        return ops.linear(x, self["weight"])

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", quantize_input: bool = False
    ) -> nn.Module:
        """The embedding with its table quantised, as in MLX."""
        if quantize_input:
            return super().to_quantized(group_size, bits, mode, quantize_input)  # raises: MLX has no such embedding
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)


class RMSNorm(nn.RMSNorm):
    """x (…, n) → x / √(mean x² + eps) · weight."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self["weight"], self.eps)
