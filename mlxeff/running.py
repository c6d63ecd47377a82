"""How a model is run: a value that travels with every call of it; and what ran: a count that every cache keeps.

Both are plain values. Which options a model or a cache can follow is theirs to say: `DecoderModel.check` refuses in one
line what this machine or this model does not have.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from .errors import MlxeffError
from .ops import COMPUTE

FULL_VIEW = "full"  # attention reads all that a cache keeps of a token


@dataclass(frozen=True)
class RunOptions:
    """How a forward pass computes. The defaults are exact.

    compute   the arithmetic of the native CPU products, one of ops.COMPUTE (see models/native.py).
    kv        the kind of storage of a new KV cache, one of cache.KINDS; None for the executor's own type.
    view      what attention reads of a cache that keeps each token in several precisions: "full", or a name that the
              kind of cache defines.
    fraction  the share of each feed-forward's neurons to compute, above 0, at most 1, of a model that can leave some
              out.

    Raises MlxeffError for values that no model has.
    """

    compute: str = "exact"
    kv: str | None = None
    view: str = FULL_VIEW
    fraction: float = 1.0

    def __post_init__(self):
        if self.compute not in COMPUTE:
            raise MlxeffError(f"compute: wanted one of {', '.join(COMPUTE)}, got {self.compute!r}")
        if not 0 < self.fraction <= 1:
            raise MlxeffError(f"feed-forward fraction: wanted above 0, at most 1, got {self.fraction}")


EXACT = RunOptions()


class Ran(NamedTuple):
    """What computed some tokens: the backend ("mlx", "native avx512", with ", unfused" where operator by operator) and
    the arithmetic of its products, one of ops.COMPUTE."""

    backend: str
    compute: str


class Tally(Counter):
    """`Ran` → tokens that it computed. A cache keeps one; the difference of two is what ran in between."""

    def since(self, before: "Tally") -> "Tally":
        """What was added after the copy `before` was made."""
        return Tally({ran: count - before[ran] for ran, count in self.items() if count > before[ran]})

    def report(self) -> dict:
        """{"backend": …, "compute": …}: what ran, most tokens first, joined by " + "; None where nothing ran."""
        ordered = [ran for ran, _ in self.most_common()]
        return {
            field: " + ".join(dict.fromkeys(getattr(ran, field) for ran in ordered)) or None for field in Ran._fields
        }
