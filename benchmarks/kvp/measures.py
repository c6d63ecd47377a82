"""Measures of quality: compare a model, or a KV Prediction pair, that reads a prompt with the base model.

A prompt of P tokens of the text is read into a cache, with or without KV Prediction. The C tokens that follow it are
scored by teacher forcing, as `mlxeff eval` does it: the prompt's last token predicts the first of them, and the later
ones attend to the cache. V is the vocabulary size.
"""

import mlx.core as mx
import numpy as np

from mlxeff.decode import Setup
from mlxeff.eval.scoring import SideBySide

STEP = 512  # prompt tokens a chunk


def windows(ids: list[int], count: int, prompt: int, continuation: int) -> np.ndarray:
    """(count, P + C) token ids, evenly spread over the text, without overlap."""
    size = prompt + continuation
    if len(ids) < count * size:
        raise SystemExit(f"kvp_quality: wanted a text of {count * size} tokens for {count} windows, got {len(ids)}")
    starts = np.linspace(0, len(ids) - size, count).astype(int)
    return np.array([ids[start : start + size] for start in starts], np.int32)


def log_probabilities(setup: Setup, window: np.ndarray, prompt: int) -> mx.array:
    """Log-probabilities (C, V) of the window's continuation: in one pass, with a refinement token by token."""
    step = 1 if getattr(setup.reading, "refine", False) else len(window)
    run = SideBySide([setup], window.tolist(), prompt, step, [STEP])
    return mx.concatenate([rows for (rows,), _ in run])
