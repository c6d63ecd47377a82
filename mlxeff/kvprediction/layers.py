"""Which base layers a pruned auxiliary keeps, and which auxiliary layer each base layer reads (the layer map).

The rules give the layer maps of all eleven configurations of the KV Prediction paper (arXiv 2410.08391). Its names say
what the auxiliary is: in `KVP-C` a smaller model of its own, in `KVP-LP` ("layer-pruned") some layers of the base. This
module handles layer numbers only, and knows no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..errors import MlxeffError

FRACTIONS = ("0.75", "0.50", "0.25")  # shares of the base's layers that the published pruned auxiliaries keep


def kept_layers(fraction: str | float | Fraction, layers: int) -> list[int]:
    """The evenly spread layers that a pruned model keeps of `layers` layers: 0.5 keeps 0, 2, 4, …; 0.75 drops 3, 7, …

    Raises MlxeffError unless `fraction` is above 0, at most 1, and keeps a layer.
    """
    try:
        share = Fraction(str(fraction))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    count = round(share * layers)
    if not 0 < share <= 1 or count < 1:
        raise MlxeffError(f"layers to keep: wanted a fraction of {layers} layers above 0, at most 1, got {fraction}")
    return [int(i / share) for i in range(count) if int(i / share) < layers]


def candidates(fraction: str, layers: int) -> list[list[int]]:
    """Several ways to keep the fraction `fraction` of `layers` layers. Each takes a share of the kept layers (none, a
    quarter, … all) from the beginning, and spreads the others evenly over the remaining layers."""
    count = len(kept_layers(fraction, layers))
    found = []
    for quarters in range(5):
        first = count * quarters // 4
        rest = [first + i * (layers - first) // (count - first) for i in range(count - first)]
        if (choice := [*range(first), *rest]) not in found:
            found.append(choice)
    return found


def pruned_map(kept: Sequence[int], layers: int) -> list[int]:
    """The layer map of a pruned auxiliary: for each of `layers` base layers the index in `kept` of the last kept layer
    that is not above it."""
    return [max((k for k, layer in enumerate(kept) if layer <= i), default=0) for i in range(layers)]


def shared_layers(kept: Sequence[int]) -> int:
    """How many first layers a pruned model shares with the base: the length of the prefix 0, 1, 2, … of `kept`."""
    return next((k for k, layer in enumerate(kept) if k != layer), len(kept))


def spread_map(auxiliary: int, base: int) -> list[int]:
    """The layer map of an auxiliary that is a smaller model: each of its layers serves base // auxiliary consecutive
    base layers, and each of the first base % auxiliary layers one more. Arguments: the numbers of layers.

    Raises MlxeffError where the auxiliary has no layers, or more than the base.
    """
    if not 0 < auxiliary <= base:
        raise MlxeffError(f"layer map: wanted an auxiliary of 1 to {base} layers, got {auxiliary}")
    each, more = divmod(base, auxiliary)
    return [j for j in range(auxiliary) for _ in range(each + (j < more))]


@dataclass(frozen=True)
class Published:
    """A configuration of the paper: the OpenELM size of `base`, and either that of `auxiliary`, or in `keep` the
    fraction of base layers that a pruned auxiliary consists of."""

    base: str
    auxiliary: str | None = None
    keep: str | None = None


PUBLISHED = {
    "OE1.1B-KVP-C-450M": Published("1_1B", "450M"),
    "OE1.1B-KVP-C-270M": Published("1_1B", "270M"),
    **{f"OE1.1B-KVP-LP-{keep}": Published("1_1B", keep=keep) for keep in FRACTIONS},
    "OE3B-KVP-C-1.1B": Published("3B", "1_1B"),
    "OE3B-KVP-C-450M": Published("3B", "450M"),
    "OE3B-KVP-C-270M": Published("3B", "270M"),
    **{f"OE3B-KVP-LP-{keep}": Published("3B", keep=keep) for keep in FRACTIONS},
}
# CoreNet's file names of the pruned configurations. In the names for OpenELM 1.1B, `kvp_lp` marks the pairs of KV
# Prediction; in those for 3B it marks the pruned baselines, which are models run without prediction.
BASELINE = "a layer-pruned baseline without prediction"
PARTS = [(keep.replace(".", "_"), keep) for keep in FRACTIONS]
CORENET_FILES = {
    **{f"openelm_1_1B_kvp_lp_{part}": f"OE1.1B-KVP-LP-{keep}" for part, keep in PARTS},
    **{f"openelm_base_3B_aux_{part}l": f"OE3B-KVP-LP-{keep}" for part, keep in PARTS},
    **{f"openelm_1_1B_{part}": BASELINE for part, _ in PARTS},
    **{f"openelm_3B_kvp_lp_{part}": BASELINE for part, _ in PARTS},
}


def published_name(name: str) -> str | None:
    """The key of PUBLISHED for the name of a configuration: as in the paper ("OE1.1B-…" or "OpenELM1.1B-…"), or of
    CoreNet's file, with or without ".yaml". None for any other name.

    Raises MlxeffError for the file of a baseline.
    """
    stem = name.removesuffix(".yaml")
    if CORENET_FILES.get(stem) == BASELINE:
        raise MlxeffError(f"{name}: wanted a KV Prediction configuration, got {BASELINE}")
    short = CORENET_FILES.get(stem, stem.replace("OpenELM", "OE"))
    return short if short in PUBLISHED else None
