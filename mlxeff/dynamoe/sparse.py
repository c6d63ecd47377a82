"""A feed-forward network of which each token leaves out the inputs that matter least for it.

In down(silu(gate(x)) · up(x)) a token's own hidden state x tells which columns of gate and up matter to it, and the
values of its neurons which columns of down do: an input counts by its size times its weight, which says how much an
error there changes the model's predictions (see `fit_sparse`). All inputs of all layers face one threshold, so tokens
and layers that need more get more. The threshold is the dial of `fractions`; at 0 all inputs count.

TEAL (arXiv 2408.14690) and WINA (arXiv 2505.19427) leave out inputs too, the same share for every token, by their size
or by their size times the norm of their column.

Shapes: T tokens, D hidden size, F neurons.
"""

import math
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.parts import Rows
from ..ops import FLOATS, swiglu
from ..running import EXACT, RunOptions
from . import sparse_metal
from .columns import OUTPUTS, Columns
from .feed_forward import on_gpu
from .fractions import Fractions

HALF = OUTPUTS // 2  # neurons of a tile of gate and up
FEW_TOKENS = 8  # as SparseFeedForward::few_tokens in cpu/decoder/sparse_feed_forward.h
HELD_COUNTS = 256  # calls whose counts are added up together


def interleaved(neurons: int) -> np.ndarray:
    """The order in which the rows of gate, 0 to F - 1, and of up, F to 2 F - 1, become outputs: gate and up of half a
    tile of neurons in turns, so that the activations of a tile depend on nothing else. int (2 F)."""
    gate = np.arange(neurons).reshape(-1, 1, HALF)
    return np.concatenate([gate, gate + neurons], axis=1).reshape(-1)


@dataclass(frozen=True)
class SparseParts:
    """The network by its matrices, for executors; see `models.parts.FeedForwardParts`."""

    gate_up: Rows
    down: Rows
    input_weights: mx.array
    neuron_weights: mx.array
    kind: str = field(default="sparse", init=False)

    @property
    def matrices(self) -> dict[str, Rows]:
        return {"gate_up": self.gate_up, "down": self.down}

    def native(self) -> dict:
        """See `FeedForwardParts.native`."""
        matrices = {name: rows.matrix() for name, rows in self.matrices.items()}
        weights = {"input_weights": self.input_weights, "neuron_weights": self.neuron_weights}
        return {"kind": self.kind, **matrices, **weights}


class SparseFeedForward(nn.Module):
    """Takes the place of a gated feed-forward network: a module from normalised hidden states (B, S, D) to the
    (B, S, D) that is added to the hidden states.

    `gate_up` has the outputs of gate and up as `interleaved` says. `input_weights` (D) and `neuron_weights` (F) are the
    weights of the inputs of gate and up, and of those of down. Calls of more than FEW_TOKENS tokens use all inputs:
    such tokens would leave out different ones, and each column would be read for some of them.
    """

    PARTS = "weights"  # of what a share is reported

    def __init__(self, gate_up: Columns, down: Columns, fractions: Fractions):
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.input_weights = mx.ones((gate_up.inputs,))
        self.neuron_weights = mx.ones((down.inputs,))
        self.freeze()
        self.fractions = fractions
        self._counts, self._pending = [0, 0, 0], []
        self._recorded: list[mx.array] | None = None
        # The arrays for which `_kernel_parts` was called last, and what it made of them.
        self._kernel: tuple[list[mx.array], sparse_metal.Parts] | None = None
        self.most_sparse: float = FEW_TOKENS  # the most tokens of a call that leaves out inputs

    def __call__(self, x: mx.array, options: RunOptions = EXACT) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])
        threshold = self.fractions.dial(options.fraction) or 0.0
        if len(tokens) > self.most_sparse:
            threshold = 0.0
        if parts := self._kernel_parts(tokens):
            y, inputs, neurons = sparse_metal.decode(tokens, parts, threshold)
            self._note(inputs, neurons)
            return y.reshape(x.shape)
        kept_inputs = self.counts_of(tokens, self.input_weights, threshold)
        hidden = self.neurons(mx.where(kept_inputs, tokens, 0) if threshold else tokens)
        kept_neurons = self.counts_of(hidden, self.neuron_weights, threshold)
        y = self.down(mx.where(kept_neurons, hidden, 0) if threshold else hidden)
        self._note(mx.sum(kept_inputs, axis=1), mx.sum(kept_neurons, axis=1))
        return y.reshape(x.shape)

    def _kernel_parts(self, tokens: mx.array) -> sparse_metal.Parts | None:
        """The network for the Metal kernels; None where these do not compute this many tokens of this type here."""
        few = len(tokens) <= min(FEW_TOKENS, sparse_metal.MOST_TOKENS)
        if self.training or not few or tokens.dtype not in FLOATS or not on_gpu():
            return None
        arrays = [*self.gate_up.values(), *self.down.values(), self.input_weights, self.neuron_weights]
        known = self._kernel and len(self._kernel[0]) == len(arrays)
        if not known or any(a is not b for a, b in zip(self._kernel[0], arrays, strict=True)):
            parts = sparse_metal.Parts(self.gate_up, self.down, self.input_weights, self.neuron_weights)
            self._kernel = arrays, parts
        parts = self._kernel[1]
        return parts if sparse_metal.supported(parts, len(tokens)) else None

    @staticmethod
    def counts_of(x: mx.array, weights: mx.array, threshold: float) -> mx.array:
        """Whether each input of tokens x (T, N) counts: bool (T, N). What is not a number counts."""
        return ~(mx.abs(x.astype(mx.float32)) * weights < threshold)

    def neurons(self, tokens: mx.array) -> mx.array:
        """The values of the neurons, silu(gate(x)) · up(x): x (T, D) → (T, F)."""
        both = self.gate_up(tokens).reshape(len(tokens), -1, 2, HALF)
        return swiglu(both[:, :, 0], both[:, :, 1]).reshape(len(tokens), -1)

    def parts(self) -> SparseParts:
        """The network by its matrices."""
        return SparseParts(Rows(self.gate_up), Rows(self.down), self.input_weights, self.neuron_weights)

    def read_bytes(self, fraction: float) -> int:
        """Bytes of its parameters that it reads for a token of which it computes a `fraction` of the weights."""
        columns = self.gate_up.weight.nbytes + self.down.weight.nbytes
        return int(columns * fraction) + self.gate_up.scale_bytes + self.down.scale_bytes

    def record(self, shares: list[mx.array] | None) -> None:
        """Append the share of the weights that each token computed, float32 (T) at each call, to a list from now on;
        None: no longer. Meanwhile calls of any length leave out inputs."""
        self._recorded = shares
        self.most_sparse = FEW_TOKENS if shares is None else math.inf

    @property
    def counts(self) -> list[int]:
        """[tokens; inputs of gate and up that they kept; inputs of down that they kept] here, outside of training.
        Tokens of the native decoder are counted there."""
        while self._pending:
            inputs, neurons = self._pending.pop()
            for place, each in enumerate((inputs.size, mx.sum(inputs).item(), mx.sum(neurons).item())):
                self._counts[place] += int(each)
        return list(self._counts)

    def computed(self, counts: list[int]) -> tuple[int, int, int]:
        """(Tokens, weights that they computed, weights that they would have computed without leaving out any) for
        counts as those of `counts`."""
        size, neurons = self.gate_up.inputs, self.down.inputs
        return counts[0], 2 * neurons * counts[1] + size * counts[2], counts[0] * 3 * size * neurons

    def shares(self, inputs: mx.array, neurons: mx.array) -> mx.array:
        """The share of the weights that tokens compute, (T), for the numbers of inputs and neurons that they kept."""
        return (2 * inputs / self.gate_up.inputs + neurons / self.down.inputs) / 3

    @staticmethod
    def details(counts: list[list[int]], networks: "list[SparseFeedForward]") -> dict:
        """What a report says beside the shares, for the counts of each layer."""
        tokens = sum(each[0] for each in counts)
        inputs = sum(each[1] / network.gate_up.inputs for each, network in zip(counts, networks, strict=True))
        neurons = sum(each[2] / network.down.inputs for each, network in zip(counts, networks, strict=True))
        return {"kept_inputs": {"gate_up": round(inputs / tokens, 4), "down": round(neurons / tokens, 4)}}

    def _note(self, inputs: mx.array, neurons: mx.array) -> None:
        """Keep the numbers of kept inputs of each token, to be added up when they have been computed."""
        if self._recorded is not None:
            self._recorded.append(self.shares(inputs, neurons))
        if self.training:
            return
        self._pending.append((inputs, neurons))
        if len(self._pending) > HELD_COUNTS:
            last = self._pending.pop()  # not computed yet
            _ = self.counts
            self._pending.append(last)
