"""The project's own files agree with each other: one version, every folder mapped, every command real.

The wheel itself is built and tried by .ci/wheel_check.py.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlxeff

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = PROJECT["tool"]["scikit-build"]
MAPPED = {folder: target for target, folder in BUILD["wheel"]["packages"].items() if target != folder}
SKIPPED = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "build", "dist"}


def project_files():
    """Every file that is tracked, or new and not ignored; without git, every file outside of caches and builds."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode == 0:
            return [path for name in run.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    files = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in files if not SKIPPED & set(path.relative_to(ROOT).parts)]


def commands(text):
    """The targets of `make TARGET` where it stands as a command: at a line's start, in backquotes, after a prompt."""
    return set(re.findall(r"(?:^\s*|`|[$] |run: )make ([a-z][\w-]*)", text, re.MULTILINE))


def make_targets():
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_version_has_one_source():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlxeff.__version__)
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert BUILD["metadata"]["version"]["input"] == "mlxeff/__init__.py"
    assert f'"{mlxeff.__version__}"' not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert mlxeff.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_folder_of_the_package_is_mapped():
    assert {folder: f"mlxeff/{folder}" for folder in ("convert", "metal") if (ROOT / folder).is_dir()} == MAPPED
    for folder in MAPPED:
        assert (ROOT / folder / "__init__.py").is_file()


def test_a_mapped_folder_is_found_in_the_checkout():
    import mlxeff.convert

    if Path(mlxeff.__file__).resolve().parent == ROOT / "mlxeff":
        assert Path(mlxeff.convert.__file__).resolve().parent == ROOT / "convert"


def test_public_names_are_the_functions_even_after_their_modules_are_imported():
    code = """if True:
        import types, mlxeff, mlxeff.generation, mlxeff.assembly.model
        from mlxeff import GenerationResponse, generate, load, stream_generate
        assert all(isinstance(f, types.FunctionType) for f in (generate, load, stream_generate)), (generate, load)
        assert isinstance(GenerationResponse, type)
        assert load is mlxeff.assembly.model.load and generate is mlxeff.generation.generate
        assert set(mlxeff.__all__) <= set(dir(mlxeff))
        assert not hasattr(mlxeff, "no_such_name")
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_mlx_is_required_by_platform():
    mlx = [line for line in PROJECT["project"]["dependencies"] if re.match(r"mlx\b(?!-)", line)]
    assert len(mlx) == 2
    assert {"darwin", "linux"} == {re.search(r"sys_platform == '(\w+)'", line).group(1) for line in mlx}
    bounds = {re.search(r"[<>][^;]*", line).group(0) for line in mlx}
    assert len(bounds) == 1, bounds


def imported_libraries(path):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_every_library_that_the_package_imports_is_required():
    extras = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"]
    for extra in ("coreml", "benchmarks", "lm-eval", "completion"):
        lines = lines + extras[extra]
    required = {re.match(r"[\w-]+", line).group(0) for line in lines}
    files = [path for folder in ("mlxeff", *MAPPED) for path in (ROOT / folder).rglob("*.py")]
    used = {name for path in files for name in imported_libraries(path)} - sys.stdlib_module_names - {"mlxeff"}
    assert "mlx" in used
    assert {name.replace("_", "-") for name in used} - required == set()


def test_the_lint_version_has_one_value():
    pins = [line for line in PROJECT["project"]["optional-dependencies"]["dev"] if line.startswith("ruff==")]
    assert len(pins) == 1
    assert (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8").count(pins[0]) == 2


def test_commands_in_the_readme_exist():
    targets = make_targets()
    assert {"demo", "test", "lint", "wheel-check", "clean"} <= targets
    named = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"demo", "test"} <= named <= targets


def test_ci_and_workflows_call_existing_targets():
    files = [ROOT / ".ci/run", *sorted((ROOT / ".github/workflows").glob("*.yml"))]
    assert len(files) == 3
    for path in files:
        called = commands(path.read_text(encoding="utf-8"))
        assert called, path
        assert called <= make_targets(), path


@pytest.mark.parametrize("script", [".ci/run"])
def test_scripts_parse(script):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    run = subprocess.run([bash, "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def output_of(command, **options):
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def venv_with_our_libraries(folder):
    """A new environment without pip and mlxeff that finds this one's libraries; returns its folder of commands."""
    output_of([sys.executable, "-m", "venv", "--without-pip", folder])
    [packages] = folder.glob("lib/python*/site-packages")
    # Python does not read the .pth files there, which editable installs are.
    ours = [path for path in sys.path if path.endswith("-packages")]
    (packages / "ours.pth").write_text("\n".join(ours), encoding="utf-8")
    return folder / "bin"


@pytest.mark.slow
def test_a_broken_compiler_does_not_stop_the_installation(tmp_path, tiny_folder):
    """The native kernels are left out; the installer's log says so in one line, and so does each run of the command."""
    missing = [name for name in ("pip", "scikit_build_core") if not importlib.util.find_spec(name)]
    if not shutil.which("cmake") and not importlib.util.find_spec("cmake"):
        missing.append("cmake")
    if missing:
        pytest.skip(f"no {', '.join(missing)} in this environment")
    folder = venv_with_our_libraries(tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--python", folder / "python", "--disable-pip-version-check", "--no-cache-dir"]
    install = [*pip, "install", "-v", "--no-build-isolation", "--no-deps", ROOT]
    log = output_of(install, env={**os.environ, "CXX": "/bin/false"})
    assert log.count("CMake configuration failed - retrying") == 1, log

    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLXEFF_NATIVE")}
    outside = {"cwd": tmp_path, "env": clean}
    reason = "not built at installation (no C++ compiler?)"
    native = json.loads(output_of([folder / "mlxeff", "doctor", "--json"], **outside))["native"]
    assert (native["available"], native["reason"]) == (False, reason)
    assert f"MLX's own kernels; native ones: {reason}\n" in output_of([folder / "mlxeff", "doctor"], **outside)
    generate = [folder / "mlxeff", "generate", "--device", "cpu", "--model", tiny_folder, "Hello", "--max-tokens", "2"]
    output = output_of(generate, **outside)
    assert output.count(f"native CPU kernels: {reason}; MLX's own are used") == 1, output


def test_no_file_names_a_private_place():
    # Put together here, so that this file does not hold them.
    private = [
        "/" + "work/",
        ".." + "/shared",
        "pypi" + ".org",
        "python" + "hosted.org",
        "npm" + "js.org",
        "/" + "tmp/lab",
    ]
    found = []
    for path in project_files():
        data = path.read_bytes()
        found += [f"{path.relative_to(ROOT)}: {text}" for text in private if text.encode() in data]
    assert found == []


def test_no_file_is_large():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in project_files()}
    large = {name for name, size in sizes.items() if size > (2**22 if name.startswith("mlxeff/pairs/") else 2**20)}
    assert large == set()
