"""A model's name → its shape and the bits of its weights, from its config.json or the header of its GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..checkpoint import open_source, read_json
from ..errors import MlxeffError
from ..models.gguf_foreign import config_from_gguf
from . import formats
from .costs import Bits
from .published import data
from .shapes import Shape, read_shape


@dataclass(frozen=True)
class Described:
    """A model as its files describe it. `path`: of what was read, None for a built-in one that is not here."""

    name: str
    path: Path | None
    shape: Shape
    bits: Bits


def describe(name: str, ignored: tuple[str, ...] = (), offline: bool = False) -> Described:
    """The model called `name`: a folder, a config.json, a GGUF file or a hub id, of which config.json alone is fetched.
    `ignored`: entries of config.json to read as absent. Raises MlxeffError."""
    path = hub.describe(name, offline=offline)
    if path is None:
        entry = json.loads(data("built-in.json"))[name.lower()]
        return Described(name, None, read_shape(entry["config"]), Bits.of(**entry["bits"]))
    if path.is_dir() and not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
        raise MlxeffError(f"{path}: wanted a folder with a config.json, got one without")
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        config = {key: value for key, value in read_json(path).items() if key not in ignored}
        shape = _shape(config, path)
        return Described(name, path, shape, formats.stored(config, shape))
    source = open_source(path)
    if source.format != "gguf":
        if source.config is None:
            raise MlxeffError(f"{path}: wanted a config.json beside the weights, got none")
        config = {key: value for key, value in source.config.items() if key not in ignored}
        shape = _shape(config, path)
        return Described(name, path, shape, formats.stored(config, shape))
    shape = _shape(config_from_gguf(source), path)
    return Described(name, path, shape, formats.of_tensors(source.tensors, shape))


def _shape(config: dict, path: Path) -> Shape:
    """As `read_shape`; an error names the file."""
    try:
        return read_shape(config)
    except MlxeffError as error:
        raise MlxeffError(f"{path}: {error}") from None
