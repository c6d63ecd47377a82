"""The predictor in closed form: ridge regression of the base's raw keys and values on what the maps read.

For each pair of layers that is asked for, the normal equations are summed in float64 while text streams by, so memory
does not grow with the text, and the same text gives the same predictor to the bit. With X the auxiliary's rows and a
column of ones, Y the base's rows: W = (XᵀX + λ I)⁻¹ XᵀY, where λ = `ridge` · trace(XᵀX) / columns, 0 for the bias.
The first token of a sequence counts SINK_WEIGHT times: every later token attends to it (Xiao et al., arXiv 2309.17453).
Shapes: n tokens, p what a map reads (G·E or D of the auxiliary), q = G·E of the base's layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError
from .layers import pruned_map, shared_layers
from .predictor import Features, Pairs, Predictor, asked, merge_heads, reading

RIDGE = 1e-5
SINK_WEIGHT = 100.0  # tokens that the first one counts for
KINDS = 2  # keys and values


class Moments:
    """Weighted sums over tokens: XᵀX of each auxiliary layer, XᵀY of each pair of `links`, Y and Y² of each base layer.

    links: for each base layer the auxiliary layers that it may read, none for a shared one.
    """

    def __init__(self, links: Sequence[Sequence[int]]):
        self.links, self.tokens, self.weight = [list(each) for each in links], 0, 0.0
        self.inputs: dict[tuple[int, int], np.ndarray] = {}  # (kind, auxiliary) → (p + 1, p + 1)
        self.cross: dict[tuple[int, int, int], np.ndarray] = {}  # (kind, base, auxiliary) → (p + 1, q)
        self.squares: dict[tuple[int, int], np.ndarray] = {}  # (kind, base) → (q)
        self.sums: dict[tuple[int, int], np.ndarray] = {}  # (kind, base) → (q)

    @property
    def used(self) -> list[int]:
        """The auxiliary layers of all links."""
        return sorted({j for link in self.links for j in link})

    def add(self, auxiliary: Features, base: Pairs) -> None:
        """What maps read of the auxiliary layers `used`, and raw keys and values of each base layer, of one text."""
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
    """A fitted map: weight (q, p), bias (q), and the share of the variance that it does not explain."""

    weight: np.ndarray
    bias: np.ndarray
    error: float


def solve(moments: Moments, kind: int, i: int, j: int, ridge: float = RIDGE, heads: Sequence[slice] = ()) -> Map:
    """The map from auxiliary layer j to base layer i; kind 0 keys, 1 values.

    heads: where given, for each base head the columns of the auxiliary head that alone it is predicted from.
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
    """Solve (gram + λ I) w = cross with λ = ridge · mean of the diagonal, none on the last row, the bias."""
    penalty = np.full(len(gram), ridge * np.trace(gram[:-1, :-1]) / max(1, len(gram) - 1))
    penalty[-1] = 0
    try:
        return np.linalg.solve(gram + np.diag(penalty), cross)
    except np.linalg.LinAlgError:
        raise MlxeffError(f"fit: wanted more text or a ridge above {ridge}: singular equations") from None


@dataclass(frozen=True)
class Fit:
    """A fitted predictor; `errors`: of each base layer, the unexplained share of its (keys, values)."""

    predictor: Predictor
    errors: list[tuple[float, float]]
    tokens: int

    @property
    def error(self) -> float:
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
    """Fit a predictor on `sequences` of token ids, each of which both models read from position 0; of the first
    `shared` layers, which both have in common, there is nothing to fit.

    search: each base layer reads the auxiliary layer that explains most of its keys and values (the lowest of equals),
    and `layer_map` is only where this begins: every link is then measured. inputs: what the maps read (`predictor`).
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
    """(the choice of base layers whose keys and values explain most of the base's, the error of each choice); on
    `sequences`, with each base layer reading the last chosen layer that is not above it."""
    count = len(base.layers)
    errors = []
    for kept in choices:
        how = {"inputs": inputs, "shared": shared_layers(kept)}
        errors.append(fit(base.pruned(kept), base, pruned_map(kept, count), sequences, ridge, **how).error)
    return choices[int(np.argmin(errors))], errors


def measure(moments: Moments, auxiliary, base, sequences: Iterable[Sequence[int]], inputs: str = "own") -> None:
    """Run both models over `sequences` and sum."""
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
    """(auxiliary layer, its maps of keys and values) with the least error for base layer i."""
    found = None
    for j in moments.links[i]:
        heads = head_columns(shapes[0][j], shapes[1][i]) if per_head else ()
        maps = [solve(moments, kind, i, j, ridge, heads) for kind in range(KINDS)]
        error = sum(each.error for each in maps)
        if found is None or error < found[0]:
            found = error, j, maps
    return found[1], found[2]


def head_columns(auxiliary: tuple[int, int], base: tuple[int, int]) -> list[slice]:
    """For each base head the columns of the auxiliary head at the same place in its layer."""
    (groups, size), count = auxiliary, base[0]
    return [slice(h * groups // count * size, (h * groups // count + 1) * size) for h in range(count)]


def _rows(rows: mx.array, ones: bool = False) -> np.ndarray:
    """(B, S, P) → (B·S, P) in float64, with a column of ones if asked."""
    flat = np.array(rows.astype(mx.float32)).reshape(-1, rows.shape[-1]).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1) if ones else flat


def _sum(sums: dict, key: tuple, value: np.ndarray) -> None:
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value
