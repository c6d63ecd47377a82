"""A dense feed-forward network → one whose tokens leave out inputs, in closed form and without fine-tuning.

The weight of an input is the root of the KL divergence of the model's predictions, to second order and with all errors
taken as independent, which leaving out an input of size 1 causes:

    down      c_n = Σ_o f_o W_no², with the Fisher information f of the network's outputs (see `fisher`)
    gate, up  Σ_n c_n (E[(u s'(g))²] G_ni² + E[s(g)²] U_ni²), with g and u the outputs of gate and up, s = silu, and
              means over the tokens of a text

Shapes: T tokens, D hidden size, F neurons.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..models.parts import GatedParts, Rows
from ..modules import dense
from .calibrate import FRACTIONS
from .columns import form, refusal, stored_by_columns
from .fit import product, rows_taken
from .fractions import Fractions
from .install import rows_of
from .sparse import SparseFeedForward, interleaved

LOWEST, HIGHEST, STEPS = -80, 40, 64  # of the histograms: powers of two, and steps between two of them


@dataclass
class Moments:
    """What a layer's network read in the text: `inputs` are the hidden states x (T, D) of every second token,
    `gate` and `up` the sums over all tokens of (u s'(g))² and s(g)² of each neuron (F)."""

    inputs: list[mx.array] = field(default_factory=list)
    gate: np.ndarray | float = 0.0
    up: np.ndarray | float = 0.0
    tokens: int = 0

    def add(self, parts: GatedParts, x: mx.array) -> None:
        """Add tokens (B, T, D)."""
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        gate, up = product(parts.gate, x), product(parts.up, x)
        open_ = mx.sigmoid(gate)
        slope = open_ * (1 + gate * (1 - open_)) * up
        sums = mx.sum(mx.square(slope), axis=0), mx.sum(mx.square(gate * open_), axis=0)
        self.gate, self.up = (
            old + np.array(new, np.float64) for old, new in zip((self.gate, self.up), sums, strict=True)
        )
        self.tokens += len(x)
        self.inputs.append(mx.contiguous(x[::2]))
        mx.eval(self.inputs[-1])


def refused(parts: GatedParts) -> str | None:
    """Why a network cannot be stored by columns; None where it can."""
    for name, rows in (("gate", parts.gate), ("up", parts.up), ("down", parts.down)):
        if text := refusal(rows.module):
            return f"{name}: wanted {text}"
    gate, up = (form(rows.module) for rows in (parts.gate, parts.up))
    if gate != up:
        return f"wanted gate and up stored alike, got {gate} and {up} (bits, group size)"
    if any("bias" in rows.module for rows in (parts.gate, parts.up)):
        return "wanted gate and up without biases"
    return None


def network(parts: GatedParts) -> SparseFeedForward:
    """The network by its columns, with the same values; its weights of inputs and its thresholds are not known yet."""
    neurons = rows_of(parts)
    whole = np.arange(neurons)
    gate, up = rows_taken(parts.gate, whole), rows_taken(parts.up, whole)
    order = interleaved(neurons)
    return SparseFeedForward(
        stored_by_columns(_stacked(gate, up), order),
        stored_by_columns(parts.down.module),
        Fractions("threshold", ((0.0, 0.0),)),
    )


def _stacked(first, second):
    """The rows of two linear layers that are stored alike, as one."""
    both = rows_taken(Rows(first), np.arange(first.weight.shape[0]))
    for name in ("weight", "scales", "biases"):
        if first.get(name) is not None:
            both[name] = mx.concatenate([first[name], second[name]])
    return both


def fit_layer(module: SparseFeedForward, parts: GatedParts, seen: Moments, weights: np.ndarray) -> np.ndarray:
    """Give `module` the weights of its inputs. `weights` (D): the Fisher information of the network's outputs.

    Returns the sizes of the inputs of gate and up, and of those of down, times their weights, as two histograms
    (2, bins) of all values that the network has `seen`; bin b is for sizes from 2^(LOWEST + b / STEPS) on.
    """
    down = np.array(dense(parts.down.module), np.float64)
    neurons = weights @ np.square(down)
    inputs = 0
    for rows, squares in ((parts.gate, seen.gate), (parts.up, seen.up)):
        matrix = np.array(dense(rows.module)[rows.start : rows.stop], np.float64)
        inputs = inputs + (neurons * squares / max(1, seen.tokens)) @ np.square(matrix)
    module.input_weights = mx.array(np.sqrt(inputs).astype(np.float32))
    module.neuron_weights = mx.array(np.sqrt(neurons).astype(np.float32))
    found = np.zeros((2, (HIGHEST - LOWEST) * STEPS), np.int64)
    for x in seen.inputs:
        sizes = mx.abs(x) * module.input_weights, mx.abs(module.neurons(x)) * module.neuron_weights
        for counts, each in zip(found, sizes, strict=True):
            counts += _histogram(np.array(each))
    return found


def _histogram(sizes: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        places = (np.log2(sizes.ravel()) - LOWEST) * STEPS
    bins = (HIGHEST - LOWEST) * STEPS
    return np.bincount(np.clip(places, 0, bins - 1).astype(np.int64), minlength=bins)


def table(histograms: list[np.ndarray]) -> Fractions:
    """The thresholds at which the mean shares of the weights in calibrate.FRACTIONS are computed. `histograms`: of each
    layer, see `fit_layer`. A matrix with twice the columns counts twice: gate and up share their inputs."""
    total = 0.0
    for layer in histograms:
        inputs, neurons = (each / max(1, each.sum()) for each in layer)
        total = total + (2 * inputs + neurons) / 3
    above = np.cumsum(total[::-1])[::-1] / len(histograms)  # share of the weights at a threshold at the start of a bin
    rows = []
    for wanted in FRACTIONS:
        place = float(np.interp(-wanted, -above, np.arange(len(above))))
        rows.append((wanted, 2.0 ** (LOWEST + place / STEPS)))
    return Fractions("threshold", tuple(rows))
