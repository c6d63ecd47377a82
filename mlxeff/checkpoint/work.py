"""A work folder: the finished units of a long computation, so that an interrupted one can be continued.

The folder has a hidden name beside the destination, and is removed when the destination is complete. Each unit is a
safetensors file that is written under a temporary name and then renamed, so a file under its final name is complete. A
fingerprint of everything that enters the computation tells whether the folder belongs to the same one.
"""

import os
import shutil
from pathlib import Path

import mlx.core as mx

from ..errors import MlxeffError, notices
from ..names import readable_by_mlx


class WorkFolder:
    """The work folder of the kind `kind` for `destination`. A folder with another fingerprint is deleted, with a
    warning; a notice tells how many units, called `units`, an old one has. Raises MlxeffError where the folder cannot
    be written."""

    def __init__(self, destination: Path, kind: str, fingerprint: str, units: str = "layers"):
        destination = Path(destination).absolute()
        self.path = destination.parent / f".{destination.name}.{kind}-work"
        mark = self.path / "fingerprint"
        if self.path.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint):
            notices.warning(f"{self.path}: finished {units} of another source, text or options: begun anew")
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(exist_ok=True)
            mark.write_text(fingerprint, encoding="utf-8")
        except OSError as error:
            raise MlxeffError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        for left in self.path.glob(".*"):
            left.unlink()
        if done := len(list(self.path.glob("*.safetensors"))):
            notices.info(f"{self.path}: {done} {units} are done already")

    def file(self, unit: str) -> Path:
        """The file of a unit, which need not exist."""
        return self.path / f"{unit}.safetensors"

    def read(self, unit: str) -> tuple[dict[str, mx.array], dict[str, str]] | None:
        """The arrays and metadata of a unit; None where it is not there, or damaged, which a warning tells."""
        path = self.file(unit)
        if not path.is_file():
            return None
        try:
            with readable_by_mlx(path) as file:
                arrays, metadata = mx.load(file, format="safetensors", return_metadata=True)
            mx.eval(arrays)
        except (RuntimeError, ValueError) as error:
            self.damaged(unit, error)
            return None
        return arrays, metadata

    def damaged(self, unit: str, error: Exception) -> None:
        """Warn that a unit is computed again."""
        notices.warning(f"{self.file(unit)}: damaged, computed again: {str(error).splitlines()[0]}")

    def write(self, unit: str, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
        """Write the file of a unit. Raises MlxeffError where this fails."""
        path = self.file(unit)
        partial = path.with_name(f".{path.name}")
        try:
            with open(partial, "wb") as file:
                mx.save_safetensors(file, arrays, metadata)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            raise MlxeffError(f"{path}: cannot be written: {error}") from error

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
