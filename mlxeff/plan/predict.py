"""Seconds to the first token and seconds of a decode step: the terms of `costs` with the constants of an engine."""

from dataclasses import dataclass

from . import costs
from .chips import Machine
from .constants import Constants
from .costs import Bits, Engine
from .shapes import Shape

STEPS = {"gpu": 2048, "cpu": 512}  # prompt tokens that are computed at once, by default
# Share of the weights' bytes that each further row of a verification reads anew: ESTIMATES from published widths of
# MLX's products, M1 and M2 against later chips; a CPU's kernels read them once.
ANEW = {"serial": 0.3, "parallel": 0.15, "cpu": 0.0}


@dataclass(frozen=True)
class Predicted:
    """A predicted number with its error bar."""

    value: float
    low: float
    high: float

    @classmethod
    def within(cls, value: float, error: float) -> "Predicted":
        """`value`, up to a factor of 1 + `error` too large or too small."""
        return cls(value, value / (1 + error), value * (1 + error))

    def inverse(self) -> "Predicted":
        """1 / it: of seconds a token, tokens a second."""
        return Predicted(1 / self.value, 1 / self.high, 1 / self.low)


@dataclass(frozen=True)
class Predictor:
    """Predicts for one machine and engine."""

    machine: Machine
    engine: Engine
    constants: Constants

    def prefill(self, shape: Shape, bits: Bits, tokens: int, step: int | None = None, share: float = 1.0) -> float:
        """Seconds to the first token after a prompt of `tokens` tokens, computed `step` at a time; `share`: of the
        feed-forward networks that is computed."""
        step = step or STEPS[self.machine.kind]
        least = costs.weight_bytes(shape, bits, True, share) / self.machine.bandwidth
        least *= self.constants.decode.get("bytes", 0.0)  # a chunk reads the weights once at least
        seconds = 0.0
        for first in range(0, tokens, step):
            last = min(first + step, tokens)
            terms = costs.prefill_terms(shape, bits, self.machine, self.engine, first, last, share)
            seconds += max(least, costs.total(terms, self.constants.prefill))
        return seconds

    def decode(self, shape: Shape, bits: Bits, depth: int, kv_bytes: float = 2.0, share: float = 1.0) -> float:
        """Seconds of a decode step after `depth` tokens."""
        terms = costs.decode_terms(shape, bits, self.machine, self.engine, depth, kv_bytes, share)
        return costs.total(terms, self.constants.decode) + terms.get(costs.SEEDS, 0.0)

    def further_row(self, shape: Shape, bits: Bits, depth: int, share: float = 1.0) -> float:
        """Seconds by which a pass after `depth` tokens takes longer for each token beyond the first: its products at
        the rate of prefill and the weights that are read anew."""
        terms = costs.prefill_terms(shape, bits, self.machine, self.engine, depth, depth + 1, share)
        row = {name: value for name, value in terms.items() if name in costs.PRODUCTS or name.startswith("attention")}
        kind = "cpu" if self.machine.kind == "cpu" else costs.pipes(self.machine)
        anew = ANEW[kind] * costs.weight_bytes(shape, bits, True, share) / self.machine.bandwidth
        anew *= self.constants.decode.get("bytes", 0.0)
        return costs.total(row, self.constants.prefill) + anew

    def bar(self, phase: str, value: float) -> Predicted:
        """A value of a phase, "prefill" or "decode", with its error bar."""
        return Predicted.within(value, self.constants.errors[phase])
