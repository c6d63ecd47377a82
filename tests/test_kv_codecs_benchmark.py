"""`benchmarks/kv_codecs.py` on a tiny model: what the ways of rounding do to blocks, its numbers and its table. Two
seconds."""

import mlx.core as mx
import numpy as np
import pytest

import kv_codecs
from tiny_model import CONFIG, random_model

IDS = np.random.default_rng(3).integers(0, 256, 900).tolist()


def block(scale_of_a_channel: float = 1.0) -> mx.array:
    rows = np.random.default_rng(1).standard_normal((1, 2, 3, 64, 64)).astype(np.float32)
    rows[..., 5] *= scale_of_a_channel
    return mx.array(rows)


def error(codec, rows) -> float:
    return float(mx.sqrt(mx.mean((codec(rows) - rows) ** 2)))


def test_what_each_way_is_good_for():
    """One large channel spoils a group of one token, not one of a channel; a rotation spreads it; 8 bits are finer."""
    even, outlier = block(), block(30.0)
    assert error(kv_codecs.by_token, even) == pytest.approx(error(kv_codecs.by_channel, even), rel=0.05)
    assert error(kv_codecs.by_token, outlier) > 3 * error(kv_codecs.by_token, even)
    assert error(kv_codecs.turned(kv_codecs.by_token), outlier) < 0.8 * error(kv_codecs.by_token, outlier)
    assert error(lambda rows: kv_codecs.by_channel(rows, 8), even) < 0.1 * error(kv_codecs.by_channel, even)
    mean, deviation = outlier[0].mean((1, 2))[:, None, None], mx.sqrt(outlier[0].var((1, 2)))[:, None, None]
    codec = kv_codecs.calibrated(kv_codecs.by_token, mean, deviation)
    quiet = np.arange(64) != 5
    assert np.abs(np.array(codec(outlier) - outlier))[..., quiet].mean() < 0.2


def test_older_tokens_are_rounded_once():
    keys, values = (block()[:, :, 0].reshape(1, 2, 64, 64) for _ in range(2))
    layer = kv_codecs.RoundedLayer(None, (kv_codecs.by_channel, kv_codecs.by_token))
    for _ in range(3):
        layer.append(keys, values)
    layer.append(keys[:, :, :1], values[:, :, :1])
    held = layer.state()[0]
    assert layer.done == 128
    want = kv_codecs.by_channel(keys[:, :, None])[:, :, 0]
    assert mx.array_equal(held[:, :, :64], want)
    assert mx.array_equal(held[:, :, 64:128], want)
    assert mx.array_equal(held[:, :, 128:192], keys)


def test_numbers_and_table(monkeypatch):
    for name, value in (("PROMPT", 40), ("WINDOW", 300), ("ENDS", 1)):
        monkeypatch.setattr(kv_codecs, name, value)
    model = random_model(CONFIG | {"head_dim": 64, "max_position_embeddings": 1024, "num_hidden_layers": 3}, seed=1)
    model.use_native()
    found = kv_codecs.measure(model, IDS, 2, 0)
    assert len(found) == 2 + 2 * 5 + 4
    assert found["float32"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["8 bits"]["accepted"] == 1
    assert found["8 bits"]["kl"] < 0.1 * found["per channel"]["kl"]
    assert found["per channel, ends in 8 bits"]["kl"] < found["per channel"]["kl"]
    biased = kv_codecs.measure(model, IDS, 1, 60)
    assert len(biased) == 2 + 5 + 4
    assert biased["per token"]["kl"] > 3 * found["per token"]["kl"]
    assert biased["the same, keys in 8 bits"]["kl"] < biased["per token, rotated, newest in 8 bits"]["kl"]
    lines = kv_codecs.text({"arms": {"0": found, "60": biased}}).splitlines()
    assert len(lines) == 2 + 15 + 1 + 2 + 10
    assert lines[2].startswith("| 8 bits | ")
    assert lines[18].startswith("| 4 bits, biases of 60 | ")


def test_newest_tokens_are_rounded_when_they_are_appended():
    keys, values = (block()[:, :, 0].reshape(1, 2, 64, 64) for _ in range(2))
    eight = (lambda rows: kv_codecs.by_token(rows, 8),) * 2
    layer = kv_codecs.RoundedLayer(None, (kv_codecs.by_token,) * 2, eight)
    for _ in range(3):
        layer.append(keys, values)
    held = layer.state()[0]
    assert mx.array_equal(held[:, :, :64], kv_codecs.by_token(keys[:, :, None])[:, :, 0])
    assert mx.array_equal(held[:, :, 64:128], eight[0](keys[:, :, None])[:, :, 0])


def test_biases_are_rotated_as_keys_are():
    """At position 0 as they are; the products of two at positions of equal distance are equal."""
    bias = mx.array(np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32))
    rows = np.array(kv_codecs.rotated(bias, 0, 100))[0]
    assert np.array_equal(rows[:, 0], np.array(bias))
    assert np.abs((rows[:, 3] * rows[:, 10]).sum(-1) - (rows[:, 53] * rows[:, 60]).sum(-1)).max() < 1e-3
