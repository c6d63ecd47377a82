"""The operations that decoders are made of, each as up to three functions of the same arguments: `x_ops` in MLX's own
operations (any device), `x_cpu` by a native kernel of `cpu/` (launch only), and `x`, which chooses.

The native kernels are chosen on a CPU where the extension is there (`MLXEFF_NATIVE=0` switches it off), for float32,
float16 and bfloat16. They accumulate in float32 and have first derivatives in reverse mode; `jvp`, `vmap` and second
derivatives they refuse. `with mlx_only():` chooses MLX's operations inside the block, for those or for a comparison.
Knows nothing about models. Shapes: B batch, H query heads, G KV heads, S new tokens, T tokens held, E head size.
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
CHOSEN_GROUPS = (64, 32)  # of these, where no group size is asked for: the first one that fits
COMPUTE = ("exact", "bf16", "int8")  # arithmetic of the native products (models/fused.py)
ACCELERATE = sys.platform == "darwin"  # MLX multiplies float32 matrices by Apple's BLAS there, on the matrix units
SMALLEST_TABLE = 256  # positions; larger tables of angles are powers of two

_mlx_only: ContextVar[bool] = ContextVar("mlx_only", default=False)


@contextlib.contextmanager
def mlx_only() -> Iterator[None]:
    """Choose MLX's own operations inside the block, in this thread: it matters where the graph is built, not evaluated.

    A model loaded inside the block has no fused form (models/fused.py) and the weights that MLX's operations need; the
    fused form of one loaded before is not an operation of this module and stays.
    """
    token = _mlx_only.set(True)
    try:
        yield
    finally:
        _mlx_only.reset(token)


def native_for(*arrays: mx.array) -> bool:
    """Whether the native kernels compute on these arrays here and now; without arrays, whether they compute at all."""
    if _mlx_only.get() or kernels.device() != "cpu" or kernels.native()[0] is None:
        return False
    return all(array.dtype in FLOATS for array in arrays)


def _native() -> ModuleType:
    return kernels.native()[0]


@functools.cache
def native_modes(native: ModuleType) -> dict[str, int]:
    """What the native products call each of COMPUTE."""
    return dict(zip(COMPUTE, (native.EXACT, native.COMPUTE_BF16, native.COMPUTE_INT8), strict=True))


def activations(rows: mx.array) -> mx.array:
    """Rows of an embedding, or the numbers they are made of, in the type that activations have from there on: float32
    for the native kernels, which read weights of any type, else the weights' own."""
    return rows.astype(mx.float32) if native_for(rows) else rows


def linear_ops(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (…, K) · weight (N, K)ᵀ + bias (N) → (…, N)."""
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def linear_cpu(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    if bias is None:
        return _native().linear(x, weight)
    dtype = mx.result_type(x, weight, bias)  # rounded once, after the bias
    return (_native().linear(x.astype(mx.float32), weight) + bias).astype(dtype)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (…, K) · weight (N, K)ᵀ + bias (N) → (…, N). On macOS float32 products are MLX's, which are Accelerate's."""
    accelerated = ACCELERATE and x.dtype == weight.dtype == mx.float32
    return (linear_cpu if native_for(x, weight) and not accelerated else linear_ops)(x, weight, bias)


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix (N, K) as `mx.quantize` packs it, with the scheme that reads it."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str = "affine"

    @property
    def native(self) -> bool:
        """Whether the native kernels know the scheme."""
        return self.mode == "affine" and self.bits in BITS and self.group_size in GROUPS


def fitting_group(*columns: int) -> int | None:
    """The group size for matrices with these numbers of columns, where none is asked for: the first of CHOSEN_GROUPS
    that divides them all, or None."""
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
    """x (…, K) · Wᵀ → (…, N); W has no gradient. `compute`, one of COMPUTE, is for the native kernels: MLX's operation
    is always exact."""
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
    """softmax(scale · q kᵀ) v, causal and aligned at the end: the last query sees all keys; see `attention`."""
    new, held = queries.shape[2], keys.shape[2]
    mask: str | mx.array | None = None if new == 1 else "causal"
    if window is not None and held > window:
        first = max(0, held - new - window + 1)  # the oldest token that the first query still sees
        keys, values = keys[:, :, first:], values[:, :, first:]
        mask = None if new == 1 else _window_mask(new, keys.shape[2], window)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def attention_cpu(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None
) -> mx.array:
    return _native().attention(queries, keys, values, scale, window or 0)


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None) -> mx.array:
    """Causal attention of queries (B, H, S, E) to keys and values (B, G, T, E), T ≥ S → (B, H, S, E).

    The queries are those of the last S of T tokens; each sees its own token and those before it, with a `window` only
    the last `window` of these.
    """
    native = native_for(queries, keys, values)
    return (attention_cpu if native else attention_ops)(queries, keys, values, scale, window)


def _window_mask(new: int, held: int, window: int) -> mx.array:
    """True where a query may look: causal and fewer than `window` tokens back; (new, held)."""
    rows, columns = mx.arange(held - new, held)[:, None], mx.arange(held)[None]
    return (columns <= rows) & (rows < columns + window)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding in half-rotation pairing, for heads of `size`; `base` or `wavelengths` sets the angles."""

    size: int
    base: float | None
    scale: float = 1.0  # positions are multiplied by it
    wavelengths: mx.array | None = None  # (size / 2), positions a radian
    magnitude: float = 1.0  # x is multiplied by it

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """x (B, H, S, size), its first token at position `offset` → x rotated by its positions."""
        return rope(x, self, offset)

    @property
    def frequencies(self) -> mx.array:
        """Radians a position, (size / 2)."""
        if self.wavelengths is not None:
            return self.scale / self.wavelengths
        exponents = mx.arange(0, self.size, 2, dtype=mx.float32) / self.size
        return self.scale * mx.exp(exponents * -math.log(self.base))

    @functools.cached_property
    def inverse_frequencies(self) -> tuple[float, ...]:
        """`frequencies` as numbers."""
        return tuple(self.frequencies.tolist())


def rope_ops(x: mx.array, angles: Rope, offset: int) -> mx.array:
    """x (B, H, S, E) rotated by `angles` of positions `offset`, `offset` + 1, … (Su et al., arXiv 2104.09864)."""
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
    """x (B, H, S, E) rotated by `angles` of positions `offset`, `offset` + 1, … (Su et al., arXiv 2104.09864)."""
    return (rope_cpu if native_for(x) else rope_ops)(x, angles, offset)


@functools.lru_cache(maxsize=16)
def _table(inverse_frequencies: tuple[float, ...], positions: int, magnitude: float) -> tuple[mx.array, mx.array]:
    """cos and sin (positions, half), shared by all layers of a model."""
    return _native().rope_table(inverse_frequencies, positions, magnitude)


def cross_entropy_ops(logits: mx.array, targets: mx.array) -> mx.array:
    """logsumexp(logits) - logits[target] of each row, float32; 0 where the target is negative."""
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.maximum(targets, 0))
    return mx.where(targets < 0, 0.0, losses)


def cross_entropy_cpu(logits: mx.array, targets: mx.array) -> mx.array:
    return _native().cross_entropy(logits, targets)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """logits (…, V), whole-number targets (…) → float32 losses (…): logsumexp(logits) - logits[target].

    A row with a negative target does not count: its loss and gradient are 0. On a CPU a target of V or more is an error
    when the loss is evaluated. No array of the logits' size is kept for the gradient but the logits.
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
