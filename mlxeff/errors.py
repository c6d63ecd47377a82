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
    """Bad input, or a situation that the user can correct; `str(error)` is the line to show. A message that quotes a
    file is put on one line and cut in its middle to `longest` characters, since how to go on stands at its end."""

    longest = 300

    def __init__(self, message: object = "", longest: int | None = None):
        super().__init__(one_line(str(message), longest or self.longest))


# What Python makes of bytes of a file name that are not UTF-8: they stay, so that the name can still be told.
FILE_NAME_BYTES = frozenset(map(chr, range(0xDC80, 0xDD00)))


def one_line(text: str, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters that can be printed: of a longer one the beginning and the end
    are kept."""
    line = " ".join(text.split()) if len(text.splitlines()) > 1 else text
    line = "".join(
        letter if letter.isprintable() or letter in FILE_NAME_BYTES else repr(letter)[1:-1] for letter in line
    )
    return line if len(line) <= limit else f"{line[: limit * 3 // 5]}…{line[-(limit * 2 // 5 - 1) :]}"


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
