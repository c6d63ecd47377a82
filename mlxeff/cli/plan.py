"""`mlxeff plan`: what a machine will do with a model, predicted before anything is downloaded."""

import argparse
from typing import TYPE_CHECKING

from . import output, streams

if TYPE_CHECKING:
    from ..plan.request import Here, Request


def run(options: argparse.Namespace) -> int:
    """Predict, calibrate or score, and print the result; returns the exit code."""
    from ..plan import request, text

    with output.show_notices(options.quiet) as lines:
        asked, machine = _request(options), here()
        if options.calibrate:
            document = request.calibrated(asked, machine, options.calibrate)
        elif options.score:
            document = request.scored(asked, machine, options.score)
        else:
            document = request.plan(asked, machine)
    if options.json:
        streams.print_json(document | {"notices": lines}, indent=1)
    else:
        print(text.plan(document) if "combinations" in document else text.score(document))
    return 0


def _request(options: argparse.Namespace) -> "Request":
    """The request that the options describe."""
    from ..plan.costs import MLX, Engine
    from ..plan.published import NEWEST
    from ..plan.request import Request

    latest = Engine() if options.engine == MLX else Engine(options.engine, (NEWEST,))
    return Request(
        options.model,
        options.chip,
        options.cores,
        options.memory,
        not options.no_accelerators,
        Engine(options.engine, options.engine_version or latest.version, not options.float16),
        options.weights,
        options.kv_cache,
        options.prompt_lengths,
        options.depths,
        options.prefill_step,
        options.acceptance,
        options.sensitivity,
        options.kv_predict,
        options.explain,
        tuple(options.ignore_keys),
        options.offline,
    )


def here() -> "Here":
    """This machine, as a benchmark describes it."""
    from .. import kernels
    from ..bench import machine
    from ..plan.request import Here

    device = kernels.use_device("auto")
    return Here(machine.card(), device, machine.physical_bytes(), machine.usable_bytes(device), machine.cores())
