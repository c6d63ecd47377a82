"""`PlaneLayer`, the KV cache of one layer in planes of 4 bits (arXiv 2502.10424, section 4; `planes` says what differs
from the paper). A reader takes both planes, 8 bits a number, or the upper one alone, 4 bits.

Every token is encoded when it is appended. The kind "int8" keeps both planes of all tokens. The kinds "int4" and "k8v4"
keep the lower plane (of keys and values, or of the values) for the newest tokens only: these count more than all others
(`benchmarks/kv_codecs.py`). The newest tokens are the last 64 to 127, from a multiple of 64 on, as they are before an
append. The same tokens are read in 8 bits by the view "draft" of "int8", which takes 4 bits of all others.

Shapes: B batch, G KV heads, S new tokens, T cached tokens, E head size.
"""

import math
from collections.abc import Callable

import mlx.core as mx

from .. import kernels
from ..cache import LayerShape
from ..errors import MlxeffError, notices
from ..ops import attention
from ..running import DRAFT_VIEW, EXACT, FULL_VIEW, RunOptions
from . import metal, planes
from .planes import HEAD_SIZES, SCALE_BYTES, TILE

GRAIN = 4  # tiles; which tokens are new changes at multiples of it
SLACK = 1  # tiles for which a lower plane of the newest tokens has room beyond them
GROWTH = 16  # tiles by which the planes grow
PARTS = ("keys", "values")
WHOLE = {"int8": PARTS, "int4": (), "k8v4": ("keys",)}  # kind → what has the lower plane of all tokens
PACK = {"keys": planes.pack_keys, "values": planes.pack_values}
UNPACK = {"keys": planes.unpack_keys, "values": planes.unpack_values}


class PlaneLayer:
    """The cache of one layer, with the methods of `cache.NativeLayer`. `kind` is "int8", "int4" or "k8v4".

    A layer whose keys have biases in their projection keeps the lower plane of all keys: such a bias may be many times
    as large as what the keys differ by, which 4 bits a token do not hold.
    """

    store = "planes"
    views = (FULL_VIEW, DRAFT_VIEW)
    _silent = True  # until a notice has said that attention is slow

    def __init__(self, shape: LayerShape, kind: str):
        if shape.head_size not in HEAD_SIZES:
            wanted = ", ".join(map(str, HEAD_SIZES))
            raise MlxeffError(f"KV cache: wanted heads of {wanted} numbers for {kind}, got {shape.head_size}")
        self.shape = shape
        self.storage = self.stored_as = "k8v4" if kind == "int4" and shape.biased else kind
        self.window, self.length = shape.window, 0
        self._whole = WHOLE[self.storage]
        self._first = dict.fromkeys(PARTS, 0)  # the tile at which the lower plane begins
        self._reserved = 0  # tokens for which the next growth provides
        self._buffers: dict[str, mx.array] = {}  # see `room`

    @property
    def rewinds_exactly(self) -> bool:
        """Whether `rewind` always keeps exactly the wanted number of tokens."""
        return self._whole == PARTS

    @property
    def together(self) -> int | None:
        """How many tokens one pass may append so that each sees the others as it would alone; None: any number."""
        return None if self._whole == PARTS else GRAIN * TILE - self.length % (GRAIN * TILE)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, options: RunOptions = EXACT
    ) -> mx.array:
        """See `Layer.attend`. On a GPU a Metal kernel reads the planes for few tokens; else all tokens are decoded to
        float32 for each call, and a notice says once where that makes decoding slow."""
        batch, heads, new, size = keys.shape
        read = self.room(new, (batch, heads, size), view=options.view)
        integers = {name: value for name, value in read.items() if name not in self._buffers}
        self._put(keys, values)
        if on_gpu() and new * queries.shape[1] // heads <= metal.MOST_ROWS:
            return metal.attend(
                queries, **self._buffers, length=self.length, **integers, scale=scale, window=self.window
            )
        if PlaneLayer._silent and not on_gpu():
            PlaneLayer._silent = False
            notices.warning("KV cache %s: decoded anew at each step, slow: the native kernels read it", self.storage)
        held = (self._rotated(part, integers[f"coarse_{part}"]) for part in PARTS)
        out = attention(planes.rotate(queries), *held, scale, self.window)
        return planes.rotate(out).astype(queries.dtype)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Store keys and values (B, G, S, E) of new tokens."""
        batch, heads, new, size = keys.shape
        self.room(new, (batch, heads, size))
        self._put(keys, values)

    def _put(self, keys: mx.array, values: mx.array) -> None:
        """As `append`, where there is room."""
        if on_gpu():
            self._store(keys, values)
            return
        at = SCALE_BYTES
        for index, (part, rows) in enumerate(zip(PARTS, (keys, values), strict=True)):
            codes, scale, zero = planes.encode(planes.rotate(rows))
            for place, each in ((2 * index, scale), (2 * index + 1, zero)):
                self._write("upper", 2 * TILE * place, mx.view(each[..., None], mx.uint8), _as_bytes, _from_bytes)
            self._write("upper", at, codes >> 4, PACK[part], UNPACK[part])
            self._write(f"lower_{part}", 0, codes & 15, PACK[part], UNPACK[part], self._first[part])
            at += TILE // 2 * keys.shape[3]
        self.length += keys.shape[2]

    def _store(self, keys: mx.array, values: mx.array) -> None:
        """As `_put`, by the Metal kernel."""
        firsts = {f"first_{part}": first for part, first in self._first.items()}
        changed = metal.store(keys, values, **self._buffers, length=self.length, **firsts)
        for (name, buffer), tiles in zip(self._buffers.items(), changed, strict=True):
            start = max(self.length // TILE - firsts.get(f"first_{name.removeprefix('lower_')}", 0), 0)
            buffer[:, :, start : start + tiles.shape[2]] = tiles
        self.length += keys.shape[2]

    def state(self) -> tuple[mx.array, mx.array]:
        """The keys and values of all cached tokens in the highest precision that is kept, (B, G, T, E), float32."""
        return tuple(planes.rotate(self._rotated(part, self._first[part])) for part in PARTS)

    def room(
        self, new: int, shape: tuple[int, int, int], _dtype: mx.Dtype | None = None, view: str = FULL_VIEW
    ) -> dict[str, mx.array | int]:
        """See `NativeLayer.room`; cpu/python/kv_planes.cpp describes the buffers. Drops lower halves that are no longer
        of the newest tokens."""
        if not self._buffers:
            self._buffers = {name: mx.zeros((*shape[:2], 0, count), mx.uint8) for name, count in self._bytes().items()}
        need = -(-(self.length + new) // TILE)
        wanted = max(need, -(-self._reserved // TILE))
        for name in self._buffers:
            part = name.removeprefix("lower_")
            if part in self._whole or name == "upper":
                if need > self._buffers[name].shape[2]:
                    self._resize(name, -(-wanted // GROWTH) * GROWTH)
                continue
            self._drop(part)
            tiles, least = need - self._first[part], 2 * GRAIN + SLACK
            if not tiles <= self._buffers[name].shape[2] <= max(tiles, least):
                self._resize(name, max(tiles, least))
        coarse = self._coarse(view)
        integers = {
            f"{name}_{part}": of[part] for name, of in (("first", self._first), ("coarse", coarse)) for part in of
        }
        return {**self._buffers, **integers}

    def replace(self, buffers: dict[str, mx.array], new: int) -> None:
        """See `NativeLayer.replace`."""
        self._buffers = {name: buffers[name] for name in self._buffers}
        self.length += new

    def reserve(self, tokens: int) -> None:
        """Make the next growth of the planes large enough for `tokens` more tokens."""
        self._reserved = self.length + tokens

    def rewind(self, length: int) -> int:
        """Drop all tokens after the first `length`. Where the lower halves of the tokens that are then the newest are
        gone, the tokens after the last multiple of 64 are dropped too: the caller computes them again. Those before
        stay in 4 bits, though some of them would be in 8 had no tokens been dropped."""
        self.length = min(self.length, length)
        if any(self.length < first * TILE for first in self._first.values()):
            tiles = self.length // TILE // GRAIN * GRAIN
            self.length = tiles * TILE
            self._first = {part: min(first, tiles) for part, first in self._first.items()}
        return self.length

    @property
    def capacity(self) -> int:
        """Tokens for which the planes have room. The lower plane of the newest tokens, which is small, grows apart."""
        return self._buffers["upper"].shape[2] * TILE if self._buffers else 0

    def arrays(self) -> list[mx.array]:
        """All buffers, or nothing before the first token."""
        return list(self._buffers.values())

    def saved(self) -> dict[str, mx.array]:
        """See `Layer.saved`. The arrays are those of `room` without unused capacity."""
        tiles = -(-self.length // TILE)
        firsts = {"upper": 0} | {f"lower_{part}": first for part, first in self._first.items()}
        return {name: each[:, :, : tiles - firsts[name]] for name, each in self._buffers.items()}

    def restore(self, arrays: dict[str, mx.array], tokens: int) -> None:
        """See `Layer.restore`."""
        tiles, first = -(-tokens // TILE), {}
        if set(arrays) != set(self._bytes()) or any(array.dtype != mx.uint8 for array in arrays.values()):
            raise ValueError("planes of bytes")
        for name, count in self._bytes().items():
            part, shape = name.removeprefix("lower_"), arrays[name].shape
            if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (1, self.shape.groups, count):
                raise ValueError(f"planes of {tokens} tokens")
            if name == "upper" or part in self._whole:
                right = shape[2] == tiles
            else:
                first[part] = tiles - shape[2]
                right = 0 <= first[part] <= tokens // TILE and first[part] % GRAIN == 0
            if not right:
                raise ValueError(f"planes of {tokens} tokens")
        self._buffers, self.length = dict(arrays), tokens
        self._first |= first

    def read_bytes(self, view: str = FULL_VIEW) -> int:
        """Bytes of all cached tokens that attention reads in a view."""
        if not self._buffers:
            return 0
        tiles, coarse, each = -(-self.length // TILE), self._coarse(view), self._bytes()
        lower = sum(max(0, tiles - coarse[part]) * each[f"lower_{part}"] for part in PARTS)
        return math.prod(self._buffers["upper"].shape[:2]) * (tiles * each["upper"] + lower)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, unused capacity included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _newest(self) -> int:
        """The tile at which the newest tokens begin."""
        return max(0, self.length // TILE // GRAIN - 1) * GRAIN

    def _coarse(self, view: str) -> dict[str, int]:
        """The tile up to which keys and values are read from the upper plane alone, in this view."""
        draft = view == DRAFT_VIEW
        whole = ("keys",) if self.shape.biased else ()
        return {
            part: max(first, self._newest() if draft and part not in whole else 0)
            for part, first in self._first.items()
        }

    def _bytes(self) -> dict[str, int]:
        """The bytes of one tile and head in each buffer."""
        codes = TILE // 2 * self.shape.head_size
        return {"upper": SCALE_BYTES + 2 * codes, "lower_keys": codes, "lower_values": codes}

    def _drop(self, part: str) -> None:
        """Forget the lower halves of tokens that are no longer among the newest."""
        name, first = f"lower_{part}", self._newest()
        if first > self._first[part]:
            self._buffers[name] = mx.contiguous(self._buffers[name][:, :, first - self._first[part] :])
            self._first[part] = first

    def _resize(self, name: str, tiles: int) -> None:
        """Give a buffer room for so many tiles."""
        old = self._buffers[name][:, :, :tiles]
        free = mx.zeros((*old.shape[:2], tiles - old.shape[2], old.shape[3]), old.dtype)
        self._buffers[name] = mx.concatenate([old, free], axis=2) if old.size else free

    def _write(self, name: str, at: int, rows: mx.array, pack: Callable, unpack: Callable, first: int = 0) -> None:
        """Write rows (B, G, S, n) of new tokens into the bytes from `at` on of their tiles, packed. `first` is the tile
        at which the buffer begins. Rows of older tokens in the same tile stay."""
        buffer, lead = self._buffers[name], rows.shape[:2]
        start, front = divmod(self.length, TILE)
        tiles = -(-(front + rows.shape[2]) // TILE)
        size = pack(mx.zeros((TILE, rows.shape[3]), mx.uint8)).shape[0]
        place = (slice(None), slice(None), slice(start - first, start - first + tiles), slice(at, at + size))
        old = unpack(buffer[place])
        after = old[:, :, -1, (front + rows.shape[2] - 1) % TILE + 1 :]
        whole = mx.concatenate([old[:, :, 0, :front], rows, after], axis=2)
        buffer[place] = pack(whole.reshape(*lead, tiles, TILE, -1))

    def _rotated(self, part: str, coarse: int) -> mx.array:
        """The keys or the values of all cached tokens, rotated, (B, G, T, E), float32; of the upper plane alone in the
        first `coarse` tiles."""
        upper, tiles = self._buffers["upper"], -(-self.length // TILE)
        index, size = PARTS.index(part), self._bytes()["lower_keys"]
        halves = mx.view(mx.contiguous(upper[:, :, :tiles, :SCALE_BYTES]), mx.float16)
        scale, zero = (halves[..., TILE * place : TILE * (place + 1)] for place in (2 * index, 2 * index + 1))
        at = SCALE_BYTES + index * size
        codes = UNPACK[part](upper[:, :, :tiles, at : at + size]).astype(mx.float32) * 16
        low = UNPACK[part](self._buffers[f"lower_{part}"][:, :, coarse - self._first[part] : tiles - self._first[part]])
        middle = mx.full((*codes.shape[:2], coarse, *codes.shape[3:]), planes.MIDDLE)
        decoded = planes.decode(codes + mx.concatenate([middle, low.astype(mx.float32)], axis=2), scale, zero)
        return decoded.reshape(*decoded.shape[:2], -1, decoded.shape[-1])[:, :, : self.length]


def on_gpu() -> bool:
    """Whether the Metal kernels run."""
    return kernels.device() == "gpu" and kernels.has_metal()


def _as_bytes(rows: mx.array) -> mx.array:
    """(…, TILE, n) bytes of each token → (…, TILE · n)."""
    return rows.reshape(*rows.shape[:-2], -1)


def _from_bytes(packed: mx.array) -> mx.array:
    """The inverse of `_as_bytes`."""
    return packed.reshape(*packed.shape[:-1], TILE, -1)
