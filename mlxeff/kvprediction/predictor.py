"""The predictor: for each base layer a linear map with bias from one auxiliary layer's keys, and one for the values.

Keys are raw on both sides, before norm and rotation: the base norms and rotates what is predicted. Heads are merged
head-major. Shapes: B batch, S tokens, G KV heads, E head size, N base layers.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..errors import MlxeffError
from ..modules import Linear

Shapes = Sequence[tuple[int, int]]  # (G, E) of each layer
Pairs = list[tuple[mx.array, mx.array]]  # keys and values (B, G, S, E) of each layer


class Predictor(nn.Module):
    """`predictor(pairs)` of the auxiliary → the pairs of the base; base layer i reads layer `layer_map[i]`.

    auxiliary, base: the models' `kv_shapes`. Raises MlxeffError for a map that does not fit them.
    """

    def __init__(self, auxiliary: Shapes, base: Shapes, layer_map: Sequence[int]):
        super().__init__()
        check_map(layer_map, len(auxiliary), len(base))
        self._layer_map, self._shapes = list(layer_map), list(base)
        sizes = [(_width(auxiliary[j]), _width(shape)) for j, shape in zip(layer_map, base, strict=True)]
        self.key_maps = [Linear(inner, outer) for inner, outer in sizes]
        self.value_maps = [Linear(inner, outer) for inner, outer in sizes]

    @property
    def layer_map(self) -> list[int]:
        return self._layer_map

    def __call__(self, pairs: Pairs) -> Pairs:
        """Keys and values of all auxiliary layers → of all base layers; both raw."""
        merged = [(merge_heads(keys), merge_heads(values)) for keys, values in pairs]
        result = []
        for j, shape, key_map, value_map in zip(
            self._layer_map, self._shapes, self.key_maps, self.value_maps, strict=True
        ):
            keys, values = merged[j]
            result.append((split_heads(key_map(keys), shape), split_heads(value_map(values), shape)))
        return result


def identity(shapes: Shapes) -> Predictor:
    """The predictor that returns what it is given, for models of one shape."""
    predictor = Predictor(shapes, shapes, range(len(shapes)))
    for linear in (*predictor.key_maps, *predictor.value_maps):
        linear.weight, linear.bias = mx.eye(linear.weight.shape[0]), mx.zeros(linear.bias.shape)
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


def _width(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
