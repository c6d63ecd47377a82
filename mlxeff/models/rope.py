"""Rotary position embedding from the entry `rope_scaling` of a Hugging Face config.json.

Sources: RoPE (arXiv 2104.09864), position interpolation ("linear", arXiv 2306.15595), YaRN (arXiv 2309.00071), LongRoPE
(arXiv 2402.13753), the rule of the Llama 3.1 release ("llama3"), and for YaRN's magnitude transformers'
`modeling_rope_utils.py` and mlx-lm's `rope_utils.py`. The entry `magnitude` is mlxeff's own: a GGUF file can
multiply queries and keys under any rule.
"""

import math

import mlx.core as mx

from ..errors import MlxeffError
from ..ops import Rope
from .config import changes_nothing, fits, require, short

ROPE_KEYS = frozenset(
    "rope_type type factor rope_theta original_max_position_embeddings low_freq_factor high_freq_factor "
    "beta_fast beta_slow attention_factor mscale mscale_all_dim magnitude "
    "short_factor long_factor mrope_section".split()
)
LISTS = ("short_factor", "long_factor", "mrope_section")
ANY_SIGN = ("mscale", "mscale_all_dim")  # numbers that may be 0 or negative
RULES = {  # rope_type → the keys that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
    "mrope": ("mrope_section",),  # of text, whose three positions are one
}
ALIASES = {"deepseek_yarn": "yarn", "telechat3-yarn": "yarn"}  # as in mlx-lm


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


def rule_of(scaling: dict) -> object:
    """The name of the rule in a `rope_scaling` dict, which may be anything that JSON has."""
    return scaling.get("rope_type") or scaling.get("type") or "default"


def make_rope(size: int, base: float, scaling: dict | None, kind: str, context: int = 0) -> Rope:
    """The rotary embedding for heads of `size` dimensions, with the base `base` and Hugging Face's `rope_scaling` dict.
    `kind` names the model in errors; `context` is its context in tokens. Raises MlxeffError for unknown, missing or
    invalid keys."""
    scaling = {
        key: value for key, value in (scaling or {}).items() if key in ROPE_KEYS or not changes_nothing(key, value)
    }
    scaling = {key: value for key, value in scaling.items() if value is not None}
    rule = rule_of(scaling)
    rule = ALIASES.get(rule, rule) if isinstance(rule, str) else rule
    if unknown := sorted(set(scaling) - ROPE_KEYS):
        raise MlxeffError(f"{kind} config: rope_scaling: unknown keys {short(unknown)}")
    require(isinstance(rule, str) and rule in RULES, kind, "rope_scaling", f"one of {', '.join(RULES)}", rule)
    for key in sorted(set(scaling) - {"rope_type", "type", *LISTS}):
        value, name = scaling[key], f"rope_scaling {key}"
        if key in ANY_SIGN:
            require(fits(value, float) and abs(value) < 1e12, kind, name, "a number above -1e12 and below 1e12", value)
            continue
        require(fits(value, float) and value > 0, kind, name, "above 0", value)
        require(1e-9 < value < 1e12, kind, name, "above 1e-9 and below 1e12", value)
    more = scaling.get("magnitude", 1.0)
    if missing := sorted(key for key in RULES[rule] if key not in scaling):
        raise MlxeffError(f"{kind} config: rope_scaling of type {rule}: missing keys {missing}")
    if rule == "mrope":
        sections = scaling["mrope_section"]
        right = fits(sections, list[int]) and len(sections) == 3
        require(right, kind, "rope_scaling mrope_section", "three numbers", sections)
    if rule in ("default", "mrope"):
        return Rope(size, base, magnitude=more)
    if rule == "linear":
        return Rope(size, base, scale=1 / scaling["factor"], magnitude=more)
    require(base > 1, kind, f"rope_theta beside rope_scaling of type {rule}", "above 1", base)
    if rule == "llama3":
        return Rope(size, None, wavelengths=_llama3(size, base, scaling), magnitude=more)
    if rule == "longrope":
        return _longrope(size, base, scaling, kind, context)
    magnitude = yarn_magnitude(scaling)
    require(magnitude > 0, kind, "rope_scaling", "mscale and mscale_all_dim of a magnitude above 0", magnitude)
    return Rope(size, None, wavelengths=_yarn(size, base, scaling), magnitude=magnitude * more)


def yarn_magnitude(scaling: dict) -> float:
    """YaRN's factor of the rotated queries and keys, √(1/t) in section 3.4: `attention_factor` where there is one (only
    transformers reads it), else the ratio of 0.1 · m · ln(factor) + 1 with m = `mscale` (default 1) to the same with
    m = `mscale_all_dim` (default 0), as in mlx-lm. transformers reads these two only where both are given and not 0.
    0 where the divisor is 0."""
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    logarithm = 0.1 * math.log(max(scaling["factor"], 1.0))
    divisor = logarithm * scaling.get("mscale_all_dim", 0) + 1
    return (logarithm * scaling.get("mscale", 1) + 1) / divisor if divisor else 0.0


def _llama3(size: int, base: float, scaling: dict) -> mx.array:
    """Wavelengths in positions per radian, (size / 2). Long ones are multiplied by `factor`, short ones are unchanged,
    and those between are blended."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    periods = base ** (mx.arange(0, size, 2) / size)
    turns = context / (2 * mx.pi * periods)  # full turns within the original context
    smooth = (turns - low) / (high - low)
    blended = periods / ((1 - smooth) / factor + smooth)
    return mx.where(turns < low, periods * factor, mx.where(turns < high, blended, periods))


def _longrope(size: int, base: float, scaling: dict, kind: str, context: int) -> Rope:
    """LongRoPE (arXiv 2402.13753) as mlx-lm has it: the factors for long texts, whatever the length of the text is. The
    magnitude is `attention_factor` where there is one (only transformers reads it), else it follows from the ratio of
    the `context` to the original one."""
    original = scaling["original_max_position_embeddings"]
    require(original > 1, kind, "rope_scaling original_max_position_embeddings", "above 1", original)
    for name in ("short_factor", "long_factor"):
        factors = scaling[name] if isinstance(scaling[name], list) else [scaling[name]]
        right = len(factors) in (1, size // 2) and all(fits(each, float) and 1e-9 < each < 1e12 for each in factors)
        require(right, kind, f"rope_scaling {name}", f"{size // 2} numbers above 0", scaling[name])
    ratio = context / original
    magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    magnitude = scaling.get("attention_factor", magnitude) * scaling.get("magnitude", 1.0)
    periods = base ** (mx.arange(0, size, 2, dtype=mx.float32) / size)
    return Rope(size, None, wavelengths=mx.array(scaling["long_factor"], mx.float32) * periods, magnitude=magnitude)


def _yarn(size: int, base: float, scaling: dict) -> mx.array:
    """Wavelengths in positions per radian, (size / 2). Dimensions that make few turns within the original context are
    interpolated by `factor`, those that make many are unchanged, with a linear ramp between (section 3.2)."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """The dimension that makes this number of turns within the original context."""
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), size - 1)
    ramp = mx.clip((mx.arange(size // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    kept = base ** (mx.arange(0, size, 2, dtype=mx.float32) / size)
    stretched = factor * kept
    return stretched * kept / (stretched * (1 - ramp) + kept * ramp)
