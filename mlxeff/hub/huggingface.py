"""A Hugging Face repository → a folder in the Hugging Face cache.

The library `huggingface_hub` does the work: resume, hashes, locks, the variables HF_HOME, HF_TOKEN and HF_ENDPOINT. It
is imported on first use. This module chooses which files of a repository to fetch (safetensors where there are any,
otherwise PyTorch files, otherwise a single GGUF file) and turns the library's errors into `MlxeffError`s of one line.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import MlxeffError, notices, some

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in total)
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")  # config, tokenizer, chat template
# File name patterns of the kinds of weights, best kind first: (the usual names, all names of that kind, names among
# these that are no weights). The second pattern is tried where the first matches nothing.
WEIGHTS = (
    ("model*.safetensors", "*.safetensors", "consolidated*"),
    ("pytorch_model*.bin", "*.bin", "training_args.bin"),
    ("checkpoint*.pt", "*.pt", "*optimizer*"),
)


WHOLE = ("model.safetensors", "pytorch_model.bin")  # not fetched beside all shards of the same name


class UnknownModelError(MlxeffError):
    """There is no such repository on the Hugging Face hub."""


def snapshot(repository: str, file: str | None, *, revision: str | None, offline: bool,
             progress: Progress | None) -> Path:  # fmt: skip
    """Fetch a repository; returns the folder of the snapshot, or the path of its GGUF file where that is the model.

    file      the one GGUF file to fetch, None for the whole model
    revision  branch, tag or commit, None for the default branch
    offline   use the cache only
    progress  called with (bytes done, bytes in total)

    Without a connection a complete snapshot in the cache is used, with a notice. Raises UnknownModelError where there
    is no such repository, MlxeffError for every other failure.
    """
    with _one_line(repository, revision):
        if offline:
            return _in_cache(repository, file, revision)
        return _fetch(repository, file, revision, progress)


def config_file(repository: str, *, offline: bool) -> Path:
    """The path of a repository's config.json, which alone is fetched. Without a connection the copy in the cache is
    used, with a notice. Raises as `snapshot` does, and MlxeffError for a repository without one."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    with _one_line(repository):
        if offline:
            return Path(hf_hub_download(repository, "config.json", local_files_only=True))
        try:
            info = HfApi().model_info(repository)
        except Exception as error:
            if not _is_connection(error):
                raise
            found = Path(hf_hub_download(repository, "config.json", local_files_only=True))
            text = "%s: %s could not be reached, the copy in the cache is used"
            notices.warning(text, repository, constants.ENDPOINT)
            return found
        if "config.json" not in [sibling.rfilename for sibling in info.siblings or []]:
            raise MlxeffError(f"{repository}: has no config.json: fetch one of its GGUF files and name that")
        return Path(hf_hub_download(repository, "config.json"))


@contextlib.contextmanager
def _one_line(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the library raises inside into errors of one line, as `snapshot` says."""
    from huggingface_hub import constants, errors

    if str(constants.HF_HUB_CACHE).startswith("~"):  # the library would make a folder of that name
        raise MlxeffError(f"{repository}: no home folder to keep downloads in: set HOME or HF_HOME to a folder")
    try:
        yield
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
    """The MlxeffError for a failure of the network, the server or the disk; any other error is returned unchanged."""
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
    """Whether the connection failed. Compares the names of the error's classes, since the HTTP library that
    huggingface_hub uses depends on its version."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(names & {"TransportError", "RequestException"})


def _fetch(repository: str, file: str | None, revision: str | None, progress: Progress | None) -> Path:
    """`snapshot` with the network."""
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
    """The snapshot in the cache after the connection failed with `error`; a notice says so."""
    from huggingface_hub import constants, errors

    try:
        cached = _in_cache(repository, file, revision)
    except errors.LocalEntryNotFoundError:
        raise MlxeffError(
            f"{repository}: no network: {constants.ENDPOINT} could not be reached ({_line(error)}), and it is not in"
            f" the cache {_cache()}; name a local folder or .gguf file, or put the snapshot into that cache"
        ) from None
    notices.warning("%s: %s could not be reached, the copy in the cache is used", repository, constants.ENDPOINT)
    return cached


def choose(names: list[str], repository: str, file: str | None = None) -> tuple[list[str], str | None]:
    """(Names of the files to fetch, among all `names` of a repository; the name of the GGUF file, None where the model
    is a folder). `file` is the wanted GGUF file, if any. Raises MlxeffError where there is no single model to fetch."""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if file is not None:
        if file not in ggufs:
            raise MlxeffError(f"{repository}: wanted the file {file}, got {some(ggufs) or 'no .gguf files'}")
        return _parts(file, ggufs), file
    top = [name for name in names if "/" not in name]
    side = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)]
    side += [name for name in names if name.startswith("additional_chat_templates/")]
    for usual, any_name, no_weights in WEIGHTS:
        weights = fnmatch.filter(top, usual)
        weights = weights or [name for name in fnmatch.filter(top, any_name) if not fnmatch.fnmatch(name, no_weights)]
        if weights:
            return side + [name for name in weights if not (name in WHOLE and _in_shards(name, weights))], None
    if ggufs and set(_parts(min(ggufs), ggufs)) == set(ggufs):
        return ggufs, min(ggufs)
    if ggufs:
        raise MlxeffError(f"{repository}: wanted one of its GGUF files, named as {repository}/FILE: {some(ggufs)}")
    raise MlxeffError(f"{repository}: wanted safetensors, PyTorch or GGUF weights, got {len(names)} files without any")


def _parts(name: str, names: list[str]) -> list[str]:
    """The names of all parts of the split GGUF file that `name` is a part of; `name` alone where it is whole."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", name)
    return [each for each in names if found and _is_part(each, found[1], found[2])] or [name]


def _is_part(name: str, stem: str, count: str) -> bool:
    return bool(re.fullmatch(rf"{re.escape(stem)}-\d{{5}}-of-{count}\.gguf", name))


def _in_shards(name: str, names: list[str]) -> bool:
    """Whether `names` has a complete set of shards of the file `name`, such as model-00001-of-00002.safetensors."""
    stem, dot, suffix = name.rpartition(".")
    counts = {found[1] for other in names if (found := re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}", other))}
    shards = {count: [f"{stem}-{i:05d}-of-{count}{dot}{suffix}" for i in range(1, int(count) + 1)] for count in counts}
    return any(wanted and set(wanted) <= set(names) for wanted in shards.values())


def _in_cache(repository: str, file: str | None, revision: str | None) -> Path:
    """`snapshot` from the cache only. Raises LocalEntryNotFoundError where it is not there or incomplete."""
    from huggingface_hub import errors, snapshot_download

    needed = [file] if file else ["config.json"]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=needed, local_files_only=True))
    ggufs = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gguf"))
    if not file and _has_weights(folder):
        return folder
    first = file if file else min(ggufs) if ggufs and set(_parts(min(ggufs), ggufs)) == set(ggufs) else None
    if first and (folder / first).exists() and _all_parts(folder / first):
        return folder / first
    raise errors.LocalEntryNotFoundError(f"{folder} is incomplete")


def _all_parts(path: Path) -> bool:
    """Whether a GGUF file is there with all its parts."""
    from ..checkpoint import parts_of

    try:
        return bool(parts_of(path))
    except MlxeffError:
        return False


def _has_weights(folder: Path) -> bool:
    """Whether the folder has all files of a checkpoint, by the rule that opens it later."""
    from ..checkpoint import choose_files

    try:
        return choose_files(folder).files[0].suffix != ".gguf"
    except (MlxeffError, OSError):
        return False


def _quiet_bar(progress: Progress | None) -> type:
    """A subclass of tqdm for huggingface_hub that draws nothing and passes the counts of byte bars to `progress`."""
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
    """The models in the Hugging Face cache: id → {"path": of the newest snapshot, "bytes": on disk}."""
    from huggingface_hub import errors, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (errors.CacheNotFound, OSError, ValueError, RuntimeError):  # the last: no home folder
        return {}
    models = {}
    for repository in repositories:
        if repository.repo_type == "model" and repository.revisions:
            newest = max(repository.revisions, key=lambda revision: revision.last_modified)
            models[repository.repo_id] = {"path": str(newest.snapshot_path), "bytes": repository.size_on_disk}
    return models
