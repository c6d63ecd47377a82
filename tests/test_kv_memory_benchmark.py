"""`benchmarks/kv_memory.py` on a tiny model and a short cache, in processes of its own: its numbers, and the tables of
the saved result. Some five seconds."""

import json
import sys

import pytest

import kv_memory
import saving
from mlxeff.cache import KVCache, LayerShape
from mlxeff.running import DRAFT_VIEW
from tiny_model import write_tiny_model


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_run_is_saved_and_reported(monkeypatch, tmp_path, capsys):
    model = write_tiny_model(tmp_path / "tiny", {"head_dim": 64, "max_position_embeddings": 640})
    monkeypatch.setattr(saving, "RESULTS", tmp_path)
    command = ["kv_memory.py", "--model", str(model), "--lengths", "512", "--kinds", "float16", "int8", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--save"])
    kv_memory.main()
    (path,) = tmp_path.glob("*-kv-memory.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert document["card"]["command"] == f"python benchmarks/{' '.join([*command, '--save'])}"
    for task, tokens in (("prompt", 632), ("shape", 512)):
        found = document[task]
        assert [(s["kind"], s["tokens"]) for s in found] == [("float16", tokens), ("int8", tokens)]
        assert all(s["cache"] >= s["formula"] > 0 for s in found)
    for sample in document["shape"]:  # 512 tokens fill whole blocks of both kinds
        assert sample["cache"] == sample["formula"]
        if kv_memory.PAGES.exists():
            assert sample["peak"] >= sample["stays"] > 0.9 * sample["cache"]
    samples = document["attention"]
    assert len(samples) == 2 * len(kv_memory.QUERIES) * 3
    assert {len(s[name]) for s in samples for name in ("ms", "short_ms")} == {kv_memory.STEPS}
    assert all(s["gbps"] > 0 and min(s["ms"]) > 0 for s in samples)

    written = {}
    monkeypatch.setattr(saving, "write_section", lambda section, text: written.update({section: text}))
    monkeypatch.setattr(sys, "argv", ["kv_memory.py", "--report"])
    kv_memory.main()
    prompt, shape, times = written["kv-memory"].split("\n\n")
    for name, table in (("prompt", prompt), ("shape", shape)):
        want = [[s["kind"], str(s["tokens"]), f"{s['peak'] / 1e6:.1f}"] for s in document[name]]
        assert [row[:3] for row in rows(table)] == want
    assert [row[6] for row in rows(shape)] == ["16.8", "8.9"]
    arms = [row[:3] for row in rows(times)]
    assert arms == [[kind, "512", q] for q in "15" for kind in ("float16", "int8", "int8, draft")]


def test_the_tables_compare_with_float16_and_subtract_the_short_pass():
    def memory(kind, peak, stays):
        return {"kind": kind, "tokens": 8, "peak": peak, "stays": stays, "cache": 3e6, "formula": 2.5e6}

    def passes(kind, view, ms, number=0):
        about = {"kind": kind, "view": view, "tokens": 8, "queries": 5, "round": number, "gbps": 20.0}
        return about | {"formula": 4e7, "ms": ms, "short_ms": [1.0, 1.0, 99.0]}

    document = {"prompt": [memory("float32", 8e6, 6e6), memory("float16", 4e6, 4e6)], "shape": [memory("int8", 1, 1)]}
    document["attention"] = [passes("float16", "full", [5.0]), passes("int8", "draft", [2.0, 3.0])]
    document["attention"] += [passes("int8", "draft", [77.0], 1)]
    lines = kv_memory.text(document).splitlines()
    assert "| float32 | 8 | 8.0 | 2.00 | 6.0 | 1.50 | 3.0 | 2.5 |" in lines
    assert "| int8 | 8 | 0.0 |  | 0.0 |  | 3.0 | 2.5 |" in lines
    assert "| float16 | 8 | 5 | 4.0 | 1.00 | 40.0 | 10.0 | 50% |" in lines
    assert lines[-1] == "| int8, draft | 8 | 5 | 2.0 | 0.50 | 40.0 | 20.0 | 100% |"


def test_bytes_of_a_number_are_those_of_the_documentation():
    sizes = {"float32": 4, "float16": 2, "int8": 1.0625, "k8v4": 0.8125, "int4": 0.5625}
    assert {kind: kv_memory.number_bytes(kind, 64) for kind in kv_memory.KINDS} == sizes
    assert kv_memory.number_bytes("int8", 128, DRAFT_VIEW) == pytest.approx(0.53125)
    cache = KVCache.of([LayerShape(2, 64), LayerShape(2, 64, biased=True)], "int4")
    for layer in cache.layers:
        layer.length = 10
    assert kv_memory.formula(cache) == 10 * 2 * 2 * 64 * (0.5625 + 0.8125)
