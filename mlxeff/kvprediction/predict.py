"""Prefill with predicted keys and values, and their refinement while the answer is decoded.

The algorithm is the inference of CoreNet's `kv_prediction.py`. The auxiliary model reads the first N - 1 of N prompt
tokens. The predictor turns the auxiliary's keys and values into the base model's, which fill the base's cache. The base
then runs the last prompt token, and appends the keys and values that it computes for it.

Two options go beyond CoreNet. With `keep` and `sinks` the base itself computes the last and the first prompt tokens.
`Refinement` lets the base compute the predicted tokens, too, and replaces their keys and values chunk by chunk.

This module is handed both models and the predictor: it knows neither model families nor files.

Shapes: B batch, N prompt tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..cache import Cache
from ..decode import Progress, Step, prefill
from ..errors import MlxeffError, notices
from ..running import EXACT, RunOptions
from .predictor import KvModel, Pairs, Predictor

# With `keep`, the base also computes this many first tokens: they are attention sinks, which all later tokens attend to
# strongly (Xiao et al., arXiv 2309.17453).
SINKS = 4
REFINE_STEP = 64  # tokens that are refined between two decode steps


def predict(
    auxiliary: KvModel,
    predictor: Predictor,
    base: KvModel,
    tokens: mx.array,
    cache: Cache,
    step_size: int = 512,
    keep: int = 1,
    sinks: int = 0,
    progress: Progress | None = None,
    options: RunOptions = EXACT,
) -> mx.array:
    """Fill the empty `cache` of `base` with the prompt `tokens`, (N,) or (B, N). Returns the logits (B, V) of the last
    token, not yet evaluated.

    The base computes the last `keep` ≥ 1 tokens and the first `sinks` tokens. The keys and values of the others are
    predicted, and all tokens but the last `keep` are read by the auxiliary, in chunks of `step_size` tokens. Where no
    token is left to predict, this is `decode.prefill`. Raises MlxeffError for a cache that is not empty and for
    `keep` < 1.
    """
    if cache.length or keep < 1:
        raise MlxeffError(f"KV prediction: wanted an empty cache and keep ≥ 1, got {cache.length} tokens, keep {keep}")
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    total = tokens.shape[1]
    step_size = min(step_size, total)  # the end of an MLX slice must stay below 2^31
    first, stop = predicted_range(total, keep, sinks)
    if first == stop:
        return prefill(base, cache, tokens, step_size, progress, options)
    cache.reserve(total + 1)
    if first:
        base.last_logits(tokens[:, :first], cache, options)
    read = auxiliary.new_cache(options.kv)
    read.reserve(stop)
    for start in range(0, stop, step_size):
        if progress:
            progress(start, total)
        end = min(start + step_size, stop)
        reading = predictor.read(auxiliary, tokens[:, start:end], read, options)
        if cache.length < end:  # otherwise all tokens of this chunk are sinks, which the base has computed
            pairs = _without_first(predictor(reading, options.compute), cache.length - start)
            base.append_kv(pairs, cache, options)
        mx.eval(cache.arrays(), read.arrays())
    rest = progress and (lambda done, _: progress(stop + done, total))
    return prefill(base, cache, tokens[:, stop:], step_size, rest, options)


def predicted_range(total: int, keep: int, sinks: int) -> tuple[int, int]:
    """The positions [first, stop) of a prompt of `total` tokens whose keys and values are predicted."""
    stop = max(0, total - keep)
    return min(sinks, stop), stop


def _without_first(pairs: Pairs, tokens: int) -> Pairs:
    """The keys and values of each layer without those of the first `tokens` tokens."""
    return pairs if not tokens else [(keys[:, :, tokens:], values[:, :, tokens:]) for keys, values in pairs]


class Refinement:
    """Replaces predicted keys and values by the base's own, chunk by chunk between decode steps.

    Tokens that were decoded in the meantime attended to predicted keys and values: they are computed again, too. After
    the last step (`done`) the cache is therefore the one that the base alone would have computed for the same tokens.
    """

    def __init__(self, base: KvModel, cache, exact: int, step_size: int = REFINE_STEP, options: RunOptions = EXACT):
        """`exact`: how many first tokens of `cache` the base has computed. `step_size`: tokens in a chunk."""
        self.base, self.cache, self.exact, self.step_size, self.options = base, cache, exact, step_size, options
        self.done = False

    def step(self, tokens: Sequence[int]) -> None:
        """Compute the next chunk. `tokens` are the ids of all tokens in the cache. Does nothing after the last one."""
        if self.done:
            return
        end = min(self.exact + self.step_size, self.cache.length)
        with self.cache.rewound(self.exact):
            self.base.last_logits(mx.array([tokens[self.exact : end]]), self.cache, self.options)
        mx.eval(self.cache.arrays())
        self.exact, self.done = end, end == self.cache.length


@dataclass
class KvPrediction:
    """An auxiliary and a predictor as a `decode.Reading`: prefill with prediction, and refinement during the answer.

    name     of the pair, for messages
    keep     how many last prompt tokens the base computes, with the first SINKS ones; None: the last one, no sinks
    refine   whether the base also computes the predicted tokens, between the steps of the answer
    predicted_tokens, refined_tokens   counts for the last prompt
    """

    auxiliary: KvModel
    predictor: Predictor
    name: str
    keep: int | None = None
    refine: bool = False
    predicted_tokens: int = field(default=0, init=False)
    refined_tokens: int = field(default=0, init=False)
    refinement: Refinement | None = field(default=None, init=False, repr=False)  # for the last prompt; None without one

    def dialled(self, keep: int | None = None, refine: bool = False) -> "KvPrediction":
        """The same pair with other values of the options `keep` and `refine`."""
        return replace(self, keep=keep, refine=refine)

    @property
    def kept(self) -> tuple[int, int]:
        """(The number of last tokens, the number of first tokens) of a prompt that the base computes itself."""
        return (1, 0) if self.keep is None else (self.keep, SINKS)

    def predicted(self, total: int) -> tuple[int, int]:
        """The positions [first, stop) of a prompt of `total` tokens whose keys and values are predicted."""
        return predicted_range(total, *self.kept)

    def read(
        self,
        model: KvModel,
        cache: Cache,
        tokens: mx.array,
        step_size: int,
        progress: Progress | None = None,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """As `decode.prefill`, with prediction. Where `cache` holds tokens already, the base alone computes the prompt.

        Raises MlxeffError for a prompt that is longer than the context of the auxiliary.
        """
        total = tokens.shape[-1]
        self.predicted_tokens, self.refined_tokens, self.refinement = 0, 0, None
        if cache.length:
            notices.warning("KV prediction: not used: the cache holds %d tokens already", cache.length)
            return prefill(model, cache, tokens, step_size, progress, options)
        first, stop = self.predicted(total)
        if self.refine and not getattr(cache, "rewinds_exactly", True):
            text = f"wanted a KV cache that can be taken back to every token, got {cache.kind}"
            raise MlxeffError(f"KV prediction: {self.name}: refine: {text}")
        limit = getattr(self.auxiliary, "context_length", None)
        if limit and stop > limit:  # the auxiliary reads the first `stop` tokens
            text = f"wanted a prompt in the auxiliary's context of {limit} tokens, got {total}"
            raise MlxeffError(f"KV prediction: {self.name}: {text}")
        self.predicted_tokens = stop - first
        if not self.predicted_tokens:
            notices.info("KV prediction: not used: all %d prompt tokens are computed by the base", total)
        else:
            text = "KV prediction: the KV of %d of %d prompt tokens is predicted by %s, not computed%s"
            notices.info(text, stop - first, total, self.name, ", then refined" if self.refine else "")
            if self.refine:
                self.refinement = Refinement(model, cache, first, options=options)
        how = step_size, *self.kept, progress, options
        return predict(self.auxiliary, self.predictor, model, tokens, cache, *how)

    def accompany(self, steps: Iterator[Step], prompt: Sequence[int]) -> Iterator[Step]:
        """Pass on the steps of the answer to `prompt` unchanged, and refine one chunk after each of them."""
        tokens = list(prompt)
        with contextlib.closing(steps):
            for step in steps:
                tokens.append(step.token)
                yield step
                if self.refinement:
                    before = self.refinement.exact
                    self.refinement.step(tokens)
                    self.refined_tokens += self.refinement.exact - before

    def report(self) -> dict:
        """The options, and how many tokens of the last prompt were predicted and refined."""
        report = {"pair": self.name, "keep": self.keep, "refine": self.refine}
        counts = {"predicted_tokens": self.predicted_tokens, "refined_tokens": self.refined_tokens}
        return {"kv_prediction": report | counts}

    def summary(self) -> str:
        """How many tokens of the last prompt were predicted and refined, in a few words; "" where none was
        predicted."""
        if not self.predicted_tokens:
            return ""
        refined = f", {self.refined_tokens} refined" if self.refine else ""
        return f"KV of {self.predicted_tokens} tokens predicted{refined}"
