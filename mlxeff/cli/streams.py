"""Standard input, output and error as the caller gave them: closed, full, or of another encoding than UTF-8. Also says
in one line what any exception means.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..errors import MlxeffError
from ..names import json_text

MAX_LINE = 300  # characters of a message
OUTPUT_ONLY = (
    "generate",
    "chat",
    "models",
    "bench",
    "eval",
    "plan",
    "doctor",
)  # verbs whose only result is what they print

read_texts: list[str] = []  # from files and standard input, since `prepared`: what a report of a crash leaves out


class OutputError(MlxeffError):
    """Standard output takes no more text."""


class _Wrapped:
    """A text stream with the attributes of `stream`, but for those that a subclass defines."""

    def __init__(self, stream: TextIO, closed: bool = False):
        self._stream = stream
        self.was_closed = closed  # the caller had closed it before the program began: it is /dev/null

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)


class Output(_Wrapped):
    """Standard output. A failing write raises OutputError; BrokenPipeError, which says that the reader went away, stays
    as it is."""

    def write(self, text: str) -> int:
        if self.was_closed:
            raise OutputError("standard output: wanted an open stream, got a closed one")
        with _one_line():
            return self._stream.write(text)

    def flush(self) -> None:
        with _one_line():
            self._stream.flush()

    def drop(self) -> None:
        """Send what is still to be written to /dev/null: the interpreter flushes once more when it ends."""
        _to_nothing(self._stream)


class Messages(_Wrapped):
    """Standard error. What cannot be written is dropped: the work that it tells about goes on."""

    def write(self, text: str) -> int:
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            _to_nothing(self._stream)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"standard output: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _to_nothing(stream: TextIO) -> None:
    """Let the stream's file descriptor lead to /dev/null."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


@contextlib.contextmanager
def prepared() -> Iterator[Output]:
    """Inside the block `sys.stdout` is an `Output`, which it gives, and `sys.stderr` are `Messages`. Characters that
    their encoding lacks become question marks. Streams that the caller closed lead to /dev/null, so that no file that
    is opened later gets the number of one."""
    read_texts.clear()
    before = sys.stdin, sys.stdout, sys.stderr
    opened = [_open_nothing(number) if stream is None else None for number, stream in enumerate(before)]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.stdin = _Wrapped(opened[0], closed=True) if opened[0] else sys.stdin
    sys.stdout = Output(opened[1] or sys.stdout, closed=opened[1] is not None)
    sys.stderr = Messages(opened[2] or sys.stderr, closed=opened[2] is not None)
    try:
        yield sys.stdout
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _open_nothing(number: int) -> TextIO:
    """/dev/null as the file of the descriptor `number`, if that is free, for as long as the process runs."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    return open(descriptor, "r" if number == 0 else "w", encoding="utf-8", closefd=False)


def _interrupt_main() -> None:
    """Interrupt the main thread as Ctrl-C does, in the middle of a system call too."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block Ctrl-C raises KeyboardInterrupt, unless the caller has chosen that it does something else. An
    error that follows from one, such as an ImportError of a library that was interrupted, becomes one again. Where
    Python drops every exception, such as in a destructor or while a module's lock is released, it is raised later."""
    before, happened = signal.getsignal(signal.SIGINT), []
    report = sys.unraisablehook

    def interrupt(*_: object) -> None:
        happened.append(True)
        raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is KeyboardInterrupt:  # a thread of its own: raised in here, it would be dropped again
            threading.Timer(0.01, _interrupt_main).start()
        else:
            report(what)

    try:
        if before in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread
        before = None
    try:
        sys.unraisablehook = dropped
        yield
    except Exception as error:
        if happened and not isinstance(error, (MlxeffError, OSError)):
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = report
        if before in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signal.SIGINT, before)


def check(verb: str) -> None:
    """Raises OutputError where standard output is closed and `verb` does nothing but print."""
    if verb in OUTPUT_ONLY and getattr(sys.stdout, "was_closed", False):
        sys.stdout.write("")


def read_input(line: bool = False) -> bytes:
    """All of standard input, or the next `line`. Raises MlxeffError where it is closed or cannot be read."""
    if getattr(sys.stdin, "was_closed", False):
        raise MlxeffError("standard input: wanted an open stream, got a closed one")
    try:
        return sys.stdin.buffer.readline() if line else sys.stdin.buffer.read()
    except OSError as error:
        raise MlxeffError(f"standard input: cannot be read: {error.strerror or error}") from error


def decode(data: bytes, origin: str) -> str:
    """The text of UTF-8 bytes, without a byte-order mark. Raises MlxeffError for other bytes; `origin` is their
    source."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, at = data[error.start], error.start
        raise MlxeffError(f"{origin}: wanted UTF-8 text, got byte 0x{byte:02x} at position {at}") from None
    read_texts.append(text)
    return text


def read_text(path: str) -> str:
    """The text of a UTF-8 file. Raises MlxeffError where it cannot be read."""
    try:
        return decode(Path(path).read_bytes(), path)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error


def require_text(text: str, origin: str) -> str:
    """The text. Raises MlxeffError where it has half a character: what Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"{text[error.start]!r} at position {error.start}"
        raise MlxeffError(f"{origin}: wanted UTF-8 text, got {got}") from None
    return text


def print_json(document: object, indent: int | None = 2) -> None:
    """Print a JSON document. Characters that standard output cannot show become JSON's own escapes."""
    print(json_text(document, indent, getattr(sys.stdout, "encoding", None) or "utf-8"), flush=True)


def explain(error: BaseException) -> str:
    """One line that says what went wrong, of at most MAX_LINE characters where the error is not our own."""
    if isinstance(error, MlxeffError):
        return str(error)
    if isinstance(error, MemoryError):
        text = "out of memory"
    elif isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    half = MAX_LINE // 2
    return line if len(line) <= MAX_LINE else f"{line[: half - 1]}…{line[-half:]}"
