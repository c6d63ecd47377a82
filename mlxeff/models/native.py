"""The executor that runs a decoder's whole forward pass as one native CPU call (`cpu/decoder/`).

It is made from the parts by which a model describes itself (`parts`), and applies on a CPU where every matrix is dense,
affine-quantised or of a module that has `native_arrays` (seed-encoded ones), every feed-forward of a kind of
FEED_FORWARDS, and every layer of the cache of a storage of STORES. Activations are float32; `RunOptions.compute` says
how the products treat them:

exact   float32 products: equals the plain executor in float32 to rounding (the default).
bf16    operands of the large products are rounded to bfloat16 where the CPU multiplies it faster (AMX); else as exact.
int8    as bf16, and activations that meet affine-quantised weights are rounded to int8, one scale for each group of
        weights. So are those of up to eight tokens that meet seed-encoded weights, one scale for each block, where the
        CPU has AVX-512 VBMI; the states of the weights' register are rounded to 8 bits there.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from .. import kernels
from ..cache import KVCache, NativeLayer
from ..errors import notices
from ..ops import native_modes
from ..running import Ran, RunOptions
from .parts import matrices
from .plain import KvPairs

STORES = ("dense",)  # `storage` of the cache's layers
FEED_FORWARDS = ("gated",)  # `kind` of the feed-forwards


class Native:
    """Runs a model that `native_executor` accepted."""

    def __init__(self, native, model):
        layers, ends = list(model.layer_parts()), model.end_parts()
        rope = layers[0].attention.rope
        self._native, self._model, self._size = native, model, rope.size
        self._modes = native_modes(native)
        norms = [ends.norm, *(norm for layer in layers for norm in layer.norms.values() if norm is not None)]
        modules = {id(module): module for module in norms + [matrix.module for matrix in matrices(model)]}  # each once
        self._given = [(m, name, array) for m in modules.values() for name, array in m.parameters().items()]
        self._told = False
        self._groups = [layer.attention.groups for layer in layers]
        self._decoder = native.Decoder(
            ends.norm.weight.shape[0], rope.size, ends.norm.eps, rope.frequencies, rope.magnitude, ends.norm.weight,
            ends.embedding.arrays(), ends.head.arrays(),
        )  # fmt: skip
        for layer in layers:
            attention = layer.attention
            self._decoder.add_layer(
                *(None if norm is None else norm.weight for norm in layer.norms.values()),
                matrices=[matrix.arrays() for matrix in layer.matrices],
                heads=attention.heads,
                groups=attention.groups,
                window=attention.window or 0,
            )

    @property
    def backend(self) -> str:
        return f"native {self._native.isa()}"

    def applies(self, cache: KVCache) -> bool:
        """Whether a call can run here: a CPU, known storage, not in training, the weights that were given."""
        known = all(getattr(layer, "storage", None) in STORES for layer in cache.layers)
        return known and kernels.device() == "cpu" and not self._model.training and self._current()

    def _current(self) -> bool:
        """Whether the model still has the arrays that the native decoder holds; updates and gradients replace them."""
        current = all(module.get(name) is array for module, name, array in self._given)
        if not current and not self._told:
            notices.warning("weights have changed since the model was loaded: it computes operator by operator, slower")
            self._told = True
        return current

    def forward(self, tokens: mx.array, cache: KVCache, options: RunOptions, last: bool) -> mx.array:
        """Token ids (B, S) → logits (B, S, V), or (B, V) of the last position; float32."""
        logits = self._run(self._native.forward, tokens, cache, cache.layers, options, not last)[0]
        return logits[:, 0] if last else logits

    def states(
        self, tokens: mx.array, cache: KVCache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions
    ) -> tuple[list[mx.array], KvPairs]:
        """As `DecoderModel.layer_states`, float32."""
        rows = self._run(self._native.read, tokens, cache, cache.layers[:-1], options, list(inputs), list(pairs))
        heads = [
            each.reshape(*each.shape[:2], self._groups[i], self._size).transpose(0, 2, 1, 3)
            for each, i in zip(rows[len(inputs) :], [*pairs, *pairs], strict=True)
        ]
        return rows[: len(inputs)], list(zip(heads[: len(pairs)], heads[len(pairs) :], strict=True))

    def append(self, pairs: KvPairs, cache: KVCache, _options: RunOptions) -> None:
        """As `DecoderModel.append_kv`."""
        keys, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        batch, _, new, _ = keys[0].shape
        buffers = self._room(cache.layers, batch, new)
        self._replace(cache.layers, self._native.append(self._decoder, keys, values, *buffers, cache.length), new)

    def _run(
        self, native: Callable, tokens: mx.array, cache: KVCache, layers: list[NativeLayer], options: RunOptions, *what
    ) -> list:
        """What a native pass gives beside the buffers of `layers`, which it appends to; `what` it is asked for."""
        buffers, mode = self._room(layers, *tokens.shape), self._modes[options.compute]
        outputs = native(self._decoder, tokens, *buffers, cache.length, *what, mode)
        results = len(outputs) - 2 * len(layers)
        self._replace(layers, outputs[results:], tokens.shape[1])
        cache.tally[Ran(self.backend, options.compute)] += tokens.shape[1]
        return outputs[:results]

    def _room(self, layers: list[NativeLayer], batch: int, new: int) -> tuple[list[mx.array], list[mx.array]]:
        """The buffers of keys and of values, with room for `new` tokens more."""
        groups = self._groups[: len(layers)]
        shapes = [(batch, each, self._size) for each in groups]
        found = [layer.room(new, shape, mx.float32) for layer, shape in zip(layers, shapes, strict=True)]
        return [buffers["keys"] for buffers in found], [buffers["values"] for buffers in found]

    def _replace(self, layers: list[NativeLayer], written: list[mx.array], new: int) -> None:
        """Give `layers` what was made of their buffers: those of keys, then those of values."""
        for layer, keys, values in zip(layers, written[: len(layers)], written[len(layers) :], strict=True):
            layer.replace({"keys": keys, "values": values}, new)


def native_executor(model) -> Native | None:
    """The native executor of `model`, None where the native kernels are missing or do not know all of it."""
    native, _ = kernels.native()
    if native is None or not all(matrix.native for matrix in matrices(model)) or not _known(model):
        return None
    return Native(native, model)


def _known(model) -> bool:
    """Feed-forwards of a known kind, one norm epsilon, one head size."""
    ends, layers = model.end_parts(), list(model.layer_parts())
    if any(part.feed_forward is None or part.feed_forward.kind not in FEED_FORWARDS for part in layers):
        return False
    norms = [norm for part in layers for norm in part.norms.values()]
    sizes = {part.attention.rope.size for part in layers}
    return {norm.eps for norm in norms if norm is not None} <= {ends.norm.eps} and len(sizes) == 1
