"""MLX's quantisation: which modules of a model are quantised, by the entry `quantization` of its config.json."""

from collections.abc import Collection, Mapping

import mlx.nn as nn

from ..errors import MlxeffError
from ..models.config import short
from ..ops import BITS, GROUPS

# Mode of MLX's quantisation → (bits, group sizes) that it has.
MODES = {"affine": ((1, *BITS), GROUPS), "mxfp4": ((4,), (32,)), "mxfp8": ((8,), (32,)), "nvfp4": ((4,), (16,))}


def check_sizes(config: dict) -> None:
    """Raises MlxeffError where an entry of a config's `quantization` has bits or a group size that its mode does not
    have: native code divides by them."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return
    for entry in (quantization, *(value for value in quantization.values() if isinstance(value, dict))):
        mode, sizes = entry.get("mode", "affine"), (entry.get("bits"), entry.get("group_size"))
        if not isinstance(mode, str) or mode not in MODES:
            raise MlxeffError(f"config: quantization: {short(entry)}: wanted a mode of {', '.join(MODES)}")
        for name, size, wanted in zip(("bits", "group_size"), sizes, MODES[mode], strict=True):
            if name in entry and (type(size) is not int or size not in wanted):
                raise MlxeffError(f"config: quantization: {short(entry)}: wanted {name} of {wanted} in mode {mode}")


def entry(schemes: Mapping[str, dict]) -> dict:
    """The entry `quantization` of a config.json for these modules, of which there is one at least: name → scheme. The
    commonest scheme is the default, and every module with another one has an entry of its own."""
    listed = list(schemes.values())
    default = max(listed, key=listed.count)
    return default | {name: scheme for name, scheme in schemes.items() if scheme != default}


def install(model: nn.Module, quantization: dict, tensors: Collection[str] | None) -> None:
    """Replace modules of `model` by quantised ones, whose weights are not loaded yet. `quantization` is the entry of
    the config.json, in mlx-lm's form. A module with an entry of its own is quantised as that says (false: not at all).
    Another one is quantised where `tensors`, the names of the tensors in the checkpoint, contain its scales. Where
    `tensors` is None, it is quantised if the group size divides its rows. Raises MlxeffError for an invalid entry."""
    if not isinstance(quantization, dict):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {short(quantization)}")
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
    if not {"group_size", "bits"} <= set(default):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {sorted(default)}")
    check_sizes({"quantization": quantization})

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
        raise MlxeffError(f"config: quantization: {short(quantization)}: {str(error).splitlines()[0]}") from error
