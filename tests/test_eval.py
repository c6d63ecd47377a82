"""`mlxeff eval ppl` and `kl` on tiny models against plain numpy in float64, and their measures against distributions
whose answer is known by hand. About 8 seconds.
"""

import json
import math
import re
import signal
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from mlxeff import cli, kernels
from mlxeff.assembly.fitting_dynamoe import fit_dynamoe
from mlxeff.assembly.model import load_path
from mlxeff.assembly.pair import load_pair
from mlxeff.cache import KVCache, LayerCache
from mlxeff.decode import Setup
from mlxeff.errors import MlxeffError
from mlxeff.eval.measures import Values, compare, divergences, exponential, mean_report, means, perplexity
from mlxeff.eval.scoring import SideBySide
from mlxeff.eval.windows import Cut, cut_of, windows
from mlxeff.generation import stream_generate
from test_cli import COMMAND, environment
from tiny_model import GEMMA, MAMBA, write_foreign, write_model, write_tiny_model, write_words

TEXT = "".join(chr(c) for c in np.random.default_rng(8).integers(32, 127, 300))
BOS = 256
SIZES = {"head_dim": 64, "num_hidden_layers": 4, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("eval") / "tiny", SIZES)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("eval-other") / "other", {"head_dim": 64}, seed=3)


@pytest.fixture(scope="module")
def base(folder):
    return load_path(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval-text") / "text.txt"
    path.write_text(TEXT)
    return path


def log_probabilities(model, ids):
    """Of the tokens after each of `ids`, (T, V), in float64 from the model's logits of one pass."""
    logits = np.array(model(mx.array([ids]), model.new_cache())[0].astype(mx.float32), np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def losses_of(base, context, stride, prompt=None, bos=True):
    """The losses of all scored tokens: the windows written down anew, one pass for each."""
    ids = base.tokenizer.encode(TEXT, add_special_tokens=False)
    ids = [BOS, *ids] if bos else ids
    found, done = [], 1
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + context + 1]
        if bos:
            window = [BOS, *window[1:]]
        rows = log_probabilities(base.model, window[:-1])
        first = max(prompt or 1, done - start)
        found += [-rows[place - 1, window[place]] for place in range(first, len(window))]
        done = start + len(window)
        if done == len(ids):
            break
    return np.array(found)


@pytest.mark.parametrize(
    ("context", "stride", "prompt", "bos", "step"),
    [(64, None, None, True, 256), (64, 64, None, False, 7), (100, 30, None, True, 256), (64, None, 33, True, 1),
     (80, 80, 17, False, 16), (80, 20, 9, True, 256)],
)  # fmt: skip
def test_perplexity_is_that_of_the_logits(base, folder, text, measure, context, stride, prompt, bos, step):
    options = ["--text", text, "--context", context, "--step", step]
    options += ["--stride", stride] if stride else []
    options += ["--prompt", prompt] if prompt else []
    options += [] if bos else ["--no-bos"]
    found, code = measure("ppl", folder, *options)
    want = losses_of(base, context, stride or context - (prompt or 1) + 1, prompt, bos)
    assert (code, found["tokens"], found["not_finite"]) == (0, len(want), 0)
    assert found["nll"] == pytest.approx(want.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(want.mean()), rel=1e-5)
    error = math.exp(want.mean()) * want.std(ddof=1) / math.sqrt(len(want))
    assert found["perplexity_error"] == pytest.approx(error, rel=1e-4)
    assert (found["bos"], found["step"], found["prompt"]) == (bos, step, prompt)


@pytest.mark.parametrize("cut", [Cut(10, 10), Cut(10, 3), Cut(10, 1, bos=99), Cut(10, 10, bos=99), Cut(7, 5)])
def test_windows_score_every_token_once(cut):
    ids = list(range(33))
    found = [token for window in windows(ids, cut, "text") for token in window.ids[window.first :]]
    assert found == ids[cut.bos is None :]
    for window in windows(ids, cut, "text")[1:]:
        assert window.first >= cut.context - cut.stride + 1
        assert len(window.ids) <= cut.context + 1
        assert (window.ids[0] == 99) == (cut.bos is not None)


def test_windows_with_a_prompt_score_every_token_after_the_first_prompt():
    cut = cut_of(10, None, 4)
    found = windows(list(range(33)), cut, "text")
    assert cut.stride == 7
    assert all((window.prompt, window.first) == (4, 4) for window in found)
    assert [token for window in found for token in window.ids[4:]] == list(range(4, 33))


def test_divergences_by_hand():
    truth, found = np.array([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]), np.array([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    with np.errstate(divide="ignore"):
        logs = [mx.array(np.log(each).astype(np.float32)) for each in (found, truth)]
    by_hand = [0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), 0.25 * math.log(0.5) + 0.75 * math.log(3)]
    assert np.array(divergences(*logs)) == pytest.approx(by_hand, rel=1e-6)
    compared = compare(*logs, np.array([1, 0]))
    want = {"tokens": 2, "nll": -math.log(0.75) - math.log(0.5), "kl": sum(by_hand), "same": 0}
    assert compared == pytest.approx(want | {"first_kl": by_hand[0], "first_same": 0}, rel=1e-6)
    assert means([compared])["perplexity"] == pytest.approx(math.exp(want["nll"] / 2), rel=1e-6)
    assert np.isinf(np.array(divergences(logs[1], logs[0]))[1])  # the third token is impossible for the second


def test_what_is_not_finite_is_counted():
    values = Values()
    values.add(mx.array([1.0, math.inf, 2.0]))
    values.add(mx.array([math.nan]))
    none = {"nll": None, "perplexity": None, "perplexity_error": None}
    assert perplexity(values) == {"tokens": 4, "not_finite": 2, **none}
    assert exponential(1e4) == math.inf


def test_reports_become_their_mean():
    one, two = ({"a": {"n": n, "l": [n, 2 * n], "s": "x", "b": True}} for n in (1, 4))
    assert mean_report([one, two]) == {"a": {"n": 2.5, "l": [2.5, 5], "s": "x", "b": True}}


def test_a_model_beside_itself_and_beside_another(base, other, folder, text, measure):
    reading = ("--text", text, "--context", 64)
    same, _ = measure("kl", folder, *reading)
    assert (same["kl_max"], same["same_top"]) == (pytest.approx(0, abs=1e-6), 1)
    assert "is compared with itself" in " ".join(same["notices"])
    found, _ = measure("kl", folder, "--against", other, *reading)
    ids = [BOS, *base.tokenizer.encode(TEXT, add_special_tokens=False)]
    kl, tops = [], []
    for start in range(0, len(ids) - 1, 64):
        window = [BOS, *ids[start + 1 : start + 64]]
        rows, truth = (log_probabilities(each.model, window) for each in (base, load_path(other)))
        kl += list((np.exp(truth) * (truth - rows)).sum(axis=-1))
        tops += list(rows.argmax(axis=-1) == truth.argmax(axis=-1))
    kl, tops = kl[: len(ids) - 1], tops[: len(ids) - 1]
    assert found["tokens"] == len(kl) == 300
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found["same_top"] == pytest.approx(np.mean(tops))
    assert found["same_top"] < 1
    alone, _ = measure("ppl", other, *reading)
    assert found["against"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)


def test_passes_of_a_quantised_cache_compute_what_decoding_does(folder, text, measure):
    if kernels.native()[0] is None:
        pytest.skip("the native kernels compute the cache exactly in passes")
    found = [
        measure("kl", folder, "--text", text, "--context", 299, "--no-bos", "--kv-cache", "int4", "--step", n)[0]
        for n in (1, 256)
    ]
    assert found[0]["kv_dtype"] == "int4"
    assert found[0]["kl"] > 1e-6
    assert found[1]["kl"] == pytest.approx(found[0]["kl"], rel=5e-3)
    prompt = [
        measure("kl", folder, "--text", text, "--context", 299, "--no-bos", "--prompt", n, *given)[0]
        for n, given in ((200, ["--kv-cache", "int4"]), (200, ["--against-options", "--kv-cache int4"]))
    ]
    assert prompt[0]["against"]["kv_dtype"] == "float32" != prompt[1]["against"]["kv_dtype"]
    assert prompt[0]["perplexity"] == prompt[1]["against"]["perplexity"]


@pytest.fixture(scope="module")
def pair(folder, text, tmp_path_factory):
    place = tmp_path_factory.mktemp("eval-pair") / "pair"
    fit = ["fit", "kv-predictor", folder, "--aux", "lp:0.5", "--out", place, "--text", text, "--tokens", 200, "--quiet"]
    assert cli.main([*map(str, fit), "--length", "100"]) == 0
    return place


def test_a_predicted_prompt_is_scored_as_generation_computes(base, folder, text, pair, measure):
    found, _ = measure("kl", folder, "--text", text, "--context", 100, "--prompt", 80, "--kv-predict", pair)
    assert found["techniques"] == {"kv_prediction": str(pair)}
    assert found["statistics"]["kv_prediction"]["predicted_tokens"] == 79
    assert found["against"]["techniques"] == {}
    assert found["kl"] > 1e-3
    setup = Setup(base.model, load_pair(pair, base, refine=True))
    prompt = base.tokenizer.encode(TEXT)[:150]
    steps = [(s.token, s.logprobs) for s in stream_generate(base.model, base.tokenizer, prompt, 8,
             reading=setup.reading)]  # fmt: skip
    run = SideBySide([setup], [*prompt, *(token for token, _ in steps)], 150, 1, [512])
    rows = mx.concatenate([rows[0] for rows, _ in run])
    assert mx.abs(rows - mx.stack([row for _, row in steps])).max().item() < 1e-4
    # The prompt, and what was decoded before its last chunk.
    assert setup.reading.refined_tokens == 152 + (kernels.device() == "gpu")


class Narrow(LayerCache):
    """A cache that takes three tokens of a pass at most."""

    together = 3


def test_a_pass_has_no_more_tokens_than_the_cache_takes_together(base):
    narrow = Setup(base.model)
    narrow.new_cache = lambda: KVCache([Narrow() for _ in base.model.layers])
    run = SideBySide([Setup(base.model), narrow], list(range(20)), 4, 8, [512, 512])
    assert [len(targets) for _, targets in run] == [1, 3, 3, 3, 3, 3]
    assert [cache.length for cache in run.caches] == [19, 19]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A model of nested experts, and one that leaves out inputs."""
    place = tmp_path_factory.mktemp("eval-dynamoe")
    source = write_tiny_model(place / "wide", {"intermediate_size": 128, "num_hidden_layers": 2})
    words = write_words(place / "words", 300)
    for by in ("experts", "inputs"):
        fit_dynamoe(str(source), place / by, by=by, text=words, tokens=512)
    return place / "experts", place / "inputs"


def test_what_a_dynamoe_leaves_out_is_counted_for_it_alone(dynamic, text, measure):
    reading = ("--text", text, "--context", 64, "--no-bos")
    found, _ = measure("kl", dynamic[0], *reading, "--sensitivity", 0.5)
    alone, _ = measure("ppl", dynamic[0], *reading, "--sensitivity", 0.5)
    assert found["techniques"] == {"dynamoe": "sensitivity 0.5"}
    counted = found["statistics"]["dynamoe"]
    assert counted == alone["statistics"]["dynamoe"]
    assert counted["tokens"] == pytest.approx(299 / 5)  # inputs of the windows: 64, 64, 64, 64, 43
    assert counted["mean_fraction"] < 0.9
    assert found["against"]["statistics"] == {}
    assert found["kl"] > 1e-6
    full, _ = measure("kl", dynamic[0], *reading, "--sensitivity", 1, "--against-options", "--sensitivity 1")
    assert full["kl"] == pytest.approx(0, abs=1e-6)


def test_inputs_are_left_out_in_passes_of_few_tokens(dynamic, text, measure, capsys):
    reading = ("--text", text, "--context", 64)
    assert cli.main(["eval", "ppl", str(dynamic[1]), *map(str, reading), "--sensitivity", "0.5"]) == 1
    assert "in passes of at most 8 tokens, as decoding has them: wanted --step 8" in capsys.readouterr().err
    found = [measure("kl", dynamic[1], *reading, "--sensitivity", 0.5, "--step", n)[0] for n in (8, 1)]
    assert all(each["statistics"]["dynamoe"]["mean_fraction"] < 0.9 for each in found)
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], rel=1e-3)
    assert found[0]["kl"] > 1e-6


@pytest.mark.parametrize("config", [GEMMA, MAMBA], ids=["gemma", "mamba"])
def test_models_of_mlx_lm_are_measured(tmp_path, text, measure, config):
    folder = write_foreign(tmp_path / "foreign", config)
    loaded = load_path(folder)
    reading = ("--text", text, "--tokens", 80, "--context", 40, "--step")
    found = [measure("ppl", folder, *reading, n)[0] for n in (1, 16)]
    ids = [BOS, *loaded.tokenizer.encode(TEXT, add_special_tokens=False)[:80]]
    want = []
    for start in (0, 40):
        window = [BOS, *ids[start + 1 : start + 41]]
        want += list(-log_probabilities(loaded.model, window[:-1])[range(40), window[1:]])
    for each in found:
        assert each["nll"] == pytest.approx(np.mean(want), rel=1e-4)
        assert (each["kv_dtype"], each["backend"]) == (None, "mlx")


def test_a_notice_of_the_cache_comes_once(tmp_path, text, measure):
    folder = write_tiny_model(tmp_path / "biased", {"model_type": "qwen2", "head_dim": 64, "hidden_size": 256})
    found, _ = measure("ppl", folder, "--text", text, "--context", 64, "--kv-cache", "int4", "--no-bos")
    assert found["windows"] == 5
    assert found["kv_dtype"] == "k8v4"
    assert sum("are stored as k8v4" in line for line in found["notices"]) == 1
    questions = tmp_path / "questions"
    questions.write_text(
        '{"query": "q", "choices": ["a", "bb"], "gold": 0}\n{"query": "qqq", "choices": ["a", "b"], "gold": 0}'
    )
    found, _ = measure("choices", folder, questions, "--kv-cache", "int4")
    assert sum("are stored as k8v4" in line for line in found["notices"]) == 1


def test_ctrl_c_ends_a_measurement(folder, tmp_path):
    (tmp_path / "long").write_text(TEXT * 500)
    command = [*COMMAND, "eval", "ppl", folder, "--text", tmp_path / "long", "--tokens", 100_000, "--step", 1]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    note = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "the first 100000 of its 150000 tokens are read" in note
    assert (process.returncode, out, err) == (130, "", "\ninterrupted\n")


def test_damaged_weights_are_not_hidden(folder, text, tmp_path, measure):
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * math.nan
    damaged = write_model(tmp_path / "nan", json.loads((folder / "config.json").read_text()), weights)
    found, code = measure("ppl", damaged, "--text", text, "--context", 64)
    assert (code, found["perplexity"], found["not_finite"]) == (1, None, found["tokens"])
    assert "300 of 300 losses are NaN or infinite" in found["notices"][-1]


def test_a_damaged_model_beside_a_sound_one(folder, text, tmp_path, measure):
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * math.nan
    damaged = write_model(tmp_path / "nan", json.loads((folder / "config.json").read_text()), weights)
    found, code = measure("kl", folder, "--against", damaged, "--text", text, "--context", 64)
    assert (code, found["kl"], found["kl_p99"], found["against"]["perplexity"]) == (1, None, None, None)
    assert found["perplexity"] > 1
    assert found["not_finite"] == 2 * found["tokens"]
    assert f"{damaged}: 300 of 300 losses" in found["notices"][-1]


def test_bad_input_is_one_line(folder, other, text, tmp_path, capsys):
    def fails(*arguments):
        assert cli.main(["eval", *map(str, arguments)]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    short = tmp_path / "short.txt"
    short.write_text(TEXT[:40])
    assert "wanted a text of at least 64 tokens, one window of --context 64, got 40" in fails(
        "ppl", folder, "--text", short, "--context", 64
    )
    line = f"--context: wanted at most the context of {folder}, 512 tokens, got 600"
    assert fails("ppl", folder, "--context", 600) == f"mlxeff: error: {line}"
    assert "--prompt: wanted at most --context 64 tokens, got 65" in fails(
        "ppl", folder, "--context", 64, "--prompt", 65
    )
    assert "--stride: wanted at most" in fails("ppl", folder, "--context", 64, "--stride", 65)
    assert "drafts are verified" in fails("ppl", folder, "--prompt-lookup")
    assert "drafts are verified" in fails("ppl", folder, "--quantspec")
    assert "--sensitivity: wanted a DynaMoE model" in fails("ppl", folder, "--sensitivity", 0.5)
    assert "cannot be read: No such file" in fails("ppl", folder, "--text", tmp_path / "none")


def test_techniques_that_nothing_is_read_by_are_refused(folder, text, pair, capsys):
    for options, message in (
        ((), "wanted --prompt N above 1, of which tokens are predicted, got 1"),
        (("--prompt", 20, "--context", 64), ":refine works between the steps of decoding: wanted --step 1, got 256"),
    ):
        arguments = ["eval", "ppl", folder, "--text", text, "--kv-predict", f"{pair}:refine", *options]
        assert cli.main([*map(str, arguments)]) == 1
        assert message in capsys.readouterr().err


def test_other_tokens_are_refused(folder, text, tmp_path, capsys):
    wide = write_tiny_model(tmp_path / "wide", {"vocab_size": 300})
    strange = write_tiny_model(tmp_path / "strange")
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    for model, message in ((wide, "261 rows"), (strange, "of the text is")):
        arguments = ["eval", "kl", folder, "--against", model, "--text", text, "--context", 64]
        assert cli.main([*map(str, arguments)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--kv-cache int3", "--temp 1", "--kv-cache 'int8"])
def test_options_of_the_reference_are_checked(folder, given, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "kl", str(folder), "--against-options", given])
    assert end.value.code == 2
    assert "argument --against-options: " in capsys.readouterr().err


def test_damaged_windows_are_refused():
    with pytest.raises(MlxeffError, match="wanted a text of at least 11 tokens"):
        windows(list(range(10)), Cut(10, 10), "text")


def test_logits_that_do_not_fit_are_one_line(folder, text, monkeypatch, capsys):
    """The vocabulary by the tokens that are scored at once is compared with the memory before anything is scored; each
    number takes a terabyte here. One token at a time is what decoding needs too."""
    monkeypatch.setattr("mlxeff.eval.subject.LOGITS", 10**12)
    command = ["eval", "ppl", str(folder), "--text", str(text), "--context", "64", "--tokens", "100"]
    assert cli.main([*command, "--step", "32"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"mlxeff: error: the logits of 32 tokens: need .* GB, .* may be used .*: --step 1", error)
    assert cli.main([*command, "--step", "1"]) == 0
