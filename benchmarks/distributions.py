"""Compare the next-token distributions of a model with those of another model and with the text. C tokens, V
vocabulary.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np


def compare(found: mx.array, truth: mx.array, targets: np.ndarray) -> dict:
    """Compare log-probabilities (C, V) at the C tokens `targets`. Returns sums over the tokens of the negative
    log-likelihood, of KL(truth ‖ found), both in nats, and of equal most likely tokens; and the KL and agreement of the
    first token.
    """
    nll = -mx.take_along_axis(found, mx.array(targets)[:, None], axis=-1)[:, 0]
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


def means(compared: Sequence[dict]) -> dict:
    """Perplexity, mean KL divergence and share of equal first choices over all tokens of some `compare`s."""
    tokens, nll, kl, same = (sum(each[key] for each in compared) for key in ("tokens", "nll", "kl", "same"))
    return {"perplexity": math.exp(nll / tokens), "kl": kl / tokens, "agreement": same / tokens}
