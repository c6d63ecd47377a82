"""`mlxeff convert`: turns a checkpoint of any family that mlxeff reads into a folder that mlxeff loads. Stock mlx-lm
loads the folder, too, unless its weights are encoded by SeedLM. Imported as `mlxeff.convert`.

openelm, llama, gguf  one module for each source family: reads the config, and the weights under the model's names
plan                  compares the weights with the model, and plans how each is cast and quantised
quantization          which matrices are quantised, and with how many bits
seedlm, store         the SeedLM encoding, and the folder that keeps its finished layers
dynamoe               the dense model of a DynaMoE; dynamoe_columns reads one that leaves out inputs
kv_pair               CoreNet's checkpoints of KV Prediction, which hold two models and a predictor
report                the report for the user
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import mlx.core as mx

from .. import __version__, calibration
from ..assembly import folder
from ..assembly.model import fingerprint, without
from ..checkpoint import Source, check_new, claim, open_source, plan_shards, write_folder
from ..errors import MlxeffError, notices, some
from ..seedlm.encode import search_backend
from ..seedlm.install import metadata
from . import dynamoe, dynamoe_columns, gguf, kv_pair, llama, openelm
from .plan import DTYPES, Conversion, Family, Options, plan
from .quantization import RECIPES, check
from .report import Report
from .seedlm import KEEP, Encoder, SeedOptions
from .store import Store

__all__ = ["Report", "convert"]
FAMILIES = (gguf, openelm, llama)  # the first one whose `recognises(source)` is true reads the source


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    quantize: tuple[int | str, int] | None = None,
    dequantize: bool = False,
    tokenizer: str | Path | None = None,
    ignore_keys: Iterable[str] = (),
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    seedlm: str | float | None = None,
    keep: tuple[tuple[str, int], ...] | None = None,
    data_free: bool = False,
    calibrate: str | Path | None = None,
    calibration_tokens: int | None = None,
    encoding: Callable[[int, int], None] | None = None,
    export_dense: bool = False,
) -> Report:
    """Convert the folder or file `src` into the new folder `dst`; with `dry_run` only report what would be done.

    dtype               float16, bfloat16 or float32; None: as stored
    quantize            (bits, group size) of affine quantisation; in place of the bits the name of a recipe of mlx-lm
                        that mixes two numbers of bits, such as "mixed_3_6"
    dequantize          write the quantised matrices of the source as dense ones
    tokenizer           the folder or file of the tokenizer; None: beside the weights
    ignore_keys         entries of config.json to read as absent; the new config.json lacks them too
    progress            called with (bytes written, bytes in total)
    seedlm              3, 4 or 4.5 bits a weight: encode the linear layers by SeedLM
    keep                exceptions as pairs (part of a module's name, bits). With `seedlm`: modules that are not
                        encoded, but quantised in affine groups of 64 or 32 weights, or with 16 bits kept as stored; by
                        default the embedding and the output head in 8 bits. With `quantize`: modules with other bits,
                        where 16 means dense; by default none.
    data_free           encode without calibration: minimise the error of the weights, not that of the layers' outputs
    calibrate           the text file for calibration; None: a text that comes with the package
    calibration_tokens  how many tokens of the text are used
    encoding            called with (weights encoded, weights in total)
    export_dense        write the dense model that a DynaMoE was made of, which stock mlx-lm loads

    If an encoding is interrupted, a call with the same arguments continues it. Raises MlxeffError for contradictory
    arguments, for sources that are unknown, damaged or do not fit their config, and where writing fails; `dst` then
    does not exist.
    """
    options = _options(dtype, quantize, dequantize, keep if seedlm is None else None)
    options = dataclasses.replace(options, ignored=tuple(ignore_keys), export_dense=export_dense)
    if keep is not None and seedlm is None and not quantize:
        raise MlxeffError("convert: keep: wanted with quantize or seedlm (--quantize or --seedlm), got neither")
    if seedlm is None and (data_free or calibrate or calibration_tokens):
        raise MlxeffError("convert: data_free, calibrate, calibration_tokens: wanted with seedlm, got none")
    text = None
    if seedlm is not None:
        text, seeds = _seed_options(str(seedlm), keep, data_free, calibrate, calibration_tokens, options)
        options = dataclasses.replace(options, seedlm=seeds)
    source, destination = open_source(src), Path(dst)
    if kv_pair.recognises(source):
        return kv_pair.convert_pair(source, destination, options, tokenizer, dry_run)
    if source.config is not None:
        source = dataclasses.replace(source, config=without(source.config, options.ignored, source.path))
    family = next((family for family in FAMILIES if family.recognises(source)), None)
    if family is None:
        raise MlxeffError(f"{source.path}: wanted an OpenELM or a model with config.json, got {some(source.tensors)}")
    found, held = family.read(source), {}
    if source.config is None:  # derived from metadata or shapes
        found = dataclasses.replace(found, config=without(found.config, options.ignored, source.path))
    if export_dense:
        found = dynamoe.dense(found)
    elif dynamoe_columns.recognises(found.config):
        raise MlxeffError(
            f"{source.path}: matrices stored by columns: wanted --export-dense, or the dense model they are of"
        )
    conversion = plan(found, options, lambda module: held["store"].read(module))
    tokens = folder.find_tokenizer(source, tokenizer)
    report = _report(source, destination, conversion, tokens, dry_run)
    if dry_run:
        return report
    check_new(destination)
    conversion.refuse_differences(source.path)
    _say_untied(source, conversion)
    with claim(destination):  # two processes must not write the same store of finished layers
        if options.seedlm:
            backend = search_backend(options.seedlm.format)
            held["store"] = _encode(source, destination, found, conversion, tokens, text, encoding, backend)
            report.encoding = conversion.choice.report(held["store"].errors, backend)
        _write(source, destination, conversion, tokens, progress)
        if options.seedlm:
            held["store"].remove()
    return report


def _say_untied(source: Source, conversion: Conversion) -> None:
    """Warn where the source has an output head that differs from the embedding, but is dropped because the config ties
    both."""
    head = source.tensors.get("lm_head.weight")
    names = ("model.embed_tokens.weight", "transformer.token_embeddings.weight")
    embedding = next((source.tensors[name] for name in names if name in source.tensors), None)
    if head is None or embedding is None or "lm_head.weight" not in conversion.dropped:
        return
    if head.shape == embedding.shape and mx.array_equal(head.read(), embedding.read()).item():
        return
    key = "share_input_output_layers" if "transformer" in embedding.name else "tie_word_embeddings"
    notices.warning(
        "%s: lm_head.weight is dropped, though it is not the embedding: config.json says that they are tied "
        "(%s false would keep it)",
        source.path,
        key,
    )


def _options(
    dtype: str | None,
    quantize: tuple[int | str, int] | None,
    dequantize: bool,
    keep: tuple[tuple[str, int], ...] | None,
) -> Options:
    """Check the arguments of `convert` that do not concern SeedLM, and return them as `Options`."""
    if dtype is not None and dtype not in DTYPES:
        raise MlxeffError(f"convert: dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
    bits, group = quantize or (None, None)
    if quantize and dequantize:
        raise MlxeffError("convert: dequantize: wanted it without quantize, got both")
    recipe = bits if bits in RECIPES else None
    options = Options(
        dtype,
        RECIPES[recipe][0] if recipe else bits,
        group,
        recipe=recipe,
        keep=tuple(keep or ()) if quantize else (),
        dequantize=dequantize,
    )
    check(options)
    return options


def _seed_options(
    bits: str,
    keep: tuple[tuple[str, int], ...] | None,
    data_free: bool,
    calibrate: str | Path | None,
    tokens: int | None,
    options: Options,
) -> tuple[str | None, SeedOptions]:
    """(The text for calibration, None without calibration; the options of the SeedLM encoding)."""
    if options.bits or options.dequantize:
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
    """Encode the modules that the plan encodes by SeedLM, or continue an interrupted encoding. The layers run on the
    CPU. Returns the store with all encoded modules."""
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
    """Write the weights, config.json and the tokenizer into the new folder `destination`. Warns where there is no
    tokenizer."""
    if not tokens.found:
        notices.warning(f"{source.path}: no tokenizer found, {destination} has none: name one with --tokenizer")
    config = conversion.config | {"mlxeff": folder.provenance(source, conversion.options.as_dict())}
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
