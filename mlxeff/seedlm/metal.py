"""Launches of the Metal kernels in metal/seedlm.metal: decoding, embedding look-ups and products with seed-encoded
matrices.

Each function has the arguments and the result of the function with the suffix `_ops` in `codec`; the caller chooses
between the two. Products are summed in float32 with weights that are not rounded, whatever the type of x.
"""

from collections.abc import Mapping

import mlx.core as mx

from .. import kernels
from .format import BlockFormat

Arrays = Mapping[str, mx.array]

SIMDGROUPS = 8  # simdgroups in a threadgroup of the kernels for few tokens
FEW_TOKENS = 8  # for up to so many tokens, each simdgroup computes whole rows; for more, tiles with matrix instructions
TILE_ROWS = 64  # rows of the matrix in a tile
MANY_ROWS = 2048  # for matrices of so many rows, a simdgroup computes 4 rows instead of 2: all cores still get work
TABLES = "threadgroup Store::Entry tables[512];"  # declaration of the two look-up tables of 256 entries, see `lfsr`


def decode_metal(fmt: BlockFormat, cols: int, arrays: Arrays, dtype: mx.Dtype = mx.float32) -> mx.array:
    """All weights of a matrix, (rows, cols) in `dtype`: the same to the bit as `codec.decode_ops`."""
    return rows_metal(fmt, cols, arrays, mx.arange(_rows(fmt, arrays), dtype=mx.uint32), dtype)


def rows_metal(fmt: BlockFormat, cols: int, arrays: Arrays, ids: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The rows `ids` (...) of the matrix in `dtype`, (..., cols), as `codec.rows_ops`. Ids are not checked: one outside
    of the matrix reads other memory."""
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

    form: which kernel computes a single token. "Windows" needs no shift and no conversion of register states, "Shifts"
    needs both for each state and is slower and more accurate. Both are explained in metal/seedlm.metal.
    """
    vectors = x.reshape(-1, x.shape[-1])
    rows, tokens = _rows(fmt, arrays), vectors.shape[0]
    if tokens <= FEW_TOKENS:
        out = _few_tokens(fmt, arrays, vectors, rows, form)
    else:
        out = _many_tokens(fmt, arrays, vectors, rows)
    return out.reshape(*x.shape[:-1], rows)


def _few_tokens(fmt: BlockFormat, arrays: Arrays, vectors: mx.array, rows: int, form: str) -> mx.array:
    """The product for up to FEW_TOKENS `vectors` (tokens, cols); returns (tokens, rows)."""
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


def _many_tokens(fmt: BlockFormat, arrays: Arrays, vectors: mx.array, rows: int) -> mx.array:
    """The product for any number of `vectors` (tokens, cols), in tiles; returns (tokens, rows)."""
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


def _launch(
    fmt: BlockFormat,
    name: str,
    body: str,
    arrays: Arrays,
    names: tuple[str, ...],
    inputs: list[mx.array],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> list[mx.array]:
    """Run the kernel whose body is `body`, after a line that declares `store`, the reader of the stored arrays.

    The kernel's inputs are the stored arrays and, under the names `names`, the arrays `inputs`. Its only output "out"
    has this shape and dtype. The grid is in threads, as MLX counts it.
    """
    stored = ("seeds", "coefficients", "exponents") if fmt.planar else ("blocks",)
    if fmt.planar:
        entry = "uint2" if fmt.columns * fmt.states > 33 else "uint"  # a table entry has 31 or 47 bits of the stream
        kinds = ", ".join(f"decltype({key})" for key in stored)
        kind = f"Planar<{fmt.columns}, {fmt.states}, {entry}, {kinds}>"
    else:
        kind = "Packed<decltype(blocks)>"
    declaration = f"using Store = {kind};\n Store store{{{', '.join(stored)}, uint({stored[0]}_shape[1])}};\n"
    all_names = (*stored, "exponent_bias", *names)
    title = f"seedlm_{fmt.name.replace('.', '_')}_{name}"
    kernel = kernels.metal_kernel("seedlm", title, all_names, ("out",), declaration + body)
    return kernel(
        inputs=[*(arrays[key] for key in (*stored, "exponent_bias")), *inputs],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape],
        output_dtypes=[dtype],
    )


def _first(fmt: BlockFormat) -> str:
    """The name of the first stored array, which has one row for each row of the matrix."""
    return "seeds" if fmt.planar else "blocks"


def _rows(fmt: BlockFormat, arrays: Arrays) -> int:
    """Rows of the matrix."""
    return arrays[_first(fmt)].shape[0]
