"""A pair of KV prediction on disk: the auxiliary and the predictor for one base model, in a folder.

config.json names the base, the auxiliary and the layer map (see `PairConfig`). The predictor's weights are safetensors:
dense maps, or with the key `quantization` affine-quantised ones, packed by `mx.quantize`.

The entry `auxiliary` of config.json is one of two:

{"layers": [0, 2, …]}                 the auxiliary consists of these layers of the base, and has no weights of its own
{"model": NAME, "fingerprint": …}     it is a model: a folder inside the pair's folder, or a name on the model hub

A tuned auxiliary has the further key "tuned": {"method": …}, and its trained tensors are stored in float16 beside the
predictor's, under names that begin with "auxiliary.". This module builds and loads no models.
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
AUXILIARY = "auxiliary."  # prefix of the names of a tuned auxiliary's tensors; all others are the predictor's


@dataclass(frozen=True)
class PairConfig:
    """config.json of a pair.

    base          name and fingerprint of the base model
    auxiliary     see the head of this module
    layer_map     for each base layer the auxiliary layer that its maps read
    inputs        what the maps read of that layer, one of `predictor.INPUTS`
    shared        how many first layers base and auxiliary have in common; these have no maps
    quantization  group_size, bits and mode of the maps; None for dense maps, and then not written
    provenance    how the predictor was made
    """

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
        """`Tuned.config` of the auxiliary; None where the auxiliary is not tuned."""
        return self.auxiliary.get("tuned")

    @property
    def layers(self) -> list[int] | None:
        """The base layers that the auxiliary consists of; None where the auxiliary is a model of its own."""
        return self.auxiliary.get("layers")


def read_config(folder: Path) -> PairConfig:
    """Read and check config.json in the folder of a pair. Raises MlxeffError for a folder that is no pair of this
    version."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise MlxeffError(f"{folder}: wanted the folder of a KV prediction pair, got no config.json there")
    config = read_json(path)
    got = config.get("format"), config.get("version")
    if got != (FORMAT, VERSION):
        raise MlxeffError(f"{path}: wanted format {FORMAT} version {VERSION}, got {got[0]!r} version {got[1]!r}")
    wanted = {"base": dict, "auxiliary": dict, "layer_map": list, "provenance": dict}
    wanted |= {"inputs": str} if "inputs" in config else {}  # default: "own", the inputs in CoreNet and the paper
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
    """A hash of the names and contents of the files in a pair's folder, in 12 hexadecimal digits. It tells pairs of the
    same name apart."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _check_quantization(path: Path, scheme: dict) -> None:
    """Raises MlxeffError unless `scheme` is one of `mx.quantize` that the predictor's maps support."""
    typed = {key: type(value) for key, value in scheme.items()} == {"group_size": int, "bits": int, "mode": str}
    if not typed or not (scheme["group_size"] in GROUPS and scheme["bits"] in BITS and scheme["mode"] == "affine"):
        wanted = f"group_size of {GROUPS}, bits of {BITS} and mode affine"
        raise MlxeffError(f"{path}: quantization: wanted {wanted}, got {scheme!r:.80}")


def _check_auxiliary(path: Path, auxiliary: dict) -> None:
    """Raises MlxeffError unless the entry `auxiliary` has one of the forms in the head of this module."""
    layers, keys = auxiliary.get("layers"), set(auxiliary) - {"tuned"}
    if "tuned" in auxiliary and not _is_tuning(auxiliary["tuned"]):
        raise MlxeffError(f"{path}: auxiliary: tuned: wanted a method, for lora a rank, got {auxiliary['tuned']!r:.80}")
    if keys == {"layers"} and isinstance(layers, list) and layers and all(type(each) is int for each in layers):
        return
    if keys == {"model", "fingerprint"} and all(isinstance(auxiliary[each], str) for each in keys):
        return
    raise MlxeffError(f"{path}: auxiliary: wanted layers, or a model and its fingerprint, got {auxiliary!r:.80}")


def _check_shared(path: Path, shared: int, auxiliary: dict) -> None:
    """Raises MlxeffError for a wrong count of shared layers. Only an auxiliary that consists of base layers, and is not
    tuned, shares any with the base."""
    most = 0 if "tuned" in auxiliary else shared_layers(auxiliary.get("layers", ()))
    if not 0 <= shared <= most:
        wanted = f"0 to {most} first layers that auxiliary and base share"
        raise MlxeffError(f"{path}: shared: wanted {wanted}, got {shared}")


def _is_tuning(tuned: object) -> bool:
    return isinstance(tuned, dict) and "method" in tuned and set(tuned) <= {"method", "rank"}


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors in the folder of a pair, by name: the predictor's and those of a tuned auxiliary."""
    return {name: tensor.read() for name, tensor in open_source(folder).tensors.items()}


def pieces(predictor: Predictor, tuned: Tuned | None = None, half: bool = False) -> list[Piece]:
    """The tensors to write: the predictor's in float32, or with `half` in float16, but packed ones unchanged; and those
    of a tuned auxiliary in float16."""
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
    """Write a pair into the new folder `folder`, which appears only when it is complete.

    describe: called with the unfinished folder; returns the config, and may write more files there. half: as in
    `pieces`. Raises MlxeffError where the folder cannot be written.
    """

    def finish(partial: Path) -> None:
        config = {key: value for key, value in asdict(describe(partial)).items() if value is not None}
        text = json_text(config, indent=1)
        (partial / "config.json").write_text(text, encoding="utf-8")

    write_folder(folder, pieces(predictor, tuned, half), finish)
