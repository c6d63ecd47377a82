"""The arithmetic of `benchmarks/seedlm_quality.py`, and the whole of it on a tiny model."""

import json
import math
import sys

import mlx.core as mx
import numpy as np
import pytest

import seedlm_quality
from mlxeff import kernels
from mlxeff.loading import load_path
from tiny_model import quantise_folder, write_tiny_model

pytestmark = pytest.mark.skipif(kernels.native()[0] is None, reason=kernels.native()[1])


class Fixed:
    """A model whose logits depend on the token alone."""

    def __init__(self, table):
        self.table = mx.array(table)

    def new_cache(self):
        return None

    def __call__(self, tokens, cache):
        return self.table[tokens]


def test_measures_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7, 7))
    windows = rng.integers(0, 7, (3, 11))
    reference, other = Fixed(a.astype(np.float32)), Fixed(b.astype(np.float32))
    found = seedlm_quality.measure(reference, {"reference": reference, "other": other}, windows)
    assert found["reference"]["kl"] == 0
    assert found["reference"]["top1"] == 1
    p, q = (np.exp(t) / np.exp(t).sum(-1, keepdims=True) for t in (a, b))
    at, following = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    want = {
        "perplexity": math.exp(-np.log(q[at, following]).mean()),
        "kl": (p * np.log(p / q)).sum(-1)[at].mean(),
        "top1": (a.argmax(-1) == b.argmax(-1))[at].mean(),
    }
    assert found["other"] == pytest.approx(want, rel=1e-5)


def test_an_affine_arm_is_the_requantised_reference(tmp_path):
    folder = quantise_folder(write_tiny_model(tmp_path / "m"))
    model = seedlm_quality.affine_arm(folder, 4, 128)
    layer = model.model.layers[0].mlp
    assert (layer.up_proj.group_size, layer.down_proj.group_size, layer.up_proj.bits) == (64, 32, 4)
    dense = seedlm_quality.dense(load_path(folder).model.model.layers[0].mlp.up_proj).astype(mx.float16)
    assert mx.array_equal(layer.up_proj.weight, mx.quantize(dense, 64, 4)[0]).item()
    bits, _ = seedlm_quality.size(model)
    assert 4.5 < bits < 5.0
    assert model._fused is not None


def test_the_whole_benchmark_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    folder = quantise_folder(write_tiny_model(tmp_path / "m"))
    text = tmp_path / "text"
    text.write_text("All work and no play. " * 100)
    monkeypatch.setattr(seedlm_quality, "TEXT", text)
    monkeypatch.setattr(seedlm_quality, "single_layers", lambda: {"Gaussian": {"affine 4 g64": 0.09}})
    options = ["--model", folder, "--work", tmp_path / "work", "--tokens", 1024]
    options += ["--arms", "affine 3 g64", "SeedLM 3 data-free"]
    monkeypatch.setattr(sys, "argv", ["seedlm_quality.py", *map(str, options)])
    seedlm_quality.main()
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document["tokens"] == 1024
    arms = document["arms"]
    assert set(arms) == {"reference", "affine 3 g64", "SeedLM 3 data-free"}
    assert arms["SeedLM 3 data-free"]["bytes"] < arms["affine 3 g64"]["bytes"]
    assert all(arm["kl"] > 0 for name, arm in arms.items() if name != "reference")
