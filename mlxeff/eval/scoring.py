"""Teacher forcing: given tokens are read as a prompt is read and an answer decoded, and what the model expected of each
is yielded.

The first tokens are read as a prompt, by the setup's own reading (such as KV Prediction). The others are computed in
passes of a stated number of tokens: 1 as plain decoding does, with the work that a reading does between two tokens. A
pass never has more tokens than the KV cache computes each as it would alone. Nothing is kept but the pass at hand.

C tokens of a pass, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..cache import Cache
from ..decode import Setup, Step, explained, launches_ahead
from ..errors import no_notices
from .measures import log_probabilities

STEP = 256  # tokens of a pass, where nothing else is asked for


class Forced:
    """One setup that reads the tokens `ids`, of which the first `prompt` are read at once, `step_size` in a chunk."""

    def __init__(self, setup: Setup, ids: Sequence[int], prompt: int, step_size: int):
        self.setup, self.ids, self.prompt = setup, list(ids), prompt
        with no_notices():  # they would come with each text
            self.cache = setup.new_cache()
            self.cache.reserve(len(self.ids))
            self.first = setup.read(mx.array(self.ids[:prompt]), self.cache, step_size)
        mx.eval(self.first, self.cache.arrays())

    def advance(self, start: int, count: int) -> mx.array:
        """Compute the tokens from index `start` on: log-probabilities (C, V) of those that follow each."""
        return forward(self.setup, self.cache, self.ids[start : start + count])

    def one_by_one(self) -> Iterator[mx.array]:
        """Yield log-probabilities (1, V) for each token after the prompt, as plain decoding computes them; the reading
        does its work between them."""
        steps = self.setup.reading.accompany(self._steps(), self.ids[: self.prompt])
        return (step.logprobs[None] for step in steps)

    def _steps(self) -> Iterator[Step]:
        """The given tokens as the steps of `decode`, which appends a token after it was yielded, on a GPU before."""
        logits, ahead = self.first, launches_ahead()
        for place in range(self.prompt, len(self.ids)):
            found = log_probabilities(logits)[0]
            mx.eval(found)
            if not ahead:
                yield Step(self.ids[place], found)
            if place + 1 < len(self.ids):
                token = mx.array([[self.ids[place]]])
                logits = self.setup.model.last_logits(token, self.cache, self.setup.options)
                mx.eval(logits)
            if ahead:
                yield Step(self.ids[place], found)


def forward(setup: Setup, cache: Cache, ids: Sequence[int]) -> mx.array:
    """Append the C tokens to the cache: log-probabilities (C, V) of those that follow each, evaluated."""
    found = log_probabilities(setup.model(mx.array([list(ids)]), cache, setup.options)[0])
    mx.eval(found)
    return found


class SideBySide:
    """Setups that read the tokens `ids` side by side, the first `prompt` ≥ 1 of them as a prompt in chunks of
    `step_sizes` tokens, the others in passes of at most `step`. Raises MlxeffError, also while it is iterated, where
    memory runs out or a kernel refuses its input."""

    def __init__(self, setups: Sequence[Setup], ids: Sequence[int], prompt: int, step: int, step_sizes: Sequence[int]):
        self.tokens, self.prompt, self.step = np.array(ids, np.int32), prompt, step
        with explained("scoring"):
            self._runs = [Forced(setup, ids, prompt, size) for setup, size in zip(setups, step_sizes, strict=True)]

    @property
    def caches(self) -> list[Cache]:
        """The cache of each setup."""
        return [run.cache for run in self._runs]

    def __iter__(self) -> Iterator[tuple[list[mx.array], np.ndarray]]:
        """Yield (for each setup the log-probabilities (C, V), the C tokens that came), for all tokens after the prompt,
        pass by pass."""
        with explained("scoring"):
            yield from self._one_by_one() if self.step == 1 else self._in_passes()

    def _one_by_one(self) -> Iterator[tuple[list[mx.array], np.ndarray]]:
        rows = zip(*(run.one_by_one() for run in self._runs), strict=True)
        for place, found in enumerate(rows, start=self.prompt):
            yield list(found), self.tokens[place : place + 1]

    def _in_passes(self) -> Iterator[tuple[list[mx.array], np.ndarray]]:
        yield [log_probabilities(run.first) for run in self._runs], self.tokens[self.prompt : self.prompt + 1]
        at, last = self.prompt, len(self.tokens) - 1  # the last token is scored and never read
        while at < last:
            limits = [cache.together for cache in self.caches if cache.together is not None]
            count = min(self.step, last - at, *limits)
            yield [run.advance(at, count) for run in self._runs], self.tokens[at + 1 : at + count + 1]
            at += count
