"""Tokenizers against independent oracles: sentencepiece itself, transformers' converter, a plain BPE written here."""

import itertools
import json
import logging
import random
import re
import unicodedata
from pathlib import Path

import pytest
import regex

from mlxeff.errors import MlxeffError
from mlxeff.tokenizer import OPENELM_INSTRUCT_TEMPLATE, from_folder, from_gguf
from mlxeff.tokenizer.backends import byte_of_char
from mlxeff.tokenizer.gguf import SPLITS
from tokenizer_files import ALPHABET, CHAT, random_lines, train_sentencepiece, write_config


def stream(tokenizer, ids):
    detokenizer, segments = tokenizer.detokenizer, []
    for token in ids:
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    segments.append(detokenizer.last_segment)
    assert detokenizer.text == "".join(segments)
    return segments


def transformers_bpe(metadata):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    names = GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    fields = {name: metadata[f"tokenizer.{key}"] for key, name in names if f"tokenizer.{key}" in metadata}
    fields["token_type"] = list(fields["token_type"])
    return convert_gguf_tokenizer("llama", fields)[0]


class PlainBPE:
    """Byte-level BPE as GPT-2 describes it: cut into words, merge the best-ranked neighbours until none is left."""

    def __init__(self, metadata, patterns):
        self.ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        self.char = {byte: char for char, byte in byte_of_char().items()}
        self.patterns = patterns

    def words(self, text):
        words = [text]
        for pattern in self.patterns:
            words = [part for word in words for part in regex.split(f"({pattern})", word) if part]
        return words

    def encode(self, text):
        return [self.ids[part] for word in self.words(text) for part in self.merge(word)]

    def merge(self, word):
        parts = [self.char[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return parts


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --- byte-level BPE from GGUF ---------------------------------------------------------------------------------------


def test_smollm2_ids_equal_a_plain_bpe(smollm2, metadata, prose):
    plain = PlainBPE(metadata, [r"\p{N}", GPT2])
    for line in random.Random(1).sample(prose, 1500) + random_lines(500) + ["", " ", "   2 1", "x = 1234.5e-6"]:
        assert smollm2.encode(line) == plain.encode(line), line


def test_smollm2_ids_equal_transformers(smollm2, metadata, prose):
    """transformers' converter does not know the split "smollm" (single digits): digits are left to PlainBPE."""
    oracle = transformers_bpe(metadata)
    lines = [line for line in prose[:6000] + random_lines(2000) if not regex.search(r"\p{N}", line)]
    assert len(lines) > 3000
    for line in lines:
        assert smollm2.encode(line) == oracle.encode(line, add_special_tokens=False).ids, line


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-4o", "tekken", "gpt-2", "dbrx"])
def test_splits_equal_transformers(metadata, prose, pre):
    changed = metadata | {"tokenizer.ggml.pre": pre}
    tokenizer, oracle = from_gguf(changed, "x.gguf"), transformers_bpe(changed)
    for line in prose[:1500] + random_lines(1500, seed=2):
        text = unicodedata.normalize("NFC", line) if SPLITS[pre].nfc else line  # the oracle does not normalise
        want = oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(line, add_special_tokens=False) == want, line


def test_smollm2_round_trip(smollm2, prose):
    for line in prose[:3000] + random_lines(2000, seed=3) + ["<|im_start|>user\nx<|im_end|>"]:
        assert smollm2.decode(smollm2.encode(line)) == line


def test_byte_level_decode_of_any_ids_equals_tokenizers(smollm2):
    library, chooser = smollm2._backend.tokenizer, random.Random(4)
    for _ in range(1500):
        low = [chooser.randrange(0, 273) for _ in range(chooser.randint(0, 12))]  # specials and single bytes
        ids = low + [chooser.randrange(smollm2.vocab_size) for _ in range(chooser.randint(1, 20))]
        chooser.shuffle(ids)
        assert smollm2.decode(ids) == library.decode(ids, skip_special_tokens=False), ids
        assert smollm2.decode(ids, skip_special_tokens=True) == library.decode(ids, skip_special_tokens=True), ids
        assert "".join(stream(smollm2, ids)) == smollm2.decode(ids), ids


def test_streaming_never_emits_half_a_character(smollm2):
    text = "déjà 👩‍🚀 日本語 한국어 " * 3
    ids = smollm2.encode(text)
    assert len(ids) > len(text)  # characters are split over tokens
    segments = stream(smollm2, ids)
    assert not any("\ufffd" in segment for segment in segments)
    assert "".join(segments) == text


def test_finalize_shows_an_unfinished_character(smollm2):
    ids = smollm2.encode("ok 🤖")[:-1]
    assert stream(smollm2, ids)[-1] == "\ufffd"


def test_detokenizer_is_fresh_at_each_access_and_resets(smollm2):
    first = smollm2.detokenizer
    first.add_token(smollm2.encode("Hello")[0])
    assert smollm2.detokenizer.text == ""
    first.reset()
    assert (first.text, first.last_segment, first.tokens) == ("", "", [])


def test_smollm2_special_tokens_and_template(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_id) == (49152, 1, 2)
    assert smollm2.eos_token_ids == {0, 2, 4}  # as llama.cpp: <|endoftext|> and <reponame> end an answer too
    text = smollm2.apply_chat_template(CHAT, tokenize=False)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 🤖<|im_end|>\n<|im_start|>assistant\n"
    assert text == turns
    ids = smollm2.apply_chat_template(CHAT)
    assert ids == smollm2.encode(text, add_special_tokens=False)
    assert ids.count(smollm2.token_to_id("<|im_start|>")) == 3


def test_saved_gguf_tokenizer_gives_the_same_ids_in_transformers(smollm2, tmp_path, prose):
    from transformers import AutoTokenizer

    smollm2.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [2, 0]}')
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), from_folder(tmp_path)
    for line in prose[:300] + random_lines(300, seed=5):
        ids = smollm2.encode(line)
        assert ids == again.encode(line) == theirs(line)["input_ids"], line
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        smollm2.apply_chat_template(CHAT, tokenize=False)
    )
    assert (again.eos_token_ids, again.chat_template) == ({0, 2}, smollm2.chat_template)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (again.bos_token_id, again.eos_token_id) == (1, 2)


def test_gguf_bos_is_added_when_the_file_says_so(small_metadata, tmp_path):
    from transformers import AutoTokenizer

    assert from_gguf(small_metadata, "x").encode("the cat")[0] != 0
    tokenizer = from_gguf(small_metadata | {"tokenizer.ggml.add_bos_token": True}, "x")
    ids = tokenizer.encode("the cat")
    assert ids == [0, *tokenizer.encode("the cat", add_special_tokens=False)]
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"] == ids
    assert from_folder(tmp_path).encode("the cat") == ids


def test_a_chat_prompt_has_the_bos_of_its_template_and_no_other(small_metadata, tmp_path):
    said = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = from_gguf(small_metadata | said, "x")
    tokenizer.save(tmp_path)
    for each in (tokenizer, from_folder(tmp_path)):
        plain = each.encode("the cat", add_special_tokens=False)
        assert each.encode("the cat") == [0, *plain]
        messages = [{"role": "user", "content": "the cat"}]
        assert each.apply_chat_template(messages) == [0, *plain]
        assert each.apply_chat_template(messages, special_in_text=True) == [0, *plain]
        assert each.apply_chat_template(messages, chat_template="{{ messages[0].content }}") == plain


def test_gguf_default_bos_follows_the_split(small_metadata):
    assert from_gguf(small_metadata | {"tokenizer.ggml.pre": "llama-bpe"}, "x").encode("a")[0] == 0


@pytest.mark.parametrize("pre", [None, "default"])
def test_gguf_without_a_named_split_says_so(small_metadata, caplog, pre):
    with caplog.at_level(logging.WARNING, "mlxeff"):
        tokenizer = from_gguf(small_metadata | {"tokenizer.ggml.pre": pre}, "old.gguf")
    assert "old.gguf: names no word split" in caplog.text
    assert tokenizer.decode(tokenizer.encode("the cat, 12345!")) == "the cat, 12345!"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, r"x.gguf: tokenizer.ggml.model: wanted 'gpt2' or 'llama', got 'bert'"),
        ({"model": None}, r"tokenizer.ggml.model: wanted .* got None"),
        ({"pre": "martian"}, r"tokenizer.ggml.pre: wanted one of default, .* got 'martian'"),
        ({"tokens": None}, r"tokenizer.ggml.tokens: wanted a list of texts, got nothing"),
        ({"tokens": [1, 2]}, r"tokenizer.ggml.tokens: wanted a list of texts, got a list of 2, first 1"),
        ({"token_type": [1]}, r"tokenizer.ggml.token_type: wanted 280 numbers, one for each token, got a list of 1"),
        ({"merges": ["zz qq"]}, r"x.gguf: tokens and merges do not fit together"),
        ({"merges": ["nospace"]}, r"x.gguf: tokens and merges do not fit together"),
        ({"merges": None}, r"tokenizer.ggml.merges: wanted a list of texts, got nothing"),
        ({"eos_token_id": "two"}, r"tokenizer.ggml.eos_token_id: wanted a number, got str 'two'"),
        ({"eos_token_id": float("inf")}, r"tokenizer.ggml.eos_token_id: wanted a number, got float inf"),
        (
            {"token_type": [float("inf")] * 280},
            r"token_type: wanted numbers, got a list of 280, first inf",
        ),
        ({"tokens": ["a\ud800"] * 280}, r"tokenizer.ggml.tokens: wanted valid Unicode, got token 0: 'a\\ud800'"),
    ],
)
def test_gguf_errors_name_key_wanted_and_got(small_metadata, change, message):
    changed = small_metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(MlxeffError, match=message):
        from_gguf(changed, "x.gguf")


def test_gguf_ids_without_a_token_have_no_effect(small_metadata, caplog):
    tokenizer = from_gguf(small_metadata | {"tokenizer.ggml.eos_token_id": 280}, "x.gguf")
    assert caplog.messages == ["x.gguf: without effect: tokenizer.ggml.eos_token_id: wanted an id below 280, got 280"]
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids) == (None, {1})  # <|im_end|> is known by its name


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6, 0, -7, 99])
def test_gguf_end_tokens_are_llama_cpps_whatever_their_type(small_metadata, kind):
    """By name, by the file's keys, and the ends of what was to be filled in. The sets are those of llama.cpp's
    `special_eog_ids`."""
    names = ["<|eot_id|>", "<|eom_id|>", "</s>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>"]
    at = len(small_metadata["tokenizer.ggml.tokens"])
    more = {
        "tokenizer.ggml.tokens": [*small_metadata["tokenizer.ggml.tokens"], *names],
        "tokenizer.ggml.token_type": [*small_metadata["tokenizer.ggml.token_type"], *[kind] * len(names)],
    }
    tokenizer = from_gguf(small_metadata | more, "x.gguf")
    assert tokenizer.eos_token_ids == {1, *range(at, at + 6)}
    ids = tokenizer.encode("a<|eot_id|>b")
    assert ids.count(at) == 1, "an end token is a control token"
    assert (tokenizer.encode("<|im_start|>") == [at + 6]) is (kind in (2, 3, 4)), "others are what their type says"
    assert tokenizer.decode([*ids, at + 6], skip_special_tokens=True) == "ab" + "<|im_start|>" * (kind not in (2, 3))
    named = {f"tokenizer.ggml.{name}_token_id": 100 + i for i, name in enumerate(("eos", "eot", "eom", "fim_rep"))}
    tokenizer = from_gguf(small_metadata | more | named, "x.gguf")
    assert tokenizer.eos_token_ids == {1, at, at + 1, at + 2, at + 3, at + 5, 100, 101, 102, 103}


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|end|>", "<|return|>"], {0, 1, 2}),
        (["<|end|>", "<|return|>", "<|call|>"], {0, 2, 3}),
        (["<|end|>", "<|flush|>", "<|calls|>"], {0, 2, 3}),
        (["</s>", "<|tool_response>"], {0, 2}),
        (["<EOT>", "[e~[", "<｜end▁of▁sentence｜>"], {0, 1, 2, 3}),
    ],
)
def test_gguf_end_tokens_of_families_with_several(small_metadata, names, ends):
    at = len(small_metadata["tokenizer.ggml.tokens"])
    changed = small_metadata | {
        "tokenizer.ggml.tokens": [*small_metadata["tokenizer.ggml.tokens"], *names],
        "tokenizer.ggml.token_type": [*small_metadata["tokenizer.ggml.token_type"], *[3] * len(names)],
        "tokenizer.ggml.eos_token_id": at - 1,
    }
    assert from_gguf(changed, "x.gguf").eos_token_ids - {1} == {at - 1 + i for i in ends}


def test_gguf_keys_that_are_not_known_are_said_once(small_metadata, caplog):
    known = {"tokenizer.ggml.padding_token_id": 1, "tokenizer.ggml.fim_pre_token_id": 1, "tokenizer.chat_template": "x"}
    from_gguf(small_metadata | known | {"tokenizer.chat_template.tool_use": "y", "general.name": "z"}, "x.gguf")
    assert caplog.messages == []
    from_gguf(small_metadata | {"tokenizer.ggml.novel": 1, "tokenizer.ggml.suppress_tokens": [1]}, "x.gguf")
    want = "x.gguf: not known and not used: tokenizer.ggml.novel, tokenizer.ggml.suppress_tokens"
    assert caplog.messages == [want]


# --- SentencePiece --------------------------------------------------------------------------------------------------


def test_sentencepiece_ids_and_text_equal_the_library(llama2_folder, reference, prose):
    tokenizer = from_folder(llama2_folder)
    for line in prose[:3000] + random_lines(2000, seed=6):
        ids = tokenizer.encode(line)
        assert ids == [1, *reference.encode(line)], line
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids) == line, line


def test_sentencepiece_decode_of_any_ids_equals_the_library(llama2_folder, reference):
    tokenizer, chooser = from_folder(llama2_folder), random.Random(7)
    for _ in range(2000):
        ids = [chooser.randrange(1, 259) for _ in range(chooser.randint(0, 10))]  # control tokens and bytes
        ids += [chooser.randrange(1, tokenizer.vocab_size) for _ in range(chooser.randint(1, 12))]
        chooser.shuffle(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids), ids
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids), ids


@pytest.mark.parametrize(
    "options", [{}, {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}, {"model_type": "unigram"},
                {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}])  # fmt: skip
def test_sentencepiece_settings_are_kept(tmp_path, prose, options):
    import sentencepiece

    proto = train_sentencepiece(prose[:2000], **options)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    reference, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto), from_folder(tmp_path)
    for line in [*prose[:200], *random_lines(300, seed=8), "  two  spaces ", " a"]:
        ids = reference.encode(line)
        assert tokenizer.encode(line, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_sentencepiece_special_tokens_in_text_become_ids(llama2_folder):
    tokenizer = from_folder(llama2_folder)
    ids = tokenizer.encode("<s>the</s>\nthe", add_special_tokens=False)
    assert (ids[0], ids.count(2)) == (1, 1)
    assert tokenizer.decode(ids) == "<s>the</s>\nthe"


def test_sentencepiece_saved_gives_the_same_ids_in_transformers(llama2_folder, tmp_path, prose):
    """Except for texts that start with a space: there transformers 5 leaves out SentencePiece's prefix space."""
    from transformers import AutoTokenizer

    tokenizer = from_folder(llama2_folder, "openelm", instruct=True)
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    (saved / "config.json").write_text('{"model_type": "openelm"}')
    theirs, again = AutoTokenizer.from_pretrained(saved), from_folder(saved)
    lines = prose[:500] + random_lines(500, seed=9, alphabet=[*ALPHABET, "</s>", "<s>"])
    for line in (line for line in lines if not line.startswith((" ", "<s>"))):
        assert tokenizer.encode(line) == again.encode(line) == theirs(line)["input_ids"], line
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == text


def test_gguf_sentencepiece_equals_the_original(spm_metadata, reference, prose):
    tokenizer = from_gguf(spm_metadata, "llama.gguf")
    for line in prose[:1000] + random_lines(1000, seed=10):
        assert tokenizer.encode(line) == [1, *reference.encode(line)], line


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece_saved_equals_transformers(spm_metadata, tmp_path, prose, prefix):
    from transformers import AutoTokenizer

    tokenizer = from_gguf(spm_metadata | {"tokenizer.ggml.add_space_prefix": prefix}, "llama.gguf")
    tokenizer.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), from_folder(tmp_path)
    for line in [*prose[:500], *random_lines(500, seed=11), "a</s>b<s>c"]:
        if not (prefix and line.startswith(" ")):
            assert tokenizer.encode(line) == again.encode(line) == theirs(line)["input_ids"], line


def test_gguf_sentencepiece_adds_a_space_after_every_special_token(spm_metadata):
    tokenizer = from_gguf(spm_metadata, "llama.gguf")
    assert tokenizer.decode(tokenizer.encode("the</s>the", add_special_tokens=False)) == "the</s> the"


@pytest.mark.parametrize("kind", [3, 4])
def test_gguf_sentencepiece_chat_tokens_of_any_type(spm_metadata, tmp_path, kind, prose):
    """As in llama.cpp a control or user-defined token stays whole wherever it stands, and the text after it begins with
    the vocabulary's space. A converted folder gives the same ids, in transformers too."""
    from transformers import AutoTokenizer

    names = ["<|im_start|>", "<|im_end|>"]
    size = len(spm_metadata["tokenizer.ggml.tokens"])
    more = {"tokens": names, "scores": [0.0, 0.0], "token_type": [kind, 1]}
    changed = spm_metadata | {f"tokenizer.ggml.{k}": spm_metadata[f"tokenizer.ggml.{k}"] + v for k, v in more.items()}
    del changed["tokenizer.ggml.eos_token_id"]  # that of Llama 2, then
    tokenizer, plain = from_gguf(changed, "x.gguf"), from_gguf(spm_metadata, "x.gguf")
    assert tokenizer.eos_token_ids == {2, size + 1}
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again, theirs = from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for line in prose[:100]:
        text = f"<|im_start|>{line}<|im_end|>\n"
        want = [1, size, *plain.encode(line)[1:], size + 1, *plain.encode("\n")[1:]]
        assert tokenizer.encode(text) == again.encode(text) == want, line
        if not line.startswith(" "):
            assert theirs(text)["input_ids"] == want, line
    shown = tokenizer.decode(tokenizer.encode("<|im_start|>the<|im_end|>"), skip_special_tokens=True)
    assert shown.strip() == ("the" if kind == 3 else "<|im_start|> the")


def test_gguf_sentencepiece_without_scores(spm_metadata):
    del spm_metadata["tokenizer.ggml.scores"]
    with pytest.raises(MlxeffError, match=r"llama.gguf: tokenizer.ggml.scores: wanted a number for each token"):
        from_gguf(spm_metadata, "llama.gguf")


# --- folders --------------------------------------------------------------------------------------------------------


def test_openelm_forces_bos_and_has_the_recipes_template(llama2_folder):
    (llama2_folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert from_folder(llama2_folder).encode("the")[0] != 1
    tokenizer = from_folder(llama2_folder, "openelm", instruct=True)
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("<s>the").count(1) == 1
    assert tokenizer.chat_template == OPENELM_INSTRUCT_TEMPLATE
    want = "<|system|>\nBe brief.</s>\n<|user|>\nHi 🤖</s>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == want
    ids = tokenizer.apply_chat_template(CHAT)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 2)
    assert tokenizer.decode(ids[1:]) == want


def test_openelm_instruct_is_known_by_the_folders_name(tmp_path, proto):
    for name, expected in (("OpenELM-270M-Instruct", True), ("OpenELM-270M", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(proto)
        (folder / "config.json").write_text('{"model_type": "openelm"}')
        assert from_folder(folder).has_chat_template is expected


def test_openelm_roles(llama2_folder):
    tokenizer = from_folder(llama2_folder, "openelm", instruct=True)
    with pytest.raises(MlxeffError, match="OpenELM knows the roles user, system and assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(("model_type", "hint"), [(None, False), ("openelm", True)])
def test_missing_tokenizer(tmp_path, model_type, hint):
    with pytest.raises(MlxeffError, match=r"no tokenizer found; looked for tokenizer\.json and tok") as error:
        from_folder(tmp_path, model_type)
    assert str(tmp_path) in str(error.value)
    assert ("Llama 2" in str(error.value)) is hint


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', "tokenizer.json: wanted a tokenizer, got a file that does not parse"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: wanted a tokenizer, got a file that does not parse"),
        ("tokenizer.model", b"", "tokenizer.model: wanted a SentencePiece model, got 0 bytes that are none"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tokenizer.model: wanted a SentencePiece model, got 14 bytes"),
    ],
)
def test_damaged_files_give_one_line(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(MlxeffError, match=message) as error:
        from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_mutated_tokenizers_give_only_our_error(tmp_path, proto, small_metadata):
    from_gguf(small_metadata, "x").save(tmp_path)
    good_json, chooser = (tmp_path / "tokenizer.json").read_bytes(), random.Random(12)
    (tmp_path / "tokenizer_config.json").unlink()
    refused = 0
    for name, good in (("tokenizer.json", good_json), ("tokenizer.model", proto)):
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
        for _ in range(150):
            data = bytearray(good[: chooser.choice([len(good), chooser.randrange(len(good))])])
            for _ in range(chooser.randint(1, 4)):
                data[chooser.randrange(len(data))] = chooser.randrange(256)
            (tmp_path / name).write_bytes(data)
            refused += complaint_of(tmp_path) is not None
    assert refused > 100


def complaint_of(folder):
    """The one line with which a folder is refused; None when it is not."""
    try:
        from_folder(folder).encode("the cat")
    except MlxeffError as error:
        complaint = str(error)
    else:
        return None
    assert "\n" not in complaint
    assert len(complaint) <= 300
    return complaint


def test_pieces_that_are_not_utf_8_give_one_line(tmp_path, proto):
    at = proto.index("▁the".encode())
    (tmp_path / "tokenizer.model").write_bytes(proto[:at] + b"\xff\xfe" + proto[at + 2 :])
    assert re.search(r"tokenizer.model: piece \d+: wanted UTF-8, got other bytes", complaint_of(tmp_path))


def test_a_post_processor_without_its_token_gives_one_line(json_folder):
    """The library would panic, which is no `Exception`."""
    path = json_folder / "tokenizer.json"
    steps = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}
    for processor in (steps, {"type": "Sequence", "processors": [steps]}):
        spec = json.loads(path.read_text()) | {"post_processor": json.loads(json.dumps(processor))}
        for step in spec["post_processor"].get("processors", [spec["post_processor"]]):
            step["special_tokens"] = {}
            step["single"].append({"Sequence": {"id": "A", "type_id": 0}})
        path.write_text(json.dumps(spec))
        assert "post_processor: wanted the id of its token '<s>', got none" in complaint_of(json_folder)


def test_a_panic_of_the_library_is_our_error(json_folder, monkeypatch):
    class PanicException(BaseException):
        pass

    tokenizer = from_folder(json_folder)
    monkeypatch.setattr(tokenizer._backend, "encode", lambda *_: (_ for _ in ()).throw(PanicException("no\nentry")))
    with pytest.raises(MlxeffError, match=r": PanicException: no entry$"):
        tokenizer.encode("a")


def test_get_vocab(json_folder):
    tokenizer = from_folder(json_folder)
    vocabulary = tokenizer.get_vocab()
    assert vocabulary == tokenizer._backend.tokenizer.get_vocab(with_added_tokens=True)
    assert all(tokenizer.token_to_id(spelling) == token for spelling, token in vocabulary.items())


def test_messages_are_short(tmp_path, json_folder):
    write_config(json_folder, chat_template="{{ raise_exception('x\ny' * 9999) }}")
    with pytest.raises(MlxeffError, match=r"^/.*: chat template: x yx y.*…") as error:
        from_folder(json_folder).apply_chat_template(CHAT)
    assert len(str(error.value)) <= 300


def test_config_files_that_are_no_json_objects(llama2_folder):
    (llama2_folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(MlxeffError, match=r"tokenizer_config\.json: wanted a JSON object, got list"):
        from_folder(llama2_folder)
    (llama2_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(MlxeffError, match=r"tokenizer_config\.json: wanted JSON"):
        from_folder(llama2_folder)


def test_a_named_token_outside_the_vocabulary(llama2_folder, caplog):
    (llama2_folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    tokenizer = from_folder(llama2_folder)
    assert caplog.messages == [f"{llama2_folder}: without effect: not in the vocabulary: eos_token '<none>'"]
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids, tokenizer.bos_token_id) == (None, set(), 1)


def test_eos_ids_of_all_files_join_the_tokenizers_own(json_folder, caplog):
    caplog.set_level(logging.INFO, "mlxeff")
    (json_folder / "config.json").write_text('{"eos_token_id": 1}')
    (json_folder / "generation_config.json").write_text('{"eos_token_id": [1]}')
    assert from_folder(json_folder).eos_token_ids == {1}
    assert caplog.messages == []
    (json_folder / "config.json").write_text('{"eos_token_id": 7}')
    (json_folder / "generation_config.json").unlink()
    assert from_folder(json_folder).eos_token_ids == {1, 7}
    caplog.clear()
    (json_folder / "generation_config.json").write_text('{"eos_token_id": [8, 9, -1, "x", true]}')
    assert from_folder(json_folder).eos_token_ids == {1, 7, 8, 9}
    texts = "tokenizer 1 '<|im_end|>'; config.json 7 '&'; generation_config.json 8 \"'\", 9 '('"
    assert caplog.messages == [f"{json_folder}: end tokens differ, each ends an answer: {texts}"]
    (json_folder / "config.json").write_text('{"text_config": {"eos_token_id": [5]}}')
    assert from_folder(json_folder).eos_token_ids == {1, 5, 8, 9}
    (json_folder / "generation_config.json").write_text('{"eos_token_id": ')
    assert from_folder(json_folder).eos_token_ids == {1, 5}, "as in mlx-lm, a damaged file counts as none"
    assert "generation_config.json: wanted JSON" in caplog.messages[-2]
    tokenizer = from_folder(json_folder, eos_token_ids=5)
    assert tokenizer.eos_token_ids == {1, 5}
    tokenizer.add_eos_token("<s>")
    tokenizer.add_eos_token(6)
    assert tokenizer.eos_token_ids == {0, 1, 5, 6}
    tokenizer.eos_token_ids = [3]
    assert tokenizer.eos_token_ids == {3}
    with pytest.raises(MlxeffError, match=r"end token '<none>' is not among the 280 tokens"):
        tokenizer.add_eos_token("<none>")


def test_tokenizer_json_decides_on_bos_whatever_the_config_says(json_folder):
    from transformers import AutoTokenizer

    write_config(json_folder, add_bos_token=True)
    ids = from_folder(json_folder).encode("the cat")
    assert ids[0] != 0
    assert AutoTokenizer.from_pretrained(json_folder)("the cat")["input_ids"] == ids


def test_added_tokens_of_the_config_are_added(json_folder):
    from transformers import AutoTokenizer

    entry = {"content": "<|new|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    write_config(json_folder, added_tokens_decoder={"280": entry | {"single_word": False}})
    tokenizer = from_folder(json_folder)
    ids = tokenizer.encode("the<|new|>cat")
    assert (tokenizer.vocab_size, ids.count(280)) == (281, 1)
    assert AutoTokenizer.from_pretrained(json_folder)("the<|new|>cat")["input_ids"] == ids
    assert tokenizer.decode(ids) == "the<|new|>cat"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "thecat"


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_stale_ids_of_added_tokens_have_no_effect(json_folder, caplog, place):
    """tokenizer.json decides; a token that it lacks comes after its last one. So do transformers' ids."""
    from transformers import AutoTokenizer

    stale = {"<|im_end|>": 300, "<|new|>": 305, "<s>": 0}
    if place == "added_tokens.json":
        (json_folder / place).write_text(json.dumps(stale))
    else:
        entries = {str(token): {"content": text, "special": True} for text, token in stale.items()}
        write_config(json_folder, added_tokens_decoder=entries)
    tokenizer = from_folder(json_folder)
    ids = tokenizer.encode("<|im_end|><|new|>")
    assert ids == AutoTokenizer.from_pretrained(json_folder)("<|im_end|><|new|>")["input_ids"] == [1, 280]
    names = "'<|im_end|>' 300, '<|new|>' 305"
    want = f"{json_folder}: without effect: ids of added tokens that are others in the vocabulary: {names}"
    assert caplog.messages == [want]


def test_stale_added_tokens_beside_a_sentencepiece_model(llama2_folder, caplog, reference):
    size = reference.get_piece_size()
    stale = {"</s>": size + 1, "<|new|>": size, "<|old|>": 7}
    (llama2_folder / "added_tokens.json").write_text(json.dumps(stale))
    tokenizer = from_folder(llama2_folder)
    assert tokenizer.encode("</s><|new|>", add_special_tokens=False) == [2, size]
    assert tokenizer.vocab_size == size + 1
    names = f"'<|old|>' 7, '</s>' {size + 1}"
    want = f"{llama2_folder}: without effect: ids of added tokens that are others in the vocabulary: {names}"
    assert caplog.messages == [want]


def test_truncation_and_padding_stored_in_tokenizer_json_are_off(json_folder):
    path = json_folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(spec))
    assert len(from_folder(json_folder).encode("the cat sat on the mat")) > 2


def test_chat_template_places(json_folder):
    assert not from_folder(json_folder).has_chat_template
    named = {"default": "D", "tool_use": "T"}
    write_config(json_folder, chat_template=[{"name": name, "template": text} for name, text in named.items()])
    tokenizer = from_folder(json_folder)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "D"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, tools=[{"name": "f"}]) == "T"
    (json_folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert from_folder(json_folder).chat_template == "J"
    (json_folder / "chat_template.jinja").write_text("F")
    assert from_folder(json_folder).chat_template == "F"
    tokenizer = from_folder(json_folder)
    tokenizer.save(json_folder / "copy")
    again = from_folder(json_folder / "copy")
    assert again.apply_chat_template(CHAT, tokenize=False, tools=[{}]) == "T"
    assert again.chat_template == "F"


TEMPLATE_FEATURES = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{% for message in messages %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {% generation %}{{ bos_token }}[{{ message.role }}] {{ message['content'] | trim }}{% endgeneration %}

{% endfor %}
{{ extra }}{% if add_generation_prompt %}>{% endif %}
"""


def test_template_features_equal_transformers(json_folder):
    from transformers import AutoTokenizer

    write_config(json_folder, chat_template=TEMPLATE_FEATURES)
    theirs, ours = AutoTokenizer.from_pretrained(json_folder), from_folder(json_folder)
    messages = [{"role": "user", "content": " é <b> "}, {"role": "stop"}, {"role": "user", "content": "not this"}]
    for tools in (None, [{"type": "function", "function": {"name": "f", "description": "é < 'x'"}}]):
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt, "tools": tools, "extra": "E"}
            assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; give the prompt as plain text"),
        ("{{ raise_exception('no\nsuch role') }}", "chat template: no such role"),
        ("{% if %}", "chat template: line 1:"),
        ("{{ messages[7].content.upper() }}", "chat template failed"),
        ("{{ messages.__class__.__mro__ }}", "chat template failed: .*unsafe"),
        ("{{ messages.append(1) }}", "chat template failed: .*unsafe"),
        ("{{ 1 // 0 }}", "chat template failed"),
    ],
)
def test_template_errors_are_one_line(json_folder, template, message):
    tokenizer = from_folder(json_folder)
    tokenizer.chat_template = template
    with pytest.raises(MlxeffError, match=message) as error:
        tokenizer.apply_chat_template(CHAT)
    assert "\n" not in str(error.value)


# --- other decoders and edges ---------------------------------------------------------------------------------------


def library_tokenizer(decoder, vocabulary, path):
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    library.decoder = decoder
    library.save(str(path / "tokenizer.json"))
    return library


def test_llama_style_json_decoder_streams_like_tokenizers(tmp_path):
    from tokenizers import decoders

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    vocabulary = ["<unk>", "▁the", "▁", "cat", "é", "<0xF0>", "<0x9F>", "<0xA4>", "<0x96>", "<0x20>", "▁▁x"]
    library = library_tokenizer(decoders.Sequence(steps), vocabulary, tmp_path)
    tokenizer = from_folder(tmp_path)
    for ids in ([1, 1, 3], [2, 1], [3, 5, 6, 7, 8, 4], [10, 2, 3], [9, 3], [5, 3], [5, 6, 7, 1]):
        assert tokenizer.decode(ids) == library.decode(ids)
        assert "".join(stream(tokenizer, ids)) == library.decode(ids)
    assert stream(tokenizer, [5, 6, 7, 8, 3]) == ["", "", "", "🤖", "cat", ""]


def test_decoders_that_are_not_bytes_are_left_to_the_library(tmp_path):
    from tokenizers import decoders

    library = library_tokenizer(decoders.WordPiece(), ["[UNK]", "play", "##ing", "the", "!"], tmp_path)
    tokenizer = from_folder(tmp_path)
    for ids in ([1, 2, 3], [3, 1, 2, 4], [], [4]):
        assert tokenizer.decode(ids) == library.decode(ids) == "".join(stream(tokenizer, ids))


def test_ids_beyond_the_vocabulary_give_nothing_and_negative_ones_an_error(json_folder, llama2_folder):
    for tokenizer in (from_folder(json_folder), from_folder(llama2_folder)):
        assert tokenizer.decode([10**6]) == ""
        with pytest.raises(MlxeffError, match="wanted token ids from 0 to"):
            tokenizer.decode([-1])


def test_lone_surrogates_are_refused(smollm2):
    with pytest.raises(MlxeffError, match=r"text: not valid Unicode at character 1"):
        smollm2.encode("a\ud800b")


def test_save_into_a_place_that_cannot_be_written(small_metadata, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(MlxeffError, match="the tokenizer could not be written"):
        from_gguf(small_metadata, "x").save(blocker / "folder")


def test_a_failed_save_leaves_nothing(small_metadata, tmp_path, monkeypatch):
    tokenizer = from_gguf(small_metadata, "x")
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(MlxeffError, match="could not be written: No space left"):
        tokenizer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
