"""`Speculation`, the decode loop with drafts."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..cache import Cache
from ..decode import Model, Step, decode, explained, rewound_to
from ..errors import MlxeffError, notices
from ..running import EXACT, RunOptions
from ..sampling import LogitsProcessor, Sampler
from .control import Controller
from .drafters import Drafter
from .verify import verify

MOST = 7  # tokens of a draft: one pass of eight tokens reads weights and cache once (see cpu/README.md)


@dataclass
class Statistics:
    """What one answer cost and gave."""

    rounds: int = 0  # passes that verified a draft
    drafted: int = 0
    accepted: int = 0
    tested: int = 0  # drafted tokens up to the first that was wrong
    committed: int = 0  # tokens that these rounds gave
    plain: int = 0  # tokens that were decoded without a draft
    seconds: dict[str, float] = field(default_factory=lambda: {"draft": 0.0, "verify": 0.0, "plain": 0.0})


class Speculation:
    """The following with drafts, see `decode.Following`. It serves any cache whose tokens can be dropped.

    drafter  proposes the tokens
    name     key of its report
    fixed    tokens of each draft, 1 to MOST; None: the controller decides, and drafts none where that is faster
    known    reads what rounds cost in an earlier run (width → seconds), and `keep` takes what they cost in this one
    about    more entries of the report
    """

    def __init__(
        self,
        drafter: Drafter,
        name: str,
        fixed: int | None = None,
        known: Callable[[], Mapping[int, float]] = dict,
        keep: Callable[[Mapping[int, float]], None] = lambda _: None,
        about: Mapping[str, object] | None = None,
    ):
        if fixed is not None and not 1 <= fixed <= MOST:
            raise MlxeffError(f"draft tokens: wanted 1 to {MOST}, got {fixed}")
        self.drafter, self.name, self.fixed, self.about = drafter, name, fixed, dict(about or {})
        self._known, self._keep = known, keep
        self.statistics, self._controller = Statistics(), Controller(MOST, fixed)
        self._said = False  # whether a notice said that drafting does not pay

    def follow(
        self,
        model: Model,
        cache: Cache,
        logits: mx.array,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor] = (),
        history: mx.array | None = None,
        max_tokens: int = -1,
        options: RunOptions = EXACT,
    ) -> Iterator[Step]:
        """See `Following.follow`; `history` is needed."""
        if history is None or history.size < cache.length:
            raise MlxeffError("speculative decoding: wanted the ids of all tokens so far, got none")
        if not cache.drops:
            notices.warning("%s: this model's KV cache cannot drop tokens: decoded plainly", self.name)
        self.statistics, self._controller = Statistics(), Controller(MOST, self.fixed, self._known())
        start, yielded, text = cache.length, 0, history.tolist()
        try:
            with rewound_to(cache, lambda: start + max(0, yielded - 1)):
                for step in self._steps(model, cache, logits, sampler, processors, text, max_tokens, options):
                    yielded += 1
                    yield step
        finally:
            self._keep(self._controller.costs)

    def _steps(
        self,
        model: Model,
        cache: Cache,
        logits: mx.array,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        text: list[int],
        max_tokens: int,
        options: RunOptions,
    ) -> Iterator[Step]:
        """The steps; `text` grows with them. Between two rounds the cache holds all of it but the last token."""
        most = max_tokens if max_tokens >= 0 else sys.maxsize

        def plainly(logits: mx.array, count: int, began: float) -> Iterator[Step]:
            """`count` steps, the first one from `logits`, which were asked for when the clock showed `began`."""
            history, spent, got = mx.array(text) if processors else None, 0.0, 0
            for step in decode(model, cache, logits, sampler, processors, history, count, options):
                spent, got = spent + time.perf_counter() - began, got + 1
                text.append(step.token)
                yield step
                began = time.perf_counter()
            self.statistics.plain += got
            self.statistics.seconds["plain"] += spent
            if got > 1:
                self._controller.note_plain(got, spent)

        yield from plainly(logits, 1, time.perf_counter())
        while (left := most - self.statistics.plain - self.statistics.committed) > 0:
            if cache.drops:
                self._controller.share = self.drafter.share(model, cache)
            width, room = self._controller.width() if cache.drops else 0, cache.together
            width = min(width, left - 1, MOST if room is None else room - 1)
            if width < 1:
                self._say_off()
                count = min(self._controller.rest(), left)
                began = time.perf_counter()
                with explained("decoding"):
                    after = model.last_logits(mx.array(text[-1:])[None], cache, options)
                yield from plainly(after, count, began)
                continue
            yield from self._round(model, cache, sampler, processors, text, width, options)

    def _round(
        self,
        model: Model,
        cache: Cache,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        text: list[int],
        width: int,
        options: RunOptions,
    ) -> list[Step]:
        """Draft, verify and commit: the steps of one round."""
        start, began = cache.length, time.perf_counter()
        with explained("decoding"):
            drafted = self.drafter.propose(text, width, cache, sampler, processors)
            between = time.perf_counter()
            asked = mx.concatenate([mx.array(text[-1:], mx.uint32), drafted.tokens])
            logits = model(asked[None], cache, options)[0]
            found = verify(logits, drafted, sampler, processors, mx.array(text) if processors else None)
        cache.rewind(start + len(found.tokens))
        ended = time.perf_counter()
        text += found.tokens
        own = self.statistics
        own.rounds += 1
        own.drafted += len(drafted)
        own.accepted += found.accepted
        own.tested += min(found.accepted + 1, len(drafted))
        own.committed += len(found.tokens)
        own.seconds["draft"] += between - began
        own.seconds["verify"] += ended - between
        self._controller.note(width, len(drafted), found.accepted, ended - began)
        return [
            Step(token, found.logprobs[place], from_draft=place < found.accepted)
            for place, token in enumerate(found.tokens)
        ]

    def _say_off(self) -> None:
        """Say once that drafting does not pay."""
        if self._controller.off and not self._said:
            self._said = True
            notices.info("%s: plain decoding is faster here: drafting rests, and is tried again", self.name)

    def report(self) -> dict:
        """See `Part.report`."""
        own, controller = self.statistics, self._controller
        if not own.plain:
            return {}
        return {
            self.name: {
                **self.about,
                "rounds": own.rounds,
                "drafted_tokens": own.drafted,
                "accepted_tokens": own.accepted,
                "acceptance": _share(own.accepted, own.drafted),
                "acceptance_per_token": _share(own.accepted, own.tested),
                "tokens_per_round": _share(own.committed, own.rounds),
                "plain_tokens": own.plain,
                "widths": {str(width): count for width, count in sorted(controller.widths.items())},
                "round_ms": {str(width): round(1e3 * cost, 3) for width, cost in sorted(controller.costs.items())},
                "seconds": {name: round(spent, 4) for name, spent in own.seconds.items()},
                "off": controller.off,
            }
        }

    def summary(self) -> str:
        """See `Part.summary`."""
        own = self.statistics
        if not own.rounds:
            return f"{self.name}: nothing drafted" if self._controller.off else ""
        text = f"{self.name}: {own.committed / own.rounds:.2f} tokens a round"
        if own.drafted:
            text += f", {own.accepted / own.drafted:.0%} of {own.drafted} drafted tokens accepted"
        return text + (f", {own.plain} without a draft" if self._controller.off else "")


def _share(part: int, whole: int) -> float | None:
    """part / whole, rounded; None where there is no whole."""
    return round(part / whole, 4) if whole else None
