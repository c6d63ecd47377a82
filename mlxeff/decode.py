"""The decode loop: `prefill` fills a cache from prompt tokens, `decode` yields one `Step` a token. Knows nothing
about text.

On the way from prompt to text only this module evaluates, and a technique's own prefill or loop. One token is always in
flight: the next step is launched before the present one is read, so the host never holds up the device beyond the token
itself. On a CPU it is launched when the present one is complete: a step in flight holds the cache's buffers, and the
next one would have to copy them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .errors import MlxeffError
from .kernels import device
from .ops import log_softmax
from .sampling import LogitsProcessor, Sampler

Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)


@dataclass
class Step:
    """One decoded token; `logprobs` (V,) are lazy, after the logits processors, before the sampler."""

    token: int
    logprobs: mx.array
    from_draft: bool = False


def prefill(model, cache, tokens: mx.array, step_size: int, progress: Progress | None = None) -> mx.array:
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
        logits = model.last_logits(chunk, cache)
        if start + step_size < total:
            mx.eval(cache.arrays())
    return logits


def decode(
    model,
    cache,
    logits: mx.array,
    sampler: Sampler,
    processors: Sequence[LogitsProcessor] = (),
    history: mx.array | None = None,
    max_tokens: int = -1,
) -> Iterator[Step]:
    """Yield up to `max_tokens` steps (-1: without end) that follow `logits` (1, V).

    `history` (N,) are the tokens before, for the processors. Whenever the consumer stops, the cache holds the prompt
    and every yielded token but the last: a step in flight is trimmed away.
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
                logits = model.last_logits(token[:, None], cache)
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
        surplus = cache.length - start - max(0, yielded - 1)
        if surplus and cache.trimmable:
            cache.trim(surplus)


def _pick(logits: mx.array, sampler: Sampler, processors: Sequence[LogitsProcessor], history: mx.array | None):
    for process in processors:
        logits = process(history, logits)
    logprobs = log_softmax(logits)
    return sampler(logprobs), logprobs
