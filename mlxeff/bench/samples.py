"""The file that keeps each sample as soon as it is measured, so that an interrupted benchmark can be continued; and
medians of samples.

The format is JSON lines. The first line is the identity: the facts, such as machine and settings, that are the same for
all samples of the file. Each further line is one sample. This module does not know what is measured.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from ..checkpoint import temporary_beside
from ..errors import MlxeffError, notices
from ..names import json_text


class Samples:
    """Samples (dicts) in memory and, with `path`, in a file. Samples that the file holds already are read.

    identity   the facts that all samples of the file have in common
    keys       the fields that identify a sample; of samples in the file with the same values, the last one counts
    holds      called with each sample of the file; where it returns False, the sample is removed from the file
    remedy     advice to the user in the message about a file with another identity

    Raises MlxeffError for a file that cannot be read or written, is no file of samples, or has another identity.
    """

    def __init__(
        self,
        path: Path | None,
        identity: dict,
        keys: Sequence[str],
        holds: Callable[[dict], bool] = lambda _: True,
        remedy: str = "name a new file",
    ):
        self.path, self.keys, self.holds, self.remedy = path, tuple(keys), holds, remedy
        self.all: list[dict] = []
        self.failed = False  # whether a sample could not be written
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(identity)
        else:
            self._write([identity], "w")

    def _read(self, identity: dict) -> None:
        """Read the samples of the file, and write it anew without those that are incomplete or not held."""
        held = []
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MlxeffError(f"{self.path}: wanted a file of samples: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                held.append(json.loads(line))
            except ValueError:
                if not held:  # an interrupted run may leave an incomplete line, but the first line is always complete
                    raise MlxeffError(f"{self.path}: line {number}: wanted JSON, got {line[:40]!r}") from None
        first = held[0] if isinstance(held[0], dict) else {}
        if names := sorted(name for name in {*first, *identity} if first.get(name) != identity.get(name)):
            raise MlxeffError(f"{self.path}: holds samples made otherwise ({', '.join(names)} differ): {self.remedy}")
        known = [each for each in held[1:] if isinstance(each, dict) and set(self.keys) <= set(each)]
        self.all = [each for each in {self.key(each): each for each in known}.values() if self.holds(each)]
        self._write([identity, *self.all], "w")

    def _write(self, lines: Sequence[dict], mode: str) -> None:
        """Append `lines` to the file (mode "a"), or replace the whole file by them (mode "w")."""
        target = self.path if mode == "a" else temporary_beside(self.path)
        try:
            with open(target, mode, encoding="utf-8") as file:
                file.writelines(json_text(line) + "\n" for line in lines)
            if mode == "w":
                os.replace(target, self.path)
        except OSError as error:
            raise MlxeffError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def key(self, sample: dict) -> tuple:
        """The values of the fields that identify a sample."""
        return tuple(sample[name] for name in self.keys)

    def add(self, sample: dict) -> None:
        """Keep a new sample. Where the file cannot be written, warn once, and keep samples in memory only."""
        self.all.append(sample)
        if self.path is not None and not self.failed:
            try:
                self._write([sample], "a")
            except MlxeffError as error:
                self.failed = True
                notices.warning("%s: this sample and those that follow are not kept there", error)

    def done(self) -> set[tuple]:
        """The keys of all samples."""
        return {self.key(sample) for sample in self.all}


def median_of(samples: Iterable[dict], metric: str, **fields) -> float | None:
    """The median of the field `metric` over the samples whose fields have the values `fields`. Where the field is a
    list of numbers, each of them counts. None where there is no value."""
    values = []
    for sample in samples:
        if fields.items() <= sample.items():
            value = sample.get(metric, [])
            values += value if isinstance(value, list | tuple) else [value]
    return median(values) if values else None
