"""Puts together models and techniques that a caller names by path, alias or option of the command line.

model                 a folder or file → the model, with its tokenizer
pair                  a KV Prediction pair for a base model → a way to read prompts
fitting, fitting_dynamoe  `mlxeff fit` as Python calls
speculation           drafters for a loaded model, and what rounds cost on this machine
draft_weights         the weights with which a model drafts for itself
dynamoe               the sensitivity of a DynaMoE model, and drafts of its smaller experts
described, folder     a model in memory → the entries of config.json and the files of a new folder
techniques            tables with one entry for each technique; a new technique is added there
quantization          MLX's quantised modules in a model
options, fit_options  options of the command line as data

The packages of the techniques (seedlm, kvprediction, …) never import each other. This is the only package that imports
all of them. The command line, the converters and the benchmarks call it. Each name below is imported on first use.
"""

import importlib

# Public name → the module that defines it.
_PUBLIC = {
    "Loaded": "model",
    "build_model": "model",
    "fingerprint": "model",
    "fit_dynamoe": "fitting_dynamoe",
    "fit_kv_predictor": "fitting",
    "load": "model",
    "load_model": "model",
    "load_pair": "pair",
    "load_path": "model",
}

__all__ = [
    "Loaded",
    "build_model",
    "fingerprint",
    "fit_dynamoe",
    "fit_kv_predictor",
    "load",
    "load_model",
    "load_pair",
    "load_path",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
