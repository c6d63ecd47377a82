"""benchmarks/summary.py: the README's table and the sections of RESULTS.md that it writes are those of the committed
results, and its arithmetic. Reads files only: about a second, most of it imports."""

import sys

import pytest

import saving
import summary
from mlxeff.bench import kvp_paper
from mlxeff.bench.points import Point

SECTIONS = ["cpu-seedlm", "kvp-paper", "cpu-training", "metal-prediction"]


def between_marks(section, text):
    begin, end = (f"<!-- {section}: {edge} -->\n" for edge in ("begin", "end"))
    return text.split(begin)[1].split(end)[0].strip("\n")


def test_the_projects_readme_and_report_hold_the_committed_results():
    """After a result of the machine that is shown was saved comes `summary.py`."""
    readme, report = (path.read_text(encoding="utf-8") for path in (saving.README, saving.REPORT))
    assert between_marks(summary.SUMMARY, readme) == summary.summary(summary.MACHINE)
    found = summary.sections(summary.MACHINE)
    assert list(found) == SECTIONS
    for name, text in found.items():
        assert between_marks(name, report) == text, name


def test_the_script_writes_them_where_their_marks_stand(tmp_path, monkeypatch):
    readme, report = tmp_path / "README.md", tmp_path / "RESULTS.md"
    marks = {name: f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in [summary.SUMMARY, *SECTIONS]}
    readme.write_text(f"a\n{marks[summary.SUMMARY]}b\n")
    report.write_text("".join(marks[name] for name in SECTIONS))
    monkeypatch.setattr(saving, "README", readme)
    monkeypatch.setattr(saving, "REPORT", report)
    monkeypatch.setattr(sys, "argv", ["summary.py"])
    summary.main()
    assert between_marks(summary.SUMMARY, readme.read_text()) == summary.summary(summary.MACHINE)
    assert all(between_marks(n, report.read_text()) == t for n, t in summary.sections(summary.MACHINE).items())
    assert "old" not in readme.read_text() + report.read_text()
    monkeypatch.setattr(sys, "argv", ["summary.py", "--machine", "Abacus"])
    with pytest.raises(SystemExit, match=r"wanted one file Abacus-cpu-peers-mlx-\*\.json, got 0"):
        summary.main()


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_seed_speeds_are_medians_and_of_llama_the_better_setting():
    def sample(arm, threads, ttft, decode):
        return {"arm": arm, "threads": threads, "ttft_s": ttft, "decode_tps": decode}

    samples = [
        sample("mlxeff exact, SeedLM-4-aware", 2, [1.0, 3.0], [10.0, 20.0]),
        sample("mlxeff exact, SeedLM-4-aware", 2, [2.0], [90.0]),
        sample("mlxeff exact, SeedLM-4-aware", 1, [4.0], [5.0]),
        sample(summary.FLASH, 2, [7.0], [50.0]),
        sample(summary.PLAIN, 2, [6.0], [40.0]),
        {"arm": summary.PLAIN, "threads": 2, "error": "no memory"},
    ]
    found = {row[0]: row[1:] for row in rows(summary.seed_speeds(samples))}
    assert found[""] == [
        "TTFT 512, s, 2 threads",
        "TTFT 512, s, 1 thread",
        "tok/s @512, 2 threads",
        "tok/s @512, 1 thread",
    ]
    assert found["mlxeff SeedLM 4"] == ["2", "4", "20", "5"]
    assert found["llama.cpp Q4_0, the better attention for each number"] == ["6", "", "50", ""]


def test_the_papers_models_have_the_bases_time_over_theirs():
    def sample(arm, tokens, seconds, number=0):
        place = Point(1, tokens).fields(arm, "cpu")
        return place | {"round": number, "values": {"ttft_s": seconds, "decode_tps": 10.0}}

    arm = "OE1.1B-KVP-LP-0.50"
    samples = [sample("OE1.1B", 64, 2.0), sample("OE1.1B", 64, 4.0, 1), sample(arm, 64, 1.5), sample(arm, 128, 9.0)]
    head, _, base, pair = rows(summary.paper(samples))
    assert head[1:3] == ["1 x 64, passes: 1", "1 x 128, passes: 1"]
    assert base[:3] == ["OE1.1B", "3 (1.00)", ""]
    theirs = kvp_paper.TABLE_5[arm]
    assert pair == [arm, "1.5 (2.00)", "9", f"{theirs.ttft_s:.2f} ({theirs.reduction:.2f})", f"{theirs.flops:.2f}"]


def test_training_counts_tokens_of_the_whole_batch():
    samples = [
        {"arm": "native", "shape": "4x256", "seconds": [4.0, 1.0]},
        {"arm": "native", "shape": "4x256", "seconds": [2.0]},
    ]
    assert rows(summary.training(samples))[2] == ["4 x 256", "native", "2.00", "512"]
