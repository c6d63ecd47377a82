"""`mlxeff bench kernels`: what is multiplied, how much that reads and computes, and the ceilings. Some 10 s."""

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxeff.assembly.model import load_path
from mlxeff.bench import ceilings, kernels
from test_cli import mlxeff
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("kernels") / "base", {"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("kernels-seeds") / "seeds"
    mlxeff("convert", folder, place, "--seedlm", "4", "--data-free", "--quiet")
    return place


def test_every_matrix_is_multiplied_once(folder, seeds):
    for path in (folder, seeds):
        model = load_path(path).model
        found = kernels.products(model)
        assert sum(len(each.calls) for each in found) == 4 * 7 + 1  # of four layers, and the output head
        norms = sum(v.nbytes for name, v in tree_flatten(model.parameters()) if "norm" in name)
        total = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
        tied = model.end_parts().head.module is model.end_parts().embedding.module
        table = 0 if tied else sum(v.nbytes for _, v in tree_flatten(model.end_parts().embedding.module.parameters()))
        assert sum(each.bytes * len(each.calls) for each in found) == total - norms - table
        for each in found:
            assert each.calls[0](mx.ones((3, each.shape[1]))).shape == (3, each.shape[0])


def test_a_product_reads_and_computes_what_its_shape_says(monkeypatch):
    """On a clock that goes on by 2 s in a pass of four products."""
    times = iter([10.0, 12.0])
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    layers = [nn.Linear(64, 32, bias=False) for _ in range(4)]
    product = kernels.Product("float32", (32, 64), 4 * 32 * 64, layers)
    found = kernels._pass(product, 8, "cpu")
    assert found == pytest.approx({"seconds": 0.5, "gbps": 4 * 32 * 64 / 0.5e9, "gflops": 2 * 8 * 32 * 64 / 0.5e9})
    assert (product.test(1), product.test(8)) == ("32x64 float32, 1 row", "32x64 float32, 8 rows")


def test_ceilings_are_above_what_a_copy_of_the_work_reaches(monkeypatch):
    monkeypatch.setattr(ceilings, "ROWS", 2048)
    found = ceilings.measure("cpu")
    assert found["read_gbps"] > 0.1
    assert found["gflops"] > 0.1
    assert "1 x 4096 by 4096 x 2048 in float32" in found["how"]


def test_a_model_beside_its_seeds(folder, seeds):
    out, _ = mlxeff("bench", "kernels", folder, seeds, "--rows", "1,4", "-r", 3, "--json", "--device", "cpu")
    found = json.loads(out)
    assert set(found["arms"]) == {str(folder), str(seeds)}
    assert {"seconds", "gbps", "gflops"} == {row["metric"] for row in found["results"]}
    of_arm = [row for row in found["results"] if row["arm"] == str(seeds)]
    assert any("SEED" in row["test"].upper() or "4" in row["test"] for row in of_arm)
    row = next(row for row in of_arm if row["metric"] == "gbps")
    assert row["share_of_ceiling"] == pytest.approx(row["median"] / found["ceilings"]["cpu"]["read_gbps"])
    assert {row["count"] for row in found["results"]} == {3}


def test_without_a_model_it_measures_the_machine():
    found = json.loads(mlxeff("bench", "kernels", "--json", "--device", "cpu")[0])
    assert found["results"] == []
    assert set(found["ceilings"]["cpu"]) == {"read_gbps", "gflops", "how"}
