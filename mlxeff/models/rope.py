"""Rotary position embedding from the entry `rope_scaling` of a Hugging Face config.json.

Sources: RoPE (arXiv 2104.09864), position interpolation ("linear", arXiv 2306.15595), YaRN (arXiv 2309.00071) and the
rule of the Llama 3.1 release ("llama3").
"""

import math

import mlx.core as mx

from ..errors import MlxeffError
from ..ops import Rope
from .config import changes_nothing, fits, require, short

ROPE_KEYS = frozenset(
    "rope_type type factor rope_theta original_max_position_embeddings low_freq_factor high_freq_factor "
    "beta_fast beta_slow attention_factor".split()
)
RULES = {  # rope_type → the keys that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def flat_entries(config: dict) -> dict:
    """The entries of transformers 4 (rope_theta, rope_scaling, …) that a config.json of transformers 5 has under
    rope_parameters, for readers that know only the former. Entries that are there in both forms are left out."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    local = parameters.get("sliding_attention")
    parameters = parameters.get("full_attention", parameters)
    if not isinstance(parameters, dict):
        return {}
    entries = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    if isinstance(local, dict) and "rope_theta" in local:
        entries["rope_local_base_freq"] = local["rope_theta"]
    rule = parameters.get("rope_type", "default")
    if rule != "default":
        entries["rope_scaling"] = {"type": rule} | {k: v for k, v in parameters.items() if k not in entries}
    return {name: value for name, value in entries.items() if config.get(name) is None}


def make_rope(size: int, base: float, scaling: dict | None, kind: str) -> Rope:
    """The rotary embedding for heads of `size` dimensions, with the base `base` and Hugging Face's `rope_scaling` dict.
    `kind` names the model in errors. Raises MlxeffError for unknown, missing or invalid keys."""
    scaling = {
        key: value for key, value in (scaling or {}).items() if key in ROPE_KEYS or not changes_nothing(key, value)
    }
    scaling = {key: value for key, value in scaling.items() if value is not None}
    rule = scaling.get("rope_type") or scaling.get("type") or "default"
    if unknown := sorted(set(scaling) - ROPE_KEYS):
        raise MlxeffError(f"{kind} config: rope_scaling: unknown keys {short(unknown)}")
    require(isinstance(rule, str) and rule in RULES, kind, "rope_scaling", "default, linear, llama3 or yarn", rule)
    for key in sorted(set(scaling) - {"rope_type", "type"}):
        value = scaling[key]
        require(fits(value, float) and value > 0, kind, f"rope_scaling {key}", "above 0", value)
        require(1e-9 < value < 1e12, kind, f"rope_scaling {key}", "above 1e-9 and below 1e12", value)
    if rule == "default":
        return Rope(size, base)
    if missing := sorted(key for key in RULES[rule] if key not in scaling):
        raise MlxeffError(f"{kind} config: rope_scaling of type {rule}: missing keys {missing}")
    if rule == "linear":
        return Rope(size, base, scale=1 / scaling["factor"])
    require(base > 1, kind, f"rope_theta beside rope_scaling of type {rule}", "above 1", base)
    wavelengths, magnitude = (_llama3 if rule == "llama3" else _yarn)(size, base, scaling)
    return Rope(size, None, wavelengths=wavelengths, magnitude=magnitude)


def _llama3(size: int, base: float, scaling: dict) -> tuple[mx.array, float]:
    """(Wavelengths in positions per radian, (size / 2), magnitude 1). Long wavelengths are multiplied by `factor`,
    short ones are unchanged, and those between are blended."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    periods = base ** (mx.arange(0, size, 2) / size)
    turns = context / (2 * mx.pi * periods)  # full turns within the original context
    smooth = (turns - low) / (high - low)
    blended = periods / ((1 - smooth) / factor + smooth)
    return mx.where(turns < low, periods * factor, mx.where(turns < high, blended, periods)), 1.0


def _yarn(size: int, base: float, scaling: dict) -> tuple[mx.array, float]:
    """(Wavelengths in positions per radian, (size / 2), magnitude). Dimensions that make few turns within the original
    context are interpolated by `factor`, those that make many are unchanged, with a linear ramp between (sections 3.2
    and 3.4)."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """The dimension that makes this number of turns within the original context."""
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), size - 1)
    ramp = mx.clip((mx.arange(size // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    kept = base ** (mx.arange(0, size, 2, dtype=mx.float32) / size)
    stretched = factor * kept
    magnitude = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return stretched * kept / (stretched * (1 - ramp) + kept * ramp), magnitude
