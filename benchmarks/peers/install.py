"""The peers, from PyPI into a virtual environment of their own; llama.cpp compiled there for this machine.

llama.cpp's source gets one repair: gcc 12's `_tile_loadconfig` names 8 of the 64 bytes that it reads, so the compiler
drops the stores to the rest, and the first AMX instruction is illegal. A compiler barrier before it keeps them.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import saving
from mlxeff.bench.machine import instruction_sets
from mlxeff.errors import MlxeffError

VERSIONS = LLAMA_VERSION, XLLAMACPP_VERSION, TORCH_VERSION = "0.3.36", "2026.10.11549", "2.13.0"
CMAKE_ARGUMENTS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAVA_BUILD=OFF"
TILE_FILE = "vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
TILE_LOAD = "    _tile_loadconfig(&tc);\n"
TILE_BARRIER = '    asm volatile("" :: "r"(&tc) : "memory");\n'


@dataclass(frozen=True)
class Peer:
    """How to run a peer: the interpreter that has it, and the class of `engines` that drives it."""

    engine: str
    python: str
    version: str
    how: str  # "source", "wheel", or why it is not there
    cpu: str = ""  # what it was compiled for

    @property
    def present(self) -> bool:
        return bool(self.python)


def install(name: str, folder: Path) -> Peer:
    """The peer `name` of PEERS, installed in `folder` when it is not yet; an absent one says why, in a line too."""
    if (peer := recorded(name, folder)) is not None:
        return peer
    try:
        peer = PEERS[name](folder)
    except InstallError as error:
        print(f"{name}: not measured: {error}", file=sys.stderr)
        return Peer(name, "", "", str(error))
    saving.write_text(json.dumps(asdict(peer)), folder / f"{name}.json")
    return peer


def recorded(name: str, folder: Path) -> Peer | None:
    """The peer `name` as it was installed in `folder`; None if it was not, or in another version or for another CPU."""
    record = folder / f"{name}.json"
    if not record.exists():
        return None
    peer = Peer(**json.loads(record.read_text()))
    current = peer.version in VERSIONS and peer.cpu in ("", cpu_features()) and Path(peer.python).exists()
    return peer if current else None


class InstallError(MlxeffError):
    """A peer cannot be installed."""


def llama_cpp(folder: Path) -> Peer:
    """Install llama.cpp from source or, if that fails, from the prebuilt wheel, which uses at most AVX2."""
    python = environment(folder)
    try:
        source = unpack(folder)
        repair(source)
        print(f"llama.cpp: compiling {LLAMA_VERSION} for this machine, some minutes", file=sys.stderr)
        variables = {"CMAKE_ARGS": CMAKE_ARGUMENTS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
        pip(folder, "llama.cpp", ["install", "--force-reinstall", "--verbose", str(source)], variables)
        shutil.rmtree(source)
        return Peer("llama.cpp", python, LLAMA_VERSION, "source", cpu_features())
    except InstallError as error:
        print(
            f"llama.cpp: the build failed ({error}); the prebuilt wheel xllamacpp is measured instead", file=sys.stderr
        )
        pip(folder, "xllamacpp", ["install", f"xllamacpp=={XLLAMACPP_VERSION}", "numpy"])
        return Peer("xllamacpp", python, XLLAMACPP_VERSION, f"wheel, since the build failed: {error}")


def torch(folder: Path) -> Peer:
    """PyTorch and transformers; the version is pinned, as a newer one may bring gigabytes of CUDA."""
    python = environment(folder)
    pip(folder, "torch", ["install", f"torch=={TORCH_VERSION}"])
    pip(folder, "torch", ["install", f"torch=={TORCH_VERSION}", "transformers>=5.7,<6", "numpy"])
    return Peer("torch", python, TORCH_VERSION, "wheel")


PEERS = {"llama.cpp": llama_cpp, "torch": torch}


def environment(folder: Path) -> str:
    """The interpreter of the peers' virtual environment in `folder`, made when absent."""
    place = folder / f"venv-{platform.python_version()}-{platform.machine()}"
    python = place / "bin/python"
    if not python.exists():
        run(folder, "venv", [sys.executable, "-m", "venv", "--clear", str(place)])
    return str(python)


def unpack(folder: Path) -> Path:
    """llama_cpp_python's source distribution, fetched with pip and unpacked."""
    archives = folder / "archives"
    archive = archives / f"llama_cpp_python-{LLAMA_VERSION}.tar.gz"
    if not archive.exists():
        source = ["--no-deps", "--no-binary", "llama_cpp_python", f"llama_cpp_python=={LLAMA_VERSION}"]
        pip(folder, "llama.cpp", ["download", *source, "--dest", str(archives)])
    place = archives / archive.name.removesuffix(".tar.gz")
    shutil.rmtree(place, ignore_errors=True)
    try:
        with tarfile.open(archive) as file:
            file.extractall(archives, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    except (OSError, tarfile.TarError) as error:
        raise InstallError(f"{archive}: {error}") from error
    return place


def repair(source: Path) -> None:
    """Put the barrier before the one `_tile_loadconfig`. Raises MlxeffError where that text is not as expected."""
    path = source / TILE_FILE
    text = path.read_text() if path.exists() else ""
    if (found := text.count(TILE_LOAD)) != 1:
        raise MlxeffError(f"{path}: wanted one line {TILE_LOAD.strip()!r} to repair, got {found}: not compiled")
    path.write_text(text.replace(TILE_LOAD, TILE_BARRIER + TILE_LOAD))


def pip(folder: Path, name: str, arguments: list[str], variables: dict | None = None) -> None:
    command = [environment(folder), "-m", "pip", "--disable-pip-version-check", *arguments]
    run(folder, name, command, variables)


def run(folder: Path, name: str, command: list[str], variables: dict | None = None) -> None:
    """Run with all output in a log; InstallError names the log."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print("$", *command, file=file, flush=True)
        done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | (variables or {}), check=False)
    if done.returncode:
        raise InstallError(f"{' '.join(command[1:5])} failed, see {log}")


def cpu_features() -> str:
    """A short name for the instruction sets of this CPU: what is compiled for one may not run on another."""
    flags = " ".join(instruction_sets()) or platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
