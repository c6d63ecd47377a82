"""The file that keeps every sample as it is made, so that a run that was broken off goes on; and medians of samples.

JSON lines: first what may not differ between the samples of one file, then a sample a line.
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
    """Samples, in memory and, with a path, on disk.

    identity   what may not differ between the samples of one file
    keys       the fields that tell samples apart
    holds      sample → whether a sample of the file is kept; one that is not has to be measured again
    remedy     what helps against a file of another identity, for the message

    Raises MlxeffError for a file that holds other things, or samples made under another identity.
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
        held = []
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MlxeffError(f"{self.path}: wanted a file of samples: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                held.append(json.loads(line))
            except ValueError:
                if not held:  # a killed run may leave half a line, but not as the first one
                    raise MlxeffError(f"{self.path}: line {number}: wanted JSON, got {line[:40]!r}") from None
        first = held[0] if isinstance(held[0], dict) else {}
        if names := sorted(name for name in {*first, *identity} if first.get(name) != identity.get(name)):
            raise MlxeffError(f"{self.path}: holds samples made otherwise ({', '.join(names)} differ): {self.remedy}")
        known = [each for each in held[1:] if isinstance(each, dict) and set(self.keys) <= set(each)]
        self.all = [each for each in {self.key(each): each for each in known}.values() if self.holds(each)]
        self._write([identity, *self.all], "w")

    def _write(self, lines: Sequence[dict], mode: str) -> None:
        """Append, or with mode "w" replace the file as a whole."""
        target = self.path if mode == "a" else temporary_beside(self.path)
        try:
            with open(target, mode, encoding="utf-8") as file:
                file.writelines(json_text(line) + "\n" for line in lines)
            if mode == "w":
                os.replace(target, self.path)
        except OSError as error:
            raise MlxeffError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def key(self, sample: dict) -> tuple:
        """What tells this sample from others."""
        return tuple(sample[name] for name in self.keys)

    def add(self, sample: dict) -> None:
        """Keep a new sample. Where the file takes no more, a notice says so, and samples are kept in memory only."""
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
    """The median of all values of `metric`, a number or a list of numbers in each sample, in the samples with these
    `fields`; None where there is none."""
    values = []
    for sample in samples:
        if fields.items() <= sample.items():
            value = sample.get(metric, [])
            values += value if isinstance(value, list | tuple) else [value]
    return median(values) if values else None
