"""The tokenizer in the metadata of a GGUF file → `Tokenizer`. This module gets the metadata as a dict and knows nothing
about the file.

Source: the `tokenizer.*` keys of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
`tokenizer.ggml.model` is "gpt2" for byte-level BPE and "llama" for SentencePiece. Byte-level BPE first splits a text
into words. The file has no rules for that split, only a name for them (`tokenizer.ggml.pre`); SPLITS has the rules of
each name.
"""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

from ..errors import MlxeffError, notices, one_line, some
from .backends import SPACE, SentencePieceBackend, TokenizersBackend
from .core import Tokenizer
from .guard import explained

# Values of tokenizer.ggml.token_type, which are also SentencePiece's piece types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Tokens that end an answer by their name, whatever their type says: many files name only one of those that their
# vocabulary has, or call them ordinary. Source: llama.cpp's list of end-of-generation tokens (src/llama-vocab.cpp).
END_TOKENS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
# The first token with one of these names ends an answer too, where the file names no token for the same purpose
# (`fim_pad_token_id`, …): the ends of what was to be filled in. Same source.
FILL_IN_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Keys that are used here, and those that have no effect on the tokenizers that are supported.
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator", "mask", "cls", "prefix", "suffix")
_IDS += ("middle", "fim_pre", "fim_suf", "fim_mid", *FILL_IN_ENDS)
_NAMES = ("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token")
_NAMES += ("add_eos_token", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap")
KNOWN_KEYS = {f"tokenizer.ggml.{name}" for name in (*_NAMES, *(f"{name}_token_id" for name in _IDS))}
KNOWN_KEYS |= {"tokenizer.huggingface.json", "tokenizer.rwkv.world", "tokenizer.chat_template"}
KNOWN_KEYS |= {"tokenizer.chat_templates"}

# Parts of the regular expressions that split a text into words.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"[^\r\n\p{L}\p{N}]?"


class Split(NamedTuple):
    """How a text is split into words before BPE merges their bytes."""

    patterns: tuple[str, ...] = ()  # regular expressions; each splits the parts that the one before left
    gpt2: bool = False  # split by GPT-2's regular expression after these patterns
    whole_words: bool = False  # a word that is a token becomes that token, whatever the merges say
    nfc: bool = False  # normalise the text to Unicode NFC first
    bos: bool = False  # put BOS before a text where the file does not say whether to do so


_GPT2 = Split(gpt2=True)
_DIGITS = Split((r"\p{N}",), gpt2=True)
_LLAMA3 = Split((rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}",))
_LLAMA3_WHOLE = _LLAMA3._replace(whole_words=True, bos=True)
_QWEN2 = Split((rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_TAIL}",), nfc=True)
_TEKKEN = Split((rf"{_START}{_LOWER}|{_START}{_UPPER}|\p{{N}}|{_CASED_TAIL}",), whole_words=True, bos=True)
_GPT4O = Split(
    (rf"{_START}{_LOWER}{_CONTRACTION}?|{_START}{_UPPER}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_CASED_TAIL}",)
)  # fmt: skip
_DEFAULT = Split((r"[\p{P}\$\+<=>\^~\|]+", r"\p{N}+", r"[0-9][0-9][0-9]"), gpt2=True)

# Value of tokenizer.ggml.pre → rules.
SPLITS = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3_WHOLE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
# Texts of which `_end_ids` looks up the id.
NAMED_ENDS = {*END_TOKENS, *(name for names in FILL_IN_ENDS.values() for name in names)}
SURROGATE = re.compile("[\ud800-\udfff]")


def from_gguf(metadata: dict[str, Any], origin: str) -> Tokenizer:
    """The tokenizer in GGUF metadata (key → Python value or NumPy array). `origin` names the file in errors. Raises
    MlxeffError for missing or damaged entries and for kinds of tokenizers that are not supported."""
    with explained(origin):
        return _from_gguf(metadata, origin)


def _from_gguf(metadata: dict[str, Any], origin: str) -> Tokenizer:
    kind, tokens, types = vocabulary(metadata, origin)
    ids, problems = _special_ids(metadata, kind, tokens, types, origin)
    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend, config = build(metadata, tokens, types, ids, origin)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    _say_unknown(metadata, origin)
    return Tokenizer(
        backend,
        origin,
        special={name: tokens[ids[key]] for key, name in names.items() if ids[key] is not None},
        eos_token_ids=_end_ids(ids, tokens),
        templates=_templates(metadata),
        config=config,
        problems=problems,
    )


def end_ids(metadata: dict[str, Any], origin: str) -> list[int]:
    """The ids that end an answer, that of EOS first: those that the file names, and those of END_TOKENS and
    FILL_IN_ENDS. Raises MlxeffError as `from_gguf`."""
    kind, tokens, types = vocabulary(metadata, origin)
    ids, _ = _special_ids(metadata, kind, tokens, types, origin)
    return sorted(_end_ids(ids, tokens), key=lambda token: (token != ids["eos"], token))


def ordinary_marks(metadata: dict[str, Any], origin: str) -> list[str]:
    """Texts of the tokens that the file names as BOS, EOS, unknown or padding, and whose type is that of ordinary
    text: a prompt that spells one out has the ids of its letters. Raises MlxeffError as `from_gguf`."""
    kind, tokens, types = vocabulary(metadata, origin)
    ids, _ = _special_ids(metadata, kind, tokens, types, origin)
    named = {ids[name] for name in ("bos", "eos", "unknown", "padding")} - {None}
    return [tokens[token] for token in sorted(named) if types[token] == NORMAL]


def vocabulary(metadata: dict[str, Any], origin: str) -> tuple[str, list[str], list[int]]:
    """(kind, token texts, token types). An end token of any type is a control token, as in llama.cpp. Raises
    MlxeffError."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise MlxeffError(f"{origin}: tokenizer.ggml.model: wanted 'gpt2' or 'llama', got {kind!r}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", origin)
    for token, text in enumerate(tokens):
        if SURROGATE.search(text):
            what = f"{origin}: tokenizer.ggml.tokens"
            raise MlxeffError(f"{what}: wanted valid Unicode, got token {token:,}: {text!r:.60}")
    types = _numbers(metadata, "tokenizer.ggml.token_type", int, len(tokens), origin) or [NORMAL] * len(tokens)
    types = [kind if NORMAL <= kind <= BYTE else NORMAL for kind in types]
    ends = set(_end_ids(dict.fromkeys(FILL_IN_ENDS), tokens))
    return kind, tokens, [CONTROL if token in ends else kind for token, kind in enumerate(types)]


def _say_unknown(metadata: dict[str, Any], origin: str) -> None:
    """A notice of keys of the tokenizer that are not known here."""
    keys = [key for key in metadata if key.startswith("tokenizer.") and not key.startswith("tokenizer.chat_template.")]
    unknown = [key for key in keys if key not in KNOWN_KEYS]
    if unknown:
        notices.warning("%s", one_line(f"{origin}: not known and not used: {some(sorted(unknown))}"))


def _strings(metadata: dict, key: str, origin: str) -> list[str]:
    """The list of strings under `key`. Raises MlxeffError for anything else."""
    values = metadata.get(key)
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(value, str) for value in values):
        raise MlxeffError(f"{origin}: {key}: wanted a list of texts, got {_describe(values)}")
    return list(values)


def _numbers(metadata: dict, key: str, kind: type, count: int, origin: str) -> list | None:
    """The `count` numbers under `key`, as ints or floats (`kind`); None where there is no such key."""
    values = metadata.get(key)
    if values is None:
        return None
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise MlxeffError(f"{origin}: {key}: wanted {count:,} numbers, one for each token, got {_describe(values)}")
    try:
        return [kind(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise MlxeffError(f"{origin}: {key}: wanted numbers, got {_describe(values)}") from None


def _describe(value: Any) -> str:
    """A value in a few words, for error messages."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value):,}, first {value[0]!r:.40}" if value else "an empty list"
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"


def _special_ids(
    metadata: dict, kind: str, tokens: list[str], types: list[int], origin: str
) -> tuple[dict[str, int | None], list[str]]:
    """(name → id of the special tokens, None for none; what a notice says of ids without a token). As in llama.cpp a
    SentencePiece vocabulary that does not say otherwise has the ids of Llama 2's. Raises MlxeffError for values that
    are no numbers."""
    usual = {"unknown": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    ids, problems = {}, []
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding", *FILL_IN_ENDS):
        key, default = f"tokenizer.ggml.{name}_token_id", usual.get(name)
        fits = default is not None and default < len(tokens) and types[default] in (CONTROL, UNKNOWN)
        value, ids[name] = metadata.get(key), default if fits else None
        if value is None:
            continue
        try:
            token = int(value)
        except (TypeError, ValueError, OverflowError):
            raise MlxeffError(f"{origin}: {key}: wanted a number, got {_describe(value)}") from None
        if token in (0xFFFFFFFF, -1):  # there is no such token
            ids[name] = None
        elif 0 <= token < len(tokens):
            ids[name] = token
        else:
            problems.append(f"{key}: wanted an id below {len(tokens):,}, got {token}")
    return ids, problems


def _end_ids(ids: dict[str, int | None], tokens: list[str]) -> set[int]:
    """Ids that end an answer."""
    places: dict[str, int] = {}  # the first id of each text that is looked for
    for token, text in enumerate(tokens):
        if text in NAMED_ENDS:
            places.setdefault(text, token)
    found = {places[text] for text in END_TOKENS if text in places}
    found |= {ids.get(name) for name in ("eos", "eot", "eom")} - {None}
    for purpose, names in FILL_IN_ENDS.items():
        known = (places[name] for name in names if name in places)
        found.add(next(known, None) if ids[purpose] is None else ids[purpose])
    texts = {tokens[token] for token in found - {None}}
    # In vocabularies with separate tokens for the end of a call and of an answer, <|end|> ends a part of it only.
    if "<|end|>" in texts and texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
        found.discard(places["<|end|>"])
    if "</s>" in texts and texts & {"<|tool_response>", "<|plamo:eos|>"}:
        found.discard(places["</s>"])
    return found - {None}


def _templates(metadata: dict) -> dict[str, str]:
    """Chat templates by name, "default" for the usual one."""
    key = "tokenizer.chat_template"
    named = {k[len(key) + 1 :] or "default": v for k, v in metadata.items() if k == key or k.startswith(key + ".")}
    return {name: text for name, text in named.items() if isinstance(text, str) and text}


def _split_of(metadata: dict, origin: str) -> Split:
    """The rules by which this vocabulary splits a text into words. Raises MlxeffError for an unknown name."""
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, "", "default"):
        notices.warning("%s: names no word split (tokenizer.ggml.pre); a general one is used, ids may differ", origin)
        return _DEFAULT
    if name not in SPLITS:
        raise MlxeffError(f"{origin}: tokenizer.ggml.pre: wanted one of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[name]


def _byte_level(metadata: dict, tokens: list[str], types: list[int], ids: dict, origin: str) -> tuple:
    """Byte-level BPE from tokens and merges: (backend, entries for tokenizer_config.json)."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    split = _split_of(metadata, origin)
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges", origin)]
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        library = Library(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise MlxeffError(f"{origin}: tokens and merges do not fit together: {reason}") from None
    library.normalizer = normalizers.NFC() if split.nfc else None
    library.pre_tokenizer = _pre_tokenizer(split)
    library.decoder = decoders.ByteLevel()
    whole = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}  # type of a token that stays whole → special
    added = [(tokens[i], whole[kind]) for i, kind in enumerate(types) if kind in whole and tokens[i]]
    library.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
    _add_bos_eos(library, metadata, split.bos, tokens, ids)
    return TokenizersBackend(library, len(tokens)), {"tokenizer_class": "PreTrainedTokenizerFast"}


def _pre_tokenizer(split: Split) -> Any:
    """The `tokenizers` object that splits a text into words."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    if split is _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True)]  # the same split, without a regular expression
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.gpt2)])


def _flag(metadata: dict, key: str, default: bool) -> bool:
    """The truth value of a key, `default` where there is no such key."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    return default if value is None else bool(value)


def _add_bos_eos(library: Any, metadata: dict, bos_default: bool, tokens: list[str], ids: dict) -> None:
    """Let the `tokenizers` object put BOS and EOS around a text where the file says so."""
    from tokenizers.processors import TemplateProcessing

    bos = ids["bos"] if _flag(metadata, "add_bos_token", bos_default) else None
    eos = ids["eos"] if _flag(metadata, "add_eos_token", False) else None
    used = {tokens[token]: token for token in (bos, eos) if token is not None}
    if used:
        single = [None if bos is None else tokens[bos], "$A", None if eos is None else tokens[eos]]
        library.post_processor = TemplateProcessing(
            single=[token for token in single if token is not None], special_tokens=list(used.items())
        )


def _sentencepiece(metadata: dict, tokens: list[str], types: list[int], ids: dict, origin: str) -> tuple:
    """A SentencePiece model from tokens and scores: (backend, entries for tokenizer_config.json)."""
    scores = _numbers(metadata, "tokenizer.ggml.scores", float, len(tokens), origin)
    if scores is None:
        raise MlxeffError(f"{origin}: tokenizer.ggml.scores: wanted a number for each token, got nothing")
    bos, eos = _flag(metadata, "add_bos_token", True), _flag(metadata, "add_eos_token", False)
    prefix = _flag(metadata, "add_space_prefix", True)
    # Tokens of this type are found before the spaces of a text become visible ones.
    whole = {i: tokens[i] for i, kind in enumerate(types) if kind == USER_DEFINED and SPACE not in tokens[i]}
    backend = SentencePieceBackend(
        model_proto(tokens, scores, types, ids, add_prefix=prefix),
        origin,
        added=whole,
        plain=whole,
        bos=ids["bos"] if bos else None,
        eos=ids["eos"] if eos else None,
        prefix_each=True,  # engines that read GGUF put the space after every special token
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "add_eos_token": eos, "legacy": True}
    if whole:
        flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
        config["added_tokens_decoder"] = {str(token): {"content": text} | flags for token, text in whole.items()}
    return backend, config | {"add_prefix_space": prefix}


def model_proto(tokens: list[str], scores: list[float], types: list[int], ids: dict, *, add_prefix: bool) -> bytes:
    """A serialised sentencepiece.ModelProto of type BPE, written field by field, so that no protobuf library is needed.

    tokens, scores, types  text, score and piece type of each token
    ids                    id of the "unknown", "bos", "eos" and "padding" token; None for none
    add_prefix             let the model put a space before a text

    Source of the field numbers: sentencepiece_model.proto (in ModelProto, pieces are 1, trainer_spec is 2 and
    normalizer_spec is 3).
    """
    types = list(types)
    if UNKNOWN not in types:
        types[ids["unknown"] or 0] = UNKNOWN
    parts = []
    for token, score, kind in zip(tokens, scores, types):
        piece = _field(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score)
        parts.append(_field(1, piece + _number(3, kind)))
    absent = (1 << 64) - 1  # -1 as a protobuf varint
    # unk_id, bos_id, eos_id, pad_id
    known = {40: types.index(UNKNOWN), 41: ids["bos"], 42: ids["eos"], 43: ids["padding"]}
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, int(BYTE in types))  # model_type BPE, byte_fallback
    trainer += b"".join(_number(field, absent if token is None else token) for field, token in known.items())
    normalizer = _field(1, b"identity") + _number(3, int(add_prefix)) + _number(4, 0) + _number(5, 1)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    """A number in protobuf's variable-length encoding."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _number(field: int, value: int) -> bytes:
    """A protobuf field that is a number."""
    return _varint(field << 3) + _varint(value)


def _field(field: int, data: bytes) -> bytes:
    """A protobuf field that is a string or a message."""
    return _varint(field << 3 | 2) + _varint(len(data)) + data
