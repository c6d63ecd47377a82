"""Ways to store weights and keys and values, and what a number of each takes: those of the model as it is, and those
that `mlxeff convert` and `--kv-cache` offer.

A checkpoint's own bits come from config.json: MLX's entry `quantization`, SeedLM's entry `seedlm`, else `torch_dtype`.
"""

import math
from collections.abc import Mapping

from ..errors import MlxeffError, notices
from ..models.config import short
from ..seedlm.format import FORMATS
from .costs import Bits
from .shapes import Shape

GROUP = 64  # weights that share a scale and a bias of 16 bits in MLX's affine quantisation
SIDES = {"affine": 32.0, "mxfp4": 8.0, "mxfp8": 8.0, "nvfp4": 8.0}  # mode → bits beside the weights of a group
GROUPS = {"affine": GROUP, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
KEPT = 8.5  # bits of embedding and output head beside seeds, the converter's default
AS_STORED = "as stored"
# What `mlxeff convert` makes. The 16-bit kinds are one: both have 2 bytes.
MADE = {
    "float16": Bits.of(16),
    "affine 8": Bits.of(8.5),
    "affine 4": Bits.of(4.5),
    **{f"seedlm {name}": Bits.of(each.bits, KEPT, kind=f"seeds {name}") for name, each in FORMATS.items()},
}
# Kind of KV cache → bytes of a number; "draft" is the upper plane of int8, which QuantSpec's draft reads. The newest 64
# to 127 tokens, which int4 and a draft have in 8 bits, are left out.
KV_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0625, "k8v4": 0.8125, "int4": 0.5625, "draft": 0.5625}
KV_DEFAULT = {"gpu": ("float16", "int8", "k8v4", "int4"), "cpu": ("float32", "float16", "int8", "k8v4", "int4")}
# KL divergence of SmolLM2-135M in nats a token from its dense model (benchmarks/RESULTS.md, SeedLM): an indication.
QUALITY = {"seedlm 4.5": 0.056, "seedlm 3": 0.410, "affine 4": 0.336}


def affine(bits: float, group: float, mode: str = "affine") -> float:
    """Bits a weight with the scales of its group."""
    return bits + SIDES[mode] / group


def stored(config: Mapping, shape: Shape) -> Bits:
    """Bits of the weights as the config.json says. Raises MlxeffError for a quantisation that MLX does not know."""
    entry, dense = config.get("quantization"), 32.0 if "32" in _dtype(config) else 16.0
    names = [matrix.name for layer in shape.layers for matrix in layer.matrices]
    if seeds := config.get("seedlm"):
        return _seeded(seeds, entry, dense)
    if not entry:
        foreign = config.get("quantization_config")
        method = foreign.get("quant_method") if isinstance(foreign, dict) else None
        if method == "mxfp4":
            return Bits.of(dense, experts=4.25)
        if foreign:
            raise MlxeffError(f"config: quantization_config: {short(method or foreign)}: its bits are not known here")
        return Bits.of(dense)
    if not isinstance(entry, dict):
        raise MlxeffError(f"config: quantization: wanted an object, got {short(entry)}")
    default = _scheme(entry, dense)
    own = {name: _scheme(value, dense) for name, value in entry.items() if isinstance(value, dict | bool)}
    head = next((bits for name, bits in own.items() if name.endswith(("lm_head", "embed_tokens"))), default)
    inner = {name: bits for name, bits in own.items() if ".layers." in name}
    experts = [bits for name, bits in inner.items() if ".experts" in name or "switch_mlp" in name]
    rest = [bits for name, bits in inner.items() if ".experts" not in name and "switch_mlp" not in name]
    # Matrices with an entry of their own count as if all were of one size.
    places = max(1, len([name for name in names if ".experts." not in name]))
    layers = (sum(rest[:places]) + default * max(0, places - len(rest))) / places
    return Bits.of(layers, head, math.fsum(experts) / len(experts) if experts else default)


def _dtype(config: Mapping) -> str:
    return str(config.get("torch_dtype") or config.get("dtype") or "float16")


def _scheme(value: object, dense: float) -> float:
    """Bits of an entry of `quantization`."""
    if value is False:
        return dense
    value = {} if value is True else value
    bits, mode = value.get("bits", 4), value.get("mode", "affine")
    group = value.get("group_size", GROUPS.get(mode))
    if mode not in SIDES or type(bits) is not int or type(group) is not int or not 1 <= bits <= 8 or group < 1:
        raise MlxeffError(f"config: quantization: wanted bits, group_size and mode of MLX, got {short(value)}")
    return affine(bits, group, mode)


def _seeded(seeds: object, entry: object, dense: float) -> Bits:
    """Bits of a checkpoint with seeds: the commonest format of its modules."""
    modules = seeds.get("modules") if isinstance(seeds, dict) else None
    found = [m.get("format") for m in modules.values() if isinstance(m, dict)] if isinstance(modules, dict) else []
    name = max(set(found), key=found.count, default=None)
    if name not in FORMATS:
        raise MlxeffError(f"config: seedlm: wanted modules in the formats {', '.join(FORMATS)}, got {short(modules)}")
    return Bits.of(FORMATS[name].bits, _scheme(entry, dense) if entry else dense, kind=f"seeds {name}")


def of_tensors(tensors: Mapping, shape: Shape) -> Bits:
    """Bits of the weights of a GGUF file by its tensors. Raises MlxeffError where it has no matrices."""
    layers = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) > 1 and "exps" not in name]
    experts = [t for name, t in tensors.items() if name.startswith("blk.") and "exps" in name]
    head = [t for name, t in tensors.items() if name == "output.weight"] or [
        t for name, t in tensors.items() if name == "token_embd.weight"
    ]
    if not layers or not head:
        raise MlxeffError(f"{shape.model_type}: wanted tensors of layers and of an embedding, got {len(tensors)}")

    def mean(chosen: list) -> float:
        return 8 * sum(t.memory_nbytes for t in chosen) / sum(math.prod(t.shape) for t in chosen)

    return Bits.of(mean(layers), mean(head), mean(experts) if experts else None)


def choices(own: Bits) -> dict[str, Bits]:
    """The ways to store the weights that are compared: as stored, and what a conversion could make with fewer bits."""
    return {AS_STORED: own} | {name: bits for name, bits in MADE.items() if bits.layers < own.layers - 0.01}


def say_smaller(own: Bits) -> None:
    """A notice where the weights have few bits already, so that converting them once more costs quality."""
    if own.layers < 8:
        notices.info("the weights have %.3g bits already: a conversion should start from the dense model", own.layers)
