"""`MlxeffError`, the one error type that users see, and `notices`, the one channel for messages that are no errors.

An error message is one line that names the origin, the wanted value and the actual one: `model.safetensors: tensor 'x':
wanted shape (2, 3), got (3, 2)`. A notice (of a fallback, a truncation, an approximate mode) goes through `notices`,
the standard logger named "mlxeff": the command line prints it to standard error and lists it in the `--json` document,
and for a Python caller the rules of `logging` apply. Every module may import this one; it imports no other module of
the package.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator

notices = logging.getLogger("mlxeff")


class MlxeffError(ValueError):
    """Bad input, or a situation that the user can correct; `str(error)` is the line to show."""


def one_line(text: str, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters: of a longer one the beginning and the end are kept."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]}…{line[-(limit // 3 - 1) :]}"


def some(names: Iterable[str]) -> str:
    """The first four names, joined by commas, for a message; "…" stands for the others."""
    names = list(names)
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


@contextlib.contextmanager
def no_notices() -> Iterator[None]:
    """Suppress all notices inside the block, for work that is repeated only to be timed."""
    before, notices.disabled = notices.disabled, True
    try:
        yield
    finally:
        notices.disabled = before
