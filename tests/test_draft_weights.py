"""The weights that QuantSpec drafts with: planes of 8-bit weights, and copies in fewer bits. Some 6 s in all."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxeff import MlxeffError, RunOptions, kernels, modules, ops
from mlxeff.assembly import draft_weights
from mlxeff.assembly.draft_weights import bits_per_weight, coarse_copy, drafting
from mlxeff.quantspec import weights
from mlxeff.speculation.drafters import SelfDraft
from test_cli import document, fails
from test_speculation import PROMPT, SIZES, TEXT, plainly, speculated
from tiny_model import CONFIG, random_model, write_tiny_model

COMPUTE = [mode for mode in ("exact", "int8") if mode == "exact" or kernels.native()[0] is not None]


def quantised(bits, seed=2, group=32, **config):
    made = random_model(CONFIG | SIZES | config, seed=seed, scale=0.15)
    nn.quantize(made, group, bits, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    halves = [(name, array) for name, array in tree_flatten(made.parameters()) if name.endswith(("scales", "biases"))]
    made.load_weights([(name, array.astype(mx.float16)) for name, array in halves], strict=False)
    mx.eval(made.parameters())
    made.use_native()
    return made


def layer(dtype=mx.float16, group=64, table=False, rows=40, columns=256, shift=0.0):
    plain = modules.Embedding(1, 1) if table else modules.Linear(1, 1, bias=False)
    values = np.random.default_rng(7).normal(size=(rows, columns)) + shift
    values[3], values[4, ::2] = 0, 9  # a row of zeros; scales that differ within a row
    plain.weight = mx.array(values.astype(np.float32)).astype(dtype)
    return plain.to_quantized(group, 8)


def logits(model, options=RunOptions()):  # noqa: B008
    return np.array(model(mx.array([PROMPT]), model.new_cache(), options)[0])


@pytest.mark.parametrize("shift", [0.0, 30.0, None])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_sum_of_the_planes_is_the_matrix(group, dtype, shift):
    """Without an error, also where a type holds the sums of biases badly."""
    whole = layer(dtype, group, shift=shift or 0.0)
    if shift is None:
        whole.biases = whole.scales * mx.random.uniform(-20, 20, whole.scales.shape).astype(dtype)
    planes = weights.in_planes(whole, "w")
    want = np.array(modules.dense(whole)).astype(np.float64)
    upper, lower = (
        [np.array(part.astype(mx.float32)).astype(np.float64) for part in (m.scales, m.biases)] for m in planes.matrices
    )
    codes = [np.array(mx.view(each, mx.uint8)) for each in (planes.upper, planes.lower)]
    halves = [np.stack([each & 15, each >> 4], axis=-1).reshape(want.shape) for each in codes]
    spread = [[np.repeat(part, group, axis=1) for part in plane] for plane in (upper, lower)]
    exact = sum(code * scale + bias for code, (scale, bias) in zip(halves, spread, strict=True))
    scale, bias = (
        np.repeat(np.array(whole[n].astype(mx.float32)).astype(np.float64), group, 1) for n in modules.PARTS[1:]
    )
    codes = np.array(mx.view(whole.weight, mx.uint8)).reshape(want.shape)
    np.testing.assert_array_equal(exact, codes * scale + bias)
    np.testing.assert_allclose(np.array(planes.dense()), want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_the_upper_plane_is_the_nearest_without_the_lower(shift):
    """Its error is that of 16 levels: at most 7.5 steps of the 8-bit grid. With types that hold the bias well."""
    planes = weights.in_planes(layer(mx.float32, shift=shift), "w")
    error = np.abs(np.array(modules.dense(planes.draft())) - np.array(planes.dense())).reshape(40, -1, 64).max(axis=2)
    steps = np.array(planes.lower_scales)
    assert (error <= 7.5 * np.abs(steps) * (1 + 1e-3) + 1e-6).all()
    assert error.mean() > 6 * np.abs(steps).mean()  # so it is an upper half and not the matrix


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_and_rows(rows, native):
    if native and kernels.native()[0] is None:
        pytest.skip("the native kernels are not installed")
    whole, table = layer(), layer(table=True)
    x = mx.random.normal((rows, 256))
    ids = mx.array([[3, 0], [39, 4]])
    with pytest.MonkeyPatch.context() if native else ops.mlx_only():
        for module in (whole, table):
            planes = weights.in_planes(module, "w")
            product = planes.as_linear if module is table else planes
            np.testing.assert_allclose(product(x), module.as_linear(x) if module is table else module(x), atol=2e-4)
        np.testing.assert_allclose(planes(ids), table(ids), atol=1e-6 if native else 1e-2)  # float32, or float16


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_planes_is_the_model(tied, compute):
    """All its logits, in a pass of many tokens and in the tokens of a greedy answer; the draft holds no arrays of its
    own but what it shares."""
    model = quantised(8, tie_word_embeddings=tied)
    options = RunOptions(compute=compute)
    want, answer = logits(model, options), plainly(model, "int8", 12)
    before = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    draft = drafting(model, "upper")
    got = logits(model, options)
    limit = 2e-4 if compute == "exact" else 3e-2  # a sum in another order may round to another integer of 8 bits
    np.testing.assert_allclose(got, want, atol=limit * np.abs(want).max())
    assert plainly(model, "int8", 12) == answer
    shared = {id(array) for _, array in tree_flatten(model.parameters())}
    assert all(id(array) in shared for _, array in tree_flatten(draft.parameters()))
    after = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert after < 1.12 * before  # two more numbers of 32 bits for each 32 weights
    assert bits_per_weight(draft) < 5.1 < 9.9 < bits_per_weight(model)
    if kernels.native()[0] is not None:
        assert model.native is not None
        assert draft.native is not None
    coarse = np.abs(logits(draft) - want).mean() / np.abs(want).mean()
    assert 1e-3 < coarse < 0.5


def test_drafts_of_the_upper_half():
    """Greedy answers are those of the model; some drafted tokens are right."""
    model = quantised(8)
    draft = drafting(model, "upper")
    want = plainly(model, "int8", 40)
    got, report, _ = speculated(model, "int8", 40, SelfDraft(draft, RunOptions(kv="int8")), 3)
    assert got == want
    assert report["acceptance"] > 0.2
    again = drafting(model, "upper")
    assert again.layers[0].mlp.up_proj.weight is draft.layers[0].mlp.up_proj.weight


def test_layers_that_are_not_in_8_bits_stay():
    model = quantised(8)
    model.layers[0].mlp.up_proj = modules.Linear(64, 96, bias=False).to_quantized(32, 4)
    found = model.layers[0].mlp.up_proj
    draft = drafting(model, "upper")
    assert model.layers[0].mlp.up_proj is found
    assert draft.layers[0].mlp.up_proj.weight is found.weight
    assert isinstance(model.layers[0].mlp.down_proj, weights.PlaneLinear)


def test_wrong_weights_are_one_line(tmp_path):
    with pytest.raises(MlxeffError, match=r"wanted a model with weights of 8 bits, got 5\.0 bits a weight: give q4"):
        drafting(quantised(4), "upper")
    large = layer()
    large.scales = large.scales * 0 + 5000
    with pytest.raises(MlxeffError, match="head: wanted scales that can be multiplied by 16, got 5000"):
        weights.in_planes(large, "head")
    dense = write_tiny_model(tmp_path / "dense", CONFIG | SIZES)
    error = fails("generate", "Hello", "--model", dense, "--quantspec", "--draft-weights", "upper")
    assert error.startswith("--draft-weights upper: wanted a model with weights of 8 bits, got 32.0 bits a weight")


def test_through_the_command(tmp_path):
    """A checkpoint with 8-bit weights, as mlx-lm writes it."""
    from mlx_lm.utils import save_model

    folder = write_tiny_model(tmp_path / "eight", CONFIG | SIZES | {"max_position_embeddings": 1024})
    model = quantised(8)
    config = {**CONFIG, **SIZES, "max_position_embeddings": 1024, "quantization": {"group_size": 32, "bits": 8}}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_model(folder, model)
    import json

    (folder / "config.json").write_text(json.dumps(config))
    arguments = (TEXT, "--raw", "--max-tokens", 30)
    want = document(folder, *arguments, "--kv-cache", "int8")
    got = document(folder, *arguments, "--quantspec", "--draft-weights", "upper", "--num-draft-tokens", 3)
    assert got["token_ids"] == want["token_ids"]
    assert got["timings"]["quantspec"]["rounds"] > 0
    assert got["timings"]["quantspec"]["draft_weights"] == "upper"


@pytest.mark.parametrize("bits", [4, 6])
def test_a_copy_of_the_weights(bits):
    """It shares the norms, computes in its own bits, and leaves the model as it was."""
    model = random_model(CONFIG | SIZES, seed=2, scale=0.15)
    model.use_native()
    before = plainly(model, None, 10)
    copied = coarse_copy(model, bits)
    assert bits_per_weight(copied) < bits + 3 < bits_per_weight(model)  # down_proj has rows of 96, and stays
    assert copied.layers[0].input_layernorm.weight is model.layers[0].input_layernorm.weight
    assert plainly(model, None, 10) == before
    native = kernels.native()[0] is not None
    assert (copied.native is not None) == native
    assert not native or copied.native is not model.native


def test_what_auto_chooses(monkeypatch):
    """A copy of weights with many bits; weights with few draft for themselves."""
    monkeypatch.setattr(draft_weights, "coarse_copy", lambda _, bits: f"{bits} bits")
    few = quantised(4)
    assert drafting(few) is few
    assert draft_weights.chosen(few, "auto") == "shared"
    assert draft_weights.chosen(few, "q6") == "q6"
    assert drafting(quantised(8)) == "4 bits"
    assert drafting(random_model(CONFIG | SIZES)) == "6 bits"
