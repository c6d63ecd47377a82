"""Measures of quality: compare a model, or a KV Prediction pair, that reads a prompt with the base model.

A prompt of P tokens of the text is read into a cache, with or without KV Prediction. The C tokens that follow it are
scored by teacher forcing: the prompt's last token predicts the first of them, and the later ones attend to the cache. V
is the vocabulary size.
"""

import mlx.core as mx
import numpy as np

from mlxeff.cache import Cache
from mlxeff.decode import Setup
from mlxeff.errors import no_notices
from mlxeff.eval.measures import log_probabilities as of_logits
from mlxeff.kvprediction.predict import Refinement

STEP = 512  # prompt tokens a chunk


def logits(setup: Setup, prompt: mx.array, continuation: mx.array) -> mx.array:
    """Token ids (P,) and (C,) → logits (C, V) of the continuation's tokens."""
    cache = setup.new_cache()
    cache.reserve(len(prompt) + len(continuation))
    with no_notices():
        rows = [setup.read(prompt, cache, STEP)]
    if refinement := getattr(setup.reading, "refinement", None):
        rows += _refined(setup, refinement, cache, prompt.tolist(), continuation)
    scored = cache.length - len(prompt)
    if len(rest := continuation[scored:-1]):
        rows.append(setup.model(rest[None], cache, setup.options)[0])
    return mx.concatenate(rows)


def _refined(
    setup: Setup, refinement: Refinement, cache: Cache, tokens: list[int], continuation: mx.array
) -> list[mx.array]:
    """Yield the logits (1, V) of the next tokens one by one, with a refinement step after each, until the refinement
    ends.
    """
    rows = []
    for token in continuation[:-1].tolist():
        if refinement.done:
            break
        rows.append(setup.model.last_logits(mx.array([[token]]), cache, setup.options))
        mx.eval(rows[-1])
        tokens.append(token)
        refinement.step(tokens)
    return rows


def windows(ids: list[int], count: int, prompt: int, continuation: int) -> np.ndarray:
    """(count, P + C) token ids, evenly spread over the text, without overlap."""
    size = prompt + continuation
    if len(ids) < count * size:
        raise SystemExit(f"kvp_quality: wanted a text of {count * size} tokens for {count} windows, got {len(ids)}")
    starts = np.linspace(0, len(ids) - size, count).astype(int)
    return np.array([ids[start : start + size] for start in starts], np.int32)


def log_probabilities(setup: Setup, window: np.ndarray, prompt: int) -> mx.array:
    """Log-probabilities (C, V) of the window's continuation."""
    ids = mx.array(window)
    return of_logits(logits(setup, ids[:prompt], ids[prompt:]))
