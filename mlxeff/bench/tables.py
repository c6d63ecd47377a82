"""The text output of benchmarks: the card of the machine as lines, and tables in Markdown or with aligned columns."""

from collections.abc import Iterable, Mapping, Sequence


def card_lines(card: Mapping) -> str:
    """One line "key: value" for each entry of the card."""
    return "\n".join(f"{key}: {value}" for key, value in card.items())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, in which "|" of a cell is escaped; "" without rows."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(header)) + " |", *lines[1:]]) if len(lines) > 1 else ""


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are filled with spaces to one width; "" without rows."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in lines]
    return "\n".join(texts) if len(lines) > 1 else ""
