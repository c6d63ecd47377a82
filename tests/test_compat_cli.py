"""Cases of the compatibility test bed through the command itself: `generate`, `chat` and `convert` as processes, on one
case of each container and a GGUF file with a SentencePiece tokenizer. Some 12 s.
"""

import json

import pytest

from compat import bed, cases
from compat.families import FAMILIES
from test_cli import mlxeff

SYSTEM, USER = (message["content"] for message in bed.MESSAGES)


def chosen() -> list[cases.Case]:
    """The first case of each whose files have a chat template."""
    found = {}
    for case in cases.covering():
        if case.template != "none":
            found.setdefault((case.container, (case.container, case.tokenizer) == ("gguf", "spm")), case)
    return list(found.values())


@pytest.fixture(scope="module", params=chosen(), ids=str)
def prepared(request, tmp_path_factory):
    return bed.prepare(tmp_path_factory.mktemp("case") / "files", request.param)


def generated(path) -> dict:
    return json.loads(mlxeff("generate", "--model", path, "--system", SYSTEM, USER, "--json")[0])


def test_generate(prepared):
    found = generated(prepared.path)
    assert found["prompt_token_ids"] == prepared.chats[0][2]
    assert (found["token_ids"], found["text"], found["finish_reason"]) == (prepared.answer, prepared.text, "stop")


def test_chat(prepared):
    lines = f"{USER}\n{bed.AGAIN}\n".encode()
    out, _ = mlxeff("chat", "--model", prepared.path, "--system", SYSTEM, stdin=lines)
    assert out == f"{prepared.text}\n" * 2


def test_convert(prepared, tmp_path):
    target = tmp_path / "converted"
    own = FAMILIES[prepared.case.family].own
    mlxeff("convert", prepared.path, target, code=0 if own else 1)
    assert target.exists() == own
    if own:
        found = generated(target)
        assert (found["token_ids"], found["text"], found["finish_reason"]) == (prepared.answer, prepared.text, "stop")
        assert found["prompt_token_ids"] == prepared.converted[0]
