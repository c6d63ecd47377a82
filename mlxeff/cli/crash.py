"""The last unexpected exception of the command: a small text file in the user's cache folder, for bug reports."""

import argparse
import contextlib
import datetime
import traceback
from pathlib import Path

from .. import __version__
from ..checkpoint import temporary_beside
from ..errors import MlxeffError
from ..hub.catalog import cache_dir
from . import redaction, streams

NAME = "last-crash.txt"
FRAMES = 40  # of the traceback, the innermost
MESSAGE = 300  # characters
# Options whose values are a user's text; of all others only the names are kept.
TEXTS = ("prompt", "system", "stop", "delimiter", "prompt_mark")


def place() -> Path:
    """The path of the file. Raises MlxeffError where there is no home folder."""
    return cache_dir() / NAME


def save(error: BaseException, options: argparse.Namespace) -> Path:
    """Keep an exception: when, of which verb, its traceback, and its message without a user's texts. Returns the path.
    Raises OSError or MlxeffError where it cannot be written."""
    path = place()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_beside(path)
    try:
        partial.write_text(_text(error, options), encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read() -> str | None:
    """What was kept; None where there was no crash."""
    with contextlib.suppress(OSError, MlxeffError):
        return place().read_text(encoding="utf-8", errors="replace")
    return None


def _text(error: BaseException, options: argparse.Namespace) -> str:
    values = vars(options)
    private = [*streams.read_texts]
    for name in TEXTS:
        value = values.get(name)
        private += [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]
    verb = " ".join(str(values[name]) for name in ("verb", "what") if values.get(name))
    frames = traceback.StackSummary(traceback.extract_tb(error.__traceback__)[-FRAMES:]).format()
    message = redaction.without_quotes(redaction.redacted(str(error), private))
    lines = [
        f"when: {datetime.datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"mlxeff {__version__}, verb: {verb or 'none'}",
        *(line.rstrip("\n") for line in frames),
        f"{type(error).__module__}.{type(error).__qualname__}: {message[:MESSAGE]}",
    ]
    return redaction.redacted("\n".join(lines) + "\n", private)
