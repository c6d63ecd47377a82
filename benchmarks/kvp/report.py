"""Turn samples into a summary of each arm, Markdown tables, a check of the targets, and a plot."""

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import saving
from mlxeff.bench.arms import Arm
from mlxeff.bench.rows import rows
from mlxeff.bench.tables import card_lines, table
from mlxeff.eval.measures import means

from .pairs import pair_of

SECTION = "kvp-quality"  # of RESULTS.md
TARGET_TTFT, TARGET_GAP = 0.60, 0.90  # KVP lp:0.50 by base; of the gap that keep and refine recover
HALF = "KVP lp:0.50"
PLOT_POINT = (1, 512)  # batch, prompt tokens
SAME_SHAPES = re.compile(r" (distilled|longer|paper)(?=,|$)")
BETTER = {"perplexity": -1, "kl": -1, "agreement": 1, "exact": 1, "numbers": 1}  # the sign of an improvement


def summary(
    arms: dict[str, Arm],
    digests: dict,
    scored: list[dict],
    asked: dict[str, list[dict]],
    timed: list[dict],
    prompt: int,
) -> dict:
    """Summarise each arm that has samples. `digests` is keyed by the pair's name, `asked` by the question set's
    name.
    """
    costs = {name: arm.flops(prompt) for name, arm in arms.items()}
    measured = [row for row in rows(timed) if row["metric"] == "ttft_s"]
    ttft = sorted(measured, key=lambda row: (row["batch"], row["tokens"]))
    found = {}
    for name, arm in arms.items():
        key = name, digests.get(pair_of(name), "")
        windows, *answers = ([s for s in each if (s["arm"], s["digest"]) == key] for each in (scored, *asked.values()))
        entry = {"kind": kind(arm), "flops": costs[name] / costs["base"]}  # refine begins after the first token
        entry |= _windows(windows)
        for kind_of, samples in zip(asked, answers, strict=True):
            entry |= _questions(kind_of, samples)
        entry["ttft"] = [
            {
                "batch": row["batch"],
                "tokens": row["tokens"],
                "ttft_s": row["median"],
                "spread_s": row["max"] - row["min"],
                "passes": row["count"],
            }
            for row in ttft
            if row["arm"] == name
        ]
        if windows or any(answers) or entry["ttft"]:
            found[name] = entry
    return found


def kind(arm: Arm) -> str:
    """ "base", "pruned", "pair", "keep" or "refine"."""
    pair, name = arm.pair, arm.name
    if pair is None:
        return "base" if name == "base" else "pruned"
    return "refine" if pair.refine else "pair" if pair.keep is None else "keep"


def _windows(samples: list[dict]) -> dict:
    """Means over the windows' tokens, and over their first tokens."""
    if not samples:
        return {}
    first_kl, first_same = (sum(sample[key] for sample in samples) for key in ("first_kl", "first_same"))
    first = {"first_kl": first_kl / len(samples), "first_agreement": first_same / len(samples)}
    return {"windows": len(samples), **means(samples), **first}


def _questions(name: str, samples: list[dict]) -> dict:
    """The share of right answers, and how many questions were asked."""
    right = [s["exact"] for s in samples]
    return {name: float(np.mean(right)), f"{name}_questions": len(samples)} if samples else {}


def tables(document: dict) -> str:
    """All tables and the check of the targets as Markdown text."""
    arms = document["arms"]
    parts = [card_lines(document["card"]), _quality(arms)]
    if points := _points(arms):
        parts.append(_ttft(arms, points))
    return "\n\n".join([*parts, "\n".join(targets(arms))])


def section(document: dict, picture: Path, root: Path) -> str:
    """The section of RESULTS.md; `root` is the folder of that file."""
    arms = document["arms"]
    shown = [
        f"![agreement and exact match against time to the first token]({picture.relative_to(root)})",
        _quality(arms),
    ]
    if points := _points(arms):
        shown.append(_ttft(arms, points))
    return "\n\n".join([*shown, "\n".join(f"- {line}." for line in targets(arms))])


def _points(arms: dict[str, dict]) -> list[tuple[int, int]]:
    return sorted({(each["batch"], each["tokens"]) for arm in arms.values() for each in arm["ttft"]})


def _quality(arms: dict[str, dict]) -> str:
    head = ["", "TTFT FLOPs", "perplexity", "KL", "same first choice", "KL, first token", "exact match", "numbers"]
    rows = []
    for name, arm in arms.items():
        large = arm.get("perplexity", 0) >= 1000
        forms = {"perplexity": ".3g" if large else ".2f", "kl": ".3f", "agreement": ".1%", "first_kl": ".3f"}
        measured = [_text(arm, key, form) for key, form in (forms | {"exact": ".0%", "numbers": ".0%"}).items()]
        rows.append([name, f"{arm['flops']:.2f}", *measured])
    return table(head, rows)


def _ttft(arms: dict[str, dict], points: list[tuple[int, int]]) -> str:
    """Times to the first token in seconds, each followed by its share of the base's time in brackets."""
    head = ["TTFT, s", *(f"{batch} x {tokens}" for batch, tokens in points)]
    rows = []
    whole = times(arms.get("base", {"ttft": []}))
    for name, arm in arms.items():
        mine = times(arm)
        if not mine:
            continue
        cells = []
        for point in points:
            share = f" ({mine[point] / whole[point]:.2f})" if point in mine and point in whole else ""
            cells.append(f"{mine[point]:.3f}{share}" if point in mine else "")
        rows.append([name, *cells])
    return table(head, rows)


def times(arm: dict) -> dict[tuple[int, int], float]:
    """(batch, prompt tokens) → median seconds to the first token."""
    return {(each["batch"], each["tokens"]): each["ttft_s"] for each in arm["ttft"]}


def _text(arm: dict, key: str, form: str) -> str:
    return format(arm[key], form) if key in arm else ""


def targets(arms: dict[str, dict]) -> list[str]:
    """A line for each target: met or missed, and the numbers."""
    return [*_target_ttft(arms), *_target_pareto(arms), *_target_gap(arms)]


def _target_ttft(arms: dict[str, dict]) -> Iterable[str]:
    mine, whole = (times(arms.get(name, {"ttft": []})) for name in (HALF, "base"))
    for point in sorted(set(mine) & set(whole)):
        share = mine[point] / whole[point]
        what = f"{HALF} at most {TARGET_TTFT} of the base's TTFT, batch {point[0]} x {point[1]}: {share:.2f}"
        yield f"target: {what}: {_verdict(share <= TARGET_TTFT)}"


def _target_pareto(arms: dict[str, dict]) -> Iterable[str]:
    """For each measure, how many pairs are better than the layer-pruned baselines at equal FLOPs."""
    for measure, sign in BETTER.items():
        known = {name: arm for name, arm in arms.items() if arm["kind"] == "pair" and measure in arm}
        both = {name: (arm[measure], _pruned(arms, measure, arm["flops"])) for name, arm in known.items()}
        both = {name: pair for name, pair in both.items() if pair[1] is not None}
        below = [
            f"{n} {mine:.3g} for {theirs:.3g}" for n, (mine, theirs) in both.items() if not sign * (mine - theirs) > 0
        ]
        if both:
            what = (
                f"pairs above the pruned baselines at equal FLOPs in {measure}: {len(both) - len(below)} of {len(both)}"
            )
            yield f"target: {what}: {_verdict(not below)}" + (f" by {', '.join(below)}" if below else "")


def _pruned(arms: dict[str, dict], measure: str, flops: float) -> float | None:
    """The value of `measure` that a layer-pruned baseline with these FLOPs would have, interpolated between the
    baselines and the base. Of several baselines of equal cost the better one counts; perplexities are interpolated by
    their logarithm.
    """
    sign, best = BETTER[measure], {}
    for arm in arms.values():
        if arm["kind"] in ("base", "pruned") and measure in arm:
            kept = best.setdefault(arm["flops"], arm[measure])
            best[arm["flops"]] = max(kept, arm[measure], key=lambda value: sign * value)
    if len(best) < 2:
        return None
    there, back = (math.log, math.exp) if measure == "perplexity" else (float, float)
    points = sorted(best.items())
    return back(float(np.interp(flops, [x for x, _ in points], [there(y) for _, y in points])))


def _target_gap(arms: dict[str, dict]) -> Iterable[str]:
    """A line for each pair: the share of its KL divergence from the base that `keep` and `refine` recover."""
    for name, plain in arms.items():
        found = {
            dial.removeprefix(f"{name}, "): 1 - arm["kl"] / plain["kl"]
            for dial, arm in arms.items()
            if arm["kind"] in ("keep", "refine") and dial.startswith(f"{name}, ") and "kl" in arm and "kl" in plain
        }
        if found:
            words = ", ".join(f"{dial} {share:.0%}" for dial, share in found.items())
            verdict = _verdict(max(found.values()) >= TARGET_GAP)
            yield f"target: {name}, of its KL at least {TARGET_GAP:.0%} recovered by a dial: {words}: {verdict}"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def save(document: dict) -> None:
    """Write the document, and the plot if matplotlib is installed."""
    path = result_path(document["card"]["cpu"])
    saving.write_json(document, path)
    plot(document, path.with_suffix(".png"))


def result_path(cpu: str) -> Path:
    """The path of the results document of a machine."""
    return saving.result_path(cpu, "kvp-quality.json")


def plot(document: dict, path: Path) -> None:
    """Plot agreement with the base and exact match against the FLOPs and the measured time to first token, relative to
    the base.
    """
    if (pyplot := saving.pyplot()) is None:
        return
    arms = document["arms"]
    whole = times(arms["base"]).get(PLOT_POINT)
    figure, rows = pyplot.subplots(2, 2, figsize=(12, 9), sharey="row")
    for axes, (measure, label) in zip(
        rows, (("agreement", "same first choice as the base"), ("exact", "exact match")), strict=True
    ):
        _panel(axes[0], arms, measure, lambda name: arms[name]["flops"])
        axes[0].set(xlabel="FLOPs to the first token, share of the base's", ylabel=label)
        if whole:
            _panel(axes[1], arms, measure, lambda name: _share(name, arms, whole))
        axes[1].set(xlabel=f"measured TTFT, batch {PLOT_POINT[0]} x {PLOT_POINT[1]} tokens, share of the base's")
    rows[0][0].legend(fontsize=8)
    figure.suptitle("SmolLM2-135M-Instruct: what reads the prompt")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"plot: {path}", file=sys.stderr)


def _share(name: str, arms: dict[str, dict], whole: float) -> float | None:
    """The arm's time to the first token divided by the base's time `whole`. An arm that was not timed takes the time of
    one with the same cost: `refine` starts only after the first token, and a trained predictor has the shapes of the
    closed-form one.
    """
    timed = [name, same := name.removesuffix(", refine"), SAME_SHAPES.sub("", same)]
    found = [times(arms[each])[PLOT_POINT] for each in timed if each in arms and PLOT_POINT in times(arms[each])]
    return found[0] / whole if found else None


def _panel(axes, arms: dict[str, dict], measure: str, place) -> None:
    styles = {"base": ("k*", 14), "pruned": ("s", 7), "pair": ("o", 7), "keep": ("^", 6), "refine": ("D", 6)}
    names = {"pruned": "layer-pruned", "pair": "KV Prediction", "keep": "with keep", "refine": "with refine"}
    for what, (marker, size) in styles.items():
        points = [
            (place(name), arm[measure], name) for name, arm in arms.items() if arm["kind"] == what and measure in arm
        ]
        points = sorted(point for point in points if point[0] is not None)
        if not points:
            continue
        xs, ys, _ = zip(*points, strict=True)
        axes.plot(xs, ys, marker, markersize=size, label=names.get(what, what))
        if what in ("pruned", "pair"):
            for x, y, label in points:
                axes.annotate(label, (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.grid(alpha=0.3, which="both")
