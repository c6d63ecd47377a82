"""`mlxeff fit dynamoe` as a Python call: a dense model → a folder with the model as DynaMoE, fitted on a text.

The text's windows run through the layers one after the other. Finished layers are kept in a work folder, from which an
interrupted fit goes on. With `tune`, the smaller experts are tuned then (see `tuning_dynamoe`). The same model, text
and settings give the same folder to the bit.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .. import __version__, calibration, hub
from ..checkpoint import WorkFolder, open_source, write_folder
from ..decode import require_seam
from ..dynamoe import calibrate, fisher, fit
from ..dynamoe.feed_forward import DynamicFeedForward
from ..dynamoe.install import DOWNS, KEY, MOST_EXPERTS, Entry, gated_layers, prices, rows_of
from ..dynamoe.sparse_install import SparseEntry
from ..errors import MlxeffError, notices
from ..models.decoder import DecoderModel
from ..models.parts import GatedParts
from ..modules import parameter_bytes, settle_random_state
from . import described, fitting_sparse, folder
from .fitting import NotWrittenError, Progress, no_progress, settled
from .model import Loaded, load_path
from .tuning_dynamoe import TuningPass, tuning_text

RULES = {"regression": "lagrangian", "paper": "tail"}  # value of --router → the rule of the routers
SHARES = (1 / 3, 2 / 3)  # of the neurons, of the smaller experts by default
ALIGNED = (512, 256, 128, 64, 32)  # widths are multiples of the first of these that leaves them apart
RANK = 64
BY = ("experts", "inputs")
REPLACED = ("quantization", "quantization_config", "seedlm", KEY)  # entries of the source's config.json


@dataclass
class DynamoeSettings:
    """The options of `mlxeff fit dynamoe`, which its help explains, with "_" in place of "-". Raises MlxeffError for
    contradictions."""

    model: str
    out: str | Path
    by: str = "experts"
    widths: Sequence[float] = SHARES
    down: str = "own"
    rank: int | None = None
    router: str = "regression"
    threshold: float | None = None
    text: str | Path | None = None
    tokens: int = calibration.TOKENS
    tune: int | None = None
    seed: int = 0
    ignore_keys: Sequence[str] = ()
    offline: bool = False

    def __post_init__(self):
        if self.by not in BY:
            raise MlxeffError(f"--by: wanted one of {', '.join(BY)}, got {self.by!r}")
        if self.by == "inputs":
            self._check_inputs()
        if self.down not in DOWNS:
            raise MlxeffError(f"--down: wanted one of {', '.join(DOWNS)}, got {self.down!r}")
        if self.router not in RULES:
            raise MlxeffError(f"--router: wanted one of {', '.join(RULES)}, got {self.router!r}")
        if self.rank is not None and self.down != "low-rank":
            raise MlxeffError(f"--rank {self.rank}: wanted --down low-rank with it, got {self.down}")
        if self.down == "low-rank" and self.rank is None:
            self.rank = RANK
        if self.threshold is not None and self.router != "paper":
            raise MlxeffError(f"--threshold {self.threshold}: wanted --router paper with it, got {self.router}")
        self.threshold = fit.THRESHOLD if self.threshold is None else self.threshold
        if self.tune is not None and (type(self.tune) is not int or self.tune < calibration.WINDOW):
            raise MlxeffError(f"--tune: wanted {calibration.WINDOW} tokens, a window, or more, got {self.tune!r}")
        if self.tune is not None and self.down == "shared":
            raise MlxeffError(f"--tune {self.tune}: wanted --down own or low-rank with it, got shared: nothing to tune")
        widths = list(self.widths)
        if not 1 <= len(widths) < MOST_EXPERTS or sorted(set(widths)) != widths or widths[0] <= 0:
            got = ",".join(f"{width:g}" for width in widths)
            raise MlxeffError(f"--widths: wanted 1 to {MOST_EXPERTS - 1} rising numbers above 0, got {got or 'none'}")

    def _check_inputs(self) -> None:
        """Raises MlxeffError for options that only nested experts have."""
        defaults = {each.name: each.default for each in fields(self)}
        for name in ("widths", "down", "rank", "router", "threshold", "tune"):
            value = getattr(self, name)
            if (tuple(value) if isinstance(value, list) else value) != defaults[name]:
                raise MlxeffError(f"--{name}: of nested experts only, got --by inputs")


def fit_dynamoe(model: str, out: str | Path, *, progress: Progress = no_progress, **settings) -> dict:
    """Fit DynaMoE (arXiv 2502.12325) to `model` (a folder, file, alias or hub id) and write the result to the new
    folder `out`. `settings` are the options of `mlxeff fit dynamoe`, see `DynamoeSettings`.

    Returns the report that the command prints with `--json`, without the notices. Raises MlxeffError for invalid
    settings, models and texts; `out` does not exist then. Where only writing failed, it raises NotWrittenError, which
    has the report.
    """
    with settled(DynamoeSettings, "fit_dynamoe", model, out=out, **settings) as checked:
        return _fit(checked, progress)


def _fit(settings: DynamoeSettings, progress: Progress) -> dict:
    """`fit_dynamoe` with checked settings."""
    with progress(f"fetching {settings.model}", "B") as fetched:
        path = hub.resolve(settings.model, offline=settings.offline, progress=fetched)
    loaded, began = load_path(path, dict.fromkeys(settings.ignore_keys)), time.perf_counter()
    require_seam(loaded.model, "feed-forward", "DynaMoE")
    layers = gated_layers(loaded.model, str(path))
    if settings.by == "inputs":
        fitting_sparse.check(layers, str(path))
    elif any(hasattr(parts.down.module, "block_format") for _, parts in layers):
        text = "the blocks of seed-encoded matrices cannot be cut: the down-projections become affine with 8 bits"
        notices.warning("%s: %s (fit the dense model, then convert --seedlm the result)", path, text)
    widths = []
    if settings.by == "experts":
        widths = [_widths(settings.widths, parts, number) for number, (_, parts) in enumerate(layers)]
    text, name = calibration.read_text(settings.text)
    windows = calibration.windows(text, loaded.tokenizer, settings.tokens, str(path), loaded.model.vocab_size)
    tuning = None
    if settings.tune:
        chosen = tuning_text(text, loaded.tokenizer, settings.tune, str(path), loaded.model.vocab_size)
        tuning = TuningPass(loaded.model, chosen, progress)
    work = WorkFolder(Path(settings.out), "dynamoe", _fingerprint(settings, loaded, windows))
    fit_one = _by_inputs if settings.by == "inputs" else partial(_by_experts, widths, tuning)
    try:
        entry, modules, report = fit_one(settings, loaded.model, layers, windows, work, progress)
    except BaseException:
        if any(work.path.glob("*.safetensors")):
            notices.info(f"{work.path}: finished layers are kept: the same command goes on from there")
        raise
    for (layer, _), module in zip(layers, modules, strict=True):
        layer[layer.FEED_FORWARD] = module
    loaded.model.native = None
    report = _report(settings, windows, name) | report | {"seconds": time.perf_counter() - began}
    try:
        _write(settings, loaded, path, entry, report, progress)
    except MlxeffError as error:
        raise NotWrittenError(str(error), report) from error
    work.remove()
    return report


Layers = list[tuple[nn.Module, GatedParts]]
# (The entry `dynamoe` of config.json, the module of each layer, what the report says of the fit)
Fit = tuple[Entry | SparseEntry, list[nn.Module], dict]


def _by_experts(
    widths: list[list[int]],
    tuning: TuningPass | None,
    settings: DynamoeSettings,
    model: DecoderModel,
    layers: Layers,
    windows: np.ndarray,
    work: WorkFolder,
    progress: Progress,
) -> Fit:
    """Nested experts of these widths, fitted to the windows and perhaps tuned."""
    found = _layers(settings, model, layers, widths, windows, work, progress)
    fractions = calibrate.table(found.scores, prices(widths), RULES[settings.router])
    entry = Entry(tuple(map(tuple, widths)), settings.down, fractions, settings.rank)
    for module in found.modules:
        module.fractions = fractions
    if tuning:
        tuning.run(found.modules, settings.tune, settings.seed, work)
    report = _expert_report(settings, entry, found) | {"tuning": tuning.report if tuning else None}
    return entry, found.modules, report


def _by_inputs(
    settings: DynamoeSettings,
    model: DecoderModel,
    layers: Layers,
    windows: np.ndarray,
    work: WorkFolder,
    progress: Progress,
) -> Fit:
    """Networks that leave out inputs, fitted to the windows."""
    weights = _output_weights(settings, model, windows, work, progress)
    modules = fitting_sparse.fit_layers(model, layers, weights, windows, work, progress)
    settle_random_state()
    return fitting_sparse.entry(modules), modules, fitting_sparse.report(modules)


def _fingerprint(settings: DynamoeSettings, loaded: Loaded, windows: np.ndarray) -> str:
    """Everything that the fitted layers depend on."""
    kept = {key: value for key, value in asdict(settings).items() if key not in ("model", "out", "text", "offline")}
    text = hashlib.sha256(windows.tobytes()).hexdigest()
    return json.dumps([__version__, loaded.fingerprint, kept, text], sort_keys=True, default=str)


def _widths(shares: Sequence[float], parts: GatedParts, number: int) -> list[int]:
    """The widths of a layer's experts. Shares of 1 or less are rounded to multiples of 512, or of the largest smaller
    number in ALIGNED that keeps them apart; other numbers are widths. Raises MlxeffError for widths that do not fit."""
    full, where = rows_of(parts), f"--widths: layer {number}"
    unit = _unit(parts.down.module)
    if all(share < 1 for share in shares):
        for step in ALIGNED:
            widths = [round(share * full / step) * step for share in shares]
            if step >= unit and widths[0] > 0 and sorted(set(widths)) == widths and widths[-1] < full:
                return [*widths, full]
        raise MlxeffError(f"{where}: {full} neurons are too few for experts of {', '.join(f'{s:.3g}' for s in shares)}")
    widths = [int(share) for share in shares]
    if widths != list(shares) or widths[-1] >= full:
        raise MlxeffError(f"{where}: wanted shares below 1, or whole numbers below {full}, got {list(shares)}")
    if bad := [width for width in widths if width % unit]:
        raise MlxeffError(f"{where}: wanted multiples of {unit}, the group size of its weights, got {bad}")
    return [*widths, full]


def _unit(down: nn.Module) -> int:
    """What widths must be multiples of: the group size of the down-projection's weights."""
    return 64 if hasattr(down, "block_format") else getattr(down, "group_size", 1)


@dataclass
class Found:
    """The fitted layers: the module of each; what its router says of the calibration tokens (T, R); and the shares of
    the variance, or of the labels, that the router predicts on tokens that it was not fitted on."""

    modules: list[DynamicFeedForward]
    scores: list[np.ndarray]
    explained: list[list[float]]


def _layers(
    settings: DynamoeSettings,
    model: DecoderModel,
    layers: list[tuple[nn.Module, GatedParts]],
    widths: list[list[int]],
    windows: np.ndarray,
    work: WorkFolder,
    progress: Progress,
) -> Found:
    """Fit all layers, or take those that are finished from the work folder."""
    weights = _output_weights(settings, model, windows, work, progress)
    stream = calibration.LayerStream(model, windows)
    found, each_price, rule = Found([], [], []), prices(widths), RULES[settings.router]
    with progress("fitting", "layer") as bar:
        for number, (layer, parts) in enumerate(layers):
            unit, own = f"layer-{number:04d}", widths[number]
            module = fit.empty(parts, own, settings.down, settings.rank, rule, each_price[number])
            kept = work.read(unit)
            if kept is None:
                seen = fit.Statistics.empty(own[-1])
                stream.next_layer([layer.FEED_FORWARD], lambda _, x, seen=seen, parts=parts: seen.add(parts, x))
                scores, explained = fit.fit_layer(module, parts, seen, weights[number], settings.threshold)
                arrays = {"scores": mx.array(scores), **dict(tree_flatten(module.parameters()))}
                work.write(unit, arrays, {"explained": json.dumps(explained)})
            else:
                arrays, explained = kept[0], json.loads(kept[1]["explained"])
                scores = np.array(arrays.pop("scores"))
                module.update(tree_unflatten(list(arrays.items())))
                stream.next_layer()
            found.modules.append(module)
            found.scores.append(scores)
            found.explained.append(explained)
            if bar:
                bar(number + 1, len(layers))
    settle_random_state()
    return found


def _output_weights(
    settings: DynamoeSettings, model: DecoderModel, windows: np.ndarray, work: WorkFolder, progress: Progress
) -> np.ndarray:
    """`fisher.output_weights`, or what the work folder has of them."""
    if (kept := work.read("weights")) is not None:
        return np.array(kept[0]["weights"], np.float64)
    with progress("weighing errors", "window") as bar:
        weights = fisher.output_weights(model, windows, settings.seed, bar)
    if not np.isfinite(weights).all():
        raise MlxeffError(f"{settings.model}: the gradients of the text's log-probabilities are not finite")
    work.write("weights", {"weights": mx.array(weights.astype(np.float32))}, {})
    return weights.astype(np.float32).astype(np.float64)


def _write(
    settings: DynamoeSettings, loaded: Loaded, path: Path, entry: Entry | SparseEntry, report: dict, progress: Progress
) -> None:
    """Write the new folder."""
    source = open_source(path)
    config = {key: value for key, value in loaded.config.items() if key not in REPLACED}
    options = {key: value for key, value in asdict(settings).items() if key not in ("model", "out", "text", "offline")}
    config |= described.storage(loaded.model) | {KEY: entry.as_dict()}
    config["mlxeff"] = folder.provenance(source, {"fit": "dynamoe", **options}) | {"calibration": report["text"]}
    tokens = folder.find_tokenizer(source, None)
    pieces = described.pieces(loaded.model)
    with progress("writing", "B") as bar:
        write_folder(
            Path(settings.out),
            pieces,
            lambda partial: folder.write(partial, config, tokens, source),
            parameters=None,
            progress=bar,
            metadata=described.metadata(config),
        )


def _report(settings: DynamoeSettings, windows: np.ndarray, name: str) -> dict:
    """The part of the report that all fits have, without its times."""
    return {
        "model": settings.model,
        "out": str(settings.out),
        "by": settings.by,
        "text": name,
        "tokens": int(windows.size),
    }


def _expert_report(settings: DynamoeSettings, entry: Entry, found: Found) -> dict:
    """What the report says of nested experts."""
    added = [part for module in found.modules for part in (module.router, *(module.get("experts") or ()))]
    return {
        "widths": [list(each) for each in entry.widths],
        "down": entry.down,
        "rank": entry.rank,
        "router": settings.router,
        "explained": found.explained,
        "table": [list(row) for row in entry.fractions.table],
        "bytes": sum(map(parameter_bytes, found.modules)),
        "added_bytes": sum(map(parameter_bytes, added)),
    }
