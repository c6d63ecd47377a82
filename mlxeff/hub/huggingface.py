"""A Hugging Face repository -> a folder in the Hugging Face cache; the library's many errors -> one line each.

`huggingface_hub` does the work (resume, hashes, locks, HF_HOME, HF_TOKEN, HF_ENDPOINT); it is imported on first use.
Weights are taken as safetensors where there are any, else as PyTorch files, else as a single GGUF file.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MlxeffError, notices

Progress = Callable[[int, int], None]
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
# Kinds of weights, best first: (the usual name, any name, names that are no weights)
WEIGHTS = (
    ("model*.safetensors", "*.safetensors", "consolidated*"),
    ("pytorch_model*.bin", "*.bin", "training_args.bin"),
    ("checkpoint*.pt", "*.pt", "*optimizer*"),
)


class UnknownModelError(MlxeffError):
    """The hub knows no such repository."""


def snapshot(repository: str, file: str | None, *, revision: str | None, offline: bool,
             progress: Progress | None) -> Path:  # fmt: skip
    """The snapshot's folder, or the path of its GGUF file. UnknownModelError when there is no such repository.

    Without a connection a complete snapshot in the cache is used, with a notice.
    """
    from huggingface_hub import errors

    try:
        if offline:
            return _in_cache(repository, file, revision)
        return _fetch(repository, file, revision, progress)
    except MlxeffError:
        raise
    except errors.GatedRepoError:
        raise MlxeffError(
            f"{repository}: gated: accept its terms at https://huggingface.co/{repository}, then {_login()}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UnknownModelError(
            f"{repository}: no such model on Hugging Face, or a private one (for those {_login()})"
        ) from None
    except errors.RevisionNotFoundError:
        raise MlxeffError(f"{repository}: has no revision {revision or 'main'!r}") from None
    except errors.LocalEntryNotFoundError:
        raise MlxeffError(
            f"{repository}: not in the cache and offline; fetch it once with a connection (cache: {_cache()}), or name"
            " a local folder or .gguf file instead"
        ) from None
    except Exception as error:
        raise _explained(error, repository) from error


def _login() -> str:
    return "log in with `hf auth login` or set HF_TOKEN"


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _explained(error: Exception, repository: str) -> Exception:
    """A MlxeffError for what the network, the server or the disk can do; a programming error stays what it is."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return MlxeffError(f"{repository}: the server refused (HTTP {status}): {_login()}")
    if status is not None:
        return MlxeffError(f"{repository}: the server answered HTTP {status}: {_line(error)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MlxeffError(f"{repository}: the disk is full ({error.strerror}) in {_cache()}; HF_HOME moves the cache")
    if _is_connection(error):
        return MlxeffError(f"{repository}: download failed: {_line(error)}; run again to go on where it stopped")
    if isinstance(error, (OSError, ValueError)):
        return MlxeffError(f"{repository}: {_line(error)}")
    return error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_connection(error: BaseException | None) -> bool:
    """The HTTP library's name changes with huggingface_hub's version, the names of its errors do not."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(names & {"TransportError", "RequestException"})


def _fetch(repository: str, file: str | None, revision: str | None, progress: Progress | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repository, revision=revision)
    except Exception as error:
        if not _is_connection(error):
            raise
        return _without_network(repository, file, revision, error)
    names = [sibling.rfilename for sibling in info.siblings or []]
    chosen, single = choose(names, repository, file)
    folder = snapshot_download(repository, revision=revision, allow_patterns=chosen, tqdm_class=_quiet_bar(progress))
    return Path(folder) / single if single else Path(folder)


def _without_network(repository: str, file: str | None, revision: str | None, error: Exception) -> Path:
    from huggingface_hub import constants, errors

    try:
        found = _in_cache(repository, file, revision)
    except errors.LocalEntryNotFoundError:
        raise MlxeffError(
            f"{repository}: no network: {constants.ENDPOINT} could not be reached ({_line(error)}), and it is not in"
            f" the cache {_cache()}; name a local folder or .gguf file, or put the snapshot into that cache"
        ) from None
    notices.warning("%s: %s could not be reached, the copy in the cache is used", repository, constants.ENDPOINT)
    return found


def choose(names: list[str], repository: str, file: str | None = None) -> tuple[list[str], str | None]:
    """Which files of a repository to fetch, and the single GGUF file if that is what the model is."""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if file is not None:
        if file not in ggufs:
            raise MlxeffError(f"{repository}: wanted the file {file}, got {', '.join(ggufs) or 'no .gguf files'}")
        return [file], file
    top = [name for name in names if "/" not in name]
    side = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)]
    side += [name for name in names if name.startswith("additional_chat_templates/")]
    for usual, any_name, never in WEIGHTS:
        weights = fnmatch.filter(top, usual)
        weights = weights or [name for name in fnmatch.filter(top, any_name) if not fnmatch.fnmatch(name, never)]
        if weights:
            return side + weights, None
    if len(ggufs) == 1:
        return ggufs, ggufs[0]
    if ggufs:
        raise MlxeffError(f"{repository}: wanted one of its GGUF files, named as {repository}/FILE: {', '.join(ggufs)}")
    raise MlxeffError(f"{repository}: wanted safetensors, PyTorch or GGUF weights, got {len(names)} files without any")


def _in_cache(repository: str, file: str | None, revision: str | None) -> Path:
    """The snapshot as the cache has it; LocalEntryNotFoundError when it is absent or incomplete."""
    from huggingface_hub import errors, snapshot_download

    some = [file] if file else ["config.json"]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=some, local_files_only=True))
    ggufs = sorted(folder.glob("*.gguf"))
    if file and (folder / file).exists():
        return folder / file
    if not file and _has_weights(folder):
        return folder
    if not file and len(ggufs) == 1:
        return ggufs[0]
    raise errors.LocalEntryNotFoundError(f"{folder} is incomplete")


def _has_weights(folder: Path) -> bool:
    """Whether every shard that the index names is there, or without an index any file of weights."""
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
        return all((folder / shard).exists() for shard in shards)
    return any(fnmatch.filter(os.listdir(folder), any_name) for _, any_name, _ in WEIGHTS)


def _quiet_bar(progress: Progress | None) -> type:
    """A tqdm class that draws nothing and hands the largest byte count of its bars to `progress`."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self._bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            with open(os.devnull, "w") as nothing:
                super().__init__(*args, **kwargs | {"file": nothing, "disable": True})
            self.n, self.total = kwargs.get("initial") or 0, kwargs.get("total") or 0

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress and self._bytes and self.total:
                progress(int(min(self.n, self.total)), int(self.total))

        def set_description(self, *args: Any, **kwargs: Any) -> None:
            pass

        def refresh(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Bar


def cached_repositories() -> dict[str, dict[str, Any]]:
    """Models in the Hugging Face cache: id -> {"path", "bytes"}."""
    from huggingface_hub import errors, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (errors.CacheNotFound, OSError, ValueError):
        return {}
    found = {}
    for repository in repositories:
        if repository.repo_type == "model" and repository.revisions:
            newest = max(repository.revisions, key=lambda revision: revision.last_modified)
            found[repository.repo_id] = {"path": str(newest.snapshot_path), "bytes": repository.size_on_disk}
    return found
