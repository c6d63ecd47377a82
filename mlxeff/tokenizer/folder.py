"""The tokenizer files of a model folder → `Tokenizer`.

Reads tokenizer.json or, where there is none, tokenizer.model. Further files that are read: tokenizer_config.json,
special_tokens_map.json, added_tokens.json, generation_config.json, config.json, and for chat templates
chat_template.jinja, chat_template.json and additional_chat_templates/. Python code in the folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import MlxeffError, notices, one_line, some
from .backends import SentencePieceBackend, TokenizersBackend
from .core import Tokenizer
from .guard import explained
from .template import OPENELM_INSTRUCT_TEMPLATE

_NO_TOKENIZER = "{folder}: no tokenizer found; looked for tokenizer.json and tokenizer.model"
_OPENELM_HINT = (
    "; Apple's OpenELM repositories ship none, the models use Llama 2's: put the tokenizer.model of"
    " meta-llama/Llama-2-7b-hf (gated) or of another model with Llama 2's 32,000 tokens into this folder"
)
_LLAMA2_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def from_folder(folder: Path | str, model_type: str | None = None, eos_token_ids: int | Iterable[int] | None = None, *,
                instruct: bool = False) -> Tokenizer:  # fmt: skip
    """The tokenizer in `folder`.

    model_type     as in config.json; None: read from there
    eos_token_ids  ids that end a generation, in addition to the tokenizer's EOS; None: those of generation_config.json
                   and config.json
    instruct       the model is an OpenELM that was tuned on conversations: it gets OPENELM_INSTRUCT_TEMPLATE where the
                   folder has no chat template. The word "instruct" in the folder's name says the same.

    An OpenELM has BOS before every text, whatever the files say. A notice says where the files name different end
    tokens, and which special tokens they name that do not exist. Raises MlxeffError for missing and damaged files.
    """
    with explained(str(folder)):
        return _from_folder(Path(folder), model_type, eos_token_ids, instruct)


def _from_folder(
    folder: Path, model_type: str | None, eos_token_ids: int | Iterable[int] | None, instruct: bool
) -> Tokenizer:
    config, model_config = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "config.json")
    model_type = model_type or model_config.get("model_type")
    openelm = model_type == "openelm"
    special = _LLAMA2_SPECIAL if openelm else {}
    special = special | _special_tokens(folder, config)
    backend, problems = _backend(folder, config, special, openelm)
    templates = _templates(folder, config)
    if openelm and not templates and (instruct or _named_instruct(folder, model_config)):
        templates["default"] = OPENELM_INSTRUCT_TEMPLATE
    found = _end_ids(folder, model_config) if eos_token_ids is None else {}
    if eos_token_ids is None:
        eos_token_ids = {token for ids in found.values() for token in ids}
    tokenizer = Tokenizer(
        backend,
        str(folder),
        special=special,
        eos_token_ids=[eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids,
        templates=templates,
        force_bos=openelm,
        config=_config_to_save(config, backend),
        problems=problems,
    )
    _say_end_tokens(tokenizer, folder, found)
    return tokenizer


def _say_end_tokens(tokenizer: Tokenizer, folder: Path, found: dict[str, set[int]]) -> None:
    """A notice where the tokenizer and these files do not name the same tokens. The tokenizer can name only one."""
    own = {tokenizer.eos_token_id} - {None}
    different = any(not own <= ids or ids != next(iter(found.values())) for ids in found.values())
    if different:
        named = {"tokenizer": own} | found if own else found
        texts = [f"{file} {', '.join(_named_ids(tokenizer, ids))}" for file, ids in named.items()]
        notices.info("%s", one_line(f"{folder}: end tokens differ, each ends an answer: {'; '.join(texts)}"))


def _named_ids(tokenizer: Tokenizer, ids: set[int]) -> list[str]:
    """The ids with their texts."""
    texts = {token: tokenizer.id_to_token(token) for token in sorted(ids)}
    return [str(token) if text is None else f"{token} {text!r:.40}" for token, text in texts.items()]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file. Raises MlxeffError for a damaged file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise MlxeffError(f"{path}: wanted JSON, got something that does not parse: {error}") from None
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise MlxeffError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value


def _text_of(token: Any) -> str | None:
    """The text of a special token in a JSON file, where it is written as a string or as {"content": string, …}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """Name ("bos_token", …) → text of the special tokens, from tokenizer_config.json or special_tokens_map.json."""
    entries = _read_json(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    texts = {name: _text_of(value) for name, value in entries.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text}


def _added_tokens(folder: Path, config: dict) -> dict[int, dict[str, Any]]:
    """Id → {"content", "special", …} of the added tokens, from tokenizer_config.json and added_tokens.json, which is
    older: where both name a text, its id is that of the former."""
    try:
        declared = config.get("added_tokens_decoder") or {}
        added = {int(token): dict(entry) for token, entry in declared.items() if _text_of(entry)}
        older = {int(token): text for text, token in _read_json(folder / "added_tokens.json").items()}
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MlxeffError(f"{folder}: added tokens: wanted ids with their text: {error}") from None
    named = {_text_of(entry) for entry in added.values()}
    entries = {token: {"content": text, "special": False} for token, text in older.items() if text not in named}
    return entries | added


def _backend(
    folder: Path, config: dict, special: dict, openelm: bool
) -> tuple[TokenizersBackend | SentencePieceBackend, list[str]]:
    """The backend for the folder's vocabulary, and what in the files has no effect. A SentencePiece model adds its own
    special tokens to `special`."""
    added = _added_tokens(folder, config)
    if (folder / "tokenizer.json").is_file():
        library, stale = _open_json(folder, added, special)
        return TokenizersBackend(library), _say_stale(stale)
    if (folder / "tokenizer.model").is_file():
        backend = _open_sentencepiece(folder / "tokenizer.model", config, special, added)
        return backend, _say_stale(backend.stale)
    raise MlxeffError(_NO_TOKENIZER.format(folder=folder) + (_OPENELM_HINT if openelm else ""))


def _say_stale(stale: dict[int, str]) -> list[str]:
    """What a notice says of added tokens (id → text) with an id that they do not have in the vocabulary."""
    names = some(f"{text!r} {token}" for token, text in sorted(stale.items()))
    return [f"ids of added tokens that are others in the vocabulary: {names}"] if stale else []


def _open_json(folder: Path, added: dict, special: dict) -> tuple[Any, dict[int, str]]:
    """A `tokenizers.Tokenizer` with the added tokens, and those of them whose id is another one there: as in
    transformers, tokenizer.json decides on ids, new tokens come after its last one, and the tokens of its vocabulary
    that `special` names (name → text) stay whole. It also decides whether BOS and EOS are added to a text;
    `add_bos_token` in tokenizer_config.json has no effect, as in transformers 5."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    path = folder / "tokenizer.json"
    try:
        tokenizer = Library.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library raises bare Exception
        raise MlxeffError(f"{path}: wanted a tokenizer, got a file that does not parse: {_one_line(error)}") from None
    _check_post_processor(tokenizer, path)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    stale = {}
    for token, entry in sorted(added.items()):
        text = _text_of(entry)
        if tokenizer.token_to_id(text) is None:
            options = {flag: bool(entry[flag]) for flag in flags if flag in entry}
            tokenizer.add_tokens([AddedToken(text, **options)])
        if tokenizer.token_to_id(text) != token:
            stale[token] = text
    whole = {entry.content for entry in tokenizer.get_added_tokens_decoder().values()}
    named = [text for text in special.values() if text not in whole and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in named])
    return tokenizer, stale


def _check_post_processor(tokenizer: Any, path: Path) -> None:
    """Raises MlxeffError where the tokens that are put around a text have no ids; the library would panic."""
    state = json.loads(tokenizer.post_processor.__getstate__()) if tokenizer.post_processor else {}
    steps = [step for step in (state, *state.get("processors", ())) if step.get("type") == "TemplateProcessing"]
    for step in steps:
        pieces = [*step["single"], *step["pair"]]
        for name in (piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece):
            if name not in step["special_tokens"]:
                raise MlxeffError(f"{path}: post_processor: wanted the id of its token {name!r}, got none")


def _open_sentencepiece(path: Path, config: dict, special: dict, added: dict) -> SentencePieceBackend:
    """The SentencePiece model with the added tokens. Adds special tokens that only the model names to `special`."""
    try:
        proto = path.read_bytes()
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    texts = {token: _text_of(entry) for token, entry in added.items()}
    plain = {token for token, entry in added.items() if not entry.get("special", False)}
    legacy = bool(config.get("legacy", False))
    named = special.values()
    backend = SentencePieceBackend(proto, str(path), added=texts, plain=plain, special=named, prefix_each=legacy)
    for name, text in backend.default_special().items():
        special.setdefault(name, text)
    bos = special.get("bos_token") if config.get("add_bos_token", True) else None
    eos = special.get("eos_token") if config.get("add_eos_token", False) else None
    backend.surround(*(None if token is None else backend.token_to_id(token) for token in (bos, eos)))
    return backend


def _templates(folder: Path, config: dict) -> dict[str, str]:
    """Chat templates by name. A template in its own file takes precedence over an entry of tokenizer_config.json."""
    by_name = _named(config.get("chat_template"))
    by_name |= _named(_read_json(folder / "chat_template.json").get("chat_template"))
    files = [("default", folder / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for name, path in files:
        if path.is_file():
            try:
                by_name[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise MlxeffError(f"{path}: cannot be read as text: {error}") from None
    return by_name


def _named(value: Any) -> dict[str, str]:
    """The chat templates by name, from a JSON value: one text, a list of {"name", "template"}, or a dict by name."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    items = value.items() if isinstance(value, dict) else ()
    return {name: text for name, text in items if isinstance(name, str) and isinstance(text, str)}


def _end_ids(folder: Path, model_config: dict) -> dict[str, set[int]]:
    """File → the ids that end a generation, of config.json and generation_config.json where they name some. A
    generation_config.json that is damaged is left out, as in mlx-lm, with a notice. A multimodal model may have the ids
    of its language model under "text_config"."""
    try:
        generation = _read_json(folder / "generation_config.json")
    except MlxeffError as error:
        notices.warning("%s", one_line(f"{error}: not used"))
        generation = {}
    inner = model_config.get("text_config")
    values = {"config.json": model_config.get("eos_token_id"), "generation_config.json": generation.get("eos_token_id")}
    if values["config.json"] is None and isinstance(inner, dict):
        values["config.json"] = inner.get("eos_token_id")
    found = {}
    for file, value in values.items():
        ids = value if isinstance(value, list) else [value]
        found[file] = {token for token in ids if type(token) is int and token >= 0}
    return {file: ids for file, ids in found.items() if ids}


def _named_instruct(folder: Path, model_config: dict) -> bool:
    """Whether a name of the model contains the word "instruct"."""
    names = [folder.name, folder.resolve().name, str(model_config.get("_name_or_path", ""))]
    if folder.parent.name == "snapshots":  # the Hugging Face cache: models--org--name/snapshots/commit
        names.append(folder.parent.parent.name)
    return any("instruct" in name.lower() for name in names)


def _config_to_save(config: dict, backend: TokenizersBackend | SentencePieceBackend) -> dict[str, Any]:
    """tokenizer_config.json with the entries that `transformers` needs to load the tokenizer."""
    if isinstance(backend, SentencePieceBackend):
        rules = {"add_bos_token": True, "add_eos_token": False, "legacy": False}
        return {"tokenizer_class": "LlamaTokenizer"} | rules | config
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
