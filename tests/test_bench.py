"""`mlxeff bench ttft`: real processes on tiny models; the file of samples, what is left out, what is computed."""

import argparse
import json
from statistics import median
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff.assembly.model import build_model, load_path
from mlxeff.assembly.pair import load_pair
from mlxeff.bench import arms, kvp_paper, report, ttft
from mlxeff.bench.samples import Samples, median_of
from mlxeff.bench.selection import condition, selected
from mlxeff.bench.tables import table
from mlxeff.decode import Setup, prefill
from mlxeff.errors import MlxeffError
from mlxeff.kvprediction import predict
from mlxeff.kvprediction.layers import PUBLISHED
from mlxeff.kvprediction.predict import SINKS
from mlxeff.models.openelm import multipliers, published_config
from mlxeff.ops import native_for
from test_cli import fails, mlxeff
from tiny_model import write_random_model, write_tiny_model

KEYS = {"device", "batch", "tokens", "arm", "round", "ttft_s", "step_s", "load_average"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "base", {"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def pair(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("bench-pair")
    (place / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    mlxeff("fit", "kv-predictor", folder, "--aux", "lp:0.5", "--out", place / "pair", "--text", place / "text",
           "--tokens", 500, "--length", 100, "--quiet")  # fmt: skip
    return place / "pair"


def openelm(size: str, layers: int) -> dict:
    """The config of an OpenELM of `layers` small layers that grow as those of `size` do."""
    config = published_config(size, vocab_size=261)
    queries = [4 + 4 * (i * 2 // layers) for i in range(layers)]
    shapes = {"num_query_heads": queries, "num_kv_heads": [q // 4 for q in queries]}
    shapes |= {"ffn_multipliers": multipliers((0.5, 4.0), layers), "ffn_dim_divisor": 16}
    return config | shapes | {"num_transformer_layers": layers, "model_dim": 64, "head_dim": 16}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """SIZE=FOLDER of four tiny OpenELMs, whose layers have the proportions of the published ones."""
    place = tmp_path_factory.mktemp("openelm")
    found = []
    for size, layers in (("270M", 2), ("450M", 3), ("1_1B", 4), ("3B", 8)):
        path = write_random_model(place / size, openelm(size, layers))
        found += ["--checkpoint", f"{size.replace('_', '.')}={path}"]
    return found


def test_a_model_beside_its_pairs(folder, pair, tmp_path):
    out, err = mlxeff("bench", "ttft", folder, "--kv-predict", pair, "--kv-predict", f"{pair}:keep=8", "--rounds", 2,
                      "--batch", "1,3", "--prompt-lengths", "16,40", "--json", "--device", "cpu",
                      "--threads", 1)  # fmt: skip
    found = json.loads(out)
    names = [str(folder), str(pair), f"{pair}:keep=8"]
    want = {("cpu", b, n, a, r) for b in (1, 3) for n in (16, 40) for a in names for r in range(2)}
    assert {tuple(s[k] for k in ttft.KEYS) for s in found["samples"]} == want
    assert all(set(sample) == KEYS for sample in found["samples"])
    assert found["card"]["threads"] == 1
    assert found["settings"]["activations"] == "float32"
    for each in found["results"]:
        times = [s["ttft_s"] for s in found["samples"] if all(s[k] == each[k] for k in ("batch", "tokens", "arm"))]
        assert each["ttft_s"] == median(times)
        assert each["prompt_tps"] == pytest.approx(each["batch"] * each["tokens"] / each["ttft_s"])
    assert [sample["arm"] for sample in found["samples"][:6]] == names * 2  # the arms take turns
    assert "TTFT" in err


def test_the_arithmetic_is_that_of_the_options(folder, pair):
    command = ["bench", "ttft", folder, "--kv-predict", pair, "--prompt-lengths", "16", "--rounds", 1, "--json"]
    found = json.loads(mlxeff(*command, "--device", "cpu")[0])["settings"]
    assert (found["compute"], found["kv_dtype"]) == ("exact", "float32")
    if not native_for():
        assert "only the native CPU kernels have them" in fails(*command[:-1], "--compute", "int8")
        return
    rounded = ("--compute", "int8", "--kv-dtype", "float16")
    found = json.loads(mlxeff(*command, "--device", "cpu", *rounded)[0])["settings"]
    assert (found["compute"], found["kv_dtype"]) == ("int8", "float16")


def test_the_file_of_samples_is_gone_on_with(folder, tmp_path):
    command = ["bench", "ttft", folder, "--prompt-lengths", "8,16", "--out", tmp_path / "s.jsonl", "--json", "--quiet"]
    whole = json.loads(mlxeff(*command)[0])["samples"]
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == whole
    (tmp_path / "s.jsonl").write_text("\n".join(lines[:4]) + '\n{"device": "cp')  # killed in the fourth
    again = json.loads(mlxeff(*command)[0])["samples"]
    assert again[:3] == whole[:3]
    assert [[s[k] for k in ttft.KEYS] for s in again] == [[s[k] for k in ttft.KEYS] for s in whole]
    assert again[3:] != whole[3:]
    assert "holds samples made otherwise (steps differ)" in fails(*command[:-2], "--steps", 7)
    (tmp_path / "s.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "s.jsonl: wanted a file of samples: " in fails(*command[:-2])


def test_the_suite_measures_all_models_of_the_paper(checkpoints):
    out, _ = mlxeff("bench", "ttft", "--suite", "kvp-paper", *checkpoints, "--only", "batch=1", "batch=64", "tokens=64",
                    "tokens=59", "--rounds", 1, "--warmup", 0, "--quiet", "--json", "--device", "cpu")  # fmt: skip
    found = json.loads(out)
    names = {*kvp_paper.TABLE_5, *kvp_paper.TABLE_6}
    assert set(PUBLISHED) < names
    points = {(1, 64), (64, 59)}
    assert {(s["batch"], s["tokens"], s["arm"]) for s in found["samples"]} == {(*p, n) for p in points for n in names}
    base, half = found["arms"]["OE1.1B"], found["arms"]["OE1.1B-KVP-LP-0.50"]
    assert half["base"] == base["base"]
    assert half["auxiliary"] == found["arms"]["OE1.1B-LP-0.50"]["base"]


def test_the_suite_prints_the_published_numbers_beside_ours(checkpoints):
    out, _ = mlxeff("bench", "ttft", "--suite", "kvp-paper", *checkpoints, "--only", "arm=OE1.1B", "batch=64",
                    "--rounds", 1, "--warmup", 0, "--quiet", "--device", "cpu")  # fmt: skip
    assert "paper: M2 Pro CPU" in out
    row = next(line for line in out.splitlines() if line.startswith("| OE1.1B-KVP-LP-0.50 |"))
    assert row.endswith("| 3.33 | 1.68 |")
    assert "weights: as stored" in out


def test_random_weights_have_the_published_shapes_and_share_what_is_shared():
    """Nothing is computed: the weights of 1.1B stay lazy."""
    group = kvp_paper.groups(mx.float16, {})[0]
    made = {arm.name: arm for arm in group.build(group.names)}
    for name, theirs in kvp_paper.TABLE_5.items():
        described = ttft.describe(made[name])
        reduction = ttft.describe(made["OE1.1B"])["base"] / described.get("auxiliary", described["base"])
        assert reduction == pytest.approx(theirs.flops, abs=0.0051), name  # two decimals are printed
    matrices = sum(v.nbytes for m in ("OE1.1B", "OE450M", "OE270M") for _, v in tree_flatten(made[m].base.parameters()))
    predictors = sum(v.nbytes for a in made.values() if a.pair for _, v in tree_flatten(a.pair.predictor.parameters()))
    extra = arms.weight_bytes(made.values()) - matrices - predictors
    assert extra == 0
    assert matrices == pytest.approx(2 * (1079891456 + 457179136 + 271527168))


def test_random_weights_keep_activations_in_range():
    model = build_model(openelm("1_1B", 4))
    arms.randomise(model, mx.float16)
    logits = model(mx.array([[1, 2, 3, 250]]), model.new_cache())
    assert mx.isfinite(logits).all().item()
    assert mx.abs(logits).max().item() < 100


def test_what_does_not_fit_is_left_out_with_a_line(folder, checkpoints):
    _, err = mlxeff("bench", "ttft", folder, "--prompt-lengths", "8,200", "--batch", "1,64", "--memory", 0.02, "--json",
                    "--rounds", 1)  # fmt: skip
    assert err.count("skipped") == 1
    assert "skipped: " in err and "batch 64 x 200 tokens on cpu: needs about" in err  # noqa: PT018
    out, err = mlxeff("bench", "ttft", "--suite", "kvp-paper", "--only", "arm=OE3B-LP", "--memory", 1, "--json")
    assert "OE3B-LP-0.75, OE3B-LP-0.50, OE3B-LP-0.25 on cpu: needs about 4.52 GB, 1 GB may be used (--memory)" in err
    assert json.loads(out)["samples"] == []
    assert len(json.loads(out)["skipped"]) == 1


def test_an_arm_computes_what_generation_does(folder, pair):
    base = load_path(folder)
    loaded = load_pair(pair, base)
    tokens = mx.array([[5, 6, 7, 8, 9, 10, 11, 12], [9, 1, 2, 3, 4, 5, 6, 7]])
    whole, predicted = Setup(base.model), Setup(base.model, loaded.dialled(keep=3))
    want = prefill(base.model, base.model.new_cache(), tokens, 4)
    assert_close(whole.read(tokens, base.model.new_cache(), 4), want, "base")
    models = loaded.auxiliary, loaded.predictor, base.model
    want = predict(*models, tokens, base.model.new_cache(), 4, keep=3, sinks=SINKS)
    got = predicted.read(tokens, base.model.new_cache(), 4)
    assert_close(got, want, "pair")
    assert mx.abs(got - whole.read(tokens, base.model.new_cache(), 4)).max().item() > 1e-3


def test_flops_count_what_each_model_reads(folder, pair):
    """The auxiliary and the maps read all but the last `keep` tokens, the base those and the first `sinks`."""
    base = load_path(folder)
    loaded = load_pair(pair, base)
    models = base.model, loaded.auxiliary, loaded.predictor
    sizes = [sum(v.size for _, v in tree_flatten(model.parameters())) for model in models]
    one = arms.Arm("pair", Setup(base.model, loaded.dialled(keep=8)))
    assert SINKS == 4
    assert one.flops(100) == 2 * (92 * (sizes[1] + sizes[2]) + 12 * sizes[0])
    assert one.flops(8) == arms.Arm("base", Setup(base.model)).flops(8) == 2 * 8 * sizes[0]


def test_filters():
    fields = {"arm": "OE1.1B-KVP-LP-0.50", "device": "cpu", "batch": 64, "tokens": 59}
    assert selected(fields, [])
    assert selected(fields, ["arm=KVP", "batch=1", "batch=64"])
    assert not selected(fields, ["batch=6"])
    assert not selected(fields, ["arm=KVP", "tokens=64"])


def test_a_condition_names_a_key_and_a_value():
    checked = condition(ttft.FILTERS)
    assert checked("arm=a=b") == "arm=a=b"
    for text in ("round=1", "arm", "arm=", "=1"):
        with pytest.raises(argparse.ArgumentTypeError, match="wanted KEY=VALUE with a KEY of arm, device, batch"):
            checked(text)


def test_a_median_is_of_all_values_of_the_samples_with_these_fields():
    samples = [{"a": 1, "b": 1, "s": [1, 9]}, {"a": 1, "b": 2, "s": 2}, {"a": 2, "s": 7}, {"a": 1, "error": "none"}]
    assert median_of(samples, "s", a=1) == 2
    assert median_of(samples, "s", a=1, b=1) == 5
    assert median_of(samples, "s", a=3) is None
    assert median_of(samples, "t") is None


def test_a_table_has_rows():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert table(["a", "b"], []) == ""


def test_medians_and_spread():
    samples = [
        {"device": "cpu", "batch": 2, "tokens": 10, "arm": "a", "ttft_s": t, "step_s": t / 10} for t in (1, 4, 2)
    ]
    (found,) = report.medians(samples).values()
    assert (found["ttft_s"], found["spread_s"], found["passes"]) == (2, 3, 3)
    assert (found["prompt_tps"], found["decode_tps"]) == (10, 10)


def test_the_first_token_and_the_steps_are_timed_apart(folder, monkeypatch):
    """On a clock that shows how many arrays were evaluated: the prompt, its first token, then one token a step."""
    model, evaluated = load_path(folder).model, []
    eval_ = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (evaluated.append(arrays), eval_(*arrays)))
    monkeypatch.setattr(
        ttft, "time", SimpleNamespace(perf_counter=lambda: sum(len(a[0].shape) == 1 for a in evaluated))
    )
    found = ttft.measure(arms.Arm("a", Setup(model)), ttft.Point(2, 8), 8, steps=4)
    assert (found["ttft_s"], found["step_s"]) == (1, 1)
    assert ttft.measure(arms.Arm("a", Setup(model)), ttft.Point(2, 8), 8, steps=0)["step_s"] is None


def test_the_settings_of_a_measurement_are_used(folder, monkeypatch):
    base, calls = load_path(folder).model, []

    def measure(arm, point, step_size, steps):
        calls.append((point, step_size, steps))
        return {"ttft_s": float(len(calls)), "step_s": 1.0, "load_average": 0.0}

    monkeypatch.setattr(ttft, "measure", measure)
    results = ttft.Results(Samples(None, {}, ttft.KEYS))
    group = ttft.Group(["a"], lambda names: [arms.Arm("a", Setup(base))], [ttft.Point(1, 8)])
    ttft.run([group], ["cpu"], ttft.Settings(rounds=3, warmup=2, steps=5, step_size=4), [], results)
    assert calls == [(ttft.Point(1, 8), 4, 5)] * 5
    assert [sample["ttft_s"] for sample in results.samples.all] == [3, 4, 5]


def test_comparisons_with_the_paper_have_known_answers():
    """Made-up samples: the base takes 8 s at Table 5's point, and the pair 2.5 s; 0.25 s a decode step."""

    def sample(arm, batch, tokens, seconds):
        place = {"device": "cpu", "batch": batch, "tokens": tokens, "arm": arm, "round": 0, "load_average": 0}
        return place | {"ttft_s": seconds, "step_s": 0.25}

    pair = "OE1.1B-KVP-C-450M"
    samples = Samples(None, {}, ttft.KEYS)
    for each in (
        *(("OE1.1B", 64, 59, 8.0), (pair, 64, 59, 2.5), ("OE3B", 1, 1024, 6.0)),
        *((pair, 8, 128, 1.5), ("OE450M", 8, 128, 1.2), (pair, 8, 64, 1.0), ("OE450M", 8, 64, 1.0)),
    ):
        samples.add(sample(*each))
    counted = {
        "OE1.1B": {"base": 1100, "flops_512": 1000},
        "OE450M": {"base": 440, "flops_512": 500},
        pair: {"base": 1100, "auxiliary": 440, "predictor": 10, "flops_512": 625},
    }
    text = report.tables(ttft.Results(samples, counted), {"cpu": "x"}, suite=True)
    lines = text.splitlines()
    assert "| OE1.1B | 8.00 | 1.00 | 5.59 | 1.00 |" in lines
    assert f"| {pair} | 2.50 | 3.20 | 3.17 | 1.76 |" in lines
    assert f"| {pair} | 2.50 | 2.36 | 1.60 |" in lines
    assert "| OE450M | 2.50 | 2.36 | 2.00 |" in lines
    paper = "paper, M2 Pro CPU"
    assert (
        f"Figure 1, OE3B, batch 1 x 1024: cpu here 6.00 s, 24.0 decode steps; {paper}: 4.8 s, 12 decode steps" in lines
    )
    [figure] = [line for line in lines if line.startswith("Figure 5b")]
    assert figure == f"Figure 5b, {pair} over OE450M, batch 8 x 128: cpu here +25%; {paper}: +10 to +20%"


def test_samples_refuse_what_they_do_not_know(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("no JSON\n")
    with pytest.raises(MlxeffError, match="line 1: wanted JSON"):
        Samples(path, {"a": 1}, ["k"])
    with pytest.raises(MlxeffError, match="cannot be written"):
        Samples(tmp_path / "none" / "s", {"a": 1}, ["k"])


def test_samples_that_are_not_held_are_measured_again(tmp_path):
    path = tmp_path / "s.jsonl"
    for value in (1, 2):
        Samples(path, {"a": 1}, ["k"]).add({"k": value, "good": value == 2})
    again = Samples(path, {"a": 1}, ["k"], lambda sample: sample["good"])
    assert again.done() == {(2,)}
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(MlxeffError, match=r"\(a differ\): begin anew"):
        Samples(path, {"a": 2}, ["k"], remedy="begin anew")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "wanted MODEL or --suite, got neither"),
        (["m", "--suite", "kvp-paper"], "wanted MODEL or --suite, got both"),
        (["m", "--dtype", "float16"], "--dtype is not for a MODEL"),
        (["m", "--checkpoint", "3B=x"], "--checkpoint is not for a MODEL"),
        (["--suite", "kvp-paper", "--kv-predict", "p"], "--kv-predict is not for --suite"),
        (["--suite", "kvp-paper", "--ignore-keys", "x"], "--ignore-keys without --checkpoint is not for --suite"),
        (["--suite", "kvp-paper", "--compute", "int8"], "--compute is not for --suite"),
        (["--suite", "kvp-paper", "--kv-dtype", "float16"], "--kv-cache is not for --suite"),
        (["m", "--kv-predict", "p:refine"], "refine changes nothing before the first token"),
        (["m", "--memory", "0"], "--memory: wanted GB above 0"),
        (["FOLDER", "--only", "batch=3"], "--only batch=3: no measurement is left"),
        (["FOLDER", "--prompt-lengths", "99999"], "but the context is 256 tokens"),
    ],
)
def test_bad_input_is_one_line(options, words, folder):
    options = [str(folder) if option == "FOLDER" else option for option in options]
    assert words in fails("bench", "ttft", *options, "--offline")
