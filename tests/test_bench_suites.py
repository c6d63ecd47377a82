"""The suites of `mlxeff bench suite` and `bench quality`, on tiny models in this process. Some 20 s."""

import contextlib
import io
import json

import pytest

from mlxeff import cli
from mlxeff.bench import model_suites, openelm_paper
from mlxeff.bench.points import DECODE, Point
from mlxeff.bench.published import LABELS
from mlxeff.bench.rows import rows
from test_bench import openelm
from test_cli import fails, mlxeff
from tiny_model import write_random_model, write_tiny_model


def run(*arguments, code=0):
    """The document that the command prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = cli.main(["bench", *map(str, arguments), "--json", "--device", "cpu", "--quiet"])
    assert got == code, err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("suites") / "base"
    return write_tiny_model(place, {"head_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 512})


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("suites-seeds") / "seeds"
    with contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["convert", str(folder), str(place), "--seedlm", "4", "--data-free", "--quiet"]) == 0
    return place


def test_quality_is_that_of_eval(folder, seeds):
    reading = ("--tokens", 300, "--context", 100)
    found = run("quality", folder, *reading, "--vs", "--kv-cache int8", "--vs", seeds)
    rows_ = {(row["arm"], row["metric"]): row for row in found["results"]}
    theirs, out = io.StringIO(), [*map(str, ("eval", "kl", seeds, "--against", folder, *reading, "--json", "--quiet"))]
    with contextlib.redirect_stdout(theirs), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(out) == 0
    want = json.loads(theirs.getvalue())
    row = rows_[str(seeds), "kl"]
    assert (row["median"], row["better"], row["count"]) == (want["kl"], "lower", 1)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * want["kl_error"])
    assert rows_[str(seeds), "agreement"]["median"] == want["same_top"]
    assert rows_[str(seeds), "ppl"]["median"] == want["perplexity"]
    assert rows_[str(folder), "ppl"]["median"] == want["against"]["perplexity"]
    assert (str(folder), "kl") not in rows_
    assert rows_[f"{folder} --kv-cache int8", "kl"]["median"] < row["median"]
    assert found["arms"][str(folder)]["fingerprint"] == want["against"]["fingerprint"]


def test_quality_goes_on_after_the_arms_that_a_file_has(folder, tmp_path):
    command = ("quality", folder, "--tokens", 100, "--context", 50, "--out", tmp_path / "q.jsonl")
    first = run(*command)
    assert run(*command)["samples"] == first["samples"]
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    changed = json.loads(lines[1]) | {"values": {"ppl": 1.5}}
    (tmp_path / "q.jsonl").write_text("\n".join([lines[0], json.dumps(changed)]) + "\n")
    assert run(*command)["results"][0]["median"] == 1.5  # it was read, not measured again


def test_quantspec_runs_its_arms_and_shows_the_papers_numbers(folder):
    found = run("suite", "quantspec-paper", folder, "-r", 1, "--warmup", 0)
    names = [f"{folder}", f"{folder} --kv-cache int8", f"{folder} --quantspec"]
    assert list(found["arms"]) == names
    assert {sample["test"] for sample in found["samples"]} == {"tg90 @ d256"}  # half of a context of 512
    assert found["settings"]["prompt"]["origin"].startswith("calibration.txt (sha256 ")
    labels = {line["what"]: line["label"] for line in found["published"]}
    assert labels["accepted drafts"] == labels["speed by plain decoding"] == "recalled"
    assert labels["speed by plain decoding, at best"] == "published"


def test_a_suite_ends_with_a_report_and_goes_on_where_it_was(folder, tmp_path):
    """One command: samples, the result, a page and its plots; the second time it measures nothing."""
    place = tmp_path / "reports" / "first"
    command = ("suite", "quantspec-paper", folder, "-r", 1, "--warmup", 0, "--report", place)
    first = run(*command)
    assert json.loads((place / "result.json").read_text())["samples"] == first["samples"]
    assert "tg90 @ d256" in (place / "report.html").read_text()
    assert list((place / "plots").glob("*.png"))
    assert run(*command)["samples"] == first["samples"]
    _, err = mlxeff("bench", *command)
    assert f"written: {place / 'result.json'}, {place / 'report.html'}" in err
    (place / "result.json").write_text("my own")
    assert "result.json: wanted a result of mlxeff bench" in fails("bench", *command)
    (tmp_path / "file").write_text("")
    command = (*command[:-1], tmp_path / "file" / "x")
    assert "wanted a folder for the report: Not a directory" in fails("bench", *command)


def test_comparisons_with_quantspec_have_known_answers():
    test = Point(1, 90, 4096, DECODE).test
    document = {
        "arms": dict.fromkeys(("plain", "int8", "spec")),
        "settings": {"device": "cpu"},
        "ratios": [{"test": test, "metric": "decode_tps", "arm": "spec", "ratio": 1.2}],
        "results": [{"test": test, "metric": "acceptance", "arm": "spec", "median": 0.9}],
    }
    found = {(line["what"], line["test"]): (line["ours"], line["theirs"]) for line in model_suites.quantspec(document)}
    assert found["accepted drafts", test] == (0.9, 0.9246)
    assert found["speed by plain decoding", test] == (1.2, 1.35)
    assert found["accepted drafts", "tg90 @ d131072"] == (None, 0.9431)
    assert found["speed by plain decoding, at best", ""][0] == 1.2


def test_the_depths_are_those_that_the_context_has_room_for():
    assert [point.test for point in model_suites.quantspec_points(10000)] == ["tg90 @ d4096", "tg90 @ d8192"]
    assert [point.test for point in model_suites.quantspec_points(200)] == ["tg90 @ d100"]
    assert [point.test for point in model_suites.quantspec_points(100)] == ["tg50 @ d50"]


def test_seeds_are_compared_with_the_dense_model(folder, seeds, tmp_path):
    found = run("suite", "seedlm-paper", folder, seeds, "--out", tmp_path / "s.jsonl")
    assert list(found["arms"]) == [str(folder), str(seeds)]
    assert {row["metric"] for row in found["results"]} == {"ppl", "kl", "agreement"}
    assert {line["label"] for line in found["published"]} == {"recalled"}
    assert all(line["ours"] is None for line in found["published"])  # they are of other models
    assert "wanted a dense MODEL and its SeedLM ones, got 1" in fails("bench", "suite", "seedlm-paper", folder)
    assert "dynamoe: wanted one MODEL, got none" in fails("bench", "suite", "dynamoe")


def test_openelm_has_a_prompt_of_36_tokens_and_1024_decoded_ones(tmp_path):
    given = []
    for size, layers in (("270M", 2), ("450M", 3), ("1_1B", 3), ("3B", 3)):
        given += [
            "--checkpoint",
            f"{size.replace('_', '.')}={write_random_model(tmp_path / size, openelm(size, layers))}",
        ]
    found = run("suite", "openelm-paper", *given, "-r", 1, "--warmup", 0, "--only", "arm=OE270M", "arm=OE450M")
    assert {(s["arm"], s["test"]) for s in found["samples"]} == {
        (arm, test) for arm in ("OE270M", "OE450M") for test in ("pp36", "tg1024 @ d36")
    }
    lines = {(line["arm"], line["test"]): line for line in found["published"]}
    medians = {(r["arm"], r["test"], r["metric"]): r["median"] for r in found["results"]}
    assert lines["OE270M", "tg1024 @ d36"]["ours"] == medians["OE270M", "tg1024 @ d36", "decode_tps"]
    assert (lines["OE3B", "pp36"]["ours"], lines["OE3B", "pp36"]["theirs"]) == (None, 234.96)
    assert {line["label"] for line in found["published"]} == {"recalled"}  # the paper was not read


@pytest.mark.slow
def test_all_suites_give_one_result(smollm2_gguf):
    """Nothing fits into the memory that is allowed, so that only the way through all suites is run."""
    found = run("suite", "all", "--memory", 0.001, "-r", 1)
    assert set(found["settings"]["suites"]) == {"kvp-paper", "openelm-paper", "quantspec-paper"}
    assert {"OE1.1B", "OE3B", "smollm2-135m --quantspec"} < set(found["arms"])
    assert sum("wants models" in line for line in found["skipped"]) == 2
    assert sum("(--memory)" in line for line in found["skipped"]) > 3
    assert {line["label"] for line in found["published"]} == {"published", "recalled"}
    assert "name it" in fails("bench", "suite", "all", "--only", "batch=1")


def test_every_published_number_has_a_label_and_a_source():
    lines = [*openelm_paper.published(rows([]), {}), *model_suites.seedlm({"settings": {"device": "cpu"}})]
    assert lines
    assert all(line["label"] in LABELS and line["source"] for line in lines)
    assert all("recalled" in line["source"] or "quoted" in line["source"] for line in lines)
