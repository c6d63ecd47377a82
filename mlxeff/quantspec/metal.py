"""Launches of the Metal kernels of QuantSpec's KV cache in metal/quantspec.metal and metal/quantspec_store.metal:
attention over the planes, and the tiles that new tokens change.

Shapes: B batch, G KV heads, R query heads for each of them, M new tokens of a query, S new tokens to store, E head
size. `planes` says how codes lie in bytes. A tile has TILE tokens; per batch, KV head and tile there are

    upper           uint8 (B, G, tiles, 16 E + 128): 16 key scales, 16 key zeros, 16 value scales and 16 value zeros,
                    float16; then the upper halves of the keys' codes and those of the values'
    lower_keys      uint8 (B, G, tiles from `first_keys` on, 8 E): the lower halves of the keys' codes
    lower_values    uint8 (B, G, tiles from `first_values` on, 8 E)

Arrays must be whole buffers, row by row: MLX copies a slice before a kernel reads it. A launch reads `length`, the
first tiles and the window from an array, so no kernel is compiled again as a cache grows.
"""

import math

import mlx.core as mx

from .. import kernels
from .planes import HEAD_SIZES, TILE, rotate

PART = 512  # tokens that one threadgroup reads; parts are counted from token 0
MOST_ROWS = 64  # query rows of one KV head, R M


def attend(
    queries: mx.array,
    upper: mx.array,
    lower_keys: mx.array,
    lower_values: mx.array,
    length: int,
    first_keys: int,
    first_values: int,
    coarse_keys: int,
    coarse_values: int,
    scale: float,
    window: int | None = None,
) -> mx.array:
    """softmax(scale · q kᵀ) v of the newest M of `length` cached tokens, queries (B, G R, M, E) with positions encoded
    and not rotated by Hadamard; returns the same shape and type. A query sees its own token and all before it, or the
    last `window` ones. The lower planes begin at the tiles `first_…`; tiles before `coarse_…` (≥ `first_…`) are read
    from the upper plane alone, whatever the lower one holds. Scores and sums are float32. Up to MOST_ROWS rows R M; a
    row's result has the same bits alone and among others. Raises ValueError for what the kernel does not compute.

    The queries are rotated by `planes.rotate`, not by the kernel: one threadgroup for each 512 tokens would repeat it,
    and would need 32 KiB of threadgroup memory for 64 rows of 128 channels, which it reads from device memory instead.
    """
    batch, heads, tokens, size = queries.shape
    groups, tiles = upper.shape[1:3]
    rows = heads // groups * tokens
    if size not in HEAD_SIZES or rows > MOST_ROWS or heads % groups or not tokens <= length <= tiles * TILE:
        raise ValueError(f"attention to planes: queries {queries.shape}, {length} tokens, upper plane {upper.shape}")
    words = upper.view(mx.uint32)
    rotated = rotate(queries).reshape(batch * groups, heads // groups, tokens, size)
    inputs = {
        "queries": rotated,
        "upper": words,
        "lower_keys": _words(lower_keys, words),
        "lower_values": _words(lower_values, words),
        "view": mx.array([length, window or 0, first_keys, first_values, coarse_keys, coarse_values], mx.int32),
        "scale": mx.array(scale * math.log2(math.e), mx.float32),
    }
    parts, blocks = -(-length // PART), -(-rows // 8)
    outputs = {
        "sums": ((parts, batch * groups * rows, size), mx.float32),
        "stats": ((parts, batch * groups * rows, 2), mx.float32),
    }
    body = f"""
        threadgroup float scores[{8 * blocks} * pitch];
        threadgroup float memory[{40 * blocks}];
        uint part = threadgroup_position_in_grid.x, head = threadgroup_position_in_grid.y;
        uint tokens = queries_shape[2], rows = queries_shape[1] * tokens;
        ulong wide = head, at = (ulong(part) * queries_shape[0] + head) * rows;
        attend_part<{size}, {blocks}>(queries + head * rows * {size}, upper + wide * upper_shape[2] * upper_shape[3],
            lower_keys + wide * lower_keys_shape[2] * lower_keys_shape[3],
            lower_values + wide * lower_values_shape[2] * lower_values_shape[3], view_of(view), scale, rows, tokens,
            part, sums + at * {size}, stats + at * 2, scores, memory, simdgroup_index_in_threadgroup,
            thread_index_in_simdgroup);
    """
    grid = (parts * 128, batch * groups, 1)
    sums, stats = _launch("quantspec", f"part_{size}_{blocks}", body, inputs, outputs, grid)
    body = f"""
        threadgroup float memory[{size}];
        merge_parts<{size}, {size & -size}>(sums, stats, sums_shape[0], sums_shape[1], threadgroup_position_in_grid.x,
            out, memory, thread_index_in_threadgroup);
    """
    outputs = {"out": (queries.shape, queries.dtype)}
    grid = (sums.shape[1] * 128, 1, 1)
    return _launch("quantspec", f"merge_{size}", body, {"sums": sums, "stats": stats}, outputs, grid)[0]


def store(
    keys: mx.array,
    values: mx.array,
    upper: mx.array,
    lower_keys: mx.array,
    lower_values: mx.array,
    length: int,
    first_keys: int,
    first_values: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """The tiles (upper, lower_keys, lower_values) that new keys and values (B, G, S, E) change, which are those of the
    tokens `length`, `length` + 1, …: positions encoded, not rotated by Hadamard, of any float type. The bytes of other
    tokens are those of the arrays. For the caller to write back, with t = length // TILE: the first result from tile t
    on, the others from their tile max(t - first_…, 0) on; a lower plane that has none of these tiles gives an array
    without tiles. To the bit what `planes.encode` of `planes.rotate` gives. Raises ValueError for arrays without room.
    """
    batch, groups, new, size = keys.shape
    begin, end = length // TILE, -(-(length + new) // TILE)
    first = {"upper": 0, "lower_keys": first_keys, "lower_values": first_values}
    begins = {name: max(begin, tile) for name, tile in first.items()}
    planes = {"upper": upper, "lower_keys": lower_keys, "lower_values": lower_values}
    room = all(begins[name] >= end or end - first[name] <= plane.shape[2] for name, plane in planes.items())
    if size not in HEAD_SIZES or not new or not room:
        shapes = ", ".join(str(plane.shape) for plane in planes.values())
        raise ValueError(f"storing in planes: {new} tokens after {length}, heads of {size}, planes {shapes}")
    numbers = [each.reshape(batch * groups, new, size) for each in (rotate(keys), rotate(values))]
    words = upper.view(mx.uint32)
    cached = {"upper": words, "lower_keys": _words(lower_keys, words), "lower_values": _words(lower_values, words)}
    inputs = {"keys": numbers[0], "values": numbers[1], **cached}
    inputs["place"] = mx.array([length, first_keys, first_values], mx.int32)
    outputs = {}
    for name, plane in planes.items():  # an output needs memory even where it has no tile
        shape = (batch, groups, max(end - begins[name], 1), plane.shape[3] // 4)
        outputs[f"new_{name}"] = (shape, mx.uint32)
    body = f"""
        threadgroup uchar codes[{2 * TILE * size}];
        threadgroup ushort scales[{4 * TILE}];
        uint length = place[0], begin = length / {TILE}, first_keys = place[1], first_values = place[2];
        store<{size}>(keys, values, length, keys_shape[1],
            Plane{{upper, new_upper, 0, begin, uint(upper_shape[2]), threadgroups_per_grid.x, {4 * size + 32}}},
            Plane{{lower_keys, new_lower_keys, first_keys, max(begin, first_keys), uint(lower_keys_shape[2]),
                begin + threadgroups_per_grid.x - max(begin, first_keys), {2 * size}}},
            Plane{{lower_values, new_lower_values, first_values, max(begin, first_values),
                uint(lower_values_shape[2]), begin + threadgroups_per_grid.x - max(begin, first_values), {2 * size}}},
            codes, scales, threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """
    grid = ((end - begin) * 128, batch * groups, 1)
    stored = _launch("quantspec_store", f"store_{size}", body, inputs, outputs, grid)
    tiles = [max(end - each, 0) for each in begins.values()]
    return tuple(each.view(mx.uint8)[:, :, :count] for each, count in zip(stored, tiles, strict=True))


def _words(plane: mx.array, instead: mx.array) -> mx.array:
    """A lower plane as words; `instead`, which no thread reads there, for one without tiles: a kernel needs memory."""
    return plane.view(mx.uint32) if plane.size else instead


def _launch(
    family: str,
    name: str,
    body: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
) -> list[mx.array]:
    """Run a kernel of threadgroups of 128 threads; `outputs` are shapes and types, the grid is in threads."""
    kernel = kernels.metal_kernel(family, f"quantspec_{name}", tuple(inputs), tuple(outputs), body)
    return kernel(
        inputs=list(inputs.values()),
        grid=grid,
        threadgroup=(128, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
