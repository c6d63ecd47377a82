"""mlxeff: LLM inference for Apple silicon on MLX. The version, the public names, and where the package's folders lie.

`from mlxeff import load, generate, stream_generate` follows mlx-lm's names and shapes. Each public name is imported on
first use, so that `import mlxeff` itself loads neither mlx nor any model code.
"""

import importlib
import os

from .errors import MlxeffError

__version__ = "0.1.0"

_PUBLIC = {
    "GenerationResponse": "generation",
    "RunOptions": "running",
    "fit_kv_predictor": "assembly",
    "generate": "generation",
    "load": "assembly",
    "load_pair": "assembly",
    "stream_generate": "generation",
}

__all__ = [
    "GenerationResponse",
    "MlxeffError",
    "RunOptions",
    "__version__",
    "fit_kv_predictor",
    "generate",
    "load",
    "load_pair",
    "stream_generate",
]

# A wheel holds convert/ as mlxeff/convert. In a checkout that folder lies beside the package: it is found there too.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_PUBLIC))
