"""The arms of a benchmark: each is a model with the way in which it is run, under a name. Also fills models with random
weights, which run as fast as trained ones. This module measures no times.
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

BLOCK = 1 << 20  # how many random numbers are drawn; they are repeated to fill a matrix
COPIES = 4  # upper estimate of how many arrays as large as a chunk's widest activations exist at the same time


@dataclass(frozen=True)
class Arm:
    """A model with the way in which it is run (`setup`). `name` is its name in tables and in --only."""

    name: str
    setup: Setup

    @property
    def base(self) -> DecoderModel:
        """The model that decodes; with a pair of KV Prediction, its base model."""
        return self.setup.model

    @property
    def pair(self) -> KvPrediction | None:
        """The pair of KV Prediction that reads the prompt; None where the model reads the prompt by itself."""
        return self.setup.reading if isinstance(self.setup.reading, KvPrediction) else None

    def prepare(self) -> None:
        """Evaluate the weights, and switch the models to the native executor where it supports them."""
        for module in self.modules:
            mx.eval(module.parameters())
        if native_for() and self.base.native is None:
            self.base.use_native()
        if self.pair and self.pair.auxiliary.native is None:
            native_like(self.pair.auxiliary, self.base)

    @property
    def modules(self) -> list[nn.Module]:
        """All modules with weights: the base model, and with a pair its auxiliary and its predictor."""
        return [self.base, *((self.pair.auxiliary, self.pair.predictor) if self.pair else ())]

    def flops(self, tokens: int) -> int:
        """Forward FLOPs to the first token after a prompt of `tokens` tokens, counted as in `kvprediction.flops`."""
        if not self.pair:
            return 2 * tokens * parameters(self.base)
        base, auxiliary, predictor = map(parameters, self.modules)
        first, stop = self.pair.predicted(tokens)
        if first == stop:
            return 2 * tokens * base
        return ttft_flops(base, auxiliary, predictor, tokens, tokens - stop) + 2 * first * base

    def working_bytes(self, batch: int, tokens: int, step_size: int) -> int:
        """An estimate of the memory, in bytes, that a measurement needs beside the weights: the KV caches twice,
        because they are copied when they grow, and the widest activations of a chunk of `step_size` tokens; all in
        float32."""
        models = [self.base, *([self.pair.auxiliary] if self.pair else [])]
        chunk = min(step_size, tokens)
        held = sum(2 * groups * size for model in models for groups, size in model.kv_shapes)
        widest = max(value.shape[0] for model in models for _, value in _matrices(model))
        return 4 * batch * (tokens * held * 2 + chunk * widest * COPIES)


def _matrices(model: nn.Module) -> Iterable[tuple[str, mx.array]]:
    """(Name, array) of each matrix in the model's layers."""
    flat = tree_flatten(model.parameters())
    return ((name, value) for name, value in flat if value.ndim == 2 and "layers." in name)


def weight_bytes(arms: Iterable[Arm]) -> int:
    """Bytes of the weights of all arms; arrays that several arms share count once."""
    arrays = {id(a): a for arm in arms for module in arm.modules for _, a in tree_flatten(module.parameters())}
    return sum(array.nbytes for array in arrays.values())


def randomise(module: nn.Module, dtype: mx.Dtype) -> None:
    """Replace the parameters of `module` by random ones of type `dtype`, not yet evaluated.

    Vectors (norms, biases) become ones. Matrices get the standard deviation 1 / √columns, so that activations keep
    their size from layer to layer, and embeddings 0.02.
    """
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
    """A predictor for the two models with random weights of type `dtype`; `layer_map` as in `Predictor`."""
    predictor = Predictor(auxiliary.kv_shapes, base.kv_shapes, layer_map)
    randomise(predictor, dtype)
    return predictor.eval()
