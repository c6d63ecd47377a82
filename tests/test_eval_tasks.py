"""`mlxeff eval choices` and `retrieval`, and the adapter for lm-evaluation-harness, on tiny models whose answers are
known: some follow from plain numpy, some from a model that is made to say them. About 5 seconds, with lm-eval 10.
"""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxeff import cli
from mlxeff.assembly.model import load_path
from mlxeff.decode import Setup
from mlxeff.errors import MlxeffError
from mlxeff.eval.choices import read
from mlxeff.eval.continuations import encode_pair, likelihoods
from mlxeff.eval.retrieval import Haystack
from tiny_model import write_tiny_model

BOS, EOS = 256, 257
QUESTIONS = [
    {"query": "Which letter?", "choices": ["a", "bb", "a long one"], "gold": 2, "id": 7},
    {"ctx": "The end of this ", "endings": ["is near", "was far", "x"], "label": "1"},
    {"query": "", "choices": ["first", "second"], "gold": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"head_dim": 64, "max_position_embeddings": 1024}
    return write_tiny_model(tmp_path_factory.mktemp("tasks") / "tiny", sizes)


@pytest.fixture(scope="module")
def base(folder):
    return load_path(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return path


def loglikelihood(base, context, tokens):
    """In float64, from the logits of one pass over bytes that are their own ids in this order of the alphabet."""
    ids = [*context, *tokens]
    logits = np.array(base.model(mx.array([ids[:-1]]), base.model.new_cache())[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    rows = logs[len(context) - 1 :]
    return rows[range(len(tokens)), tokens].sum(), bool((rows.argmax(axis=-1) == tokens).all())


def bytes_of(base, text):
    return base.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("options", [(), ("--step", 1), ("--step", 3), ("--delimiter", "")])
def test_choices_by_hand(base, folder, questions, measure, options):
    found, code = measure("choices", folder, questions, *options)
    delimiter = "" if "--delimiter" in options else " "
    right, right_norm = 0, 0
    for question, answer in zip(QUESTIONS, found["answers"], strict=True):
        query, choices = question.get("query", question.get("ctx")), question.get("choices", question.get("endings"))
        gold = int(question.get("gold", question.get("label")))
        context = [BOS, *bytes_of(base, query.rstrip())]
        spaces = query[len(query.rstrip()) :]
        texts = [bytes_of(base, spaces + delimiter + choice) for choice in choices]
        totals = [loglikelihood(base, context, tokens)[0] for tokens in texts]
        assert answer["loglikelihoods"] == pytest.approx(totals, rel=1e-5)
        assert answer["chosen"] == np.argmax(totals)
        by_letter = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
        assert answer["chosen_norm"] == np.argmax(by_letter)
        right, right_norm = right + (np.argmax(totals) == gold), right_norm + (np.argmax(by_letter) == gold)
    assert (code, found["accuracy"], found["accuracy_norm"]) == (0, right / 3, right_norm / 3)
    assert found["accuracy_error"] == pytest.approx(math.sqrt(right / 3 * (1 - right / 3) / 2))
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert (found["step"], found["delimiter"]) == (dict([options] if options else []).get("--step", 256), delimiter)


@pytest.mark.parametrize("apart", [False, True])
def test_examples_go_before_each_question(base, folder, questions, tmp_path, measure, apart):
    """Two of them with their right choices: the first of their file, or the first others of the questions."""
    file = tmp_path / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS[::-1])))
    options = ("--fewshot", file) if apart else ()
    found, code = measure("choices", folder, questions, "--num-fewshot", 2, *options)
    solved = ["Which letter? a long one", "The end of this  was far", " first"]
    before = [[2, 1]] * 3 if apart else [[1, 2], [0, 2], [0, 1]]
    for question, numbers, answer in zip(QUESTIONS, before, found["answers"], strict=True):
        query, choices = question.get("query", question.get("ctx")), question.get("choices", question.get("endings"))
        text = "\n\n".join([*(solved[number] for number in numbers), query])
        spaces = text[len(text.rstrip()) :]
        context = [BOS, *bytes_of(base, text.rstrip())]
        totals = [loglikelihood(base, context, bytes_of(base, f"{spaces} {choice}"))[0] for choice in choices]
        assert answer["loglikelihoods"] == pytest.approx(totals, rel=1e-5)
    assert (code, found["num_fewshot"], found["fewshot"]) == (0, 2, str(file) if apart else None)


def test_questions_in_the_chat_template(folder, questions, tmp_path, measure, capsys):
    """One message, the beginning of the answer, and a choice without a delimiter."""
    chatty = shutil.copytree(folder, tmp_path / "chatty")
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    settings = json.loads((chatty / "tokenizer_config.json").read_text())
    (chatty / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    base = load_path(chatty)
    found, code = measure("choices", chatty, questions, "--num-fewshot", 1, "--chat-template")
    context = [BOS, *bytes_of(base, "[user]The end of this  was far\n\nWhich letter?A:")]
    totals = [loglikelihood(base, context, bytes_of(base, choice))[0] for choice in QUESTIONS[0]["choices"]]
    assert found["answers"][0]["loglikelihoods"] == pytest.approx(totals, rel=1e-5)
    assert (code, found["delimiter"], found["chat_template"]) == (0, "", True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (path := chatty / name).exists():
            path.write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    assert cli.main(["eval", "choices", str(chatty), str(questions), "--chat-template"]) == 1
    assert "--chat-template: wanted a model with a chat template, got one without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-fewshot", "3"), "--num-fewshot: wanted 3 other questions, got 2"),
        (("--num-fewshot", "4", "--fewshot", "FILE"), "--num-fewshot: wanted 4 examples, got 3"),
        (("--num-fewshot", "1", "--fewshot", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_too_few_examples_are_one_line(folder, questions, capsys, options, message):
    words = [str(questions) if each == "FILE" else each for each in options]
    assert cli.main(["eval", "choices", str(folder), str(questions), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_quantised_cache_is_taken_back_between_choices(folder, questions, measure):
    found, _ = measure("choices", folder, questions, "--kv-cache", "int4", "--limit", 2)
    anew, _ = measure("choices", folder, questions, "--kv-cache", "int4", "--limit", 2, "--step", 1)  # reads each anew
    assert found["kv_dtype"] == "int4"
    assert len(found["answers"]) == 2
    for one, two in zip(found["answers"], anew["answers"], strict=True):
        assert one["loglikelihoods"] == pytest.approx(two["loglikelihoods"], rel=1e-3)
    exact, _ = measure("choices", folder, questions, "--limit", 2)
    assert exact["answers"][0]["loglikelihoods"] != found["answers"][0]["loglikelihoods"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: wanted a JSON object, got: Expecting"),
        ("[1]", "line 2: wanted a JSON object, got list"),
        ('{"choices": ["a", "b"], "gold": 0}', "line 2: wanted the key query or ctx, got choices, gold"),
        ('{"query": 3, "choices": ["a", "b"], "gold": 0}', "line 2: query: wanted a text, got 3"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "line 2: choices: wanted a list of at least two texts"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "line 2: choices: wanted a list of at least two texts"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 2: gold: wanted a number from 0 to 1, got 2"),
        ('{"query": "q", "choices": ["a", "b"], "gold": "b"}', "line 2: gold: wanted a number from 0 to 1, got 'b'"),
    ],
)
def test_a_damaged_line_is_named(folder, questions, tmp_path, capsys, line, message):
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(questions.read_text().splitlines()[0] + "\n" + line + "\n")
    assert cli.main(["eval", "choices", str(folder), str(damaged)]) == 1
    assert f"mlxeff: error: {damaged}: {message}" in capsys.readouterr().err


def test_files_and_questions_that_do_not_fit_are_one_line(folder, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"query": "q" * 1024, "choices": ["a", "b"], "gold": 0}))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for path, message in (
        (long, "line 1: the tokens of a choice and its query: wanted at most the context"),
        (empty, "wanted a question a line, got none"),
        (tmp_path / "none", "cannot be read: No such file"),
    ):
        assert cli.main(["eval", "choices", str(folder), str(path)]) == 1
        assert f"{path}: {message}" in capsys.readouterr().err


def test_pairs_are_split_as_the_harness_splits_them(base):
    text = bytes_of(base, "One two")
    assert encode_pair(base.tokenizer, "One ", "two") == ([BOS, *text[:3]], text[3:])
    assert encode_pair(base.tokenizer, "One", " two") == ([BOS, *text[:3]], text[3:])
    assert encode_pair(base.tokenizer, "", "One two") == ([BOS], text)
    with pytest.raises(MlxeffError, match="wanted a text, got an empty one"):
        encode_pair(base.tokenizer, "One", "")


def test_questions_are_read_to_a_limit(questions):
    assert [each.place.rpartition(" ")[2] for each in read(questions, 2)] == ["1", "2"]
    assert read(questions)[1].gold == 1


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = itertools.cycle("alpha beta gamma delta epsilon".split())
    path = tmp_path_factory.mktemp("haystack") / "text.txt"
    path.write_text(" ".join(f"{next(words).title()} is number {n} of them." for n in range(200)))
    return path


@pytest.mark.parametrize(("length", "depth"), [(300, 0.0), (300, 0.5), (500, 1.0), (700, 0.25)])
def test_needles_lie_where_they_should(base, text, length, depth):
    haystack = Haystack(text.read_text(), base.tokenizer, "text")
    asked = haystack.prompt(length, depth, "a seed")
    assert asked == haystack.prompt(length, depth, "a seed")
    assert asked != haystack.prompt(length, depth, "another seed")
    assert length - 40 < len(asked.ids) <= length
    assert asked.ids[0] == BOS
    whole = base.tokenizer.decode(asked.ids[1:])
    body, _, question = whole.partition("\n\n")
    name = question.split("magic number of ")[1].rstrip("?").split("?")[0]
    assert question == f"What is the magic number of {name}? The magic number of {name} is"
    needle = f"The magic number of {name} is {asked.number}."
    assert body.count(needle) == whole.count(asked.number) == 1
    before = len(body[: body.index(needle)]) / (len(body) - len(needle))
    assert before == pytest.approx(depth, abs=0.15)


def test_the_heat_map_and_its_numbers(folder, text, tmp_path, measure, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "map.png"
    arguments = ["retrieval", folder, "--text", text, "--lengths", "200,300", "--depths", "0,100", "--needles", 2]
    found, code = measure(*arguments, "--plot", plot, "--kv-cache", "int8", "--prompt-lookup")
    assert (code, found["plot"], found["kv_dtype"]) == (0, str(plot), "int8")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert found["techniques"] == {"prompt_lookup": "on"}
    assert [(each["length"], each["depth"], each["asked"]) for each in found["cells"]] == [
        (200, 0, 2), (200, 100, 2), (300, 0, 2), (300, 100, 2)
    ]  # fmt: skip
    assert [each["number"] for each in found["answers"]] == [
        each["number"] for each in measure(*arguments)[0]["answers"]
    ]
    numbers = [each["number"] for each in found["answers"]]
    assert numbers[:2] == numbers[2:4]  # the same needles at each depth
    assert found["accuracy"] == sum(each["right"] for each in found["answers"]) / 8
    cli.main(["eval", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["depth", "200", "tokens", "300", "tokens"]
    assert [line.split()[0] for line in lines[1:3]] == ["0%", "100%"]


@pytest.mark.slow
def test_the_built_in_model_finds_a_needle(measure):
    found, _ = measure("retrieval", "smollm2-135m", "--lengths", 200, "--depths", 50, "--needles", 2)
    assert [each["said"].startswith(each["number"]) for each in found["answers"]] == [True, True]
    assert found["accuracy"] == 1


def test_needles_that_fit_nowhere_are_refused(folder, text, tmp_path, capsys):
    for options, message in (
        (("--lengths", "100"), "--lengths: wanted at least"),
        (("--lengths", "2000"), "--lengths with the answer: wanted at most the context of"),
        (("--lengths", "900", "--text", tmp_path / "short"), "wanted a text of about 900 tokens"),
        (("--plot", tmp_path / "map.pdf"), "wanted a name that ends in .png"),
    ):
        (tmp_path / "short").write_text("Only one sentence. And another.")
        arguments = ["eval", "retrieval", folder, "--text", text, *options]
        assert cli.main([*map(str, arguments)]) == 1, options
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter(folder):
    module = pytest.importorskip("mlxeff.eval.lm_eval", reason="lm-eval is not installed", exc_type=ImportError)
    return module.MlxeffLM(str(folder), device="cpu", max_length=64)


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_the_adapter_scores_continuations(base, adapter):
    context = [BOS, *bytes_of(base, "A context")]
    pairs = [("A context", " and more"), ("A context", " less"), ("", "alone"), ("x" * 100, "yz")]
    found = adapter.loglikelihood(asked(*pairs), disable_tqdm=True)
    cut = bytes_of(base, "x" * 100)[-63:]  # with the first of two tokens, the context of 64
    want = [
        loglikelihood(base, context, bytes_of(base, " and more")),
        loglikelihood(base, context, bytes_of(base, " less")),
        loglikelihood(base, [BOS], bytes_of(base, "alone")),
        loglikelihood(base, cut, bytes_of(base, "yz")),
    ]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in want], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def test_a_greedy_continuation_is_noticed(base):
    context, tokens = [BOS, 65], []
    for _ in range(3):
        logits = base.model.last_logits(mx.array([[*context, *tokens]]), base.model.new_cache())
        tokens.append(mx.argmax(logits).item())
    found, _ = likelihoods(Setup(base.model), context, [tokens, [*tokens[:2], tokens[2] ^ 1]], 256, 512)
    assert [each.greedy for each in found] == [True, False]


def test_the_adapter_scores_long_texts_once_by_windows(base, adapter):
    text = "".join(chr(c) for c in np.random.default_rng(2).integers(32, 127, 100))
    ids = bytes_of(base, text)
    found = adapter.loglikelihood_rolling(asked((text,), ("ab",)), disable_tqdm=True)
    first = loglikelihood(base, [BOS], ids[:64])[0]
    second = loglikelihood(base, ids[100 - 65 : 64], ids[64:])[0]  # the last window has a whole context
    assert found == pytest.approx([first + second, loglikelihood(base, [BOS], bytes_of(base, "ab"))[0]], rel=1e-5)


def test_the_adapter_generates_until(base, adapter):
    context = [BOS, *bytes_of(base, "1, 2")]
    cache, tokens = base.model.new_cache(), []
    ids = context
    for _ in range(12):
        tokens.append(mx.argmax(base.model.last_logits(mx.array([ids]), cache)).item())
        ids = tokens[-1:]
    whole = base.tokenizer.decode(tokens)
    stop = whole[4]
    plain, cut = adapter.generate_until(
        asked(("1, 2", {"until": [], "max_gen_toks": 12}), ("1, 2", {"until": stop, "max_gen_toks": 12})),
        disable_tqdm=True,
    )
    assert plain == whole.partition(base.tokenizer.eos_token)[0]
    assert cut == plain.partition(stop)[0]
    assert len(cut) < len(plain)


def test_the_adapter_takes_options_of_the_command(folder, adapter):
    module = pytest.importorskip("mlxeff.eval.lm_eval")
    lm = module.MlxeffLM(str(folder), device="cpu", kv_cache="int8", prompt_lookup=True, batch_size=8)
    assert lm.subject.setup.options.kv == "int8"
    with pytest.raises(MlxeffError, match="drafts are verified"):
        lm.loglikelihood(asked(("a", "b")))
    with pytest.raises(MlxeffError, match="model_args: unrecognized arguments: --temp"):
        module.MlxeffLM(str(folder), temp=1)
    with pytest.raises(MlxeffError, match="wanted at most the model's context of 1024 tokens, got 2000"):
        module.MlxeffLM(str(folder), max_length=2000)
    text = adapter.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|user|>Hi<|end|><|assistant|>"
    assert adapter.chat_template(True).startswith("{% for")


def test_the_harness_runs_a_local_task(base, folder, questions, tmp_path, measure):
    """The harness's own accuracies are those of `mlxeff eval choices`."""
    pytest.importorskip("mlxeff.eval.lm_eval", reason="lm-eval is not installed", exc_type=ImportError)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lines = [QUESTIONS[0] | {"id": 1}, QUESTIONS[2] | {"id": 2}]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "local", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    found = simple_evaluate(
        model="mlxeff", model_args={"pretrained": str(folder), "device": "cpu"}, tasks=[task],
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    ours, _ = measure("choices", folder, path)
    result = found["results"]["local"]
    assert (result["acc,none"], result["acc_norm,none"]) == (ours["accuracy"], ours["accuracy_norm"])
    scored = [[each for each, _ in sample["filtered_resps"]] for sample in found["samples"]["local"]]
    assert scored == [pytest.approx(each["loglikelihoods"]) for each in ours["answers"]]
