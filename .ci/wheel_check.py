"""Build the source distribution and the wheel, and try the wheel in the situations that users have.

It checks that the wheel contains every source file of the package and of the folders that become part of it, and that
the wheel built from the source distribution contains the same files. Then it imports every module and runs the command
in four situations: the wheel in a clean environment, the wheel with a checkout as the working directory, a bare
checkout, and an editable install. `make wheel-check` runs it; it needs the development extra. It runs no tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# A program that imports the modules named in its arguments and checks that they come from the folder named first.
IMPORT_ALL = """
import importlib, importlib.resources, sys
place, *names = sys.argv[1:]
for name in names:
    found = importlib.import_module(name).__file__
    assert found.startswith(place), f"{name} is {found}, not below {place}"
kernels = [path for path in importlib.resources.files("mlxeff.metal").iterdir() if path.name.endswith(".metal")]
assert kernels and all(path.read_text(encoding="utf-8") for path in kernels), "no Metal kernels"
print(f"   {len(names)} modules import, all from {place}, and {len(kernels)} files of Metal kernels")
"""
NEED_AN_EXTRA = ("mlxeff/eval/lm_eval.py",)  # modules that cannot be imported without a library of an extra
# The environment for all commands, without Python's variables.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
CLEAN["PYTHONDONTWRITEBYTECODE"] = "1"
START = time.monotonic()


def run(command: Sequence[object], cwd: Path, **environment: str) -> str:
    """Run a command; returns its output. Where it fails, the check ends and prints the output."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**CLEAN, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        shown = " ".join(str(part) for part in command)
        sys.exit(f"wheel check: exit {result.returncode} of {shown}\n{result.stdout}{result.stderr}")
    return result.stdout


def say(what: str) -> None:
    """Print the title of a step and the seconds since the start."""
    print(f"-- {what} ({time.monotonic() - START:.0f} s)", flush=True)


def source_files() -> Iterator[str]:
    """The names that the files of the checkout should have in the wheel."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    folders = {folder: target for target, folder in packages.items()}
    for folder, target in folders.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store":
                yield f"{target}/{path.relative_to(ROOT / folder).as_posix()}"


def wheel_names(wheel: Path) -> set[str]:
    """The names of all files in a wheel but its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def build(folder: Path) -> Path:
    """Build the source distribution, a wheel from it, and a wheel from the checkout, and compare their files; returns
    the path of the first wheel. The wheel from the checkout is built without the native kernels, so that they are
    compiled only once.
    """
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    direct = folder / "direct"
    run([sys.executable, "-m", "build", "--wheel", "-Cwheel.cmake=false", "--outdir", direct, ROOT], folder)
    [wheel], [same], [sdist] = folder.glob("*.whl"), direct.glob("*.whl"), folder.glob("*.tar.gz")
    names, expected = wheel_names(wheel), set(source_files())
    native = {name for name in names if name.startswith("mlxeff/_native.")}
    if names - native != expected or wheel_names(same) != expected:
        surplus = sorted(names - native - expected)
        sys.exit(f"wheel check: missing {sorted(expected - names)}, not in the sources {surplus}")
    if shutil.which("c++") and not native:
        sys.exit("wheel check: there is a C++ compiler, but the native kernels were not built")
    print(f"   {wheel.name} {wheel.stat().st_size} bytes, {sdist.name} {sdist.stat().st_size} bytes")
    print(f"   {len(names)} files, all of the checkout's")
    return wheel


def module_names(wheel: Path) -> list[str]:
    """The names of all modules in a wheel."""
    left_out = ("__main__.py", *NEED_AN_EXTRA)
    names = sorted(name for name in wheel_names(wheel) if name.endswith(".py") and not name.endswith(left_out))
    return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]


def try_everything(
    python: Path, cwd: Path, package: str, modules: Sequence[str], command: Sequence[object], **environment: str
) -> None:
    """Import all modules with `python`, which has to find them below the folder `package`, and run the command for its
    version and its help."""
    print(run([python, "-c", IMPORT_ALL, package, *modules], cwd, **environment), end="")
    version = run([*command, "--version"], cwd, **environment).strip()
    usage = run([*command, "--help"], cwd, **environment)
    if "generate" not in usage:
        sys.exit(f"wheel check: --help does not name the verb generate:\n{usage}")
    print(f"   {version}")


def generate(command: Sequence[object], cwd: Path) -> None:
    """Generate some tokens with the built-in model."""
    text = run([*command, "generate", "Hello", "--max-tokens", "4", "--temp", "0"], cwd)
    if not text.strip():
        sys.exit("wheel check: mlxeff generate printed nothing")
    print(f"   generated: {text.strip()!r}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mlxeff-wheel-") as name:
        folder = Path(name).resolve()
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        say("build the sdist and the wheel")
        wheel = build(folder)
        modules = module_names(wheel)
        environment = folder / "venv"
        python, script = environment / "bin" / "python", environment / "bin" / "mlxeff"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        say("install the wheel in a clean environment")
        run([sys.executable, "-m", "venv", environment], folder)
        run([*pip, "install", wheel], elsewhere)
        run([*pip, "check"], elsewhere)

        say("the wheel, from another folder")
        try_everything(python, elsewhere, str(environment), modules, [script])
        generate([script], elsewhere)
        say("the wheel, with the checkout as working directory")
        try_everything(python, ROOT, str(ROOT), modules, [script])
        run([script, "--version"], ROOT)
        say("a bare checkout: libraries only, not installed")
        run([*pip, "uninstall", "-y", "mlxeff"], elsewhere)
        try_everything(python, ROOT, str(ROOT), modules, [python, "-m", "mlxeff"])
        try_everything(python, elsewhere, str(ROOT), modules, [python, "-m", "mlxeff"], PYTHONPATH=str(ROOT))
        say("an editable install, from another folder")
        run([*pip, "install", "--no-deps", "--config-settings=wheel.cmake=false", "-e", ROOT], elsewhere)
        try_everything(python, elsewhere, str(ROOT), modules, [script])
        say("done")


if __name__ == "__main__":
    main()
