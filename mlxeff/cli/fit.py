"""`mlxeff fit NAME`: fits the learned part of a technique to a model. The table `assembly.techniques.FITTED` has all
NAMEs."""

import argparse
import functools

from ..assembly import techniques
from ..errors import MlxeffError, notices
from . import output, streams

OWN = ("verb", "what", "device", "json", "quiet")  # options of the verb; all others are options of the fit


def run(options: argparse.Namespace) -> int:
    """Fit and print the report; returns the exit code."""
    from .. import kernels

    fitted = next(entry for entry in techniques.FITTED if entry.name == options.what)
    values = {name: value for name, value in vars(options).items() if name not in OWN}
    kernels.use_device(options.device)
    with output.show_notices(options.quiet) as lines:
        try:
            report, code = fitted.run(functools.partial(output.bar, quiet=options.quiet), **values), 0
        except MlxeffError as error:
            report, code = getattr(error, "report", None), 1
            if report is None:
                raise
            notices.warning("%s", streams.explain(error))
    if options.json:
        streams.print_json(report | {"notices": lines})
    elif not options.quiet:
        print("\n".join(fitted.lines(report)))
    return code
