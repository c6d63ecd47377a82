"""The KV cache: the keys and values of the tokens that a model has processed.

Protocols for the cache of one layer (`Layer`) and of a whole model (`Cache`), and their members: `LayerCache` keeps
every key and value of a layer in one float type, `KVCache` has one layer cache for each layer of a model. Attention is
computed here: a model passes rotated queries, keys and values and gets the attention output, so the causal mask and the
storage format are private to the cache. This module knows nothing about models or text.

Shapes: B batch, H query heads, G KV heads, S new tokens, T cached tokens, E head size.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from .checkpoint import save_arrays
from .errors import MlxeffError
from .names import readable_by_mlx
from .ops import attention
from .running import EXACT, FULL_VIEW, Ran, RunOptions, Tally

FORMAT_VERSION = "1"  # of the cache files that `KVCache.save` writes
GIVEN = "given"  # stands for an arithmetic in a cache file: keys and values that were appended without a forward pass


class OtherPrecisionError(MlxeffError):
    """A cache file holds keys and values of another numeric type or arithmetic than those that are wanted."""


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
    the type of the first keys. Attention is computed in the type of the queries.
    """

    step = 256  # tokens; the capacity of the buffers is a multiple of this
    storage = "dense"

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


LayerMaker = Callable[[LayerShape], Layer]
FLOAT_KINDS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Kind of cache → function that makes the cache of one layer. `assembly.techniques` adds the kinds of the techniques.
KINDS: dict[str, LayerMaker] = {
    name: lambda shape, dtype=dtype: LayerCache(shape.window, dtype) for name, dtype in FLOAT_KINDS.items()
}


class KVCache:
    """The cache of one model: one layer cache for each layer, all of the same length. It has the methods of `Cache`."""

    views: tuple[str, ...] = (FULL_VIEW,)  # the values of `RunOptions.view` that this cache can serve

    def __init__(self, layers: Sequence[Layer], kind: str | None = None):
        self.layers, self.kind, self.tally = list(layers), kind, Tally()
        self.shapes: list[LayerShape] | None = None  # of the layers; None where they are not known
        self.dtype: str | None = None  # the type that the model computes keys in; None where it is not known

    @classmethod
    def of(cls, shapes: Sequence[LayerShape], kind: str | None, dtype: str | None = None) -> "KVCache":
        """A new cache of `kind` for layers of these shapes; None: keys and values are stored as the model computes
        them, in the type called `dtype`. Raises MlxeffError for a kind that is not in KINDS."""
        if kind is not None and kind not in KINDS:
            raise MlxeffError(f"KV cache: wanted one of {', '.join(KINDS)}, got {kind!r}")
        cache = cls([LayerCache(shape.window) if kind is None else KINDS[kind](shape) for shape in shapes], kind)
        cache.shapes, cache.dtype = list(shapes), dtype
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
        if self.tally:
            metadata["computed"] = json.dumps(self._computed())
        save_arrays(Path(path), arrays, metadata, "the prompt cache")

    def restore(self, path: str | os.PathLike, model: str, options: RunOptions = EXACT) -> list[int]:
        """Fill this cache, which must be empty, from a file that `save` wrote; returns the ids of its tokens.

        Raises OtherPrecisionError for a file whose keys and values have another type than this cache stores, or were
        computed in another arithmetic than that of `options`: both would change the result of an exact run without a
        trace. A file that does not say what computed it counts as exact. Raises MlxeffError for a file of another model
        (fingerprint `model`), of other layers or of another storage format, and for a damaged or foreign file. The
        cache is then still empty.
        """
        arrays, metadata = _read(Path(path), model)
        storage = metadata.get("storage", LayerCache.storage)
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
            computed = _tally(metadata, len(tokens))
            self._check_heads(parts)
            self._check_precision(path, parts, computed, options)
            for index, layer in enumerate(self.layers):
                layer.restore(parts[str(index)], len(tokens))
        except OtherPrecisionError:
            raise
        except ValueError:
            self.rewind(0)
            layers = len(self.layers)
            raise MlxeffError(
                f"{path}: wanted a KV cache of {layers} layers for its {len(tokens)} tokens, got others"
            ) from None
        self.tally.update(computed)
        return tokens

    def _computed(self) -> list[list]:
        """What computed the cached tokens, for a cache file: [backend, arithmetic, number of tokens] of each."""
        rows = [[ran.backend, ran.compute, count] for ran, count in self.tally.items()]
        given = self.length - self.tally.total()
        return rows + ([["", GIVEN, given]] if given > 0 else [])

    def _check_heads(self, parts: dict[str, dict[str, mx.array]]) -> None:
        """Raises ValueError for dense arrays of other layers than those of this cache."""
        if self._storage != LayerCache.storage or self.shapes is None:
            return
        for index, shape in enumerate(self.shapes):
            for array in parts[str(index)].values():
                if array.ndim != 4 or (array.shape[1], array.shape[3]) != (shape.groups, shape.head_size):
                    raise ValueError(f"{shape.groups} heads of {shape.head_size}")

    def _check_precision(self, path: str | os.PathLike, parts: dict, computed: Tally, options: RunOptions) -> None:
        """Raises OtherPrecisionError where a file's arrays or what `computed` them is not what this cache stores or
        `options` compute."""
        wanted_type = (self.layers[0].stored_as if self.kind else self.dtype) or None
        types = [str(array.dtype).removeprefix("mlx.core.") for part in parts.values() for array in part.values()]
        got_type = " + ".join(dict.fromkeys(types))
        if wanted_type is None or self._storage != LayerCache.storage:
            wanted_type = got_type
        arithmetic = " + ".join(dict.fromkeys(ran.compute for ran in computed))
        if (got_type, arithmetic) != (wanted_type, options.compute):
            got = f"{arithmetic} {got_type}"
            raise OtherPrecisionError(f"{path}: wanted a KV cache of {options.compute} {wanted_type}, got {got}")

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


def _tally(metadata: dict[str, str], tokens: int) -> Tally:
    """What computed the `tokens` tokens of a cache file. A file that does not say it counts as exact. Raises
    ValueError for an entry that `save` did not write."""
    rows = json.loads(metadata.get("computed", f'[["unknown", "exact", {tokens}]]'))
    if not isinstance(rows, list) or not rows:
        raise ValueError("no rows")
    tally = Tally()
    for row in rows:
        if not isinstance(row, list) or [type(item) for item in row] != [str, str, int]:
            raise ValueError(f"{row!r}")
        tally[Ran(row[0], row[1])] += row[2]
    return tally


def _read(path: Path, model: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a cache file of the model with fingerprint `model`: its arrays by name, and the entries of its header."""
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
        with readable_by_mlx(path) as name:
            return mx.load(name, format="safetensors"), metadata
    except (RuntimeError, ValueError) as error:
        raise MlxeffError(f"{path}: wanted a prompt cache, got a damaged or foreign file ({error})") from error
