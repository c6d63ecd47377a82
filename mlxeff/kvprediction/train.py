"""Gradient training of the predictor, and of the auxiliary where it is tuned (`tuning`); the base is frozen. Same seed
and text, same pair to the bit, also when it was killed and resumed on the way.

The loss is the paper's, as in CoreNet's `cross_entropy_for_kv_prediction.py`: the base runs on all tokens with its own
keys and values replaced by predicted ones, and

    loss = CE + z + α (CE_A + z_A) + λ Σ_layers (mean |K̂ - K| + mean |V̂ - V|),  z = 1e-4 · mean logsumexp(logits)²

with keys after the base's norm and before rotation, and A the auxiliary as a language model of its own. λ = 1 / base
layers, which the paper chose, and α = 1; where the auxiliary is not tuned its term is a constant and left out. Shapes:
B batch, N tokens, V vocabulary.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import MlxeffError
from ..ops import attention, cross_entropy
from .predictor import Features, Pairs, Predictor, features, merged
from .tuning import Tuned

Z_LOSS = 1e-4
BETAS, LAST_RATE, CLIP = (0.9, 0.95), 0.1, 1.0  # of Adam; the final learning rate's share of `rate`; gradient norm


class PredictedLayer:
    """A layer's cache that holds one prompt's predicted keys and values: what the model hands over is discarded."""

    length = 0

    def __init__(self, keys: mx.array, values: mx.array, window: int | None):
        self.keys, self.values, self.window = keys, values, window

    def attend(self, queries: mx.array, _keys: mx.array, _values: mx.array, scale: float) -> mx.array:
        """Causal attention of queries (B, H, N, E) to the predicted pairs; token t sees predictions 0 to t."""
        return attention(queries, self.keys, self.values, scale, self.window)


class PredictedCache:
    """`PredictedLayer` of each layer of `base`, from raw predicted pairs."""

    length = 0

    def __init__(self, base, predicted: Pairs):
        windows = [layer.window for layer in base.new_cache().layers]
        placed = base.placed_kv(predicted, 0)
        self.layers = [PredictedLayer(*pair, window) for pair, window in zip(placed, windows, strict=True)]


class Trained(nn.Module):
    """All that training changes."""

    def __init__(self, predictor: Predictor, tuned: Tuned | None = None):
        super().__init__()
        self.predictor = predictor
        if tuned is not None:
            self.auxiliary = tuned.modules


def predicted_logits(predictor: Predictor, read: Features, base, tokens: mx.array) -> tuple[mx.array, Pairs]:
    """Token ids (B, N), and what the maps read for them → the base's logits (B, N, V) where all keys and values are
    predicted, and these, raw."""
    predicted = predictor(read)
    return base.head(base.hidden(tokens, PredictedCache(base, predicted))), predicted


def true_kv(base, tokens: mx.array) -> Pairs:
    """The base's own keys and values of token ids (B, N), keys normed: what the predicted ones are held to."""
    return base.normed_kv(base.raw_kv(tokens, base.new_cache()))


def loss(
    predictor: Predictor,
    auxiliary,
    base,
    tokens: mx.array,
    true: Pairs,
    consistency: float,
    auxiliary_loss: float = 0,
    read: Features | None = None,
) -> mx.array:
    """The loss of token ids (B, N + 1): N inputs, of which `true` are the true pairs, and the N that follow them.

    `consistency` is λ, `auxiliary_loss` is α; `read`: what the maps read, where the auxiliary is not asked for it.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if read is None:
        pairs, hidden, own_logits = auxiliary.read(inputs, auxiliary.new_cache())
        read = [(rows, rows) for rows in hidden] if predictor.inputs == "hidden" else merged(pairs)
    logits, predicted = predicted_logits(predictor, read, base, inputs)
    total = language_loss(logits, targets) + consistency * distance(base.normed_kv(predicted), true)
    return total + auxiliary_loss * language_loss(own_logits, targets) if auxiliary_loss else total


def language_loss(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean cross-entropy and z-loss of logits (B, N, V) and the ids (B, N) that follow."""
    entropy = cross_entropy(logits, targets)
    # logsumexp = entropy + the target's logit
    z = entropy + mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return entropy.mean() + Z_LOSS * (z * z).mean()


def distance(predicted: Pairs, true: Pairs) -> mx.array:
    """The sum over layers, keys and values of the mean distance."""
    return sum(
        mx.abs(mine - theirs).mean()
        for pair, wanted in zip(predicted, true, strict=True)
        for mine, theirs in zip(pair, wanted, strict=True)
    )


@dataclass(frozen=True)
class Training:
    """`steps` of `batch` sequences; `rate` is Adam's highest learning rate, reached after `warmup` steps.
    `consistency`: λ, None for 1 / base layers. `auxiliary_loss`: α, for a tuned auxiliary. `every`: steps between two
    checkpoints."""

    steps: int
    batch: int = 1
    rate: float = 3e-4
    warmup: int = 20
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
) -> list[float]:
    """Train `predictor` in place on `sequences` of token ids of one length, and what is `tuned` of the auxiliary;
    returns the loss of each step.

    checkpoint: a file to write every `every` steps and to go on from; one of other settings or text is refused.
    """
    rows, trained = _rows(sequences), Trained(predictor, tuned)
    optimizer = optim.Adam(_schedule(settings), betas=list(BETAS), bias_correction=True)
    optimizer.init(trained.trainable_parameters())
    mark = _mark(settings, rows, trained)
    losses = _restore(checkpoint, mark, trained, optimizer) if checkpoint else []
    step = _step(trained, auxiliary, base, settings)
    for index in range(len(losses), settings.steps):
        chosen = np.random.default_rng([settings.seed, index]).integers(0, len(rows), settings.batch)
        value, gradients = step(mx.array(rows[chosen]))
        gradients, _ = optim.clip_grad_norm(gradients, CLIP)
        optimizer.update(trained, gradients)
        mx.eval(trained.parameters(), optimizer.state, value)
        losses.append(_finite(value.item(), index))
        if checkpoint and (index + 1) % settings.every == 0:
            _save(checkpoint, mark, trained, optimizer, losses)
        if progress:
            progress(index + 1, settings.steps)
    return losses


def _rows(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The sequences of full length, (…, N + 1)."""
    length = max(map(len, sequences), default=0)
    if length < 2:
        raise MlxeffError(f"training: wanted sequences of at least two tokens, got {length}")
    return np.array([list(ids) for ids in sequences if len(ids) == length], dtype=np.int32)


def _step(trained: Trained, auxiliary, base, settings: Training) -> Callable:
    """tokens (B, N + 1) → (loss, gradients). What is frozen runs outside of what is differentiated: the base's own
    pass, and the auxiliary's where it is not tuned."""
    consistency = 1 / len(base.layers) if settings.consistency is None else settings.consistency
    tuned = "auxiliary" in trained
    weight = settings.auxiliary_loss if tuned else 0.0

    def value(tokens: mx.array, true: Pairs, read: Features | None) -> mx.array:
        return loss(trained.predictor, auxiliary, base, tokens, true, consistency, weight, read)

    differentiated = nn.value_and_grad(trained, value)

    def step(tokens: mx.array) -> tuple[mx.array, dict]:
        inputs = tokens[:, :-1]
        read = None if tuned else features(auxiliary, inputs, auxiliary.new_cache(), trained.predictor.inputs)
        true = true_kv(base, inputs)
        mx.eval(true, [] if read is None else read)
        return differentiated(tokens, true, read)

    return step


def _finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise MlxeffError(f"training: step {step + 1}: wanted a finite loss, got {value}: lower the learning rate")
    return value


def _schedule(settings: Training) -> Callable[[mx.array], mx.array]:
    """Linear to `rate` over `warmup` steps, then by a cosine to a tenth of it."""

    def rate(step: mx.array) -> mx.array:
        rising = (step + 1) / max(1, settings.warmup)
        done = mx.clip((step - settings.warmup) / max(1, settings.steps - settings.warmup), 0, 1)
        falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + mx.cos(math.pi * done))
        return settings.rate * mx.minimum(rising, falling)

    return rate


def _mark(settings: Training, rows: np.ndarray, trained: Trained) -> str:
    """What tells one training from another."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode() + rows.tobytes())
    for name, value in tree_flatten(trained.parameters()):
        digest.update(name.encode() + np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


def _save(path: Path, mark: str, trained: Trained, optimizer: optim.Optimizer, losses: list[float]) -> None:
    arrays = {f"trained.{name}": value for name, value in tree_flatten(trained.parameters())}
    arrays |= {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(temporary), arrays, {"mark": mark, "losses": json.dumps(losses)})
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise MlxeffError(f"{path}: cannot write the training's checkpoint: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _restore(path: Path, mark: str, trained: Trained, optimizer: optim.Optimizer) -> list[float]:
    """Put the state of a checkpoint in place; returns its losses, none where there is no checkpoint."""
    if not path.exists():
        return []
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
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
