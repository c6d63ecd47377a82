"""The predictor: for each base layer a linear map with bias to its keys, and one to its values, from one layer of the
auxiliary.

What the maps read (`inputs`) is in the paper that layer's keys, and its values (`own`), before norm and rotation. With
`hidden` both read the normed hidden states that the layer projects, of which its keys and values are linear functions.
Keys are predicted raw: the base norms and rotates them. Heads are merged head-major. The maps are dense, or
affine-quantised by `quantize`. Shapes: B batch, S tokens, G KV heads, E head size, D the auxiliary's width, N base
layers, P what a map reads: G·E or D.
"""

import copy
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MlxeffError
from ..modules import Linear, QuantizedLinear

INPUTS = ("own", "hidden")
MAP_GROUPS = (64, 32)  # of `quantization`: the first that fits
Shapes = Sequence[tuple[int, int]]  # (G, E) of each layer
Pairs = list[tuple[mx.array, mx.array]]  # keys and values (B, G, S, E) of each layer
Features = list[tuple[mx.array, mx.array]]  # of each auxiliary layer what maps to keys and to values read, (B, S, P)


class Predictor(nn.Module):
    """`predictor(features)` of the auxiliary → keys and values of the base; its layer i reads layer `layer_map[i]`.

    auxiliary, base: the models' `kv_shapes`; hidden: the auxiliary's `hidden_size`, where the maps read that. Raises
    MlxeffError for a map that does not fit them. `compute`, one of ops.COMPUTE, is how the native kernels multiply by
    quantised maps, and may be set between calls; dense maps are always exact.
    """

    compute = "exact"

    def __init__(
        self, auxiliary: Shapes, base: Shapes, layer_map: Sequence[int], inputs: str = "own", hidden: int | None = None
    ):
        super().__init__()
        self._joined = None
        check_map(layer_map, len(auxiliary), len(base))
        if inputs not in INPUTS:
            raise MlxeffError(f"predictor: wanted inputs of {', '.join(INPUTS)}, got {inputs!r}")
        self._layer_map, self._shapes, self.inputs = list(layer_map), list(base), inputs
        widths = read_widths(auxiliary, inputs, hidden)
        sizes = [(widths[j], _width(shape)) for j, shape in zip(layer_map, base, strict=True)]
        self.key_maps = [Linear(inner, outer) for inner, outer in sizes]
        self.value_maps = [Linear(inner, outer) for inner, outer in sizes]

    @property
    def layer_map(self) -> list[int]:
        return self._layer_map

    @property
    def maps(self) -> list[tuple[nn.Module, nn.Module]]:
        """Of each base layer the map to its keys and that to its values."""
        return list(zip(self.key_maps, self.value_maps, strict=True))

    def join(self) -> "Predictor":
        """Make one product of the maps that read the same rows, until one of them changes: fewer and larger ones."""
        self._joined = JoinedMaps(self)
        return self

    def __call__(self, features: Features) -> Pairs:
        """Features of all auxiliary layers → raw keys and values of all base layers."""
        if self._joined is not None and self._joined.current(self):
            rows = self._joined(features, self.compute)
        else:
            rows = [
                [_product(each, read, self.compute) for each, read in zip(maps, features[j], strict=True)]
                for j, maps in zip(self._layer_map, self.maps, strict=True)
            ]
        return [
            tuple(split_heads(each, shape) for each in pair) for pair, shape in zip(rows, self._shapes, strict=True)
        ]

    def read(self, auxiliary, tokens: mx.array, cache) -> Pairs:
        """Token ids (B, S) that follow what the auxiliary's `cache` holds → the base's raw keys and values."""
        return self(features(auxiliary, tokens, cache, self.inputs))


class JoinedMaps:
    """The maps of a predictor, whose arrays become rows of those of a few larger maps, one for each input."""

    def __init__(self, predictor: Predictor):
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, j in enumerate(predictor.layer_map):
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
        """Rows (B, S, G·E) of keys and values of each base layer."""
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
    """The scheme, as MLX names it, of maps that read `widths` numbers; refuses widths that no group divides."""
    fitting = [size for size in MAP_GROUPS if not any(width % size for width in widths)]
    if not fitting:
        wanted = f"inputs of a multiple of {MAP_GROUPS[-1]}"
        raise MlxeffError(f"maps of {bits} bits: wanted {wanted}, got {sorted(set(widths))}")
    return {"group_size": fitting[0], "bits": bits, "mode": "affine"}


def quantize(predictor: Predictor, scheme: dict) -> None:
    """Round the maps, biases left out, to the nearest values of `scheme`; refuses one that does not divide them."""
    widths = {each.weight.shape[1] for pair in predictor.maps for each in pair}
    if odd := sorted(width for width in widths if width % scheme["group_size"]):
        raise MlxeffError(f"quantization: wanted inputs of a multiple of {scheme['group_size']}, got {odd}")
    nn.quantize(predictor, **scheme)


def features(auxiliary, tokens: mx.array, cache, inputs: str) -> Features:
    """What the maps read of each layer of `auxiliary`, for token ids (B, S) that follow what `cache` holds."""
    if inputs == "hidden":
        return [(rows, rows) for rows in auxiliary.layer_inputs(tokens, cache)]
    return merged(auxiliary.raw_kv(tokens, cache))


def merged(pairs: Pairs) -> Features:
    """Raw keys and values of each layer → the features that are these themselves."""
    return [(merge_heads(keys), merge_heads(values)) for keys, values in pairs]


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
