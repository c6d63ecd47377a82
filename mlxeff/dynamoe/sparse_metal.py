"""Launches of the Metal kernels in metal/sparse.metal: a step of decoding through a feed-forward network that leaves
out inputs, y = down(silu(gate(x)) · up(x)), see `sparse`. Two launches, and the host waits for neither.

Shapes: T tokens, 1 to MOST_TOKENS; D channels of x and y; F neurons. `gate_up` is a `Columns` of 2 F outputs, in the
order of `sparse.interleaved`, and D inputs; `down` one of D outputs and F inputs. Sums and the values of the neurons
are float32. The threshold is an argument of the kernels: another one compiles nothing. A token's result has the same
bits alone and among others.
"""

import functools
import zlib
from dataclasses import dataclass

import mlx.core as mx

from .. import kernels
from ..ops import FLOATS, GROUPS
from .columns import BITS, INPUTS, OUTPUTS, STRIP, Columns

Names = tuple[str, ...]
Source = tuple[str, Names, str]  # of a kernel: its name, its inputs, its body

MOST_TOKENS = 8
THREADS = 512  # of a threadgroup
DENSE_PIECE = 128  # outputs of a dense matrix that a threadgroup computes; of an affine one it computes a strip
PLACE = """threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup"""


@dataclass(frozen=True, eq=False)
class Parts:
    """A network: its matrices, and the weights of the inputs of each."""

    gate_up: Columns
    down: Columns
    input_weights: mx.array  # (D)
    neuron_weights: mx.array  # (F)

    @functools.cached_property
    def refusal(self) -> str:
        """What in these arrays the kernels do not compute, or ""."""
        if found := _gate_up_refusal(self.gate_up, self.input_weights) or _down_refusal(self.down, self.neuron_weights):
            return found
        size, neurons = self.gate_up.inputs, self.down.inputs
        if self.gate_up.outputs == 2 * neurons and self.down.outputs == size:
            return ""
        return f"gate_up of {self.gate_up.outputs} outputs and {size} inputs, down of {self.down.outputs} and {neurons}"


def supported(parts: Parts, tokens: int = 1) -> bool:
    """Whether `decode` computes that many tokens with these arrays."""
    return 1 <= tokens <= MOST_TOKENS and not parts.refusal


def decode(x: mx.array, parts: Parts, threshold: float) -> tuple[mx.array, mx.array, mx.array]:
    """The network's output y (T, D) of x (T, D), in x's type; how many inputs of gate and up count for each token, and
    how many of down, both uint32 (T). Raises ValueError for what the kernels do not compute."""
    _check(x, parts.gate_up.inputs, parts.refusal)
    limit = mx.array(threshold, mx.float32)
    hidden, kept_inputs = _neurons(x, parts.gate_up, parts.input_weights, limit)
    y, kept_neurons = _output(hidden, parts.down, parts.neuron_weights, limit, x.dtype)
    return y, kept_inputs, kept_neurons


def neurons(x: mx.array, gate_up: Columns, weights: mx.array, threshold: float) -> tuple[mx.array, mx.array]:
    """The values of the neurons silu(gate(x)) · up(x), float32 (T, F), of the inputs that count in x (T, D), which have
    the weights (D); and how many inputs count, uint32 (T). Raises ValueError for what the kernel does not compute."""
    _check(x, gate_up.inputs, _gate_up_refusal(gate_up, weights))
    return _neurons(x, gate_up, weights, mx.array(threshold, mx.float32))


def output(
    hidden: mx.array, down: Columns, weights: mx.array, threshold: float, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """down(hidden) (T, D) in a type, of the neurons that count in hidden (T, F), which have the weights (F); and how
    many neurons count, uint32 (T). Raises ValueError for what the kernel does not compute."""
    _check(hidden, down.inputs, _down_refusal(down, weights))
    return _output(hidden, down, weights, mx.array(threshold, mx.float32), dtype)


# ---- What the kernels compute ---------------------------------------------------------------------------------------


def _check(x: mx.array, inputs: int, found: str) -> None:
    """Raise ValueError for a refusal that is not "", or for x that is not (T, inputs)."""
    if found or x.ndim != 2 or x.shape[1] != inputs or not 1 <= x.shape[0] <= MOST_TOKENS or x.dtype not in FLOATS:
        raise ValueError(f"inputs that are left out: {found or f'{inputs} inputs, tokens {x.shape} {x.dtype}'}")


def _gate_up_refusal(matrix: Columns, weights: mx.array) -> str:
    biased = "gate_up with a bias" if "bias" in matrix else ""
    return _matrix_refusal("gate_up", matrix) or biased or _weights_refusal(weights, matrix.inputs)


def _down_refusal(matrix: Columns, weights: mx.array) -> str:
    found = _matrix_refusal("down", matrix) or _weights_refusal(weights, matrix.inputs)
    fit = "bias" not in matrix or matrix.bias.shape == (matrix.outputs,)
    return found or ("" if fit else f"down of {matrix.outputs} outputs, bias {matrix.bias.shape}")


def _matrix_refusal(name: str, matrix: Columns) -> str:
    if type(matrix) is not Columns:
        return f"{name} of type {type(matrix).__name__}"
    outputs, inputs, weight = matrix.outputs, matrix.inputs, matrix.weight
    shaped = not outputs % OUTPUTS and not inputs % INPUTS and outputs and inputs
    if matrix.bits:
        bits, group, scales, biases = matrix.bits, matrix.group_size, matrix.scales, matrix.biases
        known = bits in BITS and group in GROUPS and not inputs % group and weight.dtype == mx.uint32
        same = scales.dtype == biases.dtype and scales.dtype in FLOATS and scales.shape == biases.shape
        if shaped and known and same:
            shaped = weight.shape == (inputs * outputs * bits // 32,) and scales.shape == (inputs // group * outputs,)
        kind = f"{bits} bits, groups of {group}, weight {weight.shape}, scales {scales.shape} {scales.dtype}"
        return "" if shaped and known and same else f"{name} of {outputs} outputs and {inputs} inputs, {kind}"
    if shaped and weight.dtype in FLOATS and weight.shape == (inputs, outputs):
        return ""
    return f"{name} of {outputs} outputs and {inputs} inputs, dense, weight {weight.shape} {weight.dtype}"


def _weights_refusal(weights: mx.array, inputs: int) -> str:
    fit = weights.shape == (inputs,) and weights.dtype in FLOATS
    return "" if fit else f"weights {weights.shape} {weights.dtype} of {inputs} inputs"


# ---- Launches -------------------------------------------------------------------------------------------------------


def _neurons(x: mx.array, gate_up: Columns, weights: mx.array, threshold: mx.array) -> tuple[mx.array, mx.array]:
    """The launch of `neurons`."""
    inputs = _arrays(gate_up) | {"x": x, "weights": weights, "threshold": threshold}
    source = _neurons_source(gate_up.bits, gate_up.group_size, tuple(inputs))
    return _launch(source, inputs, gate_up, (x.shape[0], gate_up.outputs // 2), mx.float32)


def _output(
    hidden: mx.array, down: Columns, weights: mx.array, threshold: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The launch of `output`."""
    inputs = _arrays(down) | {"x": hidden, "weights": weights, "threshold": threshold}
    inputs |= {"bias": down.bias} if "bias" in down else {}
    source = _output_source(down.bits, down.group_size, "bias" in down, tuple(inputs))
    return _launch(source, inputs, down, (hidden.shape[0], down.outputs), dtype)


def _launch(
    source: Source, inputs: dict[str, mx.array], matrix: Columns, shape: tuple[int, int], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """A kernel over the pieces of a matrix and the tokens; the tokens of one piece are neighbours, because they read
    the same columns. Returns what it computes, (T, …), and the counts, uint32 (T)."""
    name, names, body = source
    kernel = kernels.metal_kernel("sparse", name, names, ("out", "kept"), body)
    pieces = -(-matrix.outputs // (STRIP // matrix.bits if matrix.bits else DENSE_PIECE))
    out, kept = kernel(
        inputs=list(inputs.values()),
        grid=(shape[0] * THREADS, pieces, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape, shape[:1]],
        output_dtypes=[dtype, mx.uint32],
    )
    return out, kept


# ---- Sources of the kernels -----------------------------------------------------------------------------------------


def _named(what: str, body: str, names: Names) -> Source:
    """The kernel with this body. MLX compiles a kernel anew where its name comes with another source than before. It
    adds the types of the arrays to the name, so what is left to tell apart are the bodies."""
    return f"sparse_{what}_{zlib.crc32(body.encode()):08x}", names, body


@functools.cache
def _neurons_source(bits: int | None, group: int | None, names: Names) -> Source:
    body = f"""
        {_columns(bits, group)}
        gate_up(columns, x, weights, threshold, x_shape[1], outputs / 2, memory, counts, out, kept, {PLACE});
    """
    return _named("gate_up", body, names)


@functools.cache
def _output_source(bits: int | None, group: int | None, bias: bool, names: Names) -> Source:
    body = f"""
        {_columns(bits, group)}
        down(columns, x, weights, threshold, x_shape[1], outputs, {"bias" if bias else "Zeros{}"}, memory, counts, out,
            kept, {PLACE});
    """
    return _named("down", body, names)


def _arrays(matrix: Columns) -> dict[str, mx.array]:
    """The inputs of a kernel that `_columns` names."""
    names = ("weight", "scales", "biases") if matrix.bits else ("weight",)
    return {name: matrix[name] for name in names}


def _columns(bits: int | None, group: int | None) -> str:
    """The statements of a kernel's body that declare `outputs`, the lane's `columns`, and the threadgroup's memory."""
    if bits:
        kind = f"Affine<{bits}, {group}, decltype(weight), decltype(scales)>"
        outputs, arrays = f"scales_shape[0] / (x_shape[1] / {group})", "weight, scales, biases, x_shape[1]"
    else:
        kind, outputs, arrays = "Dense<decltype(weight)>", "weight_shape[1]", "weight"
    return f"""
        using Matrix = {kind};
        threadgroup float memory[simdgroups * Matrix::piece];
        threadgroup uint counts[simdgroups];
        uint outputs = {outputs};
        Matrix columns = Matrix::at({arrays}, outputs, threadgroup_position_in_grid.y, thread_index_in_simdgroup);
    """
