"""What is measured: a model, or a pair of KV Prediction, as something that computes a prompt's first logits; and models
of random weights, whose speed is that of trained ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..decode import prefill
from ..kv_pairs import fused_like
from ..kvprediction import Predictor, predict
from ..kvprediction.flops import parameters, ttft_flops
from ..kvprediction.predict import predicted_range
from ..models.fused import fuse
from ..ops import native_for

BLOCK = 1 << 20  # random numbers, which are repeated to fill a matrix
COPIES = 4  # of a chunk's widest activations that live at once, generously


@dataclass(frozen=True)
class Arm:
    """A model `base`, or a pair; of a prompt `base` computes the last `keep` tokens and the first `sinks`."""

    name: str
    base: object
    auxiliary: object = None
    predictor: Predictor | None = None
    keep: int = 1
    sinks: int = 0

    def first_logits(self, tokens: mx.array, cache, step_size: int) -> mx.array:
        """Token ids (B, N) → logits (B, V) of what follows; fills `cache`."""
        if self.predictor is None:
            return prefill(self.base, cache, tokens, step_size)
        return predict(self.auxiliary, self.predictor, self.base, tokens, cache, step_size, self.keep, self.sinks)

    def prepare(self) -> None:
        """Compute the weights, and give the models their fused form where it applies and is missing."""
        for module in self.modules:
            mx.eval(module.parameters())
        if native_for() and self.base._fused is None:
            fuse(self.base)
        if self.auxiliary is not None and self.auxiliary._fused is None:
            fused_like(self.auxiliary, self.base)

    @property
    def modules(self) -> list[nn.Module]:
        return [each for each in (self.base, self.auxiliary, self.predictor) if each is not None]

    def flops(self, tokens: int) -> int:
        """Forward FLOPs to the first token of a prompt, as the paper counts them (`kvprediction.flops`)."""
        if self.predictor is None:
            return 2 * tokens * parameters(self.base)
        base, auxiliary, predictor = map(parameters, self.modules)
        first, stop = predicted_range(tokens, self.keep, self.sinks)
        if first == stop:
            return 2 * tokens * base
        return ttft_flops(base, auxiliary, predictor, tokens, tokens - stop) + 2 * first * base

    def working_bytes(self, batch: int, tokens: int, step_size: int) -> int:
        """Memory that a measurement takes beside the weights, about: the caches twice, since they are copied where they
        grow, and a chunk's widest activations, all in float32."""
        models = [each for each in (self.base, self.auxiliary) if each is not None]
        chunk = min(step_size, tokens)
        held = sum(2 * groups * size for model in models for groups, size in model.kv_shapes)
        widest = max(value.shape[0] for model in models for _, value in _matrices(model))
        return 4 * batch * (tokens * held * 2 + chunk * widest * COPIES)


def _matrices(model: nn.Module) -> Iterable[tuple[str, mx.array]]:
    flat = tree_flatten(model.parameters())
    return ((name, value) for name, value in flat if value.ndim == 2 and "layers." in name)


def weight_bytes(arms: Iterable[Arm]) -> int:
    """Memory of all their weights, what is shared counted once."""
    arrays = {id(a): a for arm in arms for module in arm.modules for _, a in tree_flatten(module.parameters())}
    return sum(array.nbytes for array in arrays.values())


def randomise(module: nn.Module, dtype: mx.Dtype) -> None:
    """Give `module` random matrices of deviation columns^-0.5, so that activations keep their size, and norms of one;
    lazily."""
    block = mx.random.normal((BLOCK,), key=mx.random.key(0))

    def fill(name: str, value: mx.array) -> mx.array:
        if value.ndim < 2:
            return mx.ones(value.shape, dtype)
        count = value.size
        deviation = 0.02 if "embed" in name else value.shape[-1] ** -0.5
        numbers = mx.tile((block * deviation).astype(dtype), -(-count // BLOCK))
        return numbers[:count].reshape(value.shape)

    module.update(tree_map_with_path(fill, module.parameters()))


def random_predictor(auxiliary, base, layer_map: Sequence[int], dtype: mx.Dtype) -> Predictor:
    predictor = Predictor(auxiliary.kv_shapes, base.kv_shapes, layer_map)
    randomise(predictor, dtype)
    return predictor.eval()
