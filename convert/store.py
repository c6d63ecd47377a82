"""The work folder of a SeedLM encoding. It keeps the blocks of finished layers, so that an interrupted conversion can
be continued.

The folder has a hidden name beside the destination, and is removed when the destination is complete. Each file is
written under a temporary name and then renamed, so a file under its final name is complete. A fingerprint of source,
options and calibration text tells whether the folder belongs to the same conversion. This module encodes nothing.
"""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx

from ..errors import MlxeffError, notices
from ..names import readable_by_mlx
from ..seedlm.format import BlockFormat, check_arrays


class Store:
    """The work folder for `destination`. A folder with another fingerprint is deleted, with a warning.

    modules: name of each module that will be stored → (block format, rows, columns). Raises MlxeffError where the
    folder cannot be written.
    """

    def __init__(self, destination: Path, fingerprint: str, modules: dict[str, tuple[BlockFormat, int, int]]):
        destination = Path(destination).absolute()
        self.folder = destination.parent / f".{destination.name}.seedlm-work"
        self.modules, self.errors, self._files = modules, {}, {}
        self._open(fingerprint)

    def _open(self, fingerprint: str) -> None:
        """Make the folder, or continue with the existing one where its fingerprint is the same."""
        mark = self.folder / "fingerprint"
        if self.folder.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint):
            notices.warning(f"{self.folder}: finished layers of another source, text or options: begun anew")
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(exist_ok=True)
            mark.write_text(fingerprint, encoding="utf-8")
        except OSError as error:
            raise MlxeffError(f"{self.folder}: cannot be written: {error.strerror or error}") from error
        for left in self.folder.glob(".*"):
            left.unlink()
        if done := len(list(self.folder.glob("*.safetensors"))):
            notices.info(f"{self.folder}: {done} layers are encoded already")

    def has(self, unit: str, names: list[str]) -> bool:
        """Whether the file of `unit` holds all modules `names` in the right shapes. Warns where it is damaged. A
        unit is a layer of the model, or the embedding and output head together."""
        path = self.folder / f"{unit}.safetensors"
        if not path.is_file():
            return False
        try:
            with readable_by_mlx(path) as file:
                arrays, metadata = mx.load(file, format="safetensors", return_metadata=True)
            for name in names:
                fmt, rows, cols = self.modules[name]
                own = {kind: arrays[f"{name}.{kind}"] for kind in fmt.arrays(rows, cols)}
                check_arrays(fmt, rows, cols, own, name)
            self.errors |= json.loads(metadata["errors"])
        except (RuntimeError, ValueError, KeyError) as error:
            notices.warning(f"{path}: damaged, encoded again: {str(error).splitlines()[0]}")
            return False
        self._files |= dict.fromkeys(names, path)
        return True

    def write(self, unit: str, arrays: dict[str, dict[str, mx.array]], errors: dict[str, float]) -> None:
        """Write the file of `unit`: the arrays of each module, and the error of its encoding. Raises
        MlxeffError where this fails."""
        path, partial = self.folder / f"{unit}.safetensors", self.folder / f".{unit}.safetensors"
        flat = {f"{name}.{kind}": array for name, own in arrays.items() for kind, array in own.items()}
        try:
            with open(partial, "wb") as file:
                mx.save_safetensors(file, flat, {"errors": json.dumps(errors)})
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            raise MlxeffError(f"{path}: cannot be written: {error}") from error
        self.errors |= errors
        self._files |= dict.fromkeys(arrays, path)

    def read(self, name: str) -> list[mx.array]:
        """The arrays of a stored module, in the order of `BlockFormat.arrays`."""
        fmt, rows, cols = self.modules[name]
        with readable_by_mlx(self._files[name]) as file:
            arrays = mx.load(file, format="safetensors")
        return [arrays[f"{name}.{kind}"] for kind in fmt.arrays(rows, cols)]

    @property
    def written(self) -> bool:
        """Whether this conversion has found or written any finished module."""
        return bool(self._files)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
