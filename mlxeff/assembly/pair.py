"""KV Prediction pairs for a loaded base model.

A pair is an auxiliary model and a predictor, which turns the auxiliary's states into keys and values of the base model
(arXiv 2410.08391). `load_pair` loads a pair from its folder, `make_auxiliary` makes an auxiliary for a new pair from a
description such as "lp:0.5".
"""

from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..decode import require_seam
from ..errors import MlxeffError
from ..kvprediction import KvPrediction, Predictor
from ..kvprediction.files import AUXILIARY, PairConfig, read_config, read_weights
from ..kvprediction.layers import PUBLISHED, kept_layers, pruned_map, published_name, spread_map
from ..kvprediction.predictor import check_map, quantize
from ..models.decoder import DecoderModel
from ..models.openelm import SIZES
from ..modules import settle_random_state
from ..tuning import Tuned
from .model import Loaded, fill, load_model
from .techniques import Unloaded

SEAM = "kv"  # the place at which KV Prediction plugs into a model, see models/__init__.py


@dataclass(frozen=True)
class Auxiliary:
    """An auxiliary model for a new pair."""

    model: DecoderModel
    config: dict  # the entry `auxiliary` of the pair's config: {"layers": …} or {"model": …, "fingerprint": …}
    layer_map: list[int]  # for each layer of the base, the layer of the auxiliary to predict it from


def load_pair(
    pair: str | Path, base: Loaded, offline: bool = False, keep: int | None = None, refine: bool = False
) -> KvPrediction:
    """Load a pair for the model `base`, with the options `keep` and `refine` of `KvPrediction`. `pair` is its folder,
    or the name of a pair that comes with the package. Raises MlxeffError for a pair that was made for another base, and
    for missing or damaged files."""
    folder = hub.resolve_pair(pair)
    config = read_config(folder)
    require_base(folder, config, base)
    auxiliary, weights = _auxiliary_of(folder, config, base, offline), read_weights(folder)
    tuned_names = [name for name in weights if name.startswith(AUXILIARY)]
    tuned_weights = {name.removeprefix(AUXILIARY): weights.pop(name) for name in tuned_names}
    try:
        shapes = auxiliary.kv_shapes, base.model.kv_shapes
        predictor = Predictor(*shapes, config.layer_map, config.inputs, auxiliary.hidden_size, config.shared)
        if config.quantization:
            quantize(predictor, config.quantization)
        tuned = Tuned(auxiliary, **config.tuned) if config.tuned else None
    except MlxeffError as error:
        raise MlxeffError(f"{folder}: {error}") from error
    settle_random_state()
    fill(predictor, weights, str(folder))
    if tuned:
        fill(tuned.modules, tuned_weights, f"{folder}: auxiliary")
        tuned.fold()
    elif tuned_weights:
        raise MlxeffError(f"{folder}: wanted no tensors of an auxiliary that is not tuned, got {len(tuned_weights)}")
    return KvPrediction(native_like(auxiliary, base.model), predictor.eval().join(), str(pair), keep, refine)


def require_base(folder: Path, config: PairConfig, base: Loaded | Unloaded) -> None:
    """Raises MlxeffError where `base` has no place for KV Prediction, or is not the model that the pair in `folder` was
    made for."""
    require_seam(base.model, SEAM, "KV prediction")
    wanted, got = config.base.get("fingerprint"), base.fingerprint
    if wanted != got:
        raise MlxeffError(f"{folder}: wanted the base {config.base.get('name')} ({wanted}), got {base.path} ({got})")


def native_like(auxiliary: DecoderModel, base: DecoderModel) -> DecoderModel:
    """The auxiliary, which computes with the native executor if the base does."""
    if base.native is not None and auxiliary is not base:
        auxiliary.use_native()
    return auxiliary


def _auxiliary_of(folder: Path, config: PairConfig, base: Loaded, offline: bool) -> DecoderModel:
    """The auxiliary model that a pair's config names: some layers of the base, or a model of its own."""
    if config.layers is not None:
        return pruned(base.model, config.layers, str(folder))
    name, wanted = config.auxiliary["model"], config.auxiliary["fingerprint"]
    path = folder / name if (folder / name).is_dir() else hub.resolve(name, offline=offline)
    model, got = load_model(path, base.ignored)
    if got != wanted:
        raise MlxeffError(f"{folder}: wanted the auxiliary {name} ({wanted}), got {path} ({got})")
    check_vocabulary(model, base.model, str(folder))
    return model


def pruned(model: DecoderModel, layers: list[int], origin: str) -> DecoderModel:
    """The model of some layers of `model`, given by their numbers. Raises MlxeffError for numbers that are out of range
    or do not rise; `origin` names the pair."""
    count = len(model.layers)
    if not layers or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < count:
        raise MlxeffError(f"{origin}: auxiliary: wanted rising layers of 0 to {count - 1}, got {layers}")
    return model.pruned(layers)


def check_vocabulary(auxiliary: DecoderModel, base: DecoderModel, origin: str) -> None:
    """Raises MlxeffError where the auxiliary and the base have embedding tables of different size."""
    wanted, got = base.vocab_size, auxiliary.vocab_size
    if wanted != got:
        raise MlxeffError(f"{origin}: vocabulary mismatch: the base has {wanted} rows, the auxiliary {got}")


def make_auxiliary(spec: str, base: Loaded, offline: bool = False) -> Auxiliary:
    """The auxiliary that `spec` describes: "lp:0.5" (that fraction of the base's layers, evenly spread), "layers:0-14"
    or "layers:0,1,5" (these layers of the base), the name of one of the paper's configurations, or a model's name.
    Raises MlxeffError for any other text, and for a model that does not fit the base."""
    require_seam(base.model, SEAM, "KV prediction")
    count = len(base.model.layers)
    name = published_name(spec)
    if name:
        _check_base(name, base.model, spec)
    if name and PUBLISHED[name].keep:
        spec = f"lp:{PUBLISHED[name].keep}"
    elif name:
        spec = f"openelm-{PUBLISHED[name].auxiliary.lower().replace('_', '.')}"
    kind, _, rest = spec.partition(":")
    if kind in ("lp", "layers"):
        layers = kept_layers(rest, count) if kind == "lp" else _listed(rest, spec)
        model = native_like(pruned(base.model, layers, spec), base.model)
        return Auxiliary(model, {"layers": layers}, pruned_map(layers, count))
    path = hub.resolve(spec, offline=offline)
    model, fingerprint = load_model(path, base.ignored)
    require_seam(model, SEAM, "KV prediction")
    check_vocabulary(model, base.model, spec)
    stored = str(Path(spec).resolve()) if Path(spec).exists() else spec
    layer_map = spread_map(len(model.layers), count)
    check_map(layer_map, len(model.layers), count)
    return Auxiliary(native_like(model, base.model), {"model": stored, "fingerprint": fingerprint}, layer_map)


def _check_base(name: str, base: DecoderModel, spec: str) -> None:
    """Raises MlxeffError where the base has another size than that of the paper's configuration `name`."""
    size = PUBLISHED[name].base
    wanted, got = SIZES[size][:2], (len(base.layers), base.hidden_size)
    if wanted != got:
        text = f"wanted the base OpenELM-{size}, {wanted[0]} layers of {wanted[1]}"
        raise MlxeffError(f"{spec}: {text}, got {got[0]} layers of {got[1]}")


def _listed(text: str, spec: str) -> list[int]:
    """ "0,2,5-7" → [0, 2, 5, 6, 7]."""
    layers = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise MlxeffError(f"{spec}: wanted layers such as 0,2,5-7, got {text!r}") from None
    return layers
