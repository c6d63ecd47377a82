"""A DynaMoE checkpoint → the dense model that it was made of, for software that knows no nested experts.

Routers and the down-projections of smaller experts are left out, and the rows of gate and up go back to the columns of
the down-projection that belong to them. Where the smaller experts have matrices of their own, these are the weights of
the dense model in its own order; otherwise its neurons stay in the order of their importance, with the same outputs.
Networks that leave out inputs are read by their columns, which hold the codes of the dense model's rows.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint import Source
from ..checkpoint.tensor import NAMES
from ..dynamoe.columns import Columns
from ..dynamoe.sparse import interleaved
from ..dynamoe.sparse_install import Form, is_sparse, read_entry
from ..errors import MlxeffError
from ..modules import dense as dense_matrix
from .plan import Family, Weight

DROPPED = (".router.weight", ".router.bias", ".order", ".input_weights", ".neuron_weights")
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
JOINED, LAST = "proj_1", "proj_2"  # OpenELM's names: gate and up are one matrix


def recognises(config: dict) -> bool:
    """Whether a config.json is that of a DynaMoE."""
    return "dynamoe" in config


def by_columns(config: dict) -> bool:
    """Whether a config.json is that of a DynaMoE whose matrices are stored by their columns."""
    return is_sparse(config.get("dynamoe"))


def dense_rows(source: Source, config: dict) -> tuple[list[Weight], set[str], dict]:
    """(The feed-forward matrices of a DynaMoE that stores them by columns, as those of the dense model; the names of
    the tensors that hold them; the config with their entries in `quantization`)."""
    entry = read_entry(config["dynamoe"], str(source.path))
    networks = sorted(
        name.removesuffix(".gate_up.weight") for name in source.tensors if name.endswith(".gate_up.weight")
    )
    numbers = [next(int(part) for part in network.split(".") if part.isdigit()) for network in networks]
    if sorted(numbers) != list(range(len(entry.down))):
        raise MlxeffError(f"{source.path}: wanted the columns of {len(entry.down)} layers, got {len(networks)}")
    weights, taken, schemes = [], set(), {}
    for network, number in zip(networks, numbers, strict=True):
        forms = {GATE: entry.gate_up[number], UP: entry.gate_up[number], DOWN: entry.down[number]}
        size = tuple(source.tensors[f"{network}.{name}_weights"].shape[0] for name in ("input", "neuron"))
        for own, (bits, group) in forms.items():
            stored = f"{network}.down" if own == DOWN else f"{network}.gate_up"
            weights.append(_from_columns(source, f"{network}.{own}", stored, own, (bits, group), size))
            taken |= {
                name for name in source.tensors if name.rpartition(".")[0] == stored and not name.endswith(".bias")
            }
            if bits:
                schemes[f"{network}.{own}"] = {"group_size": group, "bits": bits}
        if bias := source.tensors.get(f"{network}.down.bias"):
            read = lambda bias=bias: [bias.read()]  # noqa: E731
            weights.append(Weight(f"{network}.{DOWN}.bias", bias.dtype, bias.shape, bias.nbytes, read))
            taken.add(bias.name)
    if schemes:
        config = config | {"quantization": (config.get("quantization") or next(iter(schemes.values()))) | schemes}
    return weights, taken, config


def _from_columns(source: Source, module: str, stored: str, own: str, form: Form, size: tuple[int, int]) -> Weight:
    """The weight of `module`, some of the rows of which the tensors of `stored` have the columns. `size`: (D, F)."""
    bits, group = form
    names = [f"{stored}.{part}" for part in (("weight", "scales", "biases") if bits else ("weight",))]
    if missing := [name for name in names if name not in source.tensors]:
        raise MlxeffError(f"{source.path}: missing {', '.join(missing)}")
    tensors = [source.tensors[name] for name in names]
    outputs, inputs = size if own == DOWN else (2 * size[1], size[0])
    rows = outputs if own == DOWN else outputs // 2

    def layer() -> nn.Module:
        columns = Columns(outputs, inputs, bits, group)
        for name, tensor in zip(("weight", "scales", "biases"), tensors, strict=False):
            columns[name] = tensor.read()
        made = columns.rows()
        if own != DOWN:
            places = np.argsort(interleaved(rows))
            chosen = mx.array(places[:rows] if own == GATE else places[rows:])
            for name in ("weight", "scales", "biases")[: len(tensors)]:
                made[name] = made[name][chosen]
        return made

    def read() -> list[mx.array]:
        made = layer()
        return [made[name] for name in ("weight", "scales", "biases")[: len(tensors)]]

    nbytes = sum(tensor.nbytes for tensor in tensors) * rows // outputs
    if not bits:
        return Weight(f"{module}.weight", tensors[0].dtype, (rows, inputs), nbytes, read)
    scales = (rows, inputs // group)
    shapes = ((rows, inputs * bits // 32), scales, scales)
    specs = tuple(
        (f"{module}.{name}", NAMES[mx.uint32] if name == "weight" else tensors[1].dtype, shape)
        for name, shape in zip(("weight", "scales", "biases"), shapes, strict=True)
    )
    whole = lambda: dense_matrix(layer())  # noqa: E731
    return Weight(
        f"{module}.weight", tensors[1].dtype, (rows, inputs), nbytes, read, specs, whole, f"affine {bits} bits"
    )


def dense(family: Family) -> Family:
    """The family of the dense model. Raises MlxeffError for one that is not a DynaMoE."""
    if not recognises(family.config):
        raise MlxeffError("convert: export-dense: wanted a DynaMoE checkpoint, got a dense one")
    orders = {
        weight.module: weight.read for weight in family.weights if weight.name.endswith(".order")
    }  # module of the network → reads the order of its neurons
    kept = [weight for weight in family.weights if not _dropped(weight.name)]
    weights = [_ordered(weight, orders) for weight in kept]
    if family.config["model_type"] == "openelm":
        weights = _joined(weights)
    config = {key: value for key, value in family.config.items() if key != "dynamoe"}
    if isinstance(seeds := config.get("seedlm"), dict) and isinstance(seeds.get("modules"), dict):
        modules = {name: each for name, each in seeds["modules"].items() if ".experts." not in name}
        config["seedlm"] = seeds | {"modules": modules}
    return replace(family, config=_without_networks(config, family.config["model_type"]), weights=weights)


def _dropped(name: str) -> bool:
    return name.endswith(DROPPED) or ".experts." in name


def _ordered(weight: Weight, orders: dict[str, Callable[[], list[mx.array]]]) -> Weight:
    """The weight; of gate and up with the rows in the order of the columns of the down-projection."""
    network, _, own = weight.module.rpartition(".")
    if own not in (GATE, UP) or network not in orders:
        return weight
    order = orders[network]

    def rows(arrays: list[mx.array]) -> list[mx.array]:
        back = mx.argsort(order()[0])
        return [array[back] if array.ndim and array.shape[0] == weight.shape[0] else array for array in arrays]

    inner, whole = weight.read, weight.dense
    return replace(weight, read=lambda: rows(inner()), dense=whole and (lambda: rows([whole()])[0]))


def _joined(weights: list[Weight]) -> list[Weight]:
    """The weights with OpenELM's names: gate and up of a network as one matrix. Raises MlxeffError where both are not
    stored alike."""
    found = {weight.name: weight for weight in weights}
    joined = []
    for weight in weights:
        network, _, own = weight.module.rpartition(".")
        if own == UP:
            continue
        if own == DOWN:
            joined.append(_renamed(weight, f"{network}.{LAST}"))
        elif own == GATE:
            other = found[f"{network}.{UP}.{weight.name.rpartition('.')[2]}"]
            if [spec[1:] for spec in weight.packed] != [spec[1:] for spec in other.packed]:
                raise MlxeffError(f"convert: export-dense: {network}: wanted gate and up stored alike, got others")
            if weight.form.startswith("SeedLM"):
                raise MlxeffError(
                    f"convert: export-dense: {network}: seeds of gate and up cannot be joined: --dequantize"
                )
            joined.append(_stacked(weight, other, f"{network}.{JOINED}"))
        else:
            joined.append(weight)
    return joined


def _renamed(weight: Weight, module: str) -> Weight:
    """The weight as one of another module."""
    name = lambda full: f"{module}.{full.rpartition('.')[2]}"  # noqa: E731
    packed = tuple((name(full), dtype, shape) for full, dtype, shape in weight.packed)
    return replace(weight, name=name(weight.name), packed=packed)


def _stacked(first: Weight, second: Weight, module: str) -> Weight:
    """The rows of two weights that are stored alike as one weight of `module`."""
    both = _renamed(first, module)
    rows = 2 * first.shape[0]
    packed = tuple(
        (name, dtype, (rows, *shape[1:]) if shape[:1] == first.shape[:1] else shape)
        for name, dtype, shape in both.packed
    )

    def read() -> list[mx.array]:
        pairs = zip(first.read(), second.read(), strict=True)
        return [mx.concatenate([a, b]) if a.ndim and a.shape[0] == first.shape[0] else a for a, b in pairs]

    dense = first.dense and (lambda: mx.concatenate([first.dense(), second.dense()]))
    shape, nbytes = (rows, *first.shape[1:]), first.nbytes + second.nbytes
    return replace(both, shape=shape, nbytes=nbytes, read=read, packed=packed, dense=dense)


def _without_networks(config: dict, model_type: str) -> dict:
    """The config with the entries of `quantization` under the names of the dense model."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return config
    names = {f".{GATE}": f".{JOINED}", f".{DOWN}": f".{LAST}"} if model_type == "openelm" else {}
    kept = {}
    for key, value in quantization.items():
        if ".experts." in key or (names and key.endswith(f".{UP}")):
            continue
        ending = next((old for old in names if key.endswith(old)), None)
        kept[key.removesuffix(ending) + names[ending] if ending else key] = value
    return config | {"quantization": kept}
