"""The finished layers of a SeedLM encoding, kept in a work folder, so that an interrupted conversion can be continued.

A fingerprint of source, options and calibration text tells whether the folder belongs to the same conversion. This
module encodes nothing.
"""

import json
from pathlib import Path

import mlx.core as mx

from ..checkpoint import WorkFolder
from ..names import readable_by_mlx
from ..seedlm.format import BlockFormat, check_arrays


class Store:
    """The work folder for `destination`. A folder with another fingerprint is deleted, with a warning.

    modules: name of each module that will be stored → (block format, rows, columns). Raises MlxeffError where the
    folder cannot be written.
    """

    def __init__(self, destination: Path, fingerprint: str, modules: dict[str, tuple[BlockFormat, int, int]]):
        self._work = WorkFolder(destination, "seedlm", fingerprint)
        self.modules, self.errors, self._files = modules, {}, {}

    @property
    def folder(self) -> Path:
        """The path of the work folder."""
        return self._work.path

    def has(self, unit: str, names: list[str]) -> bool:
        """Whether the file of `unit` holds all modules `names` in the right shapes. Warns where it is damaged. A
        unit is a layer of the model, or the embedding and output head together."""
        if (found := self._work.read(unit)) is None:
            return False
        arrays, metadata = found
        try:
            for name in names:
                fmt, rows, cols = self.modules[name]
                own = {kind: arrays[f"{name}.{kind}"] for kind in fmt.arrays(rows, cols)}
                check_arrays(fmt, rows, cols, own, name)
            self.errors |= json.loads(metadata["errors"])
        except (ValueError, KeyError) as error:
            self._work.damaged(unit, error)
            return False
        self._files |= dict.fromkeys(names, self._work.file(unit))
        return True

    def write(self, unit: str, arrays: dict[str, dict[str, mx.array]], errors: dict[str, float]) -> None:
        """Write the file of `unit`: the arrays of each module, and the error of its encoding. Raises
        MlxeffError where this fails."""
        flat = {f"{name}.{kind}": array for name, own in arrays.items() for kind, array in own.items()}
        self._work.write(unit, flat, {"errors": json.dumps(errors)})
        self.errors |= errors
        self._files |= dict.fromkeys(arrays, self._work.file(unit))

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
        self._work.remove()
