"""`benchmarks/gguf_quality.py` on a tiny model: its numbers, its tables, the saved ones. Costs 10 seconds."""

import json

import gguf
import numpy as np
import pytest

import gguf_quality
import saving
from mlxeff import kernels
from peers import checkpoints
from peers.measure import Engine
from peers.table import EXACT_FLOAT32
from test_cpu_peers import TINY, VOCABULARY, tokenizer_file  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(kernels.native()[0] is None, reason=kernels.native()[1])


class Made(gguf_quality.Files):
    """Files of the `gguf` library in place of llama.cpp's."""

    def __init__(self, folder, tokenizer, vocabulary=VOCABULARY):
        self.folder, self.half = folder, folder / "F16.gguf"
        checkpoints.write_random(self.half, tokenizer, vocabulary, TINY)

    def quantised(self, name):
        kind = gguf.GGMLQuantizationType[name]
        return saving.once(self.folder / name, lambda path: checkpoints.requantise(self.half, path, kind))


@pytest.fixture
def files(tmp_path, tokenizer_file):  # noqa: F811
    return Made(tmp_path, tokenizer_file)


def test_a_type_without_loss(files):
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
    found = gguf_quality.quality(files, "Q5_0", windows)
    assert found["types"] == {"Q5_0": 1.0}
    assert 0 <= found["kl"] < 1e-8
    assert found["top1"] == 1
    source = gguf_quality.open_source(files.quantised("Q5_0"))
    weights = sum(tensor.size for tensor in source.tensors.values())
    vectors = sum(tensor.size for tensor in source.tensors.values() if len(tensor.shape) == 1)
    assert found["memory_bytes"] == (weights - vectors) * 6 // 8 + 4 * vectors
    assert found["float16_bytes"] == 2 * weights
    assert not (files.folder / "Q5_0.F32.gguf").exists()


def test_the_divergence_is_from_the_dequantised_file(files, monkeypatch):
    """Beside other weights it is not 0."""
    monkeypatch.setattr(files, "dequantised", lambda name: saving.once(
        files.folder / "copy", lambda path: path.write_bytes(files.quantised("Q4_0").read_bytes())
    ))  # fmt: skip
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
    assert gguf_quality.quality(files, "Q5_0", windows)["kl"] > 1e-4


def test_speed_and_its_table(tmp_path, tokenizer_file, monkeypatch):  # noqa: F811
    files = Made(tmp_path, tokenizer_file, 40000)  # the worker's prompts have ids below that
    monkeypatch.setattr(gguf_quality, "DEPTH", 16)
    monkeypatch.setattr(
        gguf_quality, "arms", lambda _, path: [(gguf_quality.MINE, Engine("mlxeff", path, EXACT_FLOAT32))]
    )
    samples = gguf_quality.speed(files, ["Q5_0"], rounds=1, threads=1, limit=60)
    assert [(each["file"], each["arm"]) for each in samples] == [("F16", "mlxeff"), ("Q5_0", "mlxeff")]
    assert all(each["load_average"] >= 0 and min(each["ttft_s"]) > 0 for each in samples)
    slow = [each | {"arm": gguf_quality.LLAMA, "options": {"flash_attention": flash}, "ttft_s": [seconds]}
            for each in samples for flash, seconds in ((True, 7.0), (False, 5.0))]  # fmt: skip
    lines = gguf_quality.text({"files": {}, "samples": samples + slow}).splitlines()
    assert len(lines) == 4
    assert lines[3].split(" | ")[3] == "5"  # the better setting
    assert lines[3].split(" | ")[2] == ""  # not measured


def test_the_report_holds_the_committed_results():
    report = saving.REPORT.read_text(encoding="utf-8")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in saving.RESULTS.glob("*-gguf-quality.json")]
    assert found
    assert any(gguf_quality.text(document) in report for document in found)
