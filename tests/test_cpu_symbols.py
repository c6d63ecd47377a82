"""What the native library exports and what the driver for the sanitizers calls of it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cpu_library import HEADER, lib, prototypes

LEVELS = "scalar|avx2|avx512|amx|neon|dotprod|i8mm"
BUILD = Path(lib._name).parent


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_symbols_of_each_level_are_its_own():
    """No function of a level may be merged with one of another level: wide instructions would leak."""
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


def test_the_driver_calls_every_function():
    driver = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("native_driver/*"))
    names = [name for _, name, _ in prototypes()]
    assert len(names) == HEADER.read_text(encoding="utf-8").count("MLXEFF_API") - 2  # defined twice, for two compilers
    assert [name for name in names if f"{name}(" not in driver] == []
