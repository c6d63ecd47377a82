"""Launches of the kernels in metal/seedlm.metal: decoding, embedding rows and products with seed-encoded matrices.

The arguments and results are those of the mx operations in `codec`; the choice between the two is the caller's. Sums
are kept in float32 and weights are not rounded before they are multiplied, whatever the type of x.
"""

from collections.abc import Mapping

import mlx.core as mx

from .. import kernels
from .format import BlockFormat

Arrays = Mapping[str, mx.array]

SIMDGROUPS = 8  # a threadgroup of the matrix-vector kernels
FEW_TOKENS = 8  # up to here each simdgroup computes whole rows; above, tiles and matrix instructions
TILE_ROWS = 64
MANY_ROWS = 2048  # from here a simdgroup computes 4 rows and not 2: enough threadgroups remain for every core
TABLES = "threadgroup Store::Entry tables[512];"


def decode_metal(fmt: BlockFormat, cols: int, arrays: Arrays, dtype: mx.Dtype = mx.float32) -> mx.array:
    """All weights: (rows, cols) in `dtype`, bit for bit those of `codec.decode_ops`."""
    return rows_metal(fmt, cols, arrays, mx.arange(_rows(fmt, arrays), dtype=mx.uint32), dtype)


def rows_metal(fmt: BlockFormat, cols: int, arrays: Arrays, ids: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Rows `ids` (...) of the matrix: (..., cols) in `dtype`, as `codec.rows_ops`. The ids are not checked."""
    indices = ids.reshape(-1)
    body = """
        uint block = thread_position_in_grid.x, place = thread_position_in_grid.y, cols = uint(columns);
        decode_row_block(store, exponent_bias[0], uint(indices[place]), block, cols, out + place * cols);
    """
    grid = (fmt.blocks(cols), indices.size, 1)
    names, inputs = ("indices", "columns"), [indices, mx.array(cols, mx.int32)]
    shape = (indices.size, cols)
    [out] = _launch(fmt, "rows", body, arrays, names, inputs, grid, (256, 1, 1), shape, dtype)
    return out.reshape(*ids.shape, cols)


def matmul_metal(fmt: BlockFormat, arrays: Arrays, x: mx.array, form: str = "Windows") -> mx.array:
    """x (..., cols) → x Wᵀ (..., rows) in x's type, as `codec.matmul_ops`.

    form: for one token, "Windows" (AND only) or "Shifts" (a shift and a conversion a state: slower, more accurate).
    """
    vectors = x.reshape(-1, x.shape[-1])
    rows, tokens = _rows(fmt, arrays), vectors.shape[0]
    if tokens <= FEW_TOKENS:
        out = _few_tokens(fmt, arrays, vectors, rows, form)
    else:
        out = _many_tokens(fmt, arrays, vectors, rows)
    return out.reshape(*x.shape[:-1], rows)


def _few_tokens(fmt, arrays, vectors, rows, form):
    tokens = vectors.shape[0]
    rows_each = 4 if rows >= MANY_ROWS else 2
    product = f"matvec<{form}<Store::C, Store::P>, {rows_each}>" if tokens == 1 else f"matvecs<{tokens}, {rows_each}>"
    body = f"""
        {TABLES}
        {product}(store, vectors, exponent_bias[0], {_first(fmt)}_shape[0], vectors_shape[1], out, tables,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """
    groups = -(-rows // (SIMDGROUPS * rows_each))
    grid, threadgroup = (groups * SIMDGROUPS * 32, 1, 1), (SIMDGROUPS * 32, 1, 1)
    name = f"{form.lower()}_{rows_each}" if tokens == 1 else f"vectors_{tokens}_{rows_each}"
    shape = (tokens, rows)
    [out] = _launch(fmt, name, body, arrays, ("vectors",), [vectors], grid, threadgroup, shape, vectors.dtype)
    return out


def _many_tokens(fmt, arrays, vectors, rows):
    tokens = vectors.shape[0]
    tile = 32 if tokens <= 32 else 64
    body = f"""
        {TABLES}
        threadgroup float token_tile[{tile} * Tile<Store>::pitch];
        threadgroup float weight_tile[Tile<Store>::rows * Tile<Store>::pitch];
        matmul<{tile}>(store, vectors, exponent_bias[0], {_first(fmt)}_shape[0], vectors_shape[1], vectors_shape[0],
            out, tables, token_tile, weight_tile, threadgroup_position_in_grid.xy, simdgroup_index_in_threadgroup,
            thread_index_in_simdgroup);
    """
    grid = (-(-rows // TILE_ROWS) * 128, -(-tokens // tile), 1)
    name, shape = f"tiles_{tile}", (tokens, rows)
    [out] = _launch(fmt, name, body, arrays, ("vectors",), [vectors], grid, (128, 1, 1), shape, vectors.dtype)
    return out


def _launch(fmt, name, body, arrays, names, inputs, grid, threadgroup, shape, dtype):
    """Run `body` after the line that declares `store`; `names` and `inputs` are those beside the stored arrays."""
    stored = ("seeds", "coefficients", "exponents") if fmt.planar else ("blocks",)
    if fmt.planar:
        entry = "uint2" if fmt.columns * fmt.states > 33 else "uint"  # bits after the seed: 31 or 47
        kinds = ", ".join(f"decltype({each})" for each in stored)
        kind = f"Planar<{fmt.columns}, {fmt.states}, {entry}, {kinds}>"
    else:
        kind = "Packed<decltype(blocks)>"
    declaration = f"using Store = {kind};\n Store store{{{', '.join(stored)}, uint({stored[0]}_shape[1])}};\n"
    all_names = (*stored, "exponent_bias", *names)
    title = f"seedlm_{fmt.name.replace('.', '_')}_{name}"
    kernel = kernels.metal_kernel("seedlm", title, all_names, ("out",), declaration + body)
    return kernel(
        inputs=[*(arrays[each] for each in all_names[: len(stored) + 1]), *inputs],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape],
        output_dtypes=[dtype],
    )


def _first(fmt):
    return "seeds" if fmt.planar else "blocks"


def _rows(fmt, arrays):
    return arrays[_first(fmt)].shape[0]
