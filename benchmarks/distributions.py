"""How near a model's next-token distributions are to another one's and to the text. C tokens, V vocabulary."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np


def compare(found: mx.array, truth: mx.array, targets: np.ndarray) -> dict:
    """Sums over the C tokens `targets` of log-probabilities (C, V): negative log-likelihood and KL(truth ‖ found) in
    nats, how often the first choices agree; and KL and agreement of the first token."""
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
