"""The cache of one model, `KVCache`: one layer cache for each layer, whatever their kind."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..errors import MlxeffError, notices
from ..running import EXACT, FULL_VIEW, RunOptions, Tally
from . import file
from .layer import KINDS, LayerCache, LayerShape
from .protocols import Layer


class KVCache:
    """The cache of one model: one layer cache for each layer, all of the same length. It has the methods of `Cache`."""

    drops = True  # see `Cache.drops`

    def __init__(self, layers: Sequence[Layer], kind: str | None = None):
        self.layers, self.kind, self.tally = list(layers), kind, Tally()
        self.shapes: list[LayerShape] | None = None  # of the layers; None where they are not known
        self.dtype: str | None = None  # the type that the model computes keys in; None where it is not known
        self.checked = 0  # tokens for which `DecoderModel.require_room` has found memory
        self._reserved = 0  # tokens that the next growth provides for

    @classmethod
    def of(cls, shapes: Sequence[LayerShape], kind: str | None, dtype: str | None = None) -> "KVCache":
        """A new cache of `kind` for layers of these shapes; None: keys and values are stored as the model computes
        them, in the type called `dtype`. Raises MlxeffError for a kind that is not in KINDS."""
        if kind is not None and kind not in KINDS:
            raise MlxeffError(f"KV cache: wanted one of {', '.join(KINDS)}, got {kind!r}")
        cache = cls([LayerCache(shape.window) if kind is None else KINDS[kind](shape) for shape in shapes], kind)
        cache.shapes, cache.dtype = list(shapes), dtype
        for other in {layer.stored_as for layer in cache.layers if kind} - {kind}:
            count = sum(layer.stored_as == other for layer in cache.layers)
            notices.info("KV cache %s: %d of %d layers are stored as %s", kind, count, len(cache.layers), other)
        return cache

    @property
    def length(self) -> int:
        """Cached tokens."""
        return self.layers[0].length

    def is_trimmable(self) -> bool:
        """True, for mlx-lm's `can_trim_prompt_cache`: tokens at the end can be dropped."""
        return True

    def trim(self, count: int) -> int:
        """Drop the last `count` tokens, for mlx-lm's `trim_prompt_cache`; returns how many were dropped."""
        before = self.length
        return before - self.rewind(max(0, before - count))

    @property
    def state(self) -> None:
        """Raises MlxeffError, for mlx-lm's `save_prompt_cache`: see `save`."""
        raise MlxeffError("KV cache: mlx-lm cannot save it: use cache.save(path, tokens, fingerprint)")

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(layer.nbytes for layer in self.layers)

    def read_bytes(self, view: str = FULL_VIEW) -> int:
        """Bytes that attention reads for a token in a view. Sliding windows are not taken into account."""
        return sum(layer.read_bytes(view) for layer in self.layers)

    @property
    def stored_as(self) -> str | None:
        """The distinct numeric types of the layers' caches, joined by " + "; None until one is known."""
        return " + ".join(dict.fromkeys(filter(None, (layer.stored_as for layer in self.layers)))) or None

    def rewind(self, length: int) -> int:
        """See `Cache.rewind`. All layers keep as many tokens as the layer that keeps the fewest."""
        if not 0 <= length <= self.length:
            raise MlxeffError(f"KV cache: wanted to rewind to 0 to {self.length} tokens, got {length}")
        # A layer that kept fewer tokens shortens the others, and rewinding those may in turn keep fewer still.
        while (kept := min(layer.rewind(length) for layer in self.layers)) < length:
            length = kept
        return length

    @property
    def rewinds_exactly(self) -> bool:
        """Whether `rewind` always keeps exactly the wanted number of tokens."""
        return all(layer.rewinds_exactly for layer in self.layers)

    @property
    def views(self) -> tuple[str, ...]:
        """See `Cache.views`."""
        return tuple(view for view in self.layers[0].views if all(view in layer.views for layer in self.layers))

    @property
    def together(self) -> int | None:
        """See `Cache.together`."""
        return min((layer.together for layer in self.layers if layer.together is not None), default=None)

    @contextlib.contextmanager
    def rewound(self, length: int) -> Iterator[None]:
        """Inside the block the cache consists of its first `length` tokens. At the end of the block it has its former
        length again: tokens appended inside have overwritten the former ones at their positions, all other former
        tokens are intact. Only for layers whose `rewind` keeps exactly the wanted number of tokens."""
        before = self.length
        self.rewind(length)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.length = before

    @property
    def capacity(self) -> int:
        """Tokens for which the buffers have room."""
        return max(layer.capacity for layer in self.layers)

    def grown(self, new: int) -> int:
        """The capacity after `new` more tokens."""
        wanted = max(self.length + new, self._reserved)
        return max(self.capacity, -(-wanted // LayerCache.step) * LayerCache.step)

    def reserve(self, tokens: int) -> None:
        """See `Cache.reserve`."""
        self._reserved = self.length + tokens
        for layer in self.layers:
            layer.reserve(tokens)

    def arrays(self) -> list[mx.array]:
        """See `Cache.arrays`."""
        return [buffer for layer in self.layers for buffer in layer.arrays()]

    def save(self, path: str | os.PathLike, tokens: Sequence[int], model: str) -> None:
        """Write the cache and the ids of its tokens to a file, see `file.save`."""
        file.save(self, path, tokens, model)

    def restore(self, path: str | os.PathLike, model: str, options: RunOptions = EXACT) -> list[int]:
        """Fill this cache, which must be empty, from a file; returns the ids of its tokens, see `file.restore`."""
        return file.restore(self, path, model, options)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two token lists."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:  # many times as fast as the loop
        return shorter
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
