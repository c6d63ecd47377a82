"""The tuning pass of `mlxeff fit dynamoe --tune`: which windows of the text it reads, what it measures, and its state.

The computation is that of `dynamoe.distil` and `dynamoe.tune`. What is finished is kept in the fit's work folder, from
which an interrupted pass goes on. Shapes: W windows, T tokens of a window.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .. import calibration
from ..checkpoint import WorkFolder
from ..dynamoe import distil, tune
from ..dynamoe.feed_forward import DynamicFeedForward, LowRank
from ..errors import MlxeffError
from ..models.decoder import DecoderModel
from ..modules import plain_linear
from ..ops import swiglu
from ..tokenizer import Tokenizer
from .fitting import Progress

HELD_OUT = 4  # windows on which divergences are measured, and which no step reads
STATE = "tuning.state"  # file in the work folder


@dataclass
class TuningText:
    """The windows that the steps read, (W, T), and those on which divergences are measured."""

    read: np.ndarray
    held: np.ndarray


def tuning_text(text: str, tokenizer: Tokenizer, tokens: int, origin: str, rows: int) -> TuningText:
    """Windows of `text` for a pass of `tokens`, at least a window, spread evenly; of a text that has fewer, all.
    `origin` and `rows` as in `calibration.windows`. Raises MlxeffError for a text of less than two windows."""
    length = calibration.WINDOW
    whole = len(tokenizer.encode(text, add_special_tokens=False))
    have = whole // length
    if have < 2:
        raise MlxeffError(f"{origin}: --tune {tokens}: wanted a text of at least {2 * length} tokens, got {whole}")
    held = min(HELD_OUT, have // 2)
    count = min(have, tokens // length + held)
    ids = calibration.windows(text, tokenizer, count * length, origin, rows)
    chosen = np.isin(np.arange(count), np.arange(held) * count // held)
    return TuningText(ids[~chosen], ids[chosen])


class TuningPass:
    """One tuning pass of a fit: distillation, training, and the storage of what was trained. Routers, and with them the
    table of fractions, stay: the experts are tuned for the tokens that take them. `report` is the entry `tuning` of the
    fit's report, after `run`."""

    def __init__(self, model: DecoderModel, text: TuningText, progress: Progress):
        """`model`: the dense model, which is left as it was."""
        self.model, self.text, self.progress = model, text, progress
        self.report: dict = {}

    def run(self, networks: Sequence[DynamicFeedForward], tokens: int, seed: int, work: WorkFolder) -> None:
        """Tune the smaller experts of `networks`, whose fractions are set, in place."""
        began, read = time.perf_counter(), self.text.read
        before = self._measured(networks)
        self._distil(networks, work)
        with self.progress("tuning", "step") as bar:
            tune.tune(self.model, networks, read, before, tokens, seed, work.path / STATE, bar)
        self._store(networks, work)
        self.report = {
            "tokens": tokens // read.shape[1] * read.shape[1],
            "held_out": int(self.text.held.size),
            "sensitivities": list(tune.SENSITIVITIES),
            "kl_before": before,
            "kl_after": self._measured(networks),
            "seconds": time.perf_counter() - began,
        }

    def _distil(self, networks: Sequence[DynamicFeedForward], work: WorkFolder) -> None:
        """Distil all layers, or take those that are finished from the work folder."""
        text = distil.Distillation(self.model, self.text.read)
        with self.progress("distilling", "layer") as bar:
            for number, network in enumerate(networks):
                unit = f"distilled-{number:04d}"
                if (kept := work.read(unit)) is None:
                    text.fit(network)
                    work.write(unit, dict(tree_flatten([each.parameters() for each in network.experts])), {})
                else:
                    _put(network, tree_unflatten(list(kept[0].items())))
                text.next_layer(network)
                if bar:
                    bar(number + 1, len(networks))

    def _store(self, networks: Sequence[DynamicFeedForward], work: WorkFolder) -> None:
        """Put the trained experts into the form in which they are kept; those that are finished are taken from the work
        folder."""
        stream = calibration.LayerStream(self.model, self.text.read)
        with self.progress("storing", "layer") as bar:
            for number, network in enumerate(networks):
                unit = f"tuned-{number:04d}"
                if (kept := work.read(unit)) is None:
                    gram = np.zeros((network.widths[-2],) * 2)
                    see = lambda _, x, network=network, gram=gram: _add(gram, network, x)  # noqa: E731
                    stream.next_layer([stream.layer.FEED_FORWARD], see)
                    tune.stored(network, gram / self.text.read.size)
                    work.write(unit, dict(tree_flatten([each.parameters() for each in network.experts])), {})
                else:
                    tune.stored(network, np.eye(network.widths[-2]))
                    for expert, parameters in zip(network.experts, tree_unflatten(list(kept[0].items())), strict=True):
                        expert.update(parameters)
                    stream.next_layer()
                if bar:
                    bar(number + 1, len(networks))

    def _measured(self, networks: Sequence[DynamicFeedForward]) -> list[float]:
        with self.progress("measuring", "window") as bar:
            return tune.divergences(self.model, networks, self.text.held, bar)


def _add(gram: np.ndarray, network: DynamicFeedForward, x: mx.array) -> None:
    """Add aᵀa of the neurons' values a of tokens x (B, T, D) to `gram` (k, k), of the widest of the smaller experts."""
    x = x.reshape(-1, x.shape[-1])
    values = swiglu(network.gate_proj(x), network.up_proj(x))[:, : len(gram)]
    a = np.array(values.astype(mx.float32))
    gram += a.T @ a


def _put(network: DynamicFeedForward, experts: list[dict]) -> None:
    """Put the parameters of distilled experts in place."""
    for place, (expert, parameters) in enumerate(zip(network.experts, experts, strict=True)):
        if isinstance(expert, LowRank):
            expert.update(parameters)
        else:
            network.experts[place] = plain_linear(parameters["weight"])
