"""Gradient training of a pair: of the predictor, and of the auxiliary where it is tuned; the base is frozen.

What is minimised is in `losses`, the loop and its checkpoint in `mlxeff.training`. Here are the settings of a pair's
training, and how its batches are drawn: for a loss and a step's number, which tokens, and where a prompt ends in them.
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

ANSWER = 8  # the most tokens that continue a prompt which ends at a given place


class Trained(nn.Module):
    """All that training changes."""

    def __init__(self, predictor: Predictor, tuned: Tuned | None = None):
        super().__init__()
        self.predictor = predictor
        if tuned is not None:
            self.auxiliary = tuned.modules


@dataclass(frozen=True)
class Training(training.Training):
    """The settings of a pair's training.

    loss: one of LOSSES. continuation: the tokens C that `distill` continues a prompt with; the prompt takes from half
    of the rest of a sequence up to all of it. consistency: λ, None for the loss's own (`losses`). auxiliary_loss: α,
    for a tuned auxiliary.
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
    """Train `predictor` in place, and with it the modules of `tuned`, if the auxiliary is tuned; returns the loss of
    each step.

    sequences: token ids; only those of the largest length are used.
    ends: for `distill`, places where the prompts of every other step end. They count the tokens of the sequences that
    are used, one after the other; a prompt ends before the token of that number.
    checkpoint, progress: as of `mlxeff.training.train`, also for what is raised.
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
    """Refuse settings that are out of range, and sequences that are too short for them."""
    if settings.loss not in LOSSES:
        raise MlxeffError(f"training: wanted a loss of {', '.join(LOSSES)}, got {settings.loss!r}")
    if settings.continuation < 1:
        raise MlxeffError(f"training: wanted a continuation of 1 token or more, got {settings.continuation}")
    length = max(map(len, sequences), default=0)
    least = 2 if settings.loss == "paper" else settings.continuation + 3
    if length < least:
        raise MlxeffError(f"training: wanted sequences of at least {least} tokens, got {length}")


def _longest(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The sequences of the largest length, (…, N + 1)."""
    length = max(map(len, sequences))
    return np.array([list(ids) for ids in sequences if len(ids) == length], dtype=np.int32)


def _batch(rows: np.ndarray, settings: Training, ends: np.ndarray, index: int) -> tuple[mx.array, int]:
    """The tokens (B, N + 1) of the step of number `index`, and how many of them continue a prompt: 0 for `paper`.

    For `paper` a batch is some of the `rows`. For `distill` it is pieces of the rows joined to one text, all of one
    length, from half of a row's to all of it. In every other step their prompts end at some of the places `ends`, and
    at most ANSWER tokens follow: the answers to the prompts, each of which weighs more than in a long continuation.
    """
    chooser, flat = np.random.default_rng([settings.seed, index]), rows.reshape(-1)
    if settings.loss == "paper":
        return mx.array(rows[chooser.integers(0, len(rows), settings.batch)]), 0
    at_ends = index % 2 and len(ends)
    continuation = (
        int(chooser.integers(1, min(ANSWER, settings.continuation) + 1)) if at_ends else settings.continuation
    )
    length = chooser.integers(max(settings.continuation + 3, rows.shape[1] // 2), rows.shape[1] + 1)
    # A prompt ends before `end`: in a piece its last token, the continuation and one token more are not predicted.
    least, most = length - continuation - 1, len(flat) - continuation
    places = ends[(ends >= least) & (ends < most)] if at_ends else ()
    end = chooser.choice(places if len(places) else np.arange(least, most), settings.batch)
    return mx.array(flat[(end - least)[:, None] + np.arange(length)]), continuation


def _step(trained: Trained, auxiliary, base, settings: Training) -> Callable:
    """The function (tokens (B, N + 1), continuation) → (loss, gradients).

    The passes of frozen models run outside of the function that is differentiated: the base's own pass, and that of an
    auxiliary which is not tuned.
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
