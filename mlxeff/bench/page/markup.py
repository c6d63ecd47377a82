"""HTML text. Everything that comes from a result goes through `text`, which escapes it."""

import html
from collections.abc import Iterable, Mapping, Sequence

from ..words import plain


def text(value: object) -> str:
    """A value as escaped text; characters that cannot be shown are written as escapes."""
    return html.escape(plain(value))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> str:
    """A table below its caption that scrolls inside its box, with the first column in its place; "" without rows.
    `numbers` are the columns to align to the right. A cell that is a `Raw` is HTML already."""
    rows, right = list(rows), set(numbers)
    if not rows:
        return ""
    parts = [f'<p class="caption">{text(caption)}</p>']
    label = f'aria-label="{text(caption)}"'
    parts.append(f'<div class="scroll" tabindex="0" role="region" {label}><table {label}><thead><tr>')
    parts += [f'<th scope="col"{_right(index, right)}>{text(name)}</th>' for index, name in enumerate(header)]
    parts.append("</tr></thead><tbody>")
    for row in rows:
        cells = [cell.html if isinstance(cell, Raw) else text(cell) for cell in row]
        first = f'<th scope="row">{cells[0]}</th>'
        rest = (f"<td{_right(index, right)}>{cell}</td>" for index, cell in enumerate(cells) if index)
        parts.append(f"<tr>{first}{''.join(rest)}</tr>")
    return "".join([*parts, "</tbody></table></div>"])


class Raw:
    """Text that is HTML already."""

    def __init__(self, markup: str):
        self.html = markup


def badge(word: str) -> Raw:
    """A word in a frame."""
    return Raw(f'<span class="badge" data-kind="{text(word)}">{text(word)}</span>')


def _right(index: int, right: set[int]) -> str:
    return ' class="number"' if index in right else ""


def facts(entries: Mapping[str, object]) -> str:
    """Names and values, of dicts inside with names joined by a dot; "" without entries."""
    lines = [f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in _flat(entries)]
    return f'<dl class="facts">{"".join(lines)}</dl>' if lines else ""


def _flat(entries: Mapping[str, object], path: str = "") -> Iterable[tuple[str, object]]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            known = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{path}{key}", "not known" if value is None else known


def listed(lines: Iterable[object]) -> str:
    """A list; "" without lines."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def section(title: str, *parts: str, name: str = "") -> str:
    """A section with a heading of level 2; "" where all parts are empty."""
    body = "".join(parts)
    return (
        f"<section{f' id={chr(34)}{text(name)}{chr(34)}' if name else ''}><h2>{text(title)}</h2>{body}</section>"
        if body
        else ""
    )


def folded(title: str, body: str) -> str:
    """A part that opens on demand; "" for an empty one."""
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""
