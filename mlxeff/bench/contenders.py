"""The arms that a command line names: MODEL as the options say, and each --vs. Every model is loaded once."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..assembly.model import Loaded, load_path
from ..assembly.techniques import check_switched, run_options, spelled, switch_on, switched_for
from ..decode import Setup
from ..errors import MlxeffError
from .arms import Arm

Fetching = Callable[[str, str], AbstractContextManager]  # (title, unit) → a progress bar, as in `assembly.fitting`


@dataclass(frozen=True)
class Contender:
    """A model, and how it is run: the parsed options of `generate` that the verb has."""

    model: str
    values: argparse.Namespace
    verb: str

    @property
    def flags(self) -> str:
        """The options as they are written on the command line."""
        return spelled(self.values, self.verb)

    @property
    def name(self) -> str:
        """The name of the arm."""
        return f"{self.model} {self.flags}".strip()

    def check(self) -> None:
        """Raises MlxeffError for options that contradict each other, or cannot change what is measured."""
        if self.verb == "bench ttft":
            for technique in switched_for(self.verb):
                if value := technique.value(self.values):
                    technique.check_timed(value)
        check_switched(self.values)

    def identity(self) -> dict:
        """What identifies the files that techniques name, see `Switched.identity`."""
        given = ((each, each.value(self.values)) for each in switched_for(self.verb))
        return {technique.name: technique.identity(value) for technique, value in given if value}


class Loader:
    """Loads models by name, each path once. `ignored`: entries of config.json to read as absent."""

    def __init__(self, fetching: Fetching, ignored: Sequence[str], offline: bool):
        self.fetching, self.ignored, self.offline = fetching, ignored, offline
        self._loaded: dict[Path, Loaded] = {}

    def __call__(self, name: str) -> Loaded:
        """The model called `name`. Raises MlxeffError."""
        with self.fetching(f"fetching {name}", "B") as progress:
            path = hub.resolve(name, offline=self.offline, progress=progress)
        if path not in self._loaded:
            self._loaded[path] = load_path(path, dict.fromkeys(self.ignored))
        return self._loaded[path]


def arm_of(contender: Contender, load: Loader) -> tuple[Arm, Loaded]:
    """(The arm, its loaded model). Raises MlxeffError for options that the model does not support."""
    loaded = load(contender.model)
    options = run_options(contender.values)
    loaded.model.check(options)
    setup = switch_on(Setup(loaded.model, options=options), loaded, contender.values)
    loaded.model.check(setup.options)
    about = {"model": contender.model, "flags": contender.flags, "fingerprint": loaded.fingerprint}
    return Arm(contender.name, setup, about), loaded


def contenders(
    model: str, values: argparse.Namespace, others: Sequence[argparse.Namespace], verb: str
) -> list[Contender]:
    """The contenders of a command line: MODEL with its options, then those of each --vs, whose model is MODEL where
    none is named. Raises MlxeffError for contradictions and for two that are the same."""
    found = [Contender(model, values, verb)]
    found += [Contender(each.model or model, _with(each, offline=values.offline), verb) for each in others]
    for each in found:
        each.check()
    names = [each.name for each in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MlxeffError(f"{verb}: --vs: wanted another model or other options, got {twice!r} twice")
    return found


def _with(values: argparse.Namespace, **more) -> argparse.Namespace:
    return argparse.Namespace(**(vars(values) | more))
