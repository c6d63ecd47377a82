"""The text that pairs are trained on. It consists of three equal parts: text that the base model generates, the
converter's calibration text, and glossaries made of entries of the calibration text with questions in the form of
`questions`, where MARK precedes each answer. None of it occurs in the texts on which quality is measured.

    python -m kvp.training_text FILE [--tokens N]       # in benchmarks/; the same tokens always give the same file
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import saving
from mlxeff import hub
from mlxeff.assembly.model import Loaded, load_path
from mlxeff.calibration import TEXT as CALIBRATION
from mlxeff.kvprediction.text import sample

from .questions import entries, question

TOKENS, LENGTH, SEED = 98304, 512, 1  # of the whole; of a piece that the base writes; of its choices
ENTRIES, ASKED = 8, 6  # of a glossary
MARK = "<|prompt ends|>"


def glossaries(found: list[tuple[str, str]], seed: int) -> Iterator[str]:
    """Yield glossaries without end, each with some of the entries (term, definition) and questions for most of them."""
    chooser = random.Random(seed)
    while True:
        chosen = chooser.sample(found, ENTRIES)
        told = [f"{question(definition)} {term}" for term, definition in chosen]
        asked = [f"{question(definition)}{MARK} {term}" for term, definition in chooser.sample(chosen, ASKED)]
        yield "\n\n".join([*told, *asked, ""])


def write(base: Loaded, path: Path, tokens: int) -> None:
    """Write a text of at least `tokens` tokens."""
    encode, decode = base.tokenizer.encode, base.tokenizer.decode
    third, calibration = -(-tokens // 3), CALIBRATION.read_text(encoding="utf-8")
    drawn = sample(base.model, base.tokenizer.bos_token_id, third, LENGTH, SEED)
    own = "\n\n".join(decode(piece[1:]) for piece in drawn)
    read = decode(encode(calibration, add_special_tokens=False)[:third])
    parts, count = [], 0
    left = tokens - sum(len(encode(text, add_special_tokens=False)) for text in (own, read))
    for glossary in glossaries(entries(calibration), SEED):
        if count >= left:
            break
        parts.append(glossary)
        count += len(encode(glossary.replace(MARK, ""), add_special_tokens=False))
    saving.write_text("\n\n".join([own, read, "".join(parts)]), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    write(load_path(hub.resolve(options.model)), options.file, options.tokens)


if __name__ == "__main__":
    main()
