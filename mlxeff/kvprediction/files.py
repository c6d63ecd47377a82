"""A pair on disk: a folder of config.json, which names the base, the auxiliary and the layer map, and the predictor's
weights as safetensors.

The auxiliary is layers of the base itself, `{"layers": [0, 2, …]}`, whose weights are not stored again, or a model,
`{"model": NAME, "fingerprint": …}`: a folder inside the pair's, or anything that the hub knows.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint import Piece, open_source, read_json, write_folder
from ..errors import MlxeffError
from .predictor import Predictor

FORMAT, VERSION = "mlxeff-kv-pair", 1


@dataclass(frozen=True)
class PairConfig:
    """config.json of a pair. `base`: name and fingerprint; `provenance`: how the predictor came to be."""

    base: dict
    auxiliary: dict
    layer_map: list[int]
    provenance: dict = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

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
    if unknown := sorted(set(config) - {each.name for each in fields(PairConfig)}):
        raise MlxeffError(f"{path}: unknown keys {unknown}")
    for key, kind in wanted.items():
        if type(config.get(key)) is not kind:
            raise MlxeffError(f"{path}: {key}: wanted {kind.__name__}, got {config.get(key)!r:.60}")
    _check_auxiliary(path, config["auxiliary"])
    return PairConfig(**config)


def _check_auxiliary(path: Path, auxiliary: dict) -> None:
    layers, keys = auxiliary.get("layers"), set(auxiliary)
    if keys == {"layers"} and isinstance(layers, list) and layers and all(type(each) is int for each in layers):
        return
    if keys == {"model", "fingerprint"} and all(isinstance(each, str) for each in auxiliary.values()):
        return
    raise MlxeffError(f"{path}: auxiliary: wanted layers, or a model and its fingerprint, got {auxiliary!r:.80}")


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The predictor's tensors by name."""
    return {name: tensor.read() for name, tensor in open_source(folder).tensors.items()}


def pieces(predictor: Predictor) -> list[Piece]:
    """The predictor's tensors as they are written, in float32."""
    parts = [(name, value.astype(mx.float32)) for name, value in tree_flatten(predictor.parameters())]
    return [Piece(((name, "F32", value.shape),), lambda value=value: [value]) for name, value in parts]


def write_pair(folder: Path, describe: Callable[[Path], PairConfig], predictor: Predictor, progress=None) -> None:
    """Write a new folder, all or nothing; `describe(partial)` gives the config and may add to the unfinished folder."""

    def finish(partial: Path) -> None:
        text = json.dumps(asdict(describe(partial)), indent=1, ensure_ascii=False)
        (partial / "config.json").write_text(text, encoding="utf-8")

    write_folder(folder, pieces(predictor), finish, progress=progress)
