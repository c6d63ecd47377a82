"""`benchmarks/kv_cache.py` on a tiny model: its numbers and its table. Two seconds."""

import numpy as np
import pytest

import kv_cache
from tiny_model import CONFIG, random_model

IDS = np.random.default_rng(3).integers(0, 256, 700).tolist()


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(kv_cache, "PROMPT", 40)
    monkeypatch.setattr(kv_cache, "WINDOW", 300)
    monkeypatch.setattr(kv_cache, "STEPS", 3)
    monkeypatch.setattr(kv_cache, "ASKED", 100)
    made = random_model(CONFIG | {"head_dim": 64, "max_position_embeddings": 1024}, seed=1)
    made.use_native()
    return made


def test_numbers_and_table(model):
    found = kv_cache.quality(model, IDS, 2)
    assert found["float32"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["float32"]["agreement"] == 1
    rising = [found[kind]["kl"] for kind in ("float16", "int8", "k8v4", "int4")]
    assert rising == sorted(rising)
    assert rising[0] > 0
    sizes = [found[kind]["bytes"] for kind in kv_cache.KINDS]
    assert sizes == sorted(sizes, reverse=True)
    samples = kv_cache.speed(model, IDS, [200, 100], 2)
    assert len(samples) == 2 * 2 * len(kv_cache.KINDS)
    assert {len(sample["ms"]) for sample in samples} == {3}
    given = kv_cache.answers(model, IDS, 2)
    assert given["float32"] == {"same": 1, "tokens": 1}
    assert all(0 <= shares["same"] <= shares["tokens"] <= 1 for shares in given.values())
    table = kv_cache.text({"quality": found, "samples": samples, "answers": given}).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(kv_cache.KINDS)
    assert "tok/s @100 | tok/s @200" in table[0]


def test_the_table_takes_medians():
    samples = [{"kind": kind, "depth": 8, "ms": [10.0, 500.0, 20.0]} for kind in kv_cache.KINDS]
    quality = {kind: {"bytes": 50, "perplexity": 2.0, "kl": 0.5, "agreement": 0.25} for kind in kv_cache.KINDS}
    quality["float32"]["bytes"] = 100
    given = {kind: {"same": 0.75, "tokens": 0.9} for kind in kv_cache.KINDS}
    lines = kv_cache.text({"quality": quality, "samples": samples, "answers": given}).splitlines()
    assert lines[-1] == "| int4 | 0.500 | 2.000 | 5.0e-01 | 25.00% | 75% | 50 |"
