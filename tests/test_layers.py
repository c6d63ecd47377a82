"""Who may import whom, read from the source with `ast`; and what a fresh process loads.

Every import counts, also one inside a function. Rooms never meet: each is handed what it works on, so a pair of
techniques needs no code that knows the pair. A new top-level module is entered in LAYERS.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "_native": -1,
    "names": -1,
    "limits": -1,
    "panics": -1,
    **dict.fromkeys(("errors", "kernels", "memory", "ops", "running", "sampling", "checkpoint", "tokenizer", "hub"), 0),
    "small_matmul": 0,
    **dict.fromkeys(("cache", "decode", "speculation", "modules", "tuning", "training", "calibration"), 1),
    **dict.fromkeys(("models", "kvprediction", "quantspec", "seedlm", "dynamoe", "vision", "alignment"), 2),
    **dict.fromkeys(("assembly", "generation"), 3),
    **dict.fromkeys(("cli", "convert", "bench", "plan", "eval", "__main__"), 4),
}
# (importer, imported)
SAME_LAYER = {
    ("ops", "kernels"),
    ("sampling", "ops"),
    ("sampling", "kernels"),
    ("memory", "kernels"),
    ("small_matmul", "kernels"),
    ("small_matmul", "ops"),
    ("running", "ops"),
    ("hub", "checkpoint"),
    ("decode", "cache"),
    ("speculation", "cache"),
    ("speculation", "decode"),
    ("speculation", "modules"),
    ("tuning", "modules"),
    ("bench", "eval"),
}
SLOW_TO_IMPORT = {
    "coremltools",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "mlx_lm",
    "sentencepiece",
    "torch",
    "transformers",
}
# Modules that leave knowing the rooms to `assembly`, though their layer may import them.
WITHOUT_ROOMS = ("cli", "generation", "__main__")
DESCRIPTION = "models.parts"  # the words in which a model describes itself, which every room may use
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
ONLY_IN = {
    "mlx_lm": {"models/adapter.py", "bench/peer_worker.py"},
    "transformers": set(),
    "torch": set(),
    "lm_eval": {"eval/lm_eval.py"},
}


def sources(root):
    """Yield (place inside the package, path) of each Python file of the package and the folders mapped into it."""
    for folder in ("mlxeff", "convert"):
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root if folder == "convert" else root / "mlxeff")
            if place.as_posix() != "__init__.py":
                yield place, path


def imports(place, path):
    """Yield (line, absolute dotted name, at the top level?) of each import; `from . import a` gives `mlxeff.a`."""
    package = ("mlxeff", *place.parent.parts)
    tree = ast.parse(path.read_bytes(), str(path))
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for node in ast.walk(f)}
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name]), top) for alias in node.names)


def allowed(importer, imported):
    if importer == imported or imported == "errors" or (importer, imported) in SAME_LAYER:
        return True
    if importer in WITHOUT_ROOMS and LAYERS[imported] == 2:
        return False
    if LAYERS[importer] == 4:
        return LAYERS[imported] < 4 or importer in ("cli", "__main__")
    return LAYERS[imported] < LAYERS[importer] and importer != "errors"


def judge(place, line, name, top):
    """The complaint about one import, or None."""
    importer = place.parts[0].removesuffix(".py")
    library, _, rest = name.partition(".")
    where = f"{place.as_posix()}:{line}"
    if library != "mlxeff":
        if library in ONLY_IN and place.as_posix() not in ONLY_IN[library]:
            return f"{where} imports {library}"
        if top and library in SLOW_TO_IMPORT:
            return f"{where} imports {library} at the top: import it in a function, it is slow"
        return None
    imported = rest.partition(".")[0]
    if imported in ("__version__", "MlxeffError"):
        return None
    if LAYERS.get(importer) == 2 and rest.startswith(DESCRIPTION):
        return None
    if importer not in LAYERS:
        return f"{where}: {importer} is in no layer: enter it in LAYERS"
    if imported not in LAYERS:
        return f"{where} imports mlxeff.{imported}, which is in no layer"
    return None if allowed(importer, imported) else f"{where}: {importer} may not import {imported}"


def complaints(root):
    found = [judge(place, *each) for place, path in sources(root) for each in imports(place, path)]
    strays = [
        f"{p.as_posix()} is in no layer" for p, _ in sources(root) if p.parts[0].removesuffix(".py") not in LAYERS
    ]
    return [complaint for complaint in found + strays if complaint]


def test_every_import_goes_down():
    assert complaints(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line", "complaint"),
    [
        ("mlxeff/sampling.py", "from . import cache", "sampling may not import cache"),
        ("mlxeff/cache.py", "from .decode import decode", "cache may not import decode"),
        (
            "mlxeff/seedlm/linear.py",
            "from ..quantspec.cache import HierarchicalCache",
            "seedlm may not import quantspec",
        ),
        ("mlxeff/modules.py", "from .tuning import LoraLinear", "modules may not import tuning"),
        ("mlxeff/calibration.py", "from .seedlm.encode import encode", "calibration may not import seedlm"),
        ("mlxeff/dynamoe/fit.py", "from ..models.decoder import DecoderModel", "dynamoe may not import models"),
        ("mlxeff/models/llama.py", "def f():\n    import mlxeff.assembly.model", "models may not import assembly"),
        ("mlxeff/models/llama.py", "from mlxeff import load", "mlxeff.load, which is in no layer"),
        ("mlxeff/generation.py", "from .cli import main", "generation may not import cli"),
        ("mlxeff/generation.py", "from .kvprediction import predict", "generation may not import kvprediction"),
        ("mlxeff/cli/fit.py", "def run():\n    from ..kvprediction.fit import fit", "cli may not import kvprediction"),
        ("mlxeff/assembly/model.py", "from ..generation import generate", "assembly may not import generation"),
        ("convert/llama.py", "from ..bench import run", "convert may not import bench"),
        ("mlxeff/errors.py", "from .cache import KVCache", "errors may not import cache"),
        ("mlxeff/models/llama.py", "def f():\n    import mlx_lm.utils", "imports mlx_lm"),
        ("mlxeff/tokenizer.py", "import jinja2", "imports jinja2 at the top"),
        ("mlxeff/hub.py", "if True:\n    from huggingface_hub import hf_api", "imports huggingface_hub at the top"),
        ("mlxeff/extra.py", "import os", "extra.py is in no layer"),
    ],
)
def test_an_import_that_goes_up_is_caught(tmp_path, place, line, complaint):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    found = complaints(tmp_path)
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("mlxeff/decode.py", "from .cache import KVCache\nfrom . import sampling"),
        ("mlxeff/assembly/model.py", "from ..models import llama\nfrom ..seedlm.linear import SeedLinear"),
        ("mlxeff/dynamoe/fit.py", "from ..models.parts import Rows"),
        ("mlxeff/kvprediction/train.py", "from .. import training\nfrom ..tuning import Tuned"),
        ("mlxeff/cli/generate.py", "def main():\n    from ..convert import convert"),
        (
            "convert/llama.py",
            "from ..errors import MlxeffError\nfrom ..models.gguf import config_from_gguf\nfrom . import openelm",
        ),
        ("mlxeff/models/adapter.py", "def build():\n    from mlx_lm.utils import load_model"),
        ("mlxeff/tokenizer.py", "def render():\n    import jinja2"),
    ],
)
def test_an_import_that_goes_down_passes(tmp_path, place, line):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert complaints(tmp_path) == []


def loaded_by(code):
    """The top-level libraries, and modules of ours, that a fresh process has loaded after `code`."""
    code += "\nimport sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    modules = run.stderr.rpartition("\n")[2].split()
    return {".".join(m.split(".")[:2]) if m.startswith("mlxeff") else m.partition(".")[0] for m in modules}


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by("import mlxeff; mlxeff.__version__; mlxeff.MlxeffError")
    assert "mlxeff.errors" in loaded
    assert loaded & ({"mlx", "numpy", "tokenizers", "safetensors"} | SLOW_TO_IMPORT) == set()
    assert {name for name in loaded if name.startswith("mlxeff.")} == {"mlxeff.errors"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_loads_no_mlx(arguments):
    code = f"""if True:
        from mlxeff.cli import main
        try:
            code = main({arguments!r})
        except SystemExit as end:
            code = end.code
        assert not code, code
    """
    loaded = loaded_by(code)
    assert "mlxeff.cli" in loaded
    assert loaded & ({"mlx", "numpy", "tokenizers", "safetensors"} | SLOW_TO_IMPORT) == set()
