"""The arithmetic of `benchmarks/seedlm_quality.py`, its peers' quantisers, and the whole of it on a tiny model."""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import saving
import seedlm_quality
from mlxeff import kernels
from mlxeff.assembly.model import load_path
from mlxeff.errors import MlxeffError
from mlxeff.modules import dense
from peers import checkpoints
from quality import arms, llama_quant, mlx_lm_quant, mlx_on_native, process, report
from test_cpu_peers import TINY, VOCABULARY, tokenizer_file  # noqa: F401 - a fixture
from tiny_model import quantise_folder, write_tiny_model

pytestmark = pytest.mark.skipif(kernels.native()[0] is None, reason=kernels.native()[1])


class Fixed:
    """A model whose logits depend on the token alone."""

    def __init__(self, table):
        self.table = mx.array(table)

    def new_cache(self):
        return None

    def hidden(self, tokens, cache):
        return tokens

    def head(self, hidden):
        return self.table[hidden]

    def __call__(self, tokens, cache):
        return self.head(self.hidden(tokens, cache))


def test_measures_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7, 7))
    windows = rng.integers(0, 7, (3, 11))
    reference, other = Fixed(a.astype(np.float32)), Fixed(b.astype(np.float32))
    truth = seedlm_quality.Truth(reference, windows)
    for same in (None, reference):
        found = seedlm_quality.measure(truth, same, windows)
        assert (found["kl"], found["top1"]) == (0, 1)
    p, q = (np.exp(t) / np.exp(t).sum(-1, keepdims=True) for t in (a, b))
    at, following = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    want = {
        "perplexity": math.exp(-np.log(q[at, following]).mean()),
        "kl": (p * np.log(p / q)).sum(-1)[at].mean(),
        "top1": (a.argmax(-1) == b.argmax(-1))[at].mean(),
    }
    assert seedlm_quality.measure(truth, other, windows) == pytest.approx(want, rel=1e-5)


def test_an_affine_arm_is_the_requantised_reference(tmp_path):
    folder = quantise_folder(write_tiny_model(tmp_path / "m"))
    model = arms.affine_arm(folder, 4, 128)
    layer = model.model.layers[0].mlp
    assert (layer.up_proj.group_size, layer.down_proj.group_size, layer.up_proj.bits) == (64, 32, 4)
    found = dense(load_path(folder).model.model.layers[0].mlp.up_proj).astype(mx.float16)
    assert mx.array_equal(layer.up_proj.weight, mx.quantize(found, 64, 4)[0]).item()
    size = arms.QuantisedModel(model).size()
    assert 4.5 < size["bits"] < 5.0
    assert model.native is not None


def test_the_products_of_mlx_lm_on_native_kernels_are_mlx_own():
    rng = np.random.default_rng(0)
    x, w = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((5, 3, 32), (7, 3, 32)))
    assert mx.allclose(mlx_on_native.einsum(mlx_on_native.CLIPS, x, w), mx.einsum(mlx_on_native.CLIPS, x, w), atol=1e-5)
    flat = x.flatten(0, -2)
    assert mx.allclose(mlx_on_native.gram(x), flat.T @ flat, atol=1e-5)
    heads = mx.array(rng.standard_normal((3, 1, 4, 9, 16)).astype(np.float32))
    found = mlx_on_native.attention(*heads, None, 0.25, "causal")
    assert mx.allclose(found, mx.fast.scaled_dot_product_attention(*heads, scale=0.25, mask="causal"), atol=1e-5)


def test_a_quantised_layer_trains_its_scales_as_mlx_does():
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False), 32, 4)
    layer.unfreeze(keys=["scales", "biases"], recurse=False)
    x = mx.random.normal((5, 64))
    layer.train()
    gradients = []
    for call in (mlx_on_native.quantized_linear, nn.QuantizedLinear.__call__):
        loss = lambda call=call: (call(layer, x) ** 2).sum()  # noqa: E731
        gradients.append(nn.value_and_grad(layer, loss)()[1])
    for kind in ("scales", "biases"):
        assert mx.allclose(gradients[0][kind], gradients[1][kind], rtol=1e-4, atol=1e-4)


def workshop(tmp_path, folder) -> arms.Workshop:
    place = arms.Workshop(folder, tmp_path / "work", tmp_path / "peers", 600)
    rng = np.random.default_rng(0)
    place.windows = rng.integers(0, 256, (8, 32))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("method", mlx_lm_quant.QUANTISERS)
def test_mlx_lm_quantises_the_decoder(method, tmp_path, monkeypatch):
    """Bits are those asked for, logits about as far from the reference's as after rounding; it is made once."""
    folder = write_tiny_model(tmp_path / "m")
    monkeypatch.setitem(mlx_lm_quant.METHODS, "mlx-lm GPTQ 4 g64", mlx_lm_quant.Method(method, 4, 32, 256))
    monkeypatch.setattr(mlx_lm_quant, "HEAD_GROUP", 32)
    place = workshop(tmp_path, folder)
    found = place.arm("mlx-lm GPTQ 4 g64")
    assert found.size()["bits"] == 5  # 4, and two halves for 32 weights
    assert (found.made["tokens"], found.made["native"]) == (256, True)
    ids = mx.array(place.windows)
    logits = [m(ids, m.new_cache()) for m in (load_path(folder).model, found.model, arms.affine_arm(folder, 4, 32))]
    error, rounded = (mx.square(each - logits[0]).mean().item() for each in logits[1:])
    assert 0 < error < 1.2 * rounded  # columns of random weights and inputs are independent: nothing to gain
    monkeypatch.setattr(process, "run", None)
    assert workshop(tmp_path, folder).arm("mlx-lm GPTQ 4 g64").made == found.made


def test_a_worker_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(MlxeffError, match=r"quality\.nothing: ended with 1"):
        process.make(tmp_path / "place", "quality.nothing", {}, 600)
    assert not (tmp_path / "place").exists()


def test_two_runs_fill_a_folder_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(process, "run", lambda *task: calls.append(task) or time.sleep(0.2) or {"cpu_s": 1.0})
    with ThreadPoolExecutor() as pool:
        notes = list(pool.map(lambda _: process.make(tmp_path / "place", "module", {}, 1), range(3)))
    assert len(calls) == 1
    assert notes[0] == notes[1] == notes[2]


def test_a_worker_has_its_limit(tmp_path):
    (tmp_path / "endless.py").write_text("while True: pass")
    program = "import sys; from quality import process; process.run('endless', {}, 1, sys.executable)"
    variables = {"PYTHONPATH": f"{tmp_path}:{seedlm_quality.HERE}:{seedlm_quality.HERE.parent}"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert "MlxeffError: endless: beyond 1 CPU seconds" in done.stderr


def test_importance_is_the_mean_square_of_the_inputs(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    model, windows = load_path(folder).model, np.arange(40).reshape(2, 20)
    found = llama_quant.importance(model, windows)
    assert len(found) == 14
    layer = load_path(folder).model.model
    inputs = layer.layers[0].input_layernorm(layer.embed_tokens(mx.array(windows)))
    for name in ("attn_q", "attn_k", "attn_v"):
        want = mx.square(inputs).mean(axis=(0, 1))
        assert found[f"blk.0.{name}.weight"] == pytest.approx(np.array(want), rel=1e-5)


def test_a_file_of_llama_cpp_becomes_an_arm(tokenizer_file, tmp_path):  # noqa: F811
    """The arm's logits are those of the file, but for the embedding, which is the reference's; bits are the file's."""
    source, file = tmp_path / "tiny.gguf", tmp_path / "eight.gguf"
    checkpoints.write_random(source, tokenizer_file, VOCABULARY, TINY)
    checkpoints.requantise(source, file, gguf.GGMLQuantizationType.Q8_0)
    nbytes = sum(matrix.nbytes for matrix in llama_quant.matrices(file))
    arm = arms.QuantisedModel(arms.assembled(source, arms.replaced_by(load_path(file).model)), nbytes)
    assert arm.size()["bits"] == 8.5
    assert llama_quant.types(file) == {"Q8_0": 1.0}
    other, ids = load_path(file).model, mx.array([[5, 6, 7]])
    assert mx.allclose(arm.model(ids, arm.model.new_cache()), other(ids, other.new_cache()), atol=0.05)


def document(kl_of: dict) -> dict:
    values = {"bytes": 10**8, "perplexity": 20.0, "top1": 0.9}
    found = {name: values | {"bits": 4 + i / 4, "kl": kl} for i, (name, kl) in enumerate(kl_of.items())}
    return {"arms": found, "single layers": {"Gaussian": {"affine 4 g64": 0.09}}}


def test_targets_say_met_and_missed():
    found = document({"SeedLM 4 aware": 0.1, "affine 4 g128": 0.2})
    found["arms"]["affine 4 g128"]["perplexity"] = 21.0
    (line,) = report.targets(found)
    assert line.startswith(
        "target met: SeedLM 4 aware (4.00 bits) below affine 4 g128 (4.25 bits): KL 0.1000 for 0.2000"
    )
    found["arms"]["SeedLM 4 aware"]["perplexity"] = 22.0
    assert report.targets(found)[0].startswith("target missed")


def test_a_document_gets_the_table_between_its_marks(tmp_path):
    place, picture = tmp_path / "RESULTS.md", tmp_path / "a.png"
    begin, end = "<!-- here: begin -->\n", "<!-- here: end -->\n"
    place.write_text(f"before\n{begin}old\n{end}after\n")
    found = document({"affine 4 g64": 0.2, "SeedLM 4 aware": 0.1})
    saving.write_section("here", report.section(found, picture, tmp_path), place)
    first = place.read_text()
    assert "old" not in first
    assert first.startswith(f"before\n{begin}\n![")
    assert first.endswith(f"\n\n{end}after\n")
    assert "| SeedLM 4 aware | 4.250 | 100.0 | 20.00 | 0.1000 | 90.0% |" in first
    saving.write_section("here", report.section(found, picture, tmp_path), place)
    assert place.read_text() == first
    with pytest.raises(SystemExit, match="wanted one <!-- there: begin -->"):
        saving.write_section("there", "text", place)
    assert place.read_text() == first
    del found["single layers"]
    lines = report.section(found | {"not measured": {"mlx-lm DWQ 3 g64": "no time"}}, picture, tmp_path)
    assert "- mlx-lm DWQ 3 g64: not measured: no time." in lines


def test_the_projects_report_holds_saved_results():
    """Of one machine: after `seedlm_quality.py --save` comes `--report`."""
    text = saving.REPORT.read_text(encoding="utf-8")
    found = [json.loads(path.read_text()) for path in (seedlm_quality.HERE / "results").glob("*-seedlm-quality.json")]
    shown = [all(part in text for part in (report.table(each), report.layers(each))) for each in found]
    assert any(shown) or not found


def test_every_arm_has_a_group():
    assert {report.group_of(name) for name in arms.NAMES} == set(report.GROUPS)
    assert report.group_of("reference") is None


def run(monkeypatch, capsys, *options) -> dict:
    monkeypatch.setattr(sys, "argv", ["seedlm_quality.py", *map(str, options)])
    seedlm_quality.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_whole_benchmark_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    folder = quantise_folder(write_tiny_model(tmp_path / "m"))
    text = tmp_path / "text"
    text.write_text("All work and no play. " * 100)
    monkeypatch.setattr(seedlm_quality, "TEXT", text)
    monkeypatch.setattr(seedlm_quality, "single_layers", lambda: {"Gaussian": {"affine 4 g64": 0.09}})
    monkeypatch.setattr(seedlm_quality, "stem", lambda: tmp_path / "results")
    monkeypatch.setattr(report, "plot", lambda *_: None)
    options = [
        "--model",
        folder,
        "--work",
        tmp_path / "work",
        "--cache",
        tmp_path / "cache",
        "--tokens",
        1024,
        "--save",
    ]
    first = run(monkeypatch, capsys, *options, "--arms", "affine 3 g64", "SeedLM 3 data-free")
    assert first["tokens"] == 1024
    assert set(first["arms"]) == {"reference", "affine 3 g64", "SeedLM 3 data-free"}
    assert first["arms"]["SeedLM 3 data-free"]["bytes"] < first["arms"]["affine 3 g64"]["bytes"]
    assert all(arm["kl"] > 0 for name, arm in first["arms"].items() if name != "reference")
    assert json.loads(Path(tmp_path / "results.json").read_text()) == first
    first["arms"]["affine 3 g64"]["kl"] = 77  # what is there already is not measured again
    (tmp_path / "results.json").write_text(json.dumps(first))
    more = run(monkeypatch, capsys, *options, "--add", "--arms", "affine 3 g64", "affine 4 g64")
    assert set(more["arms"]) == {*first["arms"], "affine 4 g64"}
    assert more["arms"]["affine 3 g64"]["kl"] == 77
    with pytest.raises(SystemExit, match="measured with another tokens"):
        run(monkeypatch, capsys, *options[:-2], 512, "--add")


def test_names_in_the_plot_lie_apart():
    found = report.apart([(0, 0), (10, 1), (20, 0.5), (500, 0.2)])
    assert all(abs(a - b) > 8.9 for i, a in enumerate(found[:3]) for b in found[:i])
    assert found[3] == 0.2


def test_results_that_another_run_saved_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(seedlm_quality, "stem", lambda: tmp_path / "results")
    seedlm_quality.write({"arms": {"a": 1}}, False)
    mine = {"arms": {"b": 2}}
    seedlm_quality.write(mine, True)
    assert mine == seedlm_quality.saved() == {"arms": {"a": 1, "b": 2}}
    seedlm_quality.write({"arms": {"c": 3}}, False)
    assert seedlm_quality.saved() == {"arms": {"c": 3}}
