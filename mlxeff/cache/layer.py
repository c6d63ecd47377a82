"""The plain cache of one layer, `LayerCache`, which keeps every key and value in one float type; and the table of
kinds, to which techniques add theirs.

Shapes: B batch, H query heads, G KV heads, S new tokens, T cached tokens, E head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..ops import attention
from ..running import EXACT, FULL_VIEW, RunOptions
from .protocols import Layer


class LayerCache:
    """Keys and values of one layer in two buffers (B, G, capacity, E). It has the methods of `NativeLayer`.

    `window` is the sliding window in tokens, None for full attention. `dtype` is the type of the buffers; None takes
    the type of the first keys. Attention is computed in the type of the queries.
    """

    step = 256  # tokens; the capacity of the buffers is a multiple of this
    storage = store = "dense"
    views = (FULL_VIEW,)
    rewinds_exactly, together = True, None

    def __init__(self, window: int | None = None, dtype: mx.Dtype | None = None):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0  # cached tokens; the capacity of the buffers may be larger
        self.window, self.dtype = window, dtype
        self._reserved = 0  # tokens that the next growth of the buffers has to provide for

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, _options: RunOptions = EXACT
    ) -> mx.array:
        """See `Layer.attend`. No option changes the result."""
        all_keys, all_values = self.append(keys, values)
        if self.length == keys.shape[2] and all_keys.dtype == keys.dtype:
            # The cache was empty, so the new keys and values are all there are. Attention reads them directly, which
            # spares the forward pass and the gradients the detour through the buffers.
            all_keys, all_values = keys, values
        all_keys, all_values = all_keys.astype(queries.dtype), all_values.astype(queries.dtype)
        return attention(queries, all_keys, all_values, scale, self.window)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store keys and values (B, G, S, E) of new tokens; returns those of all cached tokens, (B, G, T, E)."""
        batch, heads, new, size = keys.shape
        start, end = self.length, self.length + new
        self.room(new, (batch, heads, size), keys.dtype)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.state()

    def room(
        self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype, _view: str = FULL_VIEW
    ) -> dict[str, mx.array]:
        """See `NativeLayer.room`. The buffers are called "keys" and "values"."""
        if self.keys is None or self.length + new > self.keys.shape[2]:
            self._grow(self.length + new, shape, self.dtype or dtype)
        return {"keys": self.keys, "values": self.values}

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """See `NativeLayer.replace`."""
        self.keys, self.values, self.length = buffers["keys"], buffers["values"], self.length + new

    def state(self) -> tuple[mx.array, mx.array]:
        """The keys and values of all cached tokens, (B, G, T, E)."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self, tokens: int) -> None:
        """Make the next growth of the buffers large enough for `tokens` more tokens."""
        self._reserved = self.length + tokens

    def rewind(self, length: int) -> int:
        """Drop all tokens after the first `length`; returns the number of tokens kept, always the wanted one."""
        self.length = min(self.length, length)
        return self.length

    def saved(self) -> dict[str, mx.array]:
        """See `Layer.saved`. The arrays are "keys" and "values", (B, G, T, E)."""
        return dict(zip(("keys", "values"), self.state(), strict=True))

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """See `Layer.restore`."""
        if set(arrays) != {"keys", "values"} or arrays["keys"].shape != arrays["values"].shape:
            raise ValueError(f"keys and values of {tokens} tokens")
        if arrays["keys"].dtype != arrays["values"].dtype:
            raise ValueError("keys and values of one type")
        for array in arrays.values():
            if array.ndim != 4 or array.shape[2] != tokens or array.shape[0] != 1:
                raise ValueError(f"keys and values of {tokens} tokens")
            if array.dtype not in FLOAT_KINDS.values():
                raise ValueError("keys and values that are floats")
        self.keys, self.values, self.length = arrays["keys"], arrays["values"], tokens

    @property
    def capacity(self) -> int:
        """Tokens for which the buffers have room."""
        return 0 if self.keys is None else self.keys.shape[2]

    def arrays(self) -> list[mx.array]:
        """The two buffers, or nothing before the first token."""
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def stored_as(self) -> str | None:
        """The type of the buffers, or of those to be allocated; None where the first keys will decide."""
        dtype = self.dtype if self.keys is None else self.keys.dtype
        return dtype and str(dtype).removeprefix("mlx.core.")

    def read_bytes(self, _view: str = FULL_VIEW) -> int:
        """Bytes of all cached tokens, which attention reads."""
        return sum(array.nbytes for array in self.state()) if self.length else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the two buffers, unused capacity included."""
        return sum(buffer.nbytes for buffer in self.arrays())

    def _grow(self, length: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
        """Replace the buffers by copies with a capacity of at least `length` tokens; `shape` is (B, G, E)."""
        batch, heads, size = shape
        capacity = -(-max(length, self._reserved) // self.step) * self.step

        def extend(old: mx.array | None) -> mx.array:
            if old is None:
                return mx.zeros((batch, heads, capacity, size), dtype)
            free = mx.zeros((batch, heads, capacity - self.length, size), old.dtype)
            return mx.concatenate([old[:, :, : self.length], free], axis=2)

        self.keys, self.values = extend(self.keys), extend(self.values)


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a decoder layer that its cache depends on."""

    groups: int  # G, KV heads
    head_size: int  # E
    window: int | None = None  # sliding window in tokens, None for full attention
    biased: bool = False  # whether the projection of the keys has a bias


LayerMaker = Callable[[LayerShape], Layer]
FLOAT_KINDS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Kind of cache → function that makes the cache of one layer. `assembly.techniques` adds the kinds of the techniques.
KINDS: dict[str, LayerMaker] = {
    name: lambda shape, dtype=dtype: LayerCache(shape.window, dtype) for name, dtype in FLOAT_KINDS.items()
}
