"""Suites that run the user's own models in the settings of a publication: QuantSpec, SeedLM, DynaMoE. The publications
measured other models on other machines, so their numbers say what to look for and not what to reach.
"""

from collections.abc import Sequence

from .points import DECODE, Point
from .published import line

DEPTHS = (4096, 8192, 32768, 131072)  # of QuantSpec's tables
GENERATED = 90  # tokens, as in QuantSpec's scripts
SENSITIVITIES = ("0.9", "0.8", "0.65", "0.5")
QUOTED = "as quoted by third parties, not checked in the paper"
QUANTSPEC = "QuantSpec (arXiv 2502.10424)"
# Depth → (model and data, share of accepted tokens, speed by that of plain decoding); None: not known.
QUANTSPEC_TABLE = {
    4096: ("Llama-2-7B-32K, PG-19", 0.9246, 1.35),
    8192: ("Llama-2-7B-32K, Multi-LexSum", 0.9123, None),
    131072: ("LWM-Text-Chat-128k, Multi-LexSum", 0.9431, 2.49),
}
SEEDLM = f"SeedLM (arXiv 2410.10714), WikiText-2, 4 bits a weight; {QUOTED}"
SEEDLM_TABLE = {"Llama-2-7B": 5.7, "Llama-2-70B": 3.5, "Llama-3-70B": 3.8}
DYNAMOE = "DynaMoE (arXiv 2502.12325): its efficiency is given in active parameters, no speed was measured"


def quantspec_points(limit: int) -> list[Point]:
    """The depths within a context of `limit` tokens; half of the context where it has room for none."""
    depths = [depth for depth in DEPTHS if depth + GENERATED <= limit] or [limit // 2]
    return [Point(1, min(GENERATED, limit - depth), depth, DECODE) for depth in depths]


def quantspec(document: dict) -> list[dict]:
    """The numbers of the paper beside ours. The first arm decodes plainly, the last with --quantspec."""
    arm = list(document["arms"])[-1]
    speeds = {r["test"]: r["ratio"] for r in document["ratios"] if r["arm"] == arm and r["metric"] == "decode_tps"}
    shares = {r["test"]: r["median"] for r in document["results"] if r["arm"] == arm and r["metric"] == "acceptance"}
    where = {"arm": arm, "device": document["settings"]["device"]}
    lines = []
    for depth, (data, share, speed) in QUANTSPEC_TABLE.items():
        test = Point(1, GENERATED, depth, DECODE).test
        at = where | {"test": test, "source": f"{QUANTSPEC}, {data}, A6000; {QUOTED}", "label": "recalled"}
        of_share = {"metric": "acceptance", "unit": "share", "ours": shares.get(test), "theirs": share}
        lines.append(line("accepted drafts", **of_share, **at))
        of_speed = {"metric": "decode_tps", "unit": "x", "ours": speeds.get(test), "theirs": speed}
        lines.append(line("speed by plain decoding", **of_speed, **at))
    best = {"ours": max(speeds.values(), default=None), "theirs": "up to about 2.5"}
    at = where | {"test": "", "source": f"{QUANTSPEC}, abstract", "label": "published"}
    return [*lines, line("speed by plain decoding, at best", metric="decode_tps", unit="x", **best, **at)]


def seedlm(document: dict) -> list[dict]:
    """The paper's perplexities, which are of other models, beside those of the arms."""
    device = document["settings"]["device"]
    at = {"metric": "ppl", "unit": "", "device": device, "label": "recalled", "source": SEEDLM}
    return [
        line(f"perplexity of {name}", arm="", test="", ours=None, theirs=value, **at)
        for name, value in SEEDLM_TABLE.items()
    ]


def dynamoe(document: dict) -> list[dict]:
    """That the paper has no speeds, beside ours."""
    device, base = document["settings"]["device"], document["settings"]["arm"]
    at = {"metric": "decode_tps", "unit": "x", "device": device, "label": "unknown", "source": DYNAMOE}
    ratios: Sequence[dict] = [r for r in document["ratios"] if r["metric"] == "decode_tps" and r["against"] == base]
    what = "decoded tokens a second by those of the whole model"
    return [line(what, arm=r["arm"], test=r["test"], ours=r["ratio"], theirs=None, **at) for r in ratios]
