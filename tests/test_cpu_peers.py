"""benchmarks/cpu_peers.py: what it counts, repairs, writes and concludes. The measuring itself is not tested here."""

import json
import shutil
import subprocess
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

import saving
from checkpoint_files import write_gguf
from mlxeff import kernels
from mlxeff.assembly.model import load_path
from mlxeff.bench.selection import selected
from mlxeff.errors import MlxeffError
from peers import checkpoints, engines, install, measure, report, table
from peers.table import FOUR, LARGE, Job

TINY = {
    "embedding_length": 64,
    "block_count": 2,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "feed_forward_length": 96,
    "context_length": 256,
}
VOCABULARY = 320
MATRICES = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)  # values of the layers' matrices


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A GGUF file with a byte-level tokenizer of 257 tokens."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68)]
    keys = {"model": "gpt2", "pre": "smollm", "tokens": [*map(chr, letters), "ab"], "token_type": [1] * 257}
    keys |= {"merges": ["a b"], "eos_token_id": 0}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return write_gguf(tmp_path_factory.mktemp("like") / "like.gguf", "llama", metadata, {})


@pytest.fixture(scope="module")
def tiny(tokenizer_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "tiny.gguf"
    checkpoints.write_random(path, tokenizer_file, VOCABULARY, TINY)
    return path


def test_random_model_runs(tiny):
    loaded = load_path(tiny)
    logits = loaded.model(mx.array([[5, 6, 7]]), loaded.model.new_cache())
    assert logits.shape == (1, 3, VOCABULARY)
    # The last norm gives rows of length √64; an embedding of deviation 1/√64 then gives logits of deviation 1.
    assert 0.5 < mx.std(logits).item() < 2


def test_random_model_is_seeded(tiny, tokenizer_file, tmp_path):
    checkpoints.write_random(tmp_path / "again.gguf", tokenizer_file, VOCABULARY, TINY)
    assert (tmp_path / "again.gguf").read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("chosen", [arm for arm in table.ARMS if arm.ours], ids=lambda arm: arm.name)
def test_our_engine_decodes_with_the_options_of_each_arm(tiny, chosen):
    if kernels.native()[0] is None and chosen.options["compute"] != "exact":
        pytest.skip(f"the native kernels are {kernels.native()[1]}")
    engine, ids = engines.Mlxeff({"path": str(tiny), "options": chosen.options}), [5, 6, 7]
    model, found = load_path(tiny).model, list(engine.generate(ids, 3))
    logits = model(mx.array([ids + found]), model.new_cache())[0, 2:-1]
    if chosen.options["compute"] == "exact":
        assert found == mx.argmax(logits, axis=-1).tolist()
    # Half precision rounds keys and values by 2^-11, int8 products their inputs by 1/254 of the largest one of a row.
    assert np.allclose(engine.logits([ids, found[:2]])[2:4], np.array(logits[:2]), atol=0.1)
    assert len(found) == 3


def test_costs_count_the_file(tiny):
    costs = checkpoints.costs(tiny)
    assert costs.layer_values == MATRICES
    assert costs.head_values == VOCABULARY * 64
    norms = 4 * 64 * 5
    assert costs.weight_bytes == MATRICES // 32 * 20 + VOCABULARY * 64 // 32 * 34 + norms
    assert costs.decode_bytes(10, 2) == costs.weight_bytes + 10 * (2 * 2 * 32) * 2
    attention = 4 * 2 * 64 * (1 + 2 + 3)  # a query of each head against 1, 2 and 3 keys, then the values
    assert costs.prefill_flops(3) == 2 * (3 * MATRICES + VOCABULARY * 64) + attention


def test_large_model_is_llama_3_2_1b():
    shapes = checkpoints.large_tensors(checkpoints.LARGE_VOCABULARY, checkpoints.LARGE_SHAPE)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_235_814_400  # the release's parameter count


def test_requantised_values_are_within_half_a_step(tiny, tmp_path):
    path = tmp_path / "eight.gguf"
    checkpoints.requantise(tiny, path, gguf.GGMLQuantizationType.Q8_0)
    before, after = gguf.GGUFReader(tiny), gguf.GGUFReader(path)
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        wanted = gguf.quants.dequantize(old.data, old.tensor_type).reshape(-1, 32)
        got = gguf.quants.dequantize(new.data, new.tensor_type).reshape(-1, 32)
        # Half of a step max/127, plus the rounding of the scale to half precision (2^-11 of 127 steps).
        bound = np.abs(wanted).max(axis=1, keepdims=True) * (0.5 / 127 + 2**-11) + 1e-9
        assert (np.abs(got - wanted) <= bound).all(), new.name
    assert load_path(path).config["quantization"]["bits"] == 8


def test_requantising_one_type_keeps_the_others(tiny, tmp_path):
    path, kinds = tmp_path / "q4_0.gguf", gguf.GGMLQuantizationType
    checkpoints.requantise(tiny, path, kinds.Q4_0, only=kinds.Q4_1)
    before, after = gguf.GGUFReader(tiny), gguf.GGUFReader(path)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.tensor_type == kinds.Q4_1:
            assert new.tensor_type == kinds.Q4_0
        else:
            assert (new.tensor_type, new.data.tobytes()) == (old.tensor_type, old.data.tobytes())
    assert {t.tensor_type for t in before.tensors} >= {kinds.Q4_1, kinds.Q8_0}


def test_repair_puts_the_barrier_before_the_load(tmp_path):
    path = tmp_path / install.TILE_FILE
    path.parent.mkdir(parents=True)
    path.write_text("{\n" + install.TILE_LOAD + "}\n")
    install.repair(tmp_path)
    assert path.read_text() == '{\n    asm volatile("" :: "r"(&tc) : "memory");\n    _tile_loadconfig(&tc);\n}\n'


@pytest.mark.parametrize("text", [None, "other", install.TILE_LOAD * 2])
def test_repair_refuses_other_sources(tmp_path, text):
    path = tmp_path / install.TILE_FILE
    path.parent.mkdir(parents=True)
    if text is not None:
        path.write_text(text)
    with pytest.raises(MlxeffError, match="wanted one line '_tile_loadconfig"):
        install.repair(tmp_path)


def test_install_failure_is_a_line_and_a_field(tmp_path, monkeypatch, capsys):
    def fail(folder):
        install.run(folder, "torch", ["false"])

    monkeypatch.setitem(install.PEERS, "torch", fail)
    peer = install.install("torch", tmp_path)
    assert not peer.present
    assert "torch.log" in peer.how
    assert capsys.readouterr().err.startswith("torch: not measured: ")


def test_jobs_take_turns():
    found = table.jobs(2, [1, 2])
    assert len({job.key for job in found}) == len(found)
    speed = [job for job in found if job.kind == "speed"]
    assert [job.round for job in speed] == sorted(job.round for job in speed)
    groups = [place for place, _ in groupby((job.round, job.model, job.depth, job.threads) for job in speed)]
    assert len(groups) == len(set(groups)), "the arms of one place are neighbours"


def test_only_selects_by_key():
    job = asdict(Job("speed", "llama.cpp, flash attention", FOUR, 2, 512, 0))
    assert selected(job, [])
    assert selected(job, ["arm=mlxeff", "arm=llama.cpp", "depth=512"])
    assert not selected(job, ["depth=51"])
    assert not selected(job, ["arm=llama.cpp", "model=8-bit"])


def sample(arm, metric, value, kind="speed", model=FOUR, threads=2, depth=512, number=0):
    return asdict(Job(kind, arm, model, threads, depth, number)) | {metric: value}


def test_samples_resume(tmp_path):
    path, identity = tmp_path / "samples.jsonl", {"cpu": "a"}
    kept = measure.Samples(path, identity, resume=True, limit=10)
    kept.add(sample("a", "ttft_s", 1.0))
    kept.add(sample("b", "error", "out of memory"))
    kept.add(sample("c", "exceeded_s", 5))
    kept.add(sample("d", "exceeded_s", 10))
    with open(path, "a") as file:
        file.write('{"kind": "spe')  # killed while writing
    again = measure.Samples(path, identity, resume=True, limit=10)
    assert [s["arm"] for s in again.all] == ["a", "d"]
    assert again.hopeless(Job("speed", "d", FOUR, 2, 2048, 1))
    assert not again.hopeless(Job("speed", "d", FOUR, 2, 64, 0))
    again.add(sample("b", "ttft_s", 2.0))
    assert {s["arm"] for s in measure.Samples(path, identity, resume=True, limit=10).all} == {"a", "b", "d"}
    with pytest.raises(MlxeffError, match="cpu differ"):
        measure.Samples(path, {"cpu": "b"}, resume=True, limit=10)
    assert measure.Samples(path, {"cpu": "b"}, resume=False, limit=10).all == []


def test_ratios_use_the_better_setting_for_each_metric():
    costs = {(LARGE, "gguf"): checkpoints.Costs(10**9, 10**9, 0, 0, 0)}
    results = report.Results(
        [
            sample("llama.cpp, flash attention", "ttft_s", [1.0, 1.2, 9.0]),
            sample("llama.cpp, flash attention", "decode_tps", [50.0]),
            sample("llama.cpp, plain attention", "ttft_s", [2.0]),
            sample("llama.cpp, plain attention", "decode_tps", [100.0]),
            sample("mlxeff exact", "ttft_s", [0.6]),
            sample("mlx-lm", "ttft_s", [120.0]),
            sample("mlxeff exact", "rss_mib", [300.0]),
            sample("llama.cpp, flash attention", "rss_mib", [260.0]),
            sample("llama.cpp, plain attention", "rss_mib", [240.0]),
            sample("mlxeff exact", "rss_mib", [330.0], depth=2048),
            sample("llama.cpp, flash attention", "rss_mib", [300.0], depth=2048),
            sample("mlxeff exact", "decode_tps", [90.0], number=0),
            sample("mlxeff exact", "decode_tps", [110.0], number=1),
            sample("mlxeff exact", "decode_tps", [16.0], model=LARGE, depth=16),
            sample("mlxeff exact", "ttft_s", [10.0], model=LARGE),
            sample("memory read", "gbps", 20.0, "ceiling", "", depth=0),
            sample("fp32 matmul", "gflops", 160.0, "ceiling", "", depth=0),
        ],
        costs,
    )
    rows = {target.what: target.row(results, 2)[2] for target in report.TARGETS}
    assert rows["TTFT 512 / llama.cpp"] == "0.5 met"
    assert rows["decode at 512 / llama.cpp"] == "1 missed"
    assert rows["decode at 2048 / llama.cpp"] == "not measured"
    assert rows["share of read bandwidth, decode of 1B at 16"] == "0.8 met"
    assert rows["share of fp32 peak, whole prefill of 1B at 512"] == "0.64 met"  # 2 · 10⁹ · 512 / 10 s / 160 · 10⁹
    assert rows["TTFT 512, mlx-lm / ours"] == "200 met"
    assert rows["peak RSS - llama.cpp's, MiB"] == "60 met"
    assert results.bandwidth_share(report.OURS[0], LARGE, 2, 16) == pytest.approx(0.8, rel=1e-6)


def test_bandwidth_program_reads(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    program = measure.compile_bandwidth(tmp_path)
    run = subprocess.run([program, "8", "2", "3"], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 0
    assert subprocess.run([program, "8", "0", "3"], capture_output=True, check=False).returncode == 2


def test_peers_see_no_override(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    got = measure.environment(3)
    assert "OPENBLAS_CORETYPE" not in got
    assert got["MLXEFF_NUM_THREADS"] == got["OMP_NUM_THREADS"] == "3"
    assert Path(got["PYTHONPATH"]).name == "benchmarks"


def test_the_projects_report_holds_saved_results():
    """Of one machine: after `cpu_peers.py --save` comes `--report`. (Targets need files of the large model.)"""
    text = saving.REPORT.read_text(encoding="utf-8")
    found = [json.loads(path.read_text()) for path in saving.RESULTS.glob("*-cpu-peers-mlx-*.json")]
    parts = report.shown, report.ceilings, report.starts, report.qualities
    shown = [all(part(report.Results(each["samples"], {})) in text for part in parts) for each in found]
    assert any(shown) or not found
