"""`mlxeff trace WHAT`: shows what a technique does with a text. The table `assembly.techniques.TRACED` has all
WHATs."""

import argparse
import functools

from ..assembly import techniques
from ..errors import MlxeffError
from . import output, streams

OWN = ("verb", "what", "device", "json", "quiet", "prompt", "file")  # options of the verb; all others are of the trace


def run(options: argparse.Namespace) -> int:
    """Trace and print the report; returns the exit code."""
    from .. import kernels

    traced = next(entry for entry in techniques.TRACED if entry.name == options.what)
    values = {name: value for name, value in vars(options).items() if name not in OWN}
    kernels.use_device(options.device)
    with output.show_notices(options.quiet) as lines:
        text = _text(options)
        report = traced.run(functools.partial(output.bar, quiet=options.quiet), text=text, **values)
    if options.json:
        streams.print_json(report | {"notices": lines})
    elif not options.quiet:
        print("\n".join(traced.lines(report)))
    return 0


def _text(options: argparse.Namespace) -> str:
    """The text: from the argument or a file. Raises MlxeffError where there is none, or both."""
    if (options.prompt is None) == (options.file is None):
        raise MlxeffError("trace: wanted a text or --file, got " + ("none" if options.file is None else "both"))
    return streams.read_text(options.file) if options.prompt is None else streams.require_text(options.prompt, "text")
