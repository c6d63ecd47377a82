"""What benchmarks print for people: a card as lines, tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence


def card_lines(card: Mapping) -> str:
    """ "key: value" for each entry, a line each."""
    return "\n".join(f"{key}: {value}" for key, value in card.items())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; nothing without rows."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) if len(lines) > 2 else ""
