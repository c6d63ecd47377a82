"""The entry `seedlm` of a config.json ↔ the seed-encoded modules of a model.

    "seedlm": {"version": 1, "register_bits": 16, "taps": [0, 1, 3, 12], "seed": "first-state",
               "modules": {"model.layers.0.self_attn.q_proj": {"format": "4", "rows": 576, "cols": 576}, …}}

With the entry and the weights file, a reader can decode all matrices; `format` explains the keys. The functions here
work on any `nn.Module`.
"""

import json
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import MlxeffError
from .format import BlockFormat, block_format, check_header, header
from .linear import SeedEmbedding, SeedLinear, SeedModule

KEYS = {"format", "rows", "cols"}  # of each module
METADATA = "seedlm"  # key in the metadata of a safetensors file; its value is `format.header()` as JSON text


def entry(modules: Mapping[str, tuple[BlockFormat, int, int]]) -> dict:
    """The entry of config.json for these modules: name → (format, rows, cols) of the matrix."""
    described = {name: {"format": fmt.name, "rows": rows, "cols": cols} for name, (fmt, rows, cols) in modules.items()}
    return header() | {"modules": described}


def read_entry(value: object, origin: str) -> dict[str, tuple[BlockFormat, int, int]]:
    """The entry of a config.json → module name → (format, rows, cols). Raises MlxeffError for an entry of another
    version, register or structure; `origin` names the config."""
    check_header(value, origin)
    modules = value.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise MlxeffError(f"{origin}: seedlm: modules: wanted a table of modules, got {modules!r:.60}")
    if unknown := sorted(set(value) - set(header()) - {"modules"}):
        raise MlxeffError(f"{origin}: seedlm: unknown keys {unknown}")
    return {name: _described(name, module, origin) for name, module in modules.items()}


def metadata() -> dict[str, str]:
    """The metadata of a weights file with seed-encoded matrices."""
    return {METADATA: json.dumps(header())}


def check_metadata(text: str, origin: str) -> None:
    """Raises MlxeffError for the metadata of a weights file of another version, register or seed convention."""
    try:
        got = json.loads(text)
    except ValueError as error:
        raise MlxeffError(f"{origin}: SeedLM header: wanted JSON, got {text!r:.60}") from error
    check_header(got, origin)


def _described(name: str, value: object, origin: str) -> tuple[BlockFormat, int, int]:
    """(Format, rows, cols) of one module of the entry."""
    if not isinstance(value, dict) or set(value) != KEYS:
        raise MlxeffError(f"{origin}: seedlm: {name}: wanted {', '.join(sorted(KEYS))}, got {value!r:.80}")
    for key in ("rows", "cols"):
        if type(value[key]) is not int or value[key] < 1:
            raise MlxeffError(f"{origin}: seedlm: {name}: {key}: wanted a positive whole number, got {value[key]!r}")
    return block_format(value["format"]), value["rows"], value["cols"]


def install(model: nn.Module, value: object, origin: str = "config") -> None:
    """Replace the modules that `value`, the entry `seedlm` of a config, names by seed-encoded ones, whose arrays are
    zeros until weights are loaded. Raises MlxeffError where the model has no such module."""
    modules = dict(model.named_modules())
    replaced = []
    for name, (fmt, rows, cols) in read_entry(value, origin).items():
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            got = "none" if module is None else type(module).__name__
            raise MlxeffError(f"{origin}: seedlm: {name}: wanted a linear layer or an embedding, got {got}")
        if module.weight.shape != (rows, cols):
            raise MlxeffError(f"{origin}: seedlm: {name}: wanted shape {module.weight.shape}, got {(rows, cols)}")
        replaced.append((name, _seeded(module, fmt, rows, cols)))
    model.update_modules(tree_unflatten(replaced))


def _seeded(module: nn.Module, fmt: BlockFormat, rows: int, cols: int) -> SeedModule:
    """The seed-encoded module that takes the place of `module`."""
    if isinstance(module, nn.Linear):
        return SeedLinear(fmt, rows, cols, "bias" in module)
    return SeedEmbedding(fmt, rows, cols)


def finish(model: nn.Module, origin: str) -> None:
    """To be called when the weights are loaded: raises MlxeffError for damaged blocks, and sets the type of the rows of
    seed-encoded embeddings to the most frequent float type of the model's other weights."""
    floats = [leaf.dtype for _, leaf in tree_flatten(model.parameters()) if mx.issubdtype(leaf.dtype, mx.floating)]
    for name, module in model.named_modules():
        if isinstance(module, SeedModule):
            module.check(f"{origin}: {name}")
        if isinstance(module, SeedEmbedding):
            module.dtype = max(set(floats), key=floats.count, default=mx.float32)
