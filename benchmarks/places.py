"""Paths of the project, of the results and their report, of the texts, and of the folders that benchmarks keep between
runs.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README = ROOT / "README.md"
TESTS = ROOT / "tests"
DATA = HERE / "data"
TEXT = DATA / "jargon-validation.txt"  # quality is measured on it
RESULTS = HERE / "results"
REPORT = HERE / "RESULTS.md"


def work_folder(name: str) -> Path:
    """The folder `mlxeff-NAME` in the user's cache folder, for files that a benchmark makes once and reuses."""
    from mlxeff.hub.catalog import cache_dir

    return cache_dir().with_name(f"mlxeff-{name}")
