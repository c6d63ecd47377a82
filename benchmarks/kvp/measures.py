"""Measures of quality: a model, or a pair of KV Prediction, that reads a prompt, against the base model.

A prompt of P tokens of the text goes into a cache, by prediction or not; the C tokens that follow it are scored by
teacher forcing. The continuation's first token comes from the prompt's last one, the others attend to the cache. V is
the vocabulary.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxeff.decode import prefill
from mlxeff.kvprediction import KvPrediction
from mlxeff.kvprediction.predict import SINKS, Refinement, predict, predicted_range

STEP = 512  # prompt tokens a chunk


@dataclass(frozen=True)
class Reader:
    """What continues a text: a model alone, or with a `pair`, of which `keep` and `refine` are the dials."""

    model: object
    pair: KvPrediction | None = None
    keep: int | None = None
    refine: bool = False

    @property
    def kept(self) -> tuple[int, int]:
        """(last tokens, first tokens) of a prompt that the model computes itself."""
        return (1, 0) if self.keep is None else (self.keep, SINKS)

    def logits(self, prompt: mx.array, continuation: mx.array) -> mx.array:
        """Token ids (P,) and (C,) → logits (C, V) of the continuation's tokens."""
        cache = self.model.new_cache()
        cache.reserve(len(prompt) + len(continuation))
        if self.pair is None:
            first = prefill(self.model, cache, prompt, STEP)
        else:
            models = self.pair.auxiliary, self.pair.predictor, self.model
            first = predict(*models, prompt, cache, STEP, *self.kept)
        rows = [first]
        if self.refine:
            rows += self._refined(cache, prompt.tolist(), continuation)
        scored = cache.length - len(prompt)
        if len(rest := continuation[scored:-1]):
            rows.append(self.model(rest[None], cache)[0])
        return mx.concatenate(rows)

    def _refined(self, cache, tokens: list[int], continuation: mx.array) -> list[mx.array]:
        """Logits (1, V) of the next tokens, one by one with a step of the refinement after each, until it is done."""
        refinement = Refinement(self.model, cache, predicted_range(len(tokens), *self.kept)[0])
        rows = []
        for token in continuation[:-1].tolist():
            if refinement.done:
                break
            rows.append(self.model.last_logits(mx.array([[token]]), cache))
            mx.eval(rows[-1])
            tokens.append(token)
            refinement.step(tokens)
        return rows

    def dialled(self) -> KvPrediction | None:
        """The pair with its dials set, for `stream_generate`."""
        if self.pair is None:
            return None
        return KvPrediction(self.pair.auxiliary, self.pair.predictor, self.pair.name, self.keep, self.refine)


def windows(ids: list[int], count: int, prompt: int, continuation: int) -> np.ndarray:
    """(count, P + C) token ids, evenly spread over the text, without overlap."""
    size = prompt + continuation
    if len(ids) < count * size:
        raise SystemExit(f"kvp_quality: wanted a text of {count * size} tokens for {count} windows, got {len(ids)}")
    starts = np.linspace(0, len(ids) - size, count).astype(int)
    return np.array([ids[start : start + size] for start in starts], np.int32)


def log_probabilities(reader: Reader, window: np.ndarray, prompt: int) -> mx.array:
    """(C, V) of the window's continuation."""
    ids = mx.array(window)
    logits = reader.logits(ids[:prompt], ids[prompt:]).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def compare(found: mx.array, truth: mx.array, targets: np.ndarray) -> dict:
    """Sums over a continuation of log-probabilities (C, V): negative log-likelihood and KL(truth ‖ found) in nats, how
    often the first choices agree; and KL and agreement of its first token."""
    wanted = mx.array(targets)[:, None]
    nll = -mx.take_along_axis(found, wanted, axis=-1)[:, 0]
    kl = (mx.exp(truth) * (truth - found)).sum(-1)
    same = mx.argmax(found, axis=-1) == mx.argmax(truth, axis=-1)
    mx.eval(nll, kl, same)
    return {
        "tokens": len(targets),
        "nll": nll.sum().item(),
        "kl": kl.sum().item(),
        "same": same.sum().item(),
        "first_kl": kl[0].item(),
        "first_same": int(same[0].item()),
    }
