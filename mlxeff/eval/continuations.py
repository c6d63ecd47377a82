"""The log-likelihood of texts that may follow a context: what multiple choice and the adapter for
lm-evaluation-harness measure.

The context is read as a prompt, by the setup's own reading. Where the KV cache can drop tokens again it is read once
for all of its continuations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..cache import Cache
from ..decode import Setup, explained
from ..errors import MlxeffError
from ..tokenizer import Tokenizer
from .measures import log_probabilities, losses
from .scoring import Forced, SideBySide, forward
from .windows import bos_of


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: the sum of the log-probabilities of its tokens in nats, and whether each token was the most
    likely one."""

    total: float
    greedy: bool


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, with BOS before them where the tokenizer puts one, unless the text begins with it."""
    bos = bos_of(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, as lm-evaluation-harness splits them: spaces at the end of the
    context belong to the continuation, and this is what is left of both encoded together after the tokens of the
    context alone. An empty context is `prefix`. Raises MlxeffError for an empty continuation."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not continuation:
        raise MlxeffError("continuation: wanted a text, got an empty one")
    if not stripped:
        return [prefix(tokenizer)], tokenizer.encode(continuation, add_special_tokens=False)
    ids = encode(tokenizer, stripped)
    rest = encode(tokenizer, stripped + continuation)[len(ids) :]
    return ids, rest or tokenizer.encode(continuation, add_special_tokens=False)


def prefix(tokenizer: Tokenizer) -> int:
    """The token after which a text begins: BOS where the tokenizer puts one, else the end token of a text before.
    Raises MlxeffError where there is neither."""
    bos = bos_of(tokenizer)
    found = tokenizer.eos_token_id if bos is None else bos
    if found is None:
        raise MlxeffError("an empty context: wanted a tokenizer with BOS or EOS, got neither")
    return found


def likelihoods(
    setup: Setup, context: Sequence[int], continuations: Sequence[Sequence[int]], step: int, step_size: int
) -> tuple[list[Likelihood], Cache]:
    """(The likelihood of each continuation of the context, the cache of the last one). `context` has at least one
    token, as each continuation has. `step` and `step_size` as in `scoring`. Raises MlxeffError where memory runs
    out."""
    found, run = [], None
    for tokens in continuations:
        if step == 1:  # a reading that works between the steps changes the cache
            side = SideBySide([setup], [*context, *tokens], len(context), 1, [step_size])
            rows, cache = ((each[0], targets) for each, targets in side), side.caches[0]
        else:
            with explained("scoring"):
                if run is None or run.cache.rewind(len(context)) != len(context):
                    run = Forced(setup, context, len(context), step_size)
            rows, cache = _rows(run, tokens, step), run.cache
        with explained("scoring"):
            found.append(_likelihood(rows))
    return found, cache


def _rows(run: Forced, tokens: Sequence[int], step: int) -> Iterator[tuple[mx.array, np.ndarray]]:
    """Yield (log-probabilities (C, V), the C tokens that came) for `tokens` after what the run has read."""
    targets, at, last = np.array(tokens, np.int32), 0, len(tokens) - 1
    yield log_probabilities(run.first), targets[:1]
    while at < last:
        count = min(step, last - at, run.cache.together or step)
        yield forward(run.setup, run.cache, tokens[at : at + count]), targets[at + 1 : at + count + 1]
        at += count


def _likelihood(rows: Iterator[tuple[mx.array, np.ndarray]]) -> Likelihood:
    total, greedy = 0.0, True
    for found, targets in rows:
        total -= losses(found, targets).sum().item()
        greedy = greedy and bool((mx.argmax(found, axis=-1) == mx.array(targets)).all().item())
    return Likelihood(total, greedy)
