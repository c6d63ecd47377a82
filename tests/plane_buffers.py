"""Buffers of QuantSpec's KV cache with known contents, and attention to what they hold, computed by NumPy in float64.

Everything that a reader must not use is garbage there: slots beyond the last token have NaN for scales and any codes,
and lower halves of tiles that a view reads coarsely have any codes.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from helpers import to_numpy
from mlxeff.quantspec import planes


class View(NamedTuple):
    """Which lower halves there are and which are read, in tiles: see `metal.attend`."""

    first_keys: int = 0
    first_values: int = 0
    coarse_keys: int = 0
    coarse_values: int = 0


FULL = View()


class Buffers:
    """Planes of `length` tokens of B batches and G KV heads, from keys and values (B, G, length, E) float32, or random
    ones; `tiles` more of them are allocated than needed."""

    def __init__(self, length, size, batch=1, groups=2, keys=None, values=None, tiles=1, seed=0):
        self.rng = np.random.default_rng([length, size, seed])
        self.length, self.size, self.lead = length, size, (batch, groups)
        self.tiles = -(-length // planes.TILE) + tiles
        self.keys, self.values = (self.encode(numbers) for numbers in (keys, values))

    def encode(self, numbers):
        """[Codes uint8 (B, G, slots, E), scale, zero float16 (B, G, slots)] as NumPy arrays, garbage where unused."""
        slots = self.tiles * planes.TILE
        if numbers is None:
            numbers = self.rng.standard_normal((*self.lead, self.length, self.size))
        codes = self.rng.integers(0, 256, (*self.lead, slots, self.size)).astype(np.uint8)
        scale, zero = np.full((2, *self.lead, slots), np.nan, np.float16)
        if self.length:
            encoded = planes.encode(planes.rotate(mx.array(np.asarray(numbers, np.float32))))
            for whole, part in zip((codes, scale, zero), encoded, strict=True):
                whole[:, :, : self.length] = np.array(part)
        return [codes, scale, zero]

    def arrays(self, view=FULL):
        """(upper, lower_keys, lower_values) as `metal.attend` reads them with this view."""
        lead = (*self.lead, self.tiles, planes.TILE)
        scales = [np.array(each).reshape(lead) for codes in (self.keys, self.values) for each in codes[1:]]
        keys, values = (mx.array(each[0].reshape(*lead, self.size)) for each in (self.keys, self.values))
        scales = mx.array(np.concatenate(scales, axis=-1)).view(mx.uint8)
        upper = mx.concatenate([scales, planes.pack_keys(keys >> 4), planes.pack_values(values >> 4)], axis=-1)
        halves = planes.pack_keys(keys & 15), planes.pack_values(values & 15)
        return upper, *(self.lower(each, *some) for each, some in zip(halves, (view[::2], view[1::2]), strict=True))

    def lower(self, halves, first, coarse):
        whole = np.array(halves)
        whole[:, :, :coarse] = self.rng.integers(0, 256, whole[:, :, :coarse].shape)
        return mx.array(np.ascontiguousarray(whole[:, :, first:]))

    def decoded(self, view=FULL):
        """Keys and values (B, G, length, E) float64 as the view has them, not rotated."""
        both = ((self.keys, view.coarse_keys), (self.values, view.coarse_values))
        return [self.decode(encoded, coarse * planes.TILE) for encoded, coarse in both]

    def decode(self, encoded, coarse):
        codes, scale, zero = (each[:, :, : self.length] for each in encoded)
        codes = codes.astype(np.float32)
        codes[:, :, :coarse] = codes[:, :, :coarse] // 16 * 16 + planes.MIDDLE
        return to_numpy(planes.rotate(planes.decode(*map(mx.array, (codes, scale, zero)))))

    def attention(self, queries, scale, view=FULL, window=None):
        """What attention of the queries (B, H, M, E) of the newest M tokens must give, float64."""
        keys, values = self.decoded(view)
        queries = to_numpy(queries)
        tokens, heads = queries.shape[2], queries.shape[1] // self.lead[1]
        keys, values = (np.repeat(each, heads, axis=1) for each in (keys, values))
        at, token = np.arange(self.length - tokens, self.length)[:, None], np.arange(self.length)[None]
        scores = scale * np.einsum("bhme,bhte->bhmt", queries, keys)
        scores = np.where((token <= at) & (token > at - (window or self.length)), scores, -np.inf)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("bhmt,bhte->bhme", powers / powers.sum(axis=-1, keepdims=True), values)
