"""A folder or file → (model, tokenizer): the one module that knows every room.

`load` has mlx-lm's shape. Weights are read lazily and strictly: every tensor must be there, of the right shape, and
used.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from . import hub, kernels
from .checkpoint import Source, open_source
from .errors import MlxeffError, notices
from .models import llama, openelm
from .models.fused import fuse
from .models.layers import DecoderModel, fits
from .ops import native_for
from .tokenizer import Tokenizer, from_folder, from_gguf

SAMPLE_BYTES = 1 << 16  # of each end of a weight file that goes into the fingerprint
MODELS = {"openelm": openelm.Model} | dict.fromkeys(llama.FAMILIES, llama.Model)


@dataclass
class Loaded:
    """A model ready to run, with what the caller may want to report of it."""

    model: object
    tokenizer: Tokenizer
    config: dict
    path: Path
    fingerprint: str
    dtype: str  # of the activations
    backend: str  # what computes: "mlx", or "native" with the instruction set, "unfused" where operator by operator


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer[, config]) of a folder, GGUF file, hub id or built-in alias; arguments as in mlx-lm's `load`.

    `model_config` overrides keys of config.json (None deletes one). Raises `MlxeffError` for anything unusable.
    """
    for name, value in (("tokenizer_config", tokenizer_config), ("adapter_path", adapter_path)):
        if value:
            raise MlxeffError(f"load: {name} is not supported, got {value!r}")
    path = hub.resolve(str(path_or_hf_repo), revision=revision)
    loaded = load_path(path, model_config, lazy, trust_remote_code)
    return (loaded.model, loaded.tokenizer, loaded.config) if return_config else (loaded.model, loaded.tokenizer)


def load_path(path: Path, overrides: dict | None = None, lazy: bool = False, trust_remote_code: bool = False) -> Loaded:
    """Load a folder (mlx-lm's or Hugging Face's) or a GGUF file."""
    kernels.bound_buffer_cache()
    source = open_source(path)
    config = _config(source)
    tokenizer = _tokenizer(source, config)
    config = {k: v for k, v in (config | (overrides or {})).items() if v is not None or k not in (overrides or {})}
    model, config = _model(source, config, overrides or {}, lazy, trust_remote_code)
    _check_vocabulary(path, model.vocab_size, tokenizer)
    backend = "mlx"
    if not lazy:
        _finish(model, config, path)
        backend = _fuse(path, model)
    dtype = "float32" if native_for() and isinstance(model, DecoderModel) else _dtype_name(model)
    return Loaded(model, tokenizer, config, Path(path), fingerprint(source, config), dtype, backend)


def load_model(path: Path) -> tuple[object, str]:
    """(model, fingerprint) of a folder or GGUF file whose tokenizer is not needed; without a fused form."""
    source = open_source(path)
    model, config = _model(source, _config(source), {})
    _finish(model, config, path)
    return model, fingerprint(source, config)


def _model(
    source: Source, config: dict, overrides: dict, lazy: bool = False, trust_remote_code: bool = False
) -> tuple[object, dict]:
    """The model with its weights, and its config with what only the file knows."""
    path, kind = source.path, config.get("model_type")
    if not isinstance(kind, str):
        raise MlxeffError(f"{path}: config: model_type: wanted the name of an architecture, got {kind!r}")
    if kind in llama.FAMILIES:  # Hugging Face and mlx-lm differ on what a missing key means: the file knows
        config = {"tie_word_embeddings": not any(name.startswith("lm_head.") for name in source.tensors)} | config
    if "seedlm" in config:
        _check_seedlm(source)
    if kind in MODELS:
        model = build_model(config, source.tensors if source.config else None)
        fill(model, _weights(source, config), str(path))
        return model, config
    from .models.adapter import load_adapter

    notices.info("%s: architecture %r is not one of ours: plain decoding through mlx-lm", path, kind)
    prepare = functools.partial(_seed, config=config) if "seedlm" in config else None
    model = load_adapter(_folder(path), kind, overrides, lazy, trust_remote_code, prepare)
    return model, model.config


def _finish(model, config: dict, path: Path) -> None:
    """Read the weights, and check those that can be checked only then."""
    mx.eval(model.parameters())
    if "seedlm" in config:
        from .seedlm import install

        install.finish(model if isinstance(model, DecoderModel) else model.model, str(path))


def _fuse(path: Path, model) -> str:
    """Use the native CPU kernels where they apply; says so where they are missing. Returns the backend's name."""
    native, problem = kernels.native()
    if kernels.device() != "cpu" or not isinstance(model, DecoderModel):
        return "mlx"
    if native is None:
        notices.warning("%s: native CPU kernels: %s; MLX's own are used, which are slower", path, problem)
        return "mlx"
    if not native_for():
        return "mlx"
    return f"native {native.isa()}" if fuse(model) else f"native {native.isa()}, unfused"


def build_model(config: dict, tensors: Collection[str] | None = None) -> nn.Module:
    """The (unevaluated, randomly initialised) model that a config.json dict of our own families describes.

    Quantised as its `quantization` says: a module is quantised if it has an entry of its own there, else if
    `tensors`, the names in the checkpoint, hold its scales (None: wherever the group size divides).
    """
    model_class = MODELS.get(config.get("model_type"))
    if model_class is None:
        raise MlxeffError(f"config: model_type: wanted one of {', '.join(MODELS)}, got {config.get('model_type')!r}")
    try:
        model = model_class(model_class.Config.from_dict(config))
    except OverflowError as error:
        raise MlxeffError(f"config: sizes that no array can have: {error}") from error
    if "seedlm" in config:
        _seed(model, config)
    if quantization := config.get("quantization"):
        _quantize(model, quantization, tensors)
    elif foreign := config.get("quantization_config"):
        method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
        raise MlxeffError(f"config: quantization_config: wanted MLX's `quantization`, got quant_method {method!r}")
    return model.eval()


def _check_seedlm(source: Source) -> None:
    """The weight files say of themselves that they hold SeedLM blocks, and which."""
    from .seedlm.install import METADATA, check_metadata

    if METADATA not in source.metadata:
        raise MlxeffError(f"{source.path}: config has seed-encoded modules, the weights no {METADATA!r} header")
    check_metadata(source.metadata[METADATA], str(source.path))


def _seed(model: nn.Module, config: dict) -> None:
    from .seedlm.install import install

    install(model, config["seedlm"])


def _quantize(model: nn.Module, quantization: dict, tensors: Collection[str] | None) -> None:
    if not isinstance(quantization, dict):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {quantization!r}")
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
    if not {"group_size", "bits"} <= set(default):
        raise MlxeffError(f"config: quantization: wanted group_size and bits, got {sorted(default)}")

    def choose(path: str, module: nn.Module):
        if not hasattr(module, "to_quantized"):
            return False
        own = quantization.get(path)
        if own is not None:
            return own if isinstance(own, dict) else (default if own else False)
        if tensors is not None:
            return default if f"{path}.scales" in tensors else False
        return default if module.weight.shape[-1] % default["group_size"] == 0 else False

    try:
        nn.quantize(model, **default, class_predicate=choose)
    except (ValueError, TypeError) as error:
        raise MlxeffError(f"config: quantization: {quantization}: {str(error).splitlines()[0]}") from error


def fill(model: nn.Module, weights: dict[str, mx.array], origin: str) -> None:
    """Put `weights` into `model`: every name and shape must match; floats become the device's arithmetic type, where it
    has one."""
    wanted = dict(tree_flatten(model.parameters()))
    if missing := sorted(set(wanted) - set(weights)):
        raise MlxeffError(f"{origin}: missing {len(missing)} tensors: {_some(missing)}")
    if unknown := sorted(set(weights) - set(wanted)):
        raise MlxeffError(f"{origin}: {len(unknown)} unknown tensors: {_some(unknown)}")
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise MlxeffError(f"{origin}: tensor {name}: wanted shape {wanted[name].shape}, got {value.shape}")
        if _is_float(value) != _is_float(wanted[name]):
            raise MlxeffError(f"{origin}: tensor {name}: wanted dtype {wanted[name].dtype}, got {value.dtype}")
    if not native_for():  # the native kernels read weights of any type
        dtype = _arithmetic_dtype(weights, any(name.endswith(".scales") for name in weights))
        weights = {name: value.astype(dtype) if _is_float(value) else value for name, value in weights.items()}
    model.update(tree_unflatten(list(weights.items())))


def require_seam(model, seam: str, technique: str) -> None:
    """Refuse, in one line, to use `technique` on a model that has no such seam."""
    if seam not in model.seams:
        kind = getattr(model, "config", None)
        kind = kind.get("model_type") if isinstance(kind, dict) else type(model).__module__.rpartition(".")[2]
        raise MlxeffError(f"{technique} needs the {seam} seam, which {kind!r} (run through mlx-lm) does not have")


def fingerprint(source: Source, config: dict) -> str:
    """A short hash that tells models apart: config, tensor names and shapes, and both ends of every weight file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps([[n, list(t.shape)] for n, t in sorted(source.tensors.items())]).encode())
    for path in sorted({str(tensor.origin) for tensor in source.tensors.values()}):
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            size = file.seek(0, 2)
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read() + str(size).encode())
    return digest.hexdigest()[:16]


def _config(source: Source) -> dict:
    """The config.json dict of a source, or what a GGUF file says."""
    if source.config is not None:
        return source.config
    if not source.metadata.get("general.architecture"):
        raise MlxeffError(f"{source.path}: wanted a model folder or a GGUF file, got weights without config.json")
    from .models.gguf import config_from_gguf

    return config_from_gguf(source)


def _tokenizer(source: Source, config: dict) -> Tokenizer:
    if source.config is None:
        return from_gguf(source.metadata, str(source.path))
    kind, eos = config.get("model_type"), config.get("eos_token_id")
    if not fits(eos, int | list[int] | None):
        raise MlxeffError(f"{source.path}: config: eos_token_id: wanted a token id or a list of them, got {eos!r}")
    instruct = kind == "openelm" and "instruct" in str(source.path).lower()
    return from_folder(_folder(source.path), kind, eos, instruct=instruct)


def _folder(path: Path) -> Path:
    """Where config.json and the tokenizer are: the path itself, or beside a weights file."""
    return path if path.is_dir() else path.parent


def _weights(source: Source, config: dict) -> dict[str, mx.array]:
    if source.config is None:
        from .models.gguf import weights_from_gguf

        return weights_from_gguf(source)
    unused = MODELS[config["model_type"]].unused
    return {name: tensor.read() for name, tensor in source.tensors.items() if not unused(name, config)}


def _check_vocabulary(path: Path, rows: int | None, tokenizer: Tokenizer) -> None:
    if rows and tokenizer.vocab_size > rows:
        raise MlxeffError(
            f"{path}: vocabulary mismatch: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows} rows"
        )


def _arithmetic_dtype(weights: dict[str, mx.array], quantized: bool) -> mx.Dtype:
    sizes = Counter()
    for value in weights.values():
        if _is_float(value):
            sizes[value.dtype] += value.nbytes
    return kernels.arithmetic_dtype(sizes.most_common(1)[0][0], quantized)


def _dtype_name(model) -> str:
    sizes = Counter()
    for _, value in tree_flatten(model.parameters()):
        if _is_float(value):
            sizes[value.dtype] += value.nbytes
    return re.sub(r"^mlx\.core\.", "", str(sizes.most_common(1)[0][0]))


def _is_float(value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
