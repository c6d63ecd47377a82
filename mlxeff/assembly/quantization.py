"""MLX's affine quantisation: which modules of a model a config.json's `quantization` makes quantised ones."""

from collections.abc import Collection

import mlx.nn as nn

from ..errors import MlxeffError


def install(model: nn.Module, quantization: dict, tensors: Collection[str] | None) -> None:
    """Put quantised modules, without their weights yet, where `quantization` says: a module with an entry of its own as
    that says, else one of which `tensors`, the names in the checkpoint, hold scales (None: wherever the group size
    divides). Raises MlxeffError for an entry that is not mlx-lm's."""
    if not isinstance(quantization, dict):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {quantization!r}")
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
    if not {"group_size", "bits"} <= set(default):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {sorted(default)}")

    def choose(path: str, module: nn.Module):
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
