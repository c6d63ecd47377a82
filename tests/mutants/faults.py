"""The list of faults: the tables `[[fault]]` of the TOML files beside this module.

name        unique; words joined by hyphens
file        the source file, from the project's root
old, new    a text that stands in the file exactly once, and what replaces it
breaks      what a user would meet, in plain words
tests       the tests that should notice, as "test_file.py" or "test_file.py::test_function". For a fault of a C++
            file without tests the test driver of the native kernels runs; tests of such a file are those that take
            the library that MLXEFF_CPU_LIBRARY names.
equivalent  optional: why no test can notice
"""

import ast
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""

    @property
    def native(self) -> bool:
        """Whether it is one of the C++ kernels, which are built with it."""
        return self.file.startswith("cpu/")

    def complaint(self) -> str:
        """Why the fault cannot be tried on today's sources, or ""."""
        path = ROOT / self.file
        if not path.is_file():
            return f"{self.name}: there is no file {self.file}"
        if (count := path.read_text(encoding="utf-8").count(self.old)) != 1:
            return f"{self.name}: wanted the old text once in {self.file}, found it {count} times"
        if self.old == self.new:
            return f"{self.name}: the new text is the old one"
        if not (self.native or self.tests):
            return f"{self.name}: wanted tests for a Python or Metal file, got none"
        missing = [test for test in self.tests if not _exists(test)]
        return f"{self.name}: there is no test {', '.join(missing)}" if missing else ""


def read() -> list[Fault]:
    """All faults, by file and place in it."""
    tables = []
    for path in sorted(HERE.glob("*.toml")):
        tables += tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    return [Fault(**table | {"tests": tuple(table.get("tests", ()))}) for table in tables]


def _exists(test: str) -> bool:
    file, _, function = test.partition("::")
    return (ROOT / "tests" / file).is_file() and (not function or function in _functions(file))


@functools.cache
def _functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_bytes())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
