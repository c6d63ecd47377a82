"""Converts CoreNet's checkpoints of KV Prediction. A checkpoint is one state dict of base, auxiliary and predictor. The
result is the folder of a pair (`kvprediction.files`), in which the folders `base` and `auxiliary` hold the two models.

Names of the tensors, as in CoreNet's kv_prediction.py, which spells "predicter":

base.*, auxiliary.*   the two models, as in a checkpoint of OpenELM
predicter.auxkv_to_basekv.{key,value}_transforms.{i}.{weight,bias}   the maps to base layer i

The file has no layer map: the published one for an auxiliary of this shape is used. Both models are OpenELMs, which
`openelm` reads.
"""

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..assembly import folder
from ..assembly.model import build_model, fill, fingerprint
from ..checkpoint import Source, check_new, open_source, plan_shards, write_folder
from ..errors import MlxeffError, notices, some
from ..kvprediction import Predictor
from ..kvprediction.files import PairConfig, pieces, write_pair
from ..kvprediction.layers import FRACTIONS, kept_layers, pruned_map, spread_map
from . import openelm
from .plan import Conversion, Options, plan
from .report import Report

PREDICTOR = "predicter.auxkv_to_basekv."
TENSOR = re.compile(r"(key|value)_transforms\.(\d+)\.(weight|bias)")
PARTS = ("base", "auxiliary")


def recognises(source: Source) -> bool:
    """Whether the source is CoreNet's checkpoint of a pair of KV Prediction."""
    return any(_plain(name).startswith(PREDICTOR) for name in source.tensors)


def convert_pair(
    source: Source, destination: Path, options: Options, tokenizer: str | Path | None, dry_run: bool
) -> Report:
    """Convert the pair into the new folder `destination`; with `dry_run` only report what would be done.

    `options` apply to the two models. Raises MlxeffError for SeedLM options, and where the source is damaged or the
    destination cannot be written; `destination` then does not exist.
    """
    if options.seedlm:
        raise MlxeffError(f"{source.path}: a pair of KV prediction: wanted no seedlm, got {options.seedlm.format.name}")
    if options.ignored:
        got = ",".join(options.ignored)
        raise MlxeffError(
            f"{source.path}: a pair of KV prediction has no config.json: wanted no ignore_keys, got {got}"
        )
    if options.dtype or options.bits:
        notices.info("convert: the pair's maps stay float32: dtype and quantize are for its models")
    conversions = {part: _model(source, part, options) for part in PARTS}
    tokens = folder.find_tokenizer(source, tokenizer)
    _check_names(source)
    for part, conversion in conversions.items():
        conversion.refuse_differences(f"{source.path}: {part}")
    predictor = _predictor(source, *(conversions[part].config for part in PARTS))
    if not dry_run:
        check_new(destination)

        def describe(partial: Path) -> PairConfig:
            proof = folder.provenance(source, options.as_dict())
            marks = {part: _write(source, partial / part, conversions[part], tokens, proof) for part in PARTS}
            return PairConfig(
                base={"name": "base", "fingerprint": marks["base"]},
                auxiliary={"model": "auxiliary", "fingerprint": marks["auxiliary"]},
                layer_map=predictor.layer_map,
                provenance=proof,
            )

        write_pair(destination, describe, predictor)
    return _report(source, destination, conversions, predictor, tokens, dry_run)


def _plain(name: str) -> str:
    """The name of a tensor without the prefix "module." of data-parallel training."""
    return name.removeprefix("module.")


def _check_names(source: Source) -> None:
    """Raises MlxeffError for tensors that belong to neither model nor to the predictor."""
    names = [_plain(name) for name in source.tensors]
    known = tuple(f"{part}." for part in PARTS)
    if strays := [n for n in names if not n.startswith(known) and not TENSOR.fullmatch(n.removeprefix(PREDICTOR))]:
        raise MlxeffError(f"{source.path}: {len(strays)} unknown tensors: {some(strays)}")


def _model(source: Source, part: str, options: Options) -> Conversion:
    """The plan of the conversion of one model, `part` of PARTS."""
    prefix = f"{part}."
    tensors = {
        _plain(name).removeprefix(prefix): tensor
        for name, tensor in source.tensors.items()
        if _plain(name).startswith(prefix)
    }
    try:
        return plan(openelm.read(replace(source, tensors=tensors, config=None)), options)
    except MlxeffError as error:
        raise MlxeffError(f"{part} of the pair: {error}") from error


def _predictor(source: Source, base: dict, auxiliary: dict) -> Predictor:
    """The predictor with the weights of the source, in float32. `base` and `auxiliary` are the models' configs."""
    shapes = [build_model(config).kv_shapes for config in (auxiliary, base)]
    predictor = Predictor(*shapes, layer_map(base, auxiliary))
    weights = {}
    for name, tensor in source.tensors.items():
        if match := TENSOR.fullmatch(_plain(name).removeprefix(PREDICTOR)):
            weights[f"{match[1]}_maps.{match[2]}.{match[3]}"] = tensor.read().astype(mx.float32)
    fill(predictor, weights, f"{source.path}: predictor")
    return predictor


def layer_map(base: dict, auxiliary: dict) -> list[int]:
    """The published layer map for models with the configs `base` and `auxiliary`.

    An auxiliary of the base's hidden size consists of base layers: a quarter, a half or three quarters of them. Any
    other is a smaller model. Raises MlxeffError for other numbers of layers.
    """
    count, kept = base["num_transformer_layers"], auxiliary["num_transformer_layers"]
    if base["model_dim"] != auxiliary["model_dim"]:
        return spread_map(kept, count)
    for fraction in FRACTIONS:
        layers = kept_layers(fraction, count)
        if len(layers) == kept:
            notices.info("convert: layer map: that of a pair whose auxiliary keeps %s of the base's layers", fraction)
            return pruned_map(layers, count)
    raise MlxeffError(f"layer map: wanted an auxiliary of {', '.join(FRACTIONS)} of {count} layers, got {kept} layers")


def _write(source: Source, place: Path, conversion: Conversion, tokens: folder.TokenizerFiles, proof: dict) -> str:
    """Write the folder `place` of one model, and return its fingerprint. Only the base gets the tokenizer."""
    base = place.name == "base"
    if base and not tokens.found:
        notices.warning(f"{source.path}: no tokenizer found, {place.name} has none: name one with --tokenizer")
    config, files = conversion.config | {"mlxeff": proof}, tokens if base else folder.TokenizerFiles(())
    write_folder(place, conversion.pieces, lambda partial: folder.write(partial, config, files, source))
    written = open_source(place)
    return fingerprint(written, written.config)


def _report(
    source: Source,
    destination: Path,
    conversions: dict[str, Conversion],
    predictor: Predictor,
    tokens: folder.TokenizerFiles,
    dry_run: bool,
) -> Report:
    maps, models = pieces(predictor), conversions.values()
    written = [piece for each in models for piece in each.pieces] + maps
    return Report(
        source=str(source.path),
        destination=str(destination),
        family="openelm CoreNet, KV Prediction",
        model_type="kv pair",
        options=conversions["base"].options.as_dict(),
        parameters=sum(each.parameters for each in models) + sum(piece.nbytes // 4 for piece in maps),
        tensors=sum(each.tensors for each in models) + len(maps),
        missing=[],
        unexpected=[],
        wrong_shape=[],
        dropped={f"{part}.{n}": why for part, each in conversions.items() for n, why in each.dropped.items()},
        changes=[(f"{part}.{c[0]}", *c[1:]) for part, each in conversions.items() for c in each.changes],
        source_bytes=source.nbytes,
        disk_bytes=sum(piece.nbytes for piece in written),
        free_bytes=folder.free_bytes(destination),
        peak_bytes=max(each.peak_bytes for each in models),
        shards=sum(len(plan_shards(each.pieces)) for each in models) + 1,
        tokenizer=tokens.found,
        written=not dry_run,
    )
