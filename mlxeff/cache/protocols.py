"""What a KV cache has to offer: the cache of one layer to the model (`Layer`), and to the native CPU decoder
(`NativeLayer`); the cache of a whole model to the decode loop, to generation and to the measuring tools (`Cache`).

Shapes: B batch, H query heads, G KV heads, S new tokens, T cached tokens, E head size.
"""

from typing import Protocol

import mlx.core as mx

from ..running import RunOptions, Tally


class Layer(Protocol):
    """The cache of one decoder layer."""

    length: int  # cached tokens
    window: int | None  # sliding-window attention: a query sees the last `window` tokens only; None for all tokens

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, options: RunOptions
    ) -> mx.array:
        """Append `keys` and `values` (B, G, S, E), then compute causal attention of `queries` (B, H, S, E) to all
        cached tokens; returns the attention output (B, H, S, E)."""

    def append(self, keys: mx.array, values: mx.array) -> object:
        """Store keys and values (B, G, S, E) of the tokens that follow the cached ones. Models ignore the result."""

    def rewind(self, length: int) -> int:
        """Drop all tokens after the first `length`. Returns the number of tokens kept: `length`, or fewer where the
        storage can only go back to an earlier token."""

    def reserve(self, tokens: int) -> None:
        """Announce that `tokens` more tokens will follow, so that their memory is allocated at once."""

    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate after a prefill chunk."""

    def saved(self) -> dict[str, mx.array]:
        """The arrays to write to a file, by name: the content of the cache without its unused capacity."""

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """Take over `arrays` that `saved` gave for `tokens` tokens. Raises ValueError for any other arrays."""

    storage: str  # name of the format of `saved`
    views: tuple[str, ...]  # the values of `RunOptions.view` that it can serve
    rewinds_exactly: bool  # whether `rewind` always keeps exactly the wanted number of tokens
    together: int | None  # see `Cache.together`
    capacity: int  # tokens for which the buffers have room; they grow by multiples of `LayerCache.step`

    @property
    def stored_as(self) -> str | None:
        """The numeric type of the stored keys and values, for display; None until it is known."""

    def read_bytes(self, view: str) -> int:
        """Bytes of the cached tokens that attention reads in a view."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""


class NativeLayer(Layer, Protocol):
    """A layer cache whose buffers the native CPU decoder reads and writes."""

    store: str  # name of the kind of store in the native decoder (cpu/python/kv_stores.h)

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype, view: str) -> dict[str, mx.array | int]:
        """The buffers by name, grown if needed so that `new` more tokens fit, and the integers that the store needs to
        read them in this `view`. `shape` is (B, G, E); `dtype` is the type of new buffers where the cache was made
        without one."""

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """Replace the buffers that `room` gave by `buffers`, which contain `new` more tokens."""


class Cache(Protocol):
    """The cache of a whole model, as the decode loop, generation and the measuring tools use it."""

    kind: str | None  # its name in KINDS; None where the numeric type follows from what computes the model
    views: tuple[str, ...]  # the values of `RunOptions.view` that it can serve
    drops: bool  # whether `rewind` can drop the newest tokens, however many were cached
    together: int | None  # most tokens of one pass that give each the same result as alone; None: any number do
    tally: Tally  # counts which backend and arithmetic computed the tokens that were appended

    @property
    def length(self) -> int:
        """Cached tokens."""

    def read_bytes(self, view: str) -> int:
        """Bytes of the cached tokens that attention reads in a view."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""

    @property
    def stored_as(self) -> str | None:
        """The numeric type of the stored keys and values, for display; None where it is not known."""

    def rewind(self, length: int) -> int:
        """Drop all tokens after the first `length`. Returns the number of tokens kept: `length`, or fewer where the
        storage can only go back to an earlier token (the caller then computes the missing ones again), or all of them,
        with nothing changed, where tokens cannot be dropped. Raises MlxeffError unless 0 ≤ length ≤ self.length."""

    def reserve(self, tokens: int) -> None:
        """Announce that `tokens` more tokens will follow, so that memory for a known prompt is allocated at once."""

    def arrays(self) -> list:
        """The arrays to evaluate after a prefill chunk."""
