"""The one error type a user sees, and the one channel for visible notices. Every module may import this; it imports
nothing of ours.

A message is one line that names the origin, what was wanted and what was got: `model.safetensors: tensor 'x': wanted
shape (2, 3), got (3, 2)`. A notice (a fallback, a truncation, an approximate mode) goes through `notices`, the
standard logger named "mlxeff": the command line prints it to stderr and lists it in `--json`; a Python caller sees it
by the rules of `logging`.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator

notices = logging.getLogger("mlxeff")


class MlxeffError(ValueError):
    """Bad input or a situation the user can mend; `str(error)` is the one line to show."""


def some(names: Iterable[str]) -> str:
    """The first of them, for a message."""
    names = list(names)
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


@contextlib.contextmanager
def no_notices() -> Iterator[None]:
    """Inside the block no notice is given: for work that is repeated only to be timed."""
    before, notices.disabled = notices.disabled, True
    try:
        yield
    finally:
        notices.disabled = before
