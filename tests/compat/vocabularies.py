"""Tokenizers of every kind, of some 300 tokens: as the files of a folder and as the metadata of a GGUF file.

The libraries `tokenizers` and `sentencepiece` train and encode; they are the oracles for ids.
"""

import functools
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The quick fox jumps over 1234 lazy dogs.", "Say 1234 words! Say it, don't shout.", "quick quick fox", "the naive",
)  # fmt: skip
SPACE = "\u2581"  # stands for a space in SentencePiece's vocabularies
BYTE = "<0x{:02X}>"
ROLES = ("user", "assistant", "system")
# GGUF's numbers for the types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE_TYPE = 1, 2, 3, 4, 6
TYPES = {"normal": NORMAL, "control": CONTROL, "user_defined": USER_DEFINED}

# tokenizer.ggml.pre → the regular expressions by which the releases' tokenizer.json split a text into words, and
# whether GPT-2's own expression follows.
_BEFORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": ((), True),
    "smollm": ((r"\p{N}",), True),
    "llama-bpe": ((rf"{_BEFORE}|\p{{N}}{{1,3}}|{_AFTER}",), False),
    "qwen2": ((rf"{_BEFORE}|\p{{N}}|{_AFTER}",), False),
}
BYTE_LEVEL = tuple(SPLITS)
SENTENCEPIECE = ("spm", "spm unigram")  # tokenizer.model
CONVERTED = ("metaspace", "prepend", "unigram")  # tokenizer.json made of a SentencePiece model


@dataclass
class Vocabulary:
    """A tokenizer.

    kind      one of BYTE_LEVEL, SENTENCEPIECE, CONVERTED
    tokens    the spelling of each id, bos, other and end among them
    types     GGUF's type of each
    control   the kind of `end` and of the tokens of roles: a key of TYPES
    special   `end` is a control token whatever its kind: by its name, or as the tokenizer's EOS
    legacy    the space of SentencePiece comes after every control token, not only before the text
    adds_bos  whether BOS is put before a text; None: the file does not say, and llama.cpp's default holds
    """

    kind: str
    control: str
    end: str  # the token that ends an answer
    other: str  # another token that ends texts, which an answer never reaches
    bos: str
    tokens: list[str]
    types: list[int]
    special: bool = False
    legacy: bool = False
    adds_bos: bool | None = True
    scores: list[float] = field(default_factory=list)
    merges: list[tuple[str, str]] = field(default_factory=list)
    library: object = None  # tokenizers.Tokenizer or sentencepiece.SentencePieceProcessor
    proto: bytes = b""

    def id(self, text: str) -> int:
        return self.tokens.index(text)

    @property
    def roles(self) -> dict[str, str]:
        return {role: f"<|{role}|>" for role in ROLES}

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The ids of a text in which control tokens are spelled out, by the libraries alone. `add_bos`: with BOS, where
        the vocabulary adds it."""
        usual = self.kind in ("spm", "llama-bpe") if self.adds_bos is None else self.adds_bos
        bos = [self.id(self.bos)] if add_bos and usual else []
        if isinstance(self.library, Tokenizer):
            return bos + self.library.encode(text, add_special_tokens=False).ids
        marks = () if self.control == "normal" else (*self.roles.values(), self.end)
        whole = [self.bos, self.other, *marks, *((self.end,) if self.special else ())]
        ids, split = [], re.compile("(" + "|".join(map(re.escape, whole)) + ")")
        for at, part in enumerate(split.split(text)):
            if part in whole:
                ids.append(self.id(part))
            elif part and (at == 0 or self.legacy):
                ids += self.library.encode(part)
            elif part:  # SentencePiece puts a space before every text: encoded after a mark, which is cut off again
                ids += self.library.encode("!" + part)[len(self.library.encode("!")) :]
        return bos + ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids without control tokens."""
        if isinstance(self.library, Tokenizer):
            return self.library.decode(ids, skip_special_tokens=False)
        return self.library.decode(ids)

    def write(self, folder: Path) -> dict:
        """Write the vocabulary's file into the folder; returns the entries of tokenizer_config.json."""
        if self.kind in SENTENCEPIECE:
            (folder / "tokenizer.model").write_bytes(self.proto)
            config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": self.adds_bos, "legacy": self.legacy}
            if self.control == "user_defined":
                marks = (*self.roles.values(), self.end)
                flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
                config["added_tokens_decoder"] = {str(self.id(text)): {"content": text} | flags for text in marks}
        else:
            spec = json.loads(self.library.to_str())
            if self.special and self.control == "normal":  # only tokenizer_config.json says that it is special
                spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["content"] != self.end]
            if not self.adds_bos:
                spec["post_processor"] = None
            (folder / "tokenizer.json").write_text(json.dumps(spec))
            config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        return config | {"bos_token": self.bos, "clean_up_tokenization_spaces": False}

    def metadata(self) -> dict:
        """The entries of a GGUF file, without the ids of end tokens."""
        entries = {"tokens": self.tokens, "token_type": self.types, "bos_token_id": self.id(self.bos)}
        if self.kind in BYTE_LEVEL:
            entries |= {"model": "gpt2", "pre": self.kind, "merges": [" ".join(pair) for pair in self.merges]}
        else:
            entries |= {"model": "llama", "pre": "default", "scores": self.scores, "unknown_token_id": 0}
        entries |= {} if self.adds_bos is None else {"add_bos_token": self.adds_bos}
        return {f"tokenizer.ggml.{name}": value for name, value in entries.items()}


def make(
    kind: str, control: str, end: str, special: bool = False, legacy: bool = False, adds_bos: bool | None = True
) -> Vocabulary:
    """The tokenizer of a kind; the other arguments are fields of `Vocabulary`."""
    made = _byte_level(kind, control, end) if kind in BYTE_LEVEL else _sentencepiece(kind, control, end)
    made.special, made.legacy, made.adds_bos = special, legacy, adds_bos
    if special and isinstance(made.library, Tokenizer):
        made.library.add_special_tokens([AddedToken(end, normalized=False)])
    return made


@functools.cache
def _merges() -> list[tuple[str, str]]:
    """Byte-level merges of letters and of digits, so that the ids tell how a text was split into words."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS * 2, trainer)
    return [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]


def _byte_level(kind: str, control: str, end: str) -> Vocabulary:
    marks = ["<|begin|>", "<|other|>", end, *(f"<|{role}|>" for role in ROLES)]
    merges = _merges()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), *marks]
    types = [NORMAL] * (len(tokens) - len(marks)) + [CONTROL, CONTROL] + [TYPES[control]] * (len(marks) - 2)
    library = Tokenizer(
        models.BPE({text: i for i, text in enumerate(tokens)}, merges, ignore_merges=kind == "llama-bpe")
    )
    patterns, gpt2 = SPLITS[kind]
    library.normalizer = normalizers.NFC() if kind == "qwen2" else None
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)]
    )
    library.decoder = decoders.ByteLevel()
    _add_marks(library, marks, control)
    return Vocabulary(kind, control, end, "<|other|>", "<|begin|>", tokens, types, merges=merges, library=library)


def _add_marks(library: Tokenizer, marks: list[str], control: str) -> None:
    """BOS and the other end token are special in any case; the rest are so, or are added, or are plain vocabulary."""
    special = {"control": True, "user_defined": False}
    kinds = [True, True, *[special.get(control)] * (len(marks) - 2)]
    for text, flag in zip(marks, kinds):
        if flag is not None:
            library.add_tokens([AddedToken(text, special=flag, normalized=False)])
    bos = marks[0]
    library.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, library.token_to_id(bos))]
    )


@functools.cache
def _train(model_type: str, control: str, end: str) -> bytes:
    model = io.BytesIO()
    marks = ",".join([end, *(f"<|{role}|>" for role in ROLES)])
    option = "user_defined_symbols" if control == "user_defined" else "control_symbols"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=360, hard_vocab_limit=False,
        model_type=model_type, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, num_threads=1, **{option: marks},
    )  # fmt: skip
    proto = model.getvalue()
    if control == "normal":  # the trainer has no option for it
        for text in (mark.encode() for mark in marks.split(",")):
            at = proto.index(text) + len(text) + 5  # behind the score; then the field 3, the type
            proto = proto[:at] + proto[at:].replace(bytes([0x18, CONTROL]), bytes([0x18, NORMAL]), 1)
    return proto


def _sentencepiece(kind: str, control: str, end: str) -> Vocabulary:
    proto = _train("unigram" if "unigram" in kind else "bpe", control, end)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = range(model.get_piece_size())
    tokens, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
    marks = {end, *(f"<|{role}|>" for role in ROLES)}
    kinds = {UNKNOWN: model.is_unknown, BYTE_TYPE: model.is_byte, CONTROL: model.is_control}
    types = [next((name for name, holds in kinds.items() if holds(i)), NORMAL) for i in ids]
    types = [TYPES[control] if text in marks else kind for text, kind in zip(tokens, types)]
    made = Vocabulary(kind, control, end, "</s>", "<s>", tokens, types, scores=scores, library=model, proto=proto)
    if kind in CONVERTED:
        made.library = _converted(made, model)
    return made


def _converted(vocabulary: Vocabulary, model: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """A SentencePiece model as tokenizer.json, in the ways of Hugging Face's converters."""
    kind, tokens = vocabulary.kind, vocabulary.tokens
    if kind == "unigram":
        scored = list(zip(tokens, vocabulary.scores))
        library = Tokenizer(models.Unigram(scored, unk_id=model.unk_id(), byte_fallback=True))
    else:
        ids = {text: i for i, text in enumerate(tokens)}
        found = [
            (-vocabulary.scores[i], text[:at], text[at:])
            for i, text in enumerate(tokens) if vocabulary.types[i] == NORMAL
            for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids
        ]  # fmt: skip
        pairs = [(left, right) for _, left, right in sorted(found, key=lambda each: each[0])]
        library = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=kind == "unigram")
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    _add_marks(library, ["<s>", "</s>", vocabulary.end, *vocabulary.roles.values()], vocabulary.control)
    return library
