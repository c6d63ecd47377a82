"""The tuning pass of `mlxeff fit dynamoe --tune`: which windows of the text it reads, what it measures, and its state.

Distillation and steps are those of `dynamoe.tune`. What is finished is kept in the fit's work folder, from which an
interrupted pass goes on. Shapes: W windows, T tokens of a window.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np

from .. import calibration
from ..checkpoint import WorkFolder
from ..dynamoe import tune
from ..dynamoe.feed_forward import DynamicFeedForward, LowRank
from ..errors import MlxeffError
from ..models.decoder import DecoderModel
from ..modules import plain_linear
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
    """One tuning pass of a fit, and its report."""

    def __init__(self, model: DecoderModel, text: TuningText, progress: Progress):
        """`model`: the dense model, which is left as it was."""
        self.model, self.text, self.progress = model, text, progress
        self._before: list[float] = []
        self._tokens, self._seconds = 0, 0.0

    def run(
        self, networks: Sequence[DynamicFeedForward], tokens: int, seed: int, work: WorkFolder
    ) -> list[list[nn.Module]]:
        """Tune the smaller experts of `networks`, whose fractions are set; see `dynamoe.tune.tune`."""
        began = time.perf_counter()
        self._before = self._measured(networks)
        self._distil(networks, work)
        path, read = work.path / STATE, self.text.read
        self._tokens = tokens // read.shape[1] * read.shape[1]
        with self.progress("tuning", "step") as bar:
            terms = tune.tune(self.model, networks, read, self._before, tokens, seed, path, bar)
        self._seconds += time.perf_counter() - began
        return terms

    def _distil(self, networks: Sequence[DynamicFeedForward], work: WorkFolder) -> None:
        """Distil all layers, or take those that are finished from the work folder; terms of low rank stay."""
        if any(isinstance(expert, LowRank) for expert in networks[0].experts):
            return
        text = tune.Distillation(self.model, self.text.read)
        with self.progress("distilling", "layer") as bar:
            for number, network in enumerate(networks):
                unit = f"distilled-{number:04d}"
                if (kept := work.read(unit)) is None:
                    text.fit(network)
                    arrays = {str(place): expert.weight for place, expert in enumerate(network.experts)}
                    work.write(unit, arrays, {})
                else:
                    network.experts = [plain_linear(kept[0][str(place)]) for place in range(len(network.experts))]
                text.next_layer(network)
                if bar:
                    bar(number + 1, len(networks))

    def report(self, networks: Sequence[DynamicFeedForward]) -> dict:
        """The entry `tuning` of the fit's report; `networks` are the ones that were made of the terms."""
        began = time.perf_counter()
        after = self._measured(networks)
        return {
            "tokens": self._tokens,
            "held_out": int(self.text.held.size),
            "sensitivities": list(tune.SENSITIVITIES),
            "kl_before": self._before,
            "kl_after": after,
            "seconds": self._seconds + time.perf_counter() - began,
        }

    def _measured(self, networks: Sequence[DynamicFeedForward]) -> list[float]:
        with self.progress("measuring", "window") as bar:
            return tune.divergences(self.model, networks, self.text.held, bar)
