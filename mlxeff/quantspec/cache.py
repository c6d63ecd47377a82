"""`PlaneLayer`, the KV cache of one layer in planes of 4 bits (arXiv 2502.10424, section 4), which decodes in 8 or 4
bits for each number.

Tokens lie in blocks of `block` tokens. Keys are quantised per channel: a group is one channel of one block. Values are
quantised per token: a group is one token. The newest tokens are in float16, in the tail. Before tokens are appended,
whole blocks move from the tail into the planes as long as at least `block` tokens stay in the tail. How the tokens are
stored therefore depends on their number before the append alone, as long as no tokens were dropped.

Shapes: B batch, G KV heads, T cached tokens, E head size, N blocks.
"""

from collections.abc import Sequence

import mlx.core as mx

from ..cache import LayerShape
from ..errors import MlxeffError, notices
from ..ops import attention
from ..running import EXACT, RunOptions
from .planes import decode, encode

HEAD_SIZES = (64, 80, 96, 128)
SLACK = 8  # tokens for which a tail of two blocks has room beyond them
GROWTH = 4  # blocks by which the planes grow
LOWER = {"int8": ("key", "value"), "int4": (), "k8v4": ("key",)}  # kind → what has a lower plane


def block_of(head_size: int) -> int:
    """The number of tokens in a block. Raises MlxeffError for a head size that the planes do not support."""
    if head_size not in HEAD_SIZES:
        wanted = ", ".join(map(str, HEAD_SIZES))
        raise MlxeffError(f"KV cache: wanted heads of {wanted} numbers for int8, int4 and k8v4, got {head_size}")
    return 128 if head_size == 128 else 64


class PlaneLayer:
    """The cache of one layer, with the methods of `cache.NativeLayer`.

    `kind` is "int8" (both planes of keys and values), "int4" (the upper ones alone) or "k8v4" (both planes of the keys,
    the upper one of the values).
    """

    _silent = True  # until a notice has said that attention is slow

    def __init__(self, shape: LayerShape, kind: str):
        self.shape, self.storage = shape, kind
        self.window = shape.window
        self.block = block_of(shape.head_size)
        self.filled = 0  # blocks in the planes
        self.tail = 0  # tokens in the tail
        self._reserved = 0  # tokens for which the next growth of the planes provides
        self._buffers: dict[str, mx.array] = {}  # "upper", "lower" and "tail", see `room`

    @property
    def length(self) -> int:
        """Cached tokens."""
        return self.filled * self.block + self.tail

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, _options: RunOptions = EXACT
    ) -> mx.array:
        """See `Layer.attend`. Older tokens are decoded to float32 for each call, which a notice says once."""
        if PlaneLayer._silent:
            PlaneLayer._silent = False
            notices.warning("KV cache %s: decoded anew at each step, slow: only the CPU kernels read it", self.storage)
        all_keys, all_values = self.append(keys, values)
        return attention(queries, all_keys.astype(queries.dtype), all_values.astype(queries.dtype), scale, self.window)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store keys and values (B, G, S, E) of new tokens; returns those of all cached tokens, (B, G, T, E)."""
        batch, heads, new, size = keys.shape
        self.room(new, (batch, heads, size), keys.dtype)
        rows = mx.stack([keys, values]).astype(mx.float16)
        self._buffers["tail"][:, :, :, self.tail : self.tail + new] = rows
        self.tail += new
        return self.state()

    def state(self) -> tuple[mx.array, mx.array]:
        """The keys and values of all cached tokens, (B, G, T, E), float32."""
        recent = self._buffers["tail"][:, :, :, : self.tail].astype(mx.float32)
        if not self.filled:
            return recent[0], recent[1]
        planes = [self._buffers[name][:, :, : self.filled] for name in ("upper", "lower") if name in self._buffers]
        older = decode_blocks(*planes, size=self.shape.head_size, block=self.block, lower=LOWER[self.storage])
        return tuple(mx.concatenate(both, axis=2) for both in zip(older, recent, strict=True))

    def room(self, new: int, shape: tuple[int, int, int], _dtype: mx.Dtype) -> dict[str, mx.array | int]:
        """See `NativeLayer.room`; cpu/python/kv_planes.cpp describes the buffers. Moves what the tail has too much into
        the planes."""
        if not self._buffers:
            self._buffers = self._empty(shape)
        if self.tail >= 2 * self.block:
            self._flush()
        wanted, got = self.tail + new, self._buffers["tail"].shape[3]
        least = 2 * self.block + SLACK
        if wanted > got or got > max(wanted, least):
            self._resize_tail(max(wanted, least))
        return {**self._buffers, "block": self.block, "filled": self.filled}

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """See `NativeLayer.replace`."""
        self._buffers = {name: buffers[name] for name in self._buffers}
        self.tail += new

    def reserve(self, tokens: int) -> None:
        """Make the next growth of the planes large enough for `tokens` more tokens."""
        self._reserved = self.length + tokens

    def rewind(self, length: int) -> int:
        """Drop all tokens after the first `length`. Where these end inside the planes, the tokens of the last block are
        dropped too, since their exact keys and values are gone: the caller computes them again."""
        if length >= self.filled * self.block:
            self.tail = min(self.tail, length - self.filled * self.block)
        else:
            self.filled, self.tail = length // self.block, 0
        return self.length

    def arrays(self) -> list[mx.array]:
        """All buffers, or nothing before the first token."""
        return list(self._buffers.values())

    def saved(self) -> dict[str, mx.array]:
        """See `Layer.saved`. The arrays are those of `room` without unused capacity."""
        return {
            name: each[:, :, :, : self.tail] if name == "tail" else each[:, :, : self.filled]
            for name, each in self._buffers.items()
        }

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """See `Layer.restore`."""
        heads, size, tail = self.shape.groups, self.shape.head_size, arrays.get("tail")
        if set(arrays) != {*self._bytes(), "tail"} or tail.ndim != 5 or tail.shape[3] > tokens:
            raise ValueError(f"planes of {tokens} tokens")
        filled, rest = divmod(tokens - tail.shape[3], self.block)
        wanted = {name: (1, heads, filled, count) for name, count in self._bytes().items()}
        wanted["tail"] = (2, 1, heads, tail.shape[3], size)
        if rest or any(arrays[name].shape != shape for name, shape in wanted.items()):
            raise ValueError(f"planes of {tokens} tokens")
        if any(array.dtype != (mx.float16 if name == "tail" else mx.uint8) for name, array in arrays.items()):
            raise ValueError("planes of bytes and a tail of float16")
        self._buffers, self.filled, self.tail = dict(arrays), filled, tail.shape[3]

    @property
    def stored_as(self) -> str:
        """The kind."""
        return self.storage

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, unused capacity included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _bytes(self) -> dict[str, int]:
        """The bytes of one block and head in each plane."""
        size, block = self.shape.head_size, self.block
        codes = {"key": size * block // 2, "value": block * padded(size) // 2}
        lower = sum(codes[part] for part in LOWER[self.storage])
        return {"upper": 4 * (size + block) + sum(codes.values())} | ({"lower": lower} if lower else {})

    def _empty(self, shape: tuple[int, int, int]) -> dict[str, mx.array]:
        """Buffers with room for one block, and without a tail; `shape` is (B, G, E)."""
        batch, heads, size = shape
        planes = {name: mx.zeros((batch, heads, 1, count), mx.uint8) for name, count in self._bytes().items()}
        return planes | {"tail": mx.zeros((2, batch, heads, 0, size), mx.float16)}

    def _flush(self) -> None:
        """Move whole blocks from the tail into the planes, so that less than two blocks are left."""
        count = self.tail // self.block - 1
        moved, tail = count * self.block, self._buffers["tail"]
        self._grow(self.filled + count)
        rows = tail[:, :, :, :moved]
        rows = rows.reshape(*rows.shape[:3], count, self.block, -1)
        planes = encode_blocks(rows[0], rows[1], LOWER[self.storage])
        for name, values in zip(("upper", "lower"), planes, strict=True):
            if name in self._buffers:
                self._buffers[name][:, :, self.filled : self.filled + count] = values
        self._buffers["tail"] = mx.contiguous(tail[:, :, :, moved : self.tail])
        self.filled, self.tail = self.filled + count, self.tail - moved

    def _grow(self, blocks: int) -> None:
        """Make room for so many blocks in the planes."""
        if blocks <= self._buffers["upper"].shape[2]:
            return
        wanted = max(blocks, self._reserved // self.block)
        capacity = -(-wanted // GROWTH) * GROWTH
        for name in self._bytes():
            old = self._buffers[name]
            free = mx.zeros((*old.shape[:2], capacity - self.filled, old.shape[3]), old.dtype)
            self._buffers[name] = mx.concatenate([old[:, :, : self.filled], free], axis=2)

    def _resize_tail(self, tokens: int) -> None:
        """Give the tail room for so many tokens."""
        old = self._buffers["tail"][:, :, :, : self.tail]
        free = mx.zeros((*old.shape[:3], tokens - self.tail, old.shape[4]), old.dtype)
        self._buffers["tail"] = mx.concatenate([old, free], axis=3)


def padded(size: int) -> int:
    """The numbers in a group of values: the head size, rounded up so that a group has whole vectors of codes."""
    return -(-size // 32) * 32


def encode_blocks(keys: mx.array, values: mx.array, lower: Sequence[str]) -> tuple[mx.array, mx.array]:
    """Keys and values (B, G, N, block, E) → the upper and the lower plane, uint8 (B, G, N, bytes). `lower` names what
    the lower plane holds: "key", "value"."""
    if free := padded(values.shape[-1]) - values.shape[-1]:  # repeats a number, which does not change a group's range
        values = mx.concatenate([values, mx.repeat(values[..., :1], free, axis=-1)], axis=-1)
    parts = {"key": encode(keys.swapaxes(-1, -2)), "value": encode(values)}
    shape = (*keys.shape[:3], -1)

    def as_bytes(array: mx.array) -> mx.array:
        return mx.view(array.reshape(shape), mx.uint8)

    scales = [as_bytes(array) for _, _, scale, zero in parts.values() for array in (scale, zero)]
    upper = mx.concatenate([*scales, *(as_bytes(part[0]) for part in parts.values())], axis=-1)
    below = [as_bytes(parts[name][1]) for name in lower]
    return upper, mx.concatenate(below, axis=-1) if below else mx.zeros((*keys.shape[:3], 0), mx.uint8)


def decode_blocks(
    upper: mx.array, below: mx.array | None = None, *, size: int, block: int, lower: Sequence[str]
) -> tuple[mx.array, mx.array]:
    """What `encode_blocks` gave → keys and values (B, G, N · block, E), float32. `size` is E."""
    shape, width = upper.shape[:3], padded(size)
    halves = mx.view(mx.contiguous(upper[..., : 4 * (size + block)]), mx.float16)
    key_scale, key_zero, value_scale, value_zero = mx.split(halves, [size, 2 * size, 2 * size + block], axis=-1)
    codes = upper[..., 4 * (size + block) :]

    def words(array: mx.array, groups: int) -> mx.array:
        return mx.view(mx.contiguous(array), mx.uint32).reshape(*shape, groups, -1)

    keys = size * block // 2  # bytes of the keys' codes
    low = {"key": None, "value": None}
    at = 0
    for name, count, groups in (("key", keys, size), ("value", block * width // 2, block)):
        if name in lower:
            low[name], at = words(below[..., at : at + count], groups), at + count
    key = decode(words(codes[..., :keys], size), low["key"], key_scale, key_zero, block).swapaxes(-1, -2)
    value = decode(words(codes[..., keys:], block), low["value"], value_scale, value_zero, size)
    return tuple(part.reshape(*shape[:2], -1, size) for part in (key, value))
