"""Token sequences that are sampled from a model, to fit a predictor on where no text is given. Knows no tokenizer."""

import mlx.core as mx

from ..ops import log_softmax
from ..sampling import make_sampler

BATCH = 16  # sequences that are sampled together


def sample(model, start: int, tokens: int, length: int, seed: int) -> list[list[int]]:
    """Sequences of `length` token ids each, with `tokens` token ids in all; the last sequence may be shorter.

    Each begins with the token `start`, followed by tokens sampled from the model at temperature 1. The same `seed`
    gives the same sequences.
    """
    mx.random.seed(seed)
    lengths = [min(length, tokens - at) for at in range(0, tokens, length)]
    drawn = []
    for at in range(0, len(lengths), BATCH):
        part = lengths[at : at + BATCH]
        rows = _draw(model, start, len(part), max(part)).tolist()
        drawn += [row[:count] for row, count in zip(rows, part, strict=True)]
    return drawn


def _draw(model, start: int, batch: int, length: int) -> mx.array:
    """Sample `batch` sequences of `length` tokens together: token ids (batch, length)."""
    sampler, cache = make_sampler(temp=1.0), model.new_cache()
    cache.reserve(length)
    ids = [mx.full((batch, 1), start, mx.uint32)]
    for _ in range(length - 1):
        following = sampler(log_softmax(model.last_logits(ids[-1], cache)))
        ids.append(following[:, None].astype(mx.uint32))
        mx.eval(ids[-1])
    return mx.concatenate(ids, axis=1)
