"""A feed-forward network with nested experts, of which a router chooses one for each token (arXiv 2502.12325).

The neurons of a gated feed-forward network, down(silu(gate(x)) · up(x)), stand in the order of their importance. An
expert is the first k of them; the widest has all. The down-projection of a smaller expert is refitted to make up for
the neurons that it lacks: as a matrix of its own, or as a low-rank term added to the first k columns of the whole one.
Where smaller experts have matrices of their own, the whole down-projection keeps its columns in the order of the dense
network, so that it needs no new quantisation: the widest expert has the bits of the dense network.

Shapes: T tokens, D hidden size, F neurons, k neurons of an expert, E experts, R rows of a router, r rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import kernels
from ..models.parts import Rows
from ..modules import Linear, QuantizedLinear, parameter_bytes, quantized_matrix
from ..ops import FLOATS, Quantized, linear, quantized_linear, swiglu
from ..running import EXACT, RunOptions
from . import metal
from .fractions import Fractions

SORTED_TOKENS = 64  # from which tokens are sorted by expert, so that none computes what it does not use
HELD_CHOICES = 256  # calls whose choices are counted together


class Router(nn.Module):
    """A linear map of a token's normalised hidden state to one number an expert: with the rule "lagrangian" to the
    logarithm of the predicted error of each smaller expert, R = E - 1; with "tail" to the logits of the smallest
    expert that suffices, R = E. `prices` (E) are the shares of the mean number of neurons that the experts compute."""

    def __init__(self, size: int, rule: str, prices: Sequence[float]):
        super().__init__()
        rows = len(prices) - (rule == "lagrangian")
        self.weight = mx.zeros((rows, size))
        self.bias = mx.zeros((rows,))
        self.rule, self._prices = rule, mx.array(prices, mx.float32)

    @property
    def prices(self) -> mx.array:
        return self._prices

    def scores(self, x: mx.array) -> mx.array:
        """Tokens (T, D) → float32 (T, R)."""
        return linear(x.astype(mx.float32), self.weight.astype(mx.float32)) + self.bias.astype(mx.float32)

    def choose(self, scores: mx.array, dial: float) -> mx.array:
        """Scores (T, R) → the number of each token's expert, uint32 (T)."""
        last = len(self._prices) - 1
        if self.rule == "lagrangian":
            errors = mx.where(mx.isnan(scores), math.inf, mx.exp(scores))
            errors = mx.concatenate([errors, mx.zeros((len(scores), 1))], axis=1)
            costs = errors + dial * self._prices
            return last - mx.argmin(costs[:, ::-1], axis=1)  # of equal costs that of the wider expert
        shares = mx.softmax(scores, axis=1)
        tails = mx.cumsum(shares[:, :0:-1], axis=1)[:, ::-1]  # of each smaller expert: that a wider one is needed
        return (last - mx.sum(tails <= dial, axis=1)).astype(mx.uint32)


class LowRank(nn.Module):
    """The term left · right that is added to the first k columns of the whole down-projection."""

    def __init__(self, width: int, size: int, rank: int):
        super().__init__()
        self.right = Linear(width, rank, bias=False)
        self.left = Linear(rank, size, bias=False)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Neurons (T, k) → (T, D)."""
        return self.left(self.right(hidden))


@dataclass(frozen=True)
class DynamicParts:
    """The network by its matrices, for executors; see `models.parts.FeedForwardParts`. `order` as in
    `DynamicFeedForward`, None where the columns of `down` are in the order of the neurons."""

    gate: Rows
    up: Rows
    down: Rows
    experts: tuple[tuple[int, nn.Module | None], ...]  # (width k, its own down-projection, `LowRank` or None) of each
    router: Router
    order: mx.array | None
    kind: str = field(default="dynamic", init=False)

    @property
    def matrices(self) -> dict[str, Rows]:
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        for number, (_, module) in enumerate(self.experts):
            found |= {f"expert {number} {name}": rows for name, rows in _expert_rows(module).items()}
        return found

    def native(self) -> dict:
        """See `FeedForwardParts.native`."""
        return {
            "kind": self.kind,
            **{name: getattr(self, name).matrix() for name in ("gate", "up", "down")},
            "experts": [
                {"width": width, **dict.fromkeys(("down", "left", "right"))}
                | {name: rows.matrix() for name, rows in _expert_rows(module).items()}
                for width, module in self.experts
            ],
            "router": {"rule": self.router.rule, "weight": self.router.weight, "bias": self.router.bias},
            "prices": self.router.prices,
            "order": self.order,
        }


def _expert_rows(module: nn.Module | None) -> dict[str, Rows]:
    """The matrices of a smaller expert by their role."""
    if module is None:
        return {}
    if isinstance(module, LowRank):
        return {"left": Rows(module.left), "right": Rows(module.right)}
    return {"down": Rows(module)}


class DynamicFeedForward(nn.Module):
    """Takes the place of a gated feed-forward network: a module from normalised hidden states (B, S, D) to the
    (B, S, D) that is added to the hidden states.

    `widths` rise, and the last one is F. `experts` has a module for each smaller expert, its own down-projection or a
    `LowRank`; it is empty where all experts share the whole down-projection. `prices` as in `Router`. With own
    down-projections the parameter `order`, int32 (F), has for each neuron the column of `down` that belongs to it.
    """

    PARTS = "neurons"  # of what a share is reported

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        widths: Sequence[int],
        experts: Sequence[nn.Module],
        prices: Sequence[float],
        fractions: Fractions,
        size: int,
    ):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        if experts:
            self.experts = list(experts)
        if experts and not isinstance(experts[0], LowRank):
            self.order = mx.arange(widths[-1], dtype=mx.int32)
            self.freeze(keys=["order"], recurse=False)
        self.router = Router(size, fractions.rule, prices)
        self.widths, self.fractions = tuple(widths), fractions
        self._counts, self._pending = [0] * len(self.widths), []
        self._recorded: list[mx.array] | None = None
        self._places: tuple[mx.array, mx.array] | None = None  # `order`, and the neuron that belongs to each column
        # What `_described` made of these arrays, None before it was called.
        self._kernel: tuple[list[mx.array], metal.Parts | None] | None = None

    @property
    def smaller(self) -> list[nn.Module | None]:
        """The modules of the smaller experts; None for one that shares the whole down-projection."""
        return self.get("experts") or [None] * (len(self.widths) - 1)

    def __call__(self, x: mx.array, options: RunOptions = EXACT) -> mx.array:
        dial = self.fractions.dial(options.fraction)
        if dial is None:
            self._count(len(self.widths) - 1, x.size // x.shape[-1])
            if self._recorded is not None:
                self._recorded.append(mx.ones((x.size // x.shape[-1],)))
            return self._whole(swiglu(self.gate_proj(x), self.up_proj(x)))
        tokens = x.reshape(-1, x.shape[-1])
        chosen = self._choose(tokens, dial)
        self._note(chosen)
        if parts := self._kernel_parts(tokens):
            return metal.experts(tokens, parts, chosen).reshape(x.shape)
        whole = len(tokens) < SORTED_TOKENS or self.training
        return (self._masked if whole else self._sorted)(tokens, chosen).reshape(x.shape)

    def choose(self, tokens: mx.array, fraction: float) -> mx.array:
        """The number of each token's expert at a sensitivity, uint32 (T), for tokens (T, D)."""
        dial = self.fractions.dial(fraction)
        return mx.full((len(tokens),), len(self.widths) - 1, mx.uint32) if dial is None else self._choose(tokens, dial)

    def _choose(self, tokens: mx.array, dial: float) -> mx.array:
        """The number of each token's expert, uint32 (T)."""
        router = self.router
        if self._kernel_parts(tokens):
            return metal.route(tokens, router.weight, router.bias, router.prices, router.rule, dial)
        return router.choose(router.scores(tokens), dial)

    def _kernel_parts(self, tokens: mx.array) -> metal.Parts | None:
        """The arrays for the Metal kernels; None where these do not compute this many tokens of this type here."""
        if self.training or len(tokens) > metal.MOST_TOKENS or tokens.dtype not in FLOATS or not on_gpu():
            return None
        modules = (self.gate_proj, self.up_proj, self.down_proj, self.router, *(self.get("experts") or ()))
        arrays = [array for module in modules for _, array in tree_flatten(module.parameters())]
        if self._kernel is None or any(a is not b for a, b in zip(self._kernel[0], arrays, strict=True)):
            self._kernel = arrays, self._described()
        parts = self._kernel[1]
        return parts if parts is not None and not parts.refusal else None

    def _described(self) -> metal.Parts | None:
        """The network as the Metal kernels take it; None where it has matrices of a kind that they do not know."""
        own = [each for each in self.smaller if each is not None]
        low_rank = bool(own) and isinstance(own[0], LowRank)
        downs = [*(() if low_rank else own), self.down_proj]
        lefts, rights = ([getattr(each, name) for each in own if low_rank] for name in ("left", "right"))
        groups = [[_matrix(each) for each in group] for group in ((self.gate_proj, self.up_proj), downs, lefts, rights)]
        if any(each is None for group in groups for each in group):
            return None
        router = self.router
        return metal.Parts(
            router.weight.astype(mx.float32),
            router.bias.astype(mx.float32),
            router.prices,
            router.rule,
            mx.array(self.widths, mx.uint32),
            *groups[0],
            *map(tuple, groups[1:2]),
            *(module.get("bias") for module in (self.gate_proj, self.up_proj, self.down_proj)),
            self.get("order"),
            *map(tuple, groups[2:]),
        )

    def _masked(self, tokens: mx.array, chosen: mx.array) -> mx.array:
        """The output (T, D) of each token's expert. All experts are computed, and nothing waits for the choice."""
        y, *smaller = self.outputs(tokens)
        for number, output in enumerate(smaller):
            y = mx.where((chosen == number)[:, None], output, y)
        return y

    def outputs(self, tokens: mx.array) -> list[mx.array]:
        """The outputs (T, D) of the widest expert, then of the smaller ones, for tokens (T, D)."""
        hidden = swiglu(self.gate_proj(tokens), self.up_proj(tokens))
        found = [self._whole(hidden)]
        for module, width in zip(self.smaller, self.widths, strict=False):
            if module is not None and not isinstance(module, LowRank):
                found.append(self._with_bias(module(hidden[:, :width])))
                continue
            y = self.down_proj(mx.where(mx.arange(hidden.shape[1]) < width, hidden, 0))
            found.append(y if module is None else y + module(hidden[:, :width]))
        return found

    def _whole(self, hidden: mx.array) -> mx.array:
        """The whole down-projection of the values of all neurons (…, F)."""
        if "order" not in self:
            return self.down_proj(hidden)
        if self._places is None or self._places[0] is not self.order:
            self._places = self.order, mx.argsort(self.order)
        places = mx.broadcast_to(self._places[1], hidden.shape)  # an index alone is many times slower on a CPU
        return self.down_proj(mx.take_along_axis(hidden, places, axis=-1))

    def _with_bias(self, y: mx.array) -> mx.array:
        """The bias of the down-projection, which smaller experts share, added to y (T, D)."""
        return y + self.down_proj.bias if "bias" in self.down_proj else y

    def _sorted(self, tokens: mx.array, chosen: mx.array) -> mx.array:
        """The same as `_masked`, without what the experts do not use: the tokens of each expert together. This waits
        for the choice."""
        order = mx.argsort(chosen)
        counts = mx.sum(chosen[:, None] == mx.arange(len(self.widths)), axis=0).tolist()
        parts, start = [], 0
        for number, count in enumerate(counts):
            if count:
                parts.append(self._expert(number, tokens[order[start : start + count]]))
            start += count
        back = mx.argsort(order)
        return mx.concatenate(parts)[back]

    def _expert(self, number: int, tokens: mx.array) -> mx.array:
        """The output (T, D) of one expert."""
        width = self.widths[number]
        hidden = swiglu(_first_rows(self.gate_proj, width, tokens), _first_rows(self.up_proj, width, tokens))
        if number + 1 == len(self.widths):
            return self._whole(hidden)
        module = self.smaller[number]
        if module is not None and not isinstance(module, LowRank):
            return self._with_bias(module(hidden))
        rest = self.widths[-1] - width
        y = self.down_proj(mx.pad(hidden, [(0, 0), (0, rest)]))
        return y if module is None else y + module(hidden)

    def parts(self) -> DynamicParts:
        """The network by its matrices."""
        smaller = tuple(zip(self.widths, self.smaller, strict=False))
        matrices = (Rows(module) for module in (self.gate_proj, self.up_proj, self.down_proj))
        return DynamicParts(*matrices, smaller, self.router, self.get("order"))

    def read_bytes(self, fraction: float) -> int:
        """Bytes of its parameters that it reads for a token of which it computes a `fraction` of the neurons on
        average."""
        whole = sum(parameter_bytes(module) for module in (self.gate_proj, self.up_proj, self.down_proj))
        return int(whole * max(fraction, self.widths[0] / self.widths[-1]))

    def record(self, shares: list[mx.array] | None) -> None:
        """Append the share of the neurons that each token computed, float32 (T) at each call, to a list from now on;
        None: no longer."""
        self._recorded = shares

    @property
    def counts(self) -> list[int]:
        """How many tokens took each expert here, outside of training. Tokens of the native decoder are counted
        there."""
        while self._pending:
            chosen = self._pending.pop()
            for number in range(len(self.widths)):
                self._counts[number] += int(mx.sum(chosen == number).item())
        return list(self._counts)

    def computed(self, counts: list[int]) -> tuple[int, int, int]:
        """(Tokens, neurons that they computed, neurons that the widest expert has for so many tokens) for counts as
        those of `counts`."""
        part = sum(count * width for count, width in zip(counts, self.widths, strict=True))
        return sum(counts), part, sum(counts) * self.widths[-1]

    @staticmethod
    def details(counts: list[list[int]], _networks: "list[DynamicFeedForward]") -> dict:
        """What a report says beside the shares, for the counts of each layer."""
        return {"experts": [sum(column) for column in zip(*counts, strict=True)]}

    def shares(self, chosen: mx.array) -> mx.array:
        """The share of the neurons that tokens compute, (T), for the numbers of their experts."""
        return mx.array(self.widths)[chosen] / self.widths[-1]

    def _count(self, number: int, tokens: int) -> None:
        """Count tokens that took the expert of this number."""
        if not self.training:
            self._counts[number] += tokens

    def _note(self, chosen: mx.array) -> None:
        """Keep a choice, to be counted when it has been computed."""
        if self._recorded is not None:
            self._recorded.append(self.shares(chosen))
        if self.training:
            return
        self._pending.append(chosen)
        if len(self._pending) > HELD_CHOICES:
            last = self._pending.pop()  # not computed yet
            _ = self.counts
            self._pending.append(last)


def on_gpu() -> bool:
    """Whether the Metal kernels are chosen."""
    return kernels.device() == "gpu" and kernels.has_metal()


def _matrix(module: nn.Module) -> metal.Matrix | None:
    """The matrix of a linear layer as the Metal kernels take it; None for a kind that they do not know."""
    if type(module) is Linear:
        return module.weight
    return quantized_matrix(module) if type(module) is QuantizedLinear else None


def _first_rows(module: nn.Module, count: int, x: mx.array) -> mx.array:
    """x (T, K) times the first `count` rows of a linear layer's matrix, with its bias: (T, count)."""
    if type(module) is Linear:
        return linear(x, module.weight[:count], module.bias[:count] if "bias" in module else None)
    if type(module) is QuantizedLinear:
        whole = quantized_matrix(module)
        rows = (None if part is None else part[:count] for part in (whole.weight, whole.scales, whole.biases))
        y = quantized_linear(x, Quantized(*rows, whole.group_size, whole.bits, whole.mode))
        return y + module.bias[:count] if "bias" in module else y
    return module(x)[:, :count]
