"""The report of `mlxeff bench ttft`: medians of the samples, and tables in Markdown, beside the numbers of the paper
where the suite `kvp-paper` ran. Measures nothing.
"""

from collections.abc import Iterable
from statistics import median

from . import kvp_paper
from .tables import card_lines, table
from .ttft import Point, Results


def medians(samples: Iterable[dict]) -> dict[tuple, dict]:
    """(device, batch, prompt tokens, arm) → the medians of its samples, as in the output of --json.

    ttft_s is the median TTFT in seconds, spread_s the difference of the largest and the smallest one, and passes the
    number of samples. prompt_tps and decode_tps are tokens per second over the whole batch; decode_tps is None where no
    decode step was timed.
    """
    found: dict[tuple, list[dict]] = {}
    for sample in samples:
        found.setdefault((sample["device"], sample["batch"], sample["tokens"], sample["arm"]), []).append(sample)
    return {key: _summary(key, each) for key, each in found.items()}


def _summary(key: tuple, samples: list[dict]) -> dict:
    device, batch, tokens, arm = key
    times = [sample["ttft_s"] for sample in samples]
    steps = [sample["step_s"] for sample in samples if sample["step_s"]]
    ttft = median(times)
    return {
        "device": device,
        "batch": batch,
        "tokens": tokens,
        "arm": arm,
        "ttft_s": ttft,
        "spread_s": max(times) - min(times),
        "passes": len(times),
        "prompt_tps": batch * tokens / ttft,
        "decode_tps": batch / median(steps) if steps else None,
    }


def tables(results: Results, card: dict, suite: bool) -> str:
    """The whole report as text: the card of the machine, a table for each device, for the suite (`suite`) the
    comparison with the paper, and the measurements that were skipped."""
    found = medians(results.samples.all)
    parts = [card_lines(card)]
    for device in dict.fromkeys(key[0] for key in found):
        chosen = {key[1:]: each for key, each in found.items() if key[0] == device}
        parts.append(_table(device, chosen, list(results.arms)))
    if suite:
        parts += [text for text in (_table_5(found), _flops(results.arms), _figures(found)) if text]
    parts += [f"skipped: {line}" for line in results.skipped]
    return "\n\n".join(parts)


def _table(device: str, found: dict[tuple, dict], arms: list[str]) -> str:
    """The table of one device: a row for each point and a column for each arm, with TTFT and tokens per second."""
    title = f"Median TTFT in seconds on the {device}; in brackets prompt tokens/s and decoded tokens/s"
    shown = [arm for arm in arms if any(key[2] == arm for key in found)]
    rows = [
        [f"{batch} x {tokens}", *(_cell(found.get((batch, tokens, arm))) for arm in shown)]
        for batch, tokens in sorted({key[:2] for key in found})
    ]
    return "\n".join([title, "", table(["batch x tokens", *shown], rows)])


def _cell(summary: dict | None) -> str:
    if summary is None:
        return ""
    decode = f", {summary['decode_tps']:.3g}" if summary["decode_tps"] else ""
    return f"{summary['ttft_s']:.3f} ({summary['prompt_tps']:.3g}{decode})"


def _table_5(found: dict[tuple, dict]) -> str:
    """For each device the measured TTFT and its reduction beside those in Table 5 of the paper."""
    point = kvp_paper.AT_TABLE_5
    parts = []
    for device in dict.fromkeys(key[0] for key in found):
        here = {arm: found[key] for arm in kvp_paper.TABLE_5 if (key := (device, *_sizes(point), arm)) in found}
        base = here.get("OE1.1B")
        if not here:
            continue
        where = f"the {device} here | paper: {kvp_paper.MACHINE}, numeric type and threads not stated"
        title = f"Batch {point.batch} x {point.tokens} tokens: {where}"
        rows = []
        for arm, mine in here.items():
            theirs = kvp_paper.TABLE_5[arm]
            ratio = f"{base['ttft_s'] / mine['ttft_s']:.2f}" if base else ""
            rows.append([arm, f"{mine['ttft_s']:.2f}", ratio, f"{theirs.ttft_s:.2f}", f"{theirs.reduction:.2f}"])
        header = ["", "TTFT s, here", "reduction, here", "TTFT s, paper", "reduction, paper"]
        parts.append("\n".join([title, "", table(header, rows)]))
    return "\n\n".join(parts)


def _flops(arms: dict[str, dict]) -> str:
    """The table of FLOPs reductions: the paper's definition with our parameter counts, the paper's printed number, and
    the reduction of all FLOPs to the first token, with those of the predictor and the base's last token."""
    rows = []
    for base, published in kvp_paper.TABLES.items():
        whole = arms.get(base)
        for name, theirs in published.items():
            if whole is None or name not in arms:
                continue
            mine = arms[name]
            counted = whole["base"] / mine.get("auxiliary", mine["base"])
            full = whole["flops_512"] / mine["flops_512"]
            rows.append([name, f"{counted:.2f}", f"{theirs.flops:.2f}", f"{full:.2f}"])
    if not rows:
        return ""
    title = "FLOPs reductions. 'counted': parameters of base by parameters of auxiliary, as in the paper"
    header = ["", "counted", "paper", "with predictor and last token, 512 tokens"]
    return "\n".join([title, "", table(header, rows), "", kvp_paper.NOTE])


def _figures(found: dict[tuple, dict]) -> str:
    """Measured numbers beside those that the paper's text states for Figures 1 and 5b, one line each."""
    lines = []
    first, mark = kvp_paper.FIGURE_1, f"paper, {kvp_paper.MACHINE}"
    mine, other, batch, ends = kvp_paper.FIGURE_5B
    for device in dict.fromkeys(key[0] for key in found):
        if here := found.get((device, *_sizes(first["point"]), first["arm"])):
            steps = f", {here['ttft_s'] * here['decode_tps']:.1f} decode steps" if here["decode_tps"] else ""
            theirs = f"{first['ttft_s']} s, {first['steps']} decode steps"
            ours = f"{device} here {here['ttft_s']:.2f} s{steps}"
            lines.append(f"Figure 1, OE3B, batch 1 x 1024: {ours}; {mark}: {theirs}")
        for tokens in sorted({key[2] for key in found if key[1] == batch and ends[0] <= key[2] <= ends[1]}):
            pair, model = (found.get((device, batch, tokens, arm)) for arm in (mine, other))
            if pair and model:
                more = pair["ttft_s"] / model["ttft_s"] - 1
                lines.append(
                    f"Figure 5b, {mine} over {other}, batch {batch} x {tokens}: {device} here {more:+.0%}; "
                    f"{mark}: +10 to +20%"
                )
    return "\n".join(lines)


def _sizes(point: Point) -> tuple[int, int]:
    return point.batch, point.tokens
