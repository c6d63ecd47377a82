"""`RunOptions`, which say how a forward pass computes, and `Tally`, which counts what has computed.

Options are passed with each call of a model; every cache has a tally of the tokens that were appended to it. Both are
plain values that know no model: `DecoderModel.check` refuses options that a model or this machine does not support.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from .errors import MlxeffError
from .ops import COMPUTE

FULL_VIEW = "full"  # attention reads keys and values in the highest precision that the cache keeps
DRAFT_VIEW = "draft"  # attention reads them in fewer bits, for tokens that are verified afterwards


@dataclass(frozen=True)
class RunOptions:
    """How a forward pass computes. The defaults are exact.

    compute   arithmetic of the matrix products in the native CPU kernels, one of ops.COMPUTE (see models/native.py).
    kv        kind of a new KV cache, one of cache.KINDS; None for keys and values in the type that the model computes.
    view      the precision in which attention reads a cache that keeps each token in several precisions: "full" for
              the highest, or "draft".
    fraction  mean share of the neurons of the feed-forward networks to compute, 0 (as few as the model can) to 1.
              Less than 1 needs a model that can leave neurons out.

    Raises MlxeffError for values that no model supports.
    """

    compute: str = "exact"
    kv: str | None = None
    view: str = FULL_VIEW
    fraction: float = 1.0

    def __post_init__(self):
        if self.compute not in COMPUTE:
            raise MlxeffError(f"compute: wanted one of {', '.join(COMPUTE)}, got {self.compute!r}")
        if not 0 <= self.fraction <= 1:
            raise MlxeffError(f"feed-forward fraction: wanted 0 to 1, got {self.fraction}")

    @property
    def precision(self) -> str:
        """See `Ran.precision`."""
        return Ran("", self.compute, self.fraction).precision


EXACT = RunOptions()


class Ran(NamedTuple):
    """What computed a forward pass."""

    # "mlx", or "native" and the instruction set of the CPU kernels, as in "native avx512". ", unfused" follows where
    # they were called operator by operator instead of once for the whole pass.
    backend: str
    compute: str  # arithmetic of the matrix products, one of ops.COMPUTE
    fraction: float = 1.0  # as in `RunOptions`

    @property
    def precision(self) -> str:
        """The arithmetic and the fraction in words: what keys and values depend on beside the model."""
        return self.compute if self.fraction == 1 else f"{self.compute} (sensitivity {self.fraction:g})"


class Tally(Counter):
    """`Ran` → number of tokens that it computed."""

    def since(self, before: "Tally") -> "Tally":
        """The tokens counted since `before`, an earlier copy of this tally."""
        return Tally({ran: count - before[ran] for ran, count in self.items() if count > before[ran]})

    def report(self) -> dict:
        """{"backend": …, "compute": …}, each the distinct values joined by " + ", those of most tokens first; None
        where no token was computed."""
        ordered = [ran for ran, _ in self.most_common()]
        return {
            field: " + ".join(dict.fromkeys(getattr(ran, field) for ran in ordered)) or None
            for field in ("backend", "compute")
        }
