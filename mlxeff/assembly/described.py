"""A model in memory → the entries of config.json that describe how its matrices are stored, and the tensors to write.

It is the way back from `model.load_path`: a model whose modules were replaced is written as a folder that loads again.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint import Piece
from ..checkpoint.tensor import NAMES
from ..seedlm import install as seedlm
from .quantization import entry


def storage(model: nn.Module) -> dict:
    """The entries `quantization`, `quantization_config` and `seedlm` for the modules of `model`, as far as it has
    such. The scheme of most modules is the default, and every other one has an entry of its own."""
    schemes, seeded = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "block_format"):
            seeded[name] = (module.block_format, module.rows, module.cols)
        elif isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            scheme = {"group_size": module.group_size, "bits": module.bits}
            schemes[name] = scheme | ({"mode": module.mode} if module.mode != "affine" else {})
    found = {"seedlm": seedlm.entry(seeded)} if seeded else {}
    if schemes:
        quantization = entry(schemes)
        found |= {"quantization": quantization, "quantization_config": quantization}
    return found


def metadata(config: dict) -> dict[str, str]:
    """The metadata of the weight files for a config with these entries."""
    return seedlm.metadata() if "seedlm" in config else {}


def pieces(model: nn.Module) -> list[Piece]:
    """The parameters of `model` as pieces of a folder of weights, each as it is stored in memory."""
    return [_piece(name, array) for name, array in tree_flatten(model.parameters())]


def _piece(name: str, array: mx.array) -> Piece:
    return Piece(((name, NAMES[array.dtype], tuple(array.shape)),), lambda: [array])
