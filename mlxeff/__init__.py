"""mlxeff: LLM inference for Apple silicon on MLX. This module has the version and the public names.

`from mlxeff import load, generate, stream_generate` follows mlx-lm's names and arguments. Each public name is imported
on first use, so that `import mlxeff` itself loads neither mlx nor any model code.
"""

import importlib
import os

__version__ = "0.1.0"

# Public name → the module that defines it.
_PUBLIC = {
    "GenerationResponse": "generation",
    "MlxeffError": "errors",
    "RunOptions": "running",
    "fit_dynamoe": "assembly",
    "fit_kv_predictor": "assembly",
    "generate": "generation",
    "load": "assembly",
    "load_pair": "assembly",
    "make_prompt_cache": "generation",
    "stream_generate": "generation",
}

__all__ = [
    "GenerationResponse",
    "MlxeffError",
    "RunOptions",
    "__version__",
    "fit_dynamoe",
    "fit_kv_predictor",
    "generate",
    "load",
    "load_pair",
    "make_prompt_cache",
    "stream_generate",
]

# In a wheel, the folders convert/ and metal/ are mlxeff/convert and mlxeff/metal. In a checkout they stand beside the
# package, so the checkout's root is searched for submodules too.
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
