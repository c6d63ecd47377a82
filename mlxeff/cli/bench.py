"""`mlxeff bench WHAT`: measures speed on this machine."""

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MlxeffError
from . import bench_files, output, streams

if TYPE_CHECKING:
    from ..bench.contenders import Fetching
    from ..bench.points import Point
    from ..bench.request import Machine
    from ..bench.result import Result
    from ..bench.rounds import Settings


def run(options: argparse.Namespace) -> int:
    """Measure, and print the result in the format that was asked for, or do what concerns results in files; returns the
    exit code: 1 where an arm failed or a sample could not be written."""
    if options.what in ("compare", "page"):
        return getattr(bench_files, options.what)(options)
    form = _format(options)
    folder = _report_folder(options)
    with output.show_notices(options.quiet) as lines:
        result = WHATS[options.what](options, functools.partial(output.bar, quiet=options.quiet))
    document = result.document(lines)
    written = _write_report(folder, document) if folder else []
    if form == "json":
        streams.print_json(document, indent=1)
    else:
        from ..bench import report

        print(report.text(document, form), flush=True)
    if written:
        print(f"mlxeff: note: written: {', '.join(written)}", file=sys.stderr)
    return 1 if result.failed else 0


def _format(options: argparse.Namespace) -> str:
    """The format of the result; also sets `json`, by which errors are printed. Raises MlxeffError for two formats."""
    if options.json and options.format not in (None, "json"):
        raise MlxeffError(f"bench: --json and -o {options.format}: wanted one of the two")
    options.json = options.json or options.format == "json"
    return "json" if options.json else options.format or "md"


def _write_report(folder: Path, document: dict) -> list[str]:
    """Write the report; returns the paths of its files."""
    from ..bench import page

    return page.write_report(folder, document)


def _report_folder(options: argparse.Namespace) -> Path | None:
    """The folder of `--report`, made before anything is measured; samples are kept there unless `--out` names a file.
    None without the option. Raises MlxeffError where the report could not be written later."""
    if getattr(options, "report", None) is None:
        return None
    from ..bench import page

    folder = page.report_folder(options.report)
    options.out = options.out or str(folder / "samples.jsonl")
    return folder


def _ttft(options: argparse.Namespace, fetching: "Fetching") -> "Result":
    from ..bench.points import Point

    lengths = options.prompt_lengths
    points = None if lengths is None else [Point(batch, tokens) for batch in options.batch for tokens in lengths]
    return _measured(options, fetching, points, options.batch)


def _decode(options: argparse.Namespace, fetching: "Fetching") -> "Result":
    from ..bench.points import DECODE, PROMPT, Point

    counts = ((PROMPT, options.prompt_lengths), (DECODE, options.generate))
    points = [Point(1, n, depth, kind) for depth in options.depths for kind, each in counts for n in each if n]
    if not points:
        raise MlxeffError("bench decode: wanted -p or -n above 0, got neither")
    return _measured(options, fetching, points)


def _measured(
    options: argparse.Namespace, fetching: "Fetching", points: "list[Point] | None", batches: tuple[int, ...] = (1,)
) -> "Result":
    from ..bench.request import Request, measure

    request = Request(
        f"bench {options.what}",
        options.model,
        options,
        others=options.vs,
        peers=options.peer,
        points=points,
        batches=batches,
        text=options.text,
        only=options.only,
        settings=_settings(options),
        machine=_machine(options),
        out=options.out,
        ignored=tuple(options.ignore_keys),
        offline=options.offline,
    )
    return measure(request, fetching)


def _kernels(options: argparse.Namespace, fetching: "Fetching") -> "Result":
    from ..bench.kernels import KernelRequest, measure

    request = KernelRequest(
        options.model,
        rows=options.rows,
        rounds=options.rounds,
        warmup=options.warmup,
        machine=_machine(options),
        out=options.out,
        ignored=tuple(options.ignore_keys),
        offline=options.offline,
    )
    return measure(request, fetching)


def _quality(options: argparse.Namespace, fetching: "Fetching") -> "Result":
    from ..bench.quality import QualityRequest, measure

    return measure(QualityRequest(options.model, options, options.vs, _machine(options), options.out), fetching)


def _suite(options: argparse.Namespace, fetching: "Fetching") -> "Result":
    from ..bench.suites import SuiteRequest, measure

    request = SuiteRequest(
        options.suite,
        models=options.models,
        dtype=options.dtype,
        checkpoints=options.checkpoint,
        ignored=tuple(options.ignore_keys),
        only=options.only,
        settings=_settings(options),
        machine=_machine(options),
        out=options.out,
        offline=options.offline,
    )
    return measure(request, fetching)


def _settings(options: argparse.Namespace) -> "Settings":
    from ..bench.rounds import Settings

    return Settings(options.rounds, options.warmup, getattr(options, "steps", 0), options.prefill_step)


def _machine(options: argparse.Namespace) -> "Machine":
    from ..bench.request import Machine

    return Machine(options.device, options.threads, getattr(options, "memory", None))


WHATS = {"ttft": _ttft, "decode": _decode, "kernels": _kernels, "quality": _quality, "suite": _suite}
