"""The decode loop: `prefill` fills a KV cache from the prompt, `decode` yields one `Step` for each new token.

A technique can replace either part: an object with the protocol `Reading` stands in for `prefill`, one with the
protocol `Following` for `decode`. A `Setup` joins a model with both parts. This module knows nothing about text.

MLX builds graphs lazily. Between prompt and text, the only code that evaluates them is here or in a technique's own
reading or following. On a GPU, `decode` launches the step for the next token before it yields the current one, so that
the GPU never waits for Python. A cache may replace its buffers at any append: a step that was launched earlier keeps
the buffers that it was built on. On a CPU, a step begins when its token is asked for: Python would only take time from
it, and a step that still runs refers to the cache's buffers, which the next one would have to copy.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from . import memory
from .cache import Cache
from .errors import MlxeffError
from .kernels import device
from .running import EXACT, RunOptions
from .sampling import LogitsProcessor, Sampler, draw

NOT_FINITE = (
    "decoding: wanted logits without NaN and +inf, one above -inf, got others: a weight is damaged, or a sum left the "
    "range of half precision"
)
Progress = Callable[[int, int], None]  # called with (prompt tokens done, prompt tokens in total)


class Model(Protocol):
    """A language model, as the decode loop and generation use it. B batch, S tokens, V vocabulary."""

    seams: frozenset[str]  # names of the places where a technique can plug in, explained in models/__init__.py
    vocab_size: int | None  # rows of the embedding table; None where unknown
    context_length: int | None  # tokens; None where unknown

    def new_cache(self, kind: str | None = None) -> Cache:
        """An empty cache; `kind` as in `RunOptions.kv`."""

    def __call__(self, tokens: mx.array, cache: Cache, options: RunOptions = EXACT) -> mx.array:
        """Ids (B, S) of the tokens that follow the cached ones → logits (B, S, V). Appends the tokens to `cache`."""

    def last_logits(self, tokens: mx.array, cache: Cache, options: RunOptions = EXACT) -> mx.array:
        """As `__call__`, but the logits of the last position only, (B, V)."""

    def check(self, options: RunOptions) -> None:
        """Raises MlxeffError for options that this model does not support on this machine."""


def require_seam(model: Model, seam: str, technique: str) -> None:
    """Raises MlxeffError where `model` lacks the place `seam` at which `technique` plugs in."""
    if seam not in model.seams:
        kind = getattr(model, "config", None)
        kind = kind.get("model_type") if isinstance(kind, dict) else type(model).__module__.rpartition(".")[2]
        raise MlxeffError(f"{technique} needs the {seam} seam, which {kind!r} (run through mlx-lm) does not have")


@dataclass
class Step:
    """One decoded token."""

    token: int
    logprobs: mx.array  # (V,), not yet evaluated: log-probabilities after the logits processors, before the sampler
    from_draft: bool = False  # whether a draft model proposed the token (speculative decoding)


class Part(Protocol):
    """The statistics that a `Reading` and a `Following` give of the last prompt and its answer."""

    def report(self) -> dict:
        """{name of the technique: its statistics} for `--json`; {} where no technique takes part."""

    def summary(self) -> str:
        """The statistics in a few words; "" where there is nothing to say."""


class Reading(Part, Protocol):
    """The way in which a prompt is read into the cache."""

    def read(
        self,
        model: Model,
        cache: Cache,
        tokens: mx.array,
        step_size: int,
        progress: Progress | None = None,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """As `prefill`: same arguments, same result."""

    def accompany(self, steps: Iterator[Step], prompt: Sequence[int]) -> Iterator[Step]:
        """Pass on the steps of the answer to `prompt` unchanged. A reading that has work left does it between them."""


class Following(Part, Protocol):
    """The way in which the tokens of the answer are decoded, once the prompt is in the cache."""

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
        """As `decode`: same arguments, same result."""


def prefill(
    model: Model,
    cache: Cache,
    tokens: mx.array,
    step_size: int,
    progress: Progress | None = None,
    options: RunOptions = EXACT,
) -> mx.array:
    """Run the prompt `tokens`, ids (N,) or (B, N) with N ≥ 1, through the model in chunks of `step_size` tokens.

    Returns the logits of the last position, (1, V) or (B, V), not yet evaluated. Of all chunks but the last only the
    cache is evaluated, so their logits are never computed. `progress` is called before each chunk.
    """
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    total = tokens.shape[1]
    step_size = min(step_size, total)  # MLX's slices end at 2^31 - 1
    cache.reserve(total + 1)
    for start in range(0, total, step_size):
        if progress:
            progress(start, total)
        chunk = tokens[:, start : start + step_size]
        logits = model.last_logits(chunk, cache, options)
        if start + step_size < total:
            mx.eval(cache.arrays())
    return logits


def launches_ahead() -> bool:
    """Whether `decode` appends a token to the cache before it yields it, and not after."""
    return device() != "cpu"


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
    """Yield up to `max_tokens` steps (-1: without end). The first token is drawn from `logits` (1, V), the prompt's.

    `history` are the ids (N,) of all tokens so far, for the logits processors. When the consumer stops, early or at the
    end, the cache contains the prompt and every yielded token but the last: the token of a step that was launched ahead
    is dropped again, where the cache can drop tokens. Raises MlxeffError where logits are not finite, and where a
    native kernel refuses its input.
    """
    start, yielded, ahead = cache.length, 0, launches_ahead()

    def launch(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        drawn = _next_token(logits, sampler, processors, history)
        mx.async_eval(*drawn)
        return drawn

    with explained("decoding"), rewound_to(cache, lambda: start + max(0, yielded - 1)):
        current, following = launch(logits), None
        while yielded != max_tokens:
            token, logprobs, own = current
            more = yielded + 1 != max_tokens
            if processors and more:
                history = mx.concatenate([history, token])
            if ahead and more:
                following = launch(model.last_logits(token[:, None], cache, options))
            if not math.isfinite(own.item()):
                raise MlxeffError(NOT_FINITE)
            yielded += 1
            drawn = token.item()
            yield Step(drawn, logprobs[0])
            if more:
                current = following if ahead else launch(model.last_logits(mx.array([[drawn]]), cache, options))


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises MlxeffError for errors at evaluation inside of the block: of memory, or of a kernel that refuses logits of
    NaN. `what` is done there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := memory.failure(error)) is None:
            raise
        raise MlxeffError(NOT_FINITE if "sample: wanted logits" in str(error) else f"{what}: {reason}") from error


@contextlib.contextmanager
def rewound_to(cache: Cache, length: Callable[[], int]) -> Iterator[None]:
    """After the block `cache` has at most `length()` tokens."""
    try:
        yield
    finally:
        if cache.length > length():
            cache.rewind(length())


def _next_token(
    logits: mx.array, sampler: Sampler, processors: Sequence[LogitsProcessor], history: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Logits (1, V) → the token that is drawn from them after the processors, as in `sampling.draw`."""
    for process in processors:
        logits = process(history, logits)
    return draw(sampler, logits)


class PlainPart:
    """A part without statistics."""

    def report(self) -> dict:
        return {}

    def summary(self) -> str:
        return ""


class PlainReading(PlainPart):
    """The reading without a technique: the model computes every token of the prompt (`prefill`)."""

    read = staticmethod(prefill)

    def accompany(self, steps: Iterator[Step], _prompt: Sequence[int]) -> Iterator[Step]:
        """The steps unchanged: this reading leaves no work for later."""
        return steps


class PlainFollowing(PlainPart):
    """The following without a technique: each forward pass decodes one token (`decode`)."""

    follow = staticmethod(decode)


@dataclass
class Setup:
    """A model and the way in which it is run, for generation, benchmarks and measurements of quality.

    Reading and following keep statistics of the last prompt, so one setup serves one generation at a time.
    """

    model: Model
    reading: Reading = field(default_factory=PlainReading)
    following: Following = field(default_factory=PlainFollowing)
    options: RunOptions = EXACT

    def new_cache(self) -> Cache:
        """An empty cache of the kind that the options name."""
        return self.model.new_cache(self.options.kv)

    def read(self, tokens: mx.array, cache: Cache, step_size: int, progress: Progress | None = None) -> mx.array:
        """Read the prompt `tokens` into `cache` by the setup's reading; arguments and result as in `prefill`."""
        return self.reading.read(self.model, cache, tokens, step_size, progress, self.options)

    def report(self) -> dict:
        """The statistics of reading and following, see `Part.report`."""
        return self.reading.report() | self.following.report()

    def summary(self) -> list[str]:
        """The summaries of reading and following, without empty ones."""
        return [text for part in (self.reading, self.following) if (text := part.summary())]
