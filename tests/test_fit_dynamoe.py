"""`mlxeff fit dynamoe`: from a dense folder to a folder that generates, on tiny models. Costs about 25 s."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlxeff.convert import convert

from helpers import assert_close
from mlxeff import ops
from mlxeff.assembly.dynamoe import with_sensitivity
from mlxeff.assembly.fitting_dynamoe import fit_dynamoe
from mlxeff.assembly.model import load_path
from mlxeff.decode import Setup
from mlxeff.dynamoe import fisher, fit, gptq
from mlxeff.dynamoe.install import of, rows_of
from mlxeff.modules import dense
from mlxeff.ops import swiglu
from mlxeff.running import RunOptions
from test_cli import environment, fails, mlxeff
from test_models import OPENELM
from tiny_model import write_random_model, write_tiny_model, write_words

TOKENS = 2048
PROMPT = mx.array([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "text.txt", 4000)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("dense") / "model", {"intermediate_size": 192})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, source, text):
    """(The folder of a DynaMoE model, the report of its fit)."""
    folder = tmp_path_factory.mktemp("fitted") / "dyn"
    out, _ = mlxeff("fit", "dynamoe", source, "--out", folder, "--text", text, "--tokens", TOKENS, "--json")
    return folder, json.loads(out)


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def logits(model, fraction=1.0):
    return model(PROMPT, model.new_cache(), RunOptions(fraction=fraction))


def test_the_widest_experts_are_the_dense_model(source, fitted):
    folder, report = fitted
    model, want = load_path(folder).model, load_path(source).model
    assert report["widths"] == [[64, 128, 192]] * 2
    assert_close(logits(model), logits(want), "another order of the neurons", rtol=1e-4)
    order = [np.array(network.gate_proj.weight) for network in of(model)]
    assert any(
        (rows != np.array(layer.mlp.gate_proj.weight)).any() for rows, layer in zip(order, want.layers, strict=True)
    )


def test_sensitivity_1_has_the_bits_of_the_permuted_dense_model(fitted):
    """In the operations of MLX and, at once, in the native decoder."""
    model = load_path(fitted[0]).model
    for executor in (model.plain, model.native) if model.native else (model.plain,):
        got = executor.forward(PROMPT, model.new_cache(), RunOptions(fraction=1.0), False)
        for layer in model.layers:
            layer.mlp.router.weight = layer.mlp.router.weight * math.nan  # it is not asked
        again = executor.forward(PROMPT, model.new_cache(), RunOptions(), False)
        assert mx.array_equal(got, again)
    hidden = mx.random.normal((1, 4, 64))
    network = of(model)[0]
    rows = swiglu(network.gate_proj(hidden), network.up_proj(hidden))
    assert mx.array_equal(network(hidden, RunOptions()), network.down_proj(rows[..., mx.argsort(network.order)]))


def test_less_sensitivity_computes_fewer_neurons(fitted):
    model, errors, fractions = load_path(fitted[0]).model, [], []
    model.native = None
    whole = logits(model)
    for sensitivity in (0.95, 0.7, 0.5, 0.0):
        before = [network.counts for network in of(model)]
        errors.append(mx.mean(mx.abs(logits(model, sensitivity) - whole)).item())
        counts = np.sum([np.subtract(n.counts, b) for n, b in zip(of(model), before, strict=True)], axis=0)
        fractions.append(counts @ [1, 2, 3] / (3 * counts.sum()))
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[-1] == pytest.approx(1 / 3)
    assert fractions[0] > 0.75
    assert errors[0] < errors[-1]


def test_the_fit_is_deterministic_and_goes_on_after_a_kill(tmp_path, source, text, fitted):
    """The folder of a fit that was killed after its first layer is that of one that was not, to the bit."""
    out = tmp_path / "dyn"
    command = [sys.executable, "-m", "mlxeff", "fit", "dynamoe", source, "--out", out, "--text", text]
    run = subprocess.Popen([*map(str, command), "--tokens", str(TOKENS), "--quiet"], env=environment())
    work = tmp_path / ".dyn.dynamoe-work"
    while not (work / "layer-0000.safetensors").exists() and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists() or run.returncode == 0
    if not out.exists():
        assert (work / "weights.safetensors").is_file()
        mlxeff("fit", "dynamoe", source, "--out", out, "--text", text, "--tokens", TOKENS, "--quiet")
    assert not work.exists()
    assert digest(out)["model.safetensors"] == digest(fitted[0])["model.safetensors"]


def test_a_work_folder_of_other_settings_is_not_used(tmp_path, source, text, caplog):
    work = tmp_path / ".dyn.dynamoe-work"
    work.mkdir()
    (work / "fingerprint").write_text("another")
    (work / "layer-0000.safetensors").write_bytes(b"rubbish")
    with caplog.at_level("WARNING", "mlxeff"):
        fit_dynamoe(str(source), tmp_path / "dyn", text=text, tokens=512, down="shared")
    assert "begun anew" in caplog.text
    assert not work.exists()


@pytest.mark.parametrize(("down", "router"), [("low-rank", "regression"), ("shared", "paper"), ("own", "paper")])
def test_every_kind_of_expert_and_router_generates(tmp_path, source, text, down, router):
    out = tmp_path / "dyn"
    more = ["--rank", "8"] if down == "low-rank" else []
    options = ["--text", text, "--tokens", 512, "--down", down, "--router", router, "--widths", "64,160"]
    mlxeff("fit", "dynamoe", source, "--out", out, *options, *more, "--quiet")
    config = json.loads((out / "config.json").read_text())
    assert config["dynamoe"]["rule"] == {"regression": "lagrangian", "paper": "tail"}[router]
    assert config["dynamoe"]["widths"] == [[64, 160, 192]] * 2
    arguments = ("generate", "--model", out, "--max-tokens", 8, "--sensitivity", 0.6, "--json", "words")
    found = json.loads(mlxeff(*arguments)[0])
    assert 1 / 3 <= found["timings"]["dynamoe"]["mean_fraction"] < 1


def test_openelm_with_networks_of_several_widths(tmp_path, text):
    config = OPENELM | {"vocab_size": 261, "ffn_dim_divisor": 64, "ffn_multipliers": [2.0, 4.0, 3.0]}
    folder = write_random_model(tmp_path / "openelm", config)
    report = fit_dynamoe(str(folder), tmp_path / "dyn", text=text, tokens=512)
    model, want = load_path(tmp_path / "dyn").model, load_path(folder).model
    assert len({widths[-1] for widths in report["widths"]}) == 3
    assert_close(logits(model), logits(want), "openelm", rtol=1e-4)
    assert mx.isfinite(logits(model, 0.5)).all().item()


@pytest.mark.parametrize("how", [{"quantize": (4, 32)}, {"quantize": (8, 32)}, {"seedlm": "4", "data_free": True}])
def test_quantised_sources_keep_their_storage(tmp_path, source, text, how, caplog):
    """Rows of gate and up are moved as they are stored, and the whole down-projection is left as it is, so that the
    widest experts have the bits of the dense model."""
    folder = tmp_path / "small"
    convert(source, folder, **how)
    with caplog.at_level("WARNING", "mlxeff"):
        fit_dynamoe(str(folder), tmp_path / "dyn", text=text, tokens=512)
    got, want = load_path(tmp_path / "dyn").model, load_path(folder).model
    a, b = (model.plain.forward(PROMPT, model.new_cache(), RunOptions(), False) for model in (got, want))
    assert mx.array_equal(a, b)
    for network, layer in zip(of(got), want.layers, strict=True):
        rows, old = np.array(dense(network.gate_proj)), np.array(dense(layer.mlp.gate_proj))
        assert sorted(map(tuple, rows)) == sorted(map(tuple, old))
        assert type(network.gate_proj) is type(layer.mlp.gate_proj)
        if "quantize" in how:
            assert (network.down_proj.bits, network.experts[0].bits) == (layer.mlp.down_proj.bits,) * 2
    assert ("seed-encoded matrices" in caplog.text) == ("seedlm" in how)
    assert mx.isfinite(logits(got, 0.5)).all().item()


# The parts of the fit


class Shifted(nn.Module):
    """A network to whose output a constant is added."""

    def __init__(self, inner, constant):
        super().__init__()
        self.inner, self._constant = inner, constant

    def __call__(self, x):
        return self.inner(x) + self._constant


def gated(model, layer=0):
    return model.layers[layer].feed_forward.parts()


def seen_by(parts, x):
    seen = fit.Statistics.empty(rows_of(parts))
    seen.add(parts, x)
    return seen


def test_the_statistics_are_those_of_the_neurons(source):
    model, x = load_path(source).model, mx.random.normal((2, 33, 64))
    parts = gated(model)
    seen = seen_by(parts, x)
    with ops.mlx_only():
        a = np.array(swiglu(parts.gate.module(x), parts.up.module(x)).reshape(66, -1), np.float64)
    assert_close(seen.gram, a.T @ a, "gram", rtol=1e-5)
    assert seen.tokens == 66
    assert_close(seen.inputs[0], np.array(x).reshape(66, 64)[::2], "inputs")


def test_a_fitted_layer_is_better_than_its_first_columns_and_knows_its_errors(source):
    """The router predicts the logarithms of the errors: those of all tokens have the same mean."""
    model, x = load_path(source).model, mx.random.normal((2, 300, 64), key=mx.random.key(3))
    parts, weights = gated(model), np.ones(64)
    module = fit.empty(parts, (64, 128, 192), "own", None, "lagrangian", (0.4, 0.7, 1.0))
    seen = seen_by(parts, x)
    said, _ = fit.fit_layer(module, parts, seen, weights)
    errors, _ = fit._measured(module, seen.inputs, weights)
    assert_close(said.mean(0), np.log(errors + fit.LEAST_ERROR).mean(0), "what the router says")
    hidden = fit.neurons(parts, seen.inputs[0])
    down, order = np.array(dense(parts.down.module)), np.array(module.order)
    for place, width in enumerate(module.widths[:-1]):
        left_out = np.array(hidden)[:, order[width:]] @ down[:, order[width:]].T
        assert errors[:, place].mean() < 0.9 * np.square(left_out).sum(1).mean()


def test_the_refit_makes_the_least_error():
    """Against least squares over the tokens themselves; and it beats the columns as they are."""
    generator = np.random.default_rng(3)
    a, down = generator.normal(size=(400, 24)) @ generator.normal(size=(24, 24)), generator.normal(size=(6, 24))
    gram = a.T @ a / len(a)
    got = fit.refitted(gram, down, 10)
    ridge = fit.RIDGE * np.mean(np.diag(gram)[:10])
    rows = np.vstack([a[:, :10] / math.sqrt(len(a)), math.sqrt(ridge) * np.eye(10)])
    wanted = np.vstack([a @ down.T / math.sqrt(len(a)), math.sqrt(ridge) * down[:, :10].T])
    assert_close(got, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, "refit", rtol=1e-8)
    error = lambda matrix: np.linalg.norm(a[:, :10] @ matrix.T - a @ down.T)  # noqa: E731
    assert error(got) < error(down[:, :10])


def test_a_term_of_full_rank_is_the_whole_change():
    generator = np.random.default_rng(4)
    a, change = generator.normal(size=(200, 12)), generator.normal(size=(7, 12))
    gram = a.T @ a
    left, right = fit.low_rank(gram, change, 7)
    assert_close(left @ right, change, "rank 7", rtol=1e-8)
    errors = []
    for rank in (1, 3, 5):
        left, right = fit.low_rank(gram, change, rank)
        assert (left.shape, right.shape) == ((7, rank), (rank, 12))
        errors.append(np.linalg.norm(a @ (left @ right - change).T))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 32), (5, 64), (6, 64), (8, 128)])
def test_gptq_loses_less_than_rounding(bits, group):
    """Codes are packed as `mx.quantize` packs them, and the outputs are nearer than those of rounded weights."""
    generator = np.random.default_rng(bits)
    size = 384  # columns, three blocks
    mixing = generator.normal(size=(size, size)) * generator.exponential(size=size)[:, None]
    x, weight = generator.normal(size=(900, size)) @ mixing, generator.normal(size=(24, size))
    layer = gptq.quantised(weight, x.T @ x / len(x), bits, group, mx.float16)
    rounded = mx.dequantize(*mx.quantize(mx.array(weight, mx.float32), group, bits), group, bits)
    error = lambda matrix: np.linalg.norm(x @ (np.array(matrix, np.float64) - weight).T)  # noqa: E731
    assert error(dense(layer)) < 0.5 * error(rounded)


def test_neurons_are_ordered_by_what_they_contribute():
    gram = np.diag([4.0, 1.0, 9.0, 0.0])
    down = np.array([[1.0, 5.0, 0.1, 9.0]])
    assert fit.importance(gram, down).tolist() == [1, 0, 2, 3]


def test_the_router_predicts_what_depends_on_its_input():
    generator = np.random.default_rng(6)
    inputs = generator.normal(size=(500, 8)) + 3
    targets = inputs @ generator.normal(size=(8, 2)) + [1.0, -2.0]
    weight, bias, explained = fit.regression(inputs, targets)
    assert min(explained) > 0.99
    assert_close(inputs @ weight.T + bias, targets, "prediction", rtol=0.05)
    _, _, explained = fit.regression(inputs, generator.normal(size=(500, 2)))
    assert max(explained) < 0.2


def test_the_classifier_learns_separable_labels():
    generator = np.random.default_rng(7)
    inputs = generator.normal(size=(600, 8)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(int) + (inputs[:, 0] > 1)
    weight, bias, explained = fit.classifier(inputs, labels, 3)
    assert explained[0] > 0.85
    assert (np.argmax(inputs @ weight.T + bias, axis=1) == labels).mean() > 0.85


def test_the_weights_of_errors_are_squared_gradients(source):
    """Against differences: the KL divergence that a small error of one layer's output makes is ½ Σ weight · error²."""
    model = load_path(source).model
    windows = np.random.default_rng(8).integers(97, 123, (8, 64)).astype(np.int32)
    with ops.mlx_only():
        weights = fisher.output_weights(model, windows)
        assert weights.shape == (2, 64)
        layer, divergences, wanted = model.layers[1], [], []
        network, tokens = layer.feed_forward, mx.array(windows)
        whole = ops.log_softmax(model.plain.forward(tokens, model.new_cache(), RunOptions(), False))
        for number in range(12):
            error = mx.random.normal((64,), key=mx.random.key(number)) * 0.02
            layer.mlp = Shifted(network, error)
            other = ops.log_softmax(model.plain.forward(tokens, model.new_cache(), RunOptions(), False))
            divergences.append(mx.mean(mx.sum(mx.exp(whole) * (whole - other), axis=-1)).item())
            wanted.append(0.5 * float(weights[1] @ np.square(np.array(error))))
        layer.mlp = network
    # An estimate from few tokens; with the most probable tokens in place of drawn ones it is a sixth less.
    assert np.mean(divergences) == pytest.approx(np.mean(wanted), rel=0.1)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "0.5,0.2"], "--widths: wanted 1 to 7 rising numbers above 0, got 0.5,0.2"),
        (
            ["--widths", "64,192"],
            "--widths: layer 0: wanted shares below 1, or whole numbers below 192, got [64.0, 192.0]",
        ),
        (["--widths", "0.01,0.02"], "--widths: layer 0: 192 neurons are too few for experts of 0.01, 0.02"),
        (["--rank", "4"], "--rank 4: wanted --down low-rank with it, got own"),
        (["--threshold", "0.5"], "--threshold 0.5: wanted --router paper with it, got regression"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
    ],
)
def test_bad_options_are_one_line(tmp_path, source, options, message):
    assert message in fails("fit", "dynamoe", source, "--out", tmp_path / "dyn", *options)
    assert not list(tmp_path.iterdir())


def test_a_dynamoe_is_not_fitted_again(tmp_path, fitted):
    line = fails("fit", "dynamoe", fitted[0], "--out", tmp_path / "again")
    assert "feed-forward of layer 0: wanted a gated one" in line


def test_a_model_without_a_gate_is_refused(tmp_path):
    config = OPENELM | {"vocab_size": 261, "ffn_with_glu": False}
    folder = write_random_model(tmp_path / "openelm", config)
    assert "wanted a gated one" in fails("fit", "dynamoe", folder, "--out", tmp_path / "dyn")


def test_a_full_disk_keeps_the_finished_layers(tmp_path, source, text):
    """The report is there, and the same command on another day has nothing left to fit but only to write."""
    arguments = ("fit", "dynamoe", source, "--out", tmp_path / "dyn", "--text", text, "--tokens", 512, "--json")
    out, _ = mlxeff(*arguments, code=1, limit=400_000)
    report = json.loads(out)
    assert any("not written, nothing is left behind" in line for line in report["notices"])
    assert not (tmp_path / "dyn").exists()
    _, err = mlxeff(*arguments)
    assert "3 layers are done already" in err
    assert (tmp_path / "dyn" / "config.json").exists()


def test_an_affine_width_is_a_multiple_of_its_group(tmp_path, source):
    convert(source, tmp_path / "small", quantize=(4, 64))
    line = fails("fit", "dynamoe", tmp_path / "small", "--out", tmp_path / "dyn", "--widths", "96,128")
    assert "wanted multiples of 64, the group size of its weights, got [96]" in line


# Use


def test_generate_with_a_sensitivity(fitted):
    arguments = ("generate", "--model", fitted[0], "--max-tokens", 12, "--json", "a story")
    dense_answer = json.loads(mlxeff(*arguments)[0])
    assert dense_answer["timings"]["dynamoe"] is None
    found = json.loads(mlxeff(*arguments, "--sensitivity", "0.5")[0])["timings"]["dynamoe"]
    assert found["sensitivity"] == 0.5
    assert len(found["layer_fractions"]) == 2
    assert found["tokens"] < sum(found["experts"]) <= 2 * found["tokens"], "the last layer skips a prompt's beginning"
    whole = json.loads(mlxeff(*arguments, "--sensitivity", "1")[0])
    assert whole["token_ids"] == dense_answer["token_ids"]
    assert whole["timings"]["dynamoe"]["mean_fraction"] == 1


def test_each_answer_is_counted_alone(fitted):
    loaded = load_path(fitted[0])
    setup = with_sensitivity(Setup(loaded.model), loaded, 0.5)
    reports = []
    for count in (11, 5):
        mx.eval(setup.read(PROMPT[:, :count], setup.new_cache(), 512))
        reports.append(setup.report()["dynamoe"]["tokens"])
    assert reports == [11, 5]


def test_the_summary_tells_the_fraction(fitted):
    _, err = mlxeff("generate", "--model", fitted[0], "--max-tokens", 4, "--sensitivity", "0", "a story")
    assert "dynamoe: 33% of the feed-forward neurons" in err


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "much"])
def test_sensitivities_out_of_range_are_refused(fitted, value):
    _, err = mlxeff("generate", "--model", fitted[0], f"--sensitivity={value}", "x", code=2)
    assert f"wanted a number from 0 to 1, got '{value}'" in err


def test_a_dense_model_has_no_sensitivity(source):
    line = fails("generate", "--model", source, "--sensitivity", "0.5", "x")
    assert "--sensitivity: wanted a DynaMoE model (mlxeff fit dynamoe makes one)" in line


def test_a_prompt_cache_of_another_sensitivity_is_not_reused(tmp_path, fitted):
    arguments = ("generate", "--model", fitted[0], "--max-tokens", 6, "--json", "--prompt-cache", tmp_path / "cache")
    prompt = "a rather long story of many words"
    mlxeff(*arguments, "--sensitivity", "0.5", prompt)
    same = json.loads(mlxeff(*arguments, "--sensitivity", "0.5", prompt)[0])
    assert same["timings"]["reused_tokens"] > 10
    other = json.loads(mlxeff(*arguments, prompt)[0])
    assert other["timings"]["reused_tokens"] == 0
    assert any("exact (sensitivity 0.5)" in line for line in other["notices"])


def test_tensors_and_config_name_the_format(fitted):
    folder, report = fitted
    config = json.loads((folder / "config.json").read_text())
    assert config["dynamoe"]["version"] == 1
    assert config["mlxeff"]["options"]["fit"] == "dynamoe"
    names = set(mx.load(str(folder / "model.safetensors")))
    assert "model.layers.1.mlp.experts.1.weight" in names
    assert "model.layers.0.mlp.router.bias" in names
    assert report["bytes"] > report["added_bytes"] > 0


def test_a_missing_router_is_one_line(tmp_path, fitted):
    folder = tmp_path / "damaged"
    shutil.copytree(fitted[0], folder)
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["model.layers.0.mlp.router.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert "missing 1 tensors: model.layers.0.mlp.router.weight" in fails("generate", "--model", folder, "x")


def test_an_architecture_that_only_mlx_lm_has_is_refused(tmp_path, fitted):
    from tiny_model import PHI, write_foreign

    folder = write_foreign(tmp_path / "phi", PHI)
    config = json.loads((folder / "config.json").read_text())
    entry = json.loads((fitted[0] / "config.json").read_text())["dynamoe"]
    (folder / "config.json").write_text(json.dumps(config | {"dynamoe": entry}))
    assert "dynamoe" in fails("generate", "--model", folder, "x")
