"""Tuning: which weights of a model's layers are trained, and what the layers become afterwards.

lora   each chosen matrix W computes with W + BA, of which A (R, K) and B (N, R) are trained (Hu et al., arXiv
       2106.09685); W itself, quantised or seed-encoded as it may be, is read as it is stored.
full   the chosen matrices with their biases, and the chosen norms, are trained in float32.

Embedding, last norm and head stay as they are. `Tuned.modules` holds what is trained and nothing else: that is what a
training changes and what a file keeps. `Tuned.fold` then puts plain layers in place of the trained ones: matrices of
8 bits where W is quantised or seed-encoded, else of W's type. Knows no technique and no training loop. Shapes: matrices
(N, K), R rank.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .errors import MlxeffError
from .modules import Linear, QuantizedLinear, RMSNorm, dense, is_matrix, plain_linear
from .ops import GROUPS, linear

METHODS = ("lora", "full")
FOLDED_BITS = 8  # of a folded matrix whose W is not dense


class LoraLinear(nn.Module):
    """x (…, K) → W x + B A x (…, N). B is 0 at first, so that the model computes what it did before."""

    def __init__(self, whole: nn.Module, rank: int, key: mx.array):
        """`whole`: the linear layer of W, which stays frozen; `key`: of the random numbers that A begins with."""
        super().__init__()
        rows, columns = dense(whole).shape
        bound = 1 / math.sqrt(columns)
        self._whole = whole
        self.a = mx.random.uniform(-bound, bound, (rank, columns), key=key)
        self.b = mx.zeros((rows, rank))

    def __call__(self, x: mx.array) -> mx.array:
        return self._whole(x) + linear(linear(x, self.a), self.b)

    def merged(self) -> nn.Module:
        """One dense layer in float32 that computes the same."""
        factors = self.b.astype(mx.float32) @ self.a.astype(mx.float32)
        return _dense_linear(dense(self._whole) + factors, self._whole.get("bias"))


@dataclass(frozen=True)
class Place:
    """A place in a layer where a trained module stands: at `owner[key]`, in place of the module `whole`.

    `path` names it: the layer's number, then the names of the modules down to it.
    """

    owner: nn.Module
    key: str
    path: str
    whole: nn.Module

    @property
    def trained(self) -> nn.Module:
        """The module that stands there."""
        return self.owner[self.key]

    def fold(self) -> None:
        """Replace the trained module by a plain one that computes the same."""
        trained = self.trained
        if isinstance(trained, RMSNorm):
            trained.weight = trained.weight.astype(self.whole.weight.dtype)
            return
        merged = trained.merged() if isinstance(trained, LoraLinear) else trained
        self.owner[self.key] = stored_like(self.whole, merged)


class Tuned:
    """The trained modules of a model, which gets layers of its own for them (`own_layers`).

    `modules` holds these alone, by the names that they have in the layers: `layers.0.self_attn.q_proj.a`, …
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        rank: int = 16,
        seed: int = 0,
        chosen: Callable[[str], bool] | None = None,
    ):
        """`method`: one of METHODS; `rank` and `seed` are for `lora`. `chosen`: whether the module at a `Place.path` is
        trained; None trains all. Raises MlxeffError for an unknown method and for a rank below 1.
        """
        if method not in METHODS or type(rank) is not int or rank < 1:
            raise MlxeffError(f"tuning: wanted one of {', '.join(METHODS)} and a rank ≥ 1, got {method!r}, rank {rank}")
        self.model, self.method, self.rank = model, method, rank
        own_layers(model)
        places = _places(model.layers, norms=method == "full")
        self.places = [place for place in places if chosen is None or chosen(place.path)]
        key = mx.random.key(seed)
        for place in self.places:
            key, own = mx.random.split(key)
            place.owner[place.key] = LoraLinear(place.whole, rank, own) if method == "lora" else _trainable(place.whole)
        self.modules = nn.Module()
        self.modules.layers = tree_unflatten([(place.path, place.trained) for place in self.places])

    @property
    def config(self) -> dict:
        """The arguments `method` and `rank`, as a file names them."""
        return {"method": self.method} | ({"rank": self.rank} if self.method == "lora" else {})

    def fold(self) -> None:
        """Make the model one for inference again: plain layers that compute the same, nearly as small as before."""
        for place in self.places:
            place.fold()
        mx.eval(self.model.parameters())


def own_layers(model: nn.Module) -> None:
    """Give `model` layers that it shares with no other model; the arrays in them are still the same."""
    layers = model.layers
    for i, layer in enumerate(layers):
        layers[i] = _twin(layer)
    model.native = None  # it would read the layers that were there before


def stored_like(whole: nn.Module, merged: nn.Module) -> nn.Module:
    """The dense float32 layer `merged` in a form about as small as that of `whole`, in whose place it comes.

    Where `whole` is dense, the types are its own; else the matrix is quantised to FOLDED_BITS, in groups of the size
    that `whole` has, or of the smallest size that divides K. It stays dense where no size does.
    """
    if isinstance(whole, nn.Linear):
        for name in merged.parameters():
            merged[name] = merged[name].astype(whole[name].dtype)
        return merged
    fitting = [size for size in GROUPS if merged.weight.shape[1] % size == 0]
    if not fitting:
        return merged
    own = getattr(whole, "group_size", None)
    return QuantizedLinear.from_linear(merged, own if own in fitting else fitting[0], FOLDED_BITS)


def _places(layers: list[nn.Module], norms: bool) -> Iterator[Place]:
    """The places of all matrices in the layers, and of all norms if asked."""
    for i, layer in enumerate(layers):
        for owner, key, path in _children(layer):
            if is_matrix(owner[key]) or (norms and isinstance(owner[key], nn.RMSNorm)):
                yield Place(owner, key, f"{i}.{path}", owner[key])


def _trainable(module: nn.Module) -> nn.Module:
    """A float32 copy of a linear layer or a norm."""
    if isinstance(module, nn.RMSNorm):
        norm = RMSNorm(module.weight.shape[0], module.eps)
        norm.weight = module.weight.astype(mx.float32)
        return norm
    return _dense_linear(dense(module), module.get("bias"))


def _dense_linear(weight: mx.array, bias: mx.array | None) -> Linear:
    return plain_linear(weight, None if bias is None else bias.astype(mx.float32))


def _children(module: nn.Module, path: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, key, path) of all modules below `module`."""
    for key, child in list(module.items()):
        if isinstance(child, nn.Module):
            yield module, key, path + key
            yield from _children(child, f"{path}{key}.")


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the modules, not of their arrays."""
    twin = copy.copy(module)
    for key, child in module.items():
        if isinstance(child, nn.Module):
            twin[key] = _twin(child)
    return twin
