"""`PlaneLayer`, the KV cache of one layer in planes of 4 bits (arXiv 2502.10424, section 4), which decodes in 8 or 4
bits for each number.

Tokens lie in blocks of `block` tokens. Keys are quantised per channel: a group is one channel of one block. Values are
quantised per token: a group is one token. The newest tokens are in float16, in the tail. Before tokens are appended,
whole blocks move from the tail into the planes as long as at least `block` tokens stay in the tail. How the tokens are
stored therefore depends on their number before the append alone, as long as no tokens were dropped.

Shapes: B batch, G KV heads, T cached tokens, E head size, W = E rounded up to a multiple of 32, N blocks.
"""

from collections.abc import Sequence

import mlx.core as mx

from ..cache import LayerShape
from ..errors import MlxeffError, notices
from ..ops import attention
from ..running import EXACT, RunOptions
from .planes import PER_WORD, decode, encode

HEAD_SIZES = (64, 80, 96, 128)
SLACK = 8  # tokens for which a tail of two blocks has room beyond them
GROWTH = 16  # blocks by which the planes grow
TAIL = ("tail_keys", "tail_values")
PLANES = ("upper", "lower", "scale", "zero")


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
        lower = {"int8": ("key", "value"), "int4": (), "k8v4": ("key",)}[kind]
        kept = [(part, plane) for part in ("key", "value") for plane in PLANES]
        self._names = [f"{part}_{plane}" for part, plane in kept if plane != "lower" or part in lower]
        self._buffers: dict[str, mx.array] = {}

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
        for name, rows in zip(TAIL, (keys, values), strict=True):
            self._buffers[name][:, :, self.tail : self.tail + new] = rows.astype(mx.float16)
        self.tail += new
        return self.state()

    def state(self) -> tuple[mx.array, mx.array]:
        """The keys and values of all cached tokens, (B, G, T, E), float32."""
        recent = [self._buffers[name][:, :, : self.tail].astype(mx.float32) for name in TAIL]
        if not self.filled:
            return tuple(recent)
        keys = decode(*self._planes("key"), self.block).swapaxes(-1, -2)
        values = decode(*self._planes("value"), self.shape.head_size)
        older = [part.reshape(*part.shape[:2], -1, part.shape[-1]) for part in (keys, values)]
        return tuple(mx.concatenate(both, axis=2) for both in zip(older, recent, strict=True))

    def room(self, new: int, shape: tuple[int, int, int], _dtype: mx.Dtype) -> dict[str, mx.array | int]:
        """See `NativeLayer.room`; cpu/python/kv_planes.cpp names the buffers. Moves what the tail has too much into the
        planes."""
        if not self._buffers:
            self._buffers = self._empty(shape)
        self._flush()
        wanted, got = self.tail + new, self._buffers[TAIL[0]].shape[2]
        least = 2 * self.block + SLACK
        if wanted > got or got > max(wanted, least):
            self._resize_tail(max(wanted, least))
        return self._buffers | {"filled": self.filled}

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
        planes = {name: self._buffers[name][:, :, : self.filled] for name in self._names}
        return planes | {name: self._buffers[name][:, :, : self.tail] for name in TAIL}

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """See `Layer.restore`."""
        heads, size = self.shape.groups, self.shape.head_size
        tail = arrays.get(TAIL[0])
        if set(arrays) != {*self._names, *TAIL} or tail.ndim != 4 or tail.shape[2] > tokens:
            raise ValueError(f"planes of {tokens} tokens")
        filled, rest = divmod(tokens - tail.shape[2], self.block)
        wanted = {name: (1, heads, filled, *shape) for name, shape in self._shapes().items()}
        wanted |= dict.fromkeys(TAIL, (1, heads, tail.shape[2], size))
        if rest or any(arrays[name].shape != shape for name, shape in wanted.items()):
            raise ValueError(f"planes of {tokens} tokens")
        if any(array.dtype != self._dtype(name) for name, array in arrays.items()):
            raise ValueError("planes of words, scales and a tail of float16")
        self._buffers, self.filled, self.tail = dict(arrays), filled, tail.shape[2]

    @property
    def stored_as(self) -> str:
        """The kind."""
        return self.storage

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, unused capacity included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _planes(self, part: str) -> list[mx.array | None]:
        """The filled blocks of the keys' or the values' upper and lower plane, scales and zeros."""
        found = [self._buffers.get(f"{part}_{plane}") for plane in PLANES]
        return [each if each is None else each[:, :, : self.filled] for each in found]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one block of each plane."""
        size, block = self.shape.head_size, self.block
        width = -(-size // 32) * 32
        shapes = {
            "key_upper": (size, block // PER_WORD),
            "key_scale": (size,),
            "value_upper": (block, width // PER_WORD),
            "value_scale": (block,),
        }
        for part in ("key", "value"):
            shapes[f"{part}_lower"], shapes[f"{part}_zero"] = shapes[f"{part}_upper"], shapes[f"{part}_scale"]
        return {name: shapes[name] for name in self._names}

    @staticmethod
    def _dtype(name: str) -> mx.Dtype:
        return mx.uint32 if name.endswith(("upper", "lower")) else mx.float16

    def _empty(self, shape: tuple[int, int, int], blocks: int = 1, tail: int = 0) -> dict[str, mx.array]:
        """Buffers for `blocks` blocks and a tail of `tail` tokens; `shape` is (B, G, E)."""
        batch, heads, size = shape
        buffers = {
            name: mx.zeros((batch, heads, blocks, *one), self._dtype(name)) for name, one in self._shapes().items()
        }
        return buffers | {name: mx.zeros((batch, heads, tail, size), mx.float16) for name in TAIL}

    def _flush(self) -> None:
        """Move whole blocks from the tail into the planes, so that less than two blocks are left."""
        count = self.tail // self.block - 1
        if count < 1:
            return
        moved = count * self.block
        self._grow(self.filled + count)
        for part, name in zip(("key", "value"), TAIL, strict=True):
            rows = self._buffers[name][:, :, :moved]
            rows = rows.reshape(*rows.shape[:2], count, self.block, -1)
            for plane, values in zip(PLANES, encode_blocks(rows, part), strict=True):
                if f"{part}_{plane}" in self._buffers:
                    self._buffers[f"{part}_{plane}"][:, :, self.filled : self.filled + count] = values
            kept = mx.contiguous(self._buffers[name][:, :, moved : self.tail])
            self._buffers[name] = kept
        self.filled, self.tail = self.filled + count, self.tail - moved

    def _grow(self, blocks: int) -> None:
        """Make room for so many blocks in the planes."""
        got = self._buffers["key_upper"].shape[2]
        if blocks <= got:
            return
        wanted = max(blocks, self._reserved // self.block)
        capacity = -(-wanted // GROWTH) * GROWTH
        for name in self._names:
            old = self._buffers[name]
            free = mx.zeros((*old.shape[:2], capacity - self.filled, *old.shape[3:]), old.dtype)
            self._buffers[name] = mx.concatenate([old[:, :, : self.filled], free], axis=2)

    def _resize_tail(self, tokens: int) -> None:
        """Give the tail room for so many tokens."""
        for name in TAIL:
            old = self._buffers[name][:, :, : self.tail]
            free = mx.zeros((*old.shape[:2], tokens - self.tail, old.shape[3]), old.dtype)
            self._buffers[name] = mx.concatenate([old, free], axis=2)


def encode_blocks(rows: mx.array, part: str) -> Sequence[mx.array]:
    """Keys or values (B, G, N, block, E) → upper and lower plane, scale and zero, in the layout of the buffers."""
    if part == "key":
        return encode(rows.swapaxes(-1, -2))
    size = rows.shape[-1]
    if free := -size % 32:  # the padding repeats a number of the group, which does not change its range
        rows = mx.concatenate([rows, mx.repeat(rows[..., :1], free, axis=-1)], axis=-1)
    return encode(rows)
