"""`mlxeff fit dynamoe --tune`: gradient steps after the closed form, on tiny models. Costs about 15 s of CPU."""

import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlxeff.convert import convert

from helpers import assert_close
from mlxeff.assembly.fitting_dynamoe import fit_dynamoe
from mlxeff.assembly.model import load_path
from mlxeff.assembly.tuning_dynamoe import tuning_text
from mlxeff.dynamoe import distil, tune
from mlxeff.dynamoe.feed_forward import LowRank
from mlxeff.dynamoe.install import of
from mlxeff.errors import MlxeffError
from mlxeff.running import RunOptions
from test_cli import environment, fails, mlxeff
from test_fit_dynamoe import PROMPT, digest, source, text  # noqa: F401

TOKENS, TUNED = 1024, 12288


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, source, text):  # noqa: F811
    """(The folder of a tuned DynaMoE model, the report of its fit)."""
    folder = tmp_path_factory.mktemp("tuned") / "dyn"
    return folder, fit_dynamoe(str(source), folder, text=text, tokens=TOKENS, tune=TUNED)


@pytest.fixture(scope="module")
def untuned(tmp_path_factory, source, text):  # noqa: F811
    """The folder of the same model without tuning."""
    folder = tmp_path_factory.mktemp("untuned") / "dyn"
    fit_dynamoe(str(source), folder, text=text, tokens=TOKENS)
    return folder


def plain_logits(folder, fraction=1.0):
    model = load_path(folder).model
    return model.plain.forward(PROMPT, model.new_cache(), RunOptions(fraction=fraction), False)


def test_the_divergence_falls(tuned):
    """On windows that no step read, by the report."""
    report = tuned[1]["tuning"]
    assert report["tokens"] == TUNED
    assert report["held_out"] == 1024
    assert report["sensitivities"] == list(tune.SENSITIVITIES)
    changes = [after / before for before, after in zip(report["kl_before"], report["kl_after"], strict=True)]
    assert max(changes[:3]) < 0.97
    assert changes[3] < 1.05


def test_only_the_smaller_experts_change(tuned, untuned):
    """So the widest expert keeps the bits of the dense network, and nothing takes more bytes."""
    got, want = ({**mx.load(str(folder / "model.safetensors"))} for folder in (tuned[0], untuned))
    assert got.keys() == want.keys()
    changed = {name for name in want if not mx.array_equal(got[name], want[name])}
    assert changed == {name for name in want if ".experts." in name}
    assert sum(array.nbytes for array in got.values()) == sum(array.nbytes for array in want.values())


def test_sensitivity_1_has_the_bits_of_the_dense_model(tmp_path, source, text):  # noqa: F811
    """Also where the experts are quantised after they were tuned."""
    convert(source, tmp_path / "small", quantize=(4, 32))
    fit_dynamoe(str(tmp_path / "small"), tmp_path / "dyn", text=text, tokens=512, tune=1024)
    assert mx.array_equal(plain_logits(tmp_path / "dyn"), plain_logits(tmp_path / "small"))
    assert {expert.bits for network in of(load_path(tmp_path / "dyn").model) for expert in network.experts} == {4}
    assert not mx.array_equal(plain_logits(tmp_path / "dyn", 0.5), plain_logits(tmp_path / "small"))


def test_a_killed_pass_goes_on_and_gives_the_same_bits(tmp_path, source, text, tuned):  # noqa: F811
    out = tmp_path / "dyn"
    command = [sys.executable, "-m", "mlxeff", "fit", "dynamoe", source, "--out", out, "--text", text]
    command += ["--tokens", TOKENS, "--tune", TUNED]
    run = subprocess.Popen([*map(str, command), "--quiet"], env=environment())
    work = tmp_path / ".dyn.dynamoe-work"
    while not (work / "tuning.state").exists() and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    out_text, err = mlxeff(*command[3:])
    assert "training: goes on after step" in err
    assert out_text.startswith("tuning: 12288 tokens in ")
    assert not work.exists()
    assert digest(out)["model.safetensors"] == digest(tuned[0])["model.safetensors"]


def test_low_rank_terms_are_tuned(tmp_path, source, text):  # noqa: F811
    report = fit_dynamoe(
        str(source), tmp_path / "dyn", text=text, tokens=TOKENS, tune=4096, down="low-rank", rank=8, router="paper"
    )
    experts = [expert for network in of(load_path(tmp_path / "dyn").model) for expert in network.experts]
    assert all(isinstance(expert, LowRank) and expert.left.weight.dtype == mx.float16 for expert in experts)
    tuning = report["tuning"]
    assert sum(tuning["kl_after"]) < 0.95 * sum(tuning["kl_before"])


def test_terms_compute_nothing_at_first(untuned):
    """So the first step begins at the closed form, and the loss there is that which `divergences` found."""
    networks = of(load_path(untuned).model)
    x = mx.random.normal((9, 64), key=mx.random.key(2))
    before = [network.outputs(x) for network in networks]
    terms = tune.trainable(networks, seed=3)
    for network, outputs in zip(networks, before, strict=True):
        assert all(map(mx.array_equal, network.outputs(x), outputs))
    names = {name for name, _ in tree_flatten(terms.trainable_parameters())}
    assert names == {f"layers.{layer}.{expert}.{part}" for layer in (0, 1) for expert in (0, 1) for part in "ab"}
    term = terms.layers[1][0]
    term.b = mx.random.normal(term.b.shape, key=mx.random.key(4))
    whole = tune.matrix(term)
    hidden = np.random.default_rng(5).normal(size=(3, whole.shape[1]))
    assert_close(term(mx.array(hidden, mx.float32)), hidden @ whole.T, "merged term", rtol=1e-4)


def test_experts_are_fitted_on_the_tokens_that_take_them(source, text, untuned):  # noqa: F811
    """Each is nearer to what it should add to the hidden states of its own tokens than it was."""
    model, networks = load_path(source).model, of(load_path(untuned).model)
    windows = tuning_text(text.read_text(), load_path(source).tokenizer, 4096, "here", 261).read
    distillation = distil.Distillation(model, windows)
    distillation.fit(networks[0])
    distillation.next_layer(networks[0])
    network = networks[1]
    batches = distillation.read()
    assert {each for number in range(len(batches)) for each in distillation.sensitivities(number)} == {
        *tune.SENSITIVITIES
    }

    def errors():
        """The squared error of each smaller expert on its own tokens."""
        total = np.zeros(2)
        for number, (read, wanted) in enumerate(batches):
            chosen = distillation.chosen(network, number)
            for expert, output in enumerate(network.outputs(read.reshape(-1, 64))[1:]):
                total[expert] += np.square(np.array(output - wanted.reshape(-1, 64))[chosen == expert]).sum()
        return total

    before = errors()
    distillation.fit(network)
    assert (errors() < before).all()


def test_the_model_is_left_as_it_was(source, untuned):  # noqa: F811
    model, networks = load_path(source).model, of(load_path(untuned).model)
    before = [layer.feed_forward for layer in model.layers]
    with tune.installed(model, networks):
        assert all(layer.feed_forward is own for layer, own in zip(model.layers, networks, strict=True))
    assert all(layer.feed_forward is own for layer, own in zip(model.layers, before, strict=True))


@pytest.mark.parametrize(("tokens", "read", "held"), [(256, 1, 4), (1100, 4, 4), (10**6, 9, 4)])
def test_the_windows_of_steps_and_of_measurements_are_others(source, tokens, read, held):  # noqa: F811
    words = "".join(chr(97 + i * i % 26) for i in range(13 * 256 + 5))
    found = tuning_text(words, load_path(source).tokenizer, tokens, "here", 261)
    assert (len(found.read), len(found.held)) == (read, held)
    short = tuning_text(words[:600], load_path(source).tokenizer, tokens, "here", 261)
    assert (len(short.read), len(short.held)) == (1, 1)


# Bad input


@pytest.mark.parametrize("value", ["0", "-5", "some"])
def test_bad_numbers_are_refused(tmp_path, source, value):  # noqa: F811
    _, err = mlxeff("fit", "dynamoe", source, "--out", tmp_path / "dyn", f"--tune={value}", code=2)
    assert f"argument --tune: wanted a whole number above 0, got '{value}'" in err


def test_less_than_a_window_is_refused(tmp_path, source):  # noqa: F811
    line = fails("fit", "dynamoe", source, "--out", tmp_path / "dyn", "--tune", 255)
    assert "--tune: wanted 256 tokens, a window, or more, got 255" in line


def test_shared_experts_have_nothing_to_tune(tmp_path, source):  # noqa: F811
    line = fails("fit", "dynamoe", source, "--out", tmp_path / "dyn", "--down", "shared", "--tune", 512)
    assert "--tune 512: wanted --down own or low-rank with it, got shared: nothing to tune" in line
    assert not list(tmp_path.iterdir())


def test_a_text_of_one_window_is_refused_before_the_fit(tmp_path, source):  # noqa: F811
    (tmp_path / "text").write_text("word " * 80)
    arguments = {"text": tmp_path / "text", "tokens": 256, "tune": 256}
    with pytest.raises(MlxeffError, match="--tune 256: wanted a text of at least 512 tokens, got 400"):
        fit_dynamoe(str(source), tmp_path / "dyn", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
