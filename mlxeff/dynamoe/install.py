"""The entry `dynamoe` of a config.json ↔ feed-forward networks with nested experts in a model.

    "dynamoe": {"version": 1, "widths": [[512, 1024, 1536], …], "down": "own", "rule": "lagrangian",
                "table": [[0.35, 812.0], …, [0.95, 1.7]]}

widths  for each layer the number of neurons of each expert, rising; the last one has all
down    the down-projections of the smaller experts: "own" matrices; "low-rank" terms added to the first columns of the
        whole one, whose rank is in the entry "rank"; or "shared", the first columns as they are
rule    of the routers, one of fractions.RULES
table   pairs (mean fraction of the neurons, dial), see `fractions.Fractions`

In each layer the network's module has the parameters gate_proj, up_proj and down_proj, the neurons in the order of
their importance, and

router.weight, router.bias           (R, D) and (R), see `feed_forward.Router`
experts.E.weight                     (D, k): the down-projection of the smaller expert number E, with "own"
order                                int32 (F), with "own": the column of down_proj that belongs to each neuron
experts.E.left.weight, .right.weight (D, r) and (r, k), with "low-rank"
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import MlxeffError
from ..models.parts import GatedParts
from ..modules import Linear
from .feed_forward import DynamicFeedForward, LowRank
from .fractions import RULES, Fractions

VERSION = 1
KEY = "dynamoe"
DOWNS = ("own", "low-rank", "shared")
KEYS = {"version", "widths", "down", "rank", "rule", "table"}
MOST_EXPERTS = 8


@dataclass(frozen=True)
class Entry:
    """The entry `dynamoe` of a config.json, checked."""

    widths: tuple[tuple[int, ...], ...]
    down: str
    fractions: Fractions
    rank: int | None = None

    def as_dict(self) -> dict:
        """The entry as config.json has it."""
        rank = {"rank": self.rank} if self.down == "low-rank" else {}
        return {
            "version": VERSION,
            "widths": [list(each) for each in self.widths],
            "down": self.down,
            **rank,
            "rule": self.fractions.rule,
            "table": [list(row) for row in self.fractions.table],
        }


def prices(widths: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each layer the shares of the mean number of neurons that its experts compute."""
    mean = sum(layer[-1] for layer in widths) / len(widths)
    return [[width / mean for width in layer] for layer in widths]


Wanted = Callable[[str, str, object], MlxeffError]  # the error for what an entry of the config has in place of `text`


def checked(value: object, origin: str, keys: set[str]) -> Wanted:
    """Checks an entry's version and that it has no other keys, and returns what makes the errors for its values. Raises
    MlxeffError; `origin` names the config."""

    def wanted(what: str, text: str, got: object) -> MlxeffError:
        return MlxeffError(f"{origin}: {KEY}: {what}: wanted {text}, got {got!r:.80}")

    if not isinstance(value, dict):
        raise MlxeffError(f"{origin}: {KEY}: wanted a table of settings, got {value!r:.80}")
    if value.get("version") != VERSION or isinstance(value.get("version"), bool):
        raise wanted("version", str(VERSION), value.get("version"))
    if unknown := sorted(set(value) - keys):
        raise MlxeffError(f"{origin}: {KEY}: unknown keys {unknown}")
    return wanted


def read_entry(value: object, origin: str) -> Entry:
    """The entry of a config.json. Raises MlxeffError for another version, and for values that contradict each other;
    `origin` names the config."""
    wanted = checked(value, origin, KEYS)
    down, rule, rank = value.get("down"), value.get("rule"), value.get("rank")
    if down not in DOWNS:
        raise wanted("down", f"one of {', '.join(DOWNS)}", down)
    if rule not in RULES:
        raise wanted("rule", f"one of {', '.join(RULES)}", rule)
    if (down == "low-rank") != (type(rank) is int and rank > 0):
        raise wanted("rank", "a whole number above 0 with down low-rank, and none without", rank)
    return Entry(
        _widths(value.get("widths"), wanted), down, Fractions(rule, read_table(value.get("table"), wanted)), rank
    )


def _widths(value: object, wanted) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not value:
        raise wanted("widths", "a list of widths for each layer", value)
    for number, layer in enumerate(value):
        if not isinstance(layer, list) or not 2 <= len(layer) <= MOST_EXPERTS or len(layer) != len(value[0]):
            raise wanted(f"widths of layer {number}", f"2 to {MOST_EXPERTS} widths, the same number in all", layer)
        if any(type(width) is not int or width < 1 for width in layer) or sorted(set(layer)) != layer:
            raise wanted(
                f"widths of layer {number}", "rising whole numbers above 0, each expert within the next", layer
            )
    return tuple(tuple(layer) for layer in value)


def read_table(value: object, wanted) -> tuple[tuple[float, float], ...]:
    """The pairs of the entry `table`; `wanted(what, text, got)` makes the error for others."""
    rows = value if isinstance(value, list) else []
    numbers = all(isinstance(row, list) and len(row) == 2 and all(map(_number, row)) for row in rows)
    if not rows or not numbers:
        raise wanted("table", "pairs (mean fraction of the neurons, dial)", value)
    fractions = [fraction for fraction, _ in rows]
    if not all(0 <= fraction <= 1 for fraction in fractions) or sorted(set(fractions)) != fractions:
        raise wanted("table", "rising fractions from 0 to 1", fractions)
    if any(dial < 0 for _, dial in rows):
        raise wanted("table", "dials of 0 or more", [dial for _, dial in rows])
    return tuple((float(fraction), float(dial)) for fraction, dial in rows)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def install(model: nn.Module, value: object, origin: str = "config") -> None:
    """Replace the feed-forward networks of `model` by those that `value`, the entry `dynamoe` of its config, describes;
    their weights are not loaded yet. Raises MlxeffError for a model without gated feed-forward networks, and for widths
    that are not its own."""
    entry = read_entry(value, origin)
    layers = gated_layers(model, origin)
    if len(entry.widths) != len(layers):
        text = f"wanted a list for each of the model's {len(layers)} layers"
        raise MlxeffError(f"{origin}: dynamoe: widths: {text}, got {len(entry.widths)}")
    size = model.hidden_size
    for number, (layer, parts) in enumerate(layers):
        widths, full = entry.widths[number], rows_of(parts)
        if widths[-1] != full:
            text = f"wanted a last one of {full}, the model's own, got {widths[-1]}"
            raise MlxeffError(f"{origin}: dynamoe: widths of layer {number}: {text}")
        biases = ["bias" in part.module for part in (parts.gate, parts.up, parts.down)]
        gate, up = (Linear(size, full, bias=bias) for bias in biases[:2])
        experts = [_expert(entry, width, size) for width in widths[:-1]] if entry.down != "shared" else []
        layer[layer.FEED_FORWARD] = DynamicFeedForward(
            gate,
            up,
            Linear(full, size, bias=biases[2]),
            widths,
            experts,
            prices(entry.widths)[number],
            entry.fractions,
            size,
        )


def _expert(entry: Entry, width: int, size: int) -> nn.Module:
    """The module of a smaller expert, with random weights."""
    if entry.down == "low-rank":
        return LowRank(width, size, entry.rank)
    return Linear(width, size, bias=False)


def gated_layers(model: nn.Module, origin: str) -> list[tuple[nn.Module, GatedParts]]:
    """The layers of a model with their feed-forward networks by their matrices. Raises MlxeffError where a network is
    not a gated one that can be described by its matrices; `origin` names the model."""
    found = []
    for number, layer in enumerate(getattr(model, "layers", ())):
        parts = getattr(getattr(layer, "feed_forward", None), "parts", lambda: None)()
        if not isinstance(parts, GatedParts):
            text = "wanted a gated one of our own families, gate, up and down"
            raise MlxeffError(f"{origin}: dynamoe: feed-forward of layer {number}: {text}, got another")
        found.append((layer, parts))
    if not found:
        raise MlxeffError(f"{origin}: dynamoe: wanted a model with gated feed-forward networks, got none")
    return found


def rows_of(parts: GatedParts) -> int:
    """The number of neurons of a gated feed-forward network."""
    start, stop = parts.gate.start, parts.gate.stop
    module = parts.gate.module
    total = module.rows if hasattr(module, "rows") else module.weight.shape[0]
    return (total if stop is None else stop) - start


def finish(model: nn.Module, origin: str) -> None:
    """To be called when the weights are loaded: raises MlxeffError for routers with numbers that are not finite, and
    for an order that names a column twice."""
    for name, module in model.named_modules():
        if isinstance(module, DynamicFeedForward):
            for part, array in tree_flatten(module.router.parameters()):
                if not mx.isfinite(array).all().item():
                    raise MlxeffError(f"{origin}: {name}.router.{part}: wanted finite numbers, got others: damaged")
            if "order" in module and mx.sort(module.order).tolist() != list(range(module.widths[-1])):
                raise MlxeffError(f"{origin}: {name}.order: wanted each column once, got others: damaged")


def of(model: nn.Module) -> list[nn.Module]:
    """The feed-forward networks of a model, first layer to last, that leave out neurons or inputs (`DynamicFeedForward`
    or `sparse.SparseFeedForward`); [] for another model."""
    layers = getattr(model, "layers", ())
    found = [getattr(layer, "feed_forward", None) for layer in layers]
    return found if found and all(hasattr(each, "fractions") for each in found) else []
