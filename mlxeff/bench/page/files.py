"""Writes the page and the PNG files of `mlxeff bench page`. A file that is no page or plot of ours is not replaced."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint import temporary_beside
from ...errors import MlxeffError
from ...names import expand, json_text
from .. import compare, reader
from ..comparison_text import letter_of
from . import drawing, sections, svg
from .plots import Plot, changes, plots

RESULT = "result.json"  # of a report
HEAD = 2048  # bytes at the beginning of a file, in which the mark of our files stands


def require_plots() -> None:
    """Raises MlxeffError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MlxeffError("bench page: wanted matplotlib, which is not installed: pip install 'mlxeff[benchmarks]'")


def report_folder(name: str) -> Path:
    """Make the folder for a report, before what it reports is measured. Raises MlxeffError where matplotlib is missing,
    where the folder cannot be made, and where its result.json is no result of ours."""
    require_plots()
    folder = expand(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MlxeffError(f"{folder}: wanted a folder for the report: {error.strerror or error}") from error
    if (folder / RESULT).exists():
        reader.read(str(folder / RESULT))
    return folder


def write_report(folder: Path, document: dict) -> list[str]:
    """Write a result to a `report_folder`: result.json, the page report.html, and its plots in the folder "plots".
    Returns their paths. Raises MlxeffError where one cannot be written."""
    target = folder / RESULT
    _replace(target, (json_text(document, indent=1) + "\n").encode())
    found = write([str(target)], str(folder / "report.html"), str(folder / "plots"))
    return [str(target), found["out"], *found["png"]]


def write(names: Sequence[str], out: str | None, folder: str | None) -> dict:
    """Write the page of the results in the files `names` to `out` (None: beside the first one) and, with `folder`, its
    plots as PNG files there.

    Returns {"out": the page, "png": the PNG files, "plots": the titles of the plots}. Raises MlxeffError before
    anything is written where matplotlib is missing, or where a file that is not of this command would be replaced.
    """
    require_plots()
    documents = [reader.read(name) for name in names]
    page = expand(out) if out else expand(names[0]).with_suffix(".html")
    several = len(names) > 1
    sheets = [_sheet(document, letter_of(index) if several else "") for index, document in enumerate(documents)]
    beside = [(letter_of(index), _compared(documents, names, index)) for index in range(1, len(names))]
    changed = [_changes(found, letter, sheets[0].colours) for letter, found in beside]
    every = [*changed, *sheets]
    pictures = [expand(folder) / f"{sheet.name(plot)}.png" for sheet in every for plot in sheet.plots] if folder else []
    _check(page)
    for path in pictures:
        _check(path, folder=True)
    with svg.style():
        drawn = [[(plot, *_drawn(sheet, plot, bool(folder))) for plot in sheet.plots] for sheet in every]
    shown = [[(plot, text) for plot, text, _ in each] for each in drawn]
    files = zip(pictures, [data for each in drawn for _, _, data in each])
    compared = [(*each, plots) for each, plots in zip(beside, shown)]
    whole = sections.page(list(zip(names, documents, shown[len(beside) :])), compared)
    for path, data in [*files, (page, whole.encode("utf-8", "backslashreplace"))]:
        _replace(path, data)
    titles = [plot.title for sheet in every for plot in sheet.plots]
    return {"out": str(page), "png": list(map(str, pictures)), "plots": titles}


@dataclass(frozen=True)
class Sheet:
    """Plots that belong together, with the numbers of the colours of their arms. `letter`: of the result, where there
    are several."""

    letter: str
    plots: list[Plot]
    colours: dict[str, int]

    def name(self, plot: Plot) -> str:
        """The plot's name on the whole page."""
        return f"{self.letter.lower()}-{plot.name}" if self.letter else plot.name


def _sheet(document: dict, letter: str) -> Sheet:
    """The plots of a result. Colours go to all arms, in the order of the document."""
    arms = dict.fromkeys([*document["arms"], *(row["arm"] for row in document["results"])])
    return Sheet(letter, plots(document), {arm: number for number, arm in enumerate(arms)})


def _changes(found: compare.Comparison | str, letter: str, colours: dict[str, int]) -> Sheet:
    return Sheet(letter, [] if isinstance(found, str) else changes(found, letter), colours)


def _drawn(sheet: Sheet, plot: Plot, picture: bool) -> tuple[str, bytes]:
    """(SVG, PNG) of a plot; b"" for the second one unless `picture`."""
    figure = drawing.draw(plot, sheet.colours)
    text = svg.inline(figure, sheet.name(plot), plot.title, plot.described)
    return text, svg.png(drawing.titled(figure, plot.title)) if picture else b""


def _compared(documents: Sequence[dict], names: Sequence[str], index: int) -> compare.Comparison | str:
    """A result beside the first one, or why they cannot be compared: the page shows both all the same."""
    try:
        return compare.compare(documents[0], documents[index], sections.THRESHOLD, (names[0], names[index]))
    except MlxeffError as error:
        return str(error)


def _check(path: Path, folder: bool = False) -> None:
    """Raises MlxeffError where `path` is a file that this command did not write, or cannot be written; `folder`: its
    folder is made where it is missing."""
    if not folder and not path.absolute().parent.is_dir():
        raise MlxeffError(f"{path}: wanted an existing parent folder, got none")
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be written: {error.strerror or error}") from error
    if not any(mark in head for mark in (sections.MARK.encode(), svg.SOFTWARE.encode())):
        raise MlxeffError(f"{path}: wanted a new file, or one that mlxeff bench page wrote, got another one")


def _replace(path: Path, data: bytes) -> None:
    """Write a whole file under another name, and rename it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_beside(path)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be written: {error.strerror or error}") from error
