"""The source family of Apple's OpenELM: Hugging Face folders, and CoreNet's state dicts (`checkpoint_average.pt`).

CoreNet's files have no config: it is derived from the shapes of the tensors. CoreNet pads the vocabulary of 32000
tokens to 32128 rows; the padding is cut off, as in Apple's release on Hugging Face. Sources: CoreNet's general_gpt.py
for names, shapes and the rule for layer-wise scaling; the config.json of apple/OpenELM for the keys. This module writes
nothing.
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
    """Whether the source is an OpenELM, of Hugging Face or of CoreNet."""
    if llama.recognises(source):
        return source.config["model_type"] == "openelm"
    return any(name.endswith(EMBEDDING) for name in source.tensors)


def read(source: Source) -> Family:
    """The config and the weights of a source. Raises MlxeffError where the shapes are not those of an OpenELM."""
    if llama.recognises(source):
        return llama.read(source)
    tensors = {_plain(name): tensor for name, tensor in source.tensors.items()}
    weights = [_weight(name, tensor) for name, tensor in tensors.items()]
    return Family("openelm CoreNet", config_from_shapes(source, tensors), weights)


def _plain(name: str) -> str:
    """The name of a tensor in CoreNet's model, without the prefixes "module." of data-parallel training and
    "transformer." of a Hugging Face export."""
    return name.removeprefix("module.").removeprefix(PREFIX)


def _weight(name: str, tensor: Tensor) -> Weight:
    """The weight for a tensor of CoreNet: under Hugging Face's name, and without the padding of the vocabulary."""
    full = "lm_head.weight" if name == "classifier.weight" else PREFIX + name
    if name not in (EMBEDDING, "classifier.weight") or tensor.shape[:1] != (PADDED_ROWS,):
        return llama.dense(full, tensor)

    def cut() -> list[mx.array]:
        return [mx.contiguous(tensor.read()[:ROWS])]

    return Weight(full, tensor.dtype, (ROWS, *tensor.shape[1:]), tensor.nbytes, cut)


class _Shapes:
    """The shapes of the tensors, by CoreNet's names. Raises MlxeffError for a missing tensor and for a wrong number of
    dimensions."""

    def __init__(self, source: Source, tensors: dict[str, Tensor]):
        self.origin, self.tensors = source.path.name, tensors

    def get(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of the tensor `name`, which has so many `dimensions`."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise MlxeffError(f"{self.origin}: missing tensor {name!r} of an OpenELM")
        if len(tensor.shape) != dimensions or 0 in tensor.shape:
            raise MlxeffError(
                f"{self.origin}: tensor {name!r}: wanted {dimensions} dimensions, got shape {tensor.shape}"
            )
        return tensor.shape

    def layers(self) -> int:
        """The number of layers."""
        found = {int(match[1]) for name in self.tensors if (match := LAYER.fullmatch(name))}
        if found != set(range(len(found))) or not found:
            raise MlxeffError(
                f"{self.origin}: wanted layers from 0 without a gap, got {len(found)} up to {max(found, default=None)}"
            )
        return len(found)


def config_from_shapes(source: Source, tensors: dict[str, Tensor]) -> dict:
    """The config.json, with Hugging Face's keys, of the OpenELM whose tensors have these shapes. `tensors` are named as
    in CoreNet; `source` is for messages. Raises MlxeffError where no OpenELM has these shapes."""
    shapes = _Shapes(source, tensors)
    layers, (rows, model_dim) = shapes.layers(), shapes.get(EMBEDDING, 2)
    (head_dim,) = shapes.get("layers.0.attn.q_norm.weight", 1)
    heads = [_heads(shapes, i, head_dim) for i in range(layers)]
    widths = [shapes.get(f"layers.{i}.ffn.proj_2.weight", 2)[1] for i in range(layers)]
    ratios, divisor = _ffn_multipliers(widths, model_dim)
    return published_config("270M") | {  # the keys that shapes do not determine are the same for all published sizes
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
    """(Number of query heads, number of KV heads) of a layer. The rows of qkv_proj belong to query, key and value
    heads, the columns of out_proj to query heads."""
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
    """(`ffn_multipliers`, `ffn_dim_divisor`) for feed-forward networks of these `widths`: those of the published rule
    (multipliers from 0.5 to 4.0, widths rounded to multiples of 256) where it gives these widths, otherwise the ratios
    of the widths to `model_dim`."""
    published = multipliers((0.5, 4.0), len(widths))
    if [make_divisible(ratio * model_dim, 256) for ratio in published] == widths:
        return published, 256
    divisor = next(step for step in (256, 128, 64, 32, 16, 8, 4, 2, 1) if all(width % step == 0 for width in widths))
    return [width / model_dim for width in widths], divisor
