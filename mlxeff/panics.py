"""What a panic of the Rust library `tokenizers` writes to standard error, beside the exception that it becomes.

The library writes it to file descriptor 2 itself: the thread, the place and a note about RUST_BACKTRACE. The command
keeps this text apart, as its own line says the reason. A Python program's standard error is left alone: other threads
write to it, and processes inherit it.
"""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

_lock = threading.Lock()  # held while the descriptor is another one
_enabled = False


def enable() -> None:
    """Let `apart` have an effect in this process. For a process whose standard error is the command's own."""
    global _enabled
    _enabled = True


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Hold back what is written to standard error inside the block, and write it at its end, without the text of a
    panic that ends the block. Does nothing before `enable`, inside of another block, and where there is no standard
    error."""
    if not _enabled or not _lock.acquire(blocking=False):
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_lock.release)
        try:
            own = os.dup(2)
            stack.callback(os.close, own)
            held = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            os.dup2(held.fileno(), 2)
        except OSError:
            yield
            return
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException"
            raise
        finally:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            os.dup2(own, 2)
            held.seek(0)
            text = held.read()
            with contextlib.suppress(OSError):
                os.write(2, text.partition(b"\nthread '")[0] if panicked else text)
