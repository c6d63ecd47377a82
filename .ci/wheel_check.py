"""Build the sdist and the wheel, and try the wheel as a user has it.

Checked: every source file of the package and of the folders mapped into it is in the wheel; the wheel built from the
sdist holds the same; every module imports and the command runs in four situations: the wheel in a clean environment,
the wheel with a checkout as the working directory, a bare checkout, an editable install. Run by `make wheel-check` with
the development extra; knows nothing of the tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
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
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
CLEAN["PYTHONDONTWRITEBYTECODE"] = "1"
START = time.monotonic()


def run(command, cwd, **environment):
    """Run a command or end with its output; returns what it printed."""
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


def say(what):
    print(f"-- {what} ({time.monotonic() - START:.0f} s)", flush=True)


def source_files():
    """Names inside the wheel, as the checkout's folders give them."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    folders = {folder: target for target, folder in packages.items()}
    for folder, target in folders.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store":
                yield f"{target}/{path.relative_to(ROOT / folder).as_posix()}"


def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def build(folder):
    """Build sdist and wheel (the wheel from the sdist, as a package index's user gets it); returns the wheel.

    The native kernels are compiled once: the wheel straight from the checkout is built without them.
    """
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    direct = folder / "direct"
    run([sys.executable, "-m", "build", "--wheel", "-Cwheel.cmake=false", "--outdir", direct, ROOT], folder)
    [wheel], [same], [sdist] = folder.glob("*.whl"), direct.glob("*.whl"), folder.glob("*.tar.gz")
    names, wanted = wheel_names(wheel), set(source_files())
    native = {name for name in names if name.startswith("mlxeff/_native.")}
    if names - native != wanted or wheel_names(same) != wanted:
        sys.exit(f"wheel check: missing {sorted(wanted - names)}, not in the sources {sorted(names - native - wanted)}")
    if shutil.which("c++") and not native:
        sys.exit("wheel check: there is a C++ compiler, but the native kernels were not built")
    print(f"   {wheel.name} {wheel.stat().st_size} bytes, {sdist.name} {sdist.stat().st_size} bytes")
    print(f"   {len(names)} files, all of the checkout's")
    return wheel


def module_names(wheel):
    names = sorted(name for name in wheel_names(wheel) if name.endswith(".py") and not name.endswith("__main__.py"))
    return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]


def try_everything(python, cwd, package, modules, command, **environment):
    """Import each module and run the command's cheap verbs; `package` is where mlxeff has to come from."""
    print(run([python, "-c", IMPORT_ALL, package, *modules], cwd, **environment), end="")
    version = run([*command, "--version"], cwd, **environment).strip()
    usage = run([*command, "--help"], cwd, **environment)
    if "generate" not in usage:
        sys.exit(f"wheel check: --help does not name the verb generate:\n{usage}")
    print(f"   {version}")


def generate(command, cwd):
    text = run([*command, "generate", "Hello", "--max-tokens", "4", "--temp", "0"], cwd)
    if not text.strip():
        sys.exit("wheel check: mlxeff generate printed nothing")
    print(f"   generated: {text.strip()!r}")


def main():
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
