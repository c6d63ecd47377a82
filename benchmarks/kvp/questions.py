"""Two small extractive question sets, made from the validation text. In `exact` the prompt holds definitions with their
terms and asks for the term of one definition. In `numbers` it holds a list of terms with four digits each and asks for
the digits of one term. The prompt contains the answer, so the sets test retrieval and not knowledge.

    python -m kvp.questions        # in benchmarks/: writes data/jargon-questions.json and data/demo-prompt.txt again,
                                   # always the same
"""

import json
import random
import re

from mlxeff.decode import Setup
from mlxeff.generation import stream_generate
from mlxeff.tokenizer import Tokenizer
from places import DATA, TEXT

QUESTIONS = DATA / "jargon-questions.json"
DEMO, DEMO_ENTRIES = DATA / "demo-prompt.txt", 60  # of `make demo-kvp`
ENTRY = re.compile(r"^:([A-Za-z][A-Za-z -]{2,24}): (?:/[^\n]*/, )?[a-z.,/ ]+\n\n([^\n]+)", re.MULTILINE)
WORDS = range(6, 31)  # of a definition
ENTRIES, COUNT, SEED = 12, 48, 0  # entries of a glossary, questions, of their choice
DIGITS = range(1000, 10000)
MAX_TOKENS, STOP = 16, ["\n"]


def entries(text: str) -> list[tuple[str, str]]:
    """(term, first sentence of its definition) of the entries that are short and do not contain their own term."""
    found = []
    for term, paragraph in ENTRY.findall(text):
        plain = re.sub(r"^(?:\[[^\]]*\]|\d\.|\s)+", "", paragraph)
        sentence = re.match(r"[^.!?]+[.!?]", re.sub(r"[{}]", "", plain))
        definition = sentence[0].strip() if sentence else ""
        named = any(part in definition.lower() for part in term.lower().split())
        if len(definition.split()) in WORDS and definition[0].isupper() and not named and ":" not in definition:
            found.append((term, definition))
    return found


def make(text: str) -> list[dict]:
    """COUNT items: passage, question (a definition), answer (its term) and the span of the answer in the passage."""
    usable, chooser = entries(text), random.Random(SEED)
    return [_item(chooser.sample(usable, ENTRIES), chooser.randrange(ENTRIES)) for _ in range(COUNT)]


def _item(glossary: list[tuple[str, str]], asked: int) -> dict:
    blocks = [f"{question(definition)} {term}" for term, definition in glossary]
    term, definition = glossary[asked]
    end = len("\n\n".join(blocks[: asked + 1]))
    return {
        "passage": "\n\n".join(blocks),
        "question": definition,
        "answer": term,
        "span": [end - len(term), end],
    }


def numbers(text: str) -> list[tuple[str, str]]:
    """COUNT prompts and their answers."""
    terms, chooser = [term for term, _ in entries(text)], random.Random(SEED)
    return [_lookup(chooser, chooser.sample(terms, ENTRIES)) for _ in range(COUNT)]


def _lookup(chooser: random.Random, terms: list[str]) -> tuple[str, str]:
    found = {term: str(chooser.choice(DIGITS)) for term in terms}
    asked = chooser.choice(terms)
    return "\n".join(f"{term}: {digits}" for term, digits in found.items()) + f"\n{asked}:", found[asked]


def sets() -> dict[str, list[tuple[str, str]]]:
    """The question sets by name, each a list of prompts and answers."""
    of_terms = [(prompt(item), item["answer"]) for item in read()]
    return {"exact": of_terms, "numbers": numbers(TEXT.read_text(encoding="utf-8"))}


def demo(text: str) -> dict:
    """One item with a long passage."""
    chooser = random.Random(SEED)
    return _item(chooser.sample(entries(text), DEMO_ENTRIES), DEMO_ENTRIES // 3)


def question(definition: str) -> str:
    return f"Definition: {definition}\nTerm:"


def prompt(item: dict) -> str:
    """The text that a model continues with the answer."""
    return f"Hacker slang.\n\n{item['passage']}\n\n{question(item['question'])}"


def answer(setup: Setup, tokenizer: Tokenizer, ids: list[int]) -> str:
    """The model's greedy answer up to the end of the line."""
    how = {"reading": setup.reading, "options": setup.options, "stop": STOP, "prefill_step_size": 512}
    stream = stream_generate(setup.model, tokenizer, ids, max_tokens=MAX_TOKENS, **how)
    return "".join(response.text for response in stream)


def exact(said: str, answer: str) -> bool:
    """True if the texts are equal except for case, punctuation and spaces."""
    return _normal(said) == _normal(answer)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def read() -> list[dict]:
    return json.loads(QUESTIONS.read_text(encoding="utf-8"))["questions"]


if __name__ == "__main__":
    text = TEXT.read_text(encoding="utf-8")
    made = {"source": TEXT.name, "questions": make(text)}
    QUESTIONS.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    DEMO.write_text(prompt(demo(text)), encoding="utf-8")
    print(f"{QUESTIONS}: {len(made['questions'])} questions; {DEMO}")
