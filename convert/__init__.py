"""`mlxeff convert`: a checkpoint of any family that mlxeff reads -> a folder that mlxeff and stock mlx-lm load.

One module a source family (`openelm`, `llama`, `gguf`) names the tensors and the config; `plan` compares them with the
model, casts and quantises; `folder` writes config.json and the tokenizer; `checkpoint` writes the weights. Imported as
`mlxeff.convert`.
"""

from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Source, check_new, open_source, plan_shards, write_folder
from ..errors import MlxeffError, notices
from . import folder, gguf, llama, openelm
from .plan import DTYPES, Conversion, Options, plan
from .report import Report

__all__ = ["Report", "convert"]
QUANTIZE_BITS, QUANTIZE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FAMILIES = (gguf, openelm, llama)  # the first whose `recognises(source)` is true


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    quantize: tuple[int, int] | None = None,
    tokenizer: str | Path | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert the folder or file `src` into the new folder `dst`, or with `dry_run` only report what would be done.

    `dtype`: float16, bfloat16 or float32 (None: as stored). `quantize`: bits and group size of affine quantisation.
    `tokenizer`: the folder or file that has it (None: beside the weights). `progress(done, total)` counts bytes.
    Raises MlxeffError; `dst` is then not made.
    """
    options = _options(dtype, quantize)
    source, destination = open_source(src), Path(dst)
    family = next((family for family in FAMILIES if family.recognises(source)), None)
    if family is None:
        raise MlxeffError(f"{source.path}: wanted an OpenELM or a model with config.json, got {_some(source.tensors)}")
    conversion = plan(family.read(source), options)
    tokens = folder.find_tokenizer(source, tokenizer)
    report = _report(source, destination, conversion, tokens, dry_run)
    if not dry_run:
        check_new(destination)
        _refuse_differences(source, conversion)
        _write(source, destination, conversion, tokens, progress)
    return report


def _options(dtype: str | None, quantize: tuple[int, int] | None) -> Options:
    if dtype is not None and dtype not in DTYPES:
        raise MlxeffError(f"convert: dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
    bits, group = quantize or (None, None)
    if quantize and (bits not in QUANTIZE_BITS or group not in QUANTIZE_GROUPS):
        raise MlxeffError(
            f"convert: quantize: wanted bits of {QUANTIZE_BITS} and a group of {QUANTIZE_GROUPS}, got {bits}:{group}"
        )
    return Options(dtype, bits, group)


def _refuse_differences(source: Source, conversion: Conversion) -> None:
    if conversion.missing:
        raise MlxeffError(f"{source.path}: missing {len(conversion.missing)} tensors: {_some(conversion.missing)}")
    if conversion.unexpected:
        raise MlxeffError(
            f"{source.path}: {len(conversion.unexpected)} unknown tensors: {_some(conversion.unexpected)}"
        )
    for name, wanted, got in conversion.wrong_shape:
        raise MlxeffError(f"{source.path}: tensor {name}: wanted shape {wanted}, got {got}")


def _write(source: Source, destination: Path, conversion: Conversion, tokens: folder.TokenizerFiles, progress) -> None:
    if not tokens.found:
        notices.warning(f"{source.path}: no tokenizer found, {destination} has none: name one with --tokenizer")
    config = conversion.config | {"mlxeff": folder.provenance(source, conversion.options)}
    write_folder(
        destination,
        conversion.pieces,
        lambda partial: folder.write(partial, config, tokens, source),
        parameters=conversion.parameters,
        progress=progress,
    )


def _report(
    source: Source, destination: Path, conversion: Conversion, tokens: folder.TokenizerFiles, dry_run: bool
) -> Report:
    return Report(
        source=str(source.path),
        destination=str(destination),
        family=conversion.family,
        model_type=conversion.config["model_type"],
        options=conversion.options.as_dict(),
        parameters=conversion.parameters,
        tensors=conversion.tensors,
        missing=conversion.missing,
        unexpected=conversion.unexpected,
        wrong_shape=conversion.wrong_shape,
        dropped=conversion.dropped,
        changes=conversion.changes,
        source_bytes=source.nbytes,
        disk_bytes=sum(piece.nbytes for piece in conversion.pieces),
        free_bytes=folder.free_bytes(destination),
        peak_bytes=conversion.peak_bytes,
        shards=len(plan_shards(conversion.pieces)),
        tokenizer=tokens.found,
        written=not dry_run,
    )


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
