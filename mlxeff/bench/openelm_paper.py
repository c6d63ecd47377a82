"""The suite `openelm-paper`: OpenELM of all sizes with a prompt of 36 tokens and 1024 decoded ones, as the script that
CoreNet has for MLX runs them. Random weights, where no checkpoint is named: they run as fast as trained ones.

The numbers of the paper (arXiv 2404.14619) are known from recollection only, and are labelled so.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from .kvp_paper import SIZES, Builder
from .points import DECODE, Point
from .published import line
from .rounds import Group

PROMPT = Point(1, 36)
GENERATED = Point(1, 1024, 36, DECODE)
SOURCE = (
    "OpenELM (arXiv 2404.14619), table of MLX on a MacBook Pro M2 Max, 64 GB; recalled, not checked in the paper; "
    "decoded: 1024 tokens by the time after the first token"
)
# Size → (prompt, decoded) tokens a second with weights of 16 bits.
RECALLED = {"270M": (1151.41, 212.40), "450M": (910.61, 147.26), "1.1B": (508.56, 78.72), "3B": (234.96, 33.96)}


def groups(dtype: mx.Dtype, checkpoints: dict[str, Path], ignored: Sequence[str] = ()) -> list[Group]:
    """A group for each size; the arguments are those of `kvp_paper.groups`."""
    names = [f"OE{size}" for size in SIZES]
    return [Group([name], Builder(dtype, checkpoints, ignored, name), [PROMPT, GENERATED]) for name in names]


def published(rows: Sequence[dict], _arms: dict[str, dict]) -> list[dict]:
    """The recalled numbers beside ours: `rows` of the result."""
    found = {(row["arm"], row["test"], row["metric"]): row for row in rows}
    lines = []
    for size, numbers in RECALLED.items():
        for point, metric, theirs in zip((PROMPT, GENERATED), ("prompt_tps", "decode_tps"), numbers, strict=True):
            row = found.get((f"OE{size}", point.test, metric))
            what = "prompt" if point == PROMPT else "decoded"
            where = {"arm": f"OE{size}", "test": point.test, "metric": metric, "unit": "tok/s", "source": SOURCE}
            ours = row and row["median"]
            lines.append(line(what, ours=ours, theirs=theirs, label="recalled", device=row and row["device"], **where))
    return lines
