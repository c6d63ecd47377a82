"""A DynaMoE checkpoint → the dense model that it was made of, for software that knows no nested experts.

Routers and the down-projections of smaller experts are left out, and the rows of gate and up go back to the columns of
the down-projection that belong to them. Where the smaller experts have matrices of their own, these are the weights of
the dense model in its own order; otherwise its neurons stay in the order of their importance, with the same outputs.
Networks that leave out inputs: see `dynamoe_columns`.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from ..errors import MlxeffError
from .plan import Family, Weight

DROPPED = (".router.weight", ".router.bias", ".order", ".input_weights", ".neuron_weights")
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
JOINED, LAST = "proj_1", "proj_2"  # OpenELM's names: gate and up are one matrix


def recognises(config: dict) -> bool:
    """Whether a config.json is that of a DynaMoE."""
    return "dynamoe" in config


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
