"""The training loop: Adam with a schedule of its learning rate and clipped gradients, which can be killed at any time.

The same settings and data give the same weights to the bit, also when the training was killed and resumed from its
checkpoint on the way. Knows neither losses nor text: it is handed a function that computes a step's loss and gradients,
and one that gives a step's batch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .checkpoint import save_arrays
from .errors import MlxeffError, notices
from .names import readable_by_mlx

BETAS = (0.9, 0.95)  # of Adam
LAST_RATE = 0.1  # the last learning rate, as a share of the highest one
CLIP = 1.0  # the largest norm of all gradients together


@dataclass(frozen=True)
class Training:
    """The settings of a training; one with more settings is a subclass.

    steps: of the optimiser. batch: sequences a step. rate: Adam's highest learning rate, reached after `warmup` steps.
    seed: of the random choices that batches are drawn with. every: steps between two checkpoints.
    """

    steps: int
    batch: int = 1
    rate: float = 3e-4
    warmup: int = 20
    seed: int = 0
    every: int = 50


def train(
    trained: nn.Module,
    step: Callable[..., tuple[mx.array, dict]],
    batch: Callable[[int], tuple],
    data: Iterable[np.ndarray],
    settings: Training,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train the parameters of `trained` in place; returns the loss of each step.

    step: what `batch` gives → (loss, gradients of `trained`), as `nn.value_and_grad` returns them.
    batch: the number of a step, from 0 → the arguments of `step`; the same number must always give the same ones.
    data: all arrays that batches are made of. They tell one training from another, as do the settings and the weights
    that `trained` begins with.
    checkpoint: a file that is written after every `settings.every` steps and after the last one. Where it exists, the
    training goes on from it.
    progress: called after each step with the number of steps done and of all.

    Raises MlxeffError for a loss or a weight that is not finite, and for a checkpoint of another training.
    """
    optimizer = optim.Adam(schedule(settings), betas=list(BETAS), bias_correction=True)
    optimizer.init(trained.trainable_parameters())
    mark = _mark(settings, data, trained)
    losses = _restore(checkpoint, mark, trained, optimizer) if checkpoint else []
    if losses:
        notices.info("training: goes on after step %d of %d, from %s", len(losses), settings.steps, checkpoint)
    for index in range(len(losses), settings.steps):
        value, gradients = step(*batch(index))
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


def schedule(settings: Training) -> Callable[[mx.array], mx.array]:
    """The number of a step → its learning rate: linear to `rate` over `warmup` steps, then a cosine to LAST_RATE of it
    at the last step."""

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)  # Adam counts in unsigned integers, whose differences are never negative
        rising = (step + 1) / max(1, settings.warmup)
        done = mx.clip((step - settings.warmup) / max(1, settings.steps - settings.warmup), 0, 1)
        falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + mx.cos(math.pi * done))
        return settings.rate * mx.minimum(rising, falling)

    return rate


def _finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise MlxeffError(f"training: step {step + 1}: wanted a finite loss, got {value}: lower the learning rate")
    return value


def _mark(settings: Training, data: Iterable[np.ndarray], trained: nn.Module) -> str:
    """A hash of the settings, the data and the weights before the first step."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for array in data:
        digest.update(array.tobytes())
    for name, value in tree_flatten(trained.parameters()):
        digest.update(name.encode() + np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


def _save(path: Path, mark: str, trained: nn.Module, optimizer: optim.Optimizer, losses: list[float]) -> None:
    """Write the weights, the optimiser's state and the losses so far, all or nothing."""
    save_arrays(
        path, _state(trained, optimizer), {"mark": mark, "losses": json.dumps(losses)}, "the training's checkpoint"
    )


def _restore(path: Path, mark: str, trained: nn.Module, optimizer: optim.Optimizer) -> list[float]:
    """Put the state of a checkpoint in place; returns its losses, none where there is no checkpoint."""
    if not path.exists():
        return []
    try:
        with readable_by_mlx(path) as name:
            arrays, metadata = mx.load(name, format="safetensors", return_metadata=True)
        mx.eval(arrays)
        losses = json.loads(metadata.get("losses", "null"))
    except (RuntimeError, ValueError, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MlxeffError(f"{path}: wanted a training's checkpoint, got {reason}") from error
    if metadata.get("mark") != mark:
        raise MlxeffError(
            f"{path}: wanted a checkpoint of this training ({mark}), got {metadata.get('mark')}: delete it"
        )
    now = _state(trained, optimizer)
    same = arrays.keys() == now.keys() and all(
        value.shape == now[name].shape and value.dtype == now[name].dtype for name, value in arrays.items()
    )
    if not same or not isinstance(losses, list) or not all(type(value) is float for value in losses):
        raise MlxeffError(f"{path}: wanted a training's checkpoint, got other arrays or no losses: delete it")
    parts = {"trained": [], "optimizer": []}
    for name, value in arrays.items():
        kind, _, rest = name.partition(".")
        parts[kind].append((rest, value))
    trained.update(tree_unflatten(parts["trained"]))
    optimizer.state = tree_unflatten(parts["optimizer"])
    return losses


def _state(trained: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """All arrays of a checkpoint: the weights and the optimiser's state."""
    arrays = {f"trained.{name}": value for name, value in tree_flatten(trained.parameters())}
    return arrays | {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
