"""The KV cache: the keys and values of the tokens that a model has processed.

Protocols for the cache of one layer (`Layer`) and of a whole model (`Cache`), and their members: `LayerCache` keeps
every key and value of a layer in one float type, `KVCache` has one layer cache for each layer of a model. Attention is
computed here: a model passes rotated queries, keys and values and gets the attention output, so the causal mask and the
storage format are private to the cache. This module knows nothing about models or text.

Shapes: B batch, H query heads, G KV heads, S new tokens, T cached tokens, E head size.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from .checkpoint import save_arrays
from .errors import MlxeffError
from .ops import attention
from .running import EXACT, FULL_VIEW, RunOptions, Tally

FORMAT_VERSION = "1"  # of the cache files that `KVCache.save` writes


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

    storage: str  # name of the format of `saved`; the native CPU decoder reads some formats directly (models/native.py)

    @property
    def stored_as(self) -> str | None:
        """The numeric type of the stored keys and values, for display; None until it is known."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""


class NativeLayer(Layer, Protocol):
    """A layer cache whose buffers the native CPU decoder reads and writes."""

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> dict[str, mx.array]:
        """The buffers by name, grown if needed so that `new` more tokens fit. `shape` is (B, G, E); `dtype` is the type
        of new buffers where the cache was made without one."""

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """Replace the buffers that `room` gave by `buffers`, which contain `new` more tokens."""


class Cache(Protocol):
    """The cache of a whole model, as the decode loop, generation and the measuring tools use it."""

    kind: str | None  # its name in KINDS; None where the numeric type follows from what computes the model
    tally: Tally  # counts which backend and arithmetic computed the tokens that were appended

    @property
    def length(self) -> int:
        """Cached tokens."""

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


class LayerCache:
    """Keys and values of one layer in two buffers (B, G, capacity, E). It has the methods of `NativeLayer`.

    `window` is the sliding window in tokens, None for full attention. `dtype` is the type of the buffers; None takes
    the type of the first keys. `heads` are KV heads and head size (G, E), which `restore` compares; None: any.
    Attention is computed in the type of the queries.
    """

    step = 256  # tokens; the capacity of the buffers is a multiple of this
    storage = "dense"

    def __init__(self, window: int | None = None, dtype: mx.Dtype | None = None, heads: tuple[int, int] | None = None):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0  # cached tokens; the capacity of the buffers may be larger
        self.window, self.dtype, self.heads = window, dtype, heads
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

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> dict[str, mx.array]:
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
        if set(arrays) != {"keys", "values"} or arrays["keys"].dtype != arrays["values"].dtype:
            raise ValueError("keys and values of one type")
        for array in arrays.values():
            if array.ndim != 4 or array.shape[2] != tokens or array.shape[0] != 1:
                raise ValueError(f"keys and values of {tokens} tokens")
            if self.heads is not None and self.heads != (array.shape[1], array.shape[3]):
                raise ValueError(f"{self.heads[0]} heads of {self.heads[1]}")
            if array.dtype not in FLOAT_KINDS.values():
                raise ValueError("keys and values that are floats")
        self.keys, self.values, self.length = arrays["keys"], arrays["values"], tokens

    def arrays(self) -> list[mx.array]:
        """The two buffers, or nothing before the first token."""
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def stored_as(self) -> str | None:
        """The type of the buffers, or of those to be allocated; None where the first keys will decide."""
        dtype = self.dtype if self.keys is None else self.keys.dtype
        return dtype and str(dtype).removeprefix("mlx.core.")

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

    @property
    def heads(self) -> tuple[int, int]:
        """(G, E)."""
        return self.groups, self.head_size


LayerMaker = Callable[[LayerShape], Layer]
FLOAT_KINDS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Kind of cache → function that makes the cache of one layer. `assembly.techniques` adds the kinds of the techniques.
KINDS: dict[str, LayerMaker] = {
    name: lambda shape, dtype=dtype: LayerCache(shape.window, dtype, shape.heads) for name, dtype in FLOAT_KINDS.items()
}


class KVCache:
    """The cache of one model: one layer cache for each layer, all of the same length. It has the methods of `Cache`."""

    views: tuple[str, ...] = (FULL_VIEW,)  # the values of `RunOptions.view` that this cache can serve

    def __init__(self, layers: Sequence[Layer], kind: str | None = None):
        self.layers, self.kind, self.tally = list(layers), kind, Tally()

    @classmethod
    def of(cls, shapes: Sequence[LayerShape], kind: str) -> "KVCache":
        """A new cache of `kind` for layers of these shapes. Raises MlxeffError for a kind that is not in KINDS."""
        if kind not in KINDS:
            raise MlxeffError(f"KV cache: wanted one of {', '.join(KINDS)}, got {kind!r}")
        return cls([KINDS[kind](shape) for shape in shapes], kind)

    @property
    def length(self) -> int:
        """Cached tokens."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(layer.nbytes for layer in self.layers)

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

    def reserve(self, tokens: int) -> None:
        """See `Cache.reserve`."""
        for layer in self.layers:
            layer.reserve(tokens)

    def arrays(self) -> list[mx.array]:
        """See `Cache.arrays`."""
        return [buffer for layer in self.layers for buffer in layer.arrays()]

    def save(self, path: str | os.PathLike, tokens: Sequence[int], model: str) -> None:
        """Write the cache and the ids of its tokens to the safetensors file `path`.

        `model` is the fingerprint of the model, which `restore` compares. An existing file is replaced only by a
        complete one. Raises MlxeffError for an empty cache, for a number of token ids other than `length`, and for a
        file that cannot be written.
        """
        if self.length == 0 or len(tokens) != self.length:
            raise MlxeffError(f"{path}: cannot save a KV cache of {self.length} tokens with {len(tokens)} token ids")
        arrays = {"tokens": mx.array(list(tokens), dtype=mx.uint32)}
        for index, layer in enumerate(self.layers):
            arrays |= {f"{index}.{name}": value for name, value in layer.saved().items()}
        metadata = {"format": "mlxeff-kv-cache", "version": FORMAT_VERSION, "model": model, "storage": self._storage}
        save_arrays(Path(path), arrays, metadata, "the prompt cache")

    def restore(self, path: str | os.PathLike, model: str) -> list[int]:
        """Fill this cache, which must be empty, from a file that `save` wrote; returns the ids of its tokens.

        Raises MlxeffError for a file of another model (fingerprint `model`), of other layers or of another storage
        format, and for a damaged or foreign file. The cache is then still empty.
        """
        arrays, storage = _read(Path(path), model)
        if storage != self._storage:
            raise MlxeffError(f"{path}: wanted a KV cache stored as {self._storage}, got {storage}")
        ids = arrays.pop("tokens", mx.zeros((0,), mx.uint32))
        if ids.ndim != 1 or not mx.issubdtype(ids.dtype, mx.integer):
            raise MlxeffError(f"{path}: wanted token ids (T), got {ids.dtype} {ids.shape}")
        tokens = ids.tolist()
        parts: dict[str, dict[str, mx.array]] = {}
        for name, value in arrays.items():
            index, _, part = name.partition(".")
            parts.setdefault(index, {})[part] = value
        try:
            if set(parts) != {str(index) for index in range(len(self.layers))}:
                raise ValueError
            for index, layer in enumerate(self.layers):
                layer.restore(parts[str(index)], len(tokens))
        except ValueError:
            self.rewind(0)
            layers = len(self.layers)
            raise MlxeffError(
                f"{path}: wanted a KV cache of {layers} layers for its {len(tokens)} tokens, got others"
            ) from None
        return tokens

    @property
    def _storage(self) -> str:
        """The names of the layers' storage formats, joined, for the metadata of a cache file."""
        return "+".join(dict.fromkeys(layer.storage for layer in self.layers))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two token lists."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _read(path: Path, model: str) -> tuple[dict[str, mx.array], str]:
    """Read a cache file of the model with fingerprint `model`: its arrays by name, and their storage format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise MlxeffError(f"{path}: wanted a prompt cache, got a damaged or foreign file ({error})") from error
    if metadata.get("format") != "mlxeff-kv-cache" or metadata.get("version") != FORMAT_VERSION:
        raise MlxeffError(f"{path}: wanted a prompt cache of format version {FORMAT_VERSION}, got {metadata}")
    if metadata.get("model") != model:
        raise MlxeffError(f"{path}: wanted a prompt cache of this model ({model}), got one of {metadata.get('model')}")
    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise MlxeffError(f"{path}: wanted a prompt cache, got a damaged or foreign file ({error})") from error
    return arrays, metadata.get("storage", LayerCache.storage)
