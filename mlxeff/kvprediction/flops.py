"""Forward FLOPs to the first token, as the paper counts them: two a parameter and token, the embedding counted once.

With prediction: t_auxiliary(N) + t_predictor(N) + t_base(1). The published "FLOPs reduction" is the ratio of the
parameter counts of base and auxiliary; the predictor and the one base token are left out of it.
"""

import mlx.nn as nn
from mlx.utils import tree_flatten


def parameters(model: nn.Module) -> int:
    """How many numbers the model's matrices, biases and norms have. A quantised or seed-encoded matrix counts as the
    dense one that it stands for, and a module that stands in several places counts once."""
    modules = {id(module): module for _, module in model.named_modules()}.values()
    return sum(_own(module) for module in modules)


def _own(module: nn.Module) -> int:
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        bias = module.bias.size if "bias" in module else 0
        return module.weight.size * 32 // module.bits + bias
    if hasattr(module, "to_dense"):  # seed-encoded
        return module.rows * module.cols + (module.bias.size if "bias" in module else 0)
    children = {name: value for name, value in module.items() if not _holds_modules(value)}
    return sum(value.size for _, value in tree_flatten(children) if hasattr(value, "size"))


def _holds_modules(value: object) -> bool:
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return any(isinstance(item, nn.Module) for item in [value, *items])


def ttft_flops(base: int, auxiliary: int, predictor: int, tokens: int, kept: int = 1) -> int:
    """FLOPs to the first token after a prompt of `tokens` tokens, from the parameter counts of the three models.

    The base computes the last `kept` tokens itself, and the auxiliary does not read these. Where all tokens are kept,
    nothing is predicted.
    """
    kept = min(kept, tokens)
    return 2 * ((tokens - kept) * (auxiliary + predictor) + kept * base)
