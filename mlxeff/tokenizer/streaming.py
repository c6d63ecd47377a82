"""Token ids → text, one token at a time and always whole characters.

A token is a run of bytes (a byte-level BPE token, a SentencePiece piece, a byte token such as `<0xE2>`) or, if it is
special, a text. The bytes pass an incremental UTF-8 decoder, which keeps the beginning of a character until the rest
comes, so each token is processed once. Bytes that form no character become U+FFFD: one for each maximal invalid
sequence in byte-level vocabularies, as in `tokenizers`, and one for each byte in vocabularies with byte tokens, as in
SentencePiece. This module knows nothing about vocabularies.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """What one token contributes to the text."""

    data: bytes  # UTF-8, which may begin or end inside of a character
    special: bool = False  # a control token: skip_special_tokens drops it, and an unfinished character ends before it
    literal: bool = False  # a space at its beginning belongs to the text, and is not SentencePiece's added space


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """An error handler for `codecs`: U+FFFD for each byte that is no part of a character."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mlxeff-each-byte", _replace_each_byte)


class StreamingDetokenizer:
    """Call `add_token` with each token id and read `last_segment` for the text that became final. After `finalize`, all
    segments together are the same text as `Tokenizer.decode(ids)`.

    `piece` gives what a token id contributes, `rules` say how the vocabulary joins tokens.
    """

    def __init__(self, piece: Callable[[int], Piece], rules: DecodeRules, skip_special_tokens: bool = False):
        self._piece = piece
        self._rules = rules
        self._skip_special = skip_special_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        errors = "mlxeff-each-byte" if self._rules.replace_each_byte else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._segments: list[str] = []
        self._read = 0  # number of segments that `last_segment` has already returned
        self._strip = self._rules.strip_leading_space
        self.tokens: list[int] = []

    def add_token(self, token: int) -> None:
        """Add one token id. Text that is now final becomes part of `text` and of the next `last_segment`."""
        self.tokens.append(token)
        piece = self._piece(token)
        if not piece.special:
            self._strip = self._strip and not piece.literal
            self._emit(self._utf8.decode(piece.data))
            return
        if self._rules.sentencepiece or not self._skip_special:
            self._flush()
        if not self._skip_special:
            self._emit(piece.data.decode("utf-8"), special=True)

    def finalize(self) -> None:
        """End the text: an unfinished character becomes U+FFFD."""
        self._flush()

    @property
    def text(self) -> str:
        """All final text."""
        return "".join(self._segments)

    @property
    def last_segment(self) -> str:
        """The text that became final since this property was last read."""
        segment = "".join(self._segments[self._read :])
        self._read = len(self._segments)
        return segment

    def _flush(self) -> None:
        self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str, special: bool = False) -> None:
        """Add final text, without the spaces at the beginning that the encoding added."""
        if not text:
            return
        if special and self._rules.sentencepiece:
            self._segments.append(text)
            return
        if self._strip:
            text, self._strip = self._strip_start(text)
        if text:
            self._segments.append(text)

    def _strip_start(self, text: str) -> tuple[str, bool]:
        """Drop the space that SentencePiece put before the text: (the rest of `text`, whether the next text has to be
        stripped too)."""
        if self._rules.strip_all_leading:
            rest = text.lstrip(" ")
            return rest, not rest
        return text.removeprefix(" "), False


class DecodeRules(NamedTuple):
    """How the tokens of a vocabulary become text."""

    strip_leading_space: bool = False  # one space before the text was added by the encoding and is dropped
    strip_all_leading: bool = False  # all spaces before the text are dropped (SentencePiece: remove_extra_whitespaces)
    # As in SentencePiece: a control token does not count as the beginning of the text, so a space after it is dropped
    # too, and it ends an unfinished character even when it is skipped.
    sentencepiece: bool = False
    replace_each_byte: bool = False  # U+FFFD for each invalid byte instead of each invalid sequence


class OpaqueDetokenizer(StreamingDetokenizer):
    """The detokenizer for vocabularies whose tokens are not bytes (such as WordPiece): the library `tokenizers` joins
    them."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._segments, self._read, self.tokens = [], 0, []

    def add_token(self, token: int) -> None:
        """Add one token id."""
        self.tokens.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text:
            self._segments.append(text)

    def finalize(self) -> None:
        """End the text: add what the library has not returned yet."""
        whole = self._tokenizer.decode(self.tokens, skip_special_tokens=self._skip_special)
        text = self.text
        if whole.startswith(text) and len(whole) > len(text):
            self._segments.append(whole[len(text) :])
