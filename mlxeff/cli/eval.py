"""`mlxeff eval WHAT`: measures the quality of a model. The table `eval.verbs.MEASURES` has all WHATs."""

import argparse
import functools

from ..eval.verbs import MEASURES
from . import output, streams

OWN = ("verb", "what", "device", "json", "quiet")  # options of the verb; all others are options of the measure


def run(options: argparse.Namespace) -> int:
    """Measure and print the report; returns the exit code: 1 where numbers are not finite."""
    from .. import kernels

    measure = next(entry for entry in MEASURES if entry.name == options.what)
    values = {name: value for name, value in vars(options).items() if name not in OWN}
    kernels.use_device(options.device)
    with output.show_notices(options.quiet) as lines:
        report = measure.run(functools.partial(output.bar, quiet=options.quiet), **values)
    if options.json:
        streams.print_json(report | {"notices": lines})
    else:
        print("\n".join(measure.lines(report)))
    return 1 if report.get("not_finite") else 0
