"""The entry `dynamoe` of a config.json with "by": "inputs" ↔ feed-forward networks that leave out inputs in a model.

    "dynamoe": {"version": 1, "by": "inputs", "gate_up": [[4, 32], …], "down": [[4, 32], null, …],
                "table": [[0.3, 0.021], …, [0.99, 0.00017]]}

gate_up, down  for each layer (bits, group size) of its affine weights, null where they are dense
table          pairs (mean share of the weights, threshold), see `fractions.Fractions`

In each layer the network's module has the parameters

gate_up.weight, .scales, .biases  the columns of gate and up, see `columns` and `sparse.interleaved`
down.weight, .scales, .biases     those of the down-projection; down.bias where it has one
input_weights, neuron_weights     (D) and (F), see `sparse.SparseFeedForward`
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import MlxeffError
from .columns import BITS, INPUTS, OUTPUTS, Columns
from .fractions import Fractions
from .install import KEY, VERSION, checked, gated_layers, read_table, rows_of
from .sparse import SparseFeedForward

KEYS = {"version", "by", "gate_up", "down", "table"}
Form = tuple[int | None, int | None]  # bits and group size; None for dense weights


@dataclass(frozen=True)
class SparseEntry:
    """The entry, checked."""

    gate_up: tuple[Form, ...]
    down: tuple[Form, ...]
    fractions: Fractions

    def as_dict(self) -> dict:
        """The entry as config.json has it."""
        forms = lambda of: [None if bits is None else [bits, group] for bits, group in of]  # noqa: E731
        table = [list(row) for row in self.fractions.table]
        return {
            "version": VERSION,
            "by": "inputs",
            "gate_up": forms(self.gate_up),
            "down": forms(self.down),
            "table": table,
        }


def is_sparse(value: object) -> bool:
    """Whether an entry `dynamoe` is of this kind."""
    return isinstance(value, dict) and value.get("by") == "inputs"


def read_entry(value: dict, origin: str) -> SparseEntry:
    """The entry of a config.json. Raises MlxeffError for another version, and for values that contradict each other;
    `origin` names the config."""

    wanted = checked(value, origin, KEYS)
    forms = [_forms(value.get(name), name, wanted) for name in ("gate_up", "down")]
    if len(forms[0]) != len(forms[1]):
        raise wanted("down", f"{len(forms[0])} layers, as gate_up has", len(forms[1]))
    return SparseEntry(*forms, Fractions("threshold", read_table(value.get("table"), wanted)))


def _forms(value: object, name: str, wanted) -> tuple[Form, ...]:
    if not isinstance(value, list) or not value:
        raise wanted(name, "a list of [bits, group size] or null for each layer", value)
    for each in value:
        if each is not None and not (
            isinstance(each, list) and len(each) == 2 and each[0] in BITS and each[1] in (32, 64, 128)
        ):
            raise wanted(name, "null, or [4 or 8 bits, group size 32, 64 or 128]", each)
    return tuple((None, None) if each is None else tuple(each) for each in value)


def install(model: nn.Module, value: dict, origin: str = "config") -> None:
    """Replace the feed-forward networks of `model` by those that `value`, the entry of its config, describes; their
    weights are not loaded yet. Raises MlxeffError for a model whose networks cannot have such columns."""
    entry = read_entry(value, origin)
    layers = gated_layers(model, origin)
    if len(entry.down) != len(layers):
        raise MlxeffError(f"{origin}: {KEY}: wanted {len(layers)} layers, the model's own, got {len(entry.down)}")
    size = model.hidden_size
    for number, (layer, parts) in enumerate(layers):
        neurons = rows_of(parts)
        if size % OUTPUTS or neurons % INPUTS:
            text = f"wanted multiples of {OUTPUTS} hidden units and of {INPUTS} neurons, got {size} and {neurons}"
            raise MlxeffError(f"{origin}: {KEY}: layer {number}: {text}")
        layer[layer.FEED_FORWARD] = SparseFeedForward(
            Columns(2 * neurons, size, *entry.gate_up[number]),
            Columns(size, neurons, *entry.down[number], bias="bias" in parts.down.module),
            entry.fractions,
        )


def finish(model: nn.Module, origin: str) -> None:
    """To be called when the weights are loaded: puts them in their place in memory. Raises MlxeffError for weights of
    inputs that are negative or no numbers."""
    for name, module in model.named_modules():
        if isinstance(module, SparseFeedForward):
            module.gate_up.align()
            module.down.align()
            for part in ("input_weights", "neuron_weights"):
                if not mx.all(mx.isfinite(module[part]) & (module[part] >= 0)).item():
                    raise MlxeffError(f"{origin}: {name}.{part}: wanted numbers of 0 or more, got others: damaged")
