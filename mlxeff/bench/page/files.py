"""Writes the page and the PNG files of `mlxeff bench page`. A file that is no page or plot of ours is not replaced."""

import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint import temporary_beside
from ...errors import MlxeffError
from ...names import expand
from .. import compare, result
from ..comparison_text import letter_of
from . import drawing, sections, svg
from .plots import Plot, changes, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = 2048  # bytes at the beginning of a file, in which the mark of our files stands


def write(names: Sequence[str], out: str | None, folder: str | None) -> dict:
    """Write the page of the results in the files `names` to `out` (None: beside the first one) and, with `folder`, its
    plots as PNG files there.

    Returns {"out": the page, "png": the PNG files, "plots": the titles of the plots}. Raises MlxeffError before
    anything is written where matplotlib is missing, or where a file that is not of this command would be replaced.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MlxeffError("bench page: wanted matplotlib, which is not installed: pip install 'mlxeff[benchmarks]'")
    documents = [result.read(name) for name in names]
    page = expand(out) if out else expand(names[0]).with_suffix(".html")
    _check(page)
    pictures: list[tuple[Path, Figure]] = []

    def drawn(prefix: str, every: Iterable[Plot], colours: dict[str, int]) -> list[tuple[Plot, str]]:
        """The plots with their SVG; collects their pictures."""
        found = []
        for plot in every:
            figure, name = drawing.draw(plot, colours), prefix + plot.name
            found.append((plot, svg.inline(figure, name, plot.title, plot.described)))
            if folder:
                pictures.append((expand(folder) / f"{name}.png", drawing.titled(figure, plot.title)))
        return found

    results, beside = [], []
    with svg.style():
        for index, (name, document) in enumerate(zip(names, documents)):
            letter = letter_of(index)
            prefix = f"{letter.lower()}-" if len(names) > 1 else ""
            colours = {arm: number for number, arm in enumerate(_arms(document))}
            results.append((name, document, drawn(prefix, plots(document), colours)))
            if index:
                found = _compared(documents[0], document, (names[0], name))
                of_both = {arm: number for number, arm in enumerate(_arms(documents[0]))}
                every = changes(found, letter) if isinstance(found, compare.Comparison) else []
                beside.append((letter, found, drawn(prefix, every, of_both)))
        files = [(path, svg.png(figure)) for path, figure in pictures]
    for path, _ in files:
        _check(path, folder=True)
    for path, data in [*files, (page, sections.page(results, beside).encode("utf-8", "backslashreplace"))]:
        _replace(path, data)
    titles = [plot.title for _, _, pairs in [*beside, *results] for plot, _ in pairs]
    return {"out": str(page), "png": [str(path) for path, _ in files], "plots": titles}


def _compared(first: dict, other: dict, names: tuple[str, str]) -> compare.Comparison | str:
    """A result beside the first one, or why they cannot be compared: the page shows both all the same."""
    try:
        return compare.compare(first, other, sections.THRESHOLD, names)
    except MlxeffError as error:
        return str(error)


def _arms(document: dict) -> list[str]:
    """All arms, in the order of the document, so that each has its colour."""
    return list(dict.fromkeys([*document["arms"], *(row["arm"] for row in document["results"])]))


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
