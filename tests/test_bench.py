"""`mlxeff bench`: real processes on tiny models; the file of samples, what is left out, what is computed. Some 40 s."""

import argparse
import csv
import io
import json
from statistics import median
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff.assembly.model import build_model, load_path
from mlxeff.assembly.pair import load_pair
from mlxeff.bench import arms, kvp_paper, passes, rounds
from mlxeff.bench.points import FILTERS, Point
from mlxeff.bench.rows import rows
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
from tiny_model import GEMMA, write_foreign, write_random_model, write_tiny_model

PLACE = ("arm", "device", "test")
SHORT = ("-p", "8", "-n", "4")
KEYS = {*PLACE, "batch", "tokens", "depth", "round", "values", "load_average", "bytes_moved", "flops"}


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


def test_a_model_beside_its_pairs(folder, pair):
    out, err = mlxeff("bench", "ttft", folder, "--vs", f"--kv-predict {pair}", "--vs", f"--kv-predict {pair}:keep=8",
                      "-r", 2, "--batch", "1,3", "-p", "16,40", "--json", "--device", "cpu",
                      "--threads", 1)  # fmt: skip
    found = json.loads(out)
    assert (found["format"], found["version"]) == ("mlxeff-bench", 1)
    names = [f"{folder}", f"{folder} --kv-predict {pair}", f"{folder} --kv-predict {pair}:keep=8"]
    tests = [f"pp{n}{batch}" for n in (16, 40) for batch in ("", " x3")]
    want = {(a, "cpu", t, r) for t in tests for a in names for r in range(2)}
    assert {tuple(s[k] for k in (*PLACE, "round")) for s in found["samples"]} == want
    assert all(set(sample) == KEYS for sample in found["samples"])
    assert (found["card"]["threads"], found["settings"]["activations"]) == (1, "float32")
    for row in found["results"]:
        values = [s["values"][row["metric"]] for s in found["samples"] if all(s[k] == row[k] for k in PLACE)]
        assert (row["median"], row["count"], row["low"]) == (median(values), 2, None)
    for sample in found["samples"]:
        assert sample["values"]["prompt_tps"] == pytest.approx(
            sample["batch"] * sample["tokens"] / sample["values"]["ttft_s"]
        )
    assert [sample["arm"] for sample in found["samples"][:6]] == names * 2  # the arms take turns
    assert {(r["arm"], r["against"]) for r in found["ratios"]} == {(name, names[0]) for name in names[1:]}
    assert "ttft_s" in err


def test_the_arithmetic_is_that_of_the_options(folder):
    command = ["bench", "ttft", folder, "-p", "16", "-r", 1, "--json", "--device", "cpu"]
    found = json.loads(mlxeff(*command)[0])["settings"]
    assert (found["compute"], found["kv_dtype"]) == ("exact", "float32")
    if not native_for():
        assert "only the native CPU kernels have them" in fails(*command, "--compute", "int8")
        return
    found = json.loads(mlxeff(*command, "--compute", "int8", "--kv-dtype", "float16", "--vs", "--compute bf16")[0])
    assert (found["settings"]["compute"], found["settings"]["kv_dtype"]) == ("int8", "float16")
    flags = [arm["flags"] for arm in found["arms"].values()]
    assert flags == ["--compute int8 --kv-cache float16", "--compute bf16"]


def test_decoding_has_the_names_of_llama_bench(folder):
    """N tokens are decoded after `depth` others; drafts are verified, and the text is read from a file."""
    text = folder / "text"
    text.write_text("the quick brown fox the quick brown fox " * 8)
    found = json.loads(mlxeff("bench", "decode", folder, "-p", "8,0", "-n", "0,5", "-d", "0,24", "-r", 3, "-o", "json",
                              "--text", text, "--vs", "--prompt-lookup", "--vs", "--kv-cache float16")[0])  # fmt: skip
    assert {row["test"] for row in found["results"]} == {"pp8", "tg5", "pp8 @ d24", "tg5 @ d24"}
    metrics = {(row["test"], row["metric"]) for row in found["results"] if row["arm"] == str(folder)}
    assert {("pp8", "ttft_s"), ("pp8", "prompt_tps"), ("tg5", "decode_tps"), ("tg5 @ d24", "ttft_s")} < metrics
    assert ("pp8", "decode_tps") not in metrics
    assert ("tg5", "ttft_s") not in metrics
    assert all(row["low"] <= row["median"] <= row["high"] for row in found["results"])
    moved = {(s["arm"].partition(" ")[2], s["test"]): s["bytes_moved"] for s in found["samples"]}
    model = load_path(folder).model
    kept = sum(2 * groups * size for groups, size in model.kv_shapes)
    weights = arms.Arm("a", Setup(model)).read_bytes
    # In the middle of the decoding, 24 tokens and half of 5 are in the cache.
    assert moved["", "tg5 @ d24"] == pytest.approx(weights + 4 * kept * (24 + 5 / 2))
    assert moved["--kv-cache float16", "tg5 @ d24"] < moved["", "tg5 @ d24"]
    assert moved["--prompt-lookup", "tg5"] is None  # it depends on the text
    assert found["settings"]["prompt"]["origin"].startswith("text (sha256 ")
    assert {ratio["rounds"] for ratio in found["ratios"]} == {3}


def test_a_model_that_mlx_lm_computes_is_measured(tmp_path):
    folder = write_foreign(tmp_path / "gemma", GEMMA)
    found = json.loads(mlxeff("bench", "decode", folder, *SHORT, "-d", "0,8", "-r", 1, "--json")[0])
    metrics = {(row["test"], row["metric"]) for row in found["results"]}
    assert {("pp8", "ttft_s"), ("tg4", "decode_tps"), ("tg4 @ d8", "decode_tps")} < metrics
    assert {sample["bytes_moved"] for sample in found["samples"]} == {None}


def test_formats_have_the_same_rows(folder):
    command = ["bench", "decode", folder, "-p", "8", "-n", "0", "-r", 1, "--quiet"]
    lines = [json.loads(line) for line in mlxeff(*command, "-o", "jsonl")[0].splitlines()]
    assert [line["metric"] for line in lines] == ["ttft_s", "prompt_tps", "peak_bytes"]
    assert {"cpu", "mlxeff", "threads"} < set(lines[0])
    read = list(csv.DictReader(io.StringIO(mlxeff(*command, "-o", "csv")[0])))
    want = [(line["metric"], "pp8", "1") for line in lines]
    assert [(row["metric"], row["test"], row["count"]) for row in read] == want
    assert f"| {folder} | cpu | pp8 | " in mlxeff(*command)[0]
    _, err = mlxeff(*command, "-o", "csv", "--json", code=1)
    assert "wanted one of the two" in err


def test_the_file_of_samples_is_gone_on_with(folder, tmp_path):
    command = ["bench", "ttft", folder, "-p", "8,16", "--out", tmp_path / "s.jsonl", "--json", "--quiet"]
    whole = json.loads(mlxeff(*command)[0])["samples"]
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == whole
    (tmp_path / "s.jsonl").write_text("\n".join(lines[:4]) + '\n{"device": "cp')  # killed in the fourth
    again = json.loads(mlxeff(*command)[0])["samples"]
    assert again[:3] == whole[:3]
    assert [[s[k] for k in rounds.KEYS] for s in again] == [[s[k] for k in rounds.KEYS] for s in whole]
    assert again[3:] != whole[3:]
    assert "holds samples made otherwise (steps differ)" in fails(*command[:-2], "--steps", 7)
    (tmp_path / "s.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "s.jsonl: wanted a file of samples: " in fails(*command[:-2])


@pytest.mark.slow
def test_a_real_model_is_measured_beside_itself(smollm2_gguf):
    """The built-in model, with drafts of QuantSpec and with none: counts and bytes that follow from its shape."""
    out, err = mlxeff("bench", "decode", "smollm2-135m", "-p", "0", "-n", "12", "-d", "64", "-r", 3, "--json",
                      "--vs", "--quantspec --num-draft-tokens 2", "--vs", "--quantspec --draft-weights q4",
                      "--device", "cpu")  # fmt: skip
    found = json.loads(out)
    plain, drafted, copied = found["arms"].values()
    assert plain["base"] == pytest.approx(134.5e6, rel=0.001)
    row = next(r for r in found["results"] if r["metric"] == "decode_tps" and r["arm"] == "smollm2-135m")
    kept = 2 * 30 * 3 * 64 * (4 if found["settings"]["kv_dtype"] == "float32" else 2)
    assert row["bytes_moved"] == pytest.approx(plain["weight_bytes"] + kept * (64 + 6), rel=0.01)
    ceiling = found["ceilings"]["cpu"]["read_gbps"]
    assert row["share_of_ceiling"] == pytest.approx(row["bytes_moved"] * row["median"] / 1e9 / ceiling)
    shares = [r["median"] for r in found["results"] if r["metric"] == "acceptance"]
    assert 1 <= len(shares) <= 2  # where drafting does not pay, the second arm drafts nothing
    assert all(0 <= share <= 1 for share in shares)
    assert copied["weight_bytes"] > 1.1 * plain["weight_bytes"]
    assert drafted["weight_bytes"] == plain["weight_bytes"]  # weights of 4 bits are shared with the draft
    assert "drafts follow random tokens here" in err


def test_a_disk_that_fills_loses_no_sample(folder, tmp_path):
    """The file may have 2000 bytes, which are fewer than its samples: the rest stays in the result, and a later run
    goes on after those that are in the file."""
    path = tmp_path / "s.jsonl"
    command = ["bench", "decode", folder, *SHORT, "-r", 6, "--json", "--device", "cpu", "--out", path]
    out, err = mlxeff(*command, code=1, limit=2000, PYTHONDONTWRITEBYTECODE="1")
    whole = json.loads(out)["samples"]
    assert len(whole) == 12
    assert err.count("s.jsonl: cannot be written: File too large: this sample and those that follow are not kept") == 1
    kept = [json.loads(line) for line in path.read_text().splitlines()[1:] if line.endswith("}")]
    assert 0 < len(kept) < 12
    assert kept == whole[: len(kept)]
    again = json.loads(mlxeff(*command)[0])["samples"]
    assert again[: len(kept)] == kept
    assert {tuple(s[k] for k in rounds.KEYS) for s in again} == {tuple(s[k] for k in rounds.KEYS) for s in whole}


def test_the_suite_measures_all_models_of_the_paper(checkpoints):
    out, _ = mlxeff("bench", "suite", "kvp-paper", *checkpoints, "--only", "batch=1", "batch=64", "tokens=64",
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
    out, _ = mlxeff("bench", "suite", "kvp-paper", *checkpoints, "--only", "arm=OE1.1B", "batch=64",
                    "--rounds", 1, "--warmup", 0, "--quiet", "--device", "cpu")  # fmt: skip
    assert "Table 5, M2 Pro CPU" in out
    lines = [line for line in out.splitlines() if "| OE1.1B-KVP-LP-0.50 | cpu | pp59 x64 |" in line]
    assert [line.split(" | ")[5:7] for line in lines[1:]] == [["3.33 s", "published"], ["1.68 x", "published"]]
    assert "weights: as stored" in out


def test_random_weights_have_the_published_shapes_and_share_what_is_shared():
    """Nothing is computed: the weights of 1.1B stay lazy."""
    group = kvp_paper.groups(mx.float16, {})[0]
    made = {arm.name: arm for arm in group.build(group.names)}
    for name, theirs in kvp_paper.TABLE_5.items():
        described = made[name].describe()
        reduction = made["OE1.1B"].describe()["base"] / described.get("auxiliary", described["base"])
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
    _, err = mlxeff("bench", "ttft", folder, "-p", "8,200", "--batch", "1,64", "--memory", 0.02, "--json",
                    "--rounds", 1)  # fmt: skip
    assert err.count("skipped") == 1
    assert "skipped: " in err and "pp200 x64 on cpu: needs about" in err  # noqa: PT018
    out, err = mlxeff("bench", "suite", "kvp-paper", "--only", "arm=OE3B-LP", "--memory", 1, "--json")
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
    checked = condition(FILTERS)
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


def sample(arm, point, number=0, **values):
    return point.fields(arm, "cpu") | {"round": number, "values": values, "load_average": 0}


def test_the_first_token_and_the_steps_are_timed_apart(folder, monkeypatch):
    """On a clock that shows how many arrays were evaluated: the prompt, its first token, then one token a step."""
    model, evaluated = load_path(folder).model, []
    eval_ = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (evaluated.append(arrays), eval_(*arrays)))
    clock = SimpleNamespace(perf_counter=lambda: sum(len(a[0].shape) == 1 for a in evaluated))
    monkeypatch.setattr(passes, "time", clock)
    arm, ids = arms.Arm("a", Setup(model)), np.ones((2, 8), int)
    found = arm.measure(Point(2, 8), ids, 8, steps=4)["values"]
    assert (found["ttft_s"], found["prompt_tps"], found["decode_tps"]) == (1, 16, 2)
    assert "decode_tps" not in arm.measure(Point(2, 8), ids, 8, steps=0)["values"]


def test_a_decode_rate_leaves_the_first_token_out(folder, monkeypatch):
    """On a clock that goes on by 5 s with the prompt and by 1 s with each token after the first."""
    times = iter([0.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(passes, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    arm = arms.Arm("a", Setup(load_path(folder).model))
    found = arm.measure(Point(1, 4, 6, "tg"), np.ones((1, 6), int), 8, steps=0)["values"]
    assert (found["decode_tps"], found["ttft_s"]) == (1, 5)


def test_the_settings_of_a_measurement_are_used(folder, monkeypatch):
    base, calls = load_path(folder).model, []

    def measure(arm, point, ids, step_size, steps):
        calls.append((point, ids.shape, step_size, steps))
        return {"values": {"ttft_s": float(len(calls))}}

    monkeypatch.setattr(passes, "measure", measure)
    results = rounds.Results(Samples(None, {}, rounds.KEYS))
    group = rounds.Group(["a"], lambda names: [arms.Arm("a", Setup(base))], [Point(1, 8)])
    rounds.run([group], ["cpu"], rounds.Settings(rounds=3, warmup=2, steps=5, step_size=4), [], results)
    assert calls == [(Point(1, 8), (1, 8), 4, 5)] * 5
    assert [each["values"]["ttft_s"] for each in results.samples.all] == [3, 4, 5]


def test_an_arm_that_fails_is_left_out_and_the_others_go_on(folder, monkeypatch):
    base = load_path(folder).model

    def measure(arm, point, *_):
        if arm.name == "b":
            raise MlxeffError("no more")
        return {"values": {"ttft_s": 1.0}}

    monkeypatch.setattr(passes, "measure", measure)
    results = rounds.Results(Samples(None, {}, rounds.KEYS))
    made = {name: arms.Arm(name, Setup(base)) for name in "abc"}
    group = rounds.Group(list(made), lambda names: [made[name] for name in names], [Point(1, 8)])
    rounds.run([group], ["cpu"], rounds.Settings(rounds=2), [], results)
    assert [(s["arm"], s["round"]) for s in results.samples.all] == [("a", 0), ("c", 0), ("a", 1), ("c", 1)]
    assert results.skipped == ["b, pp8 on cpu: no more"]
    assert results.failed


def test_comparisons_with_the_paper_have_known_answers():
    """Made-up samples: the base takes 8 s at Table 5's point, and the pair 2.5 s; 0.25 s a decode step."""
    pair = "OE1.1B-KVP-C-450M"
    made = [
        sample(arm, Point(batch, tokens), ttft_s=seconds, decode_tps=batch / 0.25)
        for arm, batch, tokens, seconds in (
            *(("OE1.1B", 64, 59, 8.0), (pair, 64, 59, 2.5), ("OE3B", 1, 1024, 6.0)),
            *((pair, 8, 128, 1.5), ("OE450M", 8, 128, 1.2), (pair, 8, 64, 1.0), ("OE450M", 8, 64, 1.0)),
        )
    ]
    counted = {
        "OE1.1B": {"base": 1100, "flops_512": 1000},
        "OE450M": {"base": 440, "flops_512": 500},
        pair: {"base": 1100, "auxiliary": 440, "predictor": 10, "flops_512": 625},
    }
    lines = kvp_paper.published(rows(made), counted)
    assert {line["label"] for line in lines} == {"published"}
    found = {
        (line["arm"], line["test"], line["metric"], line["what"]): (line["ours"], line["theirs"]) for line in lines
    }
    assert found["OE1.1B", "pp59 x64", "ttft_s", "TTFT"] == (8, 5.59)
    assert found[pair, "pp59 x64", "ttft_s", "TTFT"] == (2.5, 3.17)
    assert found["OE1.1B", "pp59 x64", "ttft_reduction", "TTFT reduction"] == (1, 1)
    assert found[pair, "pp59 x64", "ttft_reduction", "TTFT reduction"] == (3.2, 1.76)
    assert found[pair, "", "flops_reduction", "FLOPs reduction"] == (2.5, 2.36)
    assert found[pair, "pp512", "flops_reduction", "FLOPs reduction with predictor and last token"] == (1.6, None)
    assert found["OE450M", "", "flops_reduction", "FLOPs reduction"] == (2.5, 2.36)
    assert found["OE3B", "pp1024", "ttft_s", "TTFT"] == (6, 4.8)
    assert found["OE3B", "pp1024", "ttft_steps", "TTFT in decode steps"] == (24, 12)
    [excess] = [line for line in lines if line["metric"] == "ttft_excess"]
    assert (excess["arm"], excess["test"], excess["ours"]) == (pair, "pp128 x8", pytest.approx(0.25))


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
        (["ttft", "m", "--kv-predict", "p:refine"], "refine changes nothing before the first token"),
        (["ttft", "FOLDER", "--memory", "0"], "--memory: wanted GB above 0"),
        (["ttft", "m", "--vs", "m"], "wanted another model or other options, got 'm' twice"),
        (["decode", "m", "-p", "0", "-n", "0"], "wanted -p or -n above 0, got neither"),
        (["decode", "m", "--vs", "--num-draft-tokens 3"], "--num-draft-tokens: wanted --quantspec"),
        (["suite", "kvp-paper", "--ignore-keys", "x"], "--ignore-keys is of --checkpoint: wanted one, got none"),
        (["ttft", "FOLDER", "--only", "batch=3"], "--only batch=3: no measurement is left"),
        (["ttft", "FOLDER", "-p", "99999"], "but the context is 256 tokens"),
        (["decode", "FOLDER", "-p", "0", "-n", "200", "-d", "200"], "tg200 @ d200: 400 tokens, but the context is 256"),
        (["decode", "FOLDER", *SHORT, "-d", "8", "--kv-predict", "PAIR"], "reads a prompt into an empty cache"),
        (["decode", "FOLDER", *SHORT, "--text", "/no/such"], "/no/such: cannot be read"),
    ],
)
def test_bad_input_is_one_line(options, words, folder, pair):
    names = {"FOLDER": folder, "PAIR": pair}
    assert words in fails("bench", *(names.get(option, option) for option in options), "--offline")


def test_a_value_of_vs_may_begin_with_a_dash(folder):
    _, err = mlxeff("bench", "ttft", folder, "--vs", "--kv-cache int9", code=2)
    assert "argument --vs: argument --kv-cache/--kv-dtype: invalid choice: 'int9'" in err
    _, err = mlxeff("bench", "ttft", folder, "--vs", "", code=2)
    assert "argument --vs: wanted a MODEL, options or both, got an empty text" in err
