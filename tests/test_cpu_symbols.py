"""No function of a per-level object may be merged with one of another level: wide instructions would leak."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cpu_library import lib

LEVELS = "scalar|avx2|avx512|amx|neon|dotprod"
BUILD = Path(lib._name).parent


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_symbols_of_each_level_are_its_own():
    objects = [p for p in BUILD.rglob("*.o") if re.search(rf"mlxeff_\w+_({LEVELS})\.dir", str(p))]
    if not objects:
        pytest.skip(f"no objects beside {lib._name}: `make native-check` runs this on a build")
    for path in objects:
        level = re.search(rf"_({LEVELS})\.dir", str(path)).group(1)
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind.isupper() or kind in "vwu":  # visible to other objects
                assert f"mlxeff::{level}::" in name, f"{path.name} ({level}) defines {kind} {name}"
