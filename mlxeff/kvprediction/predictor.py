"""The predictor: for each base layer a linear map with bias to its keys, and one to its values, from one layer of the
auxiliary.

What the maps read (`inputs`) is in the paper that layer's keys, and its values (`own`), before norm and rotation. With
`hidden` both read the normed hidden states that the layer projects, of which its keys and values are linear functions.
Keys are predicted raw: the base norms and rotates them. Heads are merged head-major. The maps are dense, or
affine-quantised by `quantize`. The first `shared` layers of an auxiliary may be the base's own first ones: their keys
and values are the base's already, and no map stands for them. Shapes: B batch, S tokens, G KV heads, E head size, D the
auxiliary's width, N base layers, P what a map reads: G·E or D.
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
Features = dict[int, tuple[mx.array, mx.array]]  # of auxiliary layers what maps to keys and to values read, (B, S, P)


class KvModel(Model, Protocol):
    """A model with the seam "kv": what its layers read and project can be read out, and given keys and values can be
    appended to its cache (`models.decoder.DecoderModel` says what each call gives)."""

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
    """What a predictor takes of an auxiliary's pass: what its maps read, and the raw pairs of the shared layers."""

    features: Features
    shared: Pairs


class Predictor(nn.Module):
    """`predictor(reading)` of the auxiliary → keys and values of the base; its layer i reads layer `layer_map[i]`.

    auxiliary, base: the models' `kv_shapes`; hidden: the auxiliary's `hidden_size`, where the maps read that. Raises
    MlxeffError for a map that does not fit them, and for shared layers that do not read themselves. `key_maps` and
    `value_maps` begin at layer `shared`.
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
        return self._layer_map

    @property
    def mapped(self) -> list[int]:
        """Of each base layer that has maps the auxiliary layer that they read."""
        return self._layer_map[self.shared :]

    @property
    def maps(self) -> list[tuple[nn.Module, nn.Module]]:
        """Of each base layer that has maps the one to its keys and that to its values."""
        return list(zip(self.key_maps, self.value_maps, strict=True))

    def join(self) -> "Predictor":
        """Make one product of the maps that read the same rows, until one of them changes: fewer and larger ones."""
        self._joined = JoinedMaps(self) if self.mapped else None
        return self

    def __call__(self, reading: Reading, compute: str = "exact") -> Pairs:
        """What `read` gives → raw keys and values of all base layers. `compute`, one of ops.COMPUTE, is how the native
        kernels multiply by quantised maps; dense maps are always exact."""
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
        """One pass of the auxiliary over token ids (B, S) that follow what its `cache` holds."""
        states = auxiliary.layer_states(tokens, cache, *self.asked, options)
        return reading(self.mapped, self.inputs, self.shared, states)

    @property
    def asked(self) -> tuple[list[int], list[int]]:
        """The `inputs` and `pairs` that `layer_states` of the auxiliary is asked for."""
        return asked(self.mapped, self.inputs, self.shared)


class JoinedMaps:
    """The maps of a predictor, whose arrays become rows of those of a few larger maps, one for each input."""

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
        """Whether the maps still have the weights that were joined."""
        return all(mine is theirs for mine, theirs in zip(_arrays(predictor), self.given, strict=True))

    def __call__(self, features: Features, compute: str) -> list[list[mx.array]]:
        """Rows (B, S, G·E) of keys and values of each base layer that has maps."""
        rows = [[None, None] for _ in range(self.layers)]
        for (j, read), places in self.groups.items():
            whole, stops = self.matrices[j, read]
            parts = mx.split(_product(whole, features[j][read], compute), stops, axis=-1)
            for (i, kind), part in zip(places, parts, strict=True):
                rows[i][kind] = part
        return rows


def read_widths(auxiliary: Shapes, inputs: str, hidden: int | None) -> list[int]:
    """How many numbers P of each auxiliary layer a map reads; arguments as of `Predictor`."""
    return [hidden if inputs == "hidden" else _width(shape) for shape in auxiliary]


def quantization(bits: int, widths: Sequence[int]) -> dict:
    """The scheme, as MLX names it, of maps that read `widths` numbers; refuses widths that no group size divides."""
    group = fitting_group(*widths)
    if group is None:
        needed = f"inputs of a multiple of {min(CHOSEN_GROUPS)}"
        raise MlxeffError(f"maps of {bits} bits: wanted {needed}, got {sorted(set(widths))}")
    return {"group_size": group, "bits": bits, "mode": "affine"}


def quantize(predictor: Predictor, scheme: dict) -> None:
    """Round the maps, biases left out, to the nearest values of `scheme`; refuses one that does not divide them."""
    widths = {each.weight.shape[1] for pair in predictor.maps for each in pair}
    if odd := sorted(width for width in widths if width % scheme["group_size"]):
        raise MlxeffError(f"quantization: wanted inputs of a multiple of {scheme['group_size']}, got {odd}")
    nn.quantize(predictor, **scheme)


def asked(layers: Iterable[int], inputs: str, shared: int) -> tuple[list[int], list[int]]:
    """The `inputs` and `pairs` that `layer_states` is asked for, where maps read auxiliary `layers`."""
    read = sorted(set(layers))
    return (read, list(range(shared))) if inputs == "hidden" else ([], sorted({*read, *range(shared)}))


def reading(layers: Iterable[int], inputs: str, shared: int, states: tuple[list[mx.array], Pairs]) -> Reading:
    """What `layer_states` gave for `asked` of the same arguments, in the predictor's form."""
    read, (rows, pairs) = sorted(set(layers)), states
    if inputs == "hidden":
        return Reading({j: (x, x) for j, x in zip(read, rows, strict=True)}, pairs)
    found = dict(zip(asked(read, inputs, shared)[1], pairs, strict=True))
    return Reading({j: merged(found[j]) for j in read}, pairs[:shared])


def merged(pair: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """Raw keys and values of a layer → the features that are these themselves."""
    keys, values = pair
    return merge_heads(keys), merge_heads(values)


def identity(shapes: Shapes) -> Predictor:
    """The predictor that returns what it is given, for models of one shape."""
    predictor = Predictor(shapes, shapes, range(len(shapes)))
    for each in (*predictor.key_maps, *predictor.value_maps):
        each.weight, each.bias = mx.eye(each.weight.shape[0]), mx.zeros(each.bias.shape)
    return predictor


def check_map(layer_map: Sequence[int], auxiliary: int, base: int) -> None:
    """Refuse a map that does not name one of `auxiliary` layers for each of `base` layers."""
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
    """The parameters of all maps."""
    return [array for pair in predictor.maps for each in pair for array in each.parameters().values()]


def _product(each: nn.Module, rows: mx.array, compute: str) -> mx.array:
    """Rows (B, S, P) → (B, S, G·E) by a map."""
    return each(rows, compute) if isinstance(each, QuantizedLinear) else each(rows)


def _width(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
