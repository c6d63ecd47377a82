"""The file of `mlxeff doctor --bundle`: one text with what a bug report needs, and nothing that identifies the user."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from ..checkpoint import temporary_beside
from ..errors import MlxeffError
from . import crash, redaction
from .output import cache_place

TITLE = "mlxeff report"
LEFT_OUT = "names of the user, the host and the home folder, access tokens, prompts and answers"
PACKAGES = "mlx mlx-lm numpy tokenizers transformers safetensors gguf huggingface-hub jinja2 sentencepiece shtab"

SETTINGS = re.compile(
    r"MLXEFF_|MLX_|OMP_|OPENBLAS_|MKL_|VECLIB_|HF_|HUGGINGFACE_|TRANSFORMERS_|PYTHON|LC_|LANG$|TERM$|COLUMNS$"
)


def write(path: str, facts: dict) -> dict:
    """Write the file, with the `facts` of `mlxeff doctor` as its first section. Returns its path and the names of the
    sections. Raises MlxeffError for a file that is something else or cannot be written."""
    target = Path(path)
    _require_free(target)
    sections = {name: _section(function) for name, function in (("doctor", lambda: facts), *SECTIONS)}
    text = [f"{TITLE}: {', '.join(sections)}", f"left out: {LEFT_OUT}"]
    text += [f"\n== {name} ==\n{content}" for name, content in sections.items()]
    partial = temporary_beside(target)
    try:
        partial.write_text(redaction.redacted("\n".join(text) + "\n"), encoding="utf-8", errors="replace")
        partial.replace(target)
    except OSError as error:
        raise MlxeffError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return {"path": str(target), "sections": list(sections)}


def _require_free(path: Path) -> None:
    """Raises MlxeffError for a path where there is something else than an earlier report."""
    wanted = f"{path}: wanted a new file or an earlier report"
    if path.is_dir():
        raise MlxeffError(f"{wanted}, got a folder")
    if not path.absolute().parent.is_dir():
        raise MlxeffError(f"{path}: wanted an existing folder to write to, there is no {path.parent}")
    with contextlib.suppress(FileNotFoundError):
        try:
            begun = path.read_bytes()[: len(TITLE)]
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
        if begun != TITLE.encode():
            raise MlxeffError(f"{wanted}, got another file")


def _section(function: Callable[[], object]) -> str:
    """What a section says; where its function fails, how: a report is needed most where things fail."""
    try:
        found = function()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return found if isinstance(found, str) else json.dumps(found, indent=1, ensure_ascii=False, default=str)


def _versions() -> dict:
    found = {"python": f"{platform.python_implementation()} {platform.python_version()}", "system": platform.platform()}
    for name in PACKAGES.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict:
    from ..bench import machine

    return machine.card() | {"instruction_sets": " ".join(machine.instruction_sets())}


def _memory() -> dict:
    import mlx.core as mx

    from .. import kernels, limits
    from ..bench import machine

    free, words = limits.available()
    found = {"machine": limits.size(machine.physical_bytes()), "available": limits.size(free), "limited_by": words}
    with contextlib.suppress(ImportError):
        import resource

        for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_FSIZE"):
            soft = resource.getrlimit(getattr(resource, name))[0]
            found[name] = "unlimited" if soft == resource.RLIM_INFINITY else limits.size(soft)
    return found | ({"gpu": mx.device_info()} if kernels.device() == "gpu" else {})


def _caches() -> dict:
    from .. import hub

    found = {"folder": cache_place()[0], "files": {}}
    if found["folder"] and (folder := Path(found["folder"])).is_dir():
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found["files"] = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    cached = [row["cached"]["bytes"] for row in hub.models() if row["cached"]]
    found["models"] = {"count": len(cached), "bytes": sum(cached)}
    found["prompt_caches"] = "where --prompt-cache and /save put them: not looked for"
    return found


def _environment() -> dict:
    """The variables that change what is computed, where and how; of those with secrets whether they are set."""
    return {
        name: "(set)" if redaction.SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if SETTINGS.match(name)
    }


def _last_crash() -> str:
    return crash.read() or "none"


def _kernels() -> list[dict] | str:
    from ..bench import checkup

    return checkup.native_kernels() or "there are no native kernels here"


def _speed() -> dict:
    from ..bench import checkup

    return checkup.speed()


SECTIONS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("versions", _versions),
    ("machine", _machine),
    ("memory", _memory),
    ("caches", _caches),
    ("environment", _environment),
    ("last crash", _last_crash),
    ("check of the native kernels", _kernels),
    ("speed sample", _speed),
)
