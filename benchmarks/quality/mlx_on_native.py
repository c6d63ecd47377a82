"""Run mlx-lm's quantisers on this project's native CPU kernels: the same functions with faster matrix products.

MLX multiplies float32 matrices with reference BLAS on Linux CPUs, at about 1 GFLOPS a core, and mlx-lm's quantisers
need some 10 TFLOP each: hours become minutes. Replaced are the forward of MLX's layers, the Gram matrices of GPTQ and
the one `einsum` of AWQ; the algorithms are untouched. Results differ by rounding of float32 sums.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.quant import gptq

from mlxeff import modules, ops

CLIPS = "bdg,odg->bod"  # samples by groups by size, rows by groups by size: AWQ's search for clips


def install() -> bool:
    """Replace MLX's functions in this process if native kernels are available; return whether they are."""
    if not ops.native_for():
        return False
    nn.Linear.__call__ = modules.Linear.__call__
    nn.QuantizedLinear.__call__ = quantized_linear
    nn.Embedding.as_linear = modules.Embedding.as_linear
    nn.QuantizedEmbedding.as_linear = modules.QuantizedEmbedding.as_linear
    nn.RMSNorm.__call__ = modules.RMSNorm.__call__
    llama.scaled_dot_product_attention = attention
    gptq.Catcher.__call__ = catch
    mx.einsum = einsum
    return True


def quantized_linear(self, x: mx.array) -> mx.array:
    """x (…, K) → (…, N); in training by way of the dense matrix, since scales and biases have gradients."""
    if not self.training:
        return modules.QuantizedLinear.__call__(self, x)
    dense = mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)
    return ops.linear(x, dense, self.get("bias"))


def attention(queries, keys, values, cache, scale: float, mask, sinks=None) -> mx.array:
    """As mlx-lm's function of this name, for causal attention without a cache."""
    if cache is not None or sinks is not None or mask != "causal":
        raise ValueError(f"wanted causal attention without cache and sinks, got mask {mask!r}")
    return ops.attention(queries, keys, values, scale)


def gram(x: mx.array) -> mx.array:
    """XᵀX of inputs (…, D) → (D, D)."""
    columns = mx.contiguous(x.flatten(0, -2).T)
    return ops.linear(columns, columns)


def catch(self, x: mx.array, *args, **kwargs) -> mx.array:
    """`Catcher` of mlx_lm/quant/gptq.py: note the Gram matrix of the inputs, then compute."""
    self.H = self.H + gram(x)
    return self.module(x, *args, **kwargs)


def einsum(subscripts: str, x: mx.array, w: mx.array) -> mx.array:
    """x (B, D, G), w (O, D, G) → (B, O, D): a product for each of D."""
    if subscripts != CLIPS:
        raise ValueError(f"einsum: wanted {CLIPS}, got {subscripts}")
    parts = [ops.linear(mx.contiguous(x[:, d]), mx.contiguous(w[:, d])) for d in range(x.shape[1])]
    return mx.stack(parts, axis=-1)
