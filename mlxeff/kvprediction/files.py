"""A pair on disk: a folder of config.json, which names the base, the auxiliary and the layer map, and the predictor's
weights as safetensors: dense maps, or with `quantization` affine-quantised ones as `mx.quantize` packs them.

The auxiliary is layers of the base itself, `{"layers": [0, 2, …]}`, whose weights are not stored again, or a model,
`{"model": NAME, "fingerprint": …}`: a folder inside the pair's, or anything that the hub knows. Where it was tuned,
`"tuned": {"method": …}` stands beside that, and what was trained is among the weights, `auxiliary.*` in float16.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint import Piece, cast, open_source, read_json, write_folder
from ..errors import MlxeffError
from ..names import json_text
from ..ops import BITS, GROUPS
from ..tuning import Tuned
from .layers import shared_layers
from .predictor import Predictor

FORMAT, VERSION = "mlxeff-kv-pair", 1
AUXILIARY = "auxiliary."  # begins the names of tensors that are not the predictor's


@dataclass(frozen=True)
class PairConfig:
    """config.json of a pair. `base`: name and fingerprint; `inputs`: what the maps read (`predictor`); `shared`: how
    many first layers of base and auxiliary are the same, and have no maps; `quantization`: group_size, bits and mode of
    the maps, None (and not written) of dense ones; `provenance`: how the predictor came to be."""

    base: dict
    auxiliary: dict
    layer_map: list[int]
    inputs: str = "own"
    shared: int = 0
    quantization: dict | None = None
    provenance: dict = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    @property
    def tuned(self) -> dict | None:
        """`Tuned.config` of the auxiliary, None where it was not tuned."""
        return self.auxiliary.get("tuned")

    @property
    def layers(self) -> list[int] | None:
        """The base layers that the auxiliary consists of, None where it is a model of its own."""
        return self.auxiliary.get("layers")


def read_config(folder: Path) -> PairConfig:
    """Raises MlxeffError in one line for anything that is not a pair of this version."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise MlxeffError(f"{folder}: wanted the folder of a KV prediction pair, got no config.json there")
    config = read_json(path)
    got = config.get("format"), config.get("version")
    if got != (FORMAT, VERSION):
        raise MlxeffError(f"{path}: wanted format {FORMAT} version {VERSION}, got {got[0]!r} version {got[1]!r}")
    wanted = {"base": dict, "auxiliary": dict, "layer_map": list, "provenance": dict}
    wanted |= {"inputs": str} if "inputs" in config else {}  # those of CoreNet, and of the paper, are the default
    wanted |= {"shared": int} if "shared" in config else {}
    wanted |= {"quantization": dict} if "quantization" in config else {}
    if unknown := sorted(set(config) - {each.name for each in fields(PairConfig)}):
        raise MlxeffError(f"{path}: unknown keys {unknown}")
    for key, kind in wanted.items():
        if type(config.get(key)) is not kind:
            raise MlxeffError(f"{path}: {key}: wanted {kind.__name__}, got {config.get(key)!r:.60}")
    if "quantization" in config:
        _check_quantization(path, config["quantization"])
    _check_auxiliary(path, config["auxiliary"])
    _check_shared(path, config.get("shared", 0), config["auxiliary"])
    return PairConfig(**config)


def digest(folder: Path) -> str:
    """Tells one pair from another of the same name."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _check_quantization(path: Path, scheme: dict) -> None:
    typed = {key: type(value) for key, value in scheme.items()} == {"group_size": int, "bits": int, "mode": str}
    if not typed or not (scheme["group_size"] in GROUPS and scheme["bits"] in BITS and scheme["mode"] == "affine"):
        wanted = f"group_size of {GROUPS}, bits of {BITS} and mode affine"
        raise MlxeffError(f"{path}: quantization: wanted {wanted}, got {scheme!r:.80}")


def _check_auxiliary(path: Path, auxiliary: dict) -> None:
    layers, keys = auxiliary.get("layers"), set(auxiliary) - {"tuned"}
    if "tuned" in auxiliary and not _is_tuning(auxiliary["tuned"]):
        raise MlxeffError(f"{path}: auxiliary: tuned: wanted a method, for lora a rank, got {auxiliary['tuned']!r:.80}")
    if keys == {"layers"} and isinstance(layers, list) and layers and all(type(each) is int for each in layers):
        return
    if keys == {"model", "fingerprint"} and all(isinstance(auxiliary[each], str) for each in keys):
        return
    raise MlxeffError(f"{path}: auxiliary: wanted layers, or a model and its fingerprint, got {auxiliary!r:.80}")


def _check_shared(path: Path, shared: int, auxiliary: dict) -> None:
    """Only an auxiliary that is the base's own layers, untuned, has some in common with it."""
    most = 0 if "tuned" in auxiliary else shared_layers(auxiliary.get("layers", ()))
    if not 0 <= shared <= most:
        wanted = f"0 to {most} first layers that auxiliary and base share"
        raise MlxeffError(f"{path}: shared: wanted {wanted}, got {shared}")


def _is_tuning(tuned: object) -> bool:
    return isinstance(tuned, dict) and "method" in tuned and set(tuned) <= {"method", "rank"}


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The predictor's tensors, and those of a tuned auxiliary, by name."""
    return {name: tensor.read() for name, tensor in open_source(folder).tensors.items()}


def pieces(predictor: Predictor, tuned: Tuned | None = None, half: bool = False) -> list[Piece]:
    """The predictor's tensors as they are written, in float32, or with `half` in float16, but packed ones as they are;
    those of a tuned auxiliary are in float16."""
    kind = "F16" if half else "F32"
    parts = [
        (name, "U32" if value.dtype == mx.uint32 else kind, value)
        for name, value in tree_flatten(predictor.parameters())
    ]
    if tuned is not None:
        parts += [(f"{AUXILIARY}{name}", "F16", value) for name, value in tree_flatten(tuned.modules.parameters())]
    return [
        Piece(((name, kind, value.shape),), lambda spec=(name, kind, value.shape), value=value: [cast(value, spec)])
        for name, kind, value in parts
    ]


def write_pair(
    folder: Path,
    describe: Callable[[Path], PairConfig],
    predictor: Predictor,
    tuned: Tuned | None = None,
    half: bool = False,
) -> None:
    """Write a new folder, all or nothing; `describe(partial)` gives the config and may add to the unfinished folder."""

    def finish(partial: Path) -> None:
        config = {key: value for key, value in asdict(describe(partial)).items() if value is not None}
        text = json_text(config, indent=1)
        (partial / "config.json").write_text(text, encoding="utf-8")

    write_folder(folder, pieces(predictor, tuned, half), finish)
