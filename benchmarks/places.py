"""Where things lie: the project, the results and their report, the texts, what benchmarks keep between runs."""

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
    """`mlxeff-NAME` in the user's cache folder: what a benchmark makes once and uses again."""
    from mlxeff.hub.catalog import cache_dir

    return cache_dir().with_name(f"mlxeff-{name}")
