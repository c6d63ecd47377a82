"""The text output of benchmarks: the card of the machine as lines, and tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence


def card_lines(card: Mapping) -> str:
    """One line "key: value" for each entry of the card."""
    return "\n".join(f"{key}: {value}" for key, value in card.items())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; "" without rows."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) if len(lines) > 2 else ""
