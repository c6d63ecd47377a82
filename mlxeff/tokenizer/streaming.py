"""Token ids -> text, one token at a time, never emitting half a character. Knows bytes, nothing about vocabularies.

Every id is a run of bytes (a byte-level BPE token, a SentencePiece piece, a `<0xE2>` byte token) or literal text (a
special token). Bytes go through an incremental UTF-8 decoder, which holds an unfinished character back, so the cost is
linear. Bytes that form no character become U+FFFD: one for each maximal broken run in byte-level vocabularies (as
`tokenizers` does), one for each byte in byte-fallback vocabularies (as SentencePiece does).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """What one id contributes to the text."""

    data: bytes  # UTF-8, possibly a part of a character
    special: bool = False  # a control token: dropped by skip_special_tokens, flushes an unfinished character
    literal: bool = False  # text starts here: a space in it is the text's own


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mlxeff-each-byte", _replace_each_byte)


class StreamingDetokenizer:
    """`add_token(id)`, read `last_segment`; after `finalize()` the segments joined equal `Tokenizer.decode(ids)`."""

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
        self._read = 0  # segments already handed out by last_segment
        self._strip = self._rules.strip_leading_space
        self.tokens: list[int] = []

    def add_token(self, token: int) -> None:
        """Take one id. Text that is now certain becomes part of `text` and of the next `last_segment`."""
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
        """No more tokens: an unfinished character becomes U+FFFD."""
        self._flush()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._segments)

    @property
    def last_segment(self) -> str:
        """Text that became final since this was last read."""
        segment = "".join(self._segments[self._read :])
        self._read = len(self._segments)
        return segment

    def _flush(self) -> None:
        self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str, special: bool = False) -> None:
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
        """Drop the space that SentencePiece put before the text. Returns the rest and whether to go on stripping."""
        if self._rules.strip_all_leading:
            rest = text.lstrip(" ")
            return rest, not rest
        return text.removeprefix(" "), False


class DecodeRules(NamedTuple):
    """How bytes become text in one vocabulary."""

    strip_leading_space: bool = False  # one space before the text belongs to the encoding, not to the text
    strip_all_leading: bool = False  # every space before the text does (SentencePiece's remove_extra_whitespaces)
    sentencepiece: bool = False  # control tokens are not the text's start, and end a character even when skipped
    replace_each_byte: bool = False  # U+FFFD for each broken byte instead of each broken run


class OpaqueDetokenizer(StreamingDetokenizer):
    """For a `tokenizers` decoder whose tokens are not bytes (WordPiece and the like): the library does the joining."""

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
        """Take one id."""
        self.tokens.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text:
            self._segments.append(text)

    def finalize(self) -> None:
        """Add what the library still held back."""
        whole = self._tokenizer.decode(self.tokens, skip_special_tokens=self._skip_special)
        text = self.text
        if whole.startswith(text) and len(whole) > len(text):
            self._segments.append(whole[len(text) :])
