"""How benchmarks leave their results: the file's name, whole documents only, marked sections of RESULTS.md and of the
README, and plots where they can be drawn."""

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
REPORT = RESULTS.parent / "RESULTS.md"
README = RESULTS.parent.parent / "README.md"


def result_path(cpu: str, name: str, folder: Path = RESULTS) -> Path:
    """`folder`/<cpu>-<name>; of the processor's name letters, digits and full stops are kept."""
    chip = re.sub(r"[^A-Za-z0-9.]+", "-", cpu.replace("(R)", "")).strip("-")
    return folder / f"{chip}-{name}"


def write_json(document: dict, path: Path) -> None:
    """Written under a temporary name and renamed."""
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def add_report(parser: argparse.ArgumentParser) -> None:
    """The option `--report`: None without it, "" where it names no file."""
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure nothing: write the section of RESULTS.md from saved results (default: this machine's)",
    )


def write_section(section: str, text: str, document: Path = REPORT) -> None:
    """Replace what lies between the marks `<!-- section: begin -->` and `<!-- section: end -->`, which stand in the
    Markdown file `document` once."""
    begin, end = (f"<!-- {section}: {edge} -->\n" for edge in ("begin", "end"))
    found = document.read_text(encoding="utf-8")
    if found.count(begin) != 1 or found.count(end) != 1 or found.index(begin) > found.index(end):
        raise SystemExit(f"{document}: wanted one {begin.strip()} and after it one {end.strip()}")
    head, rest = found.split(begin)
    partial = document.with_name(f"partial-{document.name}")
    partial.write_text(f"{head}{begin}\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    partial.replace(document)


def pyplot():
    """matplotlib's pyplot, which draws to files; None, and a line, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'mlxeff[benchmarks]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found
