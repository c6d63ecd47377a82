"""A case → its files, its prompts, and what the right ids, the right text and the right end are."""

import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from . import folders, gguf_files, vocabularies
from .cases import GGUF_ROPES, Case
from .families import FAMILIES, config_of, weights_of

PROMPT = "Say 1234, don't 🤖 ü."
ANSWER = "The fox: é🤖!"  # no byte occurs twice
MESSAGES = [{"role": "system", "content": "Short."}, {"role": "user", "content": PROMPT}]
AGAIN = "More."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + 'END' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RECORDS = Path(__file__).with_name("llama_cpp.json")  # what llama.cpp made of the GGUF files


@dataclass(frozen=True)
class Prepared:
    """The files of a case, and what is right.

    path        the folder or GGUF file
    twin        a folder with the same weights in one safetensors file, that stock mlx-lm computes
    answer      ids of the answer, the end token the last of them; `text` without the end token
    chats       (messages, text of the prompt, its ids) of a first and a second turn
    converted   ids of these prompts in a converted folder
    """

    case: Case
    path: Path
    twin: Path
    vocabulary: vocabularies.Vocabulary
    prompt_ids: list[int]
    answer: list[int]
    text: str
    chats: list[tuple[list[dict], str, list[int]]]
    converted: list[list[int]]


def prepare(folder: Path, case: Case) -> Prepared:
    """Write the files of a case into a new folder."""
    family, gguf = FAMILIES[case.family], case.container == "gguf"
    end = "<|im_end|>" if case.end == "name" else "<|stop|>"  # llama.cpp knows the former
    special = case.end in ("name", "tokenizer config", "special tokens map")
    # llama.cpp puts SentencePiece's space after every control token.
    rest = {"legacy": gguf, "adds_bos": {"added": True, "not added": False}.get(case.bos)}
    vocabulary = vocabularies.make(case.tokenizer, case.control, end, special, **rest)
    template = TEMPLATE.replace("END", end)
    prompt_ids = vocabulary.encode(PROMPT, add_bos=True)
    answer = list(dict.fromkeys(vocabulary.encode(ANSWER)))
    text = vocabulary.decode(answer)
    chats = []
    more = [{"role": "assistant", "content": text}, {"role": "user", "content": AGAIN}]
    for messages in (MESSAGES, MESSAGES + more):
        rendered = render(template, messages, vocabulary.bos)
        chats.append((messages, rendered, vocabulary.encode(rendered)))
    answer.append(vocabulary.id(end))
    starts = {prompt_ids[-1], *(ids[-1] for _, _, ids in chats), answer[-1]}
    follows = _successors(answer, starts, len(vocabulary.tokens))
    config = config_of(family, GGUF_ROPES.get(case.rope, case.rope), case.head == "tied", len(vocabulary.tokens))
    weights = weights_of(family, config, follows, seed=1)
    path, twin = folder / "model", folder / "twin"
    if gguf:
        folder.mkdir(parents=True)
        file = folder / "model.gguf"
        path, weights = gguf_files.write(file, family.gguf, case, config, weights, vocabulary, template)
        _write_twin(twin, config, weights)
    else:
        folders.write(path, case, config, weights, vocabulary, template)
        if case.container == "torch" or case.config == "transformers 5":
            _write_twin(twin, config, weights, case.weights)
        else:
            twin = path
    # The EOS of a folder is a control token in any case.
    folders_own = vocabularies.make(case.tokenizer, case.control, end, special or case.end == "eos key", **rest)
    converted = [folders_own.encode(rendered) for _, rendered, _ in chats]
    return Prepared(case, path, twin, vocabulary, prompt_ids, answer, text, chats, converted)


def render(template: str, messages: list[dict], bos: str) -> str:
    """The prompt's text, by Jinja alone."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, bos_token=bos, add_generation_prompt=True)


def digest(path: Path) -> str:
    """A hash of a GGUF file and its other parts."""
    parts = sorted(path.parent.glob("*.gguf"))
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]


def write_records(records: dict) -> None:
    """Write llama.cpp's results, a line a case."""
    head = "".join(f'"{key}": {json.dumps(value)},\n' for key, value in records.items() if key != "cases")
    lines = ",\n".join(f" {json.dumps(case)}: {json.dumps(found)}" for case, found in records["cases"].items())
    RECORDS.write_text(f'{{\n{head}"cases": {{\n{lines}\n}}\n}}\n')


def _successors(answer: list[int], starts: set[int], count: int) -> dict[int, int]:
    """Token → the token after it: the answer's one after another, its first after `starts`, which has the end token;
    what is never reached, at random."""
    clash = starts & set(answer[:-1])
    assert not clash, f"tokens {clash} end a prompt and stand in the answer"
    follows = dict(itertools.pairwise(answer)) | dict.fromkeys(starts, answer[0])
    rest = [token for token in range(count) if token not in follows]
    after = [token for token in range(count) if token not in answer][: len(rest)]
    random.Random(0).shuffle(after)
    return follows | dict(zip(rest, after))


def _write_twin(folder: Path, config: dict, weights: dict[str, np.ndarray], dtype: str = "float32") -> None:
    import mlx.core as mx

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: mx.array(value).astype(folders.DTYPES[dtype]) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
