"""The files of a model folder: which of them are the weights, and the JSON in the others.

This module knows the file names that Hugging Face, mlx-lm, PyTorch and llama.cpp use. It opens no weights.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import MlxeffError, some

# File suffix → format, for files that their first bytes do not identify.
SUFFIXES = {".safetensors": "safetensors", ".gguf": "gguf", ".bin": "torch", ".pt": "torch", ".pth": "torch"}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In a folder without an index, the weights are the files that match the first of these patterns with any match.
PATTERNS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth", "*.gguf")
WHOLE = ("model.safetensors", "pytorch_model.bin")  # names of files that hold a whole model
SINGLE = (".pt", ".pth", ".gguf")  # several such files in one folder are different checkpoints, not shards of one
SHARD = re.compile(r"(.*)-(\d{5})-of-(?!00000)(\d{5})(\.\w+)")
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # transformers' tags for these floats


@dataclass(frozen=True)
class Chosen:
    """The files of weights in a folder."""

    files: tuple[Path, ...]
    weight_map: dict[str, str]  # tensor name → file name, as the index says; empty without an index
    problems: tuple[str, ...] = ()  # what is wrong in the folder and passed over


def choose_files(folder: Path) -> Chosen:
    """The files of weights in a folder: those that its index names, or else those that are named like weights.

    An index of which files are missing is passed over where other files are there; so are a file of a whole model
    beside complete shards, and some shards of another division. Raises MlxeffError where there are no weights, where
    they are several checkpoints, and where shards are missing.
    """
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    weight_map = _weight_map(index) if index else {}
    named = sorted(set(weight_map.values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if named and not missing:
        like = {file.name for file in _like_weights(folder) if file.suffix == Path(named[0]).suffix}
        return Chosen(tuple(folder / name for name in named), weight_map, _passed_over(like - set(named)))
    files = _like_weights(folder)
    if not files and not missing:
        raise MlxeffError(f"{folder}: no weights: looked for {', '.join(PATTERNS)}")
    if {file.name for file in files} <= set(named):
        present = len(named) - len(missing)
        raise MlxeffError(f"{folder}: incomplete: wanted {len(named)} shards, got {present}: {some(missing)} missing")
    names = _complete(folder, [file.name for file in files])
    if len(names) > 1 and Path(names[0]).suffix in SINGLE and not all(map(SHARD.fullmatch, names)):
        raise MlxeffError(f"{folder}: wanted one checkpoint, got {some(names)}: name one of them")
    problems = _passed_over({file.name for file in files} - set(names))
    if missing:
        stale = f"{index.name} is stale, {some(names)} are read without it: it names {some(missing)}, which is missing"
        problems = (stale, *problems)
    return Chosen(tuple(folder / name for name in names), {}, problems)


def parts_of(path: Path) -> list[Path]:
    """All parts of the split GGUF file of which `path` is one, by their names; `path` alone where its name is not that
    of a part. Raises MlxeffError where one is missing."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    names = [f"{match[1]}-{i:05d}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        got = len(names) - len(missing)
        raise MlxeffError(f"{path}: incomplete: wanted {len(names)} parts, got {got}: {some(missing)} missing")
    return [path.parent / name for name in names]


def _passed_over(names: Iterable[str]) -> tuple[str, ...]:
    """The line that names files of weights which are not read; none without any."""
    return (f"not read, the weights are in other files: {some(sorted(names))}",) if names else ()


def _like_weights(folder: Path) -> list[Path]:
    """The files whose names match the first pattern that any file matches."""
    for pattern in PATTERNS:
        if files := sorted(file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith(".")):
            return files
    return []


def _complete(folder: Path, names: list[str]) -> list[str]:
    """The names that make up a checkpoint: complete sets of shards (names that say "number i of n"), and files that are
    no shards. Raises MlxeffError where neither a set of shards nor a file of a whole model is complete."""
    sets: dict[tuple[str, str, str], set[str]] = {}
    for name in names:
        if match := SHARD.fullmatch(name):
            sets.setdefault((match[1], match[3], match[4]), set()).add(name)
    whole, parts = [name for name in names if name in WHOLE], {}
    for (stem, count, suffix), members in sets.items():
        wanted = [f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, min(int(count), len(names) + 1) + 1)]
        if missing := [name for name in wanted if name not in members]:
            lost = f"{folder}: incomplete: wanted {int(count)} shards, got {len(members)}: {missing[0]} is missing"
        elif stem in parts or (suffix in SINGLE and parts):
            both = f"{parts.get(stem, names)[0]} and {wanted[0]}"
            raise MlxeffError(f"{folder}: wanted one checkpoint, got {both}: delete the shards of one")
        else:
            parts[stem] = wanted
    if sets and not parts and not whole:
        raise MlxeffError(lost)
    loose = [name for name in names if not SHARD.fullmatch(name) and not (parts and name in WHOLE)]
    return sorted([*loose, *(name for shards in parts.values() for name in shards)])


def _weight_map(index: Path) -> dict[str, str]:
    """The index's table tensor name → file name. Raises MlxeffError where a name is not that of a file of weights
    beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MlxeffError(f"{index}: wanted a weight_map of tensor to file names, got {type(weight_map).__name__}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise MlxeffError(f"{index}: wanted weight files beside the index, got {name!r}")
    return weight_map


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. transformers writes infinite floats as `{"__float__": "Infinity"}`; they become
    floats. Raises MlxeffError for a file that cannot be read or is no JSON object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_untag)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise MlxeffError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MlxeffError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value


def _untag(value: dict) -> dict | float:
    """The float for a dict that is transformers' tag of one, otherwise the dict itself."""
    tag = value.get("__float__")
    return FLOATS[tag] if len(value) == 1 and isinstance(tag, str) and tag in FLOATS else value
