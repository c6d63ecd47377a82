"""The decode loop: `prefill` fills a cache from prompt tokens, `decode` yields one `Step` a token; and the protocols by
which a technique takes the place of either, `Reading` and `Following`. Knows nothing about text.

On the way from prompt to text only this module evaluates, and a technique's own reading or following. One token is
always in flight: the next step is launched before the present one is read, so the host never holds up the device beyond
the token itself. On a CPU it is launched when the present one is complete: a step in flight holds the cache's buffers,
and the next one would have to copy them. A cache may change its storage at any append: a step in flight keeps what it
was given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from .cache import Cache
from .errors import MlxeffError
from .kernels import device
from .ops import log_softmax
from .running import EXACT, RunOptions
from .sampling import LogitsProcessor, Sampler

Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)


class Model(Protocol):
    """What the decode loop and generation need of a model."""

    seams: frozenset[str]  # where a technique can plug in (models/__init__.py)
    vocab_size: int | None  # rows of the embedding table, where known
    context_length: int | None  # tokens, where known

    def new_cache(self, kind: str | None = None) -> Cache:
        """An empty cache; `kind` as in `RunOptions.kv`."""

    def __call__(self, tokens: mx.array, cache: Cache, options: RunOptions = EXACT) -> mx.array:
        """Token ids (B, S) that follow what `cache` holds → logits (B, S, V)."""

    def last_logits(self, tokens: mx.array, cache: Cache, options: RunOptions = EXACT) -> mx.array:
        """The same for the last position only, (B, V)."""

    def check(self, options: RunOptions) -> None:
        """Raises MlxeffError for options that this model does not have here."""


def require_seam(model: Model, seam: str, technique: str) -> None:
    """Refuse, in one line, to use `technique` on a model that has no such seam."""
    if seam not in model.seams:
        kind = getattr(model, "config", None)
        kind = kind.get("model_type") if isinstance(kind, dict) else type(model).__module__.rpartition(".")[2]
        raise MlxeffError(f"{technique} needs the {seam} seam, which {kind!r} (run through mlx-lm) does not have")


@dataclass
class Step:
    """One decoded token; `logprobs` (V,) are lazy, after the logits processors, before the sampler."""

    token: int
    logprobs: mx.array
    from_draft: bool = False


class Part(Protocol):
    """What a reading and a following tell of themselves."""

    def report(self) -> dict:
        """{name of the technique: what it did to the last prompt and answer}, for `--json`; {} of the plain parts."""

    def summary(self) -> str:
        """The same in a few words, "" where there is nothing to say."""


class Reading(Part, Protocol):
    """How a prompt gets into the cache."""

    def read(
        self,
        model: Model,
        cache: Cache,
        tokens: mx.array,
        step_size: int,
        progress: Progress | None = None,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """As `prefill`."""

    def accompany(self, steps: Iterator[Step], prompt: Sequence[int]) -> Iterator[Step]:
        """The same steps, which follow `prompt`, with what the reading has left to do between them."""


class Following(Part, Protocol):
    """How tokens follow what the cache holds."""

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
        """As `decode`."""


def prefill(
    model: Model,
    cache: Cache,
    tokens: mx.array,
    step_size: int,
    progress: Progress | None = None,
    options: RunOptions = EXACT,
) -> mx.array:
    """Run `tokens` (N,) or (B, N), N ≥ 1, through the model in chunks of `step_size`; returns the last token's logits
    (1, V) or (B, V), lazy.

    Chunks but the last evaluate only the cache: their logits are never computed.
    """
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    total = tokens.shape[1]
    cache.reserve(total + 1)
    for start in range(0, total, step_size):
        if progress:
            progress(start, total)
        chunk = tokens[:, start : start + step_size]
        logits = model.last_logits(chunk, cache, options)
        if start + step_size < total:
            mx.eval(cache.arrays())
    return logits


def decode(
    model: Model,
    cache: Cache,
    logits: mx.array,
    sampler: Sampler,
    processors: Sequence[LogitsProcessor] = (),
    history: mx.array | None = None,
    max_tokens: int = -1,
    options: RunOptions = EXACT,
) -> Iterator[Step]:
    """Yield up to `max_tokens` steps (-1: without end) that follow `logits` (1, V).

    `history` (N,) are the tokens before, for the processors. Whenever the consumer stops, the cache holds the prompt
    and every yielded token but the last: a step in flight is taken back, where the cache can.
    """
    start, yielded, on_cpu = cache.length, 0, device() == "cpu"
    try:
        token, logprobs = _pick(logits, sampler, processors, history)
        mx.async_eval(token, logprobs)
        while yielded != max_tokens:
            if yielded + 1 != max_tokens:
                if processors:
                    history = mx.concatenate([history, token])
                if on_cpu:
                    mx.eval(token)
                logits = model.last_logits(token[:, None], cache, options)
                following = _pick(logits, sampler, processors, history)
                mx.async_eval(*following)
            yielded += 1
            yield Step(token.item(), logprobs[0])
            if yielded != max_tokens:
                token, logprobs = following
    except RuntimeError as error:  # what a kernel refuses, such as logits that are not numbers, is known when it runs
        if not str(error).startswith("native kernel: "):
            raise
        raise MlxeffError(f"decoding: {error}") from error
    finally:
        wanted = start + max(0, yielded - 1)
        if cache.length > wanted:
            cache.rewind(wanted)


def _pick(logits: mx.array, sampler: Sampler, processors: Sequence[LogitsProcessor], history: mx.array | None):
    for process in processors:
        logits = process(history, logits)
    logprobs = log_softmax(logits)
    return sampler(logprobs), logprobs


class PlainPart:
    """Has nothing to tell."""

    def report(self) -> dict:
        return {}

    def summary(self) -> str:
        return ""


class PlainReading(PlainPart):
    """The model computes every token of the prompt."""

    read = staticmethod(prefill)

    def accompany(self, steps: Iterator[Step], _prompt: Sequence[int]) -> Iterator[Step]:
        """The steps as they are: nothing is left to do."""
        return steps


class PlainFollowing(PlainPart):
    """One token a pass of the model."""

    follow = staticmethod(decode)


@dataclass
class Setup:
    """A model and how it is run: what generation, the benchmarks and the measures of quality take.

    The parts keep counts of the last prompt: one setup serves one generation at a time.
    """

    model: Model
    reading: Reading = field(default_factory=PlainReading)
    following: Following = field(default_factory=PlainFollowing)
    options: RunOptions = EXACT

    def new_cache(self) -> Cache:
        """An empty cache of the kind that the options name."""
        return self.model.new_cache(self.options.kv)

    def read(self, tokens: mx.array, cache: Cache, step_size: int, progress: Progress | None = None) -> mx.array:
        """Fill `cache` from the prompt `tokens` (N,) or (B, N); returns the last logits (1, V) or (B, V), lazy."""
        return self.reading.read(self.model, cache, tokens, step_size, progress, self.options)

    def report(self) -> dict:
        """What both parts tell."""
        return self.reading.report() | self.following.report()

    def summary(self) -> list[str]:
        """What both parts tell in a few words."""
        return [text for part in (self.reading, self.following) if (text := part.summary())]
