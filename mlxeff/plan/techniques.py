"""What each technique changes in bytes and FLOPs, and what that does to times.

QuantSpec (arXiv 2502.10424): a round drafts k tokens on the upper plane of an int8 KV cache, one pass each, and
verifies them in one pass of k + 1 rows. Each drafted token is accepted with the same probability, up to the first that
is not.
KV Prediction (arXiv 2410.08391): the first layers of the model read all prompt tokens but the last, and linear maps of
their states give keys and values of the other layers; the model itself computes the last token.
DynaMoE (arXiv 2502.12325): tokens compute a share of the feed-forward networks.
How good answers are with them is not predicted: docs name the measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..assembly.techniques import MOST_DRAFTED
from .costs import Bits
from .formats import KV_BYTES
from .predict import Predictor
from .shapes import Layer, Matrix, Shape

# Bits of a weight with which `--draft-weights auto` drafts: a copy in 6 bits for 16, in 4 for 8, else the model's own.
FEW, MANY = 6.5, 12.0
COPY_SMALL, COPY_LARGE = Bits.of(4.5), Bits.of(6.5)
DOUBTS = (2.0, 0.5)  # factors on the cost of a verification's further rows, for the ends of error bars


def draft_bits(bits: Bits) -> Bits:
    """The weights that QuantSpec's draft reads."""
    if bits.layers <= FEW:
        return bits
    return COPY_SMALL if bits.layers <= MANY else COPY_LARGE


def committed(width: int, acceptance: float) -> float:
    """Expected tokens of a round that drafts `width`: the accepted ones and the one after them."""
    return sum(acceptance**place for place in range(width + 1))


@dataclass(frozen=True)
class Speculated:
    """QuantSpec at one depth. `width`: the best number of drafted tokens; `seconds`: of a token with it; `plain`: of a
    token of plain decoding on an int8 KV cache; `break_even`: the acceptance from which drafting pays, None where it
    does not at any below 1."""

    width: int
    seconds: float
    plain: float
    break_even: float | None

    @property
    def speedup(self) -> float:
        """Against plain decoding on the same cache."""
        return self.plain / self.seconds


def quantspec(
    predictor: Predictor,
    shape: Shape,
    bits: Bits,
    depth: int,
    acceptance: float,
    share: float = 1.0,
    doubt: float = 1.0,
) -> Speculated:
    """QuantSpec after `depth` tokens, each drafted token accepted with the probability `acceptance`. `doubt`: factor on
    what each further row of a verification costs, which is the least certain part."""
    plain = predictor.decode(shape, bits, depth, KV_BYTES["int8"], share)
    draft = predictor.decode(shape, draft_bits(bits), depth, KV_BYTES["draft"], share)
    row = doubt * predictor.further_row(shape, bits, depth, share)
    widths = range(1, MOST_DRAFTED + 1)

    def token(width: int, probability: float) -> float:
        return (width * (draft + row) + plain) / committed(width, probability)

    def best(probability: float) -> int:
        return min(widths, key=lambda width: token(width, probability))

    width = best(acceptance)
    paying = _break_even(lambda probability: token(best(probability), probability) <= plain)
    return Speculated(width, token(width, acceptance), plain, paying)


def _break_even(pays: Callable[[float], bool]) -> float | None:
    """The least acceptance for which `pays(acceptance)` holds, by bisection to a thousandth."""
    low, high = 0.0, 0.999
    if not pays(high):
        return None
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def pruned(shape: Shape, count: int) -> Shape:
    """The auxiliary model of a pair of KV Prediction: the first `count` layers, and after them the maps from its states
    to keys and values of the others, as a layer without attention."""
    rest = shape.layers[count:]
    maps = Matrix("maps", shape.vectors * sum(layer.kv_numbers for layer in rest))
    return replace(shape, layers=(*shape.layers[:count], Layer((maps,), 0, 0, 0, 0)))


def kept_layers(shape: Shape, part: float) -> int:
    """Layers of an auxiliary that has the share `part` of the model's."""
    return min(len(shape.layers), max(1, round(part * len(shape.layers))))


def kv_prediction(
    predictor: Predictor, shape: Shape, bits: Bits, tokens: int, count: int, step: int | None, share: float = 1.0
) -> float:
    """Seconds to the first token with an auxiliary of the first `count` layers: it reads all tokens but the last, the
    model decodes that one."""
    if count >= len(shape.layers) or tokens < 2:
        return predictor.prefill(shape, bits, tokens, step, share)
    auxiliary = predictor.prefill(pruned(shape, count), bits, tokens - 1, step, share)
    return auxiliary + predictor.decode(shape, bits, tokens - 1, 2.0, share)
