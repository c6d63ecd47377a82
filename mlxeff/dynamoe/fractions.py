"""The table by which a checkpoint maps the mean share of the neurons that a user asks for to the dial of its routers.

A router has one of two rules, and networks that leave out inputs have a third. Each has one number, the dial, by which
more or less is computed:

lagrangian  the price of computing all neurons. A token takes the expert with the least sum of predicted error and price
tail        the largest probability that a wider expert is needed, at which the narrower one is taken. The paper
            (arXiv 2502.12325), as far as its public summaries tell, has one minus this number: the least probability
            that the expert suffices. In float32 that number is 1 where this one still tells tokens apart
threshold   the least size times weight of an input that counts
"""

import math
from dataclasses import dataclass
from itertools import pairwise

RULES = ("lagrangian", "tail")  # of routers
LARGEST = {"lagrangian": 1e30, "tail": 2.0}  # the dials at which every token takes the smallest expert


@dataclass(frozen=True)
class Fractions:
    """The dials of a checkpoint: `table` has pairs (mean fraction of the neurons, dial), the fractions rising, as they
    were measured when the checkpoint was fitted. Above the last one the dial goes to 0, that of the widest expert."""

    rule: str
    table: tuple[tuple[float, float], ...]

    def dial(self, fraction: float) -> float | None:
        """The dial for a mean fraction of 0 to 1. None: all is computed. Below the table's smallest fraction every
        token takes the smallest expert, and the threshold no longer rises."""
        if fraction >= 1:
            return None
        if fraction < self.table[0][0]:
            return LARGEST.get(self.rule, self.table[0][1])
        for (low, at_low), (high, at_high) in pairwise((*self.table, (1.0, 0.0))):
            if fraction <= high:
                return _between(at_low, at_high, (fraction - low) / (high - low) if high > low else 1.0)
        return 0.0


def _between(first: float, second: float, share: float) -> float:
    """The number at `share` of the way from `first` to `second`, by their logarithms where both are above 0."""
    if first > 0 and second > 0:
        return math.exp(math.log(first) + share * (math.log(second) - math.log(first)))
    return first + share * (second - first)
