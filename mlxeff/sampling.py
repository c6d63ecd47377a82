"""Logits → probabilities → token: pure functions on the last axis, free of models, caches and text.

The makers have mlx-lm's names and arguments, so its users keep their calls. Sources: temperature, top-k, nucleus top-p
(Holtzman et al., arXiv 1904.09751), min-p (Nguyen et al., arXiv 2407.01082), repetition penalty (Keskar et al.,
arXiv 1909.05858).
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

COLDEST = 1e-6  # temperatures below are greedy: dividing by them leaves float32's range


class Sampler(Protocol):
    """Log-probabilities (B, V) → tokens (B,). Any function of that shape serves plain decoding, as in mlx-lm; what
    accepts and rejects drafted tokens asks for the distribution too."""

    def __call__(self, logprobs: mx.array) -> mx.array: ...

    def distribution(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities (…, V), after the logits processors → those of the distribution that the tokens are drawn
        from, (…, V) float32, -inf for what is never drawn."""


@dataclass(frozen=True)
class Sampling:
    """The sampler of `make_sampler`."""

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
        if self.min_tokens_to_keep == 1 and native_for(logprobs):
            return sample_cpu(logprobs, self.temp, **filters)
        return sample_ops(logprobs, self.temp, min_tokens_to_keep=self.min_tokens_to_keep, **filters)

    def distribution(self, logprobs: mx.array) -> mx.array:
        """As `Sampler.distribution`: filtered, divided by the temperature, normalised; if greedy, one certain token."""
        logprobs = logprobs.astype(mx.float32)
        if self.greedy:
            return mx.where(mx.arange(logprobs.shape[-1]) == argmax(logprobs)[..., None], 0.0, -mx.inf)
        kept = filtered(logprobs, self.top_p, self.min_p, self.top_k, self.min_tokens_to_keep)
        return log_softmax(kept * (1 / self.temp))


def make_sampler(
    temp: float = 0.0, top_p: float = 0.0, min_p: float = 0.0, min_tokens_to_keep: int = 1, top_k: int = 0
) -> Sampling:
    """A sampler: call it with log-probabilities (B, V) for tokens (B,).

    `temp` 0 (or below COLDEST) is greedy. `top_p`, `min_p`, `top_k` of 0 are off; they filter in that order, before
    the temperature. Draws come from MLX's global random state, so `mx.random.seed` makes them repeatable (on a CPU,
    with the native kernels and without them each).
    """
    _check("temperature", temp, 0 <= temp < math.inf, "0 or more")
    _check("top-p", top_p, 0 <= top_p <= 1, "0 to 1")
    _check("min-p", min_p, 0 <= min_p <= 1, "0 to 1")
    _check("top-k", top_k, isinstance(top_k, int) and top_k >= 0, "a whole number, 0 or more")
    _check("min_tokens_to_keep", min_tokens_to_keep, min_tokens_to_keep >= 1, "1 or more")
    return Sampling(temp, top_p, min_p, top_k, min_tokens_to_keep)


def filtered(logprobs: mx.array, top_p: float, min_p: float, top_k: int, min_tokens_to_keep: int = 1) -> mx.array:
    """Log-probabilities (…, V) with -inf for the tokens that the filters drop."""
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
    """Tokens (B,) of log-probabilities (B, V) after the filters, by MLX's operations on whole rows."""
    return mx.random.categorical(filtered(logprobs, top_p, min_p, top_k, min_tokens_to_keep) * (1 / temp))


def sample_cpu(logprobs: mx.array, temp: float, top_p: float, min_p: float, top_k: int) -> mx.array:
    """The same distribution by the native kernel (cpu/rows/sampling.cpp), which sorts no row.

    It inverts the distribution function at one uniform number a row: one seed draws other tokens than in `sample_ops`.
    """
    native, _ = kernels.native()
    return native.sample(logprobs, mx.random.uniform(shape=logprobs.shape[:-1]), temp, top_k, top_p, min_p)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Set all but exactly the `top_k` largest of the last axis to -inf."""
    dropped = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, dropped, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep the smallest set of most probable tokens whose mass reaches `top_p`; always at least one."""
    order = mx.argsort(-logprobs, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(logprobs, order, axis=-1).astype(mx.float32), axis=-1)
    mass_before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept_sorted = mass_before < top_p
    kept = mx.put_along_axis(mx.zeros(logprobs.shape, mx.bool_), order, kept_sorted, axis=-1)
    return mx.where(kept, logprobs, -mx.inf)


def keep_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Drop tokens less probable than `min_p` times the most probable one, but keep `min_tokens_to_keep`."""
    floor = logprobs.max(axis=-1, keepdims=True) + mx.log(mx.array(min_p, mx.float32))
    if min_tokens_to_keep > 1:
        kth = mx.topk(logprobs, min(min_tokens_to_keep, logprobs.shape[-1]), axis=-1).min(axis=-1, keepdims=True)
        floor = mx.minimum(floor, kth)
    return mx.where(logprobs < floor, -mx.inf, logprobs)


def make_logits_processors(
    logit_bias: dict[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = 20,
    presence_penalty: float | None = None,
    presence_context_size: int | None = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int | None = 20,
) -> list[LogitsProcessor]:
    """The functions `(tokens, logits) → logits` that the options ask for, in the order of the arguments."""
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
    """Logits (B, V) with those of `tokens` (N,) put through `change`, once a token however often it occurs."""
    columns = mx.broadcast_to(tokens, (logits.shape[0], tokens.shape[0]))
    return mx.put_along_axis(logits, columns, change(mx.take_along_axis(logits, columns, axis=-1)), axis=-1)


def _repetition(penalty: float, context: int | None) -> LogitsProcessor:
    """Divide positive, multiply negative logits of recent tokens by `penalty`."""
    _check("repetition penalty", penalty, penalty > 0, "more than 0")

    def soften(chosen: mx.array) -> mx.array:
        return mx.where(chosen < 0, chosen * penalty, chosen / penalty)

    return lambda tokens, logits: _change(logits, _last(tokens, context), soften)


def _presence(penalty: float, context: int | None) -> LogitsProcessor:
    """Subtract `penalty` once from every recent token (OpenAI's presence penalty)."""
    return lambda tokens, logits: _change(logits, _last(tokens, context), lambda chosen: chosen - penalty)


def _frequency(penalty: float, context: int | None) -> LogitsProcessor:
    """Subtract `penalty` for every time a recent token occurred (OpenAI's frequency penalty)."""
    return lambda tokens, logits: logits.at[:, _last(tokens, context)].subtract(penalty)


def _check(name: str, value: float, valid: bool, wanted: str) -> None:
    if not valid:
        raise MlxeffError(f"{name}: wanted {wanted}, got {value}")
