"""Training by gradient descent of a predictor, and of its auxiliary where that is tuned. The base is frozen.

This module has the settings, and draws the batch of each step: which tokens, and where the prompt ends in them. The
losses are in `losses`; the training loop, its optimiser and its checkpoint are in `mlxeff.training`. It knows neither
text nor the files of a pair.

Shapes: B batch, N tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import training
from ..errors import MlxeffError
from ..tuning import Tuned
from .losses import LOSSES, Truth, loss, predicted_part, truth
from .predictor import Predictor, Reading

ANSWER = 8  # the longest continuation, in tokens, of a prompt that ends at one of the given `ends`


class Trained(nn.Module):
    """All modules whose weights are trained: the predictor, and the tuned modules of the auxiliary, if any."""

    def __init__(self, predictor: Predictor, tuned: Tuned | None = None):
        super().__init__()
        self.predictor = predictor
        if tuned is not None:
            self.auxiliary = tuned.modules


@dataclass(frozen=True)
class Training(training.Training):
    """The settings of training a pair, beside those of every training.

    loss            one of LOSSES
    continuation    C, the tokens that follow a predicted prompt in `distill`
    consistency     λ; None: the default of the loss (see `losses`)
    auxiliary_loss  α, for a tuned auxiliary
    """

    loss: str = "paper"
    continuation: int = 64
    consistency: float | None = None
    auxiliary_loss: float = 1.0


def train(
    predictor: Predictor,
    auxiliary,
    base,
    sequences: Sequence[Sequence[int]],
    settings: Training,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    tuned: Tuned | None = None,
    ends: Sequence[int] = (),
) -> list[float]:
    """Train `predictor` in place, and with it the modules of `tuned` where the auxiliary is tuned. Returns the loss of
    each step.

    sequences             token ids; only the longest sequences, which have one length, are used
    ends                  for `distill`: where the prompts of every other step end, as positions in the used sequences
                          joined one after the other; a prompt ends before the token at such a position
    checkpoint, progress  as in `mlxeff.training.train`

    Raises MlxeffError for settings out of range and sequences that are too short, and as `mlxeff.training.train`.
    """
    check(sequences, settings)
    rows, trained, ends = _longest(sequences), Trained(predictor, tuned), np.array(sorted(ends), dtype=np.int64)
    return training.train(
        trained,
        _step(trained, auxiliary, base, settings),
        lambda index: _batch(rows, settings, ends, index),
        (rows, ends),
        settings,
        checkpoint,
        progress,
    )


def check(sequences: Sequence[Sequence[int]], settings: Training) -> None:
    """Raises MlxeffError for settings out of range, and for sequences that are too short for them."""
    if settings.loss not in LOSSES:
        raise MlxeffError(f"training: wanted a loss of {', '.join(LOSSES)}, got {settings.loss!r}")
    if settings.continuation < 1:
        raise MlxeffError(f"training: wanted a continuation of 1 token or more, got {settings.continuation}")
    length = max(map(len, sequences), default=0)
    least = 2 if settings.loss == "paper" else settings.continuation + 3
    if length < least:
        raise MlxeffError(f"training: wanted sequences of at least {least} tokens, got {length}")


def _longest(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The token ids of the longest sequences: (their number, their length)."""
    length = max(map(len, sequences))
    return np.array([list(ids) for ids in sequences if len(ids) == length], dtype=np.int32)


def _batch(rows: np.ndarray, settings: Training, ends: np.ndarray, index: int) -> tuple[mx.array, int]:
    """The tokens (B, N + 1) of step `index`, and the length C of their continuation, 0 for `paper`.

    For `paper` a batch consists of random `rows`. For `distill` it consists of random pieces of all rows, joined to one
    text. The pieces have one length, which is drawn for each step: between half of a row and a whole one, unless the
    continuation needs more. In every other step the prompts end at some of the positions `ends`, where answers begin,
    and at most ANSWER tokens follow: in a short continuation the first tokens of an answer weigh more.
    """
    chooser, flat = np.random.default_rng([settings.seed, index]), rows.reshape(-1)
    if settings.loss == "paper":
        return mx.array(rows[chooser.integers(0, len(rows), settings.batch)]), 0
    at_ends = index % 2 and len(ends)
    continuation = (
        int(chooser.integers(1, min(ANSWER, settings.continuation) + 1)) if at_ends else settings.continuation
    )
    length = chooser.integers(max(settings.continuation + 3, rows.shape[1] // 2), rows.shape[1] + 1)
    # A piece holds the prompt, which ends before position `end`, the continuation, and one more token, a target only.
    least, most = length - continuation - 1, len(flat) - continuation
    places = ends[(ends >= least) & (ends < most)] if at_ends else ()
    end = chooser.choice(places if len(places) else np.arange(least, most), settings.batch)
    return mx.array(flat[(end - least)[:, None] + np.arange(length)]), continuation


def _step(trained: Trained, auxiliary, base, settings: Training) -> Callable:
    """The function (tokens (B, N + 1), length of the continuation) → (loss, gradients) of one training step.

    The forward passes without gradients run outside of the differentiated function: the pass of the base that computes
    the targets, and the pass of an auxiliary that is not tuned.
    """
    usual = 1 / len(base.layers) if settings.loss == "paper" else 0.0
    consistency = usual if settings.consistency is None else settings.consistency
    tuned = "auxiliary" in trained
    weight = settings.auxiliary_loss if tuned else 0.0

    def value(tokens: mx.array, true: Truth, read: Reading | None) -> mx.array:
        return loss(trained.predictor, auxiliary, base, tokens, true, consistency, weight, read)

    differentiated = nn.value_and_grad(trained, value)

    def step(tokens: mx.array, continuation: int) -> tuple[mx.array, dict]:
        inputs, read = tokens[:, :-1], None
        if not tuned:
            known = predicted_part(inputs, settings.loss, continuation)
            read = trained.predictor.read(auxiliary, known, auxiliary.new_cache())
            mx.eval(read)
        return differentiated(tokens, truth(base, inputs, settings.loss, continuation), read)

    return step
