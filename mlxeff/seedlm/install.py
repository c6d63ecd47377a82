"""The `seedlm` entry of config.json ↔ the seed-encoded modules of a model.

    "seedlm": {"version": 1, "register_bits": 16, "taps": [0, 1, 3, 12], "seed": "first-state",
               "modules": {"model.layers.0.self_attn.q_proj": {"format": "4", "rows": 576, "cols": 576}, …}}

The entry describes the arrays completely, so a reader needs nothing but it and the file. Works on any `nn.Module`.
"""

import json
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import MlxeffError
from .format import BlockFormat, block_format, check_header, header
from .linear import SeedEmbedding, SeedLinear, SeedModule

KEYS = {"format", "rows", "cols"}
METADATA = "seedlm"  # key of a safetensors header, whose values are text: the JSON of `format.header()`


def entry(modules: Mapping[str, tuple[BlockFormat, int, int]]) -> dict:
    """What config.json says: module name → (format, rows, cols)."""
    described = {name: {"format": fmt.name, "rows": rows, "cols": cols} for name, (fmt, rows, cols) in modules.items()}
    return header() | {"modules": described}


def read_entry(value: object, origin: str) -> dict[str, tuple[BlockFormat, int, int]]:
    """Module name → (format, rows, cols); refuses an entry of another version, register or form."""
    check_header(value, origin)
    modules = value.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise MlxeffError(f"{origin}: seedlm: modules: wanted a table of modules, got {modules!r:.60}")
    if unknown := sorted(set(value) - set(header()) - {"modules"}):
        raise MlxeffError(f"{origin}: seedlm: unknown keys {unknown}")
    return {name: _described(name, each, origin) for name, each in modules.items()}


def metadata() -> dict[str, str]:
    """What a weights file with seed-encoded matrices says of itself."""
    return {METADATA: json.dumps(header())}


def check_metadata(text: str, origin: str) -> None:
    """Refuse the header of a weights file that another version, register or convention wrote."""
    try:
        got = json.loads(text)
    except ValueError as error:
        raise MlxeffError(f"{origin}: SeedLM header: wanted JSON, got {text!r:.60}") from error
    check_header(got, origin)


def _described(name: str, value: object, origin: str) -> tuple[BlockFormat, int, int]:
    if not isinstance(value, dict) or set(value) != KEYS:
        raise MlxeffError(f"{origin}: seedlm: {name}: wanted {', '.join(sorted(KEYS))}, got {value!r:.80}")
    for key in ("rows", "cols"):
        if type(value[key]) is not int or value[key] < 1:
            raise MlxeffError(f"{origin}: seedlm: {name}: {key}: wanted a positive whole number, got {value[key]!r}")
    return block_format(value["format"]), value["rows"], value["cols"]


def install(model: nn.Module, value: object, origin: str = "config") -> None:
    """Put seed-encoded modules, without their weights yet, where a config's `seedlm` says."""
    found = dict(model.named_modules())
    replaced = []
    for name, (fmt, rows, cols) in read_entry(value, origin).items():
        module = found.get(name)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            got = "none" if module is None else type(module).__name__
            raise MlxeffError(f"{origin}: seedlm: {name}: wanted a linear layer or an embedding, got {got}")
        if module.weight.shape != (rows, cols):
            raise MlxeffError(f"{origin}: seedlm: {name}: wanted shape {module.weight.shape}, got {(rows, cols)}")
        replaced.append((name, _seeded(module, fmt, rows, cols)))
    model.update_modules(tree_unflatten(replaced))


def _seeded(module: nn.Module, fmt: BlockFormat, rows: int, cols: int) -> SeedModule:
    if isinstance(module, nn.Linear):
        return SeedLinear(fmt, rows, cols, "bias" in module)
    return SeedEmbedding(fmt, rows, cols)


def finish(model: nn.Module, origin: str) -> None:
    """With the weights in: refuse damaged blocks, and tell embeddings the type of the model's activations."""
    floats = [leaf.dtype for _, leaf in tree_flatten(model.parameters()) if mx.issubdtype(leaf.dtype, mx.floating)]
    for name, module in model.named_modules():
        if isinstance(module, SeedModule):
            module.check(f"{origin}: {name}")
        if isinstance(module, SeedEmbedding):
            module.dtype = max(set(floats), key=floats.count, default=mx.float32)
