"""Where drafts come from. A drafter proposes tokens that may follow a text; it never decides."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import mlx.core as mx

from ..cache import Cache, common_prefix
from ..decode import Model, prefill
from ..errors import MlxeffError
from ..kernels import PREFILL_STEP, device
from ..modules import parameter_bytes
from ..running import DRAFT_VIEW, EXACT, RunOptions
from ..sampling import LogitsProcessor, Sampler
from .verify import Drafted, is_greedy, processed, verify

NOTHING = Drafted(mx.zeros((0,), mx.uint32))
LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked up
SOME = 64  # unread tokens that a draft model reads in one pass with the first one of a draft


class Drafter(Protocol):
    """Something that proposes tokens."""

    def propose(
        self,
        text: list[int],
        most: int,
        cache: Cache,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
    ) -> Drafted:
        """Up to `most` tokens that may follow `text`, all tokens so far. `cache` is the verifying model's: it holds all
        of them but the last, and does so again afterwards."""

    def share(self, model: Model, cache: Cache) -> float:
        """The bytes that drafting a token reads at least, as a share of those that `model` reads for one with
        `cache`."""


class LookupDraft:
    """Prompt lookup, without a model: what followed the last occurrence of the newest tokens, the longest n-gram of
    LONGEST to SHORTEST tokens that occurred before."""

    def __init__(self):
        self._text: list[int] = []  # what the index covers
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram → position after its last occurrence that has a next token

    def propose(
        self,
        text: list[int],
        most: int,
        _cache: Cache | None = None,
        _sampler: Sampler | None = None,
        _processors: Sequence[LogitsProcessor] = (),
    ) -> Drafted:
        """See `Drafter.propose`. Each token is certain."""
        self._index(text)
        for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            if at := self._ends.get(tuple(text[-length:])):
                return Drafted(mx.array(text[at : at + most], mx.uint32)) if most > 0 else NOTHING
        return NOTHING

    def share(self, _model: Model, _cache: Cache) -> float:
        """See `Drafter.share`."""
        return 0.0

    def _index(self, text: list[int]) -> None:
        """Enter the n-grams of `text`; one that the index covers in part is entered from there on."""
        known = len(self._text)
        if text[:known] != self._text:
            self._ends, known = {}, 0
        for end in range(max(1, known), len(text)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(text[end - length : end])] = end
        self._text = list(text)


class ModelDraft:
    """Drafts of a model, of its first `vocabulary` tokens (None: of all). With `lookup`, the model does not compute
    each token of a draft in a pass of its own: it verifies what the lookup proposes, several tokens at once."""

    def __init__(
        self,
        model: Model,
        options: RunOptions = EXACT,
        lookup: LookupDraft | None = None,
        vocabulary: int | None = None,
    ):
        self.model, self.options, self.lookup, self.vocabulary = model, options, lookup, vocabulary
        self._cache: Cache | None = None
        self._held: list[int] = []  # the tokens in the cache
        self._counted: tuple[Model, int, int] | None = None  # a model, and the bytes of the weights of both

    def propose(
        self,
        text: list[int],
        most: int,
        _cache: Cache,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
    ) -> Drafted:
        """See `Drafter.propose`."""
        if self._cache is None:
            self._cache = self.model.new_cache(self.options.kv)
            if not self._cache.drops:
                raise MlxeffError("draft model: wanted a KV cache that drops tokens, this model's cannot")
        own, step = self._cache, PREFILL_STEP[device()]
        own.rewind(min(common_prefix(self._held, text[:-1]), own.length))
        if len(unread := text[own.length : -1]) > SOME:
            mx.eval(prefill(self.model, own, mx.array(unread), step, options=self.options))
        drafted = self._draft(text, most, own, sampler, processors)
        self._held = text[:-1]
        own.rewind(len(self._held))
        return drafted

    def share(self, model: Model, _cache: Cache) -> float:
        """See `Drafter.share`. The cache of the draft model is not counted; and what the lookup saves is not known."""
        own, other = self._weights(model)
        return 0.0 if self.lookup else own / other

    def _weights(self, model: Model) -> tuple[int, int]:
        """Bytes that this model and `model` read of their parameters for a token, which are counted once."""
        if self._counted is None or self._counted[0] is not model:
            self._counted = model, weight_bytes(self.model, self.options.fraction), weight_bytes(model)
        return self._counted[1:]

    def _draft(
        self, text: list[int], most: int, cache: Cache, sampler: Sampler, processors: Sequence[LogitsProcessor]
    ) -> Drafted:
        """Up to `most` tokens after `text`, of which `cache` holds the beginning. Appends to the cache."""
        if self.lookup is None:
            return self._one_by_one(text, most, cache, sampler, processors)
        tokens, rows, seen = [], [], list(text)
        while len(tokens) < most:
            guess, unread = self.lookup.propose(seen, most - len(tokens) - 1), seen[cache.length :]
            asked = mx.concatenate([mx.array(unread, mx.uint32), guess.tokens])
            logits = self.model(asked[None], cache, self.options)[0, len(unread) - 1 :, : self.vocabulary]
            found = verify(logits, guess, sampler, processors, mx.array(seen) if processors else None)
            seen += found.tokens
            tokens += found.tokens
            cache.rewind(len(seen) - 1)
            if not is_greedy(sampler):
                rows.append(sampler.distribution(found.logprobs[: len(found.tokens)]))
        return Drafted(mx.array(tokens, mx.uint32), mx.concatenate(rows) if rows else None)

    def _one_by_one(
        self, text: list[int], most: int, cache: Cache, sampler: Sampler, processors: Sequence[LogitsProcessor]
    ) -> Drafted:
        """As `_draft`, with one forward pass for each token."""
        asked, tokens, rows = mx.array(text[cache.length :], mx.uint32), [], []
        history, on_cpu = mx.array(text) if processors else None, device() == "cpu"
        for _ in range(most):
            logits = self.model.last_logits(asked[None], cache, self.options)[:, : self.vocabulary]
            logprobs = processed(logits, processors, history)
            asked = sampler(logprobs).astype(mx.uint32)
            tokens.append(asked)
            if processors:
                history = mx.concatenate([history, asked.astype(history.dtype)])
            if not is_greedy(sampler):
                rows.append(sampler.distribution(logprobs))
            if on_cpu:  # see `decode`: a step that still runs would make the next one copy the cache
                mx.eval(asked)
        return Drafted(mx.concatenate(tokens), mx.concatenate(rows) if rows else None)


class SelfDraft(ModelDraft):
    """Drafts of the verifying model's own cache, with its weights or a copy in fewer bits. By default in the view
    "draft", which is QuantSpec's draft (arXiv 2502.10424, section 4). The keys and values of a draft are overwritten
    when it is verified."""

    def __init__(
        self,
        model: Model,
        options: RunOptions = EXACT,
        lookup: LookupDraft | None = None,
        view: str = DRAFT_VIEW,
    ):
        super().__init__(model, replace(options, view=view), lookup)

    def propose(
        self,
        text: list[int],
        most: int,
        cache: Cache,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
    ) -> Drafted:
        """See `Drafter.propose`."""
        start, tally = cache.length, cache.tally.copy()
        try:
            return self._draft(text, most, cache, sampler, processors)
        finally:
            cache.rewind(start)
            cache.tally = tally

    def share(self, model: Model, cache: Cache) -> float:
        """See `Drafter.share`."""
        if self.lookup:
            return 0.0
        own, other = self._weights(model)
        return (own + cache.read_bytes(self.options.view)) / (other + cache.read_bytes())


def weight_bytes(model: Model, fraction: float = 1.0) -> int:
    """Bytes of its parameters that a model reads for a token of which the feed-forward networks compute a `fraction` of
    their neurons on average, where they can compute a part."""
    dynamic = [
        layer.feed_forward
        for layer in getattr(model, "layers", ())
        if hasattr(layer, "feed_forward") and hasattr(layer.feed_forward, "fractions")
    ]
    whole = parameter_bytes(model) - sum(parameter_bytes(each) for each in dynamic)
    return whole + sum(each.read_bytes(fraction) for each in dynamic)
