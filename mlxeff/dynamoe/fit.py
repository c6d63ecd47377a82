"""A dense feed-forward network → one with nested experts and a router, in closed form and without fine-tuning.

For each layer, from what its network reads in a text: the neurons are ordered by importance; the down-projection of
each smaller expert is refitted by ridge regression, to make up for the neurons that it lacks; and the router is fitted
to the errors that the experts, as they are stored, make on these tokens. Nothing here knows where the text and the
model come from, or where the result goes.

Shapes: T tokens, D hidden size, F neurons, k neurons of an expert, E experts, R rows of a router.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.parts import GatedParts, Rows
from ..modules import Linear, QuantizedLinear, dense, plain_linear
from ..ops import fitting_group, linear, swiglu
from . import gptq
from .feed_forward import DynamicFeedForward, LowRank
from .fractions import Fractions

RIDGE = 1e-2  # of the mean diagonal of the Gram matrix
ROUTER_RIDGE = 1e-3
BATCH = 2048  # tokens that are computed together
LEAST_ERROR = 1e-12  # of a token, under its logarithm
HELD_OUT = 5  # every fifth token measures the router's fit
STEPS, RATE = 200, 0.02  # of the classifier's training
THRESHOLD = 0.8  # share of the whole output on which an expert's must reach to suffice (the paper's rule)


@dataclass
class Statistics:
    """What a layer's network read in the text, in a form that the fit needs: `gram` is aᵀa of its neurons' values
    a (F, F) over all tokens, `inputs` are the hidden states x (T, D) of those tokens that the router is fitted on."""

    gram: np.ndarray
    inputs: list[mx.array]
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> "Statistics":
        return cls(np.zeros((width, width)), [])

    def add(self, parts: GatedParts, x: mx.array) -> None:
        """Add tokens (B, T, D). Of every two tokens one is kept."""
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        a = np.array(neurons(parts, x))
        self.gram += a.T @ a
        self.tokens += len(x)
        self.inputs.append(mx.contiguous(x[::2]))
        mx.eval(self.inputs[-1])


def product(rows: Rows, x: mx.array) -> mx.array:
    """x (T, K) times a described matrix, with its bias: float32 (T, N)."""
    part = slice(rows.start, rows.stop)
    return rows.module(x)[:, part].astype(mx.float32)


def neurons(parts: GatedParts, x: mx.array) -> mx.array:
    """The values of the neurons, silu(gate(x)) · up(x): x (T, D) → float32 (T, F)."""
    if parts.gate.module is parts.up.module:
        both = parts.gate.module(x).astype(mx.float32)
        return swiglu(both[:, parts.gate.start : parts.gate.stop], both[:, parts.up.start : parts.up.stop])
    return swiglu(product(parts.gate, x), product(parts.up, x))


def importance(gram: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The neurons, the most important first: by the root of the mean square of their values times the length of their
    column of the down-projection (D, F)."""
    weight = np.sqrt(np.diag(gram).clip(0)) * np.linalg.norm(down, axis=0)
    return np.argsort(-weight, kind="stable")


def refitted(gram: np.ndarray, down: np.ndarray, width: int) -> np.ndarray:
    """The down-projection (D, k) of the first k = `width` neurons that comes nearest to what the whole one, `down`
    (D, F), makes of all. It is drawn towards its own columns by a ridge."""
    own = gram[:width, :width]
    ridge = RIDGE * max(float(np.mean(np.diag(own))), LEAST_ERROR)
    wanted = gram[:width] @ down.T + ridge * down[:, :width].T
    return np.linalg.solve(own + ridge * np.eye(width), wanted).T


def low_rank(gram: np.ndarray, change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(left (D, r), right (r, k)), whose product is nearest to `change` (D, k) for neurons with the Gram matrix (k, k)
    of `gram`."""
    ridge = RIDGE * max(float(np.mean(np.diag(gram))), LEAST_ERROR)
    factor = np.linalg.cholesky(gram + ridge * np.eye(len(gram)))
    left, sizes, right = np.linalg.svd(change @ factor, full_matrices=False)
    right = np.linalg.solve(factor.T, right[:rank].T).T
    return left[:, :rank] * sizes[:rank], right


def rows_taken(rows: Rows, order: np.ndarray) -> nn.Module:
    """A linear layer with the described rows in another order, in the same storage."""
    module, index = rows.module, mx.array(order + rows.start)
    bias = module.bias[index] if "bias" in module else None
    if hasattr(module, "block_format"):
        taken = type(module)(module.block_format, len(order), module.cols, bias is not None)
        for name, array in module.arrays.items():
            taken[name] = array if name == "exponent_bias" else array[index]
    elif isinstance(module, nn.QuantizedLinear):
        taken = QuantizedLinear(32, 1, bias is not None, 32, 4)
        taken.group_size, taken.bits, taken.mode = module.group_size, module.bits, module.mode
        for name in ("weight", "scales", "biases"):
            if module.get(name) is not None:
                taken[name] = module[name][index]
            else:
                taken.pop(name, None)
    else:
        taken = plain_linear(module.weight[index])
    if bias is not None:
        taken.bias = bias
    return taken


def stored(matrix: np.ndarray, like: nn.Module, gram: np.ndarray | None = None) -> nn.Module:
    """A linear layer without bias with this matrix (N, K), stored as `like` is: quantised in groups of the same size
    with the same bits, so that what it makes of vectors with the Gram matrix `gram` changes the least; or dense in the
    same type. Seed-encoded matrices become affine ones of 8 bits, since their blocks cannot be cut."""
    if isinstance(like, nn.Linear):
        return plain_linear(mx.array(matrix, mx.float32).astype(like.weight.dtype))
    if isinstance(like, nn.QuantizedLinear) and like.mode == "affine":
        bits, group, dtype = like.bits, like.group_size, like.scales.dtype
    else:
        bits, group, dtype = 8, fitting_group(matrix.shape[1]), mx.float16
    gram = np.eye(matrix.shape[1]) if gram is None else gram
    return gptq.quantised(np.asarray(matrix, np.float64), gram, bits, group, dtype)


def empty(
    parts: GatedParts, widths: Sequence[int], down: str, rank: int | None, rule: str, prices: Sequence[float]
) -> DynamicFeedForward:
    """The module that takes the place of a described network, its matrices stored as there; `fit_layer` fills it. Its
    table of fractions is not known yet. `down`, `rank`: see `install`; `rule` of the router; `prices`: see `Router`."""
    size, like = _matrix_shape(parts.down), parts.down.module
    experts = []
    for width in widths[:-1] if down != "shared" else ():
        if down == "own":
            experts.append(stored(np.zeros((size, width)), like))
            continue
        experts.append(LowRank(width, size, rank))
    same = np.arange(widths[-1])
    whole = like if down == "own" else _with_bias(stored(np.zeros((size, widths[-1])), like), like)
    return DynamicFeedForward(
        rows_taken(parts.gate, same),
        rows_taken(parts.up, same),
        whole,
        widths,
        experts,
        prices,
        Fractions(rule, ((0.0, 0.0),)),
        size,
    )


def _matrix_shape(down: Rows) -> int:
    """The hidden size, which is the number of rows of a down-projection."""
    return down.module.rows if hasattr(down.module, "rows") else down.module.weight.shape[0]


def _with_bias(down: nn.Module, like: nn.Module) -> nn.Module:
    """The layer `down` with the bias of `like`, if that has one."""
    if "bias" in like:
        down.bias = like.bias
    return down


def fit_layer(
    module: DynamicFeedForward, parts: GatedParts, seen: Statistics, weights: np.ndarray, threshold: float = THRESHOLD
) -> tuple[np.ndarray, list[float]]:
    """Fit `module`, which `empty` made for the network `parts`, to what the network has `seen`. `weights` (D): how much
    squared errors of the output matter, see `fisher`. `threshold`: of the labels of the paper's rule.

    Returns (what the router says of the tokens that it was fitted on, float32 (T, R); the shares of the variance, or of
    the labels, that it predicts on tokens that it was not fitted on).
    """
    whole, gram = np.array(_matrix(parts.down), np.float64), seen.gram
    order = importance(gram, whole)
    gram, whole = gram[order][:, order] / max(1, seen.tokens), whole[:, order]
    like = parts.down.module
    module.gate_proj, module.up_proj = rows_taken(parts.gate, order), rows_taken(parts.up, order)
    if "order" in module:
        module.down_proj, module.order = like, mx.array(order.astype(np.int32))
    else:
        module.down_proj = _with_bias(stored(whole, like, gram), like)
    for number, (expert, width) in enumerate(zip(module.get("experts") or (), module.widths, strict=False)):
        matrix = refitted(gram, whole, width)
        if isinstance(expert, LowRank):
            rank = expert.left.weight.shape[1]
            left, right = low_rank(gram[:width, :width], matrix - whole[:, :width], rank)
            expert.left, expert.right = (
                plain_linear(mx.array(each, mx.float32).astype(mx.float16)) for each in (left, right)
            )
        else:
            module.experts[number] = stored(matrix, like, gram[:width, :width])
    mx.eval(module.parameters())
    errors, shares = _measured(module, seen.inputs, weights)
    inputs = np.concatenate([np.array(each) for each in seen.inputs])
    if module.router.rule == "lagrangian":
        weight, bias, explained = regression(inputs, np.log(errors + LEAST_ERROR))
    else:
        enough = np.concatenate([shares > threshold, np.ones((len(shares), 1), bool)], axis=1)
        weight, bias, explained = classifier(inputs, np.argmax(enough, axis=1), len(module.widths))
    module.router.weight, module.router.bias = (mx.array(each, mx.float32) for each in (weight, bias))
    return inputs @ weight.T.astype(np.float32) + bias.astype(np.float32), explained


def _matrix(rows: Rows) -> mx.array:
    return dense(rows.module)[rows.start : rows.stop]


def _measured(module: DynamicFeedForward, inputs: list[mx.array], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token and smaller expert, (T, E - 1) each: the weighted squared error of its output, and the share of
    the whole output on which it reaches, ⟨y_e, y⟩ / ⟨y, y⟩."""
    errors, shares, scale = [], [], mx.array(weights, mx.float32)
    bias = module.down_proj.get("bias")
    for x in inputs:
        y, *smaller = (each - bias if bias is not None else each for each in module.outputs(x))
        square = mx.maximum(mx.sum(y * y, axis=1), LEAST_ERROR)
        errors.append(mx.stack([mx.sum(mx.square(own - y) * scale, axis=1) for own in smaller], axis=1))
        shares.append(mx.stack([mx.sum(own * y, axis=1) / square for own in smaller], axis=1))
        mx.eval(errors[-1], shares[-1])
    return tuple(np.concatenate([np.array(each, np.float64) for each in found]) for found in (errors, shares))


def regression(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """(weight (R, D), bias (R), share of the variance explained on held-out tokens) of the ridge regression of targets
    (T, R) on inputs (T, D)."""
    held = np.arange(len(inputs)) % HELD_OUT == 0
    solve = lambda chosen: _ridge(inputs[chosen], targets[chosen])  # noqa: E731
    if held.all() or not held.any():
        weight, bias = _ridge(inputs, targets)
        return weight, bias, [float("nan")] * targets.shape[1]
    weight, bias = solve(~held)
    rest = targets[held] - (inputs[held] @ weight.T + bias)
    explained = 1 - rest.var(axis=0) / np.maximum(targets[held].var(axis=0), LEAST_ERROR)
    weight, bias = _ridge(inputs, targets)
    return weight, bias, explained.tolist()


def _ridge(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, middle = inputs.mean(axis=0, dtype=np.float64), targets.mean(axis=0)
    centred = (inputs - mean).astype(np.float64)
    gram = centred.T @ centred
    gram += ROUTER_RIDGE * max(float(np.mean(np.diag(gram))), LEAST_ERROR) * np.eye(len(gram))
    weight = np.linalg.solve(gram, centred.T @ (targets - middle)).T
    return weight, middle - weight @ mean


def classifier(inputs: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """(weight (E, D), bias (E), [share of held-out tokens that get their label]) of multinomial logistic regression."""
    import mlx.optimizers as optim

    x, wanted = mx.array(inputs), mx.array(labels.astype(np.int32))
    held = mx.arange(len(x)) % HELD_OUT == 0
    model = Linear(x.shape[1], count)
    model.weight, model.bias = mx.zeros_like(model.weight), mx.zeros_like(model.bias)
    scale = 1 / (mx.std(x, axis=0) + 1e-6)
    optimizer = optim.Adam(RATE)

    def loss(model: nn.Module) -> mx.array:
        each = nn.losses.cross_entropy(linear(x * scale, model.weight, model.bias), wanted)
        return mx.mean(mx.where(held, 0, each))

    step = nn.value_and_grad(model, loss)
    for _ in range(STEPS):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    right = mx.argmax(linear(x * scale, model.weight, model.bias), axis=1) == wanted
    accuracy = (mx.sum(right & held) / mx.maximum(mx.sum(held), 1)).item()
    return np.array(model.weight * scale, np.float64), np.array(model.bias, np.float64), [accuracy]
