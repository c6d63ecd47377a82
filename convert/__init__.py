"""`mlxeff convert`: a checkpoint of any family that mlxeff reads -> a folder that mlxeff and stock mlx-lm load.

One module a source family (`openelm`, `llama`, `gguf`) names the tensors and the config; `plan` compares them with the
model, casts and quantises; `folder` writes config.json and the tokenizer; `checkpoint` writes the weights; `kv_pair` is
for the pairs of models of KV Prediction. Imported as `mlxeff.convert`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from .. import __version__, calibration
from ..assembly.model import fingerprint
from ..checkpoint import Source, check_new, open_source, plan_shards, write_folder
from ..errors import MlxeffError, notices, some
from ..ops import BITS, GROUPS
from ..seedlm.encode import search_backend
from ..seedlm.install import metadata
from . import folder, gguf, kv_pair, llama, openelm
from .plan import DTYPES, Conversion, Family, Options, plan
from .report import Report
from .seedlm import KEEP, Encoder, SeedOptions
from .store import Store

__all__ = ["Report", "convert"]
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
    seedlm: str | float | None = None,
    keep: tuple[tuple[str, int], ...] | None = None,
    data_free: bool = False,
    calibrate: str | Path | None = None,
    calibration_tokens: int | None = None,
    encoding: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert the folder or file `src` into the new folder `dst`, or with `dry_run` only report what would be done.

    `dtype`: float16, bfloat16 or float32 (None: as stored). `quantize`: bits and group size of affine quantisation.
    `tokenizer`: the folder or file that has it (None: beside the weights). `progress(done, total)` counts bytes.

    `seedlm`: 3, 4 or 4.5 bits a weight: linear layers become SeedLM blocks. `keep`: (part of a module's name, bits) of
    those that do not, in affine groups of 64 or 32 (16 bits: as stored); by default embedding and head in 8 bits.
    `data_free`: the blocks nearest to the weights; otherwise those that change the outputs least on
    `calibration_tokens` of the text file `calibrate` (default: a text that comes with the package).
    `encoding(done, total)` counts weights. A killed encoding goes on when called again with the same arguments.
    Raises MlxeffError; `dst` is then not made.
    """
    options = _options(dtype, quantize)
    if seedlm is None and (keep is not None or data_free or calibrate or calibration_tokens):
        raise MlxeffError("convert: keep, data_free, calibrate, calibration_tokens: wanted with seedlm, got none")
    text = None
    if seedlm is not None:
        text, seeds = _seed_options(str(seedlm), keep, data_free, calibrate, calibration_tokens, options)
        options = dataclasses.replace(options, seedlm=seeds)
    source, destination = open_source(src), Path(dst)
    if kv_pair.recognises(source):
        return kv_pair.convert_pair(source, destination, options, tokenizer, dry_run)
    family = next((family for family in FAMILIES if family.recognises(source)), None)
    if family is None:
        raise MlxeffError(f"{source.path}: wanted an OpenELM or a model with config.json, got {some(source.tensors)}")
    found, held = family.read(source), {}
    conversion = plan(found, options, lambda module: held["store"].read(module))
    tokens = folder.find_tokenizer(source, tokenizer)
    report = _report(source, destination, conversion, tokens, dry_run)
    if dry_run:
        return report
    check_new(destination)
    conversion.refuse_differences(source.path)
    if options.seedlm:
        backend = search_backend(options.seedlm.format)
        held["store"] = _encode(source, destination, found, conversion, tokens, text, encoding, backend)
        report.encoding = conversion.choice.report(held["store"].errors, backend)
    _write(source, destination, conversion, tokens, progress)
    if options.seedlm:
        held["store"].remove()
    return report


def _options(dtype: str | None, quantize: tuple[int, int] | None) -> Options:
    if dtype is not None and dtype not in DTYPES:
        raise MlxeffError(f"convert: dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
    bits, group = quantize or (None, None)
    if quantize and (bits not in BITS or group not in GROUPS):
        raise MlxeffError(f"convert: quantize: wanted bits of {BITS} and a group of {GROUPS}, got {bits}:{group}")
    return Options(dtype, bits, group)


def _seed_options(
    bits: str,
    keep: tuple[tuple[str, int], ...] | None,
    data_free: bool,
    calibrate: str | Path | None,
    tokens: int | None,
    options: Options,
) -> tuple[str | None, SeedOptions]:
    """(the calibration text, the options)."""
    if options.bits:
        raise MlxeffError("convert: seedlm: wanted it without quantize; `keep` quantises single layers")
    if data_free and (calibrate or tokens):
        raise MlxeffError("convert: data_free: wanted it without calibrate and calibration_tokens")
    keep = KEEP if keep is None else tuple(keep)
    if data_free:
        return None, SeedOptions(bits, keep)
    tokens = calibration.TOKENS if tokens is None else tokens
    if tokens < 1:
        raise MlxeffError(f"convert: calibration_tokens: wanted a number above 0, got {tokens}")
    text, name = calibration.read_text(calibrate)
    return text, SeedOptions(bits, keep, tokens, name)


def _encode(
    source: Source,
    destination: Path,
    family: Family,
    conversion: Conversion,
    tokens: folder.TokenizerFiles,
    text: str | None,
    encoding: Callable[[int, int], None] | None,
    backend: str,
) -> Store:
    """Encode, or go on with encoding, all that the plan wants as blocks. Layers run on the CPU."""
    options, config, total, done = conversion.options.seedlm, family.config, conversion.choice.weights, 0

    def advance(weights: int) -> None:
        nonlocal done
        done += weights
        if encoding:
            encoding(done, total)

    windows = None
    if options.tokens:
        tokenizer = folder.calibration_tokenizer(source, tokens, config)
        windows = calibration.windows(text, tokenizer, options.tokens, str(source.path), config["vocab_size"])
    work = [fingerprint(source, config), options.as_dict(), metadata(), __version__]
    work.append(None if windows is None else hashlib.sha256(windows.tobytes()).hexdigest())
    store = Store(destination, json.dumps(work, sort_keys=True), conversion.choice.seeded)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        encoder = Encoder(config, conversion.weights, conversion.choice, store, str(source.path), backend)
        encoder.run(windows, advance)
    except BaseException:
        if store.written:
            notices.info(f"{store.folder}: finished layers are kept: the same command goes on from there")
        raise
    finally:
        mx.set_default_device(device)
    return store


def _write(
    source: Source,
    destination: Path,
    conversion: Conversion,
    tokens: folder.TokenizerFiles,
    progress: Callable[[int, int], None] | None,
) -> None:
    if not tokens.found:
        notices.warning(f"{source.path}: no tokenizer found, {destination} has none: name one with --tokenizer")
    config = conversion.config | {"mlxeff": folder.provenance(source, conversion.options)}
    write_folder(
        destination,
        conversion.pieces,
        lambda partial: folder.write(partial, config, tokens, source),
        parameters=conversion.parameters,
        progress=progress,
        metadata=metadata() if "seedlm" in conversion.config else None,
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
        encoding=conversion.choice.report({}, None) if conversion.choice else None,
    )
