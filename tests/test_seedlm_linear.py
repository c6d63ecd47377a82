"""Seed-encoded modules: the three ways of each kernel, gradients, freezing, the config entry and its damage."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff import MlxeffError, kernels, ops
from mlxeff.seedlm import codec, install, linear
from mlxeff.seedlm.format import FORMATS, header
from mlxeff.seedlm.linear import SeedEmbedding, SeedLinear
from seedlm_models import randomise

NATIVE = pytest.param("native", marks=pytest.mark.skipif(kernels.native()[0] is None, reason=kernels.native()[1]))


@pytest.fixture(params=["ops", NATIVE])
def way(request):
    """On a CPU: the operations of MLX, or the native kernels."""
    with mx.stream(mx.cpu):
        if request.param == "ops":
            with ops.mlx_only():
                yield request.param
        else:
            yield request.param


def layer(name="4", rows=37, cols=100, bias=True, kind=SeedLinear, seed=0):
    made = kind(FORMATS[name], rows, cols, bias) if kind is SeedLinear else kind(FORMATS[name], rows, cols)
    randomise(made, np.random.default_rng(seed))
    if bias and kind is SeedLinear:
        made.bias = mx.random.normal((rows,), key=mx.random.key(3))
    return made


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_equals_the_dense_layer(way, name, dtype):
    """Columns that no format divides; 1, 2, 3, 8 and 33 tokens; an x that is a slice."""
    seeded = layer(name)
    dense = seeded.to_dense()
    assert np.array_equal(np.array(dense.weight), codec.decode(FORMATS[name], blocks_of(seeded), 100))
    for tokens in (1, 2, 3, 8, 33):
        x = mx.random.normal((2, tokens, 130), key=mx.random.key(tokens)).astype(dtype)[..., 10:110]
        want = dense(x.astype(mx.float32))
        got = seeded(x)
        assert got.shape == want.shape
        # MLX's way rounds the weights to x's type too.
        assert_close(got, want, f"{name}, {tokens} tokens", rtol=None if dtype == mx.float32 else 2.0**-6)
    assert (seeded(mx.zeros((3, 100), dtype)) == seeded.bias).all().item()


def blocks_of(seeded):
    return codec.unpack(seeded.block_format, seeded.rows, seeded.cols, seeded.arrays)


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedding_is_rows_of_the_dense_matrix(way, name):
    embedding = layer(name, kind=SeedEmbedding)
    ids = mx.array([[0, 36, 5], [5, 1, 0]])
    dense = embedding.to_dense()
    assert mx.array_equal(embedding(ids), dense(ids)).item()
    x = mx.random.normal((4, 100), key=mx.random.key(1))
    assert_close(embedding.as_linear(x), dense.as_linear(x), "as a head")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gradient_for_x_is_that_of_the_dense_layer(way, name, dtype):
    seeded = layer(name)
    dense = seeded.to_dense()
    x = mx.random.normal((2, 7, 100), key=mx.random.key(2))
    weigh = mx.random.normal((2, 7, 37), key=mx.random.key(5))
    loss = lambda module: lambda x: (module(x).astype(mx.float32) * weigh).sum()  # noqa: E731
    got, want = mx.grad(loss(seeded))(x.astype(dtype)), mx.grad(loss(dense))(x)
    assert got.dtype == dtype
    assert_close(got, want, name, rtol=None if dtype == mx.float32 else 2.0**-5)


@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_the_metal_kernels_run_and_have_the_gradient(monkeypatch, name):
    """The choice and the gradient around the launches; the launches are replaced by their twins."""
    called = []
    twins = {"matmul_metal": codec.matmul_ops, "rows_metal": codec.rows_ops, "decode_metal": codec.decode_ops}
    for launch, twin in twins.items():
        monkeypatch.setattr(
            linear.metal, launch, lambda *a, launch=launch, twin=twin: called.append(launch) or twin(*a)
        )
    monkeypatch.setattr(linear, "native_for", lambda *_: False)
    monkeypatch.setattr(linear, "_metal_for", lambda _: True)
    seeded, embedding = layer(name), layer(name, kind=SeedEmbedding)
    x = mx.random.normal((3, 100), key=mx.random.key(1))
    gradient = mx.grad(lambda x: seeded(x).square().sum())(x)
    assert called == ["matmul_metal", "decode_metal"]
    dense = seeded.to_dense()
    assert_close(gradient, mx.grad(lambda x: dense(x).square().sum())(x), name)
    assert mx.array_equal(embedding(mx.array([3, 4])), embedding.dense()[3:5]).item()
    assert called[3:] == ["rows_metal", "decode_metal"]


def test_the_blocks_never_train(way):
    seeded = layer()
    seeded.unfreeze()
    assert set(dict(tree_flatten(seeded.trainable_parameters()))) == {"bias"}
    loss, gradients = nn.value_and_grad(seeded, lambda x: seeded(x).sum())(mx.ones((2, 100)))
    assert set(gradients) == {"bias"}
    assert loss.item() == pytest.approx(seeded(mx.ones((2, 100))).sum().item(), rel=1e-5)


def test_a_large_matrix_is_decoded_piece_by_piece_in_mx_operations(monkeypatch):
    seeded = layer("3", rows=50)
    whole = codec.decode_ops(FORMATS["3"], 100, seeded.arrays)
    monkeypatch.setattr(codec, "PIECE", 700)
    assert mx.array_equal(codec.decode_ops(FORMATS["3"], 100, seeded.arrays), whole).item()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.layers = [nn.Linear(24, 10, bias=False), nn.Linear(24, 16)]
        self.norm = nn.RMSNorm(24)


def good():
    return {"layers.1": (FORMATS["3"], 16, 24), "embed": (FORMATS["4"], 12, 24)}


def test_the_entry_says_what_becomes_of_a_model():
    model = Block()
    value = json.loads(json.dumps(install.entry(good())))
    install.install(model, value)
    assert isinstance(model.layers[1], SeedLinear)
    assert isinstance(model.embed, SeedEmbedding)
    assert type(model.layers[0]) is nn.Linear
    assert "bias" in model.layers[1]
    assert model.layers[1]["seeds"].shape == (16, 2)
    install.check_metadata(install.metadata()["seedlm"], "file")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda e: e.update(version=2), "version: wanted 1, got 2"),
        (lambda e: e.update(taps=[0, 1, 3, 13]), r"taps: wanted \[0, 1, 3, 12\], got \[0, 1, 3, 13\]"),
        (lambda e: e.update(register_bits=15), "register_bits: wanted 16, got 15"),
        (lambda e: e.update(seed="index"), "seed: wanted 'first-state', got 'index'"),
        (lambda e: e.pop("taps"), "missing key 'taps'"),
        (lambda e: e.update(scale=1), r"unknown keys \['scale'\]"),
        (lambda e: e.update(modules={}), "modules: wanted a table of modules"),
        (lambda e: e["modules"]["embed"].update(format="5"), "wanted 3, 4, 4.5 bits, got '5'"),
        (lambda e: e["modules"]["embed"].update(cols=25), r"embed: wanted shape \(12, 24\), got \(12, 25\)"),
        (lambda e: e["modules"]["embed"].update(rows="12"), "embed: rows: wanted a positive whole number, got '12'"),
        (lambda e: e["modules"]["embed"].pop("rows"), "embed: wanted cols, format, rows"),
        (
            lambda e: e["modules"].update(norm=e["modules"]["embed"]),
            "norm: wanted a linear layer or an embedding, got R",
        ),
        (lambda e: e["modules"].update(nothing=e["modules"]["embed"]), "nothing: wanted a linear .* got none"),
    ],
)
def test_another_entry_is_refused_in_one_line(change, complaint):
    value = json.loads(json.dumps(install.entry(good())))
    change(value)
    with pytest.raises(MlxeffError, match=complaint) as caught:
        install.install(Block(), value, "folder")
    assert str(caught.value).startswith("folder: ") or "bits" in complaint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "3", json.dumps(header() | {"version": 7})])
def test_another_file_header_is_refused(text):
    with pytest.raises(MlxeffError, match="file: SeedLM header"):
        install.check_metadata(text, "file")


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_blocks_are_refused_after_loading(name):
    model = Block()
    install.install(model, install.entry({"layers.1": (FORMATS[name], 16, 24)}))
    seeded = model.layers[1]
    randomise(seeded, np.random.default_rng(0))
    install.finish(model, "folder")
    first = "seeds" if FORMATS[name].planar else "blocks"
    kept = seeded[first]
    words = np.array(kept)
    words[3, 1] &= np.array(0xFFFF0000).astype(words.dtype) if words.dtype == np.uint32 else np.uint16(0)
    damage = {
        "wanted seeds 1 to 65535, got 0 at row 3, block 1": (first, mx.array(words)),
        "exponent_bias: wanted -96 to 96, got 97": ("exponent_bias", mx.array([97], mx.int32)),
        f"{first}: wanted {kept.dtype!s:.0}": (first, kept[:, :1]),
        "exponent_bias: wanted int32": ("exponent_bias", mx.array([1.0])),
    }
    for complaint, (part, value) in damage.items():
        before, seeded[part] = seeded[part], value
        with pytest.raises(MlxeffError, match=rf"^folder: layers\.1: {complaint}"):
            install.finish(model, "folder")
        seeded[part] = before
    install.finish(model, "folder")
