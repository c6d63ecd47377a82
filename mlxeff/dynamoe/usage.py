"""How much of the feed-forward networks the tokens of an answer computed, for its report."""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from ..cache import Cache
from ..decode import Model, Reading, Step
from ..running import EXACT, RunOptions


class CountedReading:
    """Reads a prompt as `inner` does, and counts from then on how much its tokens and those of the answer compute.

    networks     the feed-forward networks of the model that leave out work, first layer to last
    sensitivity  as the user gave it
    native       gives the counters of the native decoder, as its `usage`; None where it does not compute the model
    """

    def __init__(
        self,
        inner: Reading,
        networks: Sequence,
        sensitivity: float,
        native: Callable[[], list[dict] | None],
    ):
        self.inner, self.networks, self.sensitivity, self._native = inner, networks, sensitivity, native
        self._before = self._now()

    def read(
        self,
        model: Model,
        cache: Cache,
        tokens: mx.array,
        step_size: int,
        progress: Callable[[int, int], None] | None = None,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """See `Reading.read`."""
        self._before = self._now()
        return self.inner.read(model, cache, tokens, step_size, progress, options)

    def accompany(self, steps: Iterator[Step], prompt: Sequence[int]) -> Iterator[Step]:
        """See `Reading.accompany`."""
        return self.inner.accompany(steps, prompt)

    def _now(self) -> list[tuple[list[int], int]]:
        """For each layer its counts so far, whose meaning is the network's own, and the bytes of weights that the
        native decoder has multiplied by."""
        own = [(network.counts, 0) for network in self.networks]
        for place, counted in enumerate(self._native() or ()):
            counts, read = own[place]
            own[place] = [a + b for a, b in zip(counts, counted["counts"], strict=True)], read + counted["bytes"]
        return own

    def _since(self) -> list[tuple[list[int], int]]:
        """The same, since the prompt was read."""
        pairs = zip(self._now(), self._before, strict=True)
        return [
            ([a - b for a, b in zip(now, before, strict=True)], read - read_before)
            for (now, read), (before, read_before) in pairs
        ]

    def report(self) -> dict:
        """See `Part.report`."""
        counted = self._since()
        counts = [each for each, _ in counted]
        computed = [network.computed(each) for network, each in zip(self.networks, counts, strict=True)]
        passes = computed[0][0] if computed else 0
        if not passes:
            return self.inner.report()
        read = sum(each for _, each in counted)
        return self.inner.report() | {
            "dynamoe": {
                "sensitivity": self.sensitivity,
                "tokens": passes,
                "mean_fraction": round(sum(part for _, part, _ in computed) / sum(whole for *_, whole in computed), 4),
                "layer_fractions": [round(part / max(1, whole), 4) for _, part, whole in computed],
                **self.networks[0].details(counts, self.networks),
                "feed_forward_bytes": read or None,
            }
        }

    def summary(self) -> str:
        """See `Part.summary`."""
        found = self.report().get("dynamoe")
        own = [f"dynamoe: {found['mean_fraction']:.0%} of the feed-forward {self.networks[0].PARTS}"] if found else []
        return ", ".join(text for text in (self.inner.summary(), *own) if text)
