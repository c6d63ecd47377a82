"""Weights of 8 bits in two planes of 4 bits: the model multiplies by both, and QuantSpec's draft by the upper one, so
that it needs no weights of its own. The paper (arXiv 2502.10424) shares only the KV cache in this way; its draft has a
copy of the weights in 4 bits.

A code c = 16 u + l of an affine-quantised matrix stands for the number scale · c + bias. With any bias' it is the sum
of the numbers of two matrices of 4 bits:

    upper   16 scale · u + bias'
    lower   scale · l + (bias - bias')

The upper one is near the number itself where bias' is bias + 7.5 scale, so that the lower one has the middle 0.
"""

import mlx.core as mx
import mlx.nn as nn

from .. import modules, ops
from ..errors import MlxeffError

BITS, HALF = 8, 4  # of a code, and of its halves
MIDDLE = 7.5  # of a lower half
PER_WORD = 32 // HALF  # halves in a word

# The parameters of each plane, in the order of `ops.Quantized`.
UPPER = ("upper", "scales", "biases")
LOWER = ("lower", "lower_scales", "lower_biases")


def split(packed: mx.array) -> tuple[mx.array, mx.array]:
    """Codes of 8 bits, uint32 (N, K / 4) → their upper and lower halves, uint32 (N, K / 8) each; all are packed as by
    `mx.quantize`."""
    codes = mx.contiguous(packed).view(mx.uint8).reshape(packed.shape[0], -1, PER_WORD).astype(mx.uint32)
    places = mx.arange(0, 32, HALF, dtype=mx.uint32)
    return tuple(mx.sum(half << places, axis=-1) for half in (codes >> HALF, codes & 15))


def split_biases(scales: mx.array, biases: mx.array) -> tuple[mx.array, mx.array]:
    """The biases of both planes, of the type of `biases`. Their sum is `biases` without an error: where the type cannot
    hold the best ones, the upper plane has all of it."""
    exact, dtype = biases.astype(mx.float32), biases.dtype
    upper = (exact + MIDDLE * scales.astype(mx.float32)).astype(dtype)
    lower = (exact - upper.astype(mx.float32)).astype(dtype)
    equal = upper.astype(mx.float32) + lower.astype(mx.float32) == exact
    return mx.where(equal, upper, biases), mx.where(equal, lower, mx.zeros_like(lower))


class PlaneModule(nn.Module):
    """A matrix (N, K) in two planes, made of a quantised layer. Its parameters are those of two matrices as
    `mx.quantize` packs them, which stay frozen."""

    def __init__(self, module: nn.Module, origin: str):
        super().__init__()
        scales = module.scales
        self.group_size = module.group_size
        self.upper, self.lower = split(module.weight)
        self.biases, self.lower_biases = split_biases(scales, module.biases)
        self.scales, self.lower_scales = 16 * scales, scales
        mx.eval(self.parameters())
        if not mx.isfinite(self.scales).all().item():
            raise MlxeffError(f"{origin}: wanted scales that can be multiplied by 16, got {mx.max(scales).item()}")
        self.freeze()

    @property
    def rows(self) -> int:
        return self.upper.shape[0]

    @property
    def cols(self) -> int:
        return self.upper.shape[1] * PER_WORD

    @property
    def matrices(self) -> tuple[ops.Quantized, ops.Quantized]:
        """The two matrices whose sum this one is."""
        return tuple(ops.Quantized(*(self[name] for name in names), self.group_size, HALF) for names in (UPPER, LOWER))

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The matrix (N, K) in `dtype`."""
        return sum(modules.dequantized(matrix) for matrix in self.matrices).astype(dtype)

    def native_arrays(self, part: slice) -> dict:
        """The rows `part` of the matrix by name, as the native decoder takes them (see `models.parts.Rows.matrix`)."""
        arrays = {name: self[name][part] for name in (*UPPER, *LOWER)}
        return {"kind": "affine_planes", **arrays, "group_size": self.group_size}

    def multiply(self, x: mx.array, compute: str = "exact") -> mx.array:
        """x (…, K) → x Wᵀ (…, N); `compute` as in `ops.quantized_linear`."""
        upper, lower = (ops.quantized_linear(x, matrix, compute) for matrix in self.matrices)
        return upper + lower


class PlaneLinear(PlaneModule):
    """x (…, K) → x Wᵀ + bias (…, N)."""

    def __init__(self, module: nn.QuantizedLinear, origin: str):
        super().__init__(module, origin)
        if "bias" in module:
            self.bias = module.bias

    def __call__(self, x: mx.array, compute: str = "exact") -> mx.array:
        y = self.multiply(x, compute)
        return y + self["bias"] if "bias" in self else y

    def to_dense(self, dtype: mx.Dtype = mx.float32) -> nn.Linear:
        """An `nn.Linear` with the same weights in `dtype`."""
        return modules.linear_of(self.dense(dtype), self.get("bias"))

    def draft(self) -> modules.QuantizedLinear:
        """The layer with the upper plane alone, whose arrays it shares."""
        linear = modules.QuantizedLinear(self.group_size, 1, "bias" in self, self.group_size, HALF)
        return _share(self, linear)


class PlaneEmbedding(PlaneModule):
    """Token ids (…) → rows (…, K)."""

    def __call__(self, tokens: mx.array) -> mx.array:
        parts = [[getattr(matrix, name)[tokens] for name in modules.PARTS] for matrix in self.matrices]
        return sum(
            mx.dequantize(packed, ops.activations(scales), ops.activations(biases), self.group_size, HALF)
            for packed, scales, biases in parts
        )

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (…, K) → logits (…, N)."""
        return self.multiply(x)

    def to_dense(self, dtype: mx.Dtype = mx.float32) -> nn.Embedding:
        """An `nn.Embedding` with the same weights in `dtype`."""
        return modules.embedding_of(self.dense(dtype))

    def draft(self) -> modules.QuantizedEmbedding:
        """The embedding with the upper plane alone, whose arrays it shares."""
        return _share(self, modules.QuantizedEmbedding(1, self.group_size, self.group_size, HALF))


def in_planes(module: nn.Module, origin: str) -> PlaneModule | None:
    """A quantised layer in planes; None for a layer of another kind. `origin` names it in errors."""
    if type(module) not in (modules.QuantizedLinear, modules.QuantizedEmbedding):
        return None
    if module.bits != BITS or module.mode != "affine":
        return None
    return (PlaneLinear if type(module) is modules.QuantizedLinear else PlaneEmbedding)(module, origin)


def _share(planes: PlaneModule, layer: nn.Module) -> nn.Module:
    """`layer` with the arrays of the upper plane."""
    for name, shared in zip(modules.PARTS, UPPER, strict=True):
        layer[name] = planes[shared]
    if "bias" in planes:
        layer.bias = planes.bias
    return layer
