"""Figures of matplotlib as SVG inside a page, with text as text and colours that follow its light or dark mode, and as
PNG files.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .markup import text as text_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1b1b1a", "#6a6965", "#dcdbd6", "#fefefd"
SERIES = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7", "#eda100", "#e34948", "#e87ba4", "#008300")
# Colours of the figures → the variables of style.css that the page shows in their place.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--series-{index + 1}" for index, colour in enumerate(SERIES)
}
COLOUR = re.compile("|".join(VARIABLES))
SOFTWARE = "mlxeff bench page"  # the mark of our PNG files
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlxeff",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}


@contextmanager
def style() -> Iterator[None]:
    """Figures that are made and written inside the block have the style of the page."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page has the browser's fonts
        yield


def inline(figure: "Figure", name: str, title: str, described: str) -> str:
    """The figure as an <svg> element, named `title` and described by the text `described`. `name` makes the ids in it
    unique on the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'url\(#|href="#', lambda found: f"{found[0]}{name}-", text)
    text = re.sub(r'style="[^"]*"', lambda found: COLOUR.sub(_variable, found[0]), text)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    opening = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-text" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{text_of(title)}</title><desc id="{name}-text">{text_of(described)}</desc>'
    )
    return opening + text[text.index(">", text.index("<svg")) + 1 :].strip()


def _variable(found: re.Match) -> str:
    return f"var({VARIABLES[found[0]]})"


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, metadata={"Software": SOFTWARE})
    return out.getvalue()
