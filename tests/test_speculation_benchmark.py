"""`benchmarks/speculation.py` on a tiny model: its samples, its comparison of answers and its tables. Some five
seconds."""

import argparse
import json

import numpy as np
import pytest

import speculation
from mlxeff.assembly.model import load_path
from mlxeff.bench.samples import Samples
from speculation import ARMS, KEYS
from tiny_model import write_tiny_model

IDS = np.random.default_rng(4).integers(0, 256, 2000).tolist()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    config = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 2048}
    return load_path(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", config, seed=2))


@pytest.fixture
def options(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(speculation, "load", lambda *_: loaded)
    monkeypatch.setattr(speculation, "text_ids", lambda _: IDS)
    return argparse.Namespace(rounds=2, depths=[150, 90], weights=["Q4_1"], tokens=12, model="tiny", work=tmp_path)


def test_samples_and_tables(options):
    samples = Samples(options.work / "samples.jsonl", {}, KEYS)
    speculation.measure(options, samples)
    assert len(samples.all) == 2 * 2 * len(ARMS)
    assert all(sample["equal"] for sample in samples.all if "plain" in sample["arm"])
    assert all(sample["tps"] > 0 for sample in samples.all)
    sizes = {sample["arm"]: sample["kv_bytes"] for sample in samples.all}
    assert sizes["plain float32"] > sizes["plain float16"] > sizes["plain int8"] == sizes["QuantSpec 4"]
    assert all(0 <= s["acceptance"] <= 1 for s in samples.all if s["arm"] == "QuantSpec 4")
    lines = speculation.text({"samples": samples.all}).splitlines()
    assert lines[0].endswith("| @90 | @150 |")
    assert [line.split(" | ")[0].strip("| ") for line in lines[2 : 2 + len(ARMS)]] == list(ARMS)
    assert lines[-1].startswith("| Q4_1 @150 | ")


def test_what_is_there_is_not_measured_again(options, monkeypatch):
    path = options.work / "samples.jsonl"
    speculation.measure(options, Samples(path, {}, KEYS))
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:-3]) + "\n")
    again = Samples(path, {}, KEYS)
    speculation.measure(options, again)
    assert len(again.all) == len(whole) - 1
    monkeypatch.setattr(speculation, "load", lambda *_: pytest.fail("loaded"))
    speculation.measure(options, again)


def test_ratios_are_those_of_medians():
    plain = {"plain float32": 10, "plain float16": 20, "plain int8": 40}
    samples = [{"weights": "Q4_1", "depth": 8, "arm": arm, "tps": tps} for arm, tps in plain.items()]
    samples += [{"weights": "Q4_1", "depth": 8, "arm": "QuantSpec 2", "tps": tps} for tps in (80, 1, 900)]
    lines = speculation.speeds(samples, "Q4_1", [8]).splitlines()
    assert "| QuantSpec 2 | 80.0 (8.00 / 4.00 / 2.00) |" in lines
    assert "| QuantSpec 3 |  |" in lines


def test_answers_are_compared_until_enough(loaded, options, monkeypatch):
    for name, value in {"SHORTEST": 40, "LONGEST": 90, "PROVED": 16}.items():
        monkeypatch.setattr(speculation, name, value)
    samples = Samples(options.work / "proof.jsonl", {}, ["number"])
    speculation.prove(loaded, 20, samples)
    first = json.dumps(samples.all[0])
    assert sum(sample["compared"] for sample in samples.all) >= 20
    again = Samples(options.work / "proof.jsonl", {}, ["number"])
    speculation.prove(loaded, 40, again)
    assert json.dumps(again.all[0]) == first
    assert all(40 <= sample["length"] <= 90 for sample in again.all)


def test_an_answer_that_differs_is_told(loaded, monkeypatch):
    """A draft that is taken for right where it is not gives another token."""
    draft, prompt = speculation.draft_of(loaded, "Q4_1"), IDS[:60]
    monkeypatch.setattr(speculation, "PROVED", 10)
    honest, calls = speculation.answer, []

    def answer(*arguments):
        found, numbers = honest(*arguments)
        calls.append(found)
        return ([*found[:6], found[6] + 1, *found[7:]] if len(calls) == 2 else found), numbers

    monkeypatch.setattr(speculation, "answer", answer)
    found = speculation.compare(loaded.model, draft, prompt)
    assert (found["position"], found["compared"]) == (6, 7)
    assert found["gap"] > 0
    table = speculation.proof_text({"samples": [found | {"start": 5, "length": 60}]}).splitlines()
    assert table[2].startswith("| 1 | 7 | 1 | ")
    assert table[-1].startswith("| 5 | 60 | 6 | ")
