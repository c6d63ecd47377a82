"""The command `mlxeff`: it parses arguments, makes one call and prints the result.

Each verb has a module with a function `run`, which is imported when the verb is called. This package contains no
computation. Exit codes: 0 done, 1 an error that was explained in one line, 2 wrong usage, 130 interrupted with Ctrl-C
(text that was generated before is printed), 141 the reader of the output closed it.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence

from .. import limits, panics
from ..errors import MlxeffError
from ..names import expand
from . import parsers, streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (`argparse` exits by itself on --help and wrong usage)."""
    with streams.prepared() as output:
        options = argparse.Namespace()
        try:
            code = _run(argv, options)
            output.flush()
            return code
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            output.drop()
            return 141
        except streams.OutputError as error:
            print(f"mlxeff: error: {error}", file=sys.stderr)
            output.drop()
            return 1
        except (MlxeffError, OSError) as error:
            return _fail(streams.explain(error), options, output)
        except Exception as error:
            if (reason := _reason(error)) is not None:
                return _fail(reason, options, output)
            _keep(error, options)
            raise


def _run(argv: Sequence[str] | None, options: argparse.Namespace) -> int:
    """Parse into `options` and run the verb; returns the exit code."""
    try:
        parsers.build().parse_args(argv, options)
    except SystemExit:  # of --help, --version and wrong usage
        sys.stdout.flush()
        raise
    for name in parsers.PATHS:
        if getattr(options, name, None):
            setattr(options, name, str(expand(getattr(options, name))))
    streams.check(options.verb)
    panics.enable()
    if options.verb != "models":
        limits.start()
    verb = importlib.import_module(f".{options.verb}", __name__)
    if options.verb != "models":
        importlib.import_module("mlx.core")  # before Ctrl-C raises: its import does not survive exceptions
    with streams.interruptible():
        return verb.run(options)


def _reason(error: Exception) -> str | None:
    """What an exception says of too little memory or of a kernel's input; None for others."""
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    from ..memory import failure

    return failure(error)


def _keep(error: Exception, options: argparse.Namespace) -> None:
    """Keep an exception that nobody expected for a bug report, and say so. Another failure on the way is passed over:
    the exception is what matters."""
    with contextlib.suppress(Exception):
        from . import crash

        path = crash.save(error, options)
        text = f"a fault of mlxeff, kept in {path}: `mlxeff doctor --bundle` writes a file for a bug report"
        print(f"mlxeff: {text}", file=sys.stderr)


def _fail(message: str, options: argparse.Namespace, output: streams.Output) -> int:
    """Print an error, with `--json` also as a document; returns the exit code."""
    print(f"mlxeff: error: {message}", file=sys.stderr)
    if getattr(options, "json", False):
        try:
            streams.print_json({"error": message}, indent=None)
        except (streams.OutputError, BrokenPipeError):
            output.drop()
    return 1
