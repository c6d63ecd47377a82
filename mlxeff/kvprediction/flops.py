"""Forward FLOPs to the first token, counted as in the KV Prediction paper (arXiv 2410.08391): two for each parameter
and token, without those of attention. An embedding that is also the output head counts once.

With prediction, the auxiliary and the predictor run on all prompt tokens but the last, and the base on the last one.
The "FLOPs reduction" in the paper's tables is another number: the parameter count of the base divided by that of the
auxiliary, without the predictor and the base's one token.
"""

import mlx.nn as nn
from mlx.utils import tree_flatten


def parameters(model: nn.Module) -> int:
    """The number of parameters of a model. A quantised or seed-encoded matrix counts as the dense matrix that it
    represents, and a module that occurs in several places counts once."""
    modules = {id(module): module for _, module in model.named_modules()}.values()
    return sum(_own(module) for module in modules)


def _own(module: nn.Module) -> int:
    """The number of parameters of one module, without those of the modules in it."""
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        bias = module.bias.size if "bias" in module else 0
        return module.weight.size * 32 // module.bits + bias
    if hasattr(module, "to_dense"):  # of a technique
        return module.rows * module.cols + (module.bias.size if "bias" in module else 0)
    children = {name: value for name, value in module.items() if not _holds_modules(value)}
    return sum(value.size for _, value in tree_flatten(children) if hasattr(value, "size"))


def _holds_modules(value: object) -> bool:
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return any(isinstance(item, nn.Module) for item in [value, *items])


def ttft_flops(base: int, auxiliary: int, predictor: int, tokens: int, kept: int = 1) -> int:
    """FLOPs to the first token after a prompt of `tokens` tokens. `base`, `auxiliary` and `predictor` are parameter
    counts.

    The base computes the last `kept` tokens, which the auxiliary does not read. Where it computes all tokens, nothing
    is predicted.
    """
    kept = min(kept, tokens)
    return 2 * ((tokens - kept) * (auxiliary + predictor) + kept * base)
