"""Which matrices of a model are quantised, and with how many bits: all with the same number, or by a recipe that gives
some of them more bits; with exceptions that the user names.

A scheme is the dict of arguments for `mx.quantize`: group_size, bits and mode. Source: `convert` of mlx-lm, both for
the rule (every linear layer and embedding whose row length the group size divides) and for the recipes, which resemble
Q4_K_M of llama.cpp. This module quantises nothing itself.
"""

from typing import TYPE_CHECKING

import mlx.nn as nn

from ..errors import MlxeffError, notices, some
from ..ops import BITS, GROUPS

if TYPE_CHECKING:
    from .plan import Options, Weight

# Name → (bits of most matrices; bits of the output head, and of the value and down projections in some layers).
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}


TIED = "lm_head"  # the name of an output head, which a model that uses its embedding as the head does not have


def check(options: "Options") -> None:
    """Raises MlxeffError for bits and group sizes that MLX does not support."""
    if options.bits and (options.bits not in BITS or options.group_size not in GROUPS):
        got = f"{options.bits}:{options.group_size}"
        raise MlxeffError(
            f"convert: quantize: wanted bits of {BITS} or {', '.join(RECIPES)}, and a group of {GROUPS}, got {got}"
        )
    for name, bits in options.keep:
        if bits not in (*BITS, 16):
            raise MlxeffError(f"convert: keep: {name}: wanted bits of {(*BITS, 16)}, got {bits}")


def schemes(model: nn.Module, weights: list["Weight"], options: "Options") -> dict[str, dict]:
    """Module name → scheme, for each matrix to quantise. Warns of matrices that stay dense because the group size does
    not divide their number of columns. Raises MlxeffError for a name in `keep` that no matrix can have."""
    matrices = {name for name, module in model.named_modules() if hasattr(module, "to_quantized")}
    found, dense, used = {}, {}, set()
    for weight in weights:
        if weight.module not in matrices or weight.name != f"{weight.module}.weight" or len(weight.shape) != 2:
            continue
        names = [(name, bits) for name, bits in options.keep if name in weight.module]
        used |= {name for name, _ in names}
        bits = names[0][1] if names else _bits(weight.module, len(model.layers), options)
        if bits == 16:
            continue
        if weight.shape[-1] % options.group_size:
            dense[weight.module] = weight.shape[-1]
        else:
            found[weight.module] = {"group_size": options.group_size, "bits": bits, "mode": "affine"}
    if unknown := sorted({name for name, _ in options.keep if name not in TIED} - used):
        raise MlxeffError(f"convert: keep: {', '.join(unknown)}: wanted parts of names of linear layers, got others")
    if dense:
        fitting = next(
            (size for size in sorted(GROUPS, reverse=True) if not any(n % size for n in dense.values())), None
        )
        advice = f"groups of {fitting} divide them" if fitting else f"no group of {GROUPS} divides all of them"
        text = "convert: quantize: %d of %d matrices stay dense, whose columns a group of %d does not divide (%s): %s"
        total = len(dense) + len(found)
        notices.warning(text, len(dense), total, options.group_size, advice, some(sorted(dense)))
    return found


def entry(found: dict[str, dict], options: "Options") -> dict | None:
    """The entry `quantization` of config.json: the default scheme, and for each module with another scheme an entry
    under its name. None without quantisation."""
    if not options.bits:
        return None
    default = {"group_size": options.group_size, "bits": options.bits, "mode": "affine"}
    return default | {module: scheme for module, scheme in found.items() if scheme != default}


def _bits(module: str, layers: int, options: "Options") -> int:
    """The bits of a matrix that `keep` does not name. A recipe gives more bits to the output head, and to the value and
    down projections in the first and the last eighth of the layers, and in every third layer between them."""
    if options.recipe is None:
        return options.bits
    low, high = RECIPES[options.recipe]
    if "lm_head" in module:
        return high
    if "v_proj" not in module and "down_proj" not in module:
        return low
    layer = next(int(part) for part in module.split(".") if part.isdigit())
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return high if more else low
