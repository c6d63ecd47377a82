"""`mlxeff trace dynamoe` as a Python call."""

from collections.abc import Sequence
from pathlib import Path

from .. import hub
from ..checkpoint import check_new, temporary_beside
from ..errors import MlxeffError, notices
from .dynamoe import networks
from .fitting import Progress, no_progress
from .model import load_path


def trace_dynamoe(
    model: str,
    text: str,
    out: str | Path,
    *,
    sensitivity: float = 0.8,
    ignore_keys: Sequence[str] = (),
    offline: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Trace which experts the tokens of `text` take in the DynaMoE model `model` (a folder or hub id). Writes the new
    page `out` (.html), and beside it the picture (.png) where matplotlib is installed.

    Returns the report that the command prints with `--json`, without the notices. Raises MlxeffError for a model that
    is not a DynaMoE, for an empty text, and where the page cannot be written.
    """
    from ..dynamoe.trace import trace

    if not text:
        raise MlxeffError("trace dynamoe: wanted a text, got an empty one")
    page = Path(out)
    if page.suffix != ".html":
        raise MlxeffError(f"--out {page}: wanted a name that ends in .html")
    check_new(page)
    picture = page.with_suffix(".png")
    check_new(picture)
    with progress(f"fetching {model}", "B") as fetched:
        path = hub.resolve(model, offline=offline, progress=fetched)
    loaded = load_path(path, dict.fromkeys(ignore_keys))
    networks(loaded, "trace dynamoe")
    ids = loaded.tokenizer.encode(text)
    if max(ids) >= loaded.model.vocab_size:
        raise MlxeffError(f"trace dynamoe: wanted token ids below {loaded.model.vocab_size}, got {max(ids)}")
    found = trace(loaded.model, ids, _pieces(loaded.tokenizer, ids), sensitivity)
    title = f"{path.name}: which tokens take how much"
    _written(page, lambda partial: partial.write_text(found.page(title), encoding="utf-8"))
    drawn = _draw(picture, lambda partial: found.draw(partial, title))
    return {"model": model, "page": str(page), "picture": str(picture) if drawn else None, **found.report()}


def _pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to that of the tokens before it."""
    stream, pieces = tokenizer.detokenizer, []
    for token in ids:
        stream.add_token(token)
        pieces.append(stream.last_segment)
    stream.finalize()
    pieces[-1] += stream.last_segment
    return pieces


def _written(path: Path, write) -> None:
    """Write a file under a temporary name and rename it. Raises MlxeffError."""
    partial = temporary_beside(path)
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _draw(path: Path, draw) -> bool:
    """Draw the picture; returns whether that was possible. A notice says where matplotlib is missing."""
    try:
        _written(path, draw)
    except ImportError:
        notices.warning("%s: not drawn: matplotlib is missing (pip install 'mlxeff[benchmarks]')", path.name)
        return False
    return True
