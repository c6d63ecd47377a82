"""What protects a run from a tokenizer's files: errors of any type become one line, a template's time is limited."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .. import panics
from ..errors import MlxeffError, one_line


@contextlib.contextmanager
def explained(origin: str) -> Iterator[None]:
    """Inside the block every exception becomes a MlxeffError of one short line, which begins with `origin` where it is
    not our own. For calls of libraries with the contents of files, which raise errors of many types; a panic of the
    library `tokenizers` is no `Exception`. Interruptions pass."""
    try:
        with panics.apart():
            yield
    except MlxeffError as error:
        line = one_line(str(error))
        if line == str(error):
            raise
        raise MlxeffError(line) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error) or "no reason is given"
        raise MlxeffError(one_line(f"{origin}: {type(error).__name__}: {reason}")) from error


class _OutOfTimeError(BaseException):
    """Passes every `except Exception` of the code that is stopped."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise MlxeffError in Python code inside the block that runs longer than `seconds`. `what` names the code.

    Works by tracing, in any thread, and therefore cannot interrupt a single operation of a library in C.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def trace(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.monotonic() > end:
            raise _OutOfTimeError
        return trace

    sys.settrace(trace)
    try:
        yield
    except _OutOfTimeError:
        raise MlxeffError(f"{what} runs longer than {seconds:g} s") from None
    finally:
        sys.settrace(before)
