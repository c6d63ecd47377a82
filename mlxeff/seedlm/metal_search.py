"""Launches of the kernels in metal/seedlm_encode.metal: the search for seeds, with the arguments and results of its
twins `search.search_numpy` and the native `seedlm_encode`.

Device memory: tables of 2.3 to 3.4 MB for a format and metric, and 4 KB a block, `BATCH` blocks at a time.
"""

import functools

import mlx.core as mx
import numpy as np

from .. import kernels
from .codec import HALF
from .format import BlockFormat
from .lfsr import expand
from .search import SEEDS, Problem, cycle, problem

BATCH = 1 << 14  # blocks a launch
WIDTH = SEEDS + 1  # of the tables: the first seed is repeated
CLASSES = 1024  # of 64 neighbouring seeds
SIMDGROUPS, TOGETHER = 8, 4  # of a threadgroup that scans, and blocks each scans
CHOOSING = 4  # simdgroups of a threadgroup that chooses, a block each
STATES, PENDING, PITCH, STAGE = 2144, 96, 36, 8  # sizes in threadgroup memory


def search_metal(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int, refine: bool) -> tuple:
    """→ (seeds, coefficients, codes, decoded) in NumPy: to the bit those of `search_numpy`."""
    blocks = problem(fmt, weight, diagonal, bias)
    table = _plain_table(fmt) if diagonal is None else inverse_table(fmt, blocks.metric)
    parts = []
    for first in range(0, len(blocks.base), BATCH):
        part = slice(first, first + BATCH)
        batch = Problem(blocks.scaled[part], blocks.base[part], blocks.metric)
        found = choose(fmt, batch, table, scan(fmt, batch, table), bias, refine)
        parts.append([np.array(each) for each in found])
    seeds, coefficients, codes, decoded = (np.concatenate(each) for each in zip(*parts, strict=True))
    rows, cols = weight.shape
    decoded = np.ascontiguousarray(decoded.reshape(rows, -1)[:, :cols])
    return seeds.reshape(rows, -1), coefficients.reshape(rows, -1, fmt.states), codes.reshape(rows, -1), decoded


@functools.cache
def _registers() -> tuple[mx.array, mx.array]:
    """(states float32 (WIDTH + 64), words uint64 (WIDTH)) along the cycle."""
    states = np.resize(cycle(), WIDTH + 64).astype(np.float32) - HALF
    return mx.array(states / HALF), mx.array(expand(np.resize(cycle(), WIDTH)))


@functools.cache
def _plain_table(fmt: BlockFormat) -> mx.array:
    table = inverse_table(fmt, np.ones(fmt.columns, np.float32))
    mx.eval(table)
    return table


def inverse_table(fmt: BlockFormat, metric: np.ndarray) -> mx.array:
    """float32 (P (P + 1) / 2, WIDTH): of each seed's Gram matrix under the metric (C) the inverse's upper part."""
    body = f"write_inverse<{fmt.columns}, {fmt.states}>(states, metric, thread_position_in_grid.x, table);"
    shape = (fmt.states * (fmt.states + 1) // 2, WIDTH)
    inputs = {"states": _registers()[0], "metric": mx.array(metric)}
    [table] = _launch(fmt, "inverse", body, inputs, {"table": (shape, mx.float32)}, (WIDTH, 1, 1), (256, 1, 1))
    return table


def scan(fmt: BlockFormat, blocks: Problem, table: mx.array, classes: int = CLASSES) -> mx.array:
    """The largest energies of the first `classes` classes, a multiple of 32: float32 (N, CLASSES)."""
    count, threads = len(blocks.base), SIMDGROUPS * 32
    body = f"""
        threadgroup float own_states[{STATES}];
        threadgroup float entries[{table.shape[0] * STAGE * PITCH}];
        scan<{fmt.columns}, {fmt.states}>(states, table, scaled, metric, uint(scaled_shape[0]), maxima, own_states,
            entries, threadgroup_position_in_grid.xy, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """
    inputs = {"states": _registers()[0], "table": table, **_arrays(blocks)}
    grid = (-(-count // (SIMDGROUPS * TOGETHER)) * threads, classes // 32, 1)
    outputs = {"maxima": ((count, CLASSES), mx.float32)}
    return _launch(fmt, "scan", body, inputs, outputs, grid, (threads, 1, 1))[0]


def choose(fmt: BlockFormat, blocks: Problem, table: mx.array, maxima: mx.array, bias: int, refine: bool) -> list:
    """seeds uint16 (N), coefficients int8 (N, P), codes uint8 (N), decoded float32 (N, C)."""
    states, words = _registers()
    body = f"""
        threadgroup uint pending[{CHOOSING * PENDING}];
        uint simdgroup = simdgroup_index_in_threadgroup;
        uint block = threadgroup_position_in_grid.x * {CHOOSING} + simdgroup;
        if (block < uint(scaled_shape[0]))
          choose<{fmt.columns}, {fmt.states}>(words, states, table, scaled, metric, bases[block], bias[0],
              {str(refine).lower()}, maxima, block, thread_index_in_simdgroup, pending + simdgroup * {PENDING}, seeds,
              coefficients, codes, decoded);
    """
    inputs = {"words": words, "states": states, "table": table, **_arrays(blocks), "bases": mx.array(blocks.base)}
    inputs |= {"bias": mx.array([bias], mx.int32), "maxima": maxima}
    count, threads = len(blocks.base), CHOOSING * 32
    outputs = {
        "seeds": ((count,), mx.uint16),
        "coefficients": ((count, fmt.states), mx.int8),
        "codes": ((count,), mx.uint8),
        "decoded": ((count, fmt.columns), mx.float32),
    }
    name = "choose_refined" if refine else "choose"
    return _launch(fmt, name, body, inputs, outputs, (-(-count // CHOOSING) * threads, 1, 1), (threads, 1, 1))


def _arrays(blocks: Problem) -> dict[str, mx.array]:
    return {"scaled": mx.array(blocks.scaled), "metric": mx.array(blocks.metric)}


def _launch(fmt, name, body, inputs, outputs, grid, threadgroup):
    """Run `body` on the GPU, whatever the default device; inputs: name → array, outputs: name → (shape, type)."""
    title = f"seedlm_encode_{fmt.name.replace('.', '_')}_{name}"
    kernel = kernels.metal_kernel("seedlm_encode", title, tuple(inputs), tuple(outputs), body)
    shapes, dtypes = zip(*outputs.values(), strict=True)
    return kernel(
        inputs=list(inputs.values()),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=list(shapes),
        output_dtypes=list(dtypes),
        stream=mx.gpu,
    )
