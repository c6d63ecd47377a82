"""The native executor: it computes a decoder's whole forward pass as one call of the CPU extension (`cpu/decoder/`).
The call computes at once, and writes into the buffers of the cache.

It is made from the description that a model gives of itself (`parts`). It applies on a CPU where every matrix is dense,
affine-quantised or in a module with the method `native_arrays` (seed-encoded matrices), and the native decoder knows
the kind of every feed-forward network and the storage format of every layer of the cache. Activations are float32.
`RunOptions.compute` is the arithmetic of the matrix products:

exact   float32 (the default). The results are those of the plain executor in float32, up to rounding.
bf16    The operands of large products are rounded to bfloat16 where the CPU multiplies that type faster (AMX);
        otherwise as exact.
int8    As bf16, and the activations in products with affine-quantised weights are rounded to int8, with one scale for
        each quantisation group. In products with seed-encoded weights and at most eight tokens, the activations are
        rounded to int8 too, with one scale for each block, and the weights' register states to 8 bits; this needs
        AVX-512 VBMI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import mlx.core as mx

from .. import kernels
from ..cache import KVCache, NativeLayer
from ..errors import notices
from ..ops import native_modes
from ..running import FULL_VIEW, Ran, RunOptions
from .parts import matrices
from .plain import KvPairs

if TYPE_CHECKING:
    from .decoder import DecoderModel


class Native:
    """Computes the calls of a model that `native_executor` accepted, see `decoder.Executor`."""

    def __init__(self, native: ModuleType, model: DecoderModel):
        layers, ends = list(model.layer_parts()), model.end_parts()
        rope = layers[0].attention.rope
        self._native, self._model, self._size = native, model, rope.size
        self._modes = native_modes(native)
        norms = [ends.norm, *(norm for layer in layers for norm in layer.norms.values() if norm is not None)]
        modules = {id(module): module for module in norms + [matrix.module for matrix in matrices(model)]}
        # The arrays that the native decoder refers to: (module, name of the parameter, array).
        self._weights = [(m, name, array) for m in modules.values() for name, array in m.parameters().items()]
        self._warned = False  # whether a notice said that weights have changed
        self._groups = [layer.attention.groups for layer in layers]
        self._decoder = native.Decoder(
            dim=ends.norm.weight.shape[0],
            head_dim=rope.size,
            eps=ends.norm.eps,
            rope={"frequencies": rope.frequencies, "magnitude": rope.magnitude},
            norm=ends.norm.weight,
            embedding=ends.embedding.matrix(),
            head=ends.head.matrix(),
        )
        for layer in layers:
            self._decoder.add_layer(**layer.native())

    @property
    def backend(self) -> str:
        """Its name, as in `running.Ran`."""
        return f"native {self._native.isa()}"

    @property
    def usage(self) -> list[dict | None]:
        """Of each layer, what its feed-forward network has computed since the model was loaded: the "tokens" that took
        each expert and the "bytes" of weights read; None for a layer without experts."""
        return self._decoder.usage()

    def applies(self, cache: KVCache) -> bool:
        """Whether this executor can compute a call with `cache`: on a CPU, with known storage formats, not in training,
        and with the weights that the native decoder was made with."""
        known = all(getattr(layer, "store", None) in self._native.store_kinds for layer in cache.layers)
        return known and kernels.device() == "cpu" and not self._model.training and self._current()

    def _current(self) -> bool:
        """Whether the model still has the arrays that the native decoder refers to. An optimiser's update and
        `mx.value_and_grad` put others in their place."""
        current = self._native.holds(self._weights)
        if not current and not self._warned:
            notices.warning("weights have changed since the model was loaded: it computes operator by operator, slower")
            self._warned = True
        return current

    def forward(self, tokens: mx.array, cache: KVCache, options: RunOptions, last: bool) -> mx.array:
        """See `decoder.Executor.forward`; logits are float32."""
        return self._run(self._native.forward, tokens, cache, cache.layers, options, not last)

    def states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions
    ) -> tuple[list[mx.array], KvPairs]:
        """See `DecoderModel.layer_states`; all arrays are float32."""
        chosen = list(inputs), list(pairs)
        rows, keys, values = self._run(self._native.read, tokens, cache, cache.layers[:-1], options, *chosen)

        def heads(of_layers: list[mx.array]) -> list[mx.array]:
            """Rows (B, S, G·E) of each of the layers `pairs` → (B, G, S, E)."""
            return [
                row.reshape(*row.shape[:2], self._groups[i], self._size).transpose(0, 2, 1, 3)
                for row, i in zip(of_layers, pairs, strict=True)
            ]

        return rows, list(zip(heads(keys), heads(values), strict=True))

    def append(self, pairs: KvPairs, cache: KVCache, _options: RunOptions) -> None:
        """See `DecoderModel.append_kv`."""
        keys, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        batch, _, new, _ = keys[0].shape
        stores = self._stores(cache.layers, batch, new, FULL_VIEW)
        self._native.append(self._decoder, keys, values, stores, cache.length)
        self._replace(cache.layers, stores, new)

    def _run(
        self, native: Callable, tokens: mx.array, cache: KVCache, layers: list[NativeLayer], options: RunOptions, *what
    ) -> mx.array | tuple[list[mx.array], ...]:
        """Call a function of the native decoder that appends to the caches `layers`. `what` are its arguments after the
        length of the cache. Returns its results, which are evaluated."""
        stores, mode = self._stores(layers, *tokens.shape, options.view), self._modes[options.compute]
        results = native(self._decoder, tokens, stores, cache.length, *what, mode, dial=self._dial(options))
        self._replace(layers, stores, tokens.shape[1])
        cache.tally[Ran(self.backend, options.compute, options.fraction)] += tokens.shape[1]
        return results

    def _dial(self, options: RunOptions) -> float | None:
        """What the routers of dynamic feed-forward networks weigh quality and cost by; None where all tokens take all
        neurons."""
        if options.fraction == 1:
            return None
        return self._model.layers[0].feed_forward.fractions.dial(options.fraction)

    def _stores(self, layers: list[NativeLayer], batch: int, new: int, view: str) -> list[dict]:
        """The kind and the buffers of each layer by name, with room for `new` more tokens, to be read in `view`."""
        shapes = [(batch, groups, self._size) for groups in self._groups[: len(layers)]]
        return [
            {"kind": layer.store, **layer.room(new, shape, mx.float32, view)}
            for layer, shape in zip(layers, shapes, strict=True)
        ]

    def _replace(self, layers: list[NativeLayer], stores: list[dict], new: int) -> None:
        """Replace the buffers of `layers` by those of `stores`, which contain `new` more tokens."""
        for layer, store in zip(layers, stores, strict=True):
            layer.replace(store, new)


def native_executor(model: DecoderModel) -> Native | None:
    """The native executor of `model`; None where the native kernels are missing or do not support the whole model."""
    native, _ = kernels.native()
    if (
        native is None
        or not all(matrix.native for matrix in matrices(model))
        or not _known(model, native.feed_forward_kinds)
    ):
        return None
    return Native(native, model)


def _known(model: DecoderModel, known_kinds: list[str]) -> bool:
    """Whether the native decoder can compute the model: feed-forward networks of a known kind, and all layers with the
    same epsilon of the norms and the same head size."""
    ends, layers = model.end_parts(), list(model.layer_parts())
    if any(part.feed_forward is None or part.feed_forward.kind not in known_kinds for part in layers):
        return False
    norms = [norm for part in layers for norm in part.norms.values()]
    sizes = {part.attention.rope.size for part in layers}
    return {norm.eps for norm in norms if norm is not None} <= {ends.norm.eps} and len(sizes) == 1
