"""Texts and small vocabularies for tests of tokenizers. The fixtures made of them stand in conftest.py."""

import io
import json
import random

ALPHABET = [
    *"abcXYZ 0123456789.,!?'\n\t_-()[]{}<>/|\"\\", "  ", "\r\n", "é", "ß", "中", "文", "日本", "한", "🤖", "👩‍🚀",
    "e\u0301", "\u00a0", "\u3000", "٣", "Ⅷ", "½", "ﬁ", "\u200b", "I'll", "don't", "DON'T", " 12", "ñ", "Ω", "ш",
    "\x00", "\x7f", "\ufeff",
]  # fmt: skip
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🤖"}]


def random_lines(count, seed=0, alphabet=ALPHABET):
    chooser = random.Random(seed)
    return ["".join(chooser.choice(alphabet) for _ in range(chooser.randint(0, 50))) for _ in range(count)]


def train_sentencepiece(lines, **options):
    import sentencepiece

    model = io.BytesIO()
    usual = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=1000, **usual | options
    )
    return model.getvalue()


def piece_type(model, token):
    kinds = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    return next((kind for kind, holds in kinds.items() if holds(token)), 1)


def write_config(folder, **entries):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
