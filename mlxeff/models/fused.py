"""A decoder's whole forward pass as one native CPU call (`cpu/decoder.cpp`), from the modules of an ordinary model.

A family describes its layers as `LayerParts`, by reference to its own modules, so there is no second copy of a model's
code or weights. The fused form applies on a CPU, to one sequence, where every matrix is affine-quantised; it computes
in
float32 with exact products, and equals the unfused model to float32 rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import kernels
from ..cache import KVCache, LayerCache

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class Rows:
    """A matrix: the rows [start, stop) of a linear layer or an embedding, all of them by default."""

    module: nn.Module
    start: int = 0
    stop: int | None = None

    @property
    def native(self) -> bool:
        """Whether the native kernels can multiply by it."""
        module = self.module
        quantised = type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding)
        return quantised and module.mode == "affine" and module.bits in BITS and module.group_size in GROUPS

    def arrays(self) -> tuple:
        """(packed, scales, biases, group size, bits, bias or None), as the native decoder takes it."""
        module, part = self.module, slice(self.start, self.stop)
        bias = module.bias[part] if "bias" in module else None
        packed = (module.weight[part], module.scales[part], module.biases[part])
        return (*packed, module.group_size, module.bits, bias)


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: x += o(attention(q, k, v)); x += down(silu(gate) · up), each after its norm."""

    attention_norm: nn.RMSNorm
    ffn_norm: nn.RMSNorm
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None
    q: Rows
    k: Rows
    v: Rows
    o: Rows
    gate: Rows
    up: Rows
    down: Rows
    heads: int
    groups: int
    window: int | None
    rope: object

    @property
    def matrices(self) -> list[Rows]:
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]


class FusedDecoder:
    """`fused(tokens, cache, all_rows)` → logits of a model that `fuse` accepted."""

    def __init__(self, native, model):
        layers, ends = list(model.layer_parts()), model.end_parts()
        rope, size = layers[0].rope, layers[0].rope.size
        self._native, self._model = native, model
        self._dtype = layers[0].q.module.scales.dtype
        self._groups = [layer.groups for layer in layers]
        self._size = size
        self._decoder = native.Decoder(
            ends.norm.weight.shape[0], size, ends.norm.eps, rope.frequencies, rope.magnitude, ends.norm.weight,
            ends.embedding.arrays(), ends.head.arrays(),
        )  # fmt: skip
        for layer in layers:
            norms = [layer.attention_norm, layer.ffn_norm, layer.q_norm, layer.k_norm]
            self._decoder.add_layer(
                *(None if norm is None else norm.weight for norm in norms),
                matrices=[matrix.arrays() for matrix in layer.matrices],
                heads=layer.heads,
                groups=layer.groups,
                window=layer.window or 0,
            )

    def applies(self, tokens: mx.array, cache: KVCache) -> bool:
        """Whether this call can be fused: one sequence, an ordinary cache, a CPU, not in training."""
        ordinary = type(cache) is KVCache and all(type(layer) is LayerCache for layer in cache.layers)
        return tokens.shape[0] == 1 and ordinary and kernels.device() == "cpu" and not self._model.training

    def __call__(self, tokens: mx.array, cache: KVCache, all_rows: bool) -> mx.array:
        """Token ids (1, S) → logits (1, S, V), or (1, 1, V) of the last position."""
        new, count = tokens.shape[1], len(cache.layers)
        buffers = [
            layer.room(new, (1, groups, self._size), self._dtype)
            for layer, groups in zip(cache.layers, self._groups, strict=True)
        ]
        keys, values = zip(*buffers, strict=True)
        exact = self._native.EXACT
        logits, *written = self._native.forward(
            self._decoder, tokens, list(keys), list(values), cache.length, all_rows, exact
        )
        for layer, held_keys, held_values in zip(cache.layers, written[:count], written[count:], strict=True):
            layer.replace(held_keys, held_values, new)
        return logits


@dataclass(frozen=True)
class EndParts:
    """What stands before and after the layers."""

    embedding: Rows
    norm: nn.RMSNorm
    head: Rows


def fuse(model) -> bool:
    """Give `model` its fused form if the native kernels are here and know all of it; returns whether it has one."""
    native, _ = kernels.native()
    if native is None or not model.gated or not all(matrix.native for matrix in _matrices(model)):
        return False
    if not _uniform(model):
        return False
    model._fused = FusedDecoder(native, model)
    return True


def _matrices(model) -> Iterator[Rows]:
    ends = model.end_parts()
    yield from (ends.embedding, ends.head)
    for layer in model.layer_parts():
        yield from layer.matrices


def _uniform(model) -> bool:
    """One norm epsilon, one head size."""
    ends, layers = model.end_parts(), list(model.layer_parts())
    norms = [norm for part in layers for norm in (part.attention_norm, part.ffn_norm, part.q_norm, part.k_norm)]
    return {norm.eps for norm in norms if norm is not None} <= {ends.norm.eps} and len(
        {part.rope.size for part in layers}
    ) == 1
