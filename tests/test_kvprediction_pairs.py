"""Pairs on disk, the command, and CoreNet's checkpoints: real folders and processes, one line for each bad input."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlxeff.convert import convert

import checkpoint_files as files
from helpers import assert_close
from kvp import questions
from kvp.pairs import SHIPPED, TRAINED
from mlxeff import fit_kv_predictor, hub
from mlxeff.assembly.model import load_model, load_path
from mlxeff.assembly.pair import load_pair, make_auxiliary
from mlxeff.decode import Setup
from mlxeff.errors import MlxeffError
from mlxeff.generation import stream_generate
from mlxeff.kernels import device
from mlxeff.kvprediction import Predictor, predict
from mlxeff.kvprediction.files import PairConfig, read_config, write_pair
from mlxeff.modules import QuantizedLinear
from mlxeff.running import RunOptions
from mlxeff.tuning import Tuned
from test_cli import environment, fails, mlxeff
from tiny_model import write_byte_tokenizer, write_tiny_model

PROMPT = "The auxiliary reads the prompt, the base answers."


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("kvp") / "base", {"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def base(base_folder):
    return load_path(base_folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(c) for c in np.random.default_rng(2).integers(32, 127, 1500)))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, base_folder, text):
    folder = tmp_path_factory.mktemp("fitted") / "pair"
    mlxeff("fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--out", folder, "--text", text, "--tokens", 1000,
           "--length", 100, "--inputs", "own", "--quiet")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, base_folder, text):
    """bits → (a pair as `fitted`, but of maps of `bits` bits; the report)."""
    place = tmp_path_factory.mktemp("rounded")
    made = {}
    for bits in (4, 8):
        out, _ = mlxeff("fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--out", place / str(bits), "--text",
                        text, "--tokens", 1000, "--length", 100, "--inputs", "own", "--map-bits", bits,
                        "--json")  # fmt: skip
        made[bits] = place / str(bits), json.loads(out)
    return made


@pytest.fixture
def pair(tmp_path, fitted):
    """A copy that a test may damage."""
    return shutil.copytree(fitted, tmp_path / "pair")


@pytest.fixture
def quantised(tmp_path, rounded):
    return shutil.copytree(rounded[8][0], tmp_path / "quantised")


def edit(folder, **changes):
    """Change keys of config.json; None deletes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_fit_then_generate(pair, base_folder):
    config = read_config(pair)
    assert (config.layers, config.layer_map, config.shared) == ([0, 2], [0, 0, 1, 1], 1)
    assert (config.provenance["text"], config.provenance["tokens"]) == ("text.txt", 1011)
    assert config.provenance["errors"][0] == [0, 0]  # layer 0 is in both models
    out, err = mlxeff("generate", PROMPT, "--model", base_folder, "--kv-predict", pair, "--max-tokens", 4, "--raw")
    assert f"mlxeff: note: KV prediction: the KV of 49 of 50 prompt tokens is predicted by {pair}, not computed" in err
    assert "| KV of 49 tokens predicted |" in err
    assert out


def test_json_tells_what_was_predicted_kept_and_refined(pair, base_folder):
    arguments = ("generate", PROMPT, "--model", base_folder, "--raw", "--json", "--max-tokens", 5)
    document = json.loads(mlxeff(*arguments, "--kv-predict", f"{pair}:keep=10:refine")[0])
    assert document["timings"]["kv_prediction"] == {
        "pair": str(pair), "keep": 10, "refine": True, "predicted_tokens": 36,
        "refined_tokens": 46 + (device() == "gpu"),  # a GPU has one token more in its cache by then
    }  # fmt: skip
    assert any("36 of 50 prompt tokens is predicted" in line for line in document["notices"])
    plain = json.loads(mlxeff(*arguments)[0])
    assert plain["timings"]["kv_prediction"] is None
    kept = json.loads(mlxeff(*arguments, "--kv-predict", f"{pair}:keep=50")[0])
    assert kept["token_ids"] == plain["token_ids"]
    assert "KV prediction: not used: all 50 prompt tokens are computed by the base" in kept["notices"]


def test_the_same_command_gives_the_same_pair(pair, base_folder, text, tmp_path):
    again = tmp_path / "again"
    arguments = ("--aux", "lp:0.5", "--text", text, "--tokens", 1000, "--length", 100, "--inputs", "own", "--json")
    report = json.loads(mlxeff("fit", "kv-predictor", base_folder, *arguments, "--out", again)[0])
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (pair / name).read_bytes()
    assert report["parameters"]["predictor"] == 6 * (32 * 32 + 32)
    assert 0.5 < report["flops_ratio"] < 0.8
    assert report["tokens"] == 1011


def test_fit_without_text_and_with_a_model_as_auxiliary(base_folder, tmp_path):
    write_tiny_model(tmp_path / "small", {"num_hidden_layers": 2, "hidden_size": 32, "num_key_value_heads": 4}, seed=3)
    arguments = ("--tokens", 600, "--length", 50, "--search", "--per-head", "--inputs", "own", "--json")
    run = mlxeff("fit", "kv-predictor", base_folder, "--aux", "small", "--out", "pair", *arguments, cwd=tmp_path)
    report = json.loads(run[0])
    assert report["notices"] == ["fit: no --text: the base writes 600 tokens itself"]
    assert report["auxiliary"]["model"] == str(tmp_path / "small")
    _, err = mlxeff("generate", PROMPT, "--model", base_folder, "--kv-predict", "pair", "--max-tokens", 2, cwd=tmp_path)
    assert "is predicted by pair" in err


def test_training_by_the_command_goes_on_where_it_was_killed(base_folder, text, tmp_path):
    fit = ("fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--text", text, "--tokens", 600, "--length", 60)
    steps = ("--steps", 60, "--batch", 2, "--rate", 0.01)
    report = json.loads(mlxeff(*fit, *steps, "--out", tmp_path / "whole", "--json")[0])
    assert len(report["losses"]) == 60
    assert np.mean(report["losses"][-10:]) < np.mean(report["losses"][:10])
    out = tmp_path / "killed"
    killed = f"""
import sys
from mlxeff import cli, training
save = training._save
def once(*arguments):
    save(*arguments)
    sys.exit(9)
training._save = once
cli.main({[str(each) for each in (*fit, *steps, "--out", out)]!r})
"""
    run = subprocess.run([sys.executable, "-c", killed], env=environment(), capture_output=True, timeout=120)
    assert run.returncode == 9, run.stderr
    assert [path.name for path in tmp_path.glob("killed*")] == ["killed.training"]
    mlxeff(*fit, *steps, "--out", out, "--quiet")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (tmp_path / "killed.training").exists()


def test_two_identical_trainings_at_once(base_folder, text, tmp_path):
    """One makes the pair, the other is refused in a line; nothing is left that stops a later one."""
    fit = ("fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--text", text, "--tokens", 600, "--length", 60)
    command = [sys.executable, "-m", "mlxeff", *map(str, fit), "--steps", "30", "--out", str(tmp_path / "out")]
    both = [subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [(process.communicate(timeout=120)[1].splitlines() or [""])[-1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1]
    assert errors[codes.index(1)].endswith("out: another process is making it")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tuned_pair_by_the_command(base_folder, base, text, tmp_path, method):
    """What is loaded predicts as the auxiliary that was trained, which is put together here from the stored tensors."""
    out = tmp_path / "pair"
    arguments = ("--tokens", 600, "--length", 60, "--train", method, "--json", *(("--rank", 3) * (method == "lora")))
    steps = ("--steps", 30, "--batch", 2, "--rate", 0.01)
    run = mlxeff(
        "fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--text", text, *arguments, *steps, "--out", out
    )
    report, config = json.loads(run[0]), read_config(out)
    tuned = {"method": "lora", "rank": 3} if method == "lora" else {"method": "full"}
    assert config.auxiliary == report["auxiliary"] == {"layers": [0, 2], "tuned": tuned}
    assert (config.inputs, config.provenance["losses"]) == ("hidden", report["losses"])
    assert np.mean(report["losses"][-5:]) < np.mean(report["losses"][:5])
    missing = [line for line in report["notices"] if "matplotlib is missing" in line]
    assert (out / "loss.png").exists() == (not missing)

    auxiliary = base.model.pruned([0, 2])
    modules, weights = Tuned(auxiliary, method, 3).modules, mx.load(str(out / "model.safetensors"))
    parts = {name: value.astype(mx.float32) for name, value in weights.items()}
    prefix = "auxiliary."
    modules.load_weights([(n.removeprefix(prefix), v) for n, v in parts.items() if n.startswith(prefix)])
    shapes = auxiliary.kv_shapes, base.model.kv_shapes
    predictor = Predictor(*shapes, [0, 0, 1, 1], "hidden", auxiliary.hidden_size)
    predictor.load_weights([(n, v) for n, v in parts.items() if not n.startswith(prefix)])
    loaded, tokens = load_pair(out, base), mx.array(np.random.default_rng(0).integers(0, 200, 30))
    want = predict(auxiliary, predictor, base.model, tokens, base.model.new_cache())
    got = predict(loaded.auxiliary, loaded.predictor, base.model, tokens, base.model.new_cache())
    assert_close(got, want, "loaded", rtol=2.0**-8)  # matrices of the base's own 16 bits
    untuned = predict(base.model.pruned([0, 2]), predictor, base.model, tokens, base.model.new_cache())
    assert mx.abs(untuned - want).max() > 10 * mx.abs(got - want).max()
    mlxeff("generate", PROMPT, "--model", base_folder, "--kv-predict", out, "--max-tokens", 2)


def test_distillation_by_the_command(base_folder, base, text, tmp_path):
    out = tmp_path / "pair"
    other = text.with_name("other.txt")
    parts = [text.read_text()[at : at + 70] for at in range(0, 1400, 70)]
    other.write_text("@MARK@".join(parts))
    arguments = ("--aux", "layers:0-1", "--text", text, "--tokens", 500, "--length", 100, "--steps", 30, "--batch", 4,
                 "--train-text", other, "--rate", 3e-3, "--loss", "distill", "--continuation", 8, "--prompt-mark",
                 "@MARK@", "--json")  # fmt: skip
    report = json.loads(mlxeff("fit", "kv-predictor", base_folder, *arguments, "--out", out)[0])
    assert f"fit: 19 prompts in {other}" in report["notices"]
    assert len(report["losses"]) == 30
    assert min(report["losses"]) > 0
    config = read_config(out)
    assert (config.shared, config.provenance["loss"], config.provenance["prompt_mark"]) == (2, "distill", "@MARK@")
    assert (config.provenance["text"], config.provenance["train_text"]) == ("text.txt", "other.txt")
    pair = load_pair(out, base)
    prompt, cache, want = mx.arange(30), base.model.new_cache(), base.model.new_cache()
    predict(pair.auxiliary, pair.predictor, base.model, prompt, cache)
    base.model.last_logits(prompt[None], want)
    for i in (0, 1):
        for mine, theirs in zip(cache.layers[i].state(), want.layers[i].state(), strict=True):
            assert_close(mine, theirs, f"shared layer {i}", rtol=2.0**-16)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--loss", "distill"), "--loss distill: wanted --steps of 1 or more, got none"),
        (("--train-text", "more.txt"), "--train-text more.txt: wanted --steps of 1 or more, got none"),
        (("--train-text", "no.txt", "--steps", 1), "no.txt: wanted UTF-8 text: "),
        (("--prompt-mark", "x", "--steps", 1), "--prompt-mark: wanted --loss distill and a --train-text, got paper"),
        (("--prompt-mark", "x", "--steps", 1, "--loss", "distill"),
         "--prompt-mark: wanted --loss distill and a --train-text, got distill, none"),
        (("--prompt-mark", "now" + "here", "--steps", 1, "--loss", "distill", "--train-text", __file__),
         "test_kvprediction_pairs.py: wanted 'now" + "here' where prompts end, got a text without it"),
        (("--steps", 1, "--loss", "distill", "--continuation", 98), "wanted sequences of at least 101 tokens, got 100"),
        (("--batch", 4), "--batch 4: wanted --steps, got none"),
        (("--rate", 0.1), "--rate 0.1: wanted --steps, got none"),
        (("--steps", 1, "--continuation", 8), "--continuation 8: wanted --loss distill, got none"),
        (("--steps", 1, "--rank", 8), "--rank 8: wanted --train lora, got none"),
        (("--steps", 1, "--aux-loss", 0), "--aux-loss 0.0: wanted --train lora or full, got none"),
        (("--per-head",), "--per-head: wanted --inputs own, which have heads, got hidden"),
        (("--aux", "OE1.1B-KVP-LP-0.50"),
         "OE1.1B-KVP-LP-0.50: wanted the base OpenELM-1_1B, 28 layers of 2048, got 4 layers of 64"),
        (("--aux", "some/model", "--offline"), "some/model: not in the cache and offline"),
    ],
)  # fmt: skip
def test_options_of_distillation_that_do_not_fit(base_folder, text, tmp_path, options, complaint):
    arguments = ("--aux", "lp:0.5", "--text", text, "--tokens", 1000, "--length", 100, "--out", tmp_path / "pair")
    assert complaint in fails("fit", "kv-predictor", base_folder, *arguments, *options)
    assert not (tmp_path / "pair").exists()


def test_a_training_text_of_marks_alone(base_folder, text, tmp_path):
    (tmp_path / "marks.txt").write_text("@@@@")
    fit = ("--aux", "lp:0.5", "--text", text, "--out", tmp_path / "pair", "--steps", 1, "--loss", "distill")
    complaint = fails(
        "fit", "kv-predictor", base_folder, *fit, "--prompt-mark", "@@", "--train-text", tmp_path / "marks.txt"
    )
    assert "marks.txt: wanted text to train on, got none" in complaint


def test_without_a_text_the_base_needs_a_first_token(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "bos_token"}))
    complaint = fails("fit", "kv-predictor", tmp_path / "base", "--aux", "lp:0.5", "--out", tmp_path / "pair")
    assert "base: wanted a token that text begins with (BOS), got none: name a --text" in complaint


def test_a_fit_without_steps_leaves_an_unfinished_training_alone(base_folder, text, tmp_path):
    kept = tmp_path / "pair.training"
    kept.write_bytes(b"hours")
    mlxeff("fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--text", text, "--tokens", 400, "--length", 100,
           "--out", tmp_path / "pair")  # fmt: skip
    assert kept.read_bytes() == b"hours"


def test_a_tuned_pair_does_not_choose_the_next_random_numbers(base):
    drawn, factors = [], []
    for seed in (1, 2):
        mx.random.seed(seed)
        factors.append(Tuned(base.model.pruned([0, 2]), "lora", 3).places[1].trained.a)
        drawn.append(mx.random.uniform(shape=(4,)))
    assert mx.array_equal(*factors)
    assert not mx.array_equal(*drawn)


def test_a_prompt_beyond_the_auxiliarys_context(base, pair):
    loaded = load_pair(pair, base)
    limit = loaded.auxiliary.context_length
    with pytest.raises(
        MlxeffError, match=f"wanted a prompt in the auxiliary's context of {limit} tokens, got {limit + 2}"
    ):
        loaded.read(base.model, base.model.new_cache(), mx.zeros((limit + 2,), mx.int32), 512)
    keeping = loaded.dialled(keep=8)  # of these the auxiliary reads none
    keeping.read(base.model, base.model.new_cache(), mx.zeros((limit + 2,), mx.int32), 512)


def test_weights_that_a_pair_cannot_hold(base, tmp_path):
    auxiliary = make_auxiliary("lp:0.5", base)
    predictor = Predictor(auxiliary.model.kv_shapes, base.model.kv_shapes, auxiliary.layer_map)
    predictor.key_maps[1].bias = mx.full(predictor.key_maps[1].bias.shape, 7e4)
    config = PairConfig({"name": "base", "fingerprint": base.fingerprint}, auxiliary.config, auxiliary.layer_map)
    with pytest.raises(MlxeffError, match=r"tensor key_maps\.1\.bias: wanted values that float16 can hold, got 7e\+04"):
        write_pair(tmp_path / "pair", lambda _: config, predictor, half=True)
    assert list(tmp_path.iterdir()) == []


def test_searched_layers_by_the_command(base_folder, text, tmp_path):
    arguments = ("--aux", "search:0.5", "--text", text, "--tokens", 400, "--length", 100, "--json")
    report = json.loads(mlxeff("fit", "kv-predictor", base_folder, *arguments, "--out", tmp_path / "pair")[0])
    found = {line.split(": ")[1]: float(line.rsplit(" ", 1)[1]) for line in report["notices"] if "layers" in line}
    assert found.keys() == {"layers 0,2", "layers 0,1"}
    assert "layers " + ",".join(map(str, report["auxiliary"]["layers"])) == min(found, key=found.get)


def test_loaded_pair_predicts_as_the_fitted_one(pair, base):
    loaded = load_pair(pair, base)
    auxiliary = make_auxiliary("layers:0,2", base).model
    weights = mx.load(str(pair / "model.safetensors"))
    predictor = Predictor(auxiliary.kv_shapes, base.model.kv_shapes, [0, 0, 1, 1], shared=1)
    predictor.load_weights(list(weights.items()))
    tokens = mx.array(np.random.default_rng(0).integers(0, 200, 30))
    models = (loaded.auxiliary, loaded.predictor), (auxiliary, predictor)
    got, want = (predict(*each, base.model, tokens, base.model.new_cache()) for each in models)
    assert_close(got, want, "loaded", rtol=0, atol=0)
    assert loaded.auxiliary.layers[1] is base.model.layers[2]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_maps_on_disk(fitted, rounded, base, bits):
    """The dense maps to the rounding of the scheme; what is loaded is what is stored; logits as near as 4 or 8 bits."""
    folder, report = rounded[bits]
    scheme = {"group_size": 32, "bits": bits, "mode": "affine"}
    assert read_config(folder).quantization == report["quantization"] == scheme
    assert "quantization" not in json.loads((fitted / "config.json").read_text())
    assert report["parameters"]["predictor"] == 6 * (32 * 32 + 32)
    stored, dense = (mx.load(str(each / "model.safetensors")) for each in (folder, fitted))
    for name, value in dense.items():
        if name.endswith(".bias"):
            assert_close(stored[name], value, name, rtol=0, atol=0)
            continue
        packed, scales, biases = (stored[name.removesuffix("weight") + part] for part in ("weight", "scales", "biases"))
        assert (packed.dtype, scales.dtype, biases.dtype) == (mx.uint32, mx.float16, mx.float16)
        got = mx.dequantize(packed, *(x.astype(mx.float32) for x in (scales, biases)), 32, bits)
        # Half a step, one more at the ends of a group, where 0 is made a value; float16 rounds weights and scales.
        bound = mx.repeat(1.5 * mx.abs(scales.astype(mx.float32)), 32, 1) + 2.0**-10 * mx.abs(value).max()
        assert (mx.abs(got - value) <= bound).all()
    pairs, tokens = [load_pair(each, base) for each in (fitted, folder)], mx.arange(30)
    assert {type(each) for each in pairs[1].predictor.key_maps} == {QuantizedLinear}
    for name, value in tree_flatten(pairs[1].predictor.parameters()):
        assert_close(value, stored[name], name, rtol=0, atol=0)
    want, got = (predict(each.auxiliary, each.predictor, base.model, tokens, base.model.new_cache()) for each in pairs)
    error = mx.abs(got - want).max() / mx.abs(want).max()
    assert 0 < error < {4: 0.2, 8: 0.0125}[bits]  # 1/15 and 1/255 of a group's range a weight, over three layers


def test_the_same_command_gives_the_same_quantised_pair(rounded, base_folder, text, tmp_path):
    arguments = ("--aux", "lp:0.5", "--text", text, "--tokens", 1000, "--length", 100, "--inputs", "own")
    fit = ("fit", "kv-predictor", base_folder, *arguments, "--map-bits", 8, "--out", tmp_path / "again")
    out, _ = mlxeff(*fit)
    assert ", maps of 8 bits in groups of 32, FLOPs to " in out
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (rounded[8][0] / name).read_bytes()


def test_compute_reaches_quantised_maps(rounded, fitted, base_folder):
    """In int8 mode the maps' product is another than the exact one of the same features, and near it."""
    base = load_path(base_folder)
    if base.model.native is None:
        pytest.skip("no native kernels here")
    options = RunOptions("int8")
    maps, dense = load_pair(rounded[8][0], base).predictor, load_pair(fitted, base).predictor
    auxiliary = base.model.pruned([0, 2])
    read = maps.read(auxiliary, mx.arange(40)[None], auxiliary.new_cache())
    rounds, exact = maps(read, options.compute), maps(read)
    for pair, other, third in list(zip(rounds, exact, dense(read), strict=True))[1:]:  # 0 has no maps
        for got, want, of_dense in zip(pair, other, third, strict=True):
            error = mx.abs(got - want).max() / mx.abs(want).max()
            assert 0 < error < 0.02  # 1/254 of a group's largest number, of 32 that differ in sign
            assert mx.abs(got - of_dense).max() > 0
    asked = []

    class Noted:
        read = staticmethod(maps.read)

        def __call__(self, reading, compute="exact"):
            asked.append(compute)
            return maps(reading, compute)

    auxiliary.use_native()
    mx.eval(predict(auxiliary, Noted(), base.model, mx.arange(40), base.model.new_cache(), options=options))
    assert asked == ["int8"]
    arguments = ("generate", PROMPT, "--model", base_folder, "--raw", "--max-tokens", 4, "--compute", "int8")
    _, err = mlxeff(*arguments, "--kv-predict", rounded[8][0])
    assert "KV of 49 tokens predicted" in err


def test_options_reach_a_pair_that_was_loaded_before(rounded, base_folder):
    """One loaded pair serves exact and rounded calls, in any order, and each is what it says."""
    base = load_path(base_folder)
    if base.model.native is None:
        pytest.skip("no native kernels here")
    pair = load_pair(rounded[8][0], base)
    ids = base.tokenizer.encode(PROMPT)

    def first(options):
        response = next(stream_generate(base.model, base.tokenizer, ids, reading=pair, options=options))
        assert pair.predicted_tokens == len(ids) - 1
        return response.logprobs

    exact, rounds, again = first(RunOptions()), first(RunOptions("int8", "float16")), first(RunOptions())
    assert mx.array_equal(exact, again)
    assert 0 < mx.abs(exact - rounds).max().item() < 1


def drop_scales(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["key_maps.1.scales"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "model.safetensors.index.json").unlink()


def scheme(**changes):
    return {"group_size": 32, "bits": 8, "mode": "affine"} | changes


KNOWN = "quantization: wanted group_size of (32, 64, 128), bits of (2, 3, 4, 5, 6, 8) and mode affine, got {"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: edit(p, quantization=scheme(bits=7)), KNOWN),
        (lambda p: edit(p, quantization=scheme(bits=8.0)), KNOWN),
        (lambda p: edit(p, quantization=scheme(bits=[8])), KNOWN),
        (lambda p: edit(p, quantization=scheme(group_size=16)), KNOWN),
        (lambda p: edit(p, quantization=scheme(mode="mxfp4")), KNOWN),
        (lambda p: edit(p, quantization=scheme(colour="red")), KNOWN),
        (lambda p: edit(p, quantization={"bits": 8}), KNOWN),
        (lambda p: edit(p, quantization=8), "quantization: wanted dict, got 8"),
        (lambda p: edit(p, quantization=scheme(bits=4)), "weight: wanted shape (32, 4), got (32, 8)"),
        (lambda p: edit(p, quantization=scheme(group_size=64)), "wanted inputs of a multiple of 64, got [32]"),
        (lambda p: edit(p, quantization=None), "12 unknown tensors: key_maps.0.biases"),
        (drop_scales, "missing 1 tensors: key_maps.1.scales"),
    ],
)
def test_damaged_quantised_pairs(quantised, base, change, complaint):
    change(quantised)
    with pytest.raises(MlxeffError) as caught:
        load_pair(quantised, base)
    assert complaint in str(caught.value)
    assert str(quantised) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [".bias", ".scales", ".biases"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_some_tensors_of_another_float_type(quantised, base, part, dtype):
    """The prediction differs by the rounding of these tensors and no more; nothing is refused by a kernel."""

    def predicted() -> mx.array:
        pair = load_pair(quantised, base)
        return predict(pair.auxiliary, pair.predictor, base.model, mx.arange(30), base.model.new_cache())

    want = predicted()
    weights = dict(mx.load(str(quantised / "model.safetensors")))
    mx.eval(want, weights)
    changed = {name: value.astype(dtype) if name.endswith(part) else value for name, value in weights.items()}
    mx.save_safetensors(str(quantised / "model.safetensors"), changed)
    error = mx.abs(predicted() - want).max() / mx.abs(want).max()
    assert error < 0.05  # bfloat16 keeps 8 bits of a scale


def test_a_dense_pair_that_says_it_is_quantised(pair, base):
    edit(pair, quantization=scheme())
    with pytest.raises(MlxeffError, match=f"{pair}: missing 12 tensors: key_maps.0.biases"):
        load_pair(pair, base)


def unshare(folder, **changes):
    """Give the shared first layer maps, and change the config."""
    maps = mx.load(str(folder / "model.safetensors"))
    moved = {
        f"{kind}.{int(i) + 1}.{part}": value for name, value in maps.items() for kind, i, part in [name.split(".")]
    }
    moved |= {name: value for name, value in maps.items() if ".0." in name}
    mx.save_safetensors(str(folder / "model.safetensors"), moved)
    (folder / "model.safetensors.index.json").unlink()
    edit(folder, shared=0, **changes)


def drop_tensor(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["value_maps.2.bias"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: edit(p, base={"name": "x", "fingerprint": "0123"}), "wanted the base x (0123), got "),
        (lambda p: edit(p, layer_map=[0, 0, 1, 2]), "layer map: base layer 3: wanted an auxiliary layer 0 to 1, got 2"),
        (lambda p: edit(p, layer_map=[0]), "layer map: wanted an auxiliary layer for each of 4 base layers, got 1"),
        (lambda p: edit(p, auxiliary={"layers": [0, 9]}), "auxiliary: wanted rising layers of 0 to 3, got [0, 9]"),
        (lambda p: edit(p, shared=0, auxiliary={"layers": [2, 0]}), "auxiliary: wanted rising layers of 0 to 3, "),
        (lambda p: edit(p, auxiliary={"layers": []}), "auxiliary: wanted layers, or a model and its fingerprint, got "),
        (lambda p: edit(p, auxiliary=None), "auxiliary: wanted dict, got None"),
        (lambda p: edit(p, version=9), "wanted format mlxeff-kv-pair version 1, got 'mlxeff-kv-pair' version 9"),
        (lambda p: edit(p, colour="red"), "unknown keys ['colour']"),
        (lambda p: edit(p, inputs="all"), "predictor: wanted inputs of own, hidden, got 'all'"),
        (lambda p: edit(p, inputs="hidden"), "wanted shape (32, 64), got (32, 32)"),
        (lambda p: unshare(p, auxiliary={"layers": [0, 2], "tuned": {"method": "lora", "rank": 2}}),
         "auxiliary: missing 28 tensors: layers.0.mlp.down_proj.a, "),
        (lambda p: edit(p, shared=0, auxiliary={"layers": [0, 2], "tuned": {"method": "more"}}), "wanted one of "),
        (lambda p: edit(p, shared=0, auxiliary={"layers": [0, 2], "tuned": {"rank": 2}}), "tuned: wanted a method, "),
        (lambda p: edit(p, shared=2), "shared: wanted 0 to 1 first layers that auxiliary and base share, got 2"),
        (lambda p: edit(p, shared=-1), "shared: wanted 0 to 1 first layers that auxiliary and base share, got -1"),
        (lambda p: edit(p, shared=True), "config.json: shared: wanted int, got True"),
        (lambda p: edit(p, shared=0), "missing 4 tensors: key_maps.3.bias, "),
        (lambda p: edit(p, layer_map=[1, 0, 1, 1]), "wanted 1 shared layers that read themselves, got [1]"),
        (lambda p: edit(p, auxiliary={"layers": [0, 2], "tuned": {"method": "full"}}), "shared: wanted 0 to 0 first "),
        (drop_tensor, "missing 1 tensors: value_maps.2.bias"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "model.safetensors"),
        (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
        (shutil.rmtree, "wanted the folder of a KV prediction pair or one of: smollm2-135m-0-18, smollm2-135m-0-21"),
        (lambda p: (p / "config.json").unlink(), "wanted the folder of a KV prediction pair, got no config.json there"),
    ],
)  # fmt: skip
def test_damaged_pairs(pair, base, change, complaint):
    change(pair)
    with pytest.raises(MlxeffError) as caught:
        load_pair(pair, base)
    assert complaint in str(caught.value)
    assert str(pair) in str(caught.value) or complaint == "model.safetensors"
    assert "\n" not in str(caught.value)


def test_the_pairs_that_come_with_the_package(smollm2_gguf):
    """Each lets its base look up nearly as many of twelve numbers as the base does alone, and is the recipe's."""
    base = load_path(smollm2_gguf)
    assert hub.pairs() == sorted(SHIPPED)
    asked = [(base.tokenizer.encode(text), answer) for text, answer in questions.sets()["numbers"][:12]]

    def right(**reading):
        said = [questions.answer(Setup(base.model, **reading), base.tokenizer, ids) for ids, _ in asked]
        return sum(questions.exact(each, answer) for each, (_, answer) in zip(said, asked, strict=True))

    most = right()
    assert most >= 6
    for name, recipe in SHIPPED.items():
        pair, config = load_pair(name, base), read_config(hub.resolve_pair(name))
        assert pair.name == name
        assert config.base["name"] == hub.DEFAULT_MODEL
        assert config.quantization["bits"] == 8
        assert len(config.provenance["losses"]) == TRAINED[recipe.removesuffix(" 8-bit")][0]
        assert right(reading=pair) >= most - 2
    assert all(mlxeff("models")[0].count(name) == 1 for name in SHIPPED)
    assert json.loads(mlxeff("models", "--json")[0])["pairs"] == hub.pairs()


def test_an_auxiliary_that_changed_or_has_another_vocabulary(base, tmp_path):
    write_tiny_model(tmp_path / "other", {"vocab_size": 270, "num_hidden_layers": 2})
    with pytest.raises(MlxeffError, match="vocabulary mismatch: the base has 261 rows, the auxiliary 270"):
        make_auxiliary(str(tmp_path / "other"), base)
    write_tiny_model(tmp_path / "small", {"num_hidden_layers": 2})
    auxiliary = make_auxiliary(str(tmp_path / "small"), base)
    predictor = Predictor(auxiliary.model.kv_shapes, base.model.kv_shapes, auxiliary.layer_map)
    named = {"name": "base", "fingerprint": base.fingerprint}
    write_pair(tmp_path / "pair", lambda _: PairConfig(named, auxiliary.config, auxiliary.layer_map), predictor)
    load_pair(tmp_path / "pair", base)
    shutil.rmtree(tmp_path / "small")
    write_tiny_model(tmp_path / "small", {"num_hidden_layers": 2}, seed=8)
    with pytest.raises(MlxeffError, match=r"pair: wanted the auxiliary \S+small \(\w+\), got \S+small \(\w+\)"):
        load_pair(tmp_path / "pair", base)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("lp:2", "layers to keep: wanted a fraction of 4 layers above 0, at most 1, got 2"),
        ("layers:0,x", "layers:0,x: wanted layers such as 0,2,5-7, got '0,x'"),
        ("layers:1-7", "layers:1-7: auxiliary: wanted rising layers of 0 to 3, got [1, 2, 3, 4, 5, 6, 7]"),
        ("openelm_3B_kvp_lp_0_50.yaml", "got a layer-pruned baseline without prediction"),
    ],
)
def test_bad_specifications(base, spec, complaint):
    with pytest.raises(MlxeffError) as caught:
        make_auxiliary(spec, base)
    assert complaint in str(caught.value)


def test_the_command_refuses_in_one_line(pair, base_folder, tiny_folder, tmp_path):
    generate = ("generate", PROMPT, "--model")
    assert f"{pair}: wanted the base " in fails(*generate, tiny_folder, "--kv-predict", pair)
    assert "wanted the folder of a KV prediction pair" in fails(*generate, base_folder, "--kv-predict", tmp_path / "no")
    both = fails(*generate, base_folder, "--kv-predict", pair, "--prompt-cache", tmp_path / "a.cache")
    assert both == "--kv-predict: predicted KV is not for --prompt-cache: give one of the two"
    _, err = mlxeff(*generate, base_folder, "--kv-predict", f"{pair}:keep=0", code=2)
    assert "wanted a whole number above 0, got '0'" in err
    fit = ("fit", "kv-predictor", base_folder, "--aux", "lp:0.5", "--out")
    assert f"{pair}: wanted a new folder, got a path that exists" == fails(*fit, pair)
    assert "wanted UTF-8 text" in fails(*fit, tmp_path / "new", "--text", tmp_path / "none.txt")
    assert "--ridge: wanted 0 or more, got -1.0" in fails(*fit, tmp_path / "new", "--ridge", -1)
    write_tiny_model(tmp_path / "narrow", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3})
    narrow = ("fit", "kv-predictor", base_folder, "--aux", tmp_path / "narrow", "--map-bits", 8, "--out")
    assert "maps of 8 bits: wanted inputs of a multiple of 32, got [48]" in fails(*narrow, tmp_path / "new")
    _, err = mlxeff(*fit, tmp_path / "new", "--map-bits", 7, code=2)
    assert "--map-bits: wanted one of 4, 8, got '7'" in err
    assert not (tmp_path / "new").exists()


HEADS, WIDTHS = [(4, 1), (4, 1), (8, 2), (8, 2)], [32, 64, 64, 96]


def openelm_state(rng, dim, heads, widths, rows=300):
    """CoreNet's names and shapes of an OpenELM, every weight random."""

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32) * 0.2

    state = {"token_embeddings.weight": draw(rows, dim), "norm.weight": 1 + draw(dim)}
    for i, ((queries, groups), width) in enumerate(zip(heads, widths, strict=True)):
        layer = {"attn.qkv_proj": draw((queries + 2 * groups) * 16, dim), "attn.out_proj": draw(dim, queries * 16)}
        layer |= {"attn.q_norm": 1 + draw(16), "attn.k_norm": 1 + draw(16), "attn_norm": 1 + draw(dim)}
        layer |= {"ffn.proj_1": draw(2 * width, dim), "ffn.proj_2": draw(dim, width), "ffn_norm": 1 + draw(dim)}
        state |= {f"layers.{i}.{name}.weight": value for name, value in layer.items()}
    return state


def pair_state(rng, auxiliary_dim, auxiliary_heads, auxiliary_widths, layer_map):
    state = {f"base.{n}": v for n, v in openelm_state(rng, 64, HEADS, WIDTHS).items()}
    auxiliary = openelm_state(rng, auxiliary_dim, auxiliary_heads, auxiliary_widths)
    state |= {f"auxiliary.{n}": v for n, v in auxiliary.items()}
    for i, j in enumerate(layer_map):
        for kind in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{kind}_transforms.{i}"
            rows, columns = HEADS[i][1] * 16, auxiliary_heads[j][1] * 16
            state[f"{name}.weight"] = rng.standard_normal((rows, columns)).astype(np.float32)
            state[f"{name}.bias"] = rng.standard_normal(rows).astype(np.float32)
    return state


PAIRS = {  # auxiliary's width, heads, feed-forward widths; the published map of such a pair
    "C": (48, [(4, 1), (8, 2), (4, 1)], [32, 32, 64], [0, 0, 1, 2]),
    "LP-0.75": (64, HEADS[:3], WIDTHS[:3], [0, 1, 2, 2]),
    "LP-0.50": (64, HEADS[::2], WIDTHS[::2], [0, 0, 1, 1]),
    "LP-0.25": (64, HEADS[:1], WIDTHS[:1], [0, 0, 0, 0]),
}


def write_state(path, state):
    return files.write_torch(path, {name: files.whole(value) for name, value in state.items()})


@pytest.mark.parametrize("kind", PAIRS)
def test_corenet_pairs(kind, tmp_path):
    rng = np.random.default_rng(4)
    state = pair_state(rng, *PAIRS[kind])
    path, out = write_state(tmp_path / "checkpoint_average.pt", state), tmp_path / "out"
    (tmp_path / "tokens").mkdir()
    write_byte_tokenizer(tmp_path / "tokens")
    report = convert(path, out, tokenizer=tmp_path / "tokens")
    assert (report.tensors, report.parameters) == (len(state), sum(value.size for value in state.values()))
    assert read_config(out).layer_map == PAIRS[kind][3]

    loaded = load_path(out / "base")
    pair = load_pair(out, loaded)
    for i in range(4):
        for maps, name in ((pair.predictor.key_maps, "key"), (pair.predictor.value_maps, "value")):
            source = f"predicter.auxkv_to_basekv.{name}_transforms.{i}"
            assert_close(maps[i].weight, state[f"{source}.weight"], source, rtol=0, atol=0)
            assert_close(maps[i].bias, state[f"{source}.bias"], source, rtol=0, atol=0)
    norms = pair.auxiliary.layers[0].attn.k_norm.weight
    assert_close(norms, state["auxiliary.layers.0.attn.k_norm.weight"], "k_norm", rtol=0, atol=0)
    against_float64(state, loaded.model, pair, PAIRS[kind][3])


def against_float64(state, base, pair, layer_map):
    """The converted pair computes the formula on the checkpoint's own numbers."""
    import kvp_reference

    def family(model, part):
        weights = {
            f"transformer.{n.removeprefix(part)}": v.astype(float) for n, v in state.items() if n.startswith(part)
        }
        names = ("head_dim", "num_query_heads", "num_kv_heads", "num_transformer_layers", "rope_freq_constant")
        return kvp_reference.Family(weights, {"model_type": "openelm"} | {n: getattr(model.config, n) for n in names})

    maps = {
        f"{kind}_maps.{i}.{part}": state[f"predicter.auxkv_to_basekv.{kind}_transforms.{i}.{part}"].astype(float)
        for i in range(4) for kind in ("key", "value") for part in ("weight", "bias")
    }  # fmt: skip
    tokens = np.random.default_rng(1).integers(0, 300, 20).tolist()
    models = family(base, "base."), family(pair.auxiliary, "auxiliary.")
    want = kvp_reference.predicted_logits(*models, maps, layer_map, tokens)
    got = predict(pair.auxiliary, pair.predictor, base, mx.array(tokens), base.new_cache())
    assert_close(got[0], want, "converted", rtol=2.0**-14)  # four layers of float32 roundings


def test_corenet_pairs_are_not_seed_encoded(tmp_path):
    path = write_state(tmp_path / "pair.pt", pair_state(np.random.default_rng(4), *PAIRS["LP-0.50"]))
    complaint = fails("convert", path, tmp_path / "out", "--seedlm", "4", "--data-free")
    assert "pair.pt: a pair of KV prediction: wanted no seedlm, got 4" in complaint
    complaint = fails("convert", path, tmp_path / "out", "--ignore-keys", "a,b")
    assert "pair.pt: a pair of KV prediction has no config.json: wanted no ignore_keys, got a,b" in complaint


def test_corenet_pair_by_the_command(tmp_path):
    path = write_state(tmp_path / "pair.pt", pair_state(np.random.default_rng(4), *PAIRS["LP-0.50"]))
    write_byte_tokenizer(tmp_path)
    out, _ = mlxeff("convert", path, tmp_path / "out", "--dry-run")
    assert "kv pair (openelm CoreNet, KV Prediction)" in out
    assert not (tmp_path / "out").exists()
    mlxeff("convert", path, tmp_path / "out", "--dtype", "bfloat16")
    _, err = mlxeff("generate", PROMPT, "--model", tmp_path / "out" / "base", "--kv-predict", tmp_path / "out",
                    "--max-tokens", 3, "--raw")  # fmt: skip
    assert "49 of 50 prompt tokens is predicted" in err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("predicter.auxkv_to_basekv.key_transforms.2.bias"), "missing 1 tensors: key_maps.2.bias"),
        (lambda s: s.update({"predicter.other": np.zeros(2, np.float32)}), "1 unknown tensors: predicter.other"),
        (lambda s: s.pop("auxiliary.norm.weight"), "auxiliary: missing 1 tensors: transformer.norm.weight"),
        (lambda s: s.pop("base.token_embeddings.weight"), "base of the pair: pair.pt: missing tensor 'token_embed"),
        (lambda s: s.update({"predicter.auxkv_to_basekv.value_transforms.3.weight": np.zeros((32, 16), np.float32)}),
         "tensor value_maps.3.weight: wanted shape (32, 32), got (32, 16)"),
    ],
)  # fmt: skip
def test_corenet_pairs_that_are_incomplete(change, complaint, tmp_path):
    state = pair_state(np.random.default_rng(4), *PAIRS["LP-0.50"])
    change(state)
    path = write_state(tmp_path / "pair.pt", state)
    with pytest.raises(MlxeffError) as caught:
        convert(path, tmp_path / "out")
    assert complaint in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_without_a_tokenizer_load_as_auxiliaries(tmp_path, base_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base_folder / name, bare / name)
    model, mark = load_model(bare)
    assert model.vocab_size == 261
    assert mark == load_path(base_folder).fingerprint


def test_a_text_with_a_token_that_the_base_has_no_row_for(tmp_path):
    """A tokenizer may have more tokens than its model; MLX would read outside of the embedding table."""
    base, text = write_tiny_model(tmp_path / "base", {"vocab_size": 259, "num_hidden_layers": 3}), tmp_path / "text.txt"
    text.write_text("the cat " * 300 + "<|assistant|>")
    with pytest.raises(MlxeffError, match=r"^text: the model has no token '<\|assistant\|>': its id is 259"):
        fit_kv_predictor(str(base), "layers:0-1", str(tmp_path / "pair"), tokens=2000, text=str(text))


def test_keys_to_ignore_in_base_and_auxiliary(tmp_path, text):
    """Every verb that says `--ignore-keys` has it, for the models of a pair too."""
    for name, key in (("base", "attn_scale"), ("small", "logit_bias")):
        folder = write_tiny_model(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: 2.0}))
    base, pair, both = tmp_path / "base", tmp_path / "pair", ("--ignore-keys", "attn_scale,logit_bias")
    fit = ("fit", "kv-predictor", base, "--aux", tmp_path / "small", "--out", pair, "--text", text, "--tokens", 400)
    assert fails(*fit).endswith("run with --ignore-keys attn_scale")
    assert fails(*fit, "--ignore-keys", "attn_scale").endswith("run with --ignore-keys logit_bias")
    mlxeff(*fit, *both, "--length", 100, "--quiet")
    assert read_config(pair).provenance["ignore_keys"] == ["attn_scale", "logit_bias"]
    answer = ("generate", PROMPT, "--model", base, "--max-tokens", 2, "--kv-predict", pair)
    measure = ("bench", "ttft", base, "--kv-predict", pair, "--prompt-lengths", 8, "--rounds", 1, "--warmup", 0)
    for verb in (answer, measure):
        assert fails(*verb).endswith("run with --ignore-keys attn_scale")
        assert fails(*verb, "--ignore-keys", "attn_scale").endswith("run with --ignore-keys logit_bias")
        mlxeff(*verb, *both)
