"""`mlxeff bench`: speed on this machine. `ttft`: seconds to the first token, tokens a second before and after it."""

import argparse
import functools

from . import output, streams


def run(options: argparse.Namespace) -> int:
    from ..bench import report, request

    with output.show_notices(options.quiet) as lines:
        card, settings, results = request.measure(_request(options), functools.partial(output.bar, quiet=options.quiet))
    if options.json:
        found = list(report.medians(results.samples.all).values())
        document = {"card": card, "settings": settings, "arms": results.arms, "results": found}
        document |= {"samples": results.samples.all, "skipped": results.skipped, "notices": lines}
        streams.print_json(document, indent=1)
    else:
        print(report.tables(results, card | settings, options.suite is not None))
    return 1 if results.samples.failed else 0


def _request(options: argparse.Namespace):
    """The `bench.request.Request` that the options describe."""
    from ..assembly.techniques import run_options, switched_for
    from ..bench.request import Request
    from ..bench.ttft import Settings

    memory = None if options.memory is None else options.memory * 1e9
    return Request(
        options.model,
        options.suite,
        switched=[(each, value) for each in switched_for("bench ttft") for value in each.value(options)],
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
        offline=options.offline,
    )
