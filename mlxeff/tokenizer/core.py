"""`Tokenizer`: one interface over both engines. Knows BOS, EOS and the chat template; not where files come from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import MlxeffError
from . import template as chat
from .backends import SentencePieceBackend, TokenizersBackend
from .streaming import StreamingDetokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SAVED_CONFIG = {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}


class Tokenizer:
    """Text <-> ids. Made by `from_folder` or `from_gguf`.

    `special`: names as in tokenizer_config.json ("bos_token", "eos_token", …) to the token's text. `templates`: Jinja
    chat templates by name, the ordinary one under "default". `force_bos`: the model wants BOS before every text.
    """

    def __init__(self, backend: TokenizersBackend | SentencePieceBackend, origin: str, *, special: dict[str, str],
                 eos_token_ids: Iterable[int] = (), templates: dict[str, str] | None = None, force_bos: bool = False,
                 config: dict[str, Any] | None = None):  # fmt: skip
        self._backend, self._origin, self._force_bos = backend, origin, force_bos
        self._special = {name: special[name] for name in _SPECIAL_NAMES if special.get(name)}
        self._templates = dict(templates or {})
        self._config = dict(config or {})
        self.vocab_size: int = backend.vocab_size
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.eos_token_ids = set(eos_token_ids) | ({self.eos_token_id} - {None})
        if force_bos and self.bos_token_id is None:
            raise MlxeffError(f"{origin}: the model wants a BOS token before every text, the tokenizer names none")

    def _id_of(self, name: str) -> int | None:
        token = self._special.get(name)
        found = None if token is None else self._backend.token_to_id(token)
        if token is not None and found is None:
            raise MlxeffError(f"{self._origin}: {name} is {token!r}, which is not in the vocabulary")
        return found

    @property
    def eos_token_ids(self) -> set[int]:
        """Ids that end a generation."""
        return self._eos_token_ids

    @eos_token_ids.setter
    def eos_token_ids(self, ids: int | Iterable[int]) -> None:
        self._eos_token_ids = {ids} if isinstance(ids, int) else set(ids)

    def add_eos_token(self, token: str | int) -> None:
        """Let this token (its text or id) end a generation too. MlxeffError when the vocabulary lacks it."""
        found = token if isinstance(token, int) else self._backend.token_to_id(token)
        if found is None or not 0 <= found < self.vocab_size:
            raise MlxeffError(f"{self._origin}: end token {token!r} is not among the {self.vocab_size:,} tokens")
        self._eos_token_ids.add(found)

    @property
    def bos_token(self) -> str | None:
        return self._special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self._special.get("eos_token")

    @property
    def chat_template(self) -> str | None:
        """The ordinary chat template, a Jinja text."""
        return self._templates.get("default")

    @chat_template.setter
    def chat_template(self, text: str | None) -> None:
        self._templates.pop("default", None)
        if text is not None:
            self._templates["default"] = text

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's exact text as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        """The vocabulary's spelling of an id, or None."""
        return self._backend.id_to_token(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, special tokens in it included; with the BOS (and EOS) that the model's rules put around it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MlxeffError(f"text: not valid Unicode at character {error.start} (a lone surrogate)") from None
        ids = self._backend.encode(text, add_special_tokens)
        return self._with_bos(ids) if add_special_tokens else ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [self.bos_token_id, *ids] if self._force_bos and ids[:1] != [self.bos_token_id] else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Bytes that form no character become U+FFFD; ids beyond the vocabulary give nothing."""
        stream = self._backend.detokenizer(skip_special_tokens)
        for token in ids:
            if token < 0:
                raise MlxeffError(f"{self._origin}: wanted token ids from 0 to {self.vocab_size - 1}, got {token}")
            stream.add_token(int(token))
        stream.finalize()
        return stream.text

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer at each access; special tokens show as their text."""
        return self._backend.detokenizer()

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True, add_generation_prompt: bool = True,
                            **kwargs: Any) -> list[int] | str:  # fmt: skip
        """Prompt of a conversation: ids, or text with `tokenize=False`. `kwargs` (tools, …) go to the template.

        No BOS is added to what the template writes, except where the model wants one before every text (OpenELM).
        """
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
        source = kwargs.pop("chat_template", None) or self._templates.get(name)
        if source is None:
            raise MlxeffError(f"{self._origin}: has no chat template; give the prompt as plain text")
        variables = {"tools": None, "documents": None, **self._special, **kwargs}
        text = chat.render(source, self._origin, messages, variables | {"add_generation_prompt": add_generation_prompt})
        return self._with_bos(self.encode(text, add_special_tokens=False)) if tokenize else text

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json or tokenizer.model, and tokenizer_config.json with the chat template, into `folder`.

        `transformers.AutoTokenizer` and mlx-lm load the result and give the same ids.
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
        kept = {key: value for key, value in self._config.items() if key not in ("auto_map", "chat_template")}
        config = _SAVED_CONFIG | kept | self._special
        named = [{"name": name, "template": text} for name, text in self._templates.items()]
        if set(self._templates) == {"default"}:
            config["chat_template"] = self._templates["default"]
        elif named:
            config["chat_template"] = named
        return config
