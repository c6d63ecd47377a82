"""What the options of `generate` and `chat` do to an answer, and which number is which in the statistics.

In this process, on a tiny model: 2 s.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlxeff import cli, generation, load
from mlxeff.cli import models
from mlxeff.cli.chat import Chat
from mlxeff.sampling import make_logits_processors, make_sampler

SYSTEM = {"role": "system", "content": "Be brief."}
TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def run(tiny_folder, capsys):
    def generate(*options):
        """(exit code, what it printed, its messages)"""
        command = ["generate", "Hello", "--model", tiny_folder, *options]
        return cli.main([str(part) for part in command]), *capsys.readouterr()

    return generate


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of `stream_generate`, which runs."""
    found, real = [], generation.stream_generate

    def stream_generate(model, tokenizer, prompt, **more):
        found.append(more)
        return real(model, tokenizer, prompt, **more)

    monkeypatch.setattr(generation, "stream_generate", stream_generate)
    return found


def test_every_option_reaches_the_generation_under_its_own_name(run, calls):
    run(
        *("--temp", 0.7, "--top-p", 0.9, "--min-p", 0.05, "--top-k", 7, "--repetition-penalty", 1.3),
        *("--prefill-step", 5, "--max-tokens", 3, "--context-limit", 60, "--stop", "zq", "--seed", 3),
    )
    [given] = calls
    assert given["sampler"] == make_sampler(0.7, 0.9, 0.05, top_k=7)
    wanted = {"prefill_step_size": 5, "max_tokens": 3, "context_limit": 60, "stop": ["zq"]}
    assert {name: given[name] for name in wanted} == wanted
    tokens, logits = mx.array([3, 4]), mx.random.normal((1, 8))
    [got], [want] = given["logits_processors"], make_logits_processors(repetition_penalty=1.3)
    assert mx.array_equal(got(tokens, logits), want(tokens, logits))


def test_options_that_are_not_given_change_nothing(run, calls):
    run("--max-tokens", 1)
    [given] = calls
    assert given["sampler"] == make_sampler()
    assert given["logits_processors"] == []
    assert (given["prefill_step_size"], given["context_limit"], list(given["stop"])) == (None, None, [])


def test_a_repetition_penalty_changes_the_words(run):
    plain, penalised = (json.loads(run("--json", *more)[1])["token_ids"] for more in ([], ["--repetition-penalty", 5]))
    assert len(set(penalised)) > len(set(plain))


def test_every_number_of_the_statistics_is_the_one_it_says(run, monkeypatch):
    real, known = generation.stream_generate, {"ttft": 33, "prompt_tps": 11, "generation_tps": 22, "peak_memory": 44}

    def stream_generate(*arguments, **more):
        for response in real(*arguments, **more):
            yield replace(response, **known)

    monkeypatch.setattr(generation, "stream_generate", stream_generate)
    _, _, err = run("--max-tokens", 4)
    assert "TTFT 33.000 s | prefill 11.0 tok/s | generated 4 tokens (length) | decode 22.0 tok/s" in err
    assert "peak memory 44.00 GB" in err
    timings = json.loads(run("--max-tokens", 4, "--json")[1])["timings"]
    names = ("ttft_s", "prefill_tps", "decode_tps", "peak_memory_gb", "generated_tokens", "reused_tokens")
    assert [timings[name] for name in names] == [33, 11, 22, 44, 4, 0]


def test_ctrl_c_outside_of_an_answer_is_exit_code_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "run", interrupted)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_new_conversation_keeps_the_system_message():
    chat = Chat(None, [SYSTEM, *TURN])
    chat.reset("")
    assert chat.messages == [SYSTEM]
    chat = Chat(None, [*TURN])
    chat.reset("")
    assert chat.messages == []


def test_the_oldest_turn_is_dropped_first_and_the_system_message_never():
    first, second = TURN, [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    question = {"role": "user", "content": "e"}
    chat = Chat(None, [SYSTEM, *first, *second, question])
    assert chat._drop_turn()
    assert chat.messages == [SYSTEM, *second, question]
    assert chat._drop_turn()
    assert not chat._drop_turn()
    assert chat.messages == [SYSTEM, question]
    chat = Chat(None, [*first, question])
    assert chat._drop_turn()
    assert chat.messages == [question]


@pytest.mark.parametrize(("answer", "dropped"), [(16, 0), (17, 2)])
def test_a_conversation_leaves_room_for_the_answer(tiny_folder, answer, dropped):
    """Of a context of 64 tokens the conversation takes 48, one for each letter and two a message, and one to answer."""
    loaded = SimpleNamespace(tokenizer=load(str(tiny_folder))[1])
    options = SimpleNamespace(context_limit=64, truncate=True, max_tokens=answer, special_in_text=False)
    messages = [SYSTEM, *({"role": role, "content": "x" * 10} for role in ("user", "assistant", "user"))]
    chat = Chat(SimpleNamespace(options=options, loaded=loaded), list(messages))
    assert len(chat._prompt_ids()) == 48 - 12 * dropped
    assert chat.messages == [SYSTEM, *messages[1 + dropped :]]
