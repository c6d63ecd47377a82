"""How benchmarks leave their results: the file's name, whole documents only, and plots where they can be drawn."""

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def result_path(cpu: str, name: str, folder: Path = RESULTS) -> Path:
    """`folder`/<cpu>-<name>; of the processor's name letters, digits and full stops are kept."""
    chip = re.sub(r"[^A-Za-z0-9.]+", "-", cpu.replace("(R)", "")).strip("-")
    return folder / f"{chip}-{name}"


def write_json(document: dict, path: Path) -> None:
    """Written under a temporary name and renamed."""
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


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
