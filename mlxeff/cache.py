"""KV cache: what attention remembers of the tokens seen so far. The protocols, the plain kind of a layer's cache
(`LayerCache`), which keeps every key and value in one float type, and the cache of a whole model (`KVCache`).

The cache attends: a model hands over rotated queries, keys and values and gets the attention output, so mask and
storage are the cache's own business. Knows nothing about models or text. Shapes: B batch, H query heads, G KV heads,
S new tokens, T tokens held, E head size.
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

FORMAT_VERSION = "1"


class Layer(Protocol):
    """What a model's layer needs of its part of a cache."""

    length: int  # tokens held
    window: int | None  # only the last `window` tokens are attended to (sliding-window attention); None attends to all

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, options: RunOptions
    ) -> mx.array:
        """Append `keys`, `values` (B, G, S, E), attend causally with `queries` (B, H, S, E); returns (B, H, S, E)."""

    def append(self, keys: mx.array, values: mx.array) -> object:
        """Store keys and values (B, G, S, E) after the tokens held."""

    def rewind(self, length: int) -> int:
        """Forget the tokens after the first `length`; returns the tokens kept: as many, or fewer where only a shorter
        beginning can be restored."""

    def reserve(self, tokens: int) -> None:
        """Announce `tokens` more tokens, so that their room is allocated once."""

    def arrays(self) -> list[mx.array]:
        """What to evaluate after a prefill chunk."""

    def saved(self) -> dict[str, mx.array]:
        """What a file keeps of the tokens held, by name."""

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """Hold the `tokens` tokens that `saved` gave `arrays` of. ValueError, naming what was wanted, for others."""

    storage: str  # the form that `saved` has and, where it knows it, the native CPU decoder reads (models/native.py)

    @property
    def stored_as(self) -> str | None:
        """The numeric type of what is kept, for people; None while that is open."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""


class NativeLayer(Layer, Protocol):
    """A layer whose storage the native CPU decoder can write and read."""

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> dict[str, mx.array]:
        """The buffers by name, with room for `new` more tokens; `shape` is (B, G, E), `dtype` what a storage without a
        type of its own takes."""

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """Take over what was made of the buffers of `room`, with `new` more tokens in them."""


class Cache(Protocol):
    """What the decode loop, generation and the measuring tools need of a model's cache."""

    kind: str | None  # the name in KINDS by which it was made, None for the executor's own type
    tally: Tally  # what computed the tokens that went in

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, capacity included."""

    def rewind(self, length: int) -> int:
        """Forget the tokens after the first `length`; returns how many are kept: `length`, or fewer where only a
        shorter beginning can be restored (the caller computes the others again), or all that are held, unchanged,
        where nothing can be taken back. Raises MlxeffError unless 0 ≤ length ≤ tokens held."""

    def reserve(self, tokens: int) -> None:
        """Announce `tokens` more tokens, so that a known prompt is allocated once."""

    def arrays(self) -> list:
        """What to evaluate after a prefill chunk."""


class LayerCache:
    """Keys and values of one layer, in buffers (B, G, capacity, E) that grow by `step` tokens.

    `dtype`: the type of the buffers, None for that of the first keys. Attention computes in the type of the queries.
    """

    step = 256
    storage = "dense"

    def __init__(self, window: int | None = None, dtype: mx.Dtype | None = None):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0  # tokens held; the buffers may be longer
        self.window, self.dtype = window, dtype
        self._reserved = 0

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, _options: RunOptions = EXACT
    ) -> mx.array:
        """As `Layer.attend`; the options change nothing here."""
        held = self.append(keys, values)
        if self.length == keys.shape[2] and held[0].dtype == keys.dtype:
            held = keys, values  # nothing was held before: no detour, of gradients either, over the buffers
        return attention(queries, *(each.astype(queries.dtype) for each in held), scale, self.window)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store (B, G, S, E) after the tokens held; returns all keys and values held, (B, G, T, E)."""
        batch, heads, new, size = keys.shape
        start, end = self.length, self.length + new
        self.room(new, (batch, heads, size), keys.dtype)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.state()

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> dict[str, mx.array]:
        """As `NativeLayer.room`: "keys" and "values"."""
        if self.keys is None or self.length + new > self.keys.shape[2]:
            self._grow(self.length + new, shape, self.dtype or dtype)
        return {"keys": self.keys, "values": self.values}

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """As `NativeLayer.replace`."""
        self.keys, self.values, self.length = buffers["keys"], buffers["values"], self.length + new

    def state(self) -> tuple[mx.array, mx.array]:
        """The keys and values held, (B, G, T, E)."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self, tokens: int) -> None:
        """Make the next growth large enough for `tokens` more tokens."""
        self._reserved = self.length + tokens

    def rewind(self, length: int) -> int:
        """Forget the tokens after the first `length`; any number can be taken back."""
        self.length = min(self.length, length)
        return self.length

    def saved(self) -> dict[str, mx.array]:
        """As `Layer.saved`: "keys" and "values", (B, G, T, E)."""
        return dict(zip(("keys", "values"), self.state(), strict=True))

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """As `Layer.restore`."""
        if set(arrays) != {"keys", "values"} or any(a.ndim != 4 or a.shape[2] != tokens for a in arrays.values()):
            raise ValueError(f"keys and values of {tokens} tokens")
        self.keys, self.values, self.length = arrays["keys"], arrays["values"], tokens

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def stored_as(self) -> str | None:
        """The type of the buffers, the one to come where there is none."""
        dtype = self.dtype if self.keys is None else self.keys.dtype
        return dtype and str(dtype).removeprefix("mlx.core.")

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.arrays())

    def _grow(self, length: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
        batch, heads, size = shape
        capacity = -(-max(length, self._reserved) // self.step) * self.step

        def extend(old: mx.array | None) -> mx.array:
            held = 0 if old is None else self.length
            room = mx.zeros((batch, heads, capacity - held, size), dtype if old is None else old.dtype)
            return room if old is None else mx.concatenate([old[:, :, :held], room], axis=2)

        self.keys, self.values = extend(self.keys), extend(self.values)


@dataclass(frozen=True)
class LayerShape:
    """What a layer's cache is made for: KV heads G, head size E, sliding window in tokens (None: all)."""

    groups: int
    head_size: int
    window: int | None = None


LayerMaker = Callable[[LayerShape], Layer]
FLOAT_KINDS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
KINDS: dict[str, LayerMaker] = {  # a technique's own kinds are entered by `assembly.techniques`
    name: lambda shape, dtype=dtype: LayerCache(shape.window, dtype) for name, dtype in FLOAT_KINDS.items()
}


class KVCache:
    """The cache of one model: a layer's cache a layer, all of one length."""

    views: tuple[str, ...] = (FULL_VIEW,)

    def __init__(self, layers: Sequence[Layer], kind: str | None = None):
        self.layers, self.kind, self.tally = list(layers), kind, Tally()

    @classmethod
    def of(cls, shapes: Sequence[LayerShape], kind: str) -> "KVCache":
        """A new cache of `kind`, for layers of these shapes. Raises MlxeffError for a kind that is not in KINDS."""
        if kind not in KINDS:
            raise MlxeffError(f"KV cache: wanted one of {', '.join(KINDS)}, got {kind!r}")
        return cls([KINDS[kind](shape) for shape in shapes], kind)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, capacity included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def stored_as(self) -> str | None:
        """The numeric types of what the layers keep, joined by " + "; None while they are open."""
        return " + ".join(dict.fromkeys(filter(None, (layer.stored_as for layer in self.layers)))) or None

    def rewind(self, length: int) -> int:
        """As `Cache.rewind`: the shortest beginning that any layer can restore."""
        if not 0 <= length <= self.length:
            raise MlxeffError(f"KV cache: wanted to rewind to 0 to {self.length} tokens, got {length}")
        while (kept := min(layer.rewind(length) for layer in self.layers)) < length:
            length = kept
        return length

    @contextlib.contextmanager
    def rewound(self, length: int) -> Iterator[None]:
        """Inside the block the cache holds its first `length` tokens only. What is appended there replaces those that
        stood in its place; the others are back at the end. For layers that can take back any number of tokens."""
        before = self.length
        self.rewind(length)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.length = before

    def reserve(self, tokens: int) -> None:
        """Announce `tokens` more tokens."""
        for layer in self.layers:
            layer.reserve(tokens)

    def arrays(self) -> list[mx.array]:
        """The buffers, to be evaluated after a prefill chunk."""
        return [buffer for layer in self.layers for buffer in layer.arrays()]

    def save(self, path: str | os.PathLike, tokens: Sequence[int], model: str) -> None:
        """Write keys, values and the `tokens` they stand for to a safetensors file, by a temporary name beside it."""
        if self.length == 0 or len(tokens) != self.length:
            raise MlxeffError(f"{path}: cannot save a KV cache of {self.length} tokens with {len(tokens)} token ids")
        arrays = {"tokens": mx.array(list(tokens), dtype=mx.uint32)}
        for index, layer in enumerate(self.layers):
            arrays |= {f"{index}.{name}": value for name, value in layer.saved().items()}
        metadata = {"format": "mlxeff-kv-cache", "version": FORMAT_VERSION, "model": model, "storage": self._storage}
        save_arrays(Path(path), arrays, metadata, "the prompt cache")

    def restore(self, path: str | os.PathLike, model: str) -> list[int]:
        """Fill this (new) cache from a file that `save` wrote for the same `model`; returns the token ids it holds.

        Raises MlxeffError for any other file; the cache is then as it was.
        """
        arrays, storage = _read(Path(path), model)
        if storage != self._storage:
            raise MlxeffError(f"{path}: wanted a KV cache stored as {self._storage}, got {storage}")
        tokens = arrays.pop("tokens", mx.zeros((0,), mx.uint32)).tolist()
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
        """The forms that the layers have in a file, joined."""
        return "+".join(dict.fromkeys(layer.storage for layer in self.layers))


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common prefix of two token lists."""
    length = 0
    for a, b in zip(held, wanted, strict=False):
        if a != b:
            break
        length += 1
    return length


def _read(path: Path, model: str) -> tuple[dict[str, mx.array], str]:
    """(the arrays, the form that they have) of a cache file of `model`."""
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
    return mx.load(str(path), format="safetensors"), metadata.get("storage", LayerCache.storage)
