"""The predictor of KV Prediction (Horton et al., arXiv 2410.08391): linear maps from the layers of the auxiliary model
to the keys and values of the base model.

Each base layer has two maps with bias, one to its keys and one to its values. Both read the same auxiliary layer, which
the layer map names. The option `inputs` says what they read of it:

own     the map to keys reads the layer's keys, before normalisation and rotation, and the map to values reads its
        values, as in the paper
hidden  both maps read the normalised hidden state from which the layer computes its queries, keys and values

Predicted keys are raw: the base model normalises and rotates them. A map treats the heads of a layer as one row, head
after head. The maps are dense, or quantised by `quantize`. An auxiliary that is made of base layers may begin with the
first `shared` layers of the base. Their keys and values are copied, and these layers have no maps.

This module knows neither model families nor files, and does not compute the maps' weights (see `fit` and `train`).

Shapes: B batch, S tokens, G KV heads, E head size, D the auxiliary's hidden size, P the inputs of a map: G·E or D.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..cache import Cache
from ..decode import Model
from ..errors import MlxeffError
from ..modules import Linear, QuantizedLinear
from ..ops import CHOSEN_GROUPS, fitting_group
from ..running import EXACT, RunOptions

INPUTS = ("own", "hidden")
Shapes = Sequence[tuple[int, int]]  # (G, E) of each layer
Pairs = list[tuple[mx.array, mx.array]]  # keys and values (B, G, S, E) of each layer
# By the number of the auxiliary layer: the inputs (B, S, P) of the maps to keys, and of the maps to values.
Features = dict[int, tuple[mx.array, mx.array]]


class KvModel(Model, Protocol):
    """A model with the seam "kv": the hidden states, keys and values of its layers can be read out, and given keys and
    values can be appended to its cache. The methods are documented in `models.decoder.DecoderModel`."""

    layers: list
    kv_shapes: list[tuple[int, int]]
    hidden_size: int

    def layer_states(
        self, tokens: mx.array, cache: Cache, inputs: Sequence[int], pairs: Sequence[int], options: RunOptions = EXACT
    ) -> tuple[list[mx.array], Pairs]: ...

    def append_kv(self, pairs: Pairs, cache: Cache, options: RunOptions = EXACT) -> None: ...

    def normed_kv(self, pairs: Pairs) -> Pairs: ...

    def placed_kv(self, pairs: Pairs, position: int) -> Pairs: ...


class Reading(NamedTuple):
    """The results of an auxiliary's forward pass that a predictor needs: the inputs of its maps (`features`), and the
    raw keys and values of the shared layers."""

    features: Features
    shared: Pairs


class Predictor(nn.Module):
    """A predictor: `predictor(reading)` computes the base's keys and values from a `Reading` of the auxiliary.

    auxiliary, base  `kv_shapes` of the two models
    layer_map        for each base layer the number of the auxiliary layer that its maps read
    inputs           one of INPUTS: what the maps read of that layer
    hidden           `hidden_size` of the auxiliary; needed for the inputs `hidden` only
    shared           how many first layers base and auxiliary have in common

    `key_maps` and `value_maps` begin with the maps of base layer `shared`. Raises MlxeffError for a layer map that does
    not fit the models, for unknown inputs, and for shared layers of different shapes or with a layer map other than
    0, 1, 2, …
    """

    def __init__(
        self,
        auxiliary: Shapes,
        base: Shapes,
        layer_map: Sequence[int],
        inputs: str = "own",
        hidden: int | None = None,
        shared: int = 0,
    ):
        super().__init__()
        self._joined = None
        check_map(layer_map, len(auxiliary), len(base))
        if inputs not in INPUTS:
            raise MlxeffError(f"predictor: wanted inputs of {', '.join(INPUTS)}, got {inputs!r}")
        self._layer_map, self._shapes, self.inputs, self.shared = list(layer_map), list(base), inputs, shared
        if list(layer_map[:shared]) != list(range(shared)) or list(auxiliary[:shared]) != list(base[:shared]):
            got = list(layer_map[:shared])
            raise MlxeffError(f"predictor: wanted {shared} shared layers that read themselves, got {got}")
        widths = read_widths(auxiliary, inputs, hidden)
        sizes = [(widths[j], _width(shape)) for j, shape in zip(layer_map, base, strict=True)][shared:]
        self.key_maps = [Linear(inner, outer) for inner, outer in sizes]
        self.value_maps = [Linear(inner, outer) for inner, outer in sizes]

    @property
    def layer_map(self) -> list[int]:
        """For each base layer the auxiliary layer that its maps read; a shared layer names itself."""
        return self._layer_map

    @property
    def mapped(self) -> list[int]:
        """For each base layer that has maps, the auxiliary layer that they read."""
        return self._layer_map[self.shared :]

    @property
    def maps(self) -> list[tuple[nn.Module, nn.Module]]:
        """For each base layer that has maps, the map to its keys and the map to its values."""
        return list(zip(self.key_maps, self.value_maps, strict=True))

    def join(self) -> "Predictor":
        """Join the maps that read the same input into one larger matrix, so that prediction takes fewer and larger
        matrix products. The joined matrices are used until a weight of a map is replaced. Returns the predictor."""
        self._joined = JoinedMaps(self) if self.mapped else None
        return self

    def __call__(self, reading: Reading, compute: str = "exact") -> Pairs:
        """The result of `read` → raw keys and values (B, G, S, E) of all base layers.

        compute: one of ops.COMPUTE, the arithmetic of the native kernels for quantised maps. Dense maps are exact.
        """
        features = reading.features
        if self._joined is not None and self._joined.current(self):
            rows = self._joined(features, compute)
        else:
            rows = [
                [_product(each, read, compute) for each, read in zip(maps, features[j], strict=True)]
                for j, maps in zip(self.mapped, self.maps, strict=True)
            ]
        shapes = self._shapes[self.shared :]
        return reading.shared + [
            tuple(split_heads(each, shape) for each in pair) for pair, shape in zip(rows, shapes, strict=True)
        ]

    def read(self, auxiliary: KvModel, tokens: mx.array, cache: Cache, options: RunOptions = EXACT) -> Reading:
        """Run the auxiliary on token ids (B, S), which follow the tokens in its `cache`. Appends them to `cache`."""
        states = auxiliary.layer_states(tokens, cache, *self.asked, options)
        return reading(self.mapped, self.inputs, self.shared, states)

    @property
    def asked(self) -> tuple[list[int], list[int]]:
        """The arguments `inputs` and `pairs` for the auxiliary's `layer_states`."""
        return asked(self.mapped, self.inputs, self.shared)


class JoinedMaps:
    """Larger matrices in which the maps of a predictor that read the same input are stacked. The arrays of the maps
    themselves become slices of these matrices, so that the weights exist once."""

    def __init__(self, predictor: Predictor):
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, j in enumerate(predictor.mapped):
            for kind in range(2):  # keys, values
                read = 0 if predictor.inputs == "hidden" else kind
                groups.setdefault((j, read), []).append((i, kind))
        self.groups, self.matrices, self.layers = groups, {}, len(predictor.maps)
        for source, places in groups.items():
            maps = [predictor.maps[i][kind] for i, kind in places]
            whole, stops = copy.copy(maps[0]), np.cumsum([each.weight.shape[0] for each in maps]).tolist()
            for name in whole.parameters():
                whole[name] = mx.concatenate([each[name] for each in maps])
                mx.eval(whole[name])
                for each, start, stop in zip(maps, [0, *stops], stops):
                    each[name] = whole[name][start:stop]
            self.matrices[source] = whole, stops[:-1]
        self.given = _arrays(predictor)

    def current(self, predictor: Predictor) -> bool:
        """Whether the maps still hold the very arrays that were joined."""
        return all(mine is theirs for mine, theirs in zip(_arrays(predictor), self.given, strict=True))

    def __call__(self, features: Features, compute: str) -> list[list[mx.array]]:
        """Features → keys and values, both (B, S, G·E), of each base layer that has maps."""
        rows = [[None, None] for _ in range(self.layers)]
        for (j, read), places in self.groups.items():
            whole, stops = self.matrices[j, read]
            parts = mx.split(_product(whole, features[j][read], compute), stops, axis=-1)
            for (i, kind), part in zip(places, parts, strict=True):
                rows[i][kind] = part
        return rows


def read_widths(auxiliary: Shapes, inputs: str, hidden: int | None) -> list[int]:
    """For each auxiliary layer the number of inputs P of a map that reads it. The arguments are those of
    `Predictor`."""
    return [hidden if inputs == "hidden" else _width(shape) for shape in auxiliary]


def quantization(bits: int, widths: Sequence[int]) -> dict:
    """The arguments for `mx.quantize` (group_size, bits, mode) for maps with the numbers of inputs `widths`.

    Raises MlxeffError where no group size divides all of them.
    """
    group = fitting_group(*widths)
    if group is None:
        needed = f"inputs of a multiple of {min(CHOSEN_GROUPS)}"
        raise MlxeffError(f"maps of {bits} bits: wanted {needed}, got {sorted(set(widths))}")
    return {"group_size": group, "bits": bits, "mode": "affine"}


def quantize(predictor: Predictor, scheme: dict) -> None:
    """Quantise the weights of the maps in place with the arguments `scheme` for `mx.quantize`. Biases stay as they are.

    Raises MlxeffError where the group size does not divide the number of inputs of a map.
    """
    widths = {each.weight.shape[1] for pair in predictor.maps for each in pair}
    if odd := sorted(width for width in widths if width % scheme["group_size"]):
        raise MlxeffError(f"quantization: wanted inputs of a multiple of {scheme['group_size']}, got {odd}")
    nn.quantize(predictor, **scheme)


def asked(layers: Iterable[int], inputs: str, shared: int) -> tuple[list[int], list[int]]:
    """The arguments `inputs` and `pairs` for `layer_states`, where the maps read the auxiliary layers `layers`."""
    read = sorted(set(layers))
    return (read, list(range(shared))) if inputs == "hidden" else ([], sorted({*read, *range(shared)}))


def reading(layers: Iterable[int], inputs: str, shared: int, states: tuple[list[mx.array], Pairs]) -> Reading:
    """`states`, the result of `layer_states` for the arguments that `asked` returns, as a `Reading`. The other
    arguments are those of `asked`."""
    read, (rows, pairs) = sorted(set(layers)), states
    if inputs == "hidden":
        return Reading({j: (x, x) for j, x in zip(read, rows, strict=True)}, pairs)
    found = dict(zip(asked(read, inputs, shared)[1], pairs, strict=True))
    return Reading({j: merged(found[j]) for j in read}, pairs[:shared])


def merged(pair: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """Raw keys and values (B, G, S, E) of a layer → the features (B, S, G·E) of the inputs `own`."""
    keys, values = pair
    return merge_heads(keys), merge_heads(values)


def identity(shapes: Shapes) -> Predictor:
    """The predictor that returns the auxiliary's keys and values unchanged, for two models of the same `shapes`."""
    predictor = Predictor(shapes, shapes, range(len(shapes)))
    for each in (*predictor.key_maps, *predictor.value_maps):
        each.weight, each.bias = mx.eye(each.weight.shape[0]), mx.zeros(each.bias.shape)
    return predictor


def check_map(layer_map: Sequence[int], auxiliary: int, base: int) -> None:
    """Raises MlxeffError unless `layer_map` names one of the `auxiliary` layers for each of the `base` layers.
    `auxiliary` and `base` are the numbers of layers."""
    if len(layer_map) != base:
        raise MlxeffError(f"layer map: wanted an auxiliary layer for each of {base} base layers, got {len(layer_map)}")
    for i, j in enumerate(layer_map):
        if type(j) is not int or not 0 <= j < auxiliary:
            raise MlxeffError(f"layer map: base layer {i}: wanted an auxiliary layer 0 to {auxiliary - 1}, got {j!r}")


def merge_heads(heads: mx.array) -> mx.array:
    """(B, G, S, E) → (B, S, G·E)."""
    batch, _, tokens, _ = heads.shape
    return heads.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)


def split_heads(rows: mx.array, shape: tuple[int, int]) -> mx.array:
    """(B, S, G·E) → (B, G, S, E)."""
    return rows.reshape(*rows.shape[:2], *shape).transpose(0, 2, 1, 3)


def _arrays(predictor: Predictor) -> list[mx.array]:
    """The arrays of all maps."""
    return [array for pair in predictor.maps for each in pair for array in each.parameters().values()]


def _product(each: nn.Module, rows: mx.array, compute: str) -> mx.array:
    """The map `each` applied to its input `rows` (B, S, P): (B, S, G·E)."""
    return each(rows, compute) if isinstance(each, QuantizedLinear) else each(rows)


def _width(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
