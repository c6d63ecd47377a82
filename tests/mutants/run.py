"""Try each fault: put it into a copy of the tree, run the tests that should notice it, take it out again.

The copy is build/mutants/tree, so the checkout itself never changes. Its Python is an environment that has the
libraries of this one, but not its mlxeff: there mlxeff is the copy, also in processes that tests start.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from mlxeff.checkpoint import claim
from mlxeff.errors import MlxeffError
from mutants import faults
from mutants.faults import HERE, ROOT

BUILD = ROOT / "build" / "mutants"
TREE, ENVIRONMENT, DRIVER = BUILD / "tree", BUILD / "venv", BUILD / "driver"
RESULT = HERE / "result.json"
LIMIT = 400  # seconds; a test that hangs ends pytest after 300
HANGS = 70  # pytest's exit code then, see conftest.py
FAILED = 1  # pytest's exit code where a test failed


def main() -> int:
    chosen, options = arguments()
    if options.list:
        for fault in chosen:
            print(f"{fault.name:50} {fault.breaks}" + (f" Equivalent: {fault.equivalent}" if fault.equivalent else ""))
        return 0
    if complaints := [text for fault in chosen if (text := fault.complaint())]:
        print("\n".join(complaints), file=sys.stderr)
        return 1
    BUILD.mkdir(parents=True, exist_ok=True)
    with claim(TREE):  # a second run at the same time would take the faults out of the copy
        return try_all(chosen, options.save)


def try_all(chosen, saves: bool) -> int:
    """Try the faults one after the other; returns the exit code. `saves`: keep what is found after each of them."""
    copy_tree()
    python = make_environment()
    if any(fault.native for fault in chosen):
        run_driver()
    tests = {test for fault in chosen for test in fault.tests}
    if alone := sorted(test for test in tests if "::" not in test or test.partition("::")[0] not in tests):
        run_pytest(python, alone, first=False)
    found = {}
    for fault in chosen:
        found[fault.name] = result = attempt(fault, python)
        print(f"{fault.name:50} {result}", flush=True)
        if saves:
            save(found)
    return report(chosen, found)


def arguments():
    """(the faults to try, all options)"""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="faults whose name begins so; several times")
    parser.add_argument("--new", action="store_true", help="faults that have no saved result yet")
    parser.add_argument("--list", action="store_true", help="print the faults and try none")
    parser.add_argument("--save", action="store_true", help=f"write what was found into {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    known = saved() if options.new else {}
    begins = tuple(options.only or [""])
    chosen = [each for each in faults.read() if each.name.startswith(begins) and each.name not in known]
    if not chosen:
        parser.error("no fault is chosen: --list prints all names")
    return chosen, options


def copy_tree() -> None:
    """Make TREE what the checkout is, without ignored files. Files that are the same keep their times, for ninja."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    names = {name for name in listed if name and (ROOT / name).is_file()}
    for path in TREE.rglob("*"):
        if not path.is_dir() and path.relative_to(TREE).as_posix() not in names:
            path.unlink()
    for name in names:
        path, data = TREE / name, (ROOT / name).read_bytes()
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    native = extension()
    if native is not None:
        (TREE / "mlxeff" / native.name).symlink_to(native)


def extension() -> Path | None:
    """The file of the installed native kernels, which the tests of the copy use; None where there are none."""
    from mlxeff import kernels

    found, _ = kernels.native()
    return None if found is None else Path(found.__file__).resolve()


def make_environment() -> Path:
    """The Python of an environment whose mlxeff is TREE. The .pth files of the folders that ours.pth names are not
    read, and an editable installation of mlxeff is one of them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ENVIRONMENT], check=True)
    [packages] = ENVIRONMENT.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (packages / "ours.pth").write_text("\n".join([str(TREE), *libraries]), encoding="utf-8")
    return ENVIRONMENT / "bin" / "python"


def attempt(fault: faults.Fault, python: Path) -> str:
    """Put the fault in, run its tests, take it out: "noticed by …" or "survived"."""
    path = TREE / fault.file
    sound = path.read_text(encoding="utf-8")
    try:
        path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
        if not fault.native:
            return run_pytest(python, fault.tests)
        if not fault.tests:
            return run_driver(fault.name)
        build("mlxeff_cpu", fault.name)
        [library] = DRIVER.glob("libmlxeff_cpu.*")  # .so or .dylib
        return run_pytest(python, fault.tests, MLXEFF_CPU_LIBRARY=str(library))
    finally:
        path.write_text(sound, encoding="utf-8")


def run_pytest(python: Path, tests, first: bool = True, **more: str) -> str:
    """Run tests of TREE, with a fault in it up to the first that fails. Without one all have to pass. `more`: variables
    of the environment."""
    command = [python, "-B", "-m", "pytest", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", *("-x",) * first]
    code, out = run([*command, *(f"tests/{test}" for test in tests)], LIMIT if first else None, **more)
    if code == 0:
        return "survived"
    failed = re.findall(r"^FAILED tests/([^\s\[]+)", out, re.MULTILINE)
    if first and (code in (FAILED, HANGS) or code < 0):
        return f"noticed by {failed[0]}" if failed else "noticed: the tests crash, hang or cannot be set up"
    raise SystemExit(f"{out}\npytest ended with code {code}" + ("" if first else ", without any fault"))


def build(target: str, name: str = "") -> None:
    """Build the driver or the library of TREE's kernels; `name` of the fault that is in them."""
    configure = ["cmake", "-S", TREE / "cpu", "-B", DRIVER, "-G", "Ninja", "-DMLXEFF_BUILD_DRIVER=ON"]
    for command in (configure, ["ninja", "-C", DRIVER, target]):
        code, out = run(command)
        if code != 0:
            raise SystemExit(f"{out}\n{target} cannot be built" + (f" with the fault {name}" if name else ""))


def run_driver(name: str = "") -> str:
    """Build the test driver of TREE and run it. Without a fault, which has a name, it has to pass."""
    build("mlxeff_driver", name)
    code, out = run([DRIVER / "mlxeff_driver", "nofork", "quick"], LIMIT)
    if code == 0:
        return "survived"
    if not name:
        raise SystemExit(f"{out}\nthe driver ended with code {code}, without any fault")
    sections = re.findall(r"^(.+): ok, ", out, re.MULTILINE)
    return f"noticed by the driver, after its section {sections[-1]}" if sections else "noticed by the driver"


def run(command, limit: float | None = None, **more: str) -> tuple[int, str]:
    """(exit code, what it printed) of a command in TREE. One that takes more seconds than the limit has HANGS."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path} | more
    command = [str(part) for part in command]
    with subprocess.Popen(
        command, cwd=TREE, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as late:
            process.kill()
            return HANGS, str(late)
        except BaseException:
            process.kill()
            raise
    return process.returncode, out


def saved() -> dict:
    """Name of a fault → what was found, in RESULT."""
    return json.loads(RESULT.read_text(encoding="utf-8"))["faults"] if RESULT.exists() else {}


def save(found: dict) -> None:
    """Write what was found to RESULT, over what stood there for the same names, in the list's order."""
    from mlxeff.bench import machine

    names = [fault.name for fault in faults.read()]
    both = saved() | found
    known = {name: both[name] for name in names if name in both}
    noticed = sum(each.startswith("noticed") for each in known.values())
    document = {"card": machine.card(), "noticed": noticed, "of": len(known), "faults": known}
    partial = RESULT.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(RESULT)


def report(chosen, found: dict) -> int:
    """Print the summary; the exit code is 1 if a fault survived that should not."""
    survived = [fault for fault in chosen if found[fault.name] == "survived"]
    left = [fault for fault in survived if not fault.equivalent]
    print(f"\nnoticed {len(chosen) - len(survived)} of {len(chosen)} faults, {len(survived) - len(left)} equivalent")
    for fault in left:
        print(f"survived: {fault.name} in {fault.file}: {fault.breaks}")
    return 1 if left else 0


if __name__ == "__main__":
    start = time.monotonic()
    try:
        code = main()
    except MlxeffError as error:
        code = f"error: {error}"
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    sys.exit(code)
