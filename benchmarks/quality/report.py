"""Turn the results document into tables, the targets, the plot and the section of RESULTS.md. Knows nothing of
models.
"""

import sys
from pathlib import Path

import saving
from mlxeff.bench import tables

TARGETS = (
    ("SeedLM 4.5 aware", "affine 4 g64"),
    ("SeedLM 4 aware", "affine 4 g128"),
    ("SeedLM 3 aware", "affine 3 g64"),
)
SECTION = "seedlm-quality"  # of RESULTS.md
GROUPS = {  # the first word of an arm's name, or its last → label, colour, marker
    "affine": ("MLX affine", "tab:blue", "s"),
    "data-free": ("SeedLM, data-free", "tab:orange", "o"),
    "aware": ("SeedLM, activation-aware", "tab:red", "^"),
    "mlx-lm": ("mlx-lm GPTQ, AWQ, DWQ", "tab:green", "D"),
    "llama.cpp": ("llama.cpp, importance matrix", "tab:purple", "v"),
}

LINES = ("affine", "data-free", "aware")  # groups whose points are one method with more or fewer bits


def group_of(name: str) -> str | None:
    """The key of GROUPS; None for the reference."""
    words = name.split()
    return next((word for word in (words[0], words[-1]) if word in GROUPS), None)


def in_order(document: dict) -> list[tuple[str, dict]]:
    """The arms ordered by bits per weight, fewest first, then by KL divergence."""
    return sorted(document["arms"].items(), key=lambda item: (round(item[1]["bits"], 3), -item[1]["kl"]))


def table(document: dict) -> str:
    """The table of all arms as Markdown."""
    rows = []
    for name, a in in_order(document):
        cells = [name, f"{a['bits']:.3f}", f"{a['bytes'] / 1e6:.1f}", f"{a['perplexity']:.2f}", f"{a['kl']:.4f}"]
        rows.append([*cells, f"{a['top1']:.1%}"])
    return tables.table(["arm", "bits a weight", "MB", "perplexity", "KL, nats a token", "same first token"], rows)


def targets(document: dict) -> list[str]:
    """A line for each target whose arms were measured."""
    lines, arms = [], document["arms"]
    for mine, other in TARGETS:
        if {mine, other} <= arms.keys():
            a, b = arms[mine], arms[other]
            met = all(a[key] < b[key] for key in ("kl", "perplexity"))
            numbers = f"KL {a['kl']:.4f} for {b['kl']:.4f}, perplexity {a['perplexity']:.2f} for {b['perplexity']:.2f}"
            bits = f"{mine} ({a['bits']:.2f} bits) below {other} ({b['bits']:.2f} bits)"
            lines.append(f"target {'met' if met else 'missed'}: {bits}: {numbers}")
    return lines


def layers(document: dict) -> str:
    """Markdown table of the relative errors of single layers, a column per arm; empty if they are not measured yet."""
    kinds = document.get("single layers")
    if not kinds:
        return ""
    names = list(next(iter(kinds.values())))
    rows = [[kind, *(f"{errors[name]:.3f}" for name in names)] for kind, errors in kinds.items()]
    return tables.table(["weights", *names], rows)


def how(document: dict) -> list[str]:
    """A line for each arm that a peer made: its calibration data and time, or the reason why it is missing."""
    lines = []
    for name, arm in document["arms"].items():
        if made := arm.get("made"):
            facts = [f"{key.replace('_', ' ')} {value}" for key, value in made.items() if key != "types"]
            facts += [", ".join(f"{share:.0%} {kind}" for kind, share in made.get("types", {}).items())]
            lines.append(f"{name}: {'; '.join(filter(None, facts))}")
    return lines + absent(document)


def absent(document: dict) -> list[str]:
    """A line for each arm that could not be made."""
    return [f"{name}: not measured: {why}" for name, why in document.get("not measured", {}).items()]


def text(document: dict) -> str:
    """The whole report as text."""
    return "\n\n".join([table(document), "\n".join([*targets(document), *how(document)]), layers(document)])


def section(document: dict, picture: Path, root: Path) -> str:
    """The section of RESULTS.md: plot, table and targets; `root` is the folder of that file."""
    shown = [f"![bits a weight against KL divergence]({picture.relative_to(root)})", table(document)]
    lines = [*targets(document), *absent(document)]
    shown += ["\n".join(f"- {line}." for line in lines), layers(document)]
    return "\n\n".join(filter(None, shown))


def plot(document: dict, path: Path) -> None:
    """Plot bits per weight against KL divergence, with a name beside each point."""
    if (pyplot := saving.pyplot()) is None:
        return
    figure, axes = pyplot.subplots(figsize=(9, 6.5))
    for key, (label, colour, marker) in GROUPS.items():
        points = sorted((a["bits"], a["kl"]) for n, a in document["arms"].items() if group_of(n) == key)
        line = "-" if key in LINES else "None"
        if points:
            axes.plot(*zip(*points), linestyle=line, marker=marker, color=colour, label=label, markersize=5)
    axes.set(xlabel="bits a weight", ylabel="KL divergence from the reference (nats a token)", yscale="log")
    axes.set_title("SmolLM2-135M, decoder layers quantised")
    axes.margins(x=0.15, y=0.08)
    axes.grid(alpha=0.2, which="both")
    axes.legend(loc="lower left")
    figure.tight_layout()
    write_names(axes, document)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"plot: {path}", file=sys.stderr)


def write_names(axes, document: dict) -> None:
    """Write each point's name to its right, with a thin line to the point if names had to move apart."""
    named = {name: arm for name, arm in document["arms"].items() if group_of(name)}
    scale = 72 / axes.figure.dpi  # pixels → points
    at = [axes.transData.transform((arm["bits"], arm["kl"])) * scale for arm in named.values()]
    heights = apart([(x, y) for x, y in at])
    for (name, arm), (_, y), height in zip(named.items(), at, heights, strict=True):
        short = name.replace("mlx-lm ", "").replace("llama.cpp ", "").replace("SeedLM ", "")
        colour = GROUPS[group_of(name)][1]
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        style = {"fontsize": 7.5, "color": colour, "va": "center", "textcoords": "offset points"}
        axes.annotate(short, (arm["bits"], arm["kl"]), (12, height - y), arrowprops=arrow, **style)


def apart(points: list[tuple[float, float]], height: float = 9, width: float = 62) -> list[float]:
    """Heights of the names near their points (x, y) such that no two names overlap; all in typographic points."""
    found = [y for _, y in points]
    order = sorted(range(len(points)), key=lambda i: found[i])
    for _ in range(500):
        for place, low in enumerate(order):
            for high in order[place + 1 :]:
                gap = found[high] - found[low]
                if gap < height and abs(points[high][0] - points[low][0]) < width:
                    found[low] -= (height - gap) / 2
                    found[high] += (height - gap) / 2
    return found
