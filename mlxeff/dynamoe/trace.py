"""How much of each layer's feed-forward network each token of a text computes, as numbers and as two pictures: a page
of HTML, and a PNG.

Shapes: L layers, T tokens.
"""

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..running import RunOptions

STEP = 512  # tokens that are computed at once
HUES = ("#1b7f79", "#f2efe4", "#b5452c")  # of the least, the middle and the most
STYLE = """
body { font: 16px/1.7 Georgia, serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2, caption, th, td, .legend { font-family: sans-serif; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { border-radius: 3px; padding: 1px 0; }
table { border-collapse: collapse; }
.layers td, .layers th { padding: 0 .6em 0 0; font-size: 13px; text-align: right; }
.layers .bar { text-align: left; width: 20em; }
.layers .bar div { height: 11px; background: #1b7f79; }
.map { overflow-x: auto; }
svg { display: block; shape-rendering: crispEdges; }
"""


@dataclass(frozen=True)
class Trace:
    """The pieces of text that the tokens stand for (T), and the share of its neurons that each layer computed for each
    token, (L, T)."""

    pieces: list[str]
    shares: np.ndarray
    sensitivity: float

    def report(self) -> dict:
        """The numbers, for `--json`."""
        return {
            "sensitivity": self.sensitivity,
            "tokens": [
                {"text": piece, "fraction": round(float(share), 4)}
                for piece, share in zip(self.pieces, self.shares.mean(axis=0), strict=True)
            ],
            "layer_fractions": [round(float(share), 4) for share in self.shares.mean(axis=1)],
            "mean_fraction": round(float(self.shares.mean()), 4),
        }

    def page(self, title: str) -> str:
        """The page of HTML: the text coloured by the mean share of each token, the mean of each layer, and the share of
        each token in each layer. It stands alone, and runs no script."""
        mean, layers = self.shares.mean(axis=0), self.shares.mean(axis=1)
        words = "".join(
            f'<span style="background:{colour(share)}" title="{share:.0%} of the neurons">{html.escape(piece)}</span>'
            for piece, share in zip(self.pieces, _spread(mean), strict=True)
        )
        rows = "".join(
            f'<tr><th>{number}</th><td>{share:.1%}</td><td class="bar"><div style="width:{share:.1%}"></div></td></tr>'
            for number, share in enumerate(layers)
        )
        scale = "".join(f'<span style="background:{colour(k / 8)}">&emsp;</span>' for k in range(9))
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Sensitivity {self.sensitivity:g}: the tokens computed {self.shares.mean():.1%} of the feed-forward neurons.</p>
<p class="legend">The least of these tokens {scale} the most</p>
<div class="text">{words}</div>
<h2>Layers</h2>
<table class="layers"><tr><th>layer</th><th>neurons</th><th class="bar">mean over the tokens</th></tr>{rows}</table>
<h2>Every token in every layer</h2>
<p class="legend">Tokens from left to right, layers from top to bottom: dark is little, light all neurons.</p>
<div class="map">{_map(self.shares)}</div>
</body></html>
"""

    def draw(self, path: Path, title: str) -> None:
        """Write the shares of all layers and tokens, with the means of the layers, as a PNG. Needs matplotlib; raises
        ImportError without it."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 5), layout="constrained")
        tokens, means = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        image = tokens.imshow(self.shares, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        tokens.set(xlabel="token", ylabel="layer", title=title)
        figure.colorbar(image, ax=tokens, label="share of the neurons")
        means.barh(range(len(self.shares)), self.shares.mean(axis=1), color="#1b7f79")
        means.set(xlabel="mean share", xlim=(0, 1), title=f"{self.shares.mean():.1%} in all")
        figure.savefig(path, dpi=120, format="png")


def trace(model, ids: Sequence[int], pieces: list[str], sensitivity: float) -> Trace:
    """The trace of the tokens `ids` (T) in a DynaMoE model, which stand for `pieces`. It is computed operator by
    operator."""
    networks = [layer.feed_forward for layer in model.layers]
    cache, options, columns = model.new_cache(), RunOptions(fraction=sensitivity), []
    for start in range(0, len(ids), STEP):
        with recorded(networks) as shares:
            mx.eval(model.plain.hidden(mx.array([list(ids[start : start + STEP])]), cache, options))
        columns.append(np.stack([np.array(each[0]) for each in shares]))
    return Trace(pieces, np.concatenate(columns, axis=1), sensitivity)


@contextmanager
def recorded(networks: Sequence) -> Iterator[list[list[mx.array]]]:
    """Within the block the shares that tokens compute are kept: for each network an array (T) a call."""
    found: list[list[mx.array]] = [[] for _ in networks]
    for network, shares in zip(networks, found, strict=True):
        network.record(shares)
    try:
        yield found
    finally:
        for network in networks:
            network.record(None)


def _spread(values: np.ndarray) -> np.ndarray:
    """The values, moved and scaled so that they reach from 0 to 1: the differences between tokens are what is shown."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full_like(values, 0.5)


def colour(share: float) -> str:
    """The background for a share from 0 to 1, light enough for black text."""
    stops = [tuple(int(hue[i : i + 2], 16) for i in (1, 3, 5)) for hue in HUES]
    place = min(max(float(share), 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    mixed = [a + (b - a) * (place - first) for a, b in zip(stops[first], stops[first + 1], strict=True)]
    return "#" + "".join(f"{round(0.45 * 255 + 0.55 * value):02x}" for value in mixed)


def _map(shares: np.ndarray, size: int = 6) -> str:
    """An SVG with a square for each layer and token; neighbours of one shade are one rectangle."""
    layers, tokens = shares.shape
    shapes = []
    for layer, row in enumerate(shares):
        start = 0
        for token in range(1, tokens + 1):
            if token == tokens or row[token] != row[start]:
                grey = f"{round(60 + 180 * float(row[start])):02x}" * 3
                place = f'x="{start * size}" y="{layer * size}" width="{(token - start) * size}" height="{size}"'
                shapes.append(f'<rect {place} fill="#{grey}"/>')
                start = token
    return f'<svg width="{tokens * size}" height="{layers * size}" role="img">{"".join(shapes)}</svg>'
