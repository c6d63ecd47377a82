"""Feed-forward networks that leave out work in the ways of DynaMoE's rivals, to compare the quality at equal bytes.

All of them keep a share of the weights that a token reads, and none needs fine-tuning:

static    the first neurons in the order of importance, the same for every token
griffin   GRIFFIN (arXiv 2404.01365): the neurons that a prompt used most, the same for every token after it
teal      TEAL (arXiv 2408.14690): for each token the largest inputs of each matrix product
wina      WINA (arXiv 2505.19427): the same, where an input counts by its size times the norm of its column
cats      CATS (arXiv 2404.08763): the whole gate, then the neurons that it opens most, of which a neuron counts by the
          opening of its gate times the mean size of its up-projection times the norm of its column of down

Shapes: T tokens, D hidden size, F neurons.
"""

import mlx.core as mx
import mlx.nn as nn

from mlxeff.modules import dense
from mlxeff.ops import linear, swiglu


class Rival(nn.Module):
    """A gated feed-forward network of the matrices of `parts`, all in float32, of which a `share` of 0 to 1 is kept.
    With the share 1 it is the whole network."""

    def __init__(self, parts):
        super().__init__()
        self.share = 1.0
        matrices = [dense(rows.module)[rows.start : rows.stop] for rows in (parts.gate, parts.up, parts.down)]
        self._gate, self._up, self._down = matrices

    def __call__(self, x: mx.array) -> mx.array:
        """Normalised hidden states (B, T, D) → (B, T, D)."""
        if self.share == 1:
            return linear(self.hidden(x), self._down)
        return self.part(x)

    def hidden(self, x: mx.array) -> mx.array:
        """The values of the neurons, (B, T, F)."""
        return swiglu(linear(x, self._gate), linear(x, self._up))

    def part(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    @property
    def width(self) -> int:
        """The number of neurons that are kept."""
        return round(self.share * self._down.shape[1])


class Griffin(Rival):
    """The whole network serves a prompt, and notes which neurons it used most. What follows uses these alone."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.share == 1:  # a prompt
            hidden = self.hidden(x)
            norms = mx.linalg.norm(hidden, axis=-1, keepdims=True)
            self._used = mx.sum(mx.square(hidden / mx.maximum(norms, 1e-12)), axis=(0, 1))
            return linear(hidden, self._down)
        return self.part(x)

    def part(self, x: mx.array) -> mx.array:
        kept = mx.argsort(-self._used)[: self.width]
        return linear(swiglu(linear(x, self._gate[kept]), linear(x, self._up[kept])), self._down[:, kept])


class Teal(Rival):
    """Of the inputs of gate and up, and of those of down, each token keeps the largest."""

    weighted = False

    def __init__(self, parts):
        super().__init__(parts)
        both = mx.concatenate([self._gate, self._up])
        self._scales = [mx.linalg.norm(matrix, axis=0) if self.weighted else None for matrix in (both, self._down)]

    def part(self, x: mx.array) -> mx.array:
        kept = self._largest(x, self._scales[0])
        return linear(self._largest(self.hidden(kept), self._scales[1]), self._down)

    def _largest(self, x: mx.array, scale: mx.array | None) -> mx.array:
        """x (…, N) with zeros in place of all but the share of the largest numbers of each row."""
        size = mx.abs(x) if scale is None else mx.abs(x) * scale
        count = max(1, round(self.share * x.shape[-1]))
        least = mx.sort(size, axis=-1)[..., -count, None]
        return mx.where(size >= least, x, 0)


class Wina(Teal):
    """The same; an input counts by its size times the norm of its column."""

    weighted = True


class Cats(Rival):
    """All gates are computed; each token keeps the neurons with the largest ones. Gates are a third of the weights, so
    that of the rest the share (3 share - 1) / 2 is kept. A prompt, which the whole network serves, tells the mean sizes
    of the up-projections."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.share == 1:
            sizes = mx.mean(mx.abs(linear(x, self._up)), axis=(0, 1))
            self._sizes = sizes * mx.linalg.norm(self._down, axis=0)
        return super().__call__(x)

    def part(self, x: mx.array) -> mx.array:
        gate = linear(x, self._gate)
        opened = gate * mx.sigmoid(gate)
        size = mx.abs(opened) * self._sizes
        count = max(1, round((3 * self.share - 1) / 2 * size.shape[-1]))
        least = mx.sort(size, axis=-1)[..., -count, None]
        return linear(mx.where(size >= least, opened * linear(x, self._up), 0), self._down)


RIVALS = {"griffin": Griffin, "teal": Teal, "wina": Wina, "cats": Cats}


def replace_all(model: nn.Module, kind: str) -> list[Rival]:
    """Put rivals of a kind in RIVALS in place of the feed-forward networks of `model`; returns them."""
    networks = []
    for layer in model.layers:
        networks.append(RIVALS[kind](layer.feed_forward.parts()))
        layer[layer.FEED_FORWARD] = networks[-1]
    model.native = None
    return networks


def keep(networks: list[Rival], share: float) -> None:
    """Set the share of the weights that all networks keep."""
    for network in networks:
        network.share = share
