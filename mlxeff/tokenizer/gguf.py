"""The tokenizer in the metadata of a GGUF file → `Tokenizer`. This module gets the metadata as a dict and knows nothing
about the file.

Source: the `tokenizer.*` keys of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
`tokenizer.ggml.model` is "gpt2" for byte-level BPE and "llama" for SentencePiece. Byte-level BPE first splits a text
into words. The file has no rules for that split, only a name for them (`tokenizer.ggml.pre`); SPLITS has the rules of
each name.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from ..errors import MlxeffError, notices
from .backends import SentencePieceBackend, TokenizersBackend
from .core import Tokenizer

# Values of tokenizer.ggml.token_type, which are also SentencePiece's piece types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Tokens that end a turn or a text. Many files name only one of those that their vocabulary has.
END_TOKENS = (
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "<|end_of_turn|>", "<|endofturn|>", "<|return|>", "<|call|>", "<EOT>", "[EOT]", "[EOS]",
)  # fmt: skip

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


def from_gguf(metadata: dict[str, Any], origin: str) -> Tokenizer:
    """The tokenizer in GGUF metadata (key → Python value or NumPy array). `origin` names the file in errors. Raises
    MlxeffError for missing or damaged entries and for kinds of tokenizers that are not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise MlxeffError(f"{origin}: tokenizer.ggml.model: wanted 'gpt2' or 'llama', got {kind!r}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", origin)
    types = _numbers(metadata, "tokenizer.ggml.token_type", int, len(tokens), origin) or [NORMAL] * len(tokens)
    ids = {name: _token_id(metadata, name, len(tokens), origin) for name in ("bos", "eos", "unknown", "padding")}
    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend, config = build(metadata, tokens, types, ids, origin)
    special = {f"{name}_token": tokens[token] for name, token in ids.items() if token is not None}
    special = {{"unknown_token": "unk_token", "padding_token": "pad_token"}.get(k, k): v for k, v in special.items()}
    return Tokenizer(
        backend,
        origin,
        special=special,
        eos_token_ids=_end_ids(metadata, tokens, types, origin),
        templates=_templates(metadata),
        config=config,
    )


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
    except (TypeError, ValueError):
        raise MlxeffError(f"{origin}: {key}: wanted numbers, got {_describe(values)}") from None


def _describe(value: Any) -> str:
    """A value in a few words, for error messages."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value):,}, first {value[0]!r:.40}" if value else "an empty list"
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"


def _token_id(metadata: dict, name: str, count: int, origin: str) -> int | None:
    """The id of the special token `name` ("bos", "eos", …) in a vocabulary of `count` tokens; None where the file has
    none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    try:
        token = int(value)
    except (TypeError, ValueError):
        raise MlxeffError(f"{origin}: {key}: wanted a number, got {_describe(value)}") from None
    if token == 0xFFFFFFFF:  # -1 as an unsigned number: there is no such token
        return None
    if not 0 <= token < count:
        raise MlxeffError(f"{origin}: {key}: wanted an id below {count:,}, got {token}")
    return token


def _end_ids(metadata: dict, tokens: list[str], types: list[int], origin: str) -> set[int]:
    """Ids that end a generation: those that the file names, and tokens of END_TOKENS."""
    named = {_token_id(metadata, name, len(tokens), origin) for name in ("eos", "eot", "eom")}
    known = {i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED) and tokens[i] in END_TOKENS}
    return (named | known) - {None}


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
    added = [(tokens[i], kind == CONTROL) for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
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
    backend = SentencePieceBackend(
        model_proto(tokens, scores, types, ids, add_prefix=prefix),
        origin,
        bos=ids["bos"] if bos else None,
        eos=ids["eos"] if eos else None,
        prefix_each=True,  # engines that read GGUF put the space after every special token
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "add_eos_token": eos, "legacy": True}
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
        piece = _field(1, token.encode("utf-8", "surrogatepass")) + b"\x15" + struct.pack("<f", score)
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
