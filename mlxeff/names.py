"""File names and texts as the operating system gives them: `~` for a home folder, and names that are not UTF-8, which
Python holds as strings with lone surrogates.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import MlxeffError


def expand(name: str | os.PathLike) -> Path:
    """The path `name` with "~" and "~user" replaced by the home folder, unless a file has that very name. Raises
    MlxeffError where there is no such home folder, and for a NUL character, which no path can have."""
    path = Path(name)
    if "\0" in str(path):
        raise MlxeffError(f"{str(path)!r}: wanted a path, got one with a NUL character")
    if not str(path).startswith("~") or os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        raise MlxeffError(f"{name}: {path.parts[0]}: no such user, or one without a home folder") from None


def is_utf8(text: object) -> bool:
    """Whether `str(text)` can be written in UTF-8."""
    try:
        str(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_text(document: object, indent: int | None = None, encoding: str = "utf-8") -> str:
    """The JSON text of a document, with JSON's escapes where `encoding` lacks one of its characters."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    try:
        text.encode(encoding)
    except (UnicodeError, LookupError):
        text = json.dumps(document, indent=indent)
    return text


@contextlib.contextmanager
def readable_by_mlx(path: str | os.PathLike) -> Iterator[str]:
    """A name of the existing file `path` for MLX's functions, which take UTF-8 only. Valid inside the block; arrays
    that were loaded there stay readable. Raises OSError where the file cannot be opened."""
    if is_utf8(path):
        yield str(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield f"/dev/fd/{descriptor}"
    finally:
        os.close(descriptor)
