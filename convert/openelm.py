"""Apple's OpenELM: CoreNet's flat state dicts (`checkpoint_average.pt`, no config) and Hugging Face folders -> one
layout.

Sources: CoreNet's general_gpt.py for names, shapes and the layer-wise scaling rule; apple/OpenELM's config.json for the
keys. The size is read off the shapes. CoreNet pads the vocabulary of 32000 to 32128 rows; the padding is cut, as in
Apple's release.
"""

import re

import mlx.core as mx

from ..checkpoint import Source, Tensor
from ..errors import MlxeffError
from ..models.openelm import make_divisible, multipliers, published_config
from . import llama
from .plan import Family, Weight

PREFIX, EMBEDDING = "transformer.", "token_embeddings.weight"
PADDED_ROWS, ROWS = 32128, 32000
LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def recognises(source: Source) -> bool:
    if llama.recognises(source):
        return source.config["model_type"] == "openelm"
    return any(name.endswith(EMBEDDING) for name in source.tensors)


def read(source: Source) -> Family:
    """Raises MlxeffError if the shapes are not those of an OpenELM."""
    if llama.recognises(source):
        return llama.read(source)
    tensors = {_plain(name): tensor for name, tensor in source.tensors.items()}
    weights = [_weight(name, tensor) for name, tensor in tensors.items()]
    return Family("openelm CoreNet", config_from_shapes(source, tensors), weights)


def _plain(name: str) -> str:
    """CoreNet's own name, without what data-parallel training or a Hugging Face export put before it."""
    return name.removeprefix("module.").removeprefix(PREFIX)


def _weight(name: str, tensor: Tensor) -> Weight:
    full = "lm_head.weight" if name == "classifier.weight" else PREFIX + name
    if name not in (EMBEDDING, "classifier.weight") or tensor.shape[:1] != (PADDED_ROWS,):
        return llama.dense(full, tensor)

    def cut() -> list[mx.array]:
        return [mx.contiguous(tensor.read()[:ROWS])]

    return Weight(full, tensor.dtype, (ROWS, *tensor.shape[1:]), tensor.nbytes, cut)


class _Shapes:
    """Shapes by CoreNet's names, with the complaint if one is absent."""

    def __init__(self, source: Source, tensors: dict[str, Tensor]):
        self.origin, self.tensors = source.path.name, tensors

    def get(self, name: str, dimensions: int) -> tuple[int, ...]:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise MlxeffError(f"{self.origin}: missing tensor {name!r} of an OpenELM")
        if len(tensor.shape) != dimensions or 0 in tensor.shape:
            raise MlxeffError(
                f"{self.origin}: tensor {name!r}: wanted {dimensions} dimensions, got shape {tensor.shape}"
            )
        return tensor.shape

    def layers(self) -> int:
        found = {int(match[1]) for name in self.tensors if (match := LAYER.fullmatch(name))}
        if found != set(range(len(found))) or not found:
            raise MlxeffError(
                f"{self.origin}: wanted layers from 0 without a gap, got {len(found)} up to {max(found, default=None)}"
            )
        return len(found)


def config_from_shapes(source: Source, tensors: dict[str, Tensor]) -> dict:
    """Hugging Face's config.json of the OpenELM that has tensors of these shapes."""
    shapes = _Shapes(source, tensors)
    layers, (rows, model_dim) = shapes.layers(), shapes.get(EMBEDDING, 2)
    (head_dim,) = shapes.get("layers.0.attn.q_norm.weight", 1)
    heads = [_heads(shapes, i, head_dim) for i in range(layers)]
    widths = [shapes.get(f"layers.{i}.ffn.proj_2.weight", 2)[1] for i in range(layers)]
    ratios, divisor = _ffn_multipliers(widths, model_dim)
    return published_config("270M") | {  # the published sizes share what the shapes do not tell
        "num_transformer_layers": layers,
        "model_dim": model_dim,
        "head_dim": head_dim,
        "num_gqa_groups": heads[0][0] // heads[0][1],
        "num_query_heads": [queries for queries, _ in heads],
        "num_kv_heads": [groups for _, groups in heads],
        "ffn_multipliers": ratios,
        "ffn_dim_divisor": divisor,
        "ffn_with_glu": shapes.get("layers.0.ffn.proj_1.weight", 2)[0] == 2 * widths[0],
        "share_input_output_layers": "classifier.weight" not in tensors,
        "vocab_size": ROWS if rows == PADDED_ROWS else rows,
    }


def _heads(shapes: _Shapes, layer: int, head_dim: int) -> tuple[int, int]:
    """(query heads, KV heads) of a layer: qkv_proj has rows for q, k and v heads, out_proj columns for q heads."""
    rows = shapes.get(f"layers.{layer}.attn.qkv_proj.weight", 2)[0]
    columns = shapes.get(f"layers.{layer}.attn.out_proj.weight", 2)[1]
    queries, groups = columns // head_dim, (rows - columns) // (2 * head_dim)
    if queries < 1 or groups < 1 or (queries + 2 * groups) * head_dim != rows or queries % groups:
        name = f"layers.{layer}.attn.qkv_proj.weight"
        raise MlxeffError(
            f"{shapes.origin}: {name}: wanted rows of whole heads of {head_dim}, got {rows} beside {columns}"
        )
    return queries, groups


def _ffn_multipliers(widths: list[int], model_dim: int) -> tuple[list[float], int]:
    """The published rule (0.5 to 4.0, multiples of 256) if it gives these widths, else their plain ratios."""
    published = multipliers((0.5, 4.0), len(widths))
    if [make_divisible(ratio * model_dim, 256) for ratio in published] == widths:
        return published, 256
    divisor = next(step for step in (256, 128, 64, 32, 16, 8, 4, 2, 1) if all(width % step == 0 for width in widths))
    return [width / model_dim for width in widths], divisor
