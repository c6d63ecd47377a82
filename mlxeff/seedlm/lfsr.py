"""The Fibonacci linear-feedback shift register of SeedLM: single steps, and all states of a block by table look-up.

A step of a K-bit register with state s: b = XOR of the tapped bits, s ← s >> 1 | b << (K - 1). The register keeps all
its bits but one at each step, so its states are windows of one stream of bits x[0], x[1], …: state n is the number with
the bits x[n] … x[n + K - 1], lowest first. The first 16 bits of the stream are the seed. Each later bit is an XOR of
seed bits, so the `EXTRA` bits after the seed are the XOR of two table entries, one for each byte of the seed.
"""

import functools
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from .format import REGISTER_BITS, TAPS

EXTRA = 47  # bits of the stream after the seed: the 48 states of a 3-bit block need 47, the other formats 23 or 31


State = TypeVar("State", int, np.ndarray)


def step(state: State, bits: int = REGISTER_BITS, taps: tuple[int, ...] = TAPS) -> State:
    """The state after `state`, an int or an array of integers, in a register of `bits` bits."""
    feedback = state & 0
    for tap in taps:
        feedback = feedback ^ (state >> tap & 1)
    return state >> 1 | feedback << (bits - 1)


def states(seeds: ArrayLike, count: int, bits: int = REGISTER_BITS, taps: tuple[int, ...] = TAPS) -> np.ndarray:
    """First states, integers (...) → `count` successive states each, int64 (..., count), by single steps."""
    state = np.asarray(seeds, np.int64)
    out = np.empty((*state.shape, count), np.int64)
    for n in range(count):
        out[..., n] = state
        state = step(state, bits, taps)
    return out


@functools.cache
def expansion_tables() -> tuple[np.ndarray, np.ndarray]:
    """Two tables T0 and T1, uint64 (256): T0[r & 255] ^ T1[r >> 8] are the bits 16 … 62 of the stream of the seed r,
    with bit 16 as the lowest."""
    units = states(1 << np.arange(REGISTER_BITS), EXTRA + 1)[:, 1:].astype(np.uint64)
    of_bit = ((units >> np.uint64(REGISTER_BITS - 1)) << np.arange(EXTRA, dtype=np.uint64)).sum(1, dtype=np.uint64)
    tables = np.zeros((2, 256), np.uint64)
    for value in range(256):
        for bit in range(8):
            if value >> bit & 1:
                tables[:, value] ^= of_bit[[bit, bit + 8]]
    return tables[0], tables[1]


def expand(seeds: np.ndarray) -> np.ndarray:
    """Seeds, integers (...) → the first 63 bits of their streams, uint64 (...): state n is word >> n & 0xFFFF, for
    0 ≤ n < 48."""
    low, high = expansion_tables()
    seeds = np.asarray(seeds, np.uint16)
    return (low[seeds & 255] ^ high[seeds >> 8]) << np.uint64(REGISTER_BITS) | seeds.astype(np.uint64)
