"""benchmarks/quantspec_prediction.py: its numbers against calculations by hand, and the committed table. Some two
seconds, most of them imports."""

import pytest

import quantspec_prediction as prediction
import saving
from quantspec_prediction import MODELS, Shape, committed, predict


def test_shapes_are_those_of_the_releases():
    assert {name: shape.weights for name, shape in MODELS.items()} == {
        "SmolLM2-135M": 134_515_008,
        "Llama-3.2-1B": 1_235_814_400,
        "OpenELM-1.1B": 1_079_891_456,
        "Llama-2-7B": 6_738_415_616 - 32000 * 4096,  # the embedding is not read
    }


def test_bytes_of_llama_3_2_1b():
    shape = MODELS["Llama-3.2-1B"]
    assert shape.bytes(2.0, "float16", 0) == pytest.approx(2.471e9, rel=1e-3)
    assert shape.bytes(2.0, "float16", 1) - shape.bytes(2.0, "float16", 0) == 32_768
    assert shape.bytes(2.0, "int8", 1) - shape.bytes(2.0, "int8", 0) == 32_768 * 1.0625 / 2
    assert shape.bytes(0.5625, "draft", 100) == 1_235_814_400 * 4.5 / 8 + 100 * 32_768 * 0.5625 / 2
    assert shape.bytes(2.0, "int8", 0, reads=2.5) == 2.5 * 2 * 1_235_814_400


def test_numbers_of_the_other_caches():
    assert MODELS["Llama-2-7B"].numbers == 2 * 32 * 4096
    assert MODELS["SmolLM2-135M"].numbers == 2 * 30 * 3 * 64
    heads = [4] * 3 + [5] * 7 + [6] * 8 + [7] * 6 + [8] * 4  # of OpenELM 1.1B's layers
    assert MODELS["OpenELM-1.1B"].numbers == 2 * 64 * sum(heads)


def test_committed_tokens():
    assert committed(1, 0.9) == pytest.approx(1.9)
    assert committed(3, 0.5) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert committed(7, 1.0) == 8


def test_a_round_by_hand():
    """10^9 weights and as many numbers in the cache, at 100 GB/s of which 80 are usable, without overhead: a draft
    reads 0.8125 and 0.5625 GB, 17.1875 ms; verification 2 and 1.0625 GB, 38.28125 ms."""
    found = predict(Shape(10**9, 10**6), "float16", 1000, 100, 0.9, 0.0, 0.0)
    assert found["float16"] == pytest.approx(50)
    assert found["int8"] == pytest.approx(38.28125)
    by_width = {k: (k * 17.1875 + 38.28125) / sum(0.9**i for i in range(k + 1)) for k in range(1, 8)}
    assert found["width"] == min(by_width, key=by_width.get)
    assert found["quantspec"] == pytest.approx(min(by_width.values()))


def test_rows_that_read_weights_anew_and_overhead():
    """One row more reads 0.3 of the 2 GB again: 7.5 ms. Each pass has 1 ms of its own."""
    found = predict(Shape(10**9, 10**6), "float16", 1000, 100, 0.01, 0.3, 1.0)
    assert found["width"] == 1
    assert found["int8"] == pytest.approx(39.28125)
    assert found["quantspec"] == pytest.approx((17.1875 + 1 + 38.28125 + 7.5 + 1) / 1.01)


def test_verdicts():
    assert prediction.verdict(1.1) == "no 1.10"
    assert prediction.verdict(1.25) == "go 1.25"


def test_the_report_holds_what_the_script_predicts():
    """After a change of the model come `--save` and `--report`."""
    document = saving.read_json(prediction.PATH)
    assert document["samples"] == prediction.samples(document["card"]["overhead_ms"])
    begin, end = (f"<!-- {prediction.SECTION}: {edge} -->\n" for edge in ("begin", "end"))
    report = saving.REPORT.read_text(encoding="utf-8")
    assert report.split(begin)[1].split(end)[0].strip("\n") == prediction.text(document)
    assert prediction.text(document).count("predicted") >= 2 + len(MODELS)
