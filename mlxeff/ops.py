"""The operations of decoder models: linear layers, normalisation, SwiGLU, attention, rotary embedding, losses.

Each operation is up to three functions with the same arguments: `x_ops` computes with MLX's own operations on any
device, `x_cpu` launches a native kernel of `cpu/`, and `x` chooses between the two. The native kernels are chosen on a
CPU where the extension is installed (MLXEFF_NATIVE=0 switches it off), for float32, float16 and bfloat16. They
accumulate in float32. They support gradients (first derivatives in reverse mode) and raise for `jvp`, `vmap` and second
derivatives: inside `with mlx_only():` MLX's operations are chosen, which support these. This module knows nothing about
models.

Shapes: B batch, H query heads, G KV heads, S new tokens, T cached tokens with the new ones, E head size, K inputs and
N outputs of a linear layer, V vocabulary.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from . import kernels

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # bits and group sizes of affine quantisation
CHOSEN_GROUPS = (64, 32)  # group sizes to choose from where none is asked for: the first one that fits
COMPUTE = ("exact", "bf16", "int8")  # arithmetic of the matrix products in the native kernels (models/native.py)
ACCELERATE = sys.platform == "darwin"  # on macOS, MLX multiplies float32 matrices with Apple's BLAS (matrix units)
SMALLEST_TABLE = 256  # positions in a table of rotary angles; larger tables have a power of two of them

_mlx_only: ContextVar[bool] = ContextVar("mlx_only", default=False)


@contextlib.contextmanager
def mlx_only() -> Iterator[None]:
    """Choose MLX's own operations for all graphs that are built inside the block by this thread. Where a graph is
    evaluated makes no difference.

    A model loaded inside the block has no native executor (models/native.py), and its weights have the type that MLX's
    operations compute in. A model that was loaded before keeps its native executor, which does not use this module.
    """
    token = _mlx_only.set(True)
    try:
        yield
    finally:
        _mlx_only.reset(token)


def native_for(*arrays: mx.array) -> bool:
    """Whether the native kernels are chosen for these arrays; without arrays, whether they are chosen at all."""
    if _mlx_only.get() or kernels.device() != "cpu" or kernels.native()[0] is None:
        return False
    return all(array.dtype in FLOATS for array in arrays)


def _native() -> ModuleType:
    return kernels.native()[0]


@functools.cache
def native_modes(native: ModuleType) -> dict[str, int]:
    """Name in COMPUTE → the number by which the extension module `native` knows that arithmetic."""
    return dict(zip(COMPUTE, (native.EXACT, native.COMPUTE_BF16, native.COMPUTE_INT8), strict=True))


def activations(rows: mx.array) -> mx.array:
    """`rows`, which were read from an embedding table, in the type of the model's activations: float32 where the native
    kernels are chosen, whatever the type of the weights, else unchanged."""
    return rows.astype(mx.float32) if native_for(rows) else rows


def linear_ops(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (…, K) · weight (N, K)ᵀ + bias (N) → (…, N)."""
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def linear_cpu(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    if bias is None:
        return _native().linear(x, weight)
    dtype = mx.result_type(x, weight, bias)  # the sum is float32 and rounded once, after the bias was added
    return (_native().linear(x.astype(mx.float32), weight) + bias).astype(dtype)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (…, K) · weight (N, K)ᵀ + bias (N) → (…, N). On macOS, float32 products are left to MLX, which calls Apple's
    Accelerate library."""
    accelerated = ACCELERATE and x.dtype == weight.dtype == mx.float32
    return (linear_cpu if native_for(x, weight) and not accelerated else linear_ops)(x, weight, bias)


@dataclass(frozen=True)
class Quantized:
    """A matrix (N, K) as `mx.quantize` packs it, with the parameters of that packing."""

    weight: mx.array  # uint32 (N, K · bits / 32)
    scales: mx.array  # (N, K / group_size)
    biases: mx.array | None  # as the scales; None in modes that have none
    group_size: int
    bits: int
    mode: str = "affine"  # one of MLX's

    @property
    def native(self) -> bool:
        """Whether the native kernels can read this packing."""
        return self.mode == "affine" and self.bits in BITS and self.group_size in GROUPS


def fitting_group(*columns: int) -> int | None:
    """The group size for matrices with these numbers of columns where the user asks for none: the first of
    CHOSEN_GROUPS that divides all of them; None where no one does."""
    return next((size for size in CHOSEN_GROUPS if not any(count % size for count in columns)), None)


def quantized_linear_ops(x: mx.array, w: Quantized) -> mx.array:
    """x (…, K) · Wᵀ → (…, N)."""
    scheme = {"group_size": w.group_size, "bits": w.bits, "mode": w.mode}
    return mx.quantized_matmul(x, w.weight, scales=w.scales, biases=w.biases, transpose=True, **scheme)


def quantized_linear_cpu(x: mx.array, w: Quantized, compute: str = "exact") -> mx.array:
    native = _native()
    mode = native_modes(native)[compute]
    return native.quantized_matmul(x, w.weight, w.scales, w.biases, w.group_size, w.bits, mode)


def quantized_linear(x: mx.array, w: Quantized, compute: str = "exact") -> mx.array:
    """x (…, K) · Wᵀ → (…, N). There is no gradient for W. `compute`, one of COMPUTE, is the arithmetic of the native
    kernels; MLX's operation always computes exactly."""
    if w.native and native_for(x, w.scales, w.biases):
        return quantized_linear_cpu(x, w, compute)
    return quantized_linear_ops(x, w)


def rms_norm_ops(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x (…, n) / √(mean x² + eps) · weight (n)."""
    return mx.fast.rms_norm(x, weight, eps)


def rms_norm_cpu(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return _native().rms_norm(x, weight, eps)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x (…, n) / √(mean x² + eps) · weight (n)."""
    return (rms_norm_cpu if native_for(x, weight) else rms_norm_ops)(x, weight, eps)


@kernels.fused
def swiglu_ops(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up."""
    return gate * mx.sigmoid(gate) * up


def swiglu_cpu(gate: mx.array, up: mx.array) -> mx.array:
    return _native().swiglu(gate, up)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up (Shazeer, arXiv 2002.05202)."""
    return (swiglu_cpu if native_for(gate, up) else swiglu_ops)(gate, up)


def attention_ops(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None
) -> mx.array:
    """softmax(scale · q kᵀ) v with the causal mask of `attention`."""
    new, total = queries.shape[2], keys.shape[2]
    mask: str | mx.array | None = None if new == 1 else "causal"
    if window is not None and total > window:
        first = max(0, total - new - window + 1)  # the oldest token that the first query sees
        keys, values = keys[:, :, first:], values[:, :, first:]
        mask = None if new == 1 else _window_mask(new, keys.shape[2], window)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def attention_cpu(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None
) -> mx.array:
    return _native().attention(queries, keys, values, scale, window or 0)


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None) -> mx.array:
    """softmax(scale · q kᵀ) v: causal attention of queries (B, H, S, E) to keys and values (B, G, T, E), T ≥ S; returns
    (B, H, S, E). Query heads share KV heads in groups of H / G (grouped-query attention, arXiv 2305.13245).

    The queries belong to the last S of the T tokens. Each sees its own token and all earlier ones; with a sliding
    `window`, only the last `window` of these tokens.
    """
    native = native_for(queries, keys, values)
    return (attention_cpu if native else attention_ops)(queries, keys, values, scale, window)


def _window_mask(new: int, total: int, window: int) -> mx.array:
    """bool (new, total): True where the query of a row sees the key of a column, which belongs to its own token or one
    of the `window` - 1 tokens before it."""
    rows, columns = mx.arange(total - new, total)[:, None], mx.arange(total)[None]
    return (columns <= rows) & (rows < columns + window)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864). Dimension i of a head is rotated together with dimension
    i + size / 2. The angles follow from `base` as in the paper, or are given by `wavelengths`."""

    size: int  # E, head size
    base: float | None
    scale: float = 1.0  # factor of the positions
    wavelengths: mx.array | None = None  # (size / 2), positions per radian; takes the place of `base`
    magnitude: float = 1.0  # factor of x (YaRN, arXiv 2309.00071)

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """x (B, H, S, size) → the same shape, rotated; the first token is at position `offset`."""
        return rope(x, self, offset)

    @property
    def frequencies(self) -> mx.array:
        """Radians per position, (size / 2)."""
        if self.wavelengths is not None:
            return self.scale / self.wavelengths
        exponents = mx.arange(0, self.size, 2, dtype=mx.float32) / self.size
        return self.scale * mx.exp(exponents * -math.log(self.base))

    @functools.cached_property
    def inverse_frequencies(self) -> tuple[float, ...]:
        """`frequencies` as Python numbers."""
        return tuple(self.frequencies.tolist())


def rope_ops(x: mx.array, angles: Rope, offset: int) -> mx.array:
    """x (B, H, S, E) → the same shape, rotated by `angles`; the tokens are at positions `offset`, `offset` + 1, …"""
    x = x if angles.magnitude == 1 else x * angles.magnitude
    return mx.fast.rope(
        x,
        angles.size,
        traditional=False,
        base=angles.base,
        scale=angles.scale,
        offset=offset,
        freqs=angles.wavelengths,
    )


def rope_cpu(x: mx.array, angles: Rope, offset: int) -> mx.array:
    positions = max(SMALLEST_TABLE, 1 << (offset + x.shape[2] - 1).bit_length())
    return _native().rope(x, *_table(angles.inverse_frequencies, positions, angles.magnitude), offset)


def rope(x: mx.array, angles: Rope, offset: int) -> mx.array:
    """x (B, H, S, E) → the same shape, rotated by `angles`; the tokens are at positions `offset`, `offset` + 1, …"""
    return (rope_cpu if native_for(x) else rope_ops)(x, angles, offset)


@functools.lru_cache(maxsize=16)
def _table(inverse_frequencies: tuple[float, ...], positions: int, magnitude: float) -> tuple[mx.array, mx.array]:
    """cos and sin of the angles, (positions, size / 2) each. All layers of a model share one table."""
    return _native().rope_table(inverse_frequencies, positions, magnitude)


def cross_entropy_ops(logits: mx.array, targets: mx.array) -> mx.array:
    """logsumexp(logits) - logits[target] for each row, float32; 0 where the target is negative."""
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.maximum(targets, 0))
    return mx.where(targets < 0, 0.0, losses)


def cross_entropy_cpu(logits: mx.array, targets: mx.array) -> mx.array:
    return _native().cross_entropy(logits, targets)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """logits (…, V), integer targets (…) → float32 losses (…): logsumexp(logits) - logits[target].

    A row with a negative target is ignored: its loss and gradient are 0. The native kernel raises at evaluation for a
    target of V or more, and keeps no other array of the logits' size for the gradient than the logits.
    """
    return (cross_entropy_cpu if native_for(logits) else cross_entropy_ops)(logits, targets)


def log_softmax_ops(logits: mx.array) -> mx.array:
    """logits - logsumexp(logits) over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def log_softmax_cpu(logits: mx.array) -> mx.array:
    return (logits - _native().logsumexp(logits)).astype(logits.dtype)


def log_softmax(logits: mx.array) -> mx.array:
    """Logits (…, V) → log-probabilities (…, V)."""
    return (log_softmax_cpu if native_for(logits) else log_softmax_ops)(logits)


def argmax_ops(x: mx.array) -> mx.array:
    """The index of the largest element of the last axis, the first of equals."""
    return mx.argmax(x, axis=-1)


def argmax_cpu(x: mx.array) -> mx.array:
    return _native().argmax(x)


def argmax(x: mx.array) -> mx.array:
    """(…, V) → uint32 (…): the index of the largest element of the last axis, the first of equals."""
    return (argmax_cpu if native_for(x) else argmax_ops)(x)
