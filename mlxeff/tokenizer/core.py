"""`Tokenizer`, the same interface for both backends, with BOS, EOS and chat templates. It does not know the origin of
the files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from ..errors import MlxeffError, notices, one_line
from . import template as chat
from .backends import SentencePieceBackend, TokenizersBackend
from .guard import explained
from .streaming import StreamingDetokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SAVED_CONFIG = {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}


class Tokenizer:
    """Text ↔ token ids. Made by `from_folder` or `from_gguf`.

    origin         names the tokenizer in errors
    special        name of a special token as in tokenizer_config.json ("bos_token", "eos_token", …) → its text
    eos_token_ids  ids that end a generation, in addition to that of the EOS token
    templates      Jinja chat templates by name; the usual one is called "default"
    force_bos      put BOS before every text, whatever the vocabulary's rules say
    config         entries for the tokenizer_config.json that `save` writes
    problems       what in the files has no effect, for the notice that also names a BOS and EOS token that is not in
                   the vocabulary

    Raises MlxeffError where `force_bos` has no token.
    """

    def __init__(self, backend: TokenizersBackend | SentencePieceBackend, origin: str, *, special: dict[str, str],
                 eos_token_ids: Iterable[int] = (), templates: dict[str, str] | None = None, force_bos: bool = False,
                 config: dict[str, Any] | None = None, problems: Iterable[str] = ()):  # fmt: skip
        self._backend, self._origin, self._force_bos = backend, origin, force_bos
        self._special = {name: special[name] for name in _SPECIAL_NAMES if special.get(name)}
        self._templates = dict(templates or {})
        self._config = dict(config or {})
        self.vocab_size: int = backend.vocab_size
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.eos_token_ids = set(eos_token_ids) | ({self.eos_token_id} - {None})
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        absent = [f"{name} {self._special[name]!r}" for name in ids if name in self._special and ids[name] is None]
        if lines := [*problems, *([f"not in the vocabulary: {', '.join(absent)}"] if absent else [])]:
            notices.warning("%s", one_line(f"{origin}: without effect: {'; '.join(lines)}"))
        if force_bos and self.bos_token_id is None:
            raise MlxeffError(f"{origin}: the model wants a BOS token before every text, the tokenizer names none")

    def _id_of(self, name: str) -> int | None:
        """The id of the special token `name` ("bos_token", …), None where there is none."""
        return self._backend.token_to_id(self._special[name]) if name in self._special else None

    @property
    def eos_token_ids(self) -> set[int]:
        """Ids of the tokens that end a generation."""
        return self._eos_token_ids

    @eos_token_ids.setter
    def eos_token_ids(self, ids: int | Iterable[int]) -> None:
        self._eos_token_ids = {ids} if isinstance(ids, int) else set(ids)

    def add_eos_token(self, token: str | int) -> None:
        """Let a token, given by its text or its id, end a generation too. Raises MlxeffError where the vocabulary lacks
        it."""
        token_id = token if isinstance(token, int) else self._backend.token_to_id(token)
        if token_id is None or not 0 <= token_id < self.vocab_size:
            raise MlxeffError(f"{self._origin}: end token {token!r} is not among the {self.vocab_size:,} tokens")
        self._eos_token_ids.add(token_id)

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a text."""
        return self._special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a text."""
        return self._special.get("eos_token")

    @property
    def chat_template(self) -> str | None:
        """The usual chat template (the one called "default"), a Jinja text; None where there is none."""
        return self._templates.get("default")

    @chat_template.setter
    def chat_template(self, text: str | None) -> None:
        self._templates.pop("default", None)
        if text is not None:
            self._templates["default"] = text

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a usual chat template."""
        return "default" in self._templates

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, given by its exact spelling in the vocabulary; None where there is no such token."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        """The spelling of a token in the vocabulary; None where there is no such id."""
        return self._backend.id_to_token(token)

    def get_vocab(self) -> dict[str, int]:
        """The spelling of each token in the vocabulary → its id, added tokens included."""
        spellings = ((self._backend.id_to_token(token), token) for token in range(self.vocab_size))
        return {spelling: token for spelling, token in spellings if spelling is not None}

    def encode(self, text: str, add_special_tokens: bool = True, special_in_text: bool = True) -> list[int]:
        """Token ids of `text`. Control tokens in the text become their ids, or with `special_in_text` false those of
        their letters. With `add_special_tokens`, BOS and EOS are added where the vocabulary's rules or `force_bos` say
        so. Raises MlxeffError for text with lone surrogates."""
        ids = self._encode(text, add_special_tokens, () if special_in_text else range(len(text)))
        return self._with_bos(ids) if add_special_tokens else ids

    def _encode(self, text: str, special: bool, literal: Container[int]) -> list[int]:
        """Token ids of `text`, where no control token begins at the positions `literal`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MlxeffError(f"text: not valid Unicode at character {error.start} (a lone surrogate)") from None
        with explained(self._origin):
            if literal:
                return self._backend.encode_literal(text, literal, special)
            return self._backend.encode(text, special)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """The ids with a BOS before them where `force_bos` says so and they have none."""
        return [self.bos_token_id, *ids] if self._force_bos and ids[:1] != [self.bos_token_id] else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids. Bytes that form no character become U+FFFD; ids beyond the vocabulary are ignored.
        Raises MlxeffError for negative ids."""
        stream = self._backend.detokenizer(skip_special_tokens)
        for token in ids:
            if token < 0:
                raise MlxeffError(f"{self._origin}: wanted token ids from 0 to {self.vocab_size - 1}, got {token}")
            stream.add_token(int(token))
        stream.finalize()
        return stream.text

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A new streaming detokenizer at each access, which shows special tokens as their text."""
        return self._backend.detokenizer()

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True, add_generation_prompt: bool = True,
                            special_in_text: bool = False, **kwargs: Any) -> list[int] | str:  # fmt: skip
        """The prompt of a conversation: token ids, or text with `tokenize=False`.

        `messages` are dicts with "role" and "content". `add_generation_prompt` ends the prompt with the beginning of an
        answer. Only the control tokens that the template itself writes are control tokens; those in the messages and in
        `kwargs` are text, unless `special_in_text` is true. `kwargs` are variables for the template (tools, …), and
        `chat_template` among them replaces the template itself. The text of the template gets no BOS of its own, except
        with `force_bos` (OpenELM). Raises MlxeffError where there is no template or the template fails.
        """
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
        source = kwargs.pop("chat_template", None) or self._templates.get(name)
        if source is None:
            raise MlxeffError(f"{self._origin}: has no chat template; give the prompt as plain text")
        given = {"tools": None, "documents": None, **kwargs, "messages": messages}
        own = {name: text for name, text in self._special.items() if name not in given}
        prompt = chat.Prompt(source, self._origin, given, own | {"add_generation_prompt": add_generation_prompt})
        if not tokenize:
            return prompt.text
        literal = set() if special_in_text else prompt.from_user(self._backend.control)
        return self._with_bos(self._encode(prompt.text, False, literal))

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json or tokenizer.model, and tokenizer_config.json with the chat template, into `folder`.

        `transformers.AutoTokenizer` and mlx-lm can load the result and give the same ids. Raises MlxeffError where a
        file cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as name:
                partial = Path(name)
                self._backend.save(partial)
                config = json.dumps(self._saved_config(), ensure_ascii=False, indent=2)
                (partial / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
                for file in sorted(partial.iterdir()):
                    os.replace(file, folder / file.name)
        except OSError as error:
            raise MlxeffError(f"{folder}: the tokenizer could not be written: {error.strerror or error}") from error

    def _saved_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        kept = {key: value for key, value in self._config.items() if key not in ("auto_map", "chat_template")}
        config = _SAVED_CONFIG | kept | self._special
        named = [{"name": name, "template": text} for name, text in self._templates.items()]
        if set(self._templates) == {"default"}:
            config["chat_template"] = self._templates["default"]
        elif named:
            config["chat_template"] = named
        return config
