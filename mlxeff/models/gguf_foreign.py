"""GGUF files of architectures that only mlx-lm computes: metadata → the dict of its config.json, tensors → the
parameters of its model.

The tables of the `gguf` library say which tensor belongs to which parameter; `gguf_architectures` says what llama.cpp's
converter changes in the tensors, and how each architecture's keys translate. This module does the work that all have
in common.
"""

import re
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint import Source, Tensor
from ..errors import MlxeffError, some
from . import gguf
from .adapter import build_foreign
from .gguf_architectures import ARCHITECTURES, Architecture
from .gguf_keys import Keys

EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Tensors that are part of the metadata: their values are in the config.
FACTORS = (gguf.FREQUENCIES, "rope_factors_long.weight", "rope_factors_short.weight")
EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's names of an expert's matrices


def config_from_gguf(source: Source) -> dict:
    """The dict of a config.json for the model in a GGUF file of any architecture that can be run. Raises MlxeffError
    for missing or invalid keys, and for architectures and variants that are not supported."""
    if (architecture := _architecture(source)) is None:
        return gguf.config_from_gguf(source)
    keys = Keys(source)
    config = _common(keys, architecture)
    config |= architecture.entries(keys, config)
    config["tie_word_embeddings"] = "output.weight" not in source.tensors
    if "sliding_window" not in config:
        keys.say_window()
    config |= keys.token_ids()
    keys.say_unused()
    return config


def build(source: Source, config: dict) -> tuple[nn.Module, dict[str, mx.array]]:
    """(mlx-lm's model of this config with random weights that are not evaluated, the weights by the names of its
    parameters). Matrices whose blocks MLX has a form for stay quantised. Raises MlxeffError for tensors that the model
    does not have; missing tensors are left to the caller."""
    architecture = _architecture(source)
    model = build_foreign(config, str(source.path))
    if architecture.finish:
        architecture.finish(model)
    tensors = _by_parameter(source, model, config, architecture)
    layout = {name.rpartition(".")[0]: tensor for name, (tensor, change) in tensors.items() if _packed(tensor, change)}
    modules = dict(model.named_modules())
    layout = {name: tensor for name, tensor in layout.items() if hasattr(modules.get(name), "to_quantized")}

    def scheme(path: str, _: nn.Module) -> dict | bool:
        found = layout.get(path)
        return {"group_size": found.group_size, "bits": found.bits} if found else False

    if layout:
        nn.quantize(model, class_predicate=scheme)
    weights = {}
    for name, (tensor, change) in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in layout:
            parts = tensor.read_packed() if change is None else [change(part) for part in tensor.read_packed()]
            weights |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
        else:
            value = tensor.read()
            weights[name] = value if change is None else change(value)
    return model, weights


def _architecture(source: Source) -> Architecture | None:
    """The entry of ARCHITECTURES for this file; None for the families that this package computes itself. Raises
    MlxeffError for other architectures."""
    name, experts = source.metadata.get("general.architecture"), source.metadata.get("llama.expert_count")
    if name == "llama" and experts:
        return ARCHITECTURES["llama"]
    if name in gguf.FAMILIES:
        return None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted({*gguf.FAMILIES, *ARCHITECTURES}))
        text = f"{source.path.name}: architecture: wanted one of {known}, got {name!r:.40}"
        raise MlxeffError(text, len(text))  # the whole list
    return ARCHITECTURES[name]


def _common(keys: Keys, architecture: Architecture) -> dict:
    """The entries that most architectures have."""
    if architecture.recurrent:
        config = {"hidden_size": keys.integer("embedding_length"), "num_hidden_layers": keys.layers()}
    else:
        config = _attention(keys, architecture)
    config["model_type"] = architecture.model_type
    config["vocab_size"] = _rows(keys, "token_embd.weight")
    config["max_position_embeddings"] = keys.integer("context_length")
    epsilon = next((key for key in EPSILONS if keys.get(key) is not None), EPSILONS[0])
    config[architecture.epsilon] = keys.number(epsilon)
    for key in ("feed_forward_length", "attention.head_count", *EPSILONS):  # some converters write them for all
        keys.get(key)
    return config


def _attention(keys: Keys, architecture: Architecture) -> dict:
    """The entries of an architecture with attention and feed-forward networks."""
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    groups = keys.integer("attention.head_count_kv", heads) if not architecture.mixed else None
    head_dim = keys.integer("attention.key_length", hidden // heads)
    rotated = keys.integer("rope.dimension_count", head_dim)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.wrong("attention.value_length", f"the head size {head_dim}", keys.get("attention.value_length"))
    if rotated != head_dim and not architecture.partial:
        raise keys.wrong("rope.dimension_count", f"the head size {head_dim}", rotated)
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": keys.layers(),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in keys.tensors,
    }
    if architecture.partial:
        config[architecture.partial] = rotated / head_dim
    if FACTORS[1] in keys.tensors:  # the architecture's own entries say the rule
        return config
    scaling = gguf.rope_scaling(keys, head_dim)
    if "magnitude" in (scaling or {}):
        raise keys.wrong("rope.scaling.attn_factor", "1, mlx-lm reads another one with YaRN only", scaling["magnitude"])
    if scaling and architecture.rope_rules:
        if scaling["rope_type"] not in architecture.rope_rules:
            raise keys.wrong("rope.scaling.type", f"one of {', '.join(architecture.rope_rules)}", scaling["rope_type"])
        config["rope_scaling"] = scaling
    elif scaling:
        raise keys.wrong("rope.scaling", f"none, as mlx-lm's {architecture.model_type} has none", scaling["rope_type"])
    return config


def _rows(keys: Keys, name: str) -> int:
    """The number of rows of a tensor that has to be there."""
    if name not in keys.tensors:
        raise MlxeffError(f"{keys.origin}: missing tensor {name!r}")
    return keys.tensors[name].shape[0]


def _by_parameter(
    source: Source, model: nn.Module, config: dict, architecture: Architecture
) -> dict[str, tuple[Tensor, Callable | None]]:
    """Parameter → (its tensor, what has to be done to it; None for nothing). Raises MlxeffError for tensors that belong
    to no parameter."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(kinds[source.metadata["general.architecture"]], config["num_hidden_layers"])
    result, used = {}, set()
    for parameter, value in tree_flatten(model.parameters()):
        for stored in _stored_names(parameter, table, architecture):
            if (tensor := source.tensors.get(stored)) is not None:
                used.add(stored)
                result[parameter] = tensor, architecture.change(stored, tensor, value, config)
                break
    if unknown := [name for name in source.tensors if name not in used and name not in FACTORS]:
        raise MlxeffError(
            f"{source.path.name}: {len(unknown)} tensors that mlx-lm's {config['model_type']} does not have: "
            f"{some(unknown)}"
        )
    return result


def _stored_names(parameter: str, table: object, architecture: Architecture) -> list[str]:
    """The names that a parameter may have in the file, the likeliest first."""
    for old, new in architecture.rename:
        parameter = parameter.replace(old, new)
    parameter = re.sub(r"(block_sparse_moe\.)switch_mlp\.(\w+)", lambda m: f"{m[1]}experts.{EXPERTS[m[2]]}", parameter)
    parameter = parameter.replace("switch_mlp", "experts")
    module, _, kind = parameter.rpartition(".")
    whole, stem = table.get_name(parameter), table.get_name(module)
    names = [f"{stem}.{kind}"] if stem else []
    return names + ([whole, f"{whole}.weight", f"{whole}.bias"] if whole else [])


def _packed(tensor: Tensor, change: Callable | None) -> bool:
    """Whether a tensor can stay quantised: MLX has a form for its blocks, and at most its rows are put in order."""
    return tensor.bits is not None and len(tensor.shape) > 1 and (change is None or getattr(change, "by_rows", False))
