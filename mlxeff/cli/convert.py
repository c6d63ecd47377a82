"""`mlxeff convert`: a checkpoint → a folder that mlxeff and mlx-lm can load, or with --dry-run only a report."""

import argparse

from . import output, streams


def run(options: argparse.Namespace) -> int:
    """Convert and print the report; returns the exit code, 1 where a dry run finds differences between the checkpoint
    and the model."""
    from .. import hub
    from ..convert import convert

    with output.show_notices(options.quiet) as lines:
        with output.bar(f"fetching {options.src}", "B", options.quiet) as progress:
            source = hub.resolve(options.src, offline=options.offline, progress=progress)
        with (
            output.bar("encoding", "w", options.quiet) as encoding,
            output.bar("converting", "B", options.quiet) as progress,
        ):
            report = convert(
                source,
                options.dst,
                dtype=options.dtype,
                quantize=options.quantize,
                dequantize=options.dequantize,
                tokenizer=options.tokenizer,
                ignore_keys=options.ignore_keys,
                dry_run=options.dry_run,
                progress=progress,
                seedlm=options.seedlm,
                keep=None if options.keep is None else tuple(layer for keep in options.keep for layer in keep),
                data_free=options.data_free,
                calibrate=options.calibrate,
                calibration_tokens=options.calibration_tokens,
                encoding=encoding,
                export_dense=options.export_dense,
            )
    if options.json:
        streams.print_json(report.as_dict() | {"notices": lines})
    elif not options.quiet:
        print("\n".join(report.lines()))
    return 0 if report.ok else 1
