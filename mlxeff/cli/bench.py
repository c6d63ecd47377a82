"""`mlxeff bench`. Of `ttft`: seconds to the first token, and tokens a second before and after it, on this machine."""

import argparse
import functools
from typing import TYPE_CHECKING

from . import bench_files, output, streams

if TYPE_CHECKING:
    from ..bench.request import Request


def run(options: argparse.Namespace) -> int:
    """Measure, and print tables or the `--json` document, or do what concerns results in files; returns the exit
    code."""
    if options.what in ("compare", "page"):
        return getattr(bench_files, options.what)(options)
    from ..bench import report, request

    with output.show_notices(options.quiet) as lines:
        card, settings, results = request.measure(_request(options), functools.partial(output.bar, quiet=options.quiet))
    if options.json:
        medians = list(report.medians(results.samples.all).values())
        document = {"card": card, "settings": settings, "arms": results.arms, "results": medians}
        document |= {"samples": results.samples.all, "skipped": results.skipped, "notices": lines}
        streams.print_json(document, indent=1)
    else:
        print(report.tables(results, card | settings, options.suite is not None))
    return 1 if results.samples.failed else 0


def _request(options: argparse.Namespace) -> "Request":
    """The measurement that the options describe."""
    from ..assembly.techniques import run_options, switched_for
    from ..bench.request import Request
    from ..bench.ttft import Settings

    techniques = switched_for("bench ttft")
    memory = None if options.memory is None else options.memory * 1e9
    return Request(
        options.model,
        options.suite,
        switched=[(technique, value) for technique in techniques for value in technique.value(options)],
        run=run_options(options),
        lengths=options.prompt_lengths,
        batches=options.batch,
        only=options.only,
        settings=Settings(options.rounds, options.warmup, options.steps, options.prefill_step, memory),
        out=options.out,
        device=options.device,
        threads=options.threads,
        dtype=options.dtype,
        checkpoints=options.checkpoint,
        ignored=tuple(options.ignore_keys),
        offline=options.offline,
    )
