"""MLX's quantisation: which modules of a model are quantised, by the entry `quantization` of its config.json."""

from collections.abc import Collection

import mlx.nn as nn

from ..errors import MlxeffError


def install(model: nn.Module, quantization: dict, tensors: Collection[str] | None) -> None:
    """Replace modules of `model` by quantised ones, whose weights are not loaded yet. `quantization` is the entry of
    the config.json, in mlx-lm's form. A module with an entry of its own is quantised as that says (false: not at all).
    Another one is quantised where `tensors`, the names of the tensors in the checkpoint, contain its scales. Where
    `tensors` is None, it is quantised if the group size divides its rows. Raises MlxeffError for an invalid entry."""
    if not isinstance(quantization, dict):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {quantization!r}")
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
    if not {"group_size", "bits"} <= set(default):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {sorted(default)}")

    def choose(path: str, module: nn.Module) -> bool | dict:
        """The parameters of the quantisation of one module; False: it is not quantised."""
        if not hasattr(module, "to_quantized"):
            return False
        own = quantization.get(path)
        if own is not None:
            return own if isinstance(own, dict) else (default if own else False)
        if tensors is not None:
            return default if f"{path}.scales" in tensors else False
        return default if module.weight.shape[-1] % default["group_size"] == 0 else False

    try:
        nn.quantize(model, **default, class_predicate=choose)
    except (ValueError, TypeError) as error:
        raise MlxeffError(f"config: quantization: {quantization}: {str(error).splitlines()[0]}") from error
