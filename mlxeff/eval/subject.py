"""What is measured: a model, and how it is run, from the options of the command line."""

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import hub, kernels, limits
from ..assembly.fitting import Progress
from ..assembly.model import Loaded, load_path
from ..assembly.techniques import (
    Scored,
    Unloaded,
    check_scored,
    check_switched,
    checked_before,
    run_options,
    switch_on,
    used,
)
from ..cache import Cache
from ..decode import Setup
from ..errors import MlxeffError, no_notices
from ..generation import require_memory
from ..running import Tally
from .measures import mean_report

LOGITS = 3 * 4  # bytes for each token and word of the vocabulary: logits, log-probabilities and a part of both


@dataclass
class Subject:
    """A loaded model, its setup, and what ran."""

    name: str
    loaded: Loaded
    setup: Setup
    values: argparse.Namespace  # the parsed options of the command line
    reports: list[dict] = field(default_factory=list)
    ran: Tally = field(default_factory=Tally)
    stored_as: str | None = None
    room: int = 0  # tokens for which there is memory
    scored: int = 0  # tokens for whose logits there is memory

    @property
    def step_size(self) -> int:
        """Prompt tokens that are computed at once."""
        return self.values.prefill_step or kernels.PREFILL_STEP[kernels.device()]

    def note(self, cache: Cache) -> None:
        """Note what computed the tokens in `cache`, and the statistics of the techniques; called after each text."""
        self.ran.update(cache.tally)
        self.stored_as = cache.stored_as
        self.reports.append(self.setup.report())

    def report(self) -> dict:
        """The model, the options that were in use, what ran, and the techniques' statistics, each the mean over all
        texts; for `--json` (docs/json.md)."""
        return {
            "model": self.name,
            "path": str(self.loaded.path),
            "fingerprint": self.loaded.fingerprint,
            "dtype": self.loaded.dtype,
            "kv_cache": self.values.kv_cache,
            "kv_dtype": self.stored_as,
            "techniques": used(self.values),
            **self.ran.report(),
            "statistics": mean_report(self.reports) if self.reports else {},
        }


def load(model: str, values: argparse.Namespace, progress: Progress, scored: Scored | None = None) -> Subject:
    """Load a model and run it as the values say. `scored` says how given tokens are read, and lets techniques refuse
    what cannot change that; None: the model generates. Raises MlxeffError."""
    check_switched(values)

    def check(found: Unloaded) -> None:
        checked_before(values)(found)
        if scored:
            check_scored(values, found, scored)

    with progress(f"fetching {model}", "B") as fetched:
        path = hub.resolve(model, offline=values.offline, progress=fetched)
    loaded = load_path(
        path,
        dict.fromkeys(values.ignore_keys),
        trust_remote_code=values.trust_remote_code,
        check=check,
    )
    return _subject(model, loaded, values)


def run_as(model: str, loaded: Loaded, values: argparse.Namespace, scored: Scored | None) -> Subject:
    """A loaded model, run as the values say; see `load`."""
    check_switched(values)
    if scored:
        check_scored(values, loaded, scored)
    return _subject(model, loaded, values)


def _subject(model: str, loaded: Loaded, values: argparse.Namespace) -> Subject:
    setup = switch_on(Setup(loaded.model, options=run_options(values)), loaded, values)
    loaded.model.check(setup.options)
    return Subject(model, loaded, setup, values)


def require_context(subjects: Sequence[Subject], tokens: int, what: str, step: int = 1) -> None:
    """Raises MlxeffError where a text of `tokens` does not fit into a model's context, or its KV cache into memory, or
    where the logits of `step` tokens do not, which are scored at once. `what` begins the message. The first call shows
    the notices of a new cache, which are hidden later."""
    rows = min(step, tokens)
    token = LOGITS * sum(subject.loaded.model.vocab_size or 0 for subject in subjects)
    if rows > max(1, min(subject.scored for subject in subjects)) and token:
        limits.require(rows * token, f"the logits of {rows} tokens", lambda have: f"--step {max(1, int(have / token))}")
        for subject in subjects:
            subject.scored = rows
    for subject in subjects:
        limit = subject.loaded.model.context_length
        if limit and tokens > limit:
            raise MlxeffError(f"{what}: wanted at most the context of {subject.name}, {limit} tokens, got {tokens}")
        if tokens > subject.room:
            with contextlib.nullcontext() if not subject.room else no_notices():
                cache = subject.setup.new_cache()
            require_memory(subject.setup.model, cache, tokens, subject.step_size, subject.setup.options)
            subject.room = tokens


def how(report: dict) -> str:
    """The model of a report of `Subject.report`, and how it was run, in words."""
    words = [f"{name} {label}" for name, label in report["techniques"].items()]
    words += [report["backend"] or "", f"compute {report['compute']}", f"KV cache {report['kv_dtype'] or 'of mlx-lm'}"]
    return f"{report['model']}, {', '.join(word for word in words if word)}"


def statistics(report: dict) -> list[str]:
    """The statistics of the techniques in a report of `Subject.report`, a line for each."""
    found = report["statistics"].items()
    return [f"{name}: {', '.join(f'{key} {value}' for key, value in each.items())}" for name, each in found]
