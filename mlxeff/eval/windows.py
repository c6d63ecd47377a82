"""A text → windows of tokens, of which each token is scored once.

A window has up to C input tokens, the context. Its first P tokens, the prompt, are read and not scored. The next window
begins S tokens later, the stride, and scores only what lies after the tokens that were scored before. With S = C, every
token is scored once with 0 to C - 1 tokens before it; a smaller stride gives each at least C - S of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MlxeffError, notices
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """Token ids of which the first `prompt` ≥ 1 are read as a prompt, and those from index `first` ≥ `prompt` on are
    scored. The last one is scored and never read."""

    ids: list[int]
    prompt: int
    first: int


@dataclass(frozen=True)
class Cut:
    """How a text is cut into windows, in tokens.

    context  inputs of a window
    stride   from the beginning of a window to that of the next one
    prompt   inputs of each window that are read as a prompt; None: those that are not scored, at least one
    bos      the id of the token that begins each window, in place of the text's own; None: none
    """

    context: int
    stride: int
    prompt: int | None = None
    bos: int | None = None


def cut_of(context: int, stride: int | None, prompt: int | None, bos: int | None = None) -> Cut:
    """The cut with the default stride, with which every token after the first prompt is scored once. Raises MlxeffError
    for a stride or a prompt that the context has no room for."""
    if prompt is not None and prompt > context:
        raise MlxeffError(f"--prompt: wanted at most --context {context} tokens, got {prompt}")
    if stride is not None and stride > context:
        raise MlxeffError(f"--stride: wanted at most --context {context} tokens, got {stride}: text would be left out")
    return Cut(context, stride or context - (prompt or 1) + 1, prompt, bos)


def windows(ids: Sequence[int], cut: Cut, origin: str) -> list[Window]:
    """The windows of a text of token ids. Without a BOS token the first token of the text is not scored. Raises
    MlxeffError for a text that is shorter than one window; `origin` begins the message."""
    ids = [*([] if cut.bos is None else [cut.bos]), *ids]
    size = cut.context + 1  # with the last target
    if len(ids) < size:
        wanted = f"wanted a text of at least {size - (cut.bos is not None)} tokens, one window of --context"
        raise MlxeffError(f"{origin}: {wanted} {cut.context}, got {len(ids) - (cut.bos is not None)}")
    found, scored = [], 1  # tokens that are scored or have nothing before them
    for start in range(0, len(ids) - 1, cut.stride):
        end = min(start + size, len(ids))
        unscored = scored - start
        prompt = unscored if cut.prompt is None else cut.prompt
        if end > scored and end - start > prompt:
            own = ids[start:end] if cut.bos is None else [cut.bos, *ids[start + 1 : end]]
            found.append(Window(own, prompt, max(prompt, unscored)))
        scored = end
        if end == len(ids):
            break
    return found


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The id of the BOS token, where the tokenizer puts one before a text; else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("")[:1] == [bos] else None


def text_ids(tokenizer: Tokenizer, text: str, most: int, rows: int | None, origin: str) -> list[int]:
    """The first `most` token ids of a text, without BOS and EOS. A notice says where the text has more. Raises
    MlxeffError for a token that has no row among the `rows` of the embedding table (None: unknown)."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if rows is not None and ids and max(ids) >= rows:  # MLX would read memory outside of the table
        raise MlxeffError(f"{origin}: wanted token ids below {rows}, got {max(ids)}")
    if len(ids) > most:
        notices.info("%s: the first %d of its %d tokens are read (--tokens)", origin, most, len(ids))
    return ids[:most]
