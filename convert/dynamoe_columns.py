"""The feed-forward matrices of a DynaMoE that leaves out inputs: stored by their columns, which hold the codes of the
dense model's rows (`dynamoe.columns`).
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint import Source
from ..checkpoint.tensor import NAMES
from ..dynamoe.columns import Columns
from ..dynamoe.sparse import interleaved
from ..dynamoe.sparse_install import Form, is_sparse, read_entry
from ..errors import MlxeffError
from ..modules import dense
from .dynamoe import DOWN, GATE, UP
from .plan import Weight


def recognises(config: dict) -> bool:
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
    whole = lambda: dense(layer())  # noqa: E731
    return Weight(
        f"{module}.weight", tensors[1].dtype, (rows, inputs), nbytes, read, specs, whole, f"affine {bits} bits"
    )
