"""The only place that knows every room: it puts together what a caller asks for by path, name or option.

`model` a folder or file → model and tokenizer, `pair` a pair of KV Prediction, `fitting` what `mlxeff fit` does,
`techniques` the tables in which each technique stands once, `options` options of the command line as data. The command
line, the converters and the benchmarks call it; it calls rooms; rooms call the spine. Each name below is imported on
first use.
"""

import importlib

_PUBLIC = {
    "Loaded": "model",
    "build_model": "model",
    "fingerprint": "model",
    "fit_kv_predictor": "fitting",
    "load": "model",
    "load_model": "model",
    "load_pair": "pair",
    "load_path": "model",
}

__all__ = ["Loaded", "build_model", "fingerprint", "fit_kv_predictor", "load", "load_model", "load_pair", "load_path"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
