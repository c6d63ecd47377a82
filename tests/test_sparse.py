"""Feed-forward networks that leave out inputs: matrices by columns, the fit, the native decoder and the command, on
tiny models. Costs about 12 s."""

import hashlib
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlxeff.convert import convert

from helpers import assert_close
from mlxeff.assembly.fitting_dynamoe import fit_dynamoe
from mlxeff.assembly.model import build_model, load_path
from mlxeff.dynamoe import fisher, fit_sparse
from mlxeff.dynamoe.columns import Columns, refusal, stored_by_columns
from mlxeff.dynamoe.fractions import Fractions
from mlxeff.dynamoe.install import gated_layers, of
from mlxeff.dynamoe.sparse import FEW_TOKENS, SparseFeedForward, interleaved
from mlxeff.dynamoe.sparse_install import read_entry
from mlxeff.errors import MlxeffError
from mlxeff.modules import Linear, QuantizedLinear, dense
from mlxeff.running import RunOptions
from test_cli import fails, mlxeff
from test_models import OPENELM
from tiny_model import CONFIG, random_model, write_random_model, write_tiny_model, write_words

ONE_FORM = pytest.mark.parametrize("fitted", ["4 bits"], indirect=True)
PROMPT = mx.array([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]])
ENTRY = {"version": 1, "by": "inputs", "gate_up": [None] * 2, "down": [None] * 2, "table": [[0.3, 0.5], [0.9, 0.1]]}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "text.txt", 2000)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of one dense model in float16, and with weights of 4 and 8 bits."""
    place = tmp_path_factory.mktemp("sources")
    write_tiny_model(place / "float32", {"intermediate_size": 192, "head_dim": 64, "eos_token_id": []})
    convert(place / "float32", place / "float16", dtype="float16")
    for bits in (4, 8):
        convert(place / "float32", place / f"{bits} bits", quantize=(bits, 32))
    return place


@pytest.fixture(scope="module", params=["4 bits", "8 bits", "float16"])
def fitted(request, sources, text):
    """(The dense folder, that of the fitted model, the report of the fit)."""
    source, folder = sources / request.param, sources / f"{request.param} sparse"
    arguments = ("--by", "inputs", "--out", folder, "--text", text, "--tokens", 1024, "--json")
    return source, folder, json.loads(mlxeff("fit", "dynamoe", source, *arguments)[0])


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def steps(model, fraction, executor=None):
    """Logits of the prompt's tokens, one call each."""
    cache, found = model.new_cache(), []
    for token in PROMPT[0].tolist():
        run = (executor or model).forward if executor else model
        arguments = (mx.array([[token]]), cache, RunOptions(fraction=fraction))
        found.append(run(*arguments, False) if executor else run(*arguments))
        mx.eval(found[-1])
    return mx.concatenate(found, axis=1)


# Columns


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("outputs", [64, 192, 320])
def test_columns_hold_the_values_of_the_rows(bits, outputs):
    mx.random.seed(outputs)
    layer = Linear(96, outputs)
    if bits:
        layer = QuantizedLinear.from_linear(layer, 32, bits)
    order = np.random.default_rng(0).permutation(outputs)
    columns = stored_by_columns(layer, order)
    want = np.array(dense(layer))[order]
    assert (np.array(columns.dense()) == want.T).all()
    back = columns.rows()
    assert type(back) is type(layer)
    assert (np.array(dense(back)) == want).all()
    x = mx.random.normal((5, 96))
    assert_close(columns(x), x @ mx.array(want.T) + layer.bias[mx.array(order)], "the product", rtol=1e-5)
    assert refusal(layer) is None


def test_matrices_that_columns_cannot_hold():
    assert "multiples of 64 outputs" in refusal(Linear(64, 96))
    assert "32 inputs" in refusal(Linear(80, 64))
    assert "got 3 bits affine" in refusal(QuantizedLinear.from_linear(Linear(64, 64), 32, 3))
    assert "mxfp4" in refusal(nn.QuantizedLinear.from_linear(Linear(64, 64), 32, 4, "mxfp4"))
    assert "got Embedding" in refusal(nn.Embedding(4, 4))


def test_gate_and_up_take_turns():
    assert interleaved(64).tolist() == [*range(32), *range(64, 96), *range(32, 64), *range(96, 128)]


# The network


def test_a_fitted_model_at_sensitivity_1_is_the_dense_one(fitted):
    source, folder, report = fitted
    assert report["by"] == "inputs"
    want = load_path(source).model(PROMPT, load_path(source).model.new_cache())
    model = load_path(folder).model
    assert model.native is not None
    for executor in (model.plain, model.native):
        got = executor.forward(PROMPT, model.new_cache(), RunOptions(), False)
        assert_close(got, want, "all tokens at once", rtol=2e-3)
        assert_close(steps(model, 1.0, executor), want, "token by token", rtol=2e-3)


def test_the_native_decoder_computes_what_the_operations_do(fitted):
    model = load_path(fitted[1]).model
    for fraction in (0.9, 0.6, 0.3, 0.0):
        plain, native = (steps(model, fraction, executor) for executor in (model.plain, model.native))
        assert_close(native, plain, f"at {fraction}", rtol=1e-2)
        assert mx.abs(native - steps(model, 1.0)).max().item() > 1e-4


def test_what_lies_on_the_threshold_counts_and_what_is_no_number():
    x, weights = mx.array([[0.5, -0.5, 0.4, mx.nan, 0.0, 0.3]]), mx.array([1.0, 1, 1, 1, 1, 2])
    assert SparseFeedForward.counts_of(x, weights, 0.5).tolist() == [[True, True, False, True, False, True]]
    assert SparseFeedForward.counts_of(x, weights, 0.0).all()


def test_prompts_use_all_inputs_unless_they_are_recorded(fitted):
    model = load_path(fitted[1]).model

    def logits(fraction):
        return model.plain.forward(PROMPT, model.new_cache(), RunOptions(fraction=fraction), False)

    assert PROMPT.size > FEW_TOKENS
    assert mx.array_equal(logits(0.3), logits(1.0))
    shares = [[] for _ in of(model)]
    for network, own in zip(of(model), shares, strict=True):
        network.record(own)
    assert not mx.array_equal(logits(0.3), logits(1.0))
    half, all_neurons = mx.array([of(model)[0].gate_up.inputs // 2]), mx.array([of(model)[0].down.inputs])
    assert of(model)[0].shares(half, all_neurons).item() == pytest.approx(2 / 3), "gate and up count each"
    for own in shares:
        assert 0 < own[0].mean().item() < 0.7
        assert own[1].tolist() == [1.0] * PROMPT.size
    for network in of(model):
        network.record(None)
    assert mx.array_equal(logits(0.3), logits(1.0))


def test_the_native_decoder_counts_what_it_reads(fitted):
    model = load_path(fitted[1]).model
    steps(model, 0.6, model.plain)
    own = [network.counts for network in of(model)]
    steps(model, 0.6, model.native)
    for network, before, native in zip(of(model), own, model.native.usage, strict=True):
        assert native["counts"][0] == before[0] == PROMPT.size
        assert np.abs(np.subtract(native["counts"], before)).max() <= 3  # sizes at the threshold may round differently
        columns = native["counts"][1] * network.gate_up.column_bytes + native["counts"][2] * network.down.column_bytes
        scales = network.gate_up.scale_bytes + network.down.scale_bytes
        assert native["bytes"] == columns + PROMPT.size * scales
    before = model.native.usage
    mx.eval(model(PROMPT, model.new_cache(), RunOptions(fraction=0.6)))  # longer than FEW_TOKENS
    for network, then, now in zip(of(model), before, model.native.usage, strict=True):
        whole = [PROMPT.size * each for each in (1, network.gate_up.inputs, network.down.inputs)]
        assert np.subtract(now["counts"], then["counts"]).tolist() == whole
        assert now["bytes"] - then["bytes"] == network.read_bytes(1.0)


def test_few_tokens_together_have_the_bits_of_each_alone(fitted):
    model, tokens = load_path(fitted[1]).model, PROMPT[:, :FEW_TOKENS]
    caches = [model.new_cache(), model.new_cache()]
    for cache in caches:
        mx.eval(model(PROMPT, cache))
    together = model(tokens, caches[0], RunOptions(fraction=0.6))
    alone = [model(tokens[:, i : i + 1], caches[1], RunOptions(fraction=0.6)) for i in range(FEW_TOKENS)]
    assert mx.array_equal(together, mx.concatenate(alone, axis=1))


def test_less_sensitivity_computes_less_and_loses_more(fitted):
    model, errors, shares = load_path(fitted[1]).model, [], []
    whole, network = steps(model, 1.0), of(model)[0]
    for sensitivity in (0.95, 0.7, 0.4):
        before = model.native.usage[0]["counts"]
        errors.append(mx.mean(mx.abs(steps(model, sensitivity) - whole)).item())
        counts = np.subtract(model.native.usage[0]["counts"], before).tolist()
        tokens, part, all_weights = network.computed(counts)
        assert tokens == PROMPT.size
        shares.append(part / all_weights)
    assert errors == sorted(errors)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(0.95, abs=0.1)
    assert shares[-1] == pytest.approx(0.4, abs=0.2)


def test_openelm_and_biases_of_down(tmp_path, text):
    source = write_random_model(tmp_path / "openelm", OPENELM | {"vocab_size": 256})
    fit_dynamoe(str(source), tmp_path / "sparse", by="inputs", text=text, tokens=512)
    model, want = load_path(tmp_path / "sparse").model, load_path(source).model
    assert_close(steps(model, 1.0), want(PROMPT, want.new_cache()), "OpenELM", rtol=1e-3)


# The fit


def test_weights_of_inputs_are_the_divergence_that_leaving_them_out_causes():
    """Against the second derivative of a probe: the loss is ½ Σ f δ² of the outputs, to first order in each input."""
    model = random_model(CONFIG | {"intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 4})
    _, parts = gated_layers(model, "model")[0]
    mx.random.seed(1)
    x, f = mx.random.normal((4096, 64)), np.random.default_rng(0).random(64) + 0.1
    seen = fit_sparse.Moments()
    seen.add(parts, x[None])
    module = fit_sparse.network(parts)
    fit_sparse.fit_layer(module, parts, seen, f)
    down = np.array(dense(parts.down.module), np.float64)
    assert np.allclose(np.array(module.neuron_weights) ** 2, (f[:, None] * down**2).sum(0), rtol=1e-5)
    gate, up = (np.array(dense(rows.module), np.float64) for rows in (parts.gate, parts.up))
    tokens = np.array(x, np.float64)
    g, u = tokens @ gate.T, tokens @ up.T
    s = 1 / (1 + np.exp(-g))
    slope, opened = (s * (1 + g * (1 - s))) * u, g * s
    for i in (0, 17):
        changed = [(slope * gate[:, i]) ** 2 + (opened * up[:, i]) ** 2]
        want = (np.mean(changed[0], axis=0) * (f[:, None] * down**2).sum(0)).sum()
        assert np.array(module.input_weights)[i] ** 2 == pytest.approx(want, rel=1e-4)


def test_the_table_gives_the_shares_that_it_names():
    mx.random.seed(2)
    sizes = np.abs(np.random.default_rng(3).standard_normal((3, 2, 20000)))
    sizes[:, 1] *= 3  # inputs of down are larger: what counts twice matters
    histograms = [np.stack([fit_sparse._histogram(each) for each in layer]) for layer in sizes]
    fractions = fit_sparse.table(histograms)
    for share in (0.3, 0.5, 0.9, 0.99):
        threshold = fractions.dial(share)
        found = np.mean([(2 * (a >= threshold).mean() + (b >= threshold).mean()) / 3 for a, b in sizes])
        assert found == pytest.approx(share, abs=2e-3)


def test_dials_of_thresholds():
    fractions = Fractions("threshold", ((0.3, 0.5), (0.9, 0.1)))
    assert fractions.dial(1.0) is None
    assert fractions.dial(0.0) == fractions.dial(0.3) == 0.5
    assert fractions.dial(0.6) == pytest.approx(0.05**0.5)
    assert 0 < fractions.dial(0.99) < 0.1


@ONE_FORM
def test_the_fit_is_deterministic_and_goes_on(sources, text, fitted, tmp_path, monkeypatch):
    source, folder, _ = fitted
    again = tmp_path / "again"
    real, calls = fit_sparse.fit_layer, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    settings = {"by": "inputs", "text": text, "tokens": 1024}
    monkeypatch.setattr(fit_sparse, "fit_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_dynamoe(str(source), again, **settings)
    assert not again.exists()
    fit_dynamoe(str(source), again, **settings)
    assert len(calls) == 3  # the first layer was not fitted again
    assert digest(again) == digest(folder)


# The command


def answer(folder, *options):
    arguments = ("generate", "--model", folder, "--raw", "--max-tokens", 24, *options, "--json", "hello there, ")
    return json.loads(mlxeff(*arguments)[0])


@ONE_FORM
def test_generate_reports_what_was_kept(fitted):
    report = answer(fitted[1], "--sensitivity", "0.6")["timings"]["dynamoe"]
    assert set(report["kept_inputs"]) == {"gate_up", "down"}
    kept = report["kept_inputs"]
    assert report["mean_fraction"] == pytest.approx((2 * kept["gate_up"] + kept["down"]) / 3, abs=1e-3)
    assert 0.2 < report["mean_fraction"] < 1
    assert report["feed_forward_bytes"] > 0
    assert len(report["layer_fractions"]) == 2


@ONE_FORM
@pytest.mark.parametrize("width", [1, 7])
def test_drafts_that_leave_out_inputs_do_not_change_the_answer(fitted, width):
    plain = answer(fitted[1])
    drafted = answer(fitted[1], "--draft", "dynamoe:0.5", "--num-draft-tokens", width)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["timings"]["dynamoe_draft"]["rounds"] > 0


@ONE_FORM
def test_with_quantspec_and_a_prompt_cache(fitted, tmp_path):
    plain = answer(fitted[1], "--sensitivity", "0.6", "--kv-cache", "int8")
    options = ("--sensitivity", "0.6", "--quantspec", "--draft-weights", "shared", "--num-draft-tokens", 4)
    assert answer(fitted[1], *options)["token_ids"] == plain["token_ids"]
    file = tmp_path / "cache"
    answer(fitted[1], "--sensitivity", "0.6", "--prompt-cache", file)
    assert answer(fitted[1], "--sensitivity", "0.6", "--prompt-cache", file)["timings"]["reused_tokens"] > 5


def test_export_dense_gives_the_dense_model_back(fitted, tmp_path):
    source, folder, _ = fitted
    mlxeff("convert", folder, tmp_path / "dense", "--export-dense", "--quiet")
    got, want = load_path(tmp_path / "dense").model, load_path(source).model
    for a, b in zip(got.layers, want.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert mx.array_equal(dense(a.mlp[name]), dense(b.mlp[name]))
    assert mx.array_equal(got(PROMPT, got.new_cache()), want(PROMPT, want.new_cache()))


@ONE_FORM
def test_trace_shows_shares(fitted, tmp_path):
    out, _ = mlxeff(
        "trace", "dynamoe", fitted[1], "some words", "--out", tmp_path / "t.html", "--sensitivity", "0.6", "--json"
    )
    report = json.loads(out)
    assert 0.2 < report["mean_fraction"] < 0.95
    assert len({token["fraction"] for token in report["tokens"]}) > 2


# Bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version: wanted 1"),
        ({"widths": []}, "unknown keys ['widths']"),
        ({"gate_up": []}, "gate_up: wanted a list"),
        ({"down": [None]}, "down: wanted 2 layers"),
        ({"down": [[5, 32], None]}, "got [5, 32]"),
        ({"table": []}, "table: wanted pairs"),
        ({"table": [[0.9, 1], [0.3, 2]]}, "rising fractions"),
    ],
)
def test_damaged_entries(change, said):
    with pytest.raises(MlxeffError, match="dynamoe") as error:
        read_entry(ENTRY | change, "config")
    assert said in str(error.value)


def test_models_that_the_entry_does_not_fit():
    entry = ENTRY | {"gate_up": [None] * 3, "down": [None] * 3}
    with pytest.raises(MlxeffError, match="wanted 2 layers, the model's own, got 3"):
        build_model(CONFIG | {"intermediate_size": 192, "dynamoe": entry})
    with pytest.raises(MlxeffError, match="wanted multiples of 64 hidden units and of 32 neurons, got 64 and 80"):
        build_model(CONFIG | {"intermediate_size": 80, "dynamoe": ENTRY})


@ONE_FORM
def test_damaged_weights_of_inputs(fitted, tmp_path):
    damaged = shutil.copytree(fitted[1], tmp_path / "damaged")
    file = next(damaged.glob("*.safetensors"))
    arrays = mx.load(str(file))
    name = next(each for each in arrays if each.endswith("neuron_weights"))
    arrays[name] = -arrays[name]
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    assert "neuron_weights: wanted numbers of 0 or more" in fails("generate", "--model", damaged, "hi")


def test_options_and_models_that_the_fit_refuses(sources, tmp_path, text):
    arguments = ("fit", "dynamoe", sources / "4 bits", "--by", "inputs", "--out", tmp_path / "x", "--text", text)
    assert "--down: of nested experts only" in fails(*arguments, "--down", "shared")
    assert "--widths: of nested experts only" in fails(*arguments, "--widths", "0.5")
    convert(sources / "float32", tmp_path / "3 bits", quantize=(3, 32))
    said = fails("fit", "dynamoe", tmp_path / "3 bits", "--by", "inputs", "--out", tmp_path / "x", "--text", text)
    assert "layer 0: gate: wanted affine weights of 4 or 8 bits, got 3 bits affine" in said
    assert not (tmp_path / "x").exists()


def test_the_fisher_weights_are_those_of_experts(sources, text):
    """The fit by inputs takes the same Fisher information as that of experts, which its own tests check."""
    model = load_path(sources / "float16").model
    windows = np.array([[72, 101, 108, 108, 111, 32, 119, 111]], np.int32)
    assert fisher.output_weights(model, windows).shape == (2, 64)
    assert isinstance(fit_sparse.network(gated_layers(model, "model")[0][1]).gate_up, Columns)
