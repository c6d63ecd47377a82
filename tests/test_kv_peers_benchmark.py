"""`benchmarks/kv_peers.py` without its peers: stand-in workers and samples made up for the tables. Some two seconds."""

import argparse
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest

import kv_cache
import kv_peers
from kv_peers import ARMS, KEYS, UNROTATED
from mlxeff.bench.samples import Samples
from peers import engines
from peers.checkpoints import Files
from peers.install import Peer

PEER = Peer("llama.cpp", "/peers/bin/python", "1", "source")
FILES = Files(Path("own.gguf"), Path("own.Q4_0.gguf"), Path("own.float32"))


def options(**changes):
    given = {"rounds": 2, "depths": [64, 2048], "threads": 2, "limit": 5.0, "windows": 1}
    return argparse.Namespace(**given | changes)


def test_arms_take_turns_and_a_limit_ends_one(monkeypatch, tmp_path):
    asked = []

    def worker(command, variables, limit):
        asked.append((command[0], command[-1]))
        if "mlx-lm" in command[-1]:
            raise subprocess.TimeoutExpired(command, limit)
        return '{"decode_tps": [10.0, 30.0, 20.0]}'

    monkeypatch.setattr(kv_peers, "last_line", worker)
    samples = Samples(tmp_path / "samples.jsonl", {}, KEYS)
    kv_peers.speed(options(), FILES, PEER, samples)
    lm = [sample for sample in samples.all if sample["arm"].startswith("mlx-lm")]
    assert [(s["depth"], s["exceeded_s"]) for s in lm] == [(64, 5.0)] * 2
    assert len(samples.all) == 4 * (len(ARMS) - 2) + 2
    assert {python for python, task in asked if '"llama.cpp"' in task} == {PEER.python}
    q4_0 = [task for _, task in asked if '"kv": "q4_0"' in task]
    assert ["Q4_0.gguf" in task for task in q4_0] == [False, True] * 4
    count = len(asked)
    kv_peers.speed(options(), FILES, PEER, samples)
    assert len(asked) == count


def test_tables():
    samples = [{"arm": name, "depth": 64, "decode_tps": [tps]} for name, tps in
               {"mlxeff int4": 90.0, "llama.cpp q4_0": 30.0, "llama.cpp q4_0, Q4_0 weights": 45.0}.items()]  # fmt: skip
    samples.append({"arm": "mlx-lm float32", "depth": 64, "exceeded_s": 300.0})
    samples.append({"arm": "mlx-lm kv_bits=8", "depth": 64, "error": "no"})
    quality = {"llama.cpp f16": {"perplexity": 30.0, "kl": 0.0, "agreement": 1.0}}
    quality |= {"llama.cpp q4_0": {"perplexity": 31.0, "kl": 0.02, "agreement": 0.9}}
    cards = {"speed": {"llama.cpp rotates": True}}
    lines = kv_peers.text({"samples": samples, "quality": quality, "cards": cards}).splitlines()
    assert "| mlxeff int4 | 0.56 | 90.0 |" in lines
    assert "| mlxeff int8 | 1.06 |  |" in lines
    assert "| mlx-lm float32 | 4.00 | above 300 s |" in lines
    assert "| mlx-lm kv_bits=8 | 1.12 | failed |" in lines
    assert "| int4 / q4_0 | 2.00 |" in lines
    assert "| llama.cpp f16 | 30.000 |  |  |" in lines
    assert "| llama.cpp q4_0 | 31.000 | 2.0e-02 | 90.00% |" in lines
    assert "rotates keys" in lines[-1]


def test_logits_belong_to_the_tokens_after_them(monkeypatch):
    """Rows that are certain of the next token have no perplexity; a kind with other rows differs."""
    for name, value in {"PROMPT": 4, "WINDOW": 12, "CHUNK": 2}.items():
        monkeypatch.setattr(kv_cache, name, value)
    window = list(range(12))
    assert kv_peers.pieces(window) == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]]
    right = 50 * np.eye(16, dtype=np.float32)[5:11]
    found = kv_peers.differences({"f16": right, "q4_0": np.roll(right, 1, axis=1)}, window, "f16")
    assert kv_peers.means(found["f16"]) == pytest.approx({"perplexity": 1, "kl": 0, "agreement": 1}, abs=1e-5)
    assert kv_peers.means(found["q4_0"])["agreement"] == 0


def test_the_worker_gets_pieces_and_the_variable(monkeypatch, tmp_path):
    asked = []

    def worker(command, variables, limit):
        asked.append((command, variables.get(kv_peers.ROTATION)))
        np.save(tmp_path / "rows.npy", np.zeros((600, 3), np.float32))

    monkeypatch.setattr(kv_peers, "last_line", worker)
    engine = kv_peers.Engine("llama.cpp", FILES.gguf, {}, PEER.python)
    for kind in ("q8_0", UNROTATED):
        rows = kv_peers.logits(kind, list(range(2048)), tmp_path / "rows.npy", engine, options())
        assert rows.shape == (600 - kv_cache.PROMPT, 3)
    assert [command[1:3] for command, _ in asked] == [["-m", "peers.engines"]] * 2
    assert [variable for _, variable in asked] == [None, "1"]
    assert '"kv": "q4_0"' in asked[1][0][-1]


def test_a_build_that_knows_the_variable_rotates(tmp_path):
    place = tmp_path / "lib/python3.11/site-packages/llama_cpp/lib"
    place.mkdir(parents=True)
    peer = Peer("llama.cpp", str(tmp_path / "bin/python"), "1", "source")
    (place / "libllama.so").write_bytes(b"\0other\0")
    assert not kv_peers.rotates(peer)
    (place / "libllama.so").write_bytes(b"\0LLAMA_ATTN_ROT_DISABLE\0")
    assert kv_peers.rotates(peer)


@pytest.mark.parametrize(("given", "kind"), [({}, 1), ({"kv": "f32"}, 0), ({"kv": "q8_0"}, 8), ({"kv": "q4_0"}, 2)])
def test_llama_cpp_gets_the_type_of_the_cache(given, kind):
    types_of = {"GGML_TYPE_F32": 0, "GGML_TYPE_F16": 1, "GGML_TYPE_Q4_0": 2, "GGML_TYPE_Q8_0": 8}
    engine = object.__new__(engines.LlamaCpp)
    engine.library = types.SimpleNamespace(**types_of, llama_context_default_params=types.SimpleNamespace)
    job = {"context": 64, "threads": 2, "options": {"flash_attention": True} | given}
    parameters = engine._parameters(job)
    assert (parameters.type_k, parameters.type_v, parameters.flash_attn_type) == (kind, kind, 1)


def test_logits_are_written(monkeypatch, tmp_path):
    made = types.SimpleNamespace(note="n", logits=lambda pieces: np.zeros((sum(map(len, pieces)), 3), np.float32))
    monkeypatch.setitem(engines.ENGINES, "llama.cpp", lambda job: made)
    job = {"engine": "llama.cpp", "pieces": [[1, 2], [3]], "logits": str(tmp_path / "rows.npy")}
    assert engines.write_logits(job) == {"note": "n"}
    assert np.load(tmp_path / "rows.npy").shape == (3, 3)
