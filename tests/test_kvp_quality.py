"""benchmarks/kvp_quality.py: its questions, its measures against formulas and the engine, its verdicts, and the whole
of it on a tiny model."""

import itertools
import json
import math
import sys

import mlx.core as mx
import numpy as np
import pytest

import kvp_quality
import saving
from helpers import assert_close
from kvp import measures, pairs, questions, report, training_text
from mlxeff import kernels
from mlxeff.assembly.model import load_path
from mlxeff.assembly.pair import load_pair
from mlxeff.bench.arms import Arm
from mlxeff.bench.points import Point
from mlxeff.decode import Setup, prefill
from mlxeff.errors import MlxeffError
from mlxeff.eval.measures import compare
from mlxeff.generation import stream_generate
from mlxeff.ops import log_softmax
from test_cli import mlxeff
from tiny_model import write_tiny_model

pytestmark = pytest.mark.skipif(kernels.native()[0] is None, reason=kernels.native()[1])
TEXT = "".join(chr(c) for c in np.random.default_rng(3).integers(32, 127, 4000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 4096}
    return write_tiny_model(tmp_path_factory.mktemp("kvp-quality") / "base", sizes)


@pytest.fixture(scope="module")
def base(folder):
    return load_path(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, folder, base):
    place = tmp_path_factory.mktemp("kvp-quality-pair")
    (place / "text").write_text(TEXT[:500])
    mlxeff("fit", "kv-predictor", folder, "--aux", "lp:0.5", "--out", place / "pair", "--text", place / "text",
           "--tokens", 400, "--length", 100, "--quiet")  # fmt: skip
    return load_pair(place / "pair", base)


@pytest.fixture
def window():
    return mx.array(np.random.default_rng(4).integers(0, 250, 150))


def test_the_committed_questions_are_those_of_the_text():
    items = questions.read()
    assert items == questions.make(questions.TEXT.read_text(encoding="utf-8"))
    assert 40 <= len(items) <= 60
    text = questions.TEXT.read_text(encoding="utf-8")
    assert questions.DEMO.read_text(encoding="utf-8") == questions.prompt(questions.demo(text))
    for item in items:
        start, end = item["span"]
        assert item["passage"][start:end] == item["answer"]
        assert item["passage"].count(item["question"]) == 1
        assert questions.prompt(item).endswith(f"Definition: {item['question']}\nTerm:")


def test_numbers_stand_in_their_lists():
    text = questions.TEXT.read_text(encoding="utf-8")
    made = questions.numbers(text)
    assert made == questions.numbers(text)
    assert questions.sets()["numbers"] == made
    assert len({prompt for prompt, _ in made}) == len(made) == questions.COUNT
    for prompt, answer in made:
        *lines, asked = prompt.split("\n")
        assert len(lines) == questions.ENTRIES
        assert [line for line in lines if line.startswith(asked)] == [f"{asked} {answer}"]


def test_training_reads_nothing_that_is_asked_or_scored(base, tmp_path):
    held_out = questions.entries(questions.TEXT.read_text(encoding="utf-8"))
    read = questions.entries(training_text.CALIBRATION.read_text(encoding="utf-8"))
    for part in (0, 1):  # terms, definitions
        assert not {entry[part] for entry in held_out} & {entry[part] for entry in read}
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        training_text.write(base, path, 3000)
    text = paths[0].read_text(encoding="utf-8")
    assert text == paths[1].read_text(encoding="utf-8")
    tokens = len(base.tokenizer.encode(text.replace(training_text.MARK, ""), add_special_tokens=False))
    assert 3000 <= tokens < 5000  # to the end of a glossary


def test_glossaries_ask_for_what_they_told():
    made = list(itertools.islice(training_text.glossaries([(f"t{i}", f"D {i}.") for i in range(20)], 3), 50))
    assert len(set(made)) == 50
    for text in made:
        *blocks, end = text.split("\n\n")
        told, asked = blocks[: training_text.ENTRIES], blocks[training_text.ENTRIES :]
        assert (end, len(set(told)), len(set(asked))) == ("", training_text.ENTRIES, training_text.ASKED)
        assert not any(training_text.MARK in block for block in told)
        assert {block.replace(f":{training_text.MARK} ", ": ") for block in asked} <= set(told)


def test_an_answer_is_exact_but_for_case_and_punctuation():
    assert questions.exact(" Multics.", "multics")
    assert questions.exact("one line fix", "one-line fix")
    assert not questions.exact("misbuggery", "misbug")
    assert not questions.exact("", "misbug")


def test_measures_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.ones(9), (2, 5))
    a, b, targets = np.log(first), np.log(first / 2 + second / 2), rng.integers(0, 9, 5)
    found = compare(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), targets)
    kl, same = (np.exp(b) * (b - a)).sum(-1), a.argmax(-1) == b.argmax(-1)
    assert 0 < same.sum() < 5
    want = {"tokens": 5, "nll": -a[range(5), targets].sum(), "kl": kl.sum(), "same": same.sum()}
    assert found == pytest.approx(want | {"first_kl": kl[0], "first_same": int(same[0])}, rel=1e-5)


def test_a_model_alone_is_scored_in_one_pass(base, window):
    got = measures.log_probabilities(Setup(base.model), window, 100)
    want = log_softmax(base.model(window[None], base.model.new_cache())[0, 99:-1])
    assert_close(got, want, "continuation")


def test_everything_kept_is_the_base(base, pair, window):
    want = measures.log_probabilities(Setup(base.model), window, 100)
    got = measures.log_probabilities(Setup(base.model, pair.dialled(100)), window, 100)
    assert_close(got, want, "kept")
    plain = measures.log_probabilities(Setup(base.model, pair), window, 100)
    assert plain.shape == want.shape
    assert mx.abs(plain - want).max().item() > 1e-2


@pytest.mark.parametrize("refine", [False, True])
def test_scoring_is_what_generation_computes(base, pair, window, refine):
    """The log-probabilities of a generated text, step by step, are those that scoring the same text finds."""
    setup = Setup(base.model, pair.dialled(5, refine))
    prompt = window.tolist()
    steps = stream_generate(base.model, base.tokenizer, prompt, 12, reading=setup.reading)
    steps = [(step.token, step.logprobs) for step in steps]
    tokens, rows = [token for token, _ in steps], mx.stack([row for _, row in steps])
    scored = measures.log_probabilities(setup, mx.array([*prompt, *tokens]), len(prompt))
    assert_close(scored, rows, "log-probabilities")


def test_refined_ends_as_the_base(base, pair, window):
    """150 tokens are refined in chunks of 64 after three steps: the rows after that are the base's own."""
    want = measures.log_probabilities(Setup(base.model), window, 140)
    got = measures.log_probabilities(Setup(base.model, pair.dialled(refine=True)), window, 140)
    assert_close(got[4:], want[4:], "after the refinement")
    assert mx.abs(got[0] - want[0]).max().item() > 1e-2


def test_windows_are_spread_and_do_not_overlap():
    rows = measures.windows(list(range(1000)), 4, 100, 20)
    assert rows.shape == (4, 120)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 999
    assert all(after[0] > before[-1] for before, after in itertools.pairwise(rows))
    with pytest.raises(SystemExit, match="wanted a text of 1200 tokens"):
        measures.windows(list(range(1000)), 10, 100, 20)


def arm(kind, flops, perplexity, ttft=None):
    times = [{"batch": 1, "tokens": 512, "ttft_s": ttft}] if ttft else []
    return {"kind": kind, "flops": flops, "perplexity": perplexity, "kl": perplexity / 100, "ttft": times}


def test_verdicts():
    arms = {
        "base": arm("base", 1.0, 10, 2.0),
        "LP 0.50": arm("pruned", 0.5, 50),
        "KVP lp:0.50": arm("pair", 0.75, 22, 1.19),
        "KVP other": arm("pair", 0.75, 31),
        "KVP other, keep 9": arm("keep", 0.8, 3.1),
        "KVP other, refine": arm("refine", 0.75, 3.2),
    }
    lines = report.targets(arms)
    words = "KVP lp:0.50 at most 0.6 of the base's TTFT, batch 1 x 512: 0.59"
    assert f"target: {words}: met" in lines
    words = "target: pairs above the pruned baselines at equal FLOPs in"
    assert f"{words} perplexity: 1 of 2: missed by KVP other 31 for 22.4" in lines  # √(10 · 50)
    assert f"{words} kl: 1 of 2: missed by KVP other 0.31 for 0.3" in lines
    assert not any("exact" in line for line in lines)
    assert "target: KVP other, of its KL at least 90% recovered by a dial: keep 9 90%, refine 90%: met" in lines
    arms["KVP other, keep 9"]["kl"] = 0.032
    arms["KVP lp:0.50"]["kl"] = 0.3  # as good is not above
    assert f"{words} kl: 0 of 2: missed by KVP lp:0.50 0.3 for 0.3, KVP other 0.31 for 0.3" in report.targets(arms)
    arms["KVP other"]["perplexity"] = 22.3
    assert f"{words} perplexity: 2 of 2: met" in report.targets(arms)
    assert report.targets(arms)[-1].endswith("keep 9 90%, refine 90%: missed")  # 89.7%


def test_the_plot_shows_every_arm(tmp_path):
    pytest.importorskip("matplotlib")
    arms = {
        "base": arm("base", 1.0, 10, 2.0),
        "LP 0.50": arm("pruned", 0.5, 50, 1.0),
        "KVP a": arm("pair", 0.6, 20, 1.2),
    }
    arms |= {"KVP a, keep 9": arm("keep", 0.7, 15), "KVP a, refine": arm("refine", 0.6, 11)}
    for each in arms.values():
        each |= {"exact": 0.5, "numbers": 0.4, "agreement": 0.9}
    report.plot({"arms": arms}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_of_an_arm_that_was_not_timed():
    names = {"base": 2.0, "KVP a": 1.2, "KVP a, keep 9": 1.5, "KVP b": None, "KVP a distilled": None}
    names |= {
        "KVP a distilled, keep 9": None,
        "KVP a distilled, refine": None,
        "KVP a, refine": None,
        "KVP a lora": None,
    }
    arms = {name: arm("pair", 0.6, 20, seconds) for name, seconds in names.items()}
    found = {name: report._share(name, arms, 2.0) for name in arms}
    of_keep = {name for name, share in found.items() if share == 0.75}
    assert of_keep == {"KVP a, keep 9", "KVP a distilled, keep 9"}
    assert {name for name, share in found.items() if share is None} == {"KVP b", "KVP a lora"}
    assert all(found[name] == 0.6 for name in ("KVP a", "KVP a, refine", "KVP a distilled", "KVP a distilled, refine"))


def test_the_whole_benchmark_on_a_tiny_model(folder, base, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT)
    items = {name: each[:2] for name, each in questions.sets().items()}
    monkeypatch.setattr(kvp_quality, "TEXT", text)
    monkeypatch.setattr(kvp_quality, "TTFT_POINTS", [Point(1, 20), Point(2, 20)])
    monkeypatch.setattr(pairs, "CALIBRATION", text)
    monkeypatch.setattr(report, "PLOT_POINT", (1, 20))
    monkeypatch.setattr(questions, "sets", lambda: items)
    monkeypatch.setattr(pairs, "DIALLED", ("KVP lp:0.50",))

    def run(*more):
        options = ["--model", folder, "--work", tmp_path / "work", "--windows", 2, "--prompt", 60, "--continuation", 8]
        options += ["--tokens", 1024, "--aux", "lp:0.50", *more]
        monkeypatch.setattr(sys, "argv", ["kvp_quality.py", *map(str, options)])
        kvp_quality.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]

    run("--only", "base", "refine")
    lines = (tmp_path / "work" / "windows.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2
    found = run()
    assert (tmp_path / "work" / "windows.jsonl").read_text().splitlines()[: len(lines)] == lines
    names = ["base", "LP 0.75", "LP 0.50", "LP 0.25", "KVP lp:0.50"]
    names += [f"KVP lp:0.50, {dial}" for dial in ("keep 64", "keep 256", "keep 384", "refine")]
    assert list(found) == names
    assert found["base"]["kl"] == 0
    assert all((arm["exact_questions"], arm["numbers_questions"]) == (2, 2) for arm in found.values())
    assert found["KVP lp:0.50, keep 64"]["kl"] < 1e-6  # all 60 tokens
    assert found["KVP lp:0.50"]["kl"] > found["KVP lp:0.50, refine"]["kl"] > 1e-6
    rows = measures.windows(base.tokenizer.encode(TEXT, add_special_tokens=False), 2, 60, 8)
    model, total = base.model, 0.0
    for row in mx.array(rows):
        logits = model(row[None], model.new_cache())[0, 59:-1]
        total += (mx.logsumexp(logits, -1) - mx.take_along_axis(logits, row[60:, None], -1)[:, 0]).sum().item()
    assert found["base"]["perplexity"] == pytest.approx(math.exp(total / 16), rel=1e-4)
    timed = run("--phase", "ttft", "--rounds", "1", "--pruned", f"LP trained={folder}")
    assert [(t["batch"], t["tokens"]) for t in timed["LP trained"]["ttft"]] == [(1, 20), (2, 20)]
    assert timed["KVP lp:0.50"]["perplexity"] == found["KVP lp:0.50"]["perplexity"]


def test_arms_of_the_times_are_those_of_the_quality(base, pair, window):
    one = Arm("a", Setup(base.model, pair.dialled(9)))
    cache = base.model.new_cache()
    got = one.setup.read(window[None], cache, 512)
    scored = measures.log_probabilities(one.setup, mx.concatenate([window, window[:1]]), len(window))
    assert_close(log_softmax(got), scored, "first log-probabilities")
    assert mx.abs(got - prefill(base.model, base.model.new_cache(), window, 512)).max().item() > 1e-2


def test_the_projects_report_holds_saved_results():
    """Of one machine: after `kvp_quality.py --save` comes `--report`."""
    text, root = saving.REPORT.read_text(encoding="utf-8"), saving.REPORT.parent
    found = list(saving.RESULTS.glob("*-kvp-quality.json"))
    shown = [report.section(json.loads(path.read_text()), path.with_suffix(".png"), root) for path in found]
    assert any(each in text for each in shown) or not found


def test_recipes_are_commands(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training_text, "TOKENS", 900)
    made_of = {}
    monkeypatch.setattr(pairs, "LENGTH", 100)
    monkeypatch.setitem(pairs.TRAINED, "lp:0.50 distilled", (2, 1e-3))
    monkeypatch.setitem(pairs.TRAINED, "lp:0.50 joint", (2, 2e-3))
    for recipe in ("lp:0.50 distilled", "lp:0.50 joint", "lp:0.50 own", "lp:0.50 own 8-bit"):
        made = pairs.make(recipe, str(folder), tmp_path, 1000)
        assert made == pairs.make(recipe, str(folder), tmp_path, 1000)
        config = json.loads((made / "config.json").read_text())
        assert len(config["provenance"]["losses"]) == (0 if "own" in recipe else 2)
        assert config["provenance"]["loss"] == ("paper" if "own" in recipe else "distill")
        assert config["provenance"]["rate"] == {"joint": 2e-3, "distilled": 1e-3}.get(recipe.split()[-1], 3e-4)
        assert ("tuned" in config["auxiliary"]) == recipe.endswith("joint")
        assert config.get("quantization", {}).get("bits") == (8 if recipe.endswith("8-bit") else None)
        made_of[recipe] = made
    assert list(pairs.trained_baselines(made_of).items()) == [("LP 0.50 trained", made_of["lp:0.50 joint"])]
    assert {path.name for path in tmp_path.glob("*.txt")} == {"fit-1000.txt", "train-900.txt"}
    with pytest.raises(MlxeffError, match=r"kvp: lp:0\.50 more: wanted an auxiliary and one of own, dist"):
        pairs.make("lp:0.50 more", str(folder), tmp_path, 1000)
    assert set(pairs.TRAINED) <= set(pairs.RECIPES)
