"""The two backends of a `Tokenizer`: the libraries `tokenizers` and `sentencepiece` behind the same small interface.

    vocab_size                        number of ids, added tokens included (largest id + 1)
    encode(text, special)             token ids; with `special`, BOS and EOS are added where the vocabulary's rules do
    encode_literal(text, literal, special)  the same, but what begins at the positions `literal` is no control token
    control                           spelling → `Control` of the tokens that may act as control tokens
    piece(token)                      what a token id contributes to the text (streaming.Piece)
    detokenizer(skip_special_tokens)  a new streaming detokenizer
    token_to_id, id_to_token          between the spelling of a token in the vocabulary and its id
    save(folder)                      write the vocabulary's file

This module knows nothing about chats, models or the origin of the files.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pickle
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MlxeffError
from .streaming import DecodeRules, OpaqueDetokenizer, Piece, StreamingDetokenizer

SPACE = "\u2581"  # stands for a space in SentencePiece vocabularies
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_of_char() -> dict[str, int]:
    """Character → byte in GPT-2's byte-level vocabularies: printable Latin-1 characters stand for their own byte, the
    characters from U+0100 on for the other 68 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Control(NamedTuple):
    """A token that a text may spell out, and that tells the model something else than its letters do."""

    token: int
    special: bool  # declared as such; else a token like `<tool_call>`, which acts as one where the template writes it
    lstrip: bool = False  # it also takes the white space before it, or after it
    rstrip: bool = False


START, AFTER, INSIDE = range(3)  # where a part of a text stands: first, after a control token, after other text


class _Literal:
    """`encode_literal`, the same for both backends.

    The text is cut at the control tokens that count, and what lies between is encoded as text. A token that is not
    declared special counts as a control token where one of it stands outside of the literal positions.
    """

    control: dict[str, Control]
    encode: Callable[[str, bool], list[int]]
    _encode_part: Callable[[str, int], list[int]]  # (text, where it stands); control tokens in it are text
    _surround: Callable[[list[int]], list[int]]  # adds BOS and EOS

    def encode_literal(self, text: str, literal: Container[int], special: bool) -> list[int]:
        """Token ids of `text`, where no control token begins at the positions `literal`."""
        found = list(self._spelled_out(text, literal))
        own = {spelling for start, spelling in found if start not in literal}
        forged = [start for start, s in found if start in literal and (self.control[s].special or s in own)]
        if not forged:
            return self.encode(text, special)
        forbidden = {c.token for spelling, c in self.control.items() if c.special or spelling in own}
        ids, place = [], 0
        for start, spelling in [*((i, s) for i, s in found if i not in literal), (len(text), "")]:
            control, before = self.control.get(spelling), text[place:start]
            if control and control.lstrip:
                before = before.rstrip()
            if before:
                cuts = [i + 1 - place for i in forged if place <= i < place + len(before)]
                ids += self._encode_between(before, AFTER if place else START, cuts, forbidden)
            place = start + len(spelling)
            while control and control.rstrip and text[place : place + 1].isspace():
                place += 1
            ids += [control.token] if control else []
        return self._surround(ids) if special else ids

    def _encode_between(self, text: str, where: int, cuts: list[int], forbidden: set[int]) -> list[int]:
        """Token ids of a text without control tokens: where the vocabulary itself makes one of the ids `forbidden` of
        it, cut at the positions `cuts`, each after the first character of what looks like a control token."""
        ids = self._encode_part(text, where)
        if forbidden.isdisjoint(ids):
            return ids
        edges = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(edges) if a < b]
        return [token for i, part in enumerate(parts) for token in self._encode_part(part, INSIDE if i else where)]

    def _spelled_out(self, text: str, literal: Container[int]) -> Iterator[tuple[int, str]]:
        """Place and spelling of the control tokens in `text`, the longest at each place. They do not overlap, except
        that one may begin inside of one at a literal position."""
        if not self.control:
            return
        (begin, lengths), place = self._spellings, 0
        for match in begin.finditer(text):
            start = match.start()
            spelling = next((text[start : start + n] for n in lengths if text[start : start + n] in self.control), None)
            if spelling and start >= place:
                place = start + (1 if start in literal else len(spelling))
                yield start, spelling

    @functools.cached_property
    def _spellings(self) -> tuple[re.Pattern, list[int]]:
        """A pattern for their first characters, and their lengths, the longest first."""
        begin = re.compile("[" + re.escape("".join({text[0] for text in self.control})) + "]")
        return begin, sorted({len(text) for text in self.control}, reverse=True)


def _markup(text: str) -> bool:
    """Whether a token looks like a mark rather than a word or white space: `<tool_call>`, `[INST]`, `<|user|>`."""
    return len(text) > 2 and text[0] in "<[{" and text[-1] in ">]}" and any(map(str.isalpha, text))


class TokenizersBackend(_Literal):
    """A `tokenizers.Tokenizer`, read from tokenizer.json or built from GGUF metadata. `vocab_size` overrides the size
    that the library reports."""

    file_name = "tokenizer.json"

    def __init__(self, tokenizer: Any, vocab_size: int | None = None):
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._added = tokenizer.get_added_tokens_decoder()
        sizes = [tokenizer.get_vocab_size(), *(token + 1 for token in self._added)]
        self.vocab_size = max(sizes) if vocab_size is None else vocab_size
        self._kind, self._rules = _decode_rules(tokenizer.decoder)
        self._pieces: dict[int, Piece] = {}
        self.control = {
            added.content: Control(token, added.special, added.lstrip, added.rstrip)
            for token, added in self._added.items()
            if added.content and (added.special or _markup(added.content))
        }

    def encode(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def _encode_part(self, text: str, where: int) -> list[int]:
        library = self.tokenizer
        before = library.pre_tokenizer
        library.encode_special_tokens = True  # special tokens in the text are text
        try:
            if self._inside is not None and where != START:
                library.pre_tokenizer = self._inside
            return library.encode(text, add_special_tokens=False).ids
        finally:
            library.encode_special_tokens = False
            if self._inside is not None:
                library.pre_tokenizer = before

    @functools.cached_property
    def _inside(self) -> Any:
        """The pre-tokenizer for what does not begin the text, where it differs: SentencePiece's space only before the
        first word. None elsewhere."""
        before = self.tokenizer.pre_tokenizer
        state = b"" if before is None else before.__getstate__()
        if b'"prepend_scheme":"first"' not in state:
            return None
        changed = pickle.loads(pickle.dumps(before))  # noqa: S301 - a copy of an object in memory
        changed.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
        return changed

    def _surround(self, ids: list[int]) -> list[int]:
        """The ids with those that the vocabulary's rules put around a text."""
        marked, plain = self.encode("a", True), self.encode("a", False)
        places = [i for i in range(len(marked)) if marked[i : i + len(plain)] == plain]
        return marked[: places[0]] + ids + marked[places[0] + len(plain) :] if places else ids

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        return self.tokenizer.id_to_token(token)

    def detokenizer(self, skip_special_tokens: bool = False) -> StreamingDetokenizer:
        if self._kind == "opaque":
            return OpaqueDetokenizer(self.tokenizer, skip_special_tokens)
        return StreamingDetokenizer(self.piece, self._rules, skip_special_tokens)

    def piece(self, token: int) -> Piece:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._make_piece(token)
        return piece

    def _make_piece(self, token: int) -> Piece:
        text = self.tokenizer.id_to_token(token)
        if text is None:
            return Piece(b"")
        if token in self._added:
            return Piece(text.encode(), self._added[token].special)
        if self._kind == "bytes":
            return Piece(_byte_level(text))
        byte = BYTE_TOKEN.fullmatch(text) if self._rules.replace_each_byte else None
        return Piece(bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode())

    def save(self, folder: Path) -> None:
        (folder / self.file_name).write_text(self.tokenizer.to_str(pretty=False), encoding="utf-8")


def _byte_level(text: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; its UTF-8 where it has a character that stands for no byte."""
    table = byte_of_char()
    try:
        return bytes([table[char] for char in text])
    except KeyError:
        return text.encode()


def _decode_rules(decoder: Any) -> tuple[str, DecodeRules]:
    """What the tokens of a `tokenizers` decoder are made of, and the rules to join them: "bytes" for a byte-level
    vocabulary, "spaces" for text with SentencePiece's visible spaces, "opaque" for anything else."""
    spec = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes", DecodeRules()
    if kinds == ["Metaspace"] and steps[0].get("replacement") == SPACE:
        return "spaces", DecodeRules(strip_leading_space=steps[0].get("prepend_scheme", "always") != "never")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0]["pattern"] == {"String": SPACE}:
        strip = steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        if strip or len(kinds) == 3:
            return "spaces", DecodeRules(strip_leading_space=strip, replace_each_byte=True)
    return "opaque", DecodeRules()


class SentencePieceBackend(_Literal):
    """A SentencePiece model, from its serialised protobuf message ModelProto.

    Special tokens in the text (such as `</s>`, written by a chat template) become their ids, as in `transformers`; the
    library alone would split them into ordinary pieces.

    origin       names the file in errors
    bos, eos     ids that `encode(…, special=True)` adds; None for none
    added        id → text of tokens that stay whole: those that are not part of the model, and pieces of it
    plain        those of the added ids that are no special tokens
    special      spellings of pieces that are special tokens, whatever their type says
    prefix_each  put the space that SentencePiece adds before a text also after every special token (`transformers`'
                 "legacy" behaviour), not only at the beginning
    """

    file_name = "tokenizer.model"

    def __init__(self, proto: bytes, origin: str, *, bos: int | None = None, eos: int | None = None,
                 added: dict[int, str] | None = None, plain: Collection[int] = (), special: Iterable[str] = (),
                 prefix_each: bool = False):  # fmt: skip
        self._proto, self._origin = proto, origin
        self._bos, self._eos, self._prefix_each = bos, eos, prefix_each
        self._model = _load_sentencepiece(proto, origin)
        self._size = self._model.get_piece_size()
        self._texts = _pieces_of(self._model, origin)
        ids = {text: token for token, text in reversed([*enumerate(self._texts)])}
        wanted = {ids[text]: text for text in special if text in ids}
        wanted |= {token: text for token, text in (added or {}).items() if text}
        self.stale = {token: text for token, text in wanted.items() if ids.get(text, max(token, self._size)) != token}
        self._added = {token: text for token, text in wanted.items() if token not in self.stale}
        self.vocab_size = max([self._size, *(token + 1 for token in self._added)])
        self._plain = {token for token in plain if token in self._added and not self._is_control(token)}
        self._specials = self._find_specials()
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) + ")")
        self.control = {
            text: Control(token, token not in self._plain)
            for text, token in self._specials.items()
            if token not in self._plain or _markup(text)
        }
        self._pieces: dict[int, Piece] = {}

    def surround(self, bos: int | None, eos: int | None) -> None:
        """Set the ids that `encode(…, special=True)` puts before and after a text; None for none."""
        self._bos, self._eos = bos, eos

    def default_special(self) -> dict[str, str]:
        """The special tokens that the model defines: name as in tokenizer_config.json → text."""
        model = self._model
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {name: self._texts[token] for name, token in ids.items() if 0 <= token < self._size}

    def _is_control(self, token: int) -> bool:
        return token < self._size and (self._model.is_control(token) or self._model.is_unknown(token))

    def _find_specials(self) -> dict[str, int]:
        """Text → id of the tokens that `encode` finds in the text before the library splits the rest."""
        known = {self._texts[token]: token for token in range(self._size) if self._is_control(token)}
        known |= {text: token for token, text in self._added.items()}
        return {text: token for text, token in known.items() if text}

    @functools.cached_property
    def _model_without_prefix(self) -> Any:
        """The same model without the space that it puts before a text."""
        # Protobuf merges a repeated submessage into the first, so these bytes set normalizer_spec.add_dummy_prefix to
        # false.
        return _load_sentencepiece(self._proto + b"\x1a\x02\x18\x00", self._origin)

    @functools.cached_property
    def adds_prefix(self) -> bool:
        """Whether the model puts a space before a text."""
        return self._model.encode("a") != self._model_without_prefix.encode("a")

    @functools.cached_property
    def _rules(self) -> DecodeRules:
        collapses = self._model.encode("a  b") == self._model.encode("a b")
        strip = self.adds_prefix or collapses
        return DecodeRules(strip, strip_all_leading=collapses, sentencepiece=True, replace_each_byte=True)

    def encode(self, text: str, special: bool) -> list[int]:
        ids = [self._bos] if special and self._bos is not None else []
        parts = self._split.split(text) if self._specials else [text]
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._specials[part])
            elif part:
                prefix = self._prefix_each or index == 0
                ids += (self._model if prefix else self._model_without_prefix).encode(part)
        return ids + ([self._eos] if special and self._eos is not None else [])

    def _encode_part(self, text: str, where: int) -> list[int]:
        prefix = where == START or (where == AFTER and self._prefix_each)
        return (self._model if prefix else self._model_without_prefix).encode(text)

    def _surround(self, ids: list[int]) -> list[int]:
        """The ids with BOS and EOS around them, where the vocabulary's rules put them."""
        before, after = ([] if token is None else [token] for token in (self._bos, self._eos))
        return before + ids + after

    def token_to_id(self, token: str) -> int | None:
        if token in self._specials:
            return self._specials[token]
        found = self._model.piece_to_id(token)  # the id of the unknown token where the model has no such piece
        return found if 0 <= found < self._size and self._texts[found] == token else None

    def id_to_token(self, token: int) -> str | None:
        if 0 <= token < self._size:
            return self._texts[token]
        return self._added.get(token)

    def detokenizer(self, skip_special_tokens: bool = False) -> StreamingDetokenizer:
        return StreamingDetokenizer(self.piece, self._rules, skip_special_tokens)

    def piece(self, token: int) -> Piece:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._make_piece(token)
        return piece

    def _make_piece(self, token: int) -> Piece:
        text = self.id_to_token(token)
        if text is None:
            return Piece(b"")
        if text in self._specials and self._specials[text] not in self._plain:
            return Piece(text.encode(), special=True)
        byte = BYTE_TOKEN.fullmatch(text) if token < self._size and self._model.is_byte(token) else None
        if byte:
            return Piece(bytes([int(byte[1], 16)]), literal=True)
        return Piece(text.replace(SPACE, " ").encode())

    def save(self, folder: Path) -> None:
        (folder / self.file_name).write_bytes(self._proto)


def _pieces_of(model: Any, origin: str) -> list[str]:
    """The texts of all pieces of a SentencePiece model. Raises MlxeffError for one that is not UTF-8."""
    size = model.get_piece_size()
    try:
        return model.id_to_piece(list(range(size)))
    except UnicodeDecodeError:
        for token in range(size):
            with contextlib.suppress(UnicodeDecodeError):
                model.id_to_piece(token)
                continue
            raise MlxeffError(f"{origin}: piece {token:,}: wanted UTF-8, got other bytes") from None
        raise


def _load_sentencepiece(proto: bytes, origin: str) -> Any:
    """The `SentencePieceProcessor` of a serialised model. Raises MlxeffError for bytes that are no model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        if proto and model.LoadFromSerializedProto(proto) and model.get_piece_size():
            return model
        reason = "it is empty"
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or "it does not parse"
    raise MlxeffError(f"{origin}: wanted a SentencePiece model, got {len(proto):,} bytes that are none ({reason})")
