"""What is measured: a model and how it is run, by name; and models of random weights, whose speed is that of trained
ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..assembly.pair import native_like
from ..decode import Setup
from ..kvprediction import KvPrediction, Predictor
from ..kvprediction.flops import parameters, ttft_flops
from ..models.decoder import DecoderModel
from ..ops import native_for

BLOCK = 1 << 20  # random numbers, which are repeated to fill a matrix
COPIES = 4  # of a chunk's widest activations that live at once, generously


@dataclass(frozen=True)
class Arm:
    """A model and how it is run, under the name of its row in a table."""

    name: str
    setup: Setup

    @property
    def base(self) -> DecoderModel:
        return self.setup.model

    @property
    def pair(self) -> KvPrediction | None:
        """The pair that predicts the prompt's keys and values, None where the model computes them all."""
        return self.setup.reading if isinstance(self.setup.reading, KvPrediction) else None

    def prepare(self) -> None:
        """Compute the weights, and use the native kernels for whole passes where they apply."""
        for module in self.modules:
            mx.eval(module.parameters())
        if native_for() and self.base.native is None:
            self.base.use_native()
        if self.pair and self.pair.auxiliary.native is None:
            native_like(self.pair.auxiliary, self.base)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.base, *((self.pair.auxiliary, self.pair.predictor) if self.pair else ())]

    def flops(self, tokens: int) -> int:
        """Forward FLOPs to the first token of a prompt, as its paper counts them (`kvprediction.flops`)."""
        if not self.pair:
            return 2 * tokens * parameters(self.base)
        base, auxiliary, predictor = map(parameters, self.modules)
        first, stop = self.pair.predicted(tokens)
        if first == stop:
            return 2 * tokens * base
        return ttft_flops(base, auxiliary, predictor, tokens, tokens - stop) + 2 * first * base

    def working_bytes(self, batch: int, tokens: int, step_size: int) -> int:
        """Memory that a measurement takes beside the weights, about: the caches twice, since they are copied where they
        grow, and a chunk's widest activations, all in float32."""
        models = [self.base, *([self.pair.auxiliary] if self.pair else [])]
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


def random_predictor(
    auxiliary: DecoderModel, base: DecoderModel, layer_map: Sequence[int], dtype: mx.Dtype
) -> Predictor:
    predictor = Predictor(auxiliary.kv_shapes, base.kv_shapes, layer_map)
    randomise(predictor, dtype)
    return predictor.eval()
