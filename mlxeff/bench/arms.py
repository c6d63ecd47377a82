"""The arms of a benchmark: each is a model with the way in which it is run, under a name. Also fills models with random
weights, which run as fast as trained ones.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..assembly.pair import native_like
from ..decode import Setup
from ..kvprediction import KvPrediction, Predictor
from ..kvprediction.flops import parameters, ttft_flops
from ..models.decoder import DecoderModel
from ..ops import native_for
from . import passes
from .points import Point

BLOCK = 1 << 20  # how many random numbers are drawn; they are repeated to fill a matrix
LEAST_VOCABULARY = 100  # of models that do not tell
COPIES = 4  # upper estimate of how many arrays as large as a chunk's widest activations exist at the same time


@dataclass(frozen=True)
class Arm:
    """A model with the way in which it is run (`setup`). `name` is its name in tables and in --only. `about`: more
    entries of its description."""

    name: str
    setup: Setup
    about: dict = field(default_factory=dict)

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
        if native_for() and self.own and self.base.native is None:
            self.base.use_native()
        if self.pair and self.pair.auxiliary.native is None:
            native_like(self.pair.auxiliary, self.base)

    @property
    def modules(self) -> list[nn.Module]:
        """All modules with weights: the base model, and with a pair its auxiliary and its predictor."""
        base = self.base if self.own else self.base.model
        return [base, *((self.pair.auxiliary, self.pair.predictor) if self.pair else ())]

    def flops(self, tokens: int) -> int:
        """Forward FLOPs to the first token after a prompt of `tokens` tokens, counted as in `kvprediction.flops`."""
        if not self.pair:
            return 2 * tokens * parameters(self.modules[0])
        base, auxiliary, predictor = map(parameters, self.modules)
        first, stop = self.pair.predicted(tokens)
        if first == stop:
            return 2 * tokens * base
        return ttft_flops(base, auxiliary, predictor, tokens, tokens - stop) + 2 * first * base

    def measure(self, point: Point, ids: np.ndarray, step_size: int, steps: int) -> dict:
        """One pass, see `passes.measure`."""
        return passes.measure(self, point, ids, step_size, steps)

    def describe(self) -> dict:
        """The facts that need no measurement: parameter counts of the models, bytes of the weights, and `flops_512`,
        the FLOPs to the first token after 512 prompt tokens."""
        counts = [parameters(module) for module in self.modules]
        found = dict(zip(("base", "auxiliary", "predictor"), counts)) | {"flops_512": self.flops(512)}
        return {"engine": "mlxeff", **found, "weight_bytes": self.bytes, **self.about}

    @property
    def own(self) -> bool:
        """Whether the model is ours: mlx-lm's own models do not tell what they consist of."""
        return isinstance(self.base, DecoderModel)

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        return self.base.vocab_size or LEAST_VOCABULARY

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of all weights, those of a model that drafts too; arrays that several modules share count once."""
        draft = getattr(getattr(self.setup.following, "drafter", None), "model", None)
        return array_bytes([*self.modules, *([draft] if isinstance(draft, nn.Module) else [])])

    @functools.cached_property
    def read_bytes(self) -> int | None:
        """Bytes of the weights that decoding a token reads: all of the base, but of an embedding table that is not the
        output head too only a row. None for models that do not tell."""
        if not self.own:
            return None
        ends = self.base.end_parts()
        tied = ends.head.module is ends.embedding.module
        table = 0 if tied else sum(array.nbytes for _, array in tree_flatten(ends.embedding.module.parameters()))
        return sum(array.nbytes for _, array in tree_flatten(self.base.parameters())) - table

    @functools.cached_property
    def token_flops(self) -> int | None:
        """FLOPs of a prompt token in the layers' matrices, without attention; None where a technique changes them."""
        if self.pair or not self.own or self.setup.options.fraction != 1:
            return None
        ends = self.base.end_parts()
        outside = {id(rows.module): rows.module for rows in (ends.embedding, ends.head)}.values()
        return 2 * (parameters(self.base) - sum(parameters(module) for module in outside))

    def working_bytes(self, batch: int, tokens: int, step_size: int) -> int:
        """An estimate of the memory, in bytes, that a measurement needs beside the weights: the KV caches twice,
        because they are copied when they grow, and the widest activations of a chunk of `step_size` tokens; all in
        float32. 0 for models that do not tell."""
        if not self.own:
            return 0
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
    return array_bytes(module for arm in arms for module in arm.modules)


def array_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters of all modules; arrays that several modules share count once."""
    arrays = {id(array): array for module in modules for _, array in tree_flatten(module.parameters())}
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
