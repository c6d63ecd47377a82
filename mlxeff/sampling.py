"""Logits → probabilities → token. Pure functions on the last axis, which know nothing about models, caches or text.

`make_sampler` and `make_logits_processors` have mlx-lm's names and arguments. Sources: nucleus sampling, top-p
(Holtzman et al., arXiv 1904.09751), min-p (Nguyen et al., arXiv 2407.01082), repetition penalty (Keskar et al.,
arXiv 1909.05858). Shapes: B batch, V vocabulary, N tokens so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from . import kernels
from .errors import MlxeffError
from .ops import argmax, log_softmax, native_for

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens so far (N,), logits (B, V) → logits (B, V)

COLDEST = 1e-6  # lower temperatures are treated as 0 (greedy), since a division by them leaves float32's range


class Sampler(Protocol):
    """Log-probabilities (B, V) → tokens (B,). Plain decoding accepts any function with these shapes, as in mlx-lm.
    Speculative decoding, which accepts or rejects drafted tokens, also needs `distribution`."""

    def __call__(self, logprobs: mx.array) -> mx.array: ...

    def distribution(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities (…, V) after the logits processors → log-probabilities (…, V) of the distribution that the
        sampler draws from, float32; -inf for tokens that are never drawn."""


@dataclass(frozen=True)
class Sampling:
    """The sampler that `make_sampler` makes; the fields are its arguments."""

    temp: float
    top_p: float
    min_p: float
    top_k: int
    min_tokens_to_keep: int = 1

    @property
    def greedy(self) -> bool:
        return self.temp < COLDEST

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities (B, V) → tokens (B,)."""
        if self.greedy:
            return argmax(logprobs)
        filters = {"top_p": self.top_p, "min_p": self.min_p, "top_k": self.top_k}
        if self.native_for(logprobs):
            return sample_cpu(logprobs, self.temp, **filters)
        return sample_ops(logprobs, self.temp, min_tokens_to_keep=self.min_tokens_to_keep, **filters)

    def native_for(self, logits: mx.array) -> bool:
        """Whether the native kernel draws from such logits or log-probabilities."""
        return self.min_tokens_to_keep == 1 and native_for(logits)

    def distribution(self, logprobs: mx.array) -> mx.array:
        """See `Sampler.distribution`: log-probabilities filtered, divided by the temperature and normalised. A greedy
        sampler gives its token the probability 1."""
        logprobs = logprobs.astype(mx.float32)
        if self.greedy:
            return mx.where(mx.arange(logprobs.shape[-1]) == argmax(logprobs)[..., None], 0.0, -mx.inf)
        kept = filtered(logprobs, self.top_p, self.min_p, self.top_k, self.min_tokens_to_keep)
        return log_softmax(kept * (1 / self.temp))


def draw(sampler: Callable[[mx.array], mx.array], logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Logits (B, V) → (the drawn tokens (B,), the log-probabilities (B, V) that they were drawn from, their own ones
    (B,)). A token's own one is NaN or -inf where a logit is NaN or +inf, or all are -inf."""
    if isinstance(sampler, Sampling) and sampler.native_for(logits):
        return draw_cpu(sampler, logits)
    logprobs = log_softmax(logits)
    tokens = sampler(logprobs)
    return tokens, logprobs, mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def draw_cpu(sampler: "Sampling", logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """As `draw`, with the same tokens, in one native call that computes at once."""
    native, _ = kernels.native()
    uniform = None if sampler.greedy else mx.random.uniform(shape=logits.shape[:-1])
    temp = 0.0 if sampler.greedy else sampler.temp
    return native.next_token(logits, temp, sampler.top_k, sampler.top_p, sampler.min_p, uniform)


def make_sampler(
    temp: float = 0.0, top_p: float = 0.0, min_p: float = 0.0, min_tokens_to_keep: int = 1, top_k: int = 0
) -> Sampling:
    """A sampler: a callable from log-probabilities (B, V) to tokens (B,).

    temp                temperature; 0 (or less than COLDEST) is greedy
    top_p               keep the most probable tokens up to this total probability; 0: off
    min_p               drop tokens less probable than this share of the most probable one; 0: off
    min_tokens_to_keep  number of tokens that min_p keeps in any case
    top_k               keep so many of the most probable tokens; 0: off

    The filters are applied in the order top_p, min_p, top_k, before the temperature. Random numbers come from MLX's
    global state, so `mx.random.seed` makes the tokens repeatable; with one seed, the native CPU kernel and MLX's
    operations draw different tokens. Raises MlxeffError for values out of range.
    """
    _check("temperature", temp, 0 <= temp < math.inf, "0 or more")
    _check("top-p", top_p, 0 <= top_p <= 1, "0 to 1")
    _check("min-p", min_p, 0 <= min_p <= 1, "0 to 1")
    _check("top-k", top_k, isinstance(top_k, int) and top_k >= 0, "a whole number, 0 or more")
    _check("min_tokens_to_keep", min_tokens_to_keep, min_tokens_to_keep >= 1, "1 or more")
    return Sampling(temp, top_p, min_p, top_k, min_tokens_to_keep)


def filtered(logprobs: mx.array, top_p: float, min_p: float, top_k: int, min_tokens_to_keep: int = 1) -> mx.array:
    """Log-probabilities (…, V) with -inf for the tokens that a filter drops; arguments as in `make_sampler`."""
    if 0 < top_p < 1:
        logprobs = keep_top_p(logprobs, top_p)
    if min_p > 0:
        logprobs = keep_min_p(logprobs, min_p, min_tokens_to_keep)
    if 0 < top_k < logprobs.shape[-1]:
        logprobs = keep_top_k(logprobs, top_k)
    return logprobs


def sample_ops(
    logprobs: mx.array, temp: float, top_p: float, min_p: float, top_k: int, min_tokens_to_keep: int = 1
) -> mx.array:
    """Log-probabilities (B, V) → tokens (B,), with MLX's operations; arguments as in `make_sampler`."""
    return mx.random.categorical(filtered(logprobs, top_p, min_p, top_k, min_tokens_to_keep) * (1 / temp))


def sample_cpu(logprobs: mx.array, temp: float, top_p: float, min_p: float, top_k: int) -> mx.array:
    """Draw from the same distribution as `sample_ops` with the native kernel (cpu/rows/sampling.cpp), which sorts no
    row. It inverts the cumulative distribution at one uniform random number per row, so with one seed its tokens differ
    from those of `sample_ops`."""
    native, _ = kernels.native()
    return native.sample(logprobs, mx.random.uniform(shape=logprobs.shape[:-1]), temp, top_k, top_p, min_p)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Log-probabilities (…, V) with -inf for all tokens but the `top_k` most probable ones, exactly so many."""
    dropped = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, dropped, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Log-probabilities (…, V) with -inf for all tokens but the smallest set of most probable ones whose total
    probability reaches `top_p`; at least one token is kept."""
    order = mx.argsort(-logprobs, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(logprobs, order, axis=-1).astype(mx.float32), axis=-1)
    mass_before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept_sorted = mass_before < top_p
    kept = mx.put_along_axis(mx.zeros(logprobs.shape, mx.bool_), order, kept_sorted, axis=-1)
    return mx.where(kept, logprobs, -mx.inf)


def keep_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Log-probabilities (…, V) with -inf for tokens less probable than `min_p` times the most probable one; the
    `min_tokens_to_keep` most probable tokens are kept in any case."""
    lowest = logprobs.max(axis=-1, keepdims=True) + mx.log(mx.array(min_p, mx.float32))
    if min_tokens_to_keep > 1:
        kth = mx.topk(logprobs, min(min_tokens_to_keep, logprobs.shape[-1]), axis=-1).min(axis=-1, keepdims=True)
        lowest = mx.minimum(lowest, kth)
    return mx.where(logprobs < lowest, -mx.inf, logprobs)


def make_logits_processors(
    logit_bias: dict[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = 20,
    presence_penalty: float | None = None,
    presence_context_size: int | None = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int | None = 20,
) -> list[LogitsProcessor]:
    """Functions (ids of the tokens so far (N,), logits (B, V)) → logits (B, V), to be applied in the order given.

    logit_bias           token id → number to add to its logit
    repetition_penalty   positive logits of recent tokens are divided by it, negative ones multiplied
    presence_penalty     subtracted from the logits of recent tokens, once for each token
    frequency_penalty    subtracted from the logits of recent tokens, once for each occurrence
    …_context_size       how many of the last tokens count as recent; None: all

    Penalties that are None or 0 are off. Raises MlxeffError for values out of range.
    """
    for count in (repetition_context_size, presence_context_size, frequency_context_size):
        _check("context size", count, count is None or count > 0, "1 or more, or None")
    processors: list[LogitsProcessor] = []
    if logit_bias:
        ids, values = mx.array(list(logit_bias)), mx.array(list(logit_bias.values()))
        processors.append(lambda _, logits: logits.at[:, ids].add(values.astype(logits.dtype)))
    if repetition_penalty is not None and repetition_penalty != 0:
        processors.append(_repetition(repetition_penalty, repetition_context_size))
    if presence_penalty:
        processors.append(_presence(presence_penalty, presence_context_size))
    if frequency_penalty:
        processors.append(_frequency(frequency_penalty, frequency_context_size))
    return processors


def _last(tokens: mx.array, count: int | None) -> mx.array:
    return tokens if count is None else tokens[-count:]


def _change(logits: mx.array, tokens: mx.array, change: Callable[[mx.array], mx.array]) -> mx.array:
    """Logits (B, V) with `change` applied to the logits of `tokens` (N,), once however often a token occurs."""
    columns = mx.broadcast_to(tokens, (logits.shape[0], tokens.shape[0]))
    return mx.put_along_axis(logits, columns, change(mx.take_along_axis(logits, columns, axis=-1)), axis=-1)


def _repetition(penalty: float, context: int | None) -> LogitsProcessor:
    """See `make_logits_processors`; source: arXiv 1909.05858, section 4.1."""
    _check("repetition penalty", penalty, penalty > 0, "more than 0")

    def soften(chosen: mx.array) -> mx.array:
        return mx.where(chosen < 0, chosen * penalty, chosen / penalty)

    return lambda tokens, logits: _change(logits, _last(tokens, context), soften)


def _presence(penalty: float, context: int | None) -> LogitsProcessor:
    """See `make_logits_processors`; OpenAI's presence penalty."""
    return lambda tokens, logits: _change(logits, _last(tokens, context), lambda chosen: chosen - penalty)


def _frequency(penalty: float, context: int | None) -> LogitsProcessor:
    """See `make_logits_processors`; OpenAI's frequency penalty."""
    return lambda tokens, logits: logits.at[:, _last(tokens, context)].subtract(penalty)


def _check(name: str, value: float, valid: bool, wanted: str) -> None:
    if not valid:
        raise MlxeffError(f"{name}: wanted {wanted}, got {value}")
