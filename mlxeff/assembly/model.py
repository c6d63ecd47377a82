"""A model folder or file → the model, with its tokenizer.

`load` has mlx-lm's arguments and result. Weights are loaded strictly: every parameter of the model must be in the
files with the right shape, and every tensor of the files must be a parameter. The table `techniques.STORED` says which
techniques replace modules of the model before its weights are loaded.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import hub, kernels, memory
from ..cache import KINDS
from ..checkpoint import Source, open_source
from ..decode import Model
from ..errors import MlxeffError, notices, one_line, some
from ..models import llama, openelm
from ..models.config import fits, passed_over
from ..models.decoder import DecoderModel
from ..modules import PARTS, settle_random_state
from ..ops import native_for
from ..tokenizer import Tokenizer, from_folder, from_gguf
from .quantization import check_sizes
from .techniques import CACHES, Stored, Unloaded, architecture, stored_in

KINDS.update(CACHES)
SAMPLE_BYTES = 1 << 16  # bytes at the beginning and the end of a weight file that enter the fingerprint
MLX_LM_BYTES = 45 << 20  # of address space for mlx-lm and its libraries, measured
TOKENIZER_KEYS = {"chat_template", "eos_token", "trust_remote_code"}  # known keys of mlx-lm's `tokenizer_config`
# model_type → class of the model, for the families that this package computes itself.
MODELS = {"openelm": openelm.Model} | dict.fromkeys(llama.FAMILIES, llama.Model)
Check = Callable[[Unloaded], None]


@dataclass
class Loaded:
    """A model that is ready to run, and facts about it for reports."""

    model: Model
    tokenizer: Tokenizer
    config: dict  # of its config.json
    path: Path
    fingerprint: str  # see `fingerprint`
    dtype: str  # type of the activations
    backend: str  # what will compute the model, as in `running.Ran`, unless its weights are changed
    ignored: tuple[str, ...] = ()  # entries of config.json that were read as absent; a pair's auxiliary lacks them too


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Model, Tokenizer] | tuple[Model, Tokenizer, dict]:
    """(Model, tokenizer) of a folder, a GGUF file, a Hugging Face id or a built-in alias, or with `return_config`
    (model, tokenizer, config). The arguments are those of mlx-lm's `load`:

    model_config       entries that override those of config.json; None deletes an entry
    tokenizer_config   `eos_token` (the text of one more end token), `chat_template`, and `trust_remote_code`, which has
                       no effect: a tokenizer never runs code
    lazy               leave the weights unevaluated
    revision           branch, tag or commit of a Hugging Face repository
    trust_remote_code  let mlx-lm run Python code that the model folder brings
    adapter_path       not supported: refused

    Raises MlxeffError where the model cannot be found, read or run.
    """
    if adapter_path:
        raise MlxeffError(f"load: adapter_path is not supported, got {adapter_path!r}: fuse it with mlx_lm.fuse")
    given = dict(tokenizer_config or {})
    if unknown := sorted(set(given) - TOKENIZER_KEYS):
        known = ", ".join(sorted(TOKENIZER_KEYS))
        raise MlxeffError(f"load: tokenizer_config: wanted keys of {known}, got {', '.join(map(repr, unknown))}")
    path = hub.resolve(str(path_or_hf_repo), revision=revision)
    loaded = load_path(path, model_config, lazy, trust_remote_code)
    if given.get("eos_token") is not None:
        loaded.tokenizer.add_eos_token(given["eos_token"])
    if given.get("chat_template") is not None:
        loaded.tokenizer.chat_template = given["chat_template"]
    return (loaded.model, loaded.tokenizer, loaded.config) if return_config else (loaded.model, loaded.tokenizer)


def load_path(
    path: Path,
    overrides: dict | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
    check: Check = lambda _: None,
) -> Loaded:
    """Load a model folder (mlx-lm's or Hugging Face's) or a GGUF file. `overrides` as `model_config` in `load`, which
    also explains the other arguments and names the errors. `check` is called before weights are read, and may raise
    MlxeffError for a model that the caller cannot use."""
    kernels.bound_buffer_cache()
    source = open_source(path)
    config = _config(source)
    overrides = overrides or {}
    tokenizer = _tokenizer(source, config, overrides)
    deleted = [key for key, value in overrides.items() if value is None]
    config = without(config, deleted, path) | {key: value for key, value in overrides.items() if value is not None}
    model, config = _model(source, config, overrides, lazy, trust_remote_code, check)
    backend = "mlx"
    if not lazy:
        _finish(model, config, path)
        backend = _choose_executor(path, model)
    dtype = "float32" if native_for() and isinstance(model, DecoderModel) else _dtype_name(model)
    mark = fingerprint(source, config)
    return Loaded(model, tokenizer, config, Path(path), mark, dtype, backend, tuple(deleted))


def without(config: dict, keys: Iterable[str], origin: Path) -> dict:
    """The dict of a config.json without `keys`, which are read as absent. A notice says which of them it never had."""
    keys = list(keys)
    if strange := [key for key in keys if key not in config]:
        notices.warning("%s: the config has no key %s to ignore", origin, some(strange))
    return {key: value for key, value in config.items() if key not in keys}


def load_model(path: Path, ignored: Collection[str] = ()) -> tuple[Model, str]:
    """(Model, fingerprint) of a model folder or GGUF file, without its tokenizer. The model computes operator by
    operator until `use_native` is called. `ignored` are entries of config.json that are read as absent where they are
    there."""
    source = open_source(path)
    config = {key: value for key, value in _config(source).items() if key not in ignored}
    model, config = _model(source, config, dict.fromkeys(ignored))
    _finish(model, config, path)
    return model, fingerprint(source, config)


def _model(
    source: Source,
    config: dict,
    overrides: dict,
    lazy: bool = False,
    trust_remote_code: bool = False,
    check: Check = lambda _: None,
) -> tuple[object, dict]:
    """(The model with its weights, its config, completed by what only the weight files say)."""
    path, kind = source.path, config.get("model_type")
    if not isinstance(kind, str):
        raise MlxeffError(f"{path}: config: model_type: wanted the name of an architecture, got {kind!r}")
    rule = llama.rope_of_mlx_lm(architecture(config)) if kind in llama.FAMILIES and source.config else None
    own = kind in MODELS and rule is None
    if not lazy:
        _require_memory(path, sum(tensor.memory_nbytes for tensor in source.tensors.values()), not own)
    if kind in llama.FAMILIES:  # Hugging Face and mlx-lm have different defaults for this key, so the weights decide
        config = {"tie_word_embeddings": not any(name.startswith("lm_head.") for name in source.tensors)} | config
    for technique in stored_in(config):
        technique.check(source)
    check_sizes(config)
    if kind in MODELS and (unread := passed_over(MODELS[kind].Config, architecture(config))):
        longest = 30_000  # of a list of names in a notice, which no honest file has
        names = one_line(", ".join(unread), longest)
        notices.warning("%s: config keys that change nothing in the model are not read: %s", path, names)
    if own:
        model = build_model(config, source.tensors if source.config else None)
        check(Unloaded(model, path, fingerprint(source, config)))
        before = mx.get_active_memory()
        with memory.explained(str(path)):
            fill(model, _weights(source, config), str(path))
        if not lazy:  # what is not in memory yet, in the type that it will have there
            total = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
            _require_memory(path, total - (mx.get_active_memory() - before))
        return model, config
    from ..models.adapter import AdapterModel, load_adapter

    check(Unloaded(AdapterModel(None, config), path, ""))
    what = f"rotary embedding of the rule {rule}" if rule else f"architecture {kind!r}"
    notices.info("%s: %s is not one of ours: plain decoding through mlx-lm", path, what)
    if rule:
        overrides = {"tie_word_embeddings": config["tie_word_embeddings"]} | overrides
    if source.config is None:
        return AdapterModel(_foreign_gguf(source, config), config), config
    if source.format == "torch":
        raise MlxeffError(f"{path}: wanted safetensors for {kind!r}, which mlx-lm computes, got PyTorch's files")
    foreign = [technique for technique in stored_in(config) if technique.in_foreign_models]
    prepare = functools.partial(_install, foreign, config=config, tensors=source.tensors) if foreign else None
    model = load_adapter(_folder(path), kind, overrides, lazy, trust_remote_code, prepare)
    return model, model.config


def _foreign_gguf(source: Source, config: dict) -> nn.Module:
    """mlx-lm's model with the weights of a GGUF file."""
    from ..models.adapter import widen_experts
    from ..models.gguf_foreign import build

    with memory.explained(str(source.path)):
        model, weights = build(source, config)
        fill(model, weights, str(source.path), native=False)
        widen_experts(model, str(source.path))
    settle_random_state()
    return model


def _require_memory(path: Path, need: int, foreign: bool = False) -> None:
    """Raises MlxeffError where weights of `need` bytes, and for a `foreign` model mlx-lm and its libraries, do not fit
    into the memory that this process may use."""
    libraries = MLX_LM_BYTES if foreign else 0

    def fits(have: float) -> str:
        share = max(have - libraries, 0) / max(need, 1)
        return f"{share:.0%} of the weights would fit (mlxeff convert --quantize makes smaller ones)"

    what = "mlx-lm and the weights" if foreign else "the weights"
    memory.require(need + libraries, f"{path}: {what}", fits)


def _install(techniques: Iterable[Stored], model: nn.Module, config: dict, tensors: Collection[str] | None) -> None:
    """Let each technique replace modules of the model."""
    for technique in techniques:
        technique.install(model, config, tensors)


def _finish(model: Model, config: dict, path: Path) -> None:
    """Evaluate the weights, and let each technique check its own."""
    with memory.explained(str(path)):
        mx.eval(model.parameters())
    for technique in stored_in(config):
        technique.finish(model if isinstance(model, DecoderModel) else model.model, str(path))


def _choose_executor(path: Path, model: Model) -> str:
    """Choose the native executor where it applies; returns the name of the backend. A notice says where the native
    kernels are missing."""
    native, problem = kernels.native()
    if kernels.device() != "cpu" or not isinstance(model, DecoderModel):
        return "mlx"
    if native is None:
        notices.warning("%s: native CPU kernels: %s; MLX's own are used, which are slower", path, problem)
        return "mlx"
    return (model.native if native_for() and model.use_native() else model.plain).backend


def build_model(config: dict, tensors: Collection[str] | None = None) -> nn.Module:
    """The model that the dict of a config.json describes, with random weights that are not evaluated; only for the
    families in MODELS. Techniques that the config names have replaced their modules. `tensors`: names of the tensors in
    the checkpoint, which say which modules are quantised (see `quantization.install`). Raises MlxeffError for an
    invalid config.
    """
    model_class = MODELS.get(config.get("model_type"))
    if model_class is None:
        raise MlxeffError(f"config: model_type: wanted one of {', '.join(MODELS)}, got {config.get('model_type')!r}")
    try:
        model = model_class(model_class.Config.from_dict(architecture(config)))
    except (OverflowError, ValueError, RuntimeError) as error:
        if isinstance(error, MlxeffError):
            raise
        raise MlxeffError(f"config: sizes that no array can have: {error}") from error
    if (foreign := config.get("quantization_config")) and not config.get("quantization"):
        method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
        raise MlxeffError(f"config: quantization_config: wanted MLX's `quantization`, got quant_method {method!r}")
    _install(stored_in(config), model, config, tensors)
    settle_random_state()
    return model.eval()


def fill(model: nn.Module, weights: dict[str, mx.array], origin: str, native: bool | None = None) -> None:
    """Set the parameters of `model` to `weights`, whose names and shapes have to be exactly those of the parameters.

    Unless the native kernels are chosen, float arrays are converted to the type that MLX should compute in
    (`kernels.arithmetic_dtype`). `native` says whether they are; None: as for a new model. `origin` names the
    checkpoint in errors. Raises MlxeffError for missing and unknown tensors and for wrong shapes and types.
    """
    own = dict(tree_flatten(model.parameters()))
    if missing := sorted(set(own) - set(weights)):
        raise MlxeffError(f"{origin}: missing {len(missing)} tensors: {some(missing)}")
    if unknown := sorted(set(weights) - set(own)):
        raise MlxeffError(f"{origin}: {len(unknown)} unknown tensors: {some(unknown)}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise MlxeffError(f"{origin}: tensor {name}: wanted shape {own[name].shape}, got {value.shape}")
        packed = name.rpartition(".")[2] in PARTS and not _is_float(value)  # other integers are their module's business
        if _is_float(value) != _is_float(own[name]) or (packed and value.dtype != own[name].dtype):
            raise MlxeffError(f"{origin}: tensor {name}: wanted dtype {own[name].dtype}, got {value.dtype}")
    for name in [name for name in weights if name.endswith(".biases")]:  # half of them in another type than the scales
        scales = f"{name.removesuffix('biases')}scales"
        if scales in weights and weights[scales].dtype != weights[name].dtype:
            wider = mx.result_type(weights[scales], weights[name])
            weights |= {each: weights[each].astype(wider) for each in (scales, name)}
    if not (native_for() if native is None else native):  # the native kernels read weights of any type
        dtype = _arithmetic_dtype(weights, any(name.endswith(".scales") for name in weights))
        weights = {name: value.astype(dtype) if _is_float(value) else value for name, value in weights.items()}
    model.update(tree_unflatten(list(weights.items())))


def fingerprint(source: Source, config: dict) -> str:
    """A short hash that identifies a model: of its config, the names and shapes of its tensors, and the beginning, end
    and size of every weight file."""
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
    """The dict of the checkpoint's config.json, or of the equivalent metadata of a GGUF file."""
    if source.config is not None:
        return source.config
    if not source.metadata.get("general.architecture"):
        raise MlxeffError(f"{source.path}: wanted a model folder or a GGUF file, got weights without config.json")
    from ..models.gguf_foreign import config_from_gguf

    return config_from_gguf(source)


def _tokenizer(source: Source, config: dict, overrides: dict) -> Tokenizer:
    """The tokenizer beside the weights, or inside of a GGUF file. Its end tokens are those of all files, or of the
    override `eos_token_id`. It may have more tokens than the model has rows: a prompt with one of them is refused."""
    if source.config is None:
        return from_gguf(source.metadata, str(source.path))
    for value in (config.get("eos_token_id"), overrides.get("eos_token_id")):
        if not fits(value, int | list[int] | None):
            what = f"{source.path}: config: eos_token_id"
            raise MlxeffError(f"{what}: wanted a token id or a list of them, got {value!r:.60}")
    return from_folder(_folder(source.path), config.get("model_type"), overrides.get("eos_token_id"))


def _folder(path: Path) -> Path:
    """The folder with config.json and the tokenizer: the path itself, or the folder of a weights file."""
    return path if path.is_dir() else path.parent


def _weights(source: Source, config: dict) -> dict[str, mx.array]:
    """All tensors of the checkpoint that the model uses, by the names of its parameters."""
    if source.config is None:
        from ..models.gguf import weights_from_gguf

        return weights_from_gguf(source)
    unused, family = MODELS[config["model_type"]].unused, architecture(config)
    return {name: tensor.read() for name, tensor in source.tensors.items() if not unused(name, family)}


def _arithmetic_dtype(weights: dict[str, mx.array], quantized: bool) -> mx.Dtype:
    """The type that MLX should compute in with these weights."""
    return kernels.arithmetic_dtype(_main_dtype(weights.values()), quantized)


def _dtype_name(model: Model) -> str:
    """The name of the float type of most of the model's weights."""
    values = [value for _, value in tree_flatten(model.parameters())]
    return str(_main_dtype(values)).removeprefix("mlx.core.")


def _main_dtype(arrays: Iterable[mx.array]) -> mx.Dtype:
    """The float type with the most bytes in these arrays."""
    sizes = Counter()
    for array in arrays:
        if _is_float(array):
            sizes[array.dtype] += array.nbytes
    return sizes.most_common(1)[0][0]


def _is_float(value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating)
