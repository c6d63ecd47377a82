"""Verification of drafted tokens, without models or caches.

Shapes: n drafted tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..decode import NOT_FINITE
from ..errors import MlxeffError
from ..ops import log_softmax
from ..sampling import LogitsProcessor, Sampler


@dataclass
class Drafted:
    """Drafted tokens (n,), and the log-probabilities (n, V) of the distributions that they were drawn from, after the
    logits processors and the sampler's filters; None where each token was certain, as in greedy drafting."""

    tokens: mx.array
    rows: mx.array | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass
class Verified:
    """`tokens`: the accepted part of a draft and the token after it. `logprobs` (n + 1, V) belong to them in order,
    with rows left over: log-probabilities after the logits processors."""

    tokens: list[int]
    logprobs: mx.array

    @property
    def accepted(self) -> int:
        return len(self.tokens) - 1


def processed(logits: mx.array, processors: Sequence[LogitsProcessor], history: mx.array | None) -> mx.array:
    """Logits (1, V) after `history`, the ids (N,) of all tokens before → log-probabilities (1, V)."""
    for process in processors:
        logits = process(history, logits)
    return log_softmax(logits)


def is_greedy(sampler: Sampler) -> bool:
    """Whether the sampler always takes the most probable token."""
    return getattr(sampler, "greedy", False)


def verify(
    logits: mx.array,
    drafted: Drafted,
    sampler: Sampler,
    processors: Sequence[LogitsProcessor] = (),
    history: mx.array | None = None,
) -> Verified:
    """Accept the longest possible part of a draft.

    `logits` (n + 1, V) are the model's: row i for the token after i drafted ones. `history` are the ids (N,) of all
    tokens before the draft, needed where there are processors. A sampler without `distribution` may be any function: a
    drafted token is then accepted where the sampler draws the same one. Raises MlxeffError where logits of an accepted
    or following token are not finite.
    """
    if processors:
        seen = [mx.concatenate([history, drafted.tokens[:i].astype(history.dtype)]) for i in range(len(drafted) + 1)]
        rows = [processed(logits[i : i + 1], processors, each) for i, each in enumerate(seen)]
        logprobs = mx.concatenate(rows)
    else:
        logprobs = log_softmax(logits)
    if is_greedy(sampler) or not hasattr(sampler, "distribution"):
        tokens, accepted = _matching(sampler(logprobs), drafted.tokens)
    else:
        tokens, accepted = _rejecting(sampler.distribution(logprobs), drafted)
    own = mx.take_along_axis(logprobs, tokens[:, None].astype(mx.int32), axis=1)[:, 0]
    mx.eval(tokens, accepted, own, logprobs)
    count = accepted.item() + 1
    if not mx.isfinite(own[:count]).all().item():
        raise MlxeffError(NOT_FINITE)
    return Verified(tokens[:count].tolist(), logprobs)


def _matching(drawn: mx.array, drafted: mx.array) -> tuple[mx.array, mx.array]:
    """(Tokens (n + 1,), number of accepted ones) where the model itself has drawn a token after each drafted one: the
    drafted ones are accepted as long as they are the drawn ones."""
    return drawn, _leading(drawn[:-1] == drafted)


def _rejecting(target: mx.array, drafted: Drafted) -> tuple[mx.array, mx.array]:
    """(Tokens (n + 1,), number of accepted ones) by rejection sampling (arXiv 2211.17192, algorithm 1): token d of a
    draft from q is accepted with the probability min(1, p(d) / q(d)); the first one that is not is replaced by one from
    max(p - q, 0), normalised. `target` (n + 1, V) are the log-probabilities of p. Of the tokens, those after the first
    rejection mean nothing."""
    count, vocabulary = len(drafted), target.shape[1]
    columns = drafted.tokens[:, None].astype(mx.int32)
    p = mx.take_along_axis(target[:count], columns, axis=1)[:, 0]
    if drafted.rows is None:
        q, of_draft = mx.zeros_like(p), (mx.arange(vocabulary) == columns).astype(mx.float32)
    else:
        q, of_draft = mx.take_along_axis(drafted.rows, columns, axis=1)[:, 0], mx.exp(drafted.rows)
    accepted = _leading(mx.log(mx.random.uniform(shape=(count,))) < p - q)
    # Where rounding leaves nothing of p - q, a rejection has no probability either: any distribution will do.
    rest = mx.maximum(mx.exp(target[:count]) - of_draft, 0)
    rest = mx.where(rest.sum(axis=1, keepdims=True) > 0, mx.log(rest), target[:count])
    replacements = mx.random.categorical(mx.concatenate([rest, target[count:]]))
    kept = mx.concatenate([drafted.tokens.astype(replacements.dtype), replacements[-1:]])
    return mx.where(mx.arange(count + 1) < accepted, kept, replacements), accepted


def _leading(right: mx.array) -> mx.array:
    """The number of leading true values of an array (n,)."""
    return mx.cumprod(right.astype(mx.int32)).sum().astype(mx.int32) if right.size else mx.array(0, mx.int32)
