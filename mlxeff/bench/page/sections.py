"""The parts of the page: what was measured, the numbers to see first, plots, tables, machine and settings."""

import base64
from collections.abc import Sequence
from importlib import resources

from ... import __version__
from ...names import json_text
from .. import compare
from ..comparison_text import letter_of
from ..words import in_order, percent, shown, title_of
from . import tables
from .markup import badge, facts, folded, listed, section, table, text
from .plots import Plot, headline

MARK = '<meta name="generator" content="mlxeff bench page">'  # a file that has it may be written anew
# Nothing is fetched, and no script runs, whatever a result holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HEADLINES = 6  # numbers to see first, and arms for each
THRESHOLD = 0.03  # of the comparison of several results
STYLE = resources.files(__package__).joinpath("style.css")
Drawn = Sequence[tuple[Plot, str]]  # plots with their SVG


def page(
    results: Sequence[tuple[str, dict, Drawn]], beside: Sequence[tuple[str, compare.Comparison | str, Drawn]]
) -> str:
    """The whole page for results, each with the name of its file and its plots; `beside`: of the second and later
    ones, the letter, the comparison with the first one and its plots."""
    several = len(results) > 1
    first = results[0][1]
    name = "Benchmarks beside each other" if several else title(first)
    body = [f"<header><h1>{text(name)}</h1>{'' if several else _machine_line(first)}</header>"]
    if several:
        body.append(_contents(results))
        body += [_comparison(*each) for each in beside]
    for index, (file, document, drawn) in enumerate(results):
        body.append(_result(file, document, drawn, letter_of(index) if several else ""))
    body.append(
        f"<footer>Made by mlxeff {text(__version__)} from {text(', '.join(each[0] for each in results))}.</footer>"
    )
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{MARK}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{text(name)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def title(document: dict) -> str:
    """What was measured, in a few words."""
    settings = document["settings"]
    what = settings.get("suite") or settings.get("model") or "results"
    return f"Benchmark of {what}"


def _machine_line(document: dict) -> str:
    """The machine and the versions in one line."""
    card = document["card"]
    parts = [card.get("cpu"), card.get("memory_gb") and f"{card['memory_gb']} GB", card.get("system")]
    parts += [f"{name} {card[name]}" for name in ("mlxeff", "mlx") if card.get(name)]
    return f'<p class="machine">{text(" · ".join(str(part) for part in parts if part))}</p>'


def _contents(results: Sequence[tuple[str, dict, Drawn]]) -> str:
    links = [
        f'<li><a href="#result-{letter_of(index)}">{letter_of(index)}: {text(title(document))}</a> {text(file)}</li>'
        for index, (file, document, _) in enumerate(results)
    ]
    return f"<nav><ul>{''.join(links)}</ul></nav>"


def _result(file: str, document: dict, drawn: Drawn, letter: str) -> str:
    """All sections about one result; `letter`: its name where there are several, else ""."""
    parts = [
        section("At a glance", _tiles(document)),
        section("Left out and noted", _noted(document)),
        section("Plots", _figures(drawn)),
        section("Beside published numbers", tables.published(document["published"])),
        section("Results", *tables.results(document)),
        section("Ratios", tables.ratios(document["ratios"])),
        section("Machine", facts(document["card"]), tables.ceilings(document["ceilings"])),
        section("What was asked", facts(document["settings"])),
        section("Arms", tables.arms(document["arms"])),
        section("Every sample", folded(f"{len(document['samples'])} samples", tables.samples(document["samples"]))),
        section("The data", _download(file, document)),
    ]
    if not letter:
        return "\n".join(parts)
    head = f"<h1>{letter}: {text(title(document))}</h1>{_machine_line(document)}"
    return f'<article id="result-{letter}">{head}' + "\n".join(parts) + "</article>"


def _tiles(document: dict) -> str:
    """A tile for each of the first metrics: the arms at the hardest test, the best one first."""
    metrics = in_order(row["metric"] for row in document["results"])
    # The prompt's speed says the same as the time to the first token.
    chosen = [each for each in metrics if each != "prompt_tps" or "ttft_s" not in metrics]
    found = headline(document, chosen)
    tiles = []
    for metric, test, device, arms in found[:HEADLINES]:
        lines = [f'<p class="what">{text(title_of(metric))}<span> {text(test)} · {text(device)}</span></p>']
        for index, (arm, value, ratio) in enumerate(arms[:HEADLINES]):
            big = "best" if index == 0 and len(arms) > 1 else ""
            also = f"<small>{text(ratio)}</small>" if ratio else ""
            lines.append(f'<p class="arm {big}"><b>{text(value)}</b> <span>{text(arm)}</span>{also}</p>')
        if len(arms) > HEADLINES:
            lines.append(f"<p>and {len(arms) - HEADLINES} more arms in the table</p>")
        tiles.append(f'<div class="tile">{"".join(lines)}</div>')
    more = f"<p>{len(found) - HEADLINES} more metrics are in the tables.</p>" if len(found) > HEADLINES else ""
    return f'<div class="tiles">{"".join(tiles)}</div>{more}' if tiles else ""


def _noted(document: dict) -> str:
    lines = [f"left out: {line}" for line in document["skipped"]]
    return listed([*lines, *(f"noted: {line}" for line in document["notices"])])


def _figures(drawn: Drawn) -> str:
    return f'<div class="plots">{"".join(_figure(*each) for each in drawn)}</div>' if drawn else ""


def _figure(plot: Plot, svg: str) -> str:
    note = f"<small>{text(plot.note)}</small>" if plot.note else ""
    return f"<figure><figcaption>{text(plot.title)}{note}</figcaption>{svg}</figure>"


def _download(file: str, document: dict) -> str:
    """A link that saves the JSON document, which the page holds."""
    data = base64.b64encode(json_text(document, indent=1).encode("utf-8")).decode("ascii")
    name = file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] or "result"
    link = (
        f'<a class="download" download="{text(name)}.json" href="data:application/json;base64,{data}">Save the JSON</a>'
    )
    return f"<p>{link} All numbers of this page, with every sample.</p>"


def _comparison(letter: str, found: compare.Comparison | str, drawn: Drawn) -> str:
    """How a result differs from the first one, or why the two cannot be compared."""
    if isinstance(found, str):
        return section(f"{letter} beside A", f"<p>{text(found)}</p>")
    rows = [
        [each.arm, each.test, each.metric, shown(each.before, each.unit), shown(each.after, each.unit),
         percent(each.change), "" if each.low is None else f"{percent(each.low)} to {percent(each.high)}",
         badge(each.verdict)]
        for each in found.changes
    ]  # fmt: skip
    header = ["arm", "test", "metric", "A", letter, "change", "95 % interval", "verdict"]
    lines = [*(f"differs: {line}" for line in found.differences), *(f"only in A: {name}" for name in found.only_before)]
    lines += [f"only in {letter}: {name}" for name in found.only_after]
    rule = f"A change is noise unless its whole interval is beyond {100 * THRESHOLD:g} %."
    words = f"<p>{text(compare.summary(found))}. {rule}</p>"
    return section(
        f"{letter} beside A",
        words,
        listed(lines),
        _figures(drawn),
        table(f"Medians of A and {letter}", header, rows, range(3, 7)),
    )
