"""KV cache: what attention remembers of the tokens seen so far, one layer (`LayerCache`) and a whole model (`KVCache`).

The cache attends: a model hands over rotated queries, keys and values and gets the attention output, so mask and
storage are the cache's own business. Knows nothing about models or text. Shapes: B batch, H query heads, G KV heads,
S new tokens, T tokens held, E head size.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from .checkpoint import save_arrays
from .errors import MlxeffError
from .ops import attention

FORMAT_VERSION = "1"


class LayerCache:
    """Keys and values of one layer, in buffers (B, G, capacity, E) that grow by `step` tokens.

    `window`: only the last `window` tokens are attended to (sliding-window attention); None attends to all.
    """

    step = 256

    def __init__(self, window: int | None = None):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0  # tokens held; the buffers may be longer
        self.window = window
        self._reserved = 0

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Append `keys`, `values` (B, G, S, E), attend causally with `queries` (B, H, S, E); returns (B, H, S, E)."""
        held = self.append(keys, values)
        if self.length == keys.shape[2]:  # nothing was held before: no detour, of gradients either, over the buffers
            held = keys, values
        return attention(queries, *held, scale, self.window)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store (B, G, S, E) after the tokens held; returns all keys and values held, (B, G, T, E)."""
        batch, heads, new, size = keys.shape
        start, end = self.length, self.length + new
        self.room(new, (batch, heads, size), keys.dtype)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.state()

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The buffers, grown where `new` more tokens would not fit; `shape` is (B, G, E)."""
        if self.keys is None or self.length + new > self.keys.shape[2]:
            self._grow(self.length + new, shape, dtype)
        return self.keys, self.values

    def replace(self, keys: mx.array, values: mx.array, new: int) -> None:
        """Take over buffers that were made from those of `room`, with `new` more tokens in them."""
        self.keys, self.values, self.length = keys, values, self.length + new

    def state(self) -> tuple[mx.array, mx.array]:
        """The keys and values held, (B, G, T, E)."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self, tokens: int) -> None:
        """Make the next growth large enough for `tokens` more tokens, so that a known prompt is allocated once."""
        self._reserved = self.length + tokens

    def trim(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.length -= tokens

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def _grow(self, length: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
        batch, heads, size = shape
        capacity = -(-max(length, self._reserved) // self.step) * self.step

        def extend(old: mx.array | None) -> mx.array:
            held = 0 if old is None else self.length
            room = mx.zeros((batch, heads, capacity - held, size), dtype if old is None else old.dtype)
            return room if old is None else mx.concatenate([old[:, :, :held], room], axis=2)

        self.keys, self.values = extend(self.keys), extend(self.values)


class KVCache:
    """The cache of one model: a `LayerCache` a layer, all of one length."""

    trimmable = True

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = list(layers)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, capacity included."""
        return sum(layer.nbytes for layer in self.layers)

    def trim(self, tokens: int) -> None:
        """Forget the last `tokens` tokens (0 ≤ tokens ≤ length)."""
        if not 0 <= tokens <= self.length:
            raise MlxeffError(f"KV cache: wanted to trim {tokens} tokens, it holds {self.length}")
        for layer in self.layers:
            layer.trim(tokens)

    @contextlib.contextmanager
    def rewound(self, length: int) -> Iterator[None]:
        """Inside the block the cache holds its first `length` tokens only. What is appended there replaces those that
        stood in its place; the others are back at the end."""
        before = self.length
        self.trim(before - length)
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
        return [buffer for layer in self.layers if layer.keys is not None for buffer in (layer.keys, layer.values)]

    def save(self, path: str | os.PathLike, tokens: Sequence[int], model: str) -> None:
        """Write keys, values and the `tokens` they stand for to a safetensors file, by a temporary name beside it."""
        if self.length == 0 or len(tokens) != self.length:
            raise MlxeffError(f"{path}: cannot save a KV cache of {self.length} tokens with {len(tokens)} token ids")
        arrays = {"tokens": mx.array(list(tokens), dtype=mx.uint32)}
        for index, layer in enumerate(self.layers):
            arrays[f"{index}.keys"], arrays[f"{index}.values"] = layer.state()
        metadata = {"format": "mlxeff-kv-cache", "version": FORMAT_VERSION, "model": model}
        save_arrays(Path(path), arrays, metadata, "the prompt cache")

    def restore(self, path: str | os.PathLike, model: str) -> list[int]:
        """Fill this (new) cache from a file that `save` wrote for the same `model`; returns the token ids it holds."""
        arrays = _read(Path(path), model)
        tokens = arrays.pop("tokens", mx.zeros((0,), mx.uint32)).tolist()
        wanted = {f"{index}.{part}" for index in range(len(self.layers)) for part in ("keys", "values")}
        if set(arrays) != wanted or any(a.ndim != 4 or a.shape[2] != len(tokens) for a in arrays.values()):
            layers = len(self.layers)
            raise MlxeffError(f"{path}: wanted a KV cache of {layers} layers for its {len(tokens)} tokens, got others")
        for index, layer in enumerate(self.layers):
            layer.keys, layer.values = arrays[f"{index}.keys"], arrays[f"{index}.values"]
            layer.length = len(tokens)
        return tokens


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common prefix of two token lists."""
    length = 0
    for a, b in zip(held, wanted, strict=False):
        if a != b:
            break
        length += 1
    return length


def _read(path: Path, model: str) -> dict[str, mx.array]:
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
    return mx.load(str(path), format="safetensors")
