"""The weights with which a model drafts for itself: its own, the upper halves of its own, or a copy in fewer bits."""

import copy
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import modules
from ..errors import MlxeffError, notices
from ..models.decoder import DecoderModel
from ..quantspec import weights as planes

COPIES = {"q4": 4, "q6": 6}  # bits of copies
GROUP = 64  # of a copy
FEW_BITS = 6.5  # bits a weight up to which a model drafts with its own weights
MANY_BITS = 12  # from which a copy of 6 bits is small beside them


def drafting(model: DecoderModel, weights: str = "auto") -> DecoderModel:
    """The model that drafts for `model`, which shares with it what it can. Its `weights` are

    shared  the model's own
    upper   the upper halves of the model's own, which must have 8 bits: the model itself has them in two planes from
            then on, with the same results up to the rounding of sums
    q4, q6  a copy in 4 or 6 bits
    auto    shared where the model's own have up to FEW_BITS, q4 up to MANY_BITS, else q6

    Raises MlxeffError for "upper" with a model that has no weights of 8 bits.
    """
    weights = chosen(model, weights)
    if weights == "upper":
        return upper_half(model)
    return coarse_copy(model, COPIES[weights]) if weights in COPIES else model


def chosen(model: DecoderModel, weights: str) -> str:
    """What "auto" means for `model`; another name as it is."""
    if weights != "auto":
        return weights
    bits = bits_per_weight(model)
    return "shared" if bits <= FEW_BITS else "q4" if bits <= MANY_BITS else "q6"


def bits_per_weight(model: DecoderModel) -> float:
    """Bits that a model stores for a number of its matrices."""
    bits = numbers = 0
    for module in model.modules():
        if _has_matrix(module):
            own = tree_flatten(module.parameters())
            bits += 8 * sum(array.nbytes for _, array in own)
            numbers += _numbers(module)
    return bits / numbers


def _has_matrix(module: nn.Module) -> bool:
    return modules.is_matrix(module) or isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def _numbers(module: nn.Module) -> int:
    """Numbers of a module's matrix."""
    if hasattr(module, "to_dense"):
        return module.rows * module.cols
    width = module.weight.shape[1] * 32 // module.bits if "scales" in module else module.weight.shape[1]
    return module.weight.shape[0] * width


def coarse_copy(model: DecoderModel, bits: int) -> DecoderModel:
    """A copy of `model` whose matrices have so many bits, which shares everything else with it. A notice tells its
    bytes. Matrices that have no more, and those whose rows are no multiple of the group, stay as they are."""
    copied = _with(model, lambda module: _coarse(module, bits))
    shared = {id(array) for _, array in tree_flatten(model.parameters())}
    own = [array for _, array in tree_flatten(copied.parameters()) if id(array) not in shared]
    mx.eval(own)
    size = sum(array.nbytes for array in own) / 1e6
    notices.info("--quantspec: drafts with a copy of the weights in %d bits, %.0f MB", bits, size)
    return copied


def upper_half(model: DecoderModel) -> DecoderModel:
    """A model with the upper planes of the matrices of `model` that have 8 bits, which shares all arrays with it. In
    `model` they are in two planes from then on."""
    for name, module in list(model.named_modules()):
        if found := planes.in_planes(module, f"--draft-weights upper: {name}"):
            model.update_modules(tree_unflatten([(name, found)]))
    if not any(isinstance(module, planes.PlaneModule) for module in model.modules()):
        text = f"wanted a model with weights of 8 bits, got {bits_per_weight(model):.1f} bits a weight"
        raise MlxeffError(f"--draft-weights upper: {text}: give q4 or shared")
    if model.native is not None:
        model.use_native()
    return _with(model, lambda module: module.draft() if isinstance(module, planes.PlaneModule) else module)


def _with(model: DecoderModel, replaced: Callable[[nn.Module], nn.Module]) -> DecoderModel:
    """A copy of `model` with other modules in place of those with matrices; it shares with `model` what these share."""
    copied = _copy(model)
    found = {name: replaced(module) for name, module in copied.named_modules() if _has_matrix(module)}
    copied.update_modules(tree_unflatten(list(found.items())))
    copied.native = None
    if model.native is not None:
        copied.use_native()
    return copied.eval()


def _coarse(module: nn.Module, bits: int) -> nn.Module:
    """A module with the same matrix in so many bits; the module itself where it has no more already."""
    quantised = isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    if hasattr(module, "to_dense") or (quantised and module.bits <= bits):
        return module
    matrix = modules.dense(module)
    if matrix.shape[1] % GROUP:
        return module
    table = isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    plain = modules.Embedding(1, 1) if table else modules.Linear(1, 1, bias="bias" in module)
    plain.weight = matrix.astype(mx.float16)
    if "bias" in module:
        plain.bias = module.bias
    return plain.to_quantized(GROUP, bits)


def _copy(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules, which shares all arrays with it."""
    copied = copy.copy(module)
    for name, child in module.items():
        copied[name] = _copied(child)
    return copied


def _copied(child: object) -> object:
    if isinstance(child, nn.Module):
        return _copy(child)
    if isinstance(child, list):
        return [_copied(each) for each in child]
    return {name: _copied(each) for name, each in child.items()} if isinstance(child, dict) else child
