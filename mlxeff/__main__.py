"""The command `mlxeff`, also as `python -m mlxeff`."""

import signal
import sys

# Until `main` can say that it was interrupted, Ctrl-C ends the process without a word. A handler that the caller chose,
# such as none in the background of a shell, stays.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
