"""benchmarks/regenerate.py: the generated tables of README.md and RESULTS.md are those of the committed results. Each
section is a process that reads files: some 10 s.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import regenerate
import saving
import summary

ROOT = Path(__file__).resolve().parent.parent


def test_every_section_has_its_script():
    marked = re.findall(r"<!-- (\S+): begin -->", saving.REPORT.read_text(encoding="utf-8"))
    assert sorted(marked) == sorted([*regenerate.SECTIONS, *summary.sections(summary.MACHINE)])
    for script, result in regenerate.SECTIONS.values():
        assert (ROOT / "benchmarks" / f"{script}.py").is_file()
        assert (saving.RESULTS / f"{result}.json").is_file()


@pytest.mark.slow
def test_the_tables_are_those_of_the_committed_results(tmp_path):
    """In a copy, in which the sections are empty before. cpu-peers, which weighs the models that were measured, is
    left out here."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    report = tmp_path / "benchmarks" / "RESULTS.md"
    own = [name for name in regenerate.SECTIONS if name != "cpu-peers"]
    text = report.read_text(encoding="utf-8")
    for name in own:
        text = re.sub(f"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", r"\1\2", text, flags=re.DOTALL)
    report.write_text(text, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "benchmarks" / "regenerate.py"), *own, regenerate.SUMMARY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("README.md", "benchmarks/RESULTS.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), name
