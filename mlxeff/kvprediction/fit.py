"""The predictor in closed form: ridge regression from the inputs of the maps to the base's raw keys and values.

For each link of a base layer to an auxiliary layer, the sums of the normal equations are accumulated in float64, one
sequence after the other. Memory therefore does not grow with the text, and the same text gives the same predictor to
the bit. With the map's inputs and a column of ones as the rows X, and the base's keys or values as the rows Y, the
weights are W = (XᵀX + λ I)⁻¹ XᵀY, where λ = `ridge` · trace(XᵀX) / columns, and 0 for the bias.

The first token of a sequence is an attention sink, which every later token attends to strongly (Xiao et al., arXiv
2309.17453). It counts SINK_WEIGHT times.

This module is handed token ids and two models: it knows neither text, files nor model families.

Shapes: B batch, S tokens of a sequence, P and p the inputs of a map (G·E or D of the auxiliary), q = G·E of the base
layer, with G KV heads, E head size, D hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError
from .layers import pruned_map, shared_layers
from .predictor import Features, Pairs, Predictor, asked, merge_heads, reading

RIDGE = 1e-5
SINK_WEIGHT = 100.0  # weight of the first token of a sequence; every other token has weight 1
KINDS = 2  # kind 0: keys, kind 1: values


class Moments:
    """Weighted sums over tokens: XᵀX of each auxiliary layer (`inputs`), XᵀY of each link (`cross`), and Y and Y² of
    each base layer (`sums`, `squares`).

    links: for each base layer the auxiliary layers that its maps may read; none for a layer that both models share.
    """

    def __init__(self, links: Sequence[Sequence[int]]):
        self.links, self.tokens, self.weight = [list(each) for each in links], 0, 0.0
        self.inputs: dict[tuple[int, int], np.ndarray] = {}  # (kind, auxiliary) → (p + 1, p + 1)
        self.cross: dict[tuple[int, int, int], np.ndarray] = {}  # (kind, base, auxiliary) → (p + 1, q)
        self.squares: dict[tuple[int, int], np.ndarray] = {}  # (kind, base) → (q)
        self.sums: dict[tuple[int, int], np.ndarray] = {}  # (kind, base) → (q)

    @property
    def used(self) -> list[int]:
        """The auxiliary layers that occur in a link, in rising order."""
        return sorted({j for link in self.links for j in link})

    def add(self, auxiliary: Features, base: Pairs) -> None:
        """Add sequences: the features of the auxiliary layers `used`, and raw keys and values (B, G, S, E) of each base
        layer."""
        batch, _, length, _ = base[0][0].shape
        weights = np.tile([SINK_WEIGHT] + [1.0] * (length - 1), batch)[:, None]
        self.tokens, self.weight = self.tokens + batch * length, self.weight + weights.sum()
        for kind in range(KINDS):
            rows = {j: _rows(auxiliary[j][kind], ones=True) for j in self.used}
            weighted = {j: x * weights for j, x in rows.items()}
            for j, x in rows.items():
                _sum(self.inputs, (kind, j), weighted[j].T @ x)
            for i, link in enumerate(self.links):
                if not link:
                    continue
                y = _rows(merge_heads(base[i][kind]))
                _sum(self.squares, (kind, i), (y * y * weights).sum(0))
                _sum(self.sums, (kind, i), (y * weights).sum(0))
                for j in link:
                    _sum(self.cross, (kind, i, j), weighted[j].T @ y)


@dataclass(frozen=True)
class Map:
    """A fitted map: weight (q, p), bias (q), and `error`, the share of the variance of Y that it does not explain."""

    weight: np.ndarray
    bias: np.ndarray
    error: float


def solve(moments: Moments, kind: int, i: int, j: int, ridge: float = RIDGE, heads: Sequence[slice] = ()) -> Map:
    """The map from auxiliary layer `j` to the keys (`kind` 0) or values (1) of base layer `i`.

    heads: if given, for each head of the base layer the only columns of X from which the head is predicted. Raises
    MlxeffError where the sums are not finite, or the equations singular.
    """
    gram, cross = moments.inputs[kind, j], moments.cross[kind, i, j]
    columns, outputs = gram.shape[0] - 1, cross.shape[1]
    full = np.zeros((columns + 1, outputs))
    size = outputs // max(1, len(heads))
    for h, inputs in enumerate(heads or [slice(0, columns)]):
        rows, part = np.r_[inputs, columns], slice(h * size, (h + 1) * size)
        full[rows, part] = _ridge(gram[np.ix_(rows, rows)], cross[rows, part], ridge)
    if not np.isfinite(full).all():
        raise MlxeffError(f"fit: layer {i}: wanted finite hidden states, keys and values, got others")
    squares = moments.squares[kind, i] - moments.sums[kind, i] ** 2 / moments.weight
    residual = moments.squares[kind, i] - 2 * (full * cross).sum(0) + (full * (gram @ full)).sum(0)
    return Map(full[:-1].T, full[-1], float(max(0.0, residual.sum()) / max(squares.sum(), np.finfo(float).tiny)))


def _ridge(gram: np.ndarray, cross: np.ndarray, ridge: float) -> np.ndarray:
    """Solve (gram + λ I) w = cross, where λ is `ridge` times the mean of the diagonal. The last row of `gram` and
    `cross` belongs to the bias, and has neither a part in this mean nor a penalty."""
    penalty = np.full(len(gram), ridge * np.trace(gram[:-1, :-1]) / max(1, len(gram) - 1))
    penalty[-1] = 0
    try:
        return np.linalg.solve(gram + np.diag(penalty), cross)
    except np.linalg.LinAlgError:
        raise MlxeffError(f"fit: wanted more text or a ridge above {ridge}: singular equations") from None


@dataclass(frozen=True)
class Fit:
    """A fitted predictor; `errors`: for each base layer the unexplained shares of the variance of its (keys, values), 0
    for shared layers; `tokens`: the number of tokens of text."""

    predictor: Predictor
    errors: list[tuple[float, float]]
    tokens: int

    @property
    def error(self) -> float:
        """The mean of all `errors`."""
        return float(np.mean(self.errors))


def fit(
    auxiliary,
    base,
    layer_map: Sequence[int],
    sequences: Iterable[Sequence[int]],
    ridge: float = RIDGE,
    per_head: bool = False,
    search: bool = False,
    inputs: str = "own",
    shared: int = 0,
) -> Fit:
    """Fit a predictor on `sequences` of token ids. Both models read each sequence from position 0.

    layer_map  for each base layer the auxiliary layer that its maps read
    ridge      the factor of the penalty λ (see the head of this module)
    per_head   predict each head of the base from one head of the auxiliary only; for the inputs `own`
    search     try every auxiliary layer for each base layer, and take the one with the smallest error (the lowest of
               equals); of `layer_map` only the length counts then
    inputs     one of `predictor.INPUTS`: what the maps read
    shared     how many first layers both models have in common; these have no maps

    Raises MlxeffError for `per_head` with other inputs, where all base layers are shared, for an empty text, and as
    `solve` and `Predictor`.
    """
    if per_head and inputs != "own":
        raise MlxeffError(f"fit: per head: wanted inputs own, which have heads, got {inputs}")
    if shared == len(base.layers):
        raise MlxeffError(f"fit: wanted an auxiliary without some of the base's {shared} layers, got all of them")
    count = len(auxiliary.layers)
    links = [range(count) if search else [j] for j in layer_map]
    moments = Moments([[]] * shared + links[shared:])
    measure(moments, auxiliary, base, sequences, inputs)
    shapes = auxiliary.kv_shapes, base.kv_shapes
    best = [_best(moments, i, ridge, per_head, shapes) for i in range(shared, len(base.layers))]
    chosen = [*range(shared), *(j for j, _ in best)]
    predictor = Predictor(*shapes, chosen, inputs, auxiliary.hidden_size, shared)
    for linears, (_, maps) in zip(predictor.maps, best, strict=True):
        for linear, fitted in zip(linears, maps, strict=True):
            linear.weight = mx.array(fitted.weight.astype(np.float32))
            linear.bias = mx.array(fitted.bias.astype(np.float32))
    errors = [(0.0, 0.0)] * shared + [tuple(each.error for each in maps) for _, maps in best]
    return Fit(predictor, errors, moments.tokens)


def choose_layers(
    base,
    choices: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    ridge: float = RIDGE,
    inputs: str = "own",
):
    """Choose the layers of an auxiliary that consists of base layers: (the best of `choices`, the error of each).

    For each choice a predictor is fitted on `sequences`, in which each base layer reads the last chosen layer that is
    not above it. The best choice has the smallest `Fit.error`.
    """
    count = len(base.layers)
    errors = []
    for kept in choices:
        how = {"inputs": inputs, "shared": shared_layers(kept)}
        errors.append(fit(base.pruned(kept), base, pruned_map(kept, count), sequences, ridge, **how).error)
    return choices[int(np.argmin(errors))], errors


def measure(moments: Moments, auxiliary, base, sequences: Iterable[Sequence[int]], inputs: str = "own") -> None:
    """Run both models on each of the `sequences`, and add their results to `moments`. Raises MlxeffError where there is
    no token at all."""
    for ids in sequences:
        tokens = mx.array([list(ids)])
        states = auxiliary.layer_states(tokens, auxiliary.new_cache(), *asked(moments.used, inputs, 0))
        read = reading(moments.used, inputs, 0, states).features
        true = base.raw_kv(tokens, base.new_cache())
        mx.eval(read, true)
        moments.add(read, true)
    if not moments.tokens:
        raise MlxeffError("fit: wanted a text of at least one token, got none")


def _best(moments: Moments, i: int, ridge: float, per_head: bool, shapes) -> tuple[int, list[Map]]:
    """For base layer `i`: (the linked auxiliary layer with the smallest error, its maps to keys and to values)."""
    found = None
    for j in moments.links[i]:
        heads = head_columns(shapes[0][j], shapes[1][i]) if per_head else ()
        maps = [solve(moments, kind, i, j, ridge, heads) for kind in range(KINDS)]
        error = sum(each.error for each in maps)
        if found is None or error < found[0]:
            found = error, j, maps
    return found[1], found[2]


def head_columns(auxiliary: tuple[int, int], base: tuple[int, int]) -> list[slice]:
    """For each base head the columns of the auxiliary head at the same relative position in its layer. The arguments
    are (number of KV heads, head size)."""
    (groups, size), count = auxiliary, base[0]
    return [slice(h * groups // count * size, (h * groups // count + 1) * size) for h in range(count)]


def _rows(rows: mx.array, ones: bool = False) -> np.ndarray:
    """(B, S, P) → (B·S, P) in float64; with `ones` followed by a column of ones."""
    flat = np.array(rows.astype(mx.float32)).reshape(-1, rows.shape[-1]).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1) if ones else flat


def _sum(sums: dict, key: tuple, value: np.ndarray) -> None:
    """Add `value` to the entry `key` of `sums`, which need not exist yet."""
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value
