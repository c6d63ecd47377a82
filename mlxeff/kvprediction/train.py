"""Gradient training of the predictor, and of the auxiliary where it is tuned (`tuning`); the base is frozen. Same seed
and text, same pair to the bit, also when it was killed and resumed on the way. `losses` says what is minimised.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint import save_arrays
from ..errors import MlxeffError, notices
from .losses import LOSSES, Truth, loss, predicted_part, truth
from .predictor import Predictor, Reading
from .tuning import Tuned

BETAS, LAST_RATE, CLIP = (0.9, 0.95), 0.1, 1.0  # of Adam; the final learning rate's share of `rate`; gradient norm
ANSWER = 8  # tokens of a continuation where prompts end at given places


class Trained(nn.Module):
    """All that training changes."""

    def __init__(self, predictor: Predictor, tuned: Tuned | None = None):
        super().__init__()
        self.predictor = predictor
        if tuned is not None:
            self.auxiliary = tuned.modules


@dataclass(frozen=True)
class Training:
    """`steps` of `batch` sequences; `rate` is Adam's highest learning rate, reached after `warmup` steps.
    `loss`, one of LOSSES; `continuation`: tokens C that `distill` continues with, after a prompt of half of what a
    sequence has room for, up to all. `consistency`: λ, None for the loss's own (`losses`). `auxiliary_loss`: α, for a
    tuned auxiliary. `every`: steps between two checkpoints."""

    steps: int
    batch: int = 1
    rate: float = 3e-4
    warmup: int = 20
    loss: str = "paper"
    continuation: int = 64
    consistency: float | None = None
    auxiliary_loss: float = 1.0
    seed: int = 0
    every: int = 50


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
    """Train `predictor` in place on `sequences` of token ids of one length, and what is `tuned` of the auxiliary;
    returns the loss of each step.

    ends: for `distill`, places where prompts shall end in every other step, in the sequences of full length one after
    the other: before the token of that index.
    checkpoint: a file to write every `every` steps and to go on from; one of other settings or text is refused.
    """
    check(sequences, settings)
    rows, trained = _full(sequences), Trained(predictor, tuned)
    optimizer = optim.Adam(schedule(settings), betas=list(BETAS), bias_correction=True)
    optimizer.init(trained.trainable_parameters())
    ends = np.array(sorted(ends), dtype=np.int64)
    mark = _mark(settings, rows, ends, trained)
    losses = _restore(checkpoint, mark, trained, optimizer) if checkpoint else []
    if losses:
        notices.info("training: goes on after step %d of %d, from %s", len(losses), settings.steps, checkpoint)
    step = _step(trained, auxiliary, base, settings)
    for index in range(len(losses), settings.steps):
        value, gradients = step(*_batch(rows, settings, ends, index))
        gradients, _ = optim.clip_grad_norm(gradients, CLIP)
        optimizer.update(trained, gradients)
        mx.eval(trained.parameters(), optimizer.state, value)
        losses.append(_finite(value.item(), index))
        if checkpoint and ((index + 1) % settings.every == 0 or index + 1 == settings.steps):
            _save(checkpoint, mark, trained, optimizer, losses)
        if progress:
            progress(index + 1, settings.steps)
    if not all(mx.isfinite(value).all().item() for _, value in tree_flatten(trained.trainable_parameters())):
        raise MlxeffError("training: wanted finite weights after the last step, got others: lower the learning rate")
    return losses


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


def _full(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The sequences of full length, (…, N + 1)."""
    length = max(map(len, sequences))
    return np.array([list(ids) for ids in sequences if len(ids) == length], dtype=np.int32)


def _batch(rows: np.ndarray, settings: Training, ends: np.ndarray, index: int) -> tuple[mx.array, int]:
    """The tokens (B, N + 1) of a step, and how many of them continue a prompt: 0 in the paper's loss.

    For `distill` these are pieces of all sequences one after the other, of one length from half of theirs up. In every
    other step the prompts end where `ends` says, and only up to ANSWER tokens follow, which weigh the more.
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
    """(tokens (B, N + 1), continuation) → (loss, gradients). What is frozen runs outside of what is differentiated: the
    base's own pass, and the auxiliary's where it is not tuned."""
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


def _finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise MlxeffError(f"training: step {step + 1}: wanted a finite loss, got {value}: lower the learning rate")
    return value


def schedule(settings: Training) -> Callable[[mx.array], mx.array]:
    """Linear to `rate` over `warmup` steps, then by a cosine to a tenth of it."""

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)  # it is unsigned
        rising = (step + 1) / max(1, settings.warmup)
        done = mx.clip((step - settings.warmup) / max(1, settings.steps - settings.warmup), 0, 1)
        falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + mx.cos(math.pi * done))
        return settings.rate * mx.minimum(rising, falling)

    return rate


def _mark(settings: Training, rows: np.ndarray, ends: np.ndarray, trained: Trained) -> str:
    """What tells one training from another."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode() + rows.tobytes() + ends.tobytes())
    for name, value in tree_flatten(trained.parameters()):
        digest.update(name.encode() + np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


def _save(path: Path, mark: str, trained: Trained, optimizer: optim.Optimizer, losses: list[float]) -> None:
    arrays = {f"trained.{name}": value for name, value in tree_flatten(trained.parameters())}
    arrays |= {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
    save_arrays(path, arrays, {"mark": mark, "losses": json.dumps(losses)}, "the training's checkpoint")


def _restore(path: Path, mark: str, trained: Trained, optimizer: optim.Optimizer) -> list[float]:
    """Put the state of a checkpoint in place; returns its losses, none where there is no checkpoint."""
    if not path.exists():
        return []
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(arrays)
    except RuntimeError as error:
        raise MlxeffError(f"{path}: wanted a training's checkpoint, got {str(error).splitlines()[0]}") from error
    if metadata.get("mark") != mark:
        raise MlxeffError(
            f"{path}: wanted a checkpoint of this training ({mark}), got {metadata.get('mark')}: delete it"
        )
    parts = {"trained": [], "optimizer": []}
    for name, value in arrays.items():
        kind, _, rest = name.partition(".")
        parts[kind].append((rest, value))
    trained.update(tree_unflatten(parts["trained"]))
    optimizer.state = tree_unflatten(parts["optimizer"])
    return json.loads(metadata["losses"])
