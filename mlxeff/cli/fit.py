"""`mlxeff fit NAME`: fits the learned part of a technique to a model. The table `assembly.techniques.FITTED` has all
NAMEs."""

import argparse
import functools
import json

from ..assembly import techniques
from . import output

OWN = ("verb", "what", "device", "json", "quiet")  # options of the verb; all others are options of the fit


def run(options: argparse.Namespace) -> int:
    """Fit and print the report; returns the exit code."""
    from .. import kernels

    fitted = next(entry for entry in techniques.FITTED if entry.name == options.what)
    values = {name: value for name, value in vars(options).items() if name not in OWN}
    kernels.use_device(options.device)
    with output.show_notices(options.quiet) as lines:
        report = fitted.run(functools.partial(output.bar, quiet=options.quiet), **values)
    if options.json:
        print(json.dumps(report | {"notices": lines}, indent=2, ensure_ascii=False))
    elif not options.quiet:
        print("\n".join(fitted.lines(report)))
    return 0
