"""The two backends of a `Tokenizer`: the libraries `tokenizers` and `sentencepiece` behind the same small interface.

    vocab_size                        number of ids, added tokens included (largest id + 1)
    encode(text, special)             token ids; with `special`, BOS and EOS are added where the vocabulary's rules do
    piece(token)                      what a token id contributes to the text (streaming.Piece)
    detokenizer(skip_special_tokens)  a new streaming detokenizer
    token_to_id, id_to_token          between the spelling of a token in the vocabulary and its id
    save(folder)                      write the vocabulary's file

This module knows nothing about chats, models or the origin of the files.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

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


class TokenizersBackend:
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

    def encode(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

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


class SentencePieceBackend:
    """A SentencePiece model, from its serialised protobuf message ModelProto.

    Special tokens in the text (such as `</s>`, written by a chat template) become their ids, as in `transformers`; the
    library alone would split them into ordinary pieces.

    origin       names the file in errors
    bos, eos     ids that `encode(…, special=True)` adds; None for none
    added        id → text of tokens that are not part of the model
    prefix_each  put the space that SentencePiece adds before a text also after every special token (`transformers`'
                 "legacy" behaviour), not only at the beginning
    """

    file_name = "tokenizer.model"

    def __init__(self, proto: bytes, origin: str, *, bos: int | None = None, eos: int | None = None,
                 added: dict[int, str] | None = None, prefix_each: bool = False):  # fmt: skip
        self._proto, self._origin = proto, origin
        self._bos, self._eos, self._prefix_each = bos, eos, prefix_each
        self._model = _load_sentencepiece(proto, origin)
        self._size = self._model.get_piece_size()
        self._added = {token: text for token, text in (added or {}).items() if token >= self._size}
        self.vocab_size = max([self._size, *(token + 1 for token in self._added)])
        self._specials = self._find_specials()
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) + ")")
        self._pieces: dict[int, Piece] = {}

    def surround(self, bos: int | None, eos: int | None) -> None:
        """Set the ids that `encode(…, special=True)` puts before and after a text; None for none."""
        self._bos, self._eos = bos, eos

    def default_special(self) -> dict[str, str]:
        """The special tokens that the model defines: name as in tokenizer_config.json → text."""
        model = self._model
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {name: model.id_to_piece(token) for name, token in ids.items() if token >= 0}

    def _find_specials(self) -> dict[str, int]:
        """Text → id of the tokens that `encode` finds in the text before the library splits the rest."""
        model = self._model
        control = (i for i in range(self._size) if model.is_control(i) or model.is_unknown(i))
        return {model.id_to_piece(i): i for i in control} | {text: token for token, text in self._added.items()}

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

    def token_to_id(self, token: str) -> int | None:
        if token in self._specials:
            return self._specials[token]
        found = self._model.piece_to_id(token)  # the id of the unknown token where the model has no such piece
        return found if self._model.id_to_piece(found) == token else None

    def id_to_token(self, token: int) -> str | None:
        if 0 <= token < self._size:
            return self._model.id_to_piece(token)
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
        if text in self._specials:
            return Piece(text.encode(), special=True)
        if self._model.is_byte(token):
            return Piece(bytes([int(BYTE_TOKEN.fullmatch(text)[1], 16)]), literal=True)
        return Piece(text.replace(SPACE, " ").encode())

    def save(self, folder: Path) -> None:
        (folder / self.file_name).write_bytes(self._proto)


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
