"""Launches of the Metal kernels in metal/dynamoe.metal: a step of decoding through a feed-forward layer with nested
experts, y = down (silu(gate x) · up x), of which a token uses the first neurons, as many as its expert is wide.

Shapes: T tokens, 1 to MOST_TOKENS; D channels of x and y; F hidden neurons; E experts, 2 to MOST_EXPERTS, of which the
last one has all F neurons; R scores of the router, E or E - 1. A matrix is an array of float32, float16 or bfloat16, or
a `Quantized`: affine, with 4 or 8 bits and groups of 32, 64 or 128 columns. Sums are float32.

The experts' numbers stay on the GPU. The kernels read the weights of the experts that they find there, those of
several tokens once, and no others. A token's result has the same bits alone and among others.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .. import kernels
from ..ops import FLOATS, Quantized

Matrix = mx.array | Quantized
Packing = tuple[int, int]  # bits and group size; 0 and 0 of a dense matrix
Names = tuple[str, ...]
Source = tuple[str, Names, str]  # of a kernel: its name, its inputs, its body

MOST_TOKENS = 8
MOST_EXPERTS = 4
RULES = ("lagrangian", "tail")
BITS, GROUPS = (4, 8), (32, 64, 128)
# Tokens that a kernel has room for → rows of each matrix that a simdgroup computes: few for many tokens, whose sums
# would not fit into the registers.
ROWS = {1: 4, 4: 2, 8: 2}
SIMDGROUPS = 4  # of a threadgroup of `gate_up` and `down`
ROUTER_THREADS = 256
EXPERTS = """Experts<decltype(chosen), decltype(widths)> experts{{chosen, widths, uint(chosen_shape[0]),
            uint(widths_shape[0]), {}}};"""
PLACE = "threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"


@dataclass(frozen=True)
class Parts:
    """The arrays of a layer, of which those with a default of None or () are optional."""

    router: mx.array  # (R, D) float32
    router_bias: mx.array  # (R) float32
    prices: mx.array | None  # (E) float32; the rule "tail" needs none
    rule: str  # of RULES
    widths: mx.array  # (E) uint32, rising, the last one F
    gate: Matrix  # (F, D)
    up: Matrix  # (F, D), packed like `gate`
    downs: tuple[Matrix, ...]  # of each expert (D, its width); or one (D, F), of which all read their first columns
    gate_bias: mx.array | None = None  # (F)
    up_bias: mx.array | None = None  # (F)
    down_bias: mx.array | None = None  # (D)
    # (F) int32 or uint32: of each neuron its column in the widest expert's down matrix; None: the same order
    order: mx.array | None = None
    # Low-rank corrections of the down matrices of the first experts, as many as there are: left (right h) is added.
    lefts: tuple[Matrix, ...] = ()  # (D, r)
    rights: tuple[Matrix, ...] = ()  # (r, width)

    @functools.cached_property
    def refusal(self) -> str:
        """What in these arrays the kernels do not compute, or ""."""
        neurons, count = _shape(self.gate)[0], self.widths.size
        refusal = _router_refusal(self.router, self.router_bias, self.prices, self.rule, count)
        refusal = refusal or _gate_up_refusal(self.gate, self.up, self.gate_bias, self.up_bias, self.order)
        if self.order is not None and len(self.downs) == 1:
            refusal = refusal or "an order of the neurons, and one down matrix of all experts"
        refusal = refusal or _down_refusal(self.downs, count, self.down_bias, self.lefts, self.rights, neurons)
        return refusal or ("" if _shape(self.gate)[1] == self.router.shape[1] else f"router {self.router.shape}")


def supported(parts: Parts, tokens: int = 1) -> bool:
    """Whether `decode` computes that many tokens with these arrays."""
    return 1 <= tokens <= MOST_TOKENS and not parts.refusal


def decode(x: mx.array, parts: Parts, dial: mx.array | float) -> mx.array:
    """The layer's output y (T, D) of x (T, D), in x's type: three launches, and one more where there are low-rank
    corrections. Raises ValueError for what the kernels do not compute."""
    p = parts
    _check(x, p.router.shape[1], p.refusal)
    chosen = _route(x, p.router, p.router_bias, p.prices if p.rule == "lagrangian" else None, dial)
    return experts(x, p, chosen)


def experts(x: mx.array, parts: Parts, chosen: mx.array) -> mx.array:
    """The output y (T, D) of the experts `chosen`, uint32 (T), of the tokens x (T, D). Raises ValueError for what the
    kernels do not compute."""
    p = parts
    _check(x, p.router.shape[1], p.refusal or _experts_refusal(x, p.widths, chosen))
    h = _gate_up(x, p.gate, p.up, p.widths, chosen, p.gate_bias, p.up_bias, p.order)
    return _down(h, p.downs, p.widths, chosen, p.down_bias, p.lefts, p.rights)


def route(
    x: mx.array, weight: mx.array, bias: mx.array, prices: mx.array | None, rule: str, dial: mx.array | float
) -> mx.array:
    """The number of each token's expert, uint32 (T), from x (T, D) and the scores s = weight x + bias.

    "lagrangian", R = E - 1: the expert that costs least, a smaller one exp(s) + dial · price, the widest one
    dial · price; the wider one where costs are the same. "tail", R = E: the first one after which the sum of
    softmax(s) is at most the dial. A score that is NaN gives the widest.
    """
    count = weight.shape[0] + (rule == "lagrangian")
    _check(x, weight.shape[-1], _router_refusal(weight, bias, prices, rule, count))
    return _route(x, weight, bias, prices if rule == "lagrangian" else None, dial)


def gate_up(
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    widths: mx.array,
    chosen: mx.array,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
    order: mx.array | None = None,
) -> mx.array:
    """h (T, F) = silu(gate x + gate_bias) · (up x + up_bias) in x's type, of the neurons of the token's expert. The
    numbers after them are not written: they are what the memory held before, and nothing may read them. With `order`
    (F) the number of neuron n is at order[n] where the token's expert is the widest."""
    refusal = _gate_up_refusal(gate, up, gate_bias, up_bias, order) or _experts_refusal(x, widths, chosen)
    _check(x, _shape(gate)[-1], refusal)
    return _gate_up(x, gate, up, widths, chosen, gate_bias, up_bias, order)


def down(
    h: mx.array,
    downs: Sequence[Matrix],
    widths: mx.array,
    chosen: mx.array,
    bias: mx.array | None = None,
    lefts: Sequence[Matrix] = (),
    rights: Sequence[Matrix] = (),
) -> mx.array:
    """y (T, D) = down h + bias in h's type, of the neurons of the token's expert in h (T, F), with the matrix of that
    expert (D, width), or with the first columns of one matrix (D, F) that is the only one in `downs`. Of the first
    experts, as many as there are `lefts` (D, r) and `rights` (r, width): left (right h) is added, by one more launch
    and without rounding right h."""
    refusal = _down_refusal(downs, widths.size, bias, lefts, rights, h.shape[-1])
    _check(h, h.shape[-1], refusal or _experts_refusal(h, widths, chosen))
    return _down(h, downs, widths, chosen, bias, lefts, rights)


# ---- What the kernels compute ---------------------------------------------------------------------------------------


def _check(x: mx.array, columns: int, refusal: str) -> None:
    """Raise ValueError for a refusal that is not "", or for x that is not (T, columns)."""
    if refusal or x.ndim != 2 or x.shape[1] != columns or not 1 <= x.shape[0] <= MOST_TOKENS or x.dtype not in FLOATS:
        raise ValueError(f"nested experts: {refusal or f'{columns} columns, tokens {x.shape} {x.dtype}'}")


def _experts_refusal(x: mx.array, widths: mx.array, chosen: mx.array) -> str:
    fit = chosen.shape == x.shape[:1] and widths.ndim == 1 and 1 <= widths.size <= MOST_EXPERTS
    return "" if fit else f"widths {widths.shape}, experts {chosen.shape} of tokens {x.shape}"


def _router_refusal(weight: mx.array, bias: mx.array, prices: mx.array | None, rule: str, count: int) -> str:
    rows = count - (rule == "lagrangian")
    priced = rule == "tail" or (prices is not None and prices.shape == (count,))
    shaped = weight.ndim == 2 and weight.shape[0] == rows and bias.shape == (rows,)
    if rule in RULES and 2 <= count <= MOST_EXPERTS and shaped and priced:
        return ""
    prices_shape = getattr(prices, "shape", None)
    return f"router {weight.shape} of {count} experts, bias {bias.shape}, rule {rule}, prices {prices_shape}"


def _gate_up_refusal(
    gate: Matrix, up: Matrix, gate_bias: mx.array | None, up_bias: mx.array | None, order: mx.array | None
) -> str:
    kinds = [(_packing(each), _dtype(each), _shape(each)) for each in (gate, up)]
    if not _readable(gate) or not _readable(up) or kinds[0] != kinds[1]:
        return f"gate {_described(gate)}, up {_described(up)}"
    if order is not None and (order.shape != (_shape(gate)[0],) or order.dtype not in (mx.int32, mx.uint32)):
        return f"gate {_shape(gate)}, order {order.shape} {order.dtype}"
    biases = [each.shape for each in (gate_bias, up_bias) if each is not None]
    return "" if all(shape == (_shape(gate)[0],) for shape in biases) else f"gate {_shape(gate)}, biases {biases}"


def _down_refusal(
    downs: Sequence[Matrix],
    count: int,
    bias: mx.array | None,
    lefts: Sequence[Matrix],
    rights: Sequence[Matrix],
    neurons: int,
) -> str:
    described = ", ".join(map(_described, (*downs, *lefts, *rights)))
    if len(downs) not in (1, count) or not all(map(_readable, (*downs, *lefts, *rights))):
        return f"{count} experts, matrices {described}"
    rows = _shape(downs[0])[0]
    fit = all(_shape(each)[0] == rows for each in (*downs, *lefts)) and _shape(downs[-1])[1] == neurons
    if not fit or (bias is not None and bias.shape != (rows,)):
        return f"{neurons} neurons, matrices {described}, bias {getattr(bias, 'shape', None)}"
    widths = [_shape(each)[1] for each in downs] if len(downs) > 1 else None
    ranks = {_shape(left)[1] for left in lefts} | {_shape(right)[0] for right in rights}
    paired = len(lefts) == len(rights) < count and len(ranks) <= 1
    if paired and widths:
        paired = all(_shape(right)[1] == width for right, width in zip(rights, widths, strict=False))
    return "" if paired else f"low-rank corrections {described}"


def _readable(matrix: Matrix) -> bool:
    if isinstance(matrix, Quantized):
        packed = matrix.mode == "affine" and matrix.bits in BITS and matrix.group_size in GROUPS
        return packed and matrix.scales.dtype in FLOATS and matrix.weight.ndim == 2
    return matrix.dtype in FLOATS and matrix.ndim == 2


def _shape(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns of a matrix of a scheme that `_readable` accepts."""
    if isinstance(matrix, Quantized):
        return matrix.weight.shape[0], matrix.weight.shape[1] * 32 // matrix.bits
    return matrix.shape


def _packing(matrix: Matrix) -> Packing:
    return (matrix.bits, matrix.group_size) if isinstance(matrix, Quantized) else (0, 0)


def _dtype(matrix: Matrix) -> mx.Dtype:
    """The type of a dense matrix, or of the scales."""
    return matrix.scales.dtype if isinstance(matrix, Quantized) else matrix.dtype


def _described(matrix: Matrix) -> str:
    if isinstance(matrix, Quantized):
        return f"{matrix.mode} {matrix.weight.shape}, {matrix.bits} bits, groups of {matrix.group_size}"
    return f"{matrix.shape} {matrix.dtype}"


# ---- Launches -------------------------------------------------------------------------------------------------------


def _route(x: mx.array, weight: mx.array, bias: mx.array, prices: mx.array | None, dial: mx.array | float) -> mx.array:
    """The launch of `route`; without prices by the rule "tail"."""
    dial = dial.astype(mx.float32).reshape(()) if isinstance(dial, mx.array) else mx.array(dial, mx.float32)
    inputs = {"x": x, "weight": weight, "bias": bias, "dial": dial}
    inputs |= {"prices": prices} if prices is not None else {}
    source = _route_source(weight.shape[0], prices is not None, tuple(inputs))
    return _launch(source, inputs, x.shape[0], ROUTER_THREADS, x.shape[:1], mx.uint32)


def _gate_up(
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    widths: mx.array,
    chosen: mx.array,
    gate_bias: mx.array | None,
    up_bias: mx.array | None,
    order: mx.array | None,
) -> mx.array:
    """The launch of `gate_up`."""
    inputs = {"x": x, "widths": widths, "chosen": chosen} | _arrays("gate", gate) | _arrays("up", up)
    inputs |= {"bias_of_gate": gate_bias} if gate_bias is not None else {}
    inputs |= {"bias_of_up": up_bias} if up_bias is not None else {}
    inputs |= {"order": order} if order is not None else {}
    neurons, room = _shape(gate)[0], _room(x)
    given = tuple(each is not None for each in (gate_bias, up_bias, order))
    source = _gate_up_source(room, _packing(gate), given, tuple(inputs))
    return _launch(source, inputs, *_threads(neurons, room), (x.shape[0], neurons), x.dtype)


def _down(
    h: mx.array,
    downs: Sequence[Matrix],
    widths: mx.array,
    chosen: mx.array,
    bias: mx.array | None,
    lefts: Sequence[Matrix],
    rights: Sequence[Matrix],
) -> mx.array:
    """The launches of `down`."""
    experts = {"h": h, "widths": widths, "chosen": chosen}
    shared = len(downs) < widths.size
    if not rights:
        return _products(experts, downs, shared, h.dtype, bias)
    reduced = _products(experts, rights, False, mx.float32)
    return _products(experts | {"reduced": reduced}, downs, shared, h.dtype, bias, lefts)


def _products(
    inputs: dict[str, mx.array],
    matrices: Sequence[Matrix],
    shared: bool,
    dtype: mx.Dtype,
    bias: mx.array | None = None,
    lefts: Sequence[Matrix] = (),
) -> mx.array:
    """The product of each token with the matrix of its expert, and the input `reduced` with the expert's left matrix.
    Experts without a matrix add nothing. shared: all experts use the first columns of one matrix."""
    h, rows, room = inputs["h"], _shape(matrices[0])[0], _room(inputs["h"])
    packings = tuple(map(_packing, matrices)), tuple(map(_packing, lefts))
    for name, each in [(f"down_{e}", matrix) for e, matrix in enumerate(matrices)]:
        inputs = inputs | _arrays(name, each)
    for name, each in [(f"left_{e}", matrix) for e, matrix in enumerate(lefts)]:
        inputs = inputs | _arrays(name, each)
    inputs |= {"bias": bias} if bias is not None else {}
    source = _products_source(room, *packings, shared, bias is not None, tuple(inputs))
    return _launch(source, inputs, *_threads(rows, room), (h.shape[0], rows), dtype)


def _room(x: mx.array) -> int:
    """How many tokens the kernel has room for that computes those of x."""
    return next(room for room in ROWS if x.shape[0] <= room)


def _threads(rows: int, room: int) -> tuple[int, int]:
    """Threadgroups, and threads of each, of a kernel of which a simdgroup computes ROWS[room] rows."""
    return -(-rows // (SIMDGROUPS * ROWS[room])), SIMDGROUPS * 32


def _launch(
    source: Source, inputs: dict[str, mx.array], groups: int, threads: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    name, names, body = source
    kernel = kernels.metal_kernel("dynamoe", name, names, ("out",), body)
    [out] = kernel(
        inputs=list(inputs.values()),
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return out


# ---- Sources of the kernels -----------------------------------------------------------------------------------------


def _named(what: str, body: str, names: Names) -> Source:
    """The kernel with this body. MLX compiles a kernel anew where its name comes with another source than before. It
    adds the types of the arrays to the name, so what is left to tell apart are the bodies."""
    return f"dynamoe_{what}_{zlib.crc32(body.encode()):08x}", names, body


@functools.cache
def _route_source(rows: int, lagrangian: bool, names: Names) -> Source:
    choice = f"cheapest<{rows}>(scores, prices, dial)" if lagrangian else f"least_tail<{rows}>(scores, dial)"
    body = f"""
        threadgroup float memory[router_simdgroups * {rows}];
        float scores[{rows}];
        router_scores<{rows}>(x, weight, bias, threadgroup_position_in_grid.x, x_shape[1], memory,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup, scores);
        if (thread_position_in_threadgroup.x == 0) out[threadgroup_position_in_grid.x] = {choice};
    """
    return _named("route", body, names)


@functools.cache
def _gate_up_source(room: int, packing: Packing, given: tuple[bool, bool, bool], names: Names) -> Source:
    """`given`: whether there are a bias of gate, a bias of up, and an order of the neurons."""
    pairs = ("bias_of_gate", "Zeros{}"), ("bias_of_up", "Zeros{}"), ("order", "SameOrder{}")
    vectors = ", ".join(name if there else other for (name, other), there in zip(pairs, given, strict=True))
    body = f"""
        {EXPERTS.format("uint(gate_shape[0])")}
        gate_up<{room}, {ROWS[room]}>({_reader("gate", packing)}, {_reader("up", packing)}, {vectors}, x, x_shape[1],
            experts, out, {PLACE});
    """
    return _named("gate_up", body, names)


@functools.cache
def _products_source(
    room: int, downs: tuple[Packing, ...], lefts: tuple[Packing, ...], shared: bool, bias: bool, names: Names
) -> Source:
    steps = [
        f"rows.add({_reader(f'down_{e}', packing)}, {_columns(f'down_{e}', packing)}, false,"
        f" {-1 if shared else e}, h, h_shape[1], experts);"
        for e, packing in enumerate(downs)
    ]
    steps += [
        f"rows.add({_reader(f'left_{e}', packing)}, reduced_shape[1], true, {e}, reduced, reduced_shape[1], experts);"
        for e, packing in enumerate(lefts)
    ]
    body = f"""
        uint first = (threadgroup_position_in_grid.x * simdgroups + simdgroup_index_in_threadgroup) * {ROWS[room]};
        if (first >= uint(down_0_shape[0])) return;
        {EXPERTS.format("uint(h_shape[1])")}
        Rows<{room}, {ROWS[room]}> rows{{first, uint(down_0_shape[0]), thread_index_in_simdgroup, {{}}}};
        {" ".join(steps)}
        rows.write({"bias" if bias else "Zeros{}"}, experts.tokens, out);
    """
    return _named("down", body, names)


def _arrays(name: str, matrix: Matrix) -> dict[str, mx.array]:
    """The inputs of a kernel that `_reader` names."""
    if isinstance(matrix, Quantized):
        return {name: matrix.weight, f"{name}_scales": matrix.scales, f"{name}_biases": matrix.biases}
    return {name: matrix}


def _reader(name: str, packing: Packing) -> str:
    """The expression of a matrix in a kernel's body."""
    bits, group = packing
    if bits:
        kind = f"Affine<{bits}, {group}, decltype({name}), decltype({name}_scales)>"
        return f"{kind}{{{name}, {name}_scales, {name}_biases, {_columns(name, packing)}}}"
    return f"Dense<decltype({name})>{{{name}, {_columns(name, packing)}}}"


def _columns(name: str, packing: Packing) -> str:
    return f"uint({name}_shape[1]){f' * {32 // packing[0]}' if packing[0] else ''}"
