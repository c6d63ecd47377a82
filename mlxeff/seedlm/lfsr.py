"""The Fibonacci linear-feedback shift register of SeedLM: steps, and all states of a block from one table look-up.

A step of a K-bit register: b = XOR of the tapped bits, s ← s >> 1 | b << (K - 1). So the states are the K-bit windows
of one bit stream x[0], x[1], …: state n = x[n … n + K - 1]. The first 16 bits are the seed, and the `EXTRA` bits
after them depend linearly (over GF(2)) on it: the XOR of one table entry for each of its bytes.
"""

import functools

import numpy as np

from .format import REGISTER_BITS, TAPS

EXTRA = 47  # bits after the seed, for the 48 states of a 3-bit block; other formats use the first 23 or 31


def step(state, bits: int = REGISTER_BITS, taps: tuple[int, ...] = TAPS):
    """The successor of `state`, an int or an integer array."""
    feedback = state & 0
    for tap in taps:
        feedback = feedback ^ (state >> tap & 1)
    return state >> 1 | feedback << (bits - 1)


def states(seeds, count: int, bits: int = REGISTER_BITS, taps: tuple[int, ...] = TAPS) -> np.ndarray:
    """Integer array (...) of first states → int64 (..., count): each and its successors, by stepping."""
    state = np.asarray(seeds, np.int64)
    out = np.empty((*state.shape, count), np.int64)
    for n in range(count):
        out[..., n] = state
        state = step(state, bits, taps)
    return out


@functools.cache
def expansion_tables() -> tuple[np.ndarray, np.ndarray]:
    """T0, T1: uint64 (256) each, with T0[r & 255] ^ T1[r >> 8] = the stream's bits 16 … 62, bit 16 lowest."""
    units = states(1 << np.arange(REGISTER_BITS), EXTRA + 1)[:, 1:].astype(np.uint64)
    of_bit = ((units >> np.uint64(REGISTER_BITS - 1)) << np.arange(EXTRA, dtype=np.uint64)).sum(1, dtype=np.uint64)
    tables = np.zeros((2, 256), np.uint64)
    for value in range(256):
        for bit in range(8):
            if value >> bit & 1:
                tables[:, value] ^= of_bit[[bit, bit + 8]]
    return tables[0], tables[1]


def expand(seeds: np.ndarray) -> np.ndarray:
    """Seeds → uint64 of the same shape: the first 63 bits of the stream; state n = word >> n & 0xFFFF, 0 ≤ n < 48."""
    low, high = expansion_tables()
    seeds = np.asarray(seeds, np.uint16)
    return (low[seeds & 255] ^ high[seeds >> 8]) << np.uint64(REGISTER_BITS) | seeds.astype(np.uint64)
