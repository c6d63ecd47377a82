"""The part of `mlxeff fit dynamoe` that is its own with `--by inputs`: the layers, the entry and the report."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..calibration import LayerStream
from ..checkpoint import WorkFolder
from ..dynamoe import fit_sparse
from ..dynamoe.sparse import SparseFeedForward
from ..dynamoe.sparse_install import SparseEntry
from ..errors import MlxeffError
from ..models.decoder import DecoderModel
from ..models.parts import GatedParts
from ..modules import parameter_bytes
from .fitting import Progress


def check(layers: list[tuple[nn.Module, GatedParts]], origin: str) -> None:
    """Raises MlxeffError for networks that cannot be stored by columns."""
    for number, (_, parts) in enumerate(layers):
        if text := fit_sparse.refused(parts):
            raise MlxeffError(f"{origin}: --by inputs: layer {number}: {text}")


def fit_layers(
    model: DecoderModel,
    layers: list[tuple[nn.Module, GatedParts]],
    weights: np.ndarray,
    windows: np.ndarray,
    work: WorkFolder,
    progress: Progress,
) -> list[SparseFeedForward]:
    """Fit all layers, or take those that are finished from the work folder. `weights` (layers, D): the Fisher
    information of the networks' outputs. The modules have the table of thresholds."""
    stream, modules, histograms = LayerStream(model, windows), [], []
    with progress("fitting", "layer") as bar:
        for number, (layer, parts) in enumerate(layers):
            unit, module = f"layer-{number:04d}", fit_sparse.network(parts)
            kept = work.read(unit)
            if kept is None:
                seen = fit_sparse.Moments()
                stream.next_layer([layer.FEED_FORWARD], lambda _, x, seen=seen, parts=parts: seen.add(parts, x))
                histograms.append(fit_sparse.fit_layer(module, parts, seen, weights[number]))
                arrays = dict(tree_flatten(module.parameters())) | {"sizes": mx.array(histograms[-1])}
                work.write(unit, arrays, {})
            else:
                histograms.append(np.array(kept[0].pop("sizes")))
                module.update(tree_unflatten(list(kept[0].items())))
                stream.next_layer()
            modules.append(module)
            if bar:
                bar(number + 1, len(layers))
    fractions = fit_sparse.table(histograms)
    for module in modules:
        module.fractions = fractions
    return modules


def entry(modules: list[SparseFeedForward]) -> SparseEntry:
    """The entry `dynamoe` of the new folder's config.json."""
    forms = lambda name: tuple((module[name].bits, module[name].group_size) for module in modules)  # noqa: E731
    return SparseEntry(forms("gate_up"), forms("down"), modules[0].fractions)


def report(modules: list[SparseFeedForward]) -> dict:
    """What the report says of the fit itself."""
    added = sum(module.input_weights.nbytes + module.neuron_weights.nbytes for module in modules)
    return {
        "table": [list(row) for row in modules[0].fractions.table],
        "bytes": sum(map(parameter_bytes, modules)),
        "added_bytes": added,
    }
