"""How benchmarks save their results: file names, atomic writes, marked sections of RESULTS.md and of the README, and
plots if matplotlib is installed.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from places import README, REPORT, RESULTS

__all__ = ["README", "REPORT", "RESULTS"]


def command() -> str:
    """The command line of this process, for the card of a result."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def result_path(cpu: str, name: str) -> Path:
    """The path `results/<cpu>-<name>`; <cpu> keeps the letters and digits of the processor's name, and has no full
    stop, which would begin a suffix."""
    chip = re.sub(r"[^A-Za-z0-9]+", "-", cpu.replace("(R)", "")).strip("-")
    return RESULTS / f"{chip}-{name}"


def once(path: Path, write: Callable[[Path], object]) -> Path:
    """Make the file or folder `path` if it is missing: `write(temporary path)` writes it, then it is renamed."""
    if not path.exists():
        partial = _partial(path)
        partial.unlink(missing_ok=True) if not partial.is_dir() else None
        write(partial)
        partial.replace(path)
    return path


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 file under a temporary name and rename it."""
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(document: dict, path: Path) -> None:
    """Write a result as JSON and print its path."""
    write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", path)
    print(f"written: {path}", file=sys.stderr)


def read_json(path: Path) -> dict:
    """A saved result."""
    if not path.exists():
        raise SystemExit(f"{path}: no results yet: measure with --save")
    return json.loads(path.read_text(encoding="utf-8"))


def _partial(path: Path) -> Path:
    return path.with_name(f"partial-{path.name}")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the option `--report`, whose value is None if it is absent and "" if it names no file."""
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure nothing: write the section of RESULTS.md from saved results (default: this machine's)",
    )


def write_report(section: str, path: Path, text: Callable[[dict], str]) -> None:
    """Write `text` of the saved result into `section` of RESULTS.md, and print it."""
    found = text(read_json(path))
    write_section(section, found)
    print(found)


def write_section(section: str, text: str, document: Path = REPORT) -> None:
    """Replace what lies between the marks `<!-- section: begin -->` and `<!-- section: end -->`, which stand in the
    Markdown file `document` once."""
    begin, end = (f"<!-- {section}: {edge} -->\n" for edge in ("begin", "end"))
    found = document.read_text(encoding="utf-8")
    if found.count(begin) != 1 or found.count(end) != 1 or found.index(begin) > found.index(end):
        raise SystemExit(f"{document}: wanted one {begin.strip()} and after it one {end.strip()}")
    head, rest = found.split(begin)
    write_text(f"{head}{begin}\n{text}\n\n{end}{rest.split(end)[1]}", document)


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
