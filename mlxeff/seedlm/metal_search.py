"""The search for seeds on a GPU: launches of the Metal kernels in metal/seedlm_encode.metal.

`search_metal` has the arguments and results of `search.search_numpy` and of the native `seedlm_encode`. Device memory:
tables of 2.3 to 3.4 MB for a format and metric, and 4 KB for each of `BATCH` blocks.
"""

import functools

import mlx.core as mx
import numpy as np

from .. import kernels
from .codec import HALF
from .format import BlockFormat
from .lfsr import expand
from .search import SEEDS, Problem, cycle, problem

BATCH = 1 << 14  # blocks per launch
WIDTH = SEEDS + 1  # seeds per table: the first one is repeated at the end
CLASSES = 1024  # classes of 64 seeds that are neighbours in the register's cycle
SIMDGROUPS, TOGETHER = 8, 4  # kernel `scan`: simdgroups in a threadgroup, and blocks that each of them scans
CHOOSING = 4  # kernel `choose`: simdgroups in a threadgroup; each searches one block
STATES, PENDING, PITCH, STAGE = 2144, 96, 36, 8  # sizes of arrays in threadgroup memory, explained in the Metal source


def search_metal(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int, refine: bool) -> tuple:
    """(Seeds, coefficients, codes, decoded weights) as NumPy arrays: the result of `search.search_numpy` to the bit."""
    blocks = problem(fmt, weight, diagonal, bias)
    table = _plain_table(fmt) if diagonal is None else inverse_table(fmt, blocks.metric)
    parts = []
    for first in range(0, len(blocks.base), BATCH):
        part = slice(first, first + BATCH)
        batch = Problem(blocks.scaled[part], blocks.base[part], blocks.metric)
        encoded = choose(fmt, batch, table, scan(fmt, batch, table), bias, refine)
        parts.append([np.array(array) for array in encoded])
    seeds, coefficients, codes, decoded = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    rows, cols = weight.shape
    decoded = np.ascontiguousarray(decoded.reshape(rows, -1)[:, :cols])
    return seeds.reshape(rows, -1), coefficients.reshape(rows, -1, fmt.states), codes.reshape(rows, -1), decoded


@functools.cache
def _registers() -> tuple[mx.array, mx.array]:
    """The register's cycle as the kernels read it: (scaled states, float32 (WIDTH + 64); for each seed the first 63
    bits of its stream, uint64 (WIDTH))."""
    states = np.resize(cycle(), WIDTH + 64).astype(np.float32) - HALF
    return mx.array(states / HALF), mx.array(expand(np.resize(cycle(), WIDTH)))


@functools.cache
def _plain_table(fmt: BlockFormat) -> mx.array:
    """`inverse_table` for the metric 1 of the data-free method."""
    table = inverse_table(fmt, np.ones(fmt.columns, np.float32))
    mx.eval(table)
    return table


def inverse_table(fmt: BlockFormat, metric: np.ndarray) -> mx.array:
    """The upper triangle of G⁻¹ of each seed (see `search`) for a metric (C), float32 (P (P + 1) / 2, WIDTH). Elements
    beside the diagonal are doubled."""
    body = f"write_inverse<{fmt.columns}, {fmt.states}>(states, metric, thread_position_in_grid.x, table);"
    shape = (fmt.states * (fmt.states + 1) // 2, WIDTH)
    inputs = {"states": _registers()[0], "metric": mx.array(metric)}
    [table] = _launch(fmt, "inverse", body, inputs, {"table": (shape, mx.float32)}, (WIDTH, 1, 1), (256, 1, 1))
    return table


def scan(fmt: BlockFormat, blocks: Problem, table: mx.array, classes: int = CLASSES) -> mx.array:
    """The largest energy in each class of seeds for each block, float32 (N, CLASSES). Only the first `classes` classes,
    a multiple of 32, are computed. `table` is the `inverse_table` of the blocks' metric."""
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
    """The best encoding of each block: seeds uint16 (N), coefficients int8 (N, P), exponent codes uint8 (N), decoded
    weights float32 (N, C). `maxima` is the result of `scan`."""
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
    """The kernels' inputs that describe the blocks."""
    return {"scaled": mx.array(blocks.scaled), "metric": mx.array(blocks.metric)}


def _launch(
    fmt: BlockFormat,
    name: str,
    body: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> list[mx.array]:
    """Run the kernel whose body is `body` on the GPU, whatever the default device is. Inputs are arrays, outputs shapes
    and dtypes, by their names in the body. The grid is in threads, as MLX counts it."""
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
