"""DynaMoE with the other techniques: drafts of its smaller experts, QuantSpec, KV Prediction, SeedLM, chat and bench,
by the command on a tiny model. Costs about 25 s."""

import json

import mlx.core as mx
import pytest
from mlxeff.convert import convert

from mlxeff import kernels
from mlxeff.assembly.model import load_path
from mlxeff.dynamoe.install import of
from mlxeff.running import RunOptions
from test_cli import fails, mlxeff
from test_models import OPENELM
from tiny_model import write_random_model, write_tiny_model, write_words

PROMPT = "the auxiliary reads the prompt, the base answers: "
TOKENS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "text.txt", 1500)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory, text):
    """A DynaMoE model with heads that QuantSpec knows."""
    place = tmp_path_factory.mktemp("together")
    dense = write_tiny_model(
        place / "dense", {"head_dim": 64, "intermediate_size": 192, "num_hidden_layers": 3, "eos_token_id": []}
    )
    mlxeff("fit", "dynamoe", dense, "--out", place / "dyn", "--text", text, "--tokens", 1024, "--quiet")
    return place / "dyn"


def answer(folder, *options, prompt=PROMPT):
    arguments = ("generate", "--model", folder, "--raw", "--max-tokens", TOKENS, *options, "--json", prompt)
    return json.loads(mlxeff(*arguments)[0])


@pytest.mark.parametrize("sensitivity", ["1", "0.6"])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_drafts_of_smaller_experts_do_not_change_the_answer(dynamic, sensitivity, width):
    plain = answer(dynamic, "--sensitivity", sensitivity)
    drafted = answer(dynamic, "--sensitivity", sensitivity, "--draft", "dynamoe:0", "--num-draft-tokens", width)
    assert drafted["token_ids"] == plain["token_ids"]
    report = drafted["timings"]["dynamoe_draft"]
    assert report["draft_sensitivity"] == 0
    assert report["rounds"] > 0
    assert report["drafted_tokens"] > 0


def test_drafts_do_not_spoil_what_the_cache_was_computed_with(dynamic, tmp_path):
    """A prompt cache that was written with drafts is one of the verifying passes."""
    file = tmp_path / "cache"
    answer(dynamic, "--draft", "dynamoe:0", "--num-draft-tokens", 3, "--prompt-cache", file)
    again = answer(dynamic, "--prompt-cache", file)
    assert again["timings"]["reused_tokens"] > 20
    assert again["notices"] == answer(dynamic)["notices"]


def test_quantspec_at_a_sensitivity(dynamic):
    """Verified drafts give the answer of plain decoding on the same cache, with small experts in the draft too."""
    plain = answer(dynamic, "--sensitivity", "0.6", "--kv-cache", "int8")
    options = ("--sensitivity", "0.6", "--quantspec", "--draft-weights", "shared", "--num-draft-tokens", 4)
    drafted = answer(dynamic, *options)
    assert drafted["token_ids"] == plain["token_ids"]
    both = answer(dynamic, *options, "--draft", "dynamoe:0.3")
    assert both["token_ids"] == plain["token_ids"]
    assert both["timings"]["quantspec"]["draft_sensitivity"] == 0.3
    assert both["timings"]["dynamoe_draft"] is None


def test_prompt_lookup_at_a_sensitivity(dynamic):
    plain = answer(dynamic, "--sensitivity", "0.5")
    assert answer(dynamic, "--sensitivity", "0.5", "--prompt-lookup")["token_ids"] == plain["token_ids"]


def test_two_drafters_are_refused(dynamic):
    line = fails("generate", "--model", dynamic, "--draft", "dynamoe:0.3", "--draft-model", dynamic, "x")
    assert "--draft dynamoe: the model drafts itself" in line
    _, err = mlxeff("generate", "--model", dynamic, "--draft", "small", "x", code=2)
    assert "wanted dynamoe:S, got 'small'" in err


def test_a_dense_model_has_no_smaller_experts(tmp_path):
    folder = write_tiny_model(tmp_path / "dense")
    assert "--draft dynamoe: wanted a DynaMoE model" in fails(
        "generate", "--model", folder, "--draft", "dynamoe:0.3", "x"
    )


def test_kv_prediction_for_a_dynamic_base(dynamic, tmp_path, text):
    pair = tmp_path / "pair"
    options = ("--aux", "layers:0-1", "--text", text, "--tokens", 600, "--length", 100, "--quiet")
    mlxeff("fit", "kv-predictor", dynamic, "--out", pair, *options)
    found = answer(dynamic, "--kv-predict", f"{pair}:keep=4", "--sensitivity", "0.6")["timings"]
    assert found["kv_prediction"]["predicted_tokens"] > 0
    assert found["dynamoe"]["mean_fraction"] < 1


def test_all_together(dynamic, tmp_path, text):
    """Seeds as weights, a predicted prompt, a cache of 8 bits with drafts, and a sensitivity."""
    seeds, pair = tmp_path / "seeds", tmp_path / "pair"
    convert(dynamic, seeds, seedlm="4", data_free=True)
    options = ("--aux", "layers:0-1", "--text", text, "--tokens", 600, "--length", 100, "--quiet")
    mlxeff("fit", "kv-predictor", seeds, "--out", pair, *options)
    more = ("--kv-predict", pair, "--quantspec", "--num-draft-tokens", 3, "--sensitivity", "0.6")
    found = answer(seeds, *more)
    timings = found["timings"]
    assert timings["kv_prediction"]["predicted_tokens"] > 0
    assert timings["quantspec"]["rounds"] > 0
    assert timings["dynamoe"]["mean_fraction"] < 1
    assert timings["kv_dtype"] == "int8"
    assert len(found["token_ids"]) == TOKENS


def test_seeds_of_a_fitted_model(dynamic, tmp_path):
    """All matrices but the kept ones become seeds, those of the experts too; the routers stay."""
    convert(dynamic, tmp_path / "seeds", seedlm="4", data_free=True)
    model = load_path(tmp_path / "seeds").model
    for network, source in zip(of(model), of(load_path(dynamic).model), strict=True):
        matrices = [network.gate_proj, network.up_proj, network.down_proj, *network.experts]
        assert {type(each).__name__ for each in matrices} == {"SeedLinear"}
        assert mx.array_equal(network.router.weight, source.router.weight)
        assert mx.array_equal(network.order, source.order)


@pytest.mark.parametrize("how", [{"quantize": (4, 32)}, {"quantize": (8, 64)}, {"dtype": "bfloat16"}])
def test_convert_changes_the_storage_of_a_fitted_model(dynamic, tmp_path, how):
    convert(dynamic, tmp_path / "other", **how)
    model = load_path(tmp_path / "other").model
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.isfinite(model(tokens, model.new_cache(), RunOptions(fraction=0.5))).all().item()
    assert of(model)[0].order.dtype == mx.int32


def test_export_dense_gives_back_the_dense_model(dynamic, tmp_path):
    """To the bit, and stock mlx-lm loads it, while it refuses the DynaMoE."""
    mlx_lm = pytest.importorskip("mlx_lm")
    source = dynamic.parent / "dense"
    mlxeff("convert", dynamic, tmp_path / "dense", "--export-dense")
    got, want = (mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "dense", source))
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)
    assert "dynamoe" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    mlx_lm.load(str(tmp_path / "dense"))
    with pytest.raises(ValueError, match="router"):
        mlx_lm.load(str(dynamic))
    assert "wanted a DynaMoE checkpoint" in fails("convert", source, tmp_path / "no", "--export-dense")


@pytest.mark.parametrize("how", [{"quantize": (4, 32)}, {"seedlm": "4", "data_free": True}])
def test_export_dense_of_quantised_weights(dynamic, tmp_path, how):
    """The logits are those at sensitivity 1."""
    convert(dynamic, tmp_path / "small", **how)
    convert(tmp_path / "small", tmp_path / "dense", export_dense=True)
    models = [load_path(tmp_path / name).model for name in ("small", "dense")]
    tokens = mx.array([[1, 2, 3, 4]])
    small, dense = (model.plain.forward(tokens, model.new_cache(), RunOptions(), False) for model in models)
    assert mx.array_equal(small, dense)


@pytest.mark.parametrize("quantized", [False, True])
def test_export_dense_of_openelm(tmp_path, text, quantized):
    config = OPENELM | {"vocab_size": 261, "ffn_dim_divisor": 64, "ffn_multipliers": [2.0, 4.0, 3.0]}
    source = write_random_model(tmp_path / "openelm", config)
    if quantized:
        convert(source, tmp_path / "small", quantize=(8, 32))
        source = tmp_path / "small"
    mlxeff("fit", "dynamoe", source, "--out", tmp_path / "dyn", "--text", text, "--tokens", 512, "--quiet")
    convert(tmp_path / "dyn", tmp_path / "dense", export_dense=True)
    got, want = (mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "dense", source))
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_the_native_decoder_computes_as_the_operations_do(dynamic):
    """Prefill of many tokens, a few and single ones, at several sensitivities."""
    if kernels.native()[0] is None:
        pytest.skip(kernels.native()[1])
    model = load_path(dynamic).model
    assert model.native is not None
    tokens = mx.array([list(PROMPT.encode()) * 2])
    for fraction in (1.0, 0.8, 0.5, 0.0):
        options = RunOptions(fraction=fraction)
        for pieces in ([len(tokens[0])], [50, 5, 1, 1]):
            found = []
            for executor in (model.native, model.plain):
                cache, logits, start = model.new_cache(), [], 0
                for count in pieces:
                    logits.append(executor.forward(tokens[:, start : start + count], cache, options, False))
                    start += count
                found.append(mx.concatenate(logits, axis=1))
            native, plain = found
            close = mx.max(mx.abs(native - plain), axis=-1) < 1e-3
            # A token about whose expert there is doubt may take another one.
            assert mx.mean(close).item() > 0.9, (fraction, pieces)


def test_bytes_are_counted_in_the_kernels(dynamic):
    if kernels.native()[0] is None:
        pytest.skip(kernels.native()[1])
    one = ("--max-tokens", 1)
    whole = answer(dynamic, *one, "--sensitivity", "1")["timings"]["dynamoe"]
    least = answer(dynamic, *one, "--sensitivity", "0")["timings"]["dynamoe"]
    assert least["mean_fraction"] == pytest.approx(1 / 3, abs=1e-4)
    assert whole["feed_forward_bytes"] == 3 * 3 * 192 * 64 * 4, "three layers of three matrices"
    assert least["feed_forward_bytes"] == 3 * (3 * 64 * 64 + 2 * 64) * 4, "and the router's"


def test_chat_with_a_sensitivity(dynamic):
    options = ("--max-tokens", 4, "--sensitivity", "0.5", "--draft", "dynamoe:0")
    out, _ = mlxeff("chat", "--model", dynamic, *options, stdin=b"hello\nagain\n")
    assert len(out.splitlines()) >= 2


def test_bench_with_a_sensitivity(dynamic):
    measure = ("--prompt-lengths", 8, "--rounds", 1, "--warmup", 0, "--steps", 1)
    out, _ = mlxeff("bench", "ttft", dynamic, "--sensitivity", "0.5", *measure, "--json")
    assert any("sensitivity 0.5" in name for name in json.loads(out)["arms"])
