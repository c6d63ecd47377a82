"""A decoder's whole forward pass as one native CPU call (`cpu/decoder/`), from the modules of an ordinary model.

A family describes its layers as `LayerParts`, by reference to its own modules, so there is no second copy of a model's
code or weights. The fused form applies on a CPU where every matrix is dense, affine-quantised or of a module that has
`native_arrays` (seed-encoded ones). Activations are float32; `compute` says how the products treat them:

exact   float32 products: equals the unfused model in float32 to rounding (the default).
bf16    operands of the large products are rounded to bfloat16 where the CPU multiplies it faster (AMX); else as exact.
int8    as bf16, and activations that meet affine-quantised weights are rounded to int8, one scale for each group of
        weights. So are those of up to eight tokens that meet seed-encoded weights, one scale for each block, where the
        CPU has AVX-512 VBMI; the states of the weights' register are rounded to 8 bits there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import kernels
from ..cache import KVCache, LayerCache
from ..errors import MlxeffError, notices
from ..modules import Embedding, Linear, QuantizedEmbedding, QuantizedLinear, quantized_matrix
from ..ops import COMPUTE, native_modes

KV_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


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
        if hasattr(module, "native_arrays"):
            return True
        if type(module) in (QuantizedLinear, QuantizedEmbedding):
            return quantized_matrix(module).native
        return type(module) in (Linear, Embedding)

    def matrix(self) -> dict:
        """The matrix by name, as the native decoder takes it (`cpu/python/weights.h`)."""
        module, part = self.module, slice(self.start, self.stop)
        bias = module.bias[part] if "bias" in module else None
        if hasattr(module, "native_arrays"):
            return {**module.native_arrays(part), "bias": bias}
        if type(module) in (Linear, Embedding):
            return {"kind": "dense", "weight": module.weight[part], "bias": bias}
        arrays = {name: module[name][part] for name in ("weight", "scales", "biases")}
        return {"kind": "affine", **arrays, "group_size": module.group_size, "bits": module.bits, "bias": bias}


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

    @property
    def norms(self) -> list[nn.RMSNorm | None]:
        return [self.attention_norm, self.ffn_norm, self.q_norm, self.k_norm]

    def native(self) -> dict:
        """The layer by name, as the native decoder takes it."""
        names = ("attention", "feed_forward", "query", "key")
        weights = (None if norm is None else norm.weight for norm in self.norms)
        attention = {"query": self.q, "key": self.k, "value": self.v, "output": self.o}
        gated = {"gate": self.gate, "up": self.up, "down": self.down}
        return {
            "norms": dict(zip(names, weights, strict=True)),
            "attention": {name: rows.matrix() for name, rows in attention.items()},
            "heads": self.heads,
            "groups": self.groups,
            "window": self.window or 0,
            "feed_forward": {"kind": "gated", **{name: rows.matrix() for name, rows in gated.items()}},
        }


class FusedDecoder:
    """`fused(tokens, cache, all_rows)` → logits of a model that `fuse` accepted.

    `compute` (see above) and `kv_dtype`, the type of the KV cache's buffers, may be set between calls.
    """

    compute = "exact"
    kv_dtype = mx.float32

    def __init__(self, native, model):
        layers, ends = list(model.layer_parts()), model.end_parts()
        rope, size = layers[0].rope, layers[0].rope.size
        self._native, self._model = native, model
        self._modes = native_modes(native)
        norms = [ends.norm, *(norm for layer in layers for norm in layer.norms if norm is not None)]
        modules = {id(module): module for module in norms + [matrix.module for matrix in _matrices(model)]}  # each once
        self._given = [(m, name, array) for m in modules.values() for name, array in m.parameters().items()]
        self._told = False
        self._groups = [layer.groups for layer in layers]
        self._size = size
        self._decoder = native.Decoder(
            dim=ends.norm.weight.shape[0],
            head_dim=size,
            eps=ends.norm.eps,
            rope={"frequencies": rope.frequencies, "magnitude": rope.magnitude},
            norm=ends.norm.weight,
            embedding=ends.embedding.matrix(),
            head=ends.head.matrix(),
        )
        for layer in layers:
            self._decoder.add_layer(**layer.native())

    def applies(self, cache: KVCache) -> bool:
        """Whether this call can be fused: an ordinary cache, a CPU, not in training, the weights that were given."""
        ordinary = type(cache) is KVCache and all(type(layer) is LayerCache for layer in cache.layers)
        return ordinary and kernels.device() == "cpu" and not self._model.training and self._current()

    def _current(self) -> bool:
        """Whether the model still has the arrays that the native decoder holds; updates and gradients replace them."""
        current = all(module.get(name) is array for module, name, array in self._given)
        if not current and not self._told:
            notices.warning("weights have changed since the model was fused: it computes operator by operator, slower")
            self._told = True
        return current

    def __call__(self, tokens: mx.array, cache: KVCache, all_rows: bool) -> mx.array:
        """Token ids (B, S) → logits (B, S, V), or (B, 1, V) of the last position; float32."""
        return self._run(self._native.forward, tokens, cache, cache.layers, all_rows)[0]

    def layer_states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int]
    ) -> tuple[list[mx.array], list[tuple[mx.array, mx.array]]]:
        """As `DecoderModel.layer_states`, float32."""
        rows, *heads = self._run(self._native.read, tokens, cache, cache.layers[:-1], list(inputs), list(pairs))
        keys, values = (
            [
                each.reshape(*each.shape[:2], self._groups[i], self._size).transpose(0, 2, 1, 3)
                for each, i in zip(given, pairs, strict=True)
            ]
            for given in heads
        )
        return rows, list(zip(keys, values, strict=True))

    def _run(self, native: Callable, tokens: mx.array, cache: KVCache, layers: list[LayerCache], *what) -> list:
        """What a native pass gives beside the stores of `layers`, which it appends to; `what` it is asked for."""
        stores = self._stores(layers, *tokens.shape)
        *results, stores = native(self._decoder, tokens, stores, cache.length, *what, self._modes[self.compute])
        self._replace(layers, stores, tokens.shape[1])
        return results

    def append_kv(self, pairs: list[tuple[mx.array, mx.array]], cache: KVCache) -> None:
        """As `DecoderModel.append_kv`."""
        keys, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        batch, _, new, _ = keys[0].shape
        stores = self._stores(cache.layers, batch, new)
        self._replace(cache.layers, self._native.append(self._decoder, keys, values, stores, cache.length), new)

    def _stores(self, layers: list[LayerCache], batch: int, new: int) -> list[dict]:
        """The buffers of `layers` by name, with room for `new` tokens more."""
        stores = []
        for layer, groups in zip(layers, self._groups, strict=False):
            keys, values = layer.room(new, (batch, groups, self._size), self.kv_dtype)
            stores.append({"kind": "dense", "keys": keys, "values": values})
        return stores

    def _replace(self, layers: list[LayerCache], stores: list[dict], new: int) -> None:
        """Give `layers` what was made of their buffers."""
        for layer, store in zip(layers, stores, strict=True):
            layer.replace(store["keys"], store["values"], new)


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
    norms = [norm for part in layers for norm in part.norms]
    return {norm.eps for norm in norms if norm is not None} <= {ends.norm.eps} and len(
        {part.rope.size for part in layers}
    ) == 1


def set_precision(model, compute: str, kv_dtype: str) -> None:
    """Choose the arithmetic of the fused form and the type of its KV cache; refuses other than the defaults of a
    model that has no fused form."""
    if compute not in COMPUTE:
        raise MlxeffError(f"compute: wanted one of {', '.join(COMPUTE)}, got {compute!r}")
    if kv_dtype not in KV_DTYPES:
        raise MlxeffError(f"KV dtype: wanted one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    fused = getattr(model, "_fused", None)
    if fused is not None:
        fused.compute, fused.kv_dtype = compute, KV_DTYPES[kv_dtype]
    elif (compute, kv_dtype) != ("exact", "float32"):
        raise MlxeffError(f"compute {compute}, KV dtype {kv_dtype}: only the native CPU kernels have them (see doctor)")
