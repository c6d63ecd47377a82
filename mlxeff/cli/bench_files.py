"""`mlxeff bench compare` and `mlxeff bench page`: what can be said of results of benchmarks that lie in files."""

import argparse

from . import output, streams


def compare(options: argparse.Namespace) -> int:
    """Compare results with the first one; the exit code is 1 where a row became worse."""
    from ..bench import compare as comparing
    from ..bench import comparison_text, reader

    options.json |= options.output == "json"
    names = [options.result, *options.others]
    threshold = options.threshold / 100
    with output.show_notices(options.quiet) as lines:
        first, *others = map(reader.read, names)
        found = [comparing.compare(first, other, threshold, (names[0], name)) for name, other in zip(names[1:], others)]
    worse = comparing.total(found, comparing.REGRESSION)
    if options.json:
        comparisons = [{"file": name} | each.document() for name, each in zip(names[1:], found)]
        document = {"against": names[0], "threshold": threshold, "comparisons": comparisons}
        streams.print_json(document | {"regressions": worse, "notices": lines})
    else:
        print(comparison_text.report(found, names, threshold, options.output == "md"))
    return 1 if worse and not options.no_fail else 0


def page(options: argparse.Namespace) -> int:
    """Write a page, and print where it lies."""
    from ..bench import page as pages

    with output.show_notices(options.quiet) as lines:
        written = pages.write(options.results, options.out, options.png)
    if options.json:
        streams.print_json(written | {"notices": lines})
    else:
        print("\n".join([written["out"], *written["png"]]))
    return 0
