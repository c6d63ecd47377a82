"""Models of all other families (Gemma 3, Phi, …), built and computed by mlx-lm, for plain decoding.

`AdapterModel` and `AdapterCache` wrap mlx-lm's model and caches so that they can be used like `decoder.DecoderModel`
and `cache.KVCache`. Techniques cannot plug into these models, since mlx-lm's code computes them: `seams` is empty.
Importing mlx-lm also imports `transformers`, which is slow, so it happens inside of the functions that need it.
"""

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import MlxeffError, notices
from ..kernels import device
from ..limits import UNLIMITED
from ..memory import require
from ..modules import chunk_bytes, layer_rows
from ..names import is_utf8
from ..running import EXACT, FULL_VIEW, Ran, RunOptions, Tally
from .rope import flat_entries

STEP = 256  # tokens by which mlx-lm's caches grow
RAN = Ran("mlx", EXACT.compute)  # what computes all calls of these models


class AdapterCache:
    """A list of mlx-lm's layer caches, of whatever kinds, with the methods of `cache.Cache`."""

    kind, views, together = None, (FULL_VIEW,), None

    def __init__(self, layers: list):
        self.layers, self.tally = layers, Tally()
        self.length = 0  # cached tokens
        self.checked = 0  # tokens for which `AdapterModel.require_room` has found memory

    def read_bytes(self, _view: str = FULL_VIEW) -> int:
        """Bytes allocated: what is read of them is not known."""
        return self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def stored_as(self) -> None:
        """None: mlx-lm's caches do not tell their type."""
        return None

    def rewind(self, length: int) -> int:
        """See `Cache.rewind`. All tokens are kept where the cache of a layer cannot drop tokens: the state of a
        recurrent layer, or a rotating cache that is full."""
        if not 0 <= length <= self.length:
            raise MlxeffError(f"KV cache: wanted to rewind to 0 to {self.length} tokens, got {length}")
        if all(layer.is_trimmable() for layer in self.layers):
            for layer in self.layers:
                layer.trim(self.length - length)
            self.length = length
        return self.length

    def is_trimmable(self) -> bool:
        """Whether tokens at the end can be dropped, for mlx-lm's `can_trim_prompt_cache`."""
        return all(layer.is_trimmable() for layer in self.layers)

    @property
    def drops(self) -> bool:
        """See `Cache.drops`. A rotating cache cannot once it is full."""
        return self.is_trimmable() and not any(hasattr(layer, "max_size") for layer in self.layers)

    def trim(self, count: int) -> int:
        """Drop the last `count` tokens, for mlx-lm's `trim_prompt_cache`; returns how many were dropped."""
        before = self.length
        return before - self.rewind(max(0, before - count))

    @property
    def state(self) -> None:
        """Raises MlxeffError, for mlx-lm's `save_prompt_cache`: it can save `layers`."""
        raise MlxeffError("KV cache: wanted a list of mlx-lm's caches to save, got this one: give its `layers`")

    def reserve(self, tokens: int) -> None:
        """Does nothing: mlx-lm's caches decide themselves how to grow."""

    def arrays(self) -> list:
        """See `Cache.arrays`."""
        return [layer.state for layer in self.layers]


class AdapterModel:
    """A model of mlx-lm with the methods of `decode.Model`. `config` is the dict of its config.json.

    Shapes: B batch, S tokens, V vocabulary.
    """

    seams: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, config: dict):
        self.model = model
        self.config = config

    @property
    def context_length(self) -> int | None:
        """Tokens of context, from the model's config; None where the config has no such entry."""
        return self._key("max_position_embeddings")

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding table, from the model's config or mlx-lm's default; None where neither has an entry."""
        return self._key("vocab_size") or getattr(getattr(self.model, "args", None), "vocab_size", None)

    def _key(self, name: str) -> int | None:
        """An entry of the config; multimodal models have those of their language model under "text_config"."""
        return self.config.get(name) or (self.config.get("text_config") or {}).get(name)

    def prefill_bytes(self, cache: AdapterCache, new: int, step_size: int, _: RunOptions = EXACT) -> int:
        """Bytes that reading `new` more tokens in chunks of `step_size` needs, counted low: from sizes in the config
        that most families have, and for caches that keep all keys and values."""
        keeping = sum(type(layer).__name__ == "KVCache" for layer in cache.layers)
        keeping = 0 if self._size("kv_lora_rank") else keeping  # latent keys and values are smaller
        heads = self._size("num_attention_heads")
        size = self._size("head_dim") or self._size("hidden_size") // max(heads, 1)
        groups = self._size("num_key_value_heads") or heads
        floats = [value for _, value in tree_flatten(self.parameters()) if mx.issubdtype(value.dtype, mx.floating)]
        width = min((value.dtype.size for value in floats), default=2)
        cached = 2 * groups * size * width * keeping * new
        if device() != "cpu":
            return cached
        chunk = min(step_size, new)
        return cached + chunk_bytes(heads, layer_rows(self.parameters()), chunk, cache.length + new)

    def require_room(self, cache: AdapterCache, new: int, _: RunOptions = EXACT, batch: int = 1) -> None:
        """Raises MlxeffError where the memory that this process may use cannot hold the growth of `cache` that `new`
        more tokens of each of `batch` sequences need. What is free is asked only where buffers grow. An empty cache is
        not checked: its sizes are not known."""
        if cache.length + new <= cache.checked or not cache.length:
            return
        growing = list(_growing(cache.layers))
        before = min((capacity for capacity, _ in growing), default=UNLIMITED)
        after = max(before, before + -(-(cache.length + new - before) // STEP) * STEP)
        if after > before:
            sizes = [token for _, token in growing]
            need = sum(sizes) * (after - before) + max(sizes) * after  # layers are copied one after the other
            if device() == "cpu":
                heads = self._size("num_attention_heads")
                need += chunk_bytes(heads, layer_rows(self.parameters()), new * batch, after)
            what = f"KV cache: growth from {before} to {after} tokens"
            require(need, what, lambda _: f"about {before} would fit", tell=False)
        cache.checked = after

    def _size(self, name: str) -> int:
        """An entry of the config that is a number above 0; else 0."""
        value = self._key(name)
        return value if type(value) is int and value > 0 else 0

    def check(self, options: RunOptions) -> None:
        """Raises MlxeffError for all options but the defaults: mlx-lm's models support none of them."""
        if options == EXACT:
            return
        changed = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
        got = ", ".join(f"{name} {value}" for name, value in changed.items())
        kind = self.config.get("model_type")
        raise MlxeffError(f"{got}: wanted a model of our own families, {kind!r} runs through mlx-lm")

    def new_cache(self, kind: str | None = None) -> AdapterCache:
        """An empty cache, of the kinds that mlx-lm makes for the model's layers. Raises MlxeffError for any `kind` but
        None."""
        from mlx_lm.models.cache import make_prompt_cache

        if kind is not None:
            self.check(RunOptions(kv=kind))
        return AdapterCache(make_prompt_cache(self.model))

    def make_cache(self) -> list[AdapterCache]:
        """[`new_cache()`]: what mlx-lm's `make_prompt_cache` gives for this model."""
        return [self.new_cache()]

    def wrap_cache(self, layers: list) -> AdapterCache:
        """The cache of mlx-lm's own caches, one for each layer. Raises MlxeffError where they are of another model, or
        do not tell how many tokens they hold."""
        lengths = {getattr(layer, "offset", None) for layer in layers}
        if len(layers) != len(self.new_cache().layers) or len(lengths) != 1 or None in lengths:
            raise MlxeffError("prompt_cache: wanted one of mlxeff.make_prompt_cache(model), got a list of other caches")
        cache = AdapterCache(layers)
        cache.length = lengths.pop()
        return cache

    def __call__(self, tokens: mx.array, cache: AdapterCache, options: RunOptions = EXACT) -> mx.array:
        """Ids (B, S) of the tokens that follow the cached ones → logits (B, S, V). Appends the tokens to `cache`."""
        self.check(options)
        self.require_room(cache, tokens.shape[1], options, tokens.shape[0])
        logits = self.model(tokens, cache=cache.layers)
        cache.length += tokens.shape[1]
        cache.tally[RAN] += tokens.shape[1]
        return logits

    def last_logits(self, tokens: mx.array, cache: AdapterCache, options: RunOptions = EXACT) -> mx.array:
        """As `__call__`, but the logits of the last position only, (B, V). The graph of the other logits is built and
        never evaluated."""
        if tokens.shape[1] > 1:
            self(tokens[:, :-1], cache, options)
        return self(tokens[:, -1:], cache, options)[:, -1]

    def parameters(self) -> dict:
        """The weights, as `mlx.nn.Module.parameters`."""
        return self.model.parameters()


def _growing(layers: list) -> Iterator[tuple[int, float]]:
    """(Tokens for which it has room, bytes of a token) of each of mlx-lm's caches that grows with the text: states of
    recurrent layers and rotating caches that are full do not."""
    for layer in layers:
        if hasattr(layer, "caches"):
            yield from _growing(layer.caches)
            continue
        keys = getattr(layer, "keys", None)
        keys = keys[0] if isinstance(keys, tuple | list) else keys
        capacity = 0 if keys is None else keys.shape[-2]
        if 0 < capacity < (getattr(layer, "max_size", None) or UNLIMITED):
            yield capacity, layer.nbytes / capacity


def _refuse_code(folder: Path, config: dict) -> None:
    """Raises MlxeffError where a checkpoint brings its own Python code, which versions of mlx-lm before 0.32 (the
    newest for Python 3.10) run without asking."""
    if config.get("model_file") is not None:
        raise MlxeffError(
            f"{folder}: config.json: model_file {config['model_file']!r} is code of the checkpoint, "
            "which runs only with --trust-remote-code"
        )


def load_adapter(
    folder: Path,
    kind: str,
    overrides: dict,
    lazy: bool = False,
    trust_remote_code: bool = False,
    prepare: Callable[[nn.Module], object] | None = None,
) -> AdapterModel:
    """Load the model in a folder of mlx-lm or Hugging Face with mlx-lm.

    kind               its model_type, for errors
    overrides          entries that replace those of its config.json
    lazy               leave the weights unevaluated
    trust_remote_code  let mlx-lm run Python code that the folder brings
    prepare            called with the new model before its weights are loaded; it may replace modules

    Raises MlxeffError where mlx-lm cannot load the model.
    """
    if not is_utf8(folder):
        raise MlxeffError(f"{folder}: wanted a folder name in UTF-8 for a model that runs through mlx-lm")
    with _keep_file_limit():
        from mlx_lm.utils import load_model
    options = {"get_model_classes": _prepared(prepare)} if prepare else {}
    if "trust_remote_code" in inspect.signature(load_model).parameters:
        options["trust_remote_code"] = trust_remote_code
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | overrides
    if not trust_remote_code:
        _refuse_code(folder, config)
    overrides = flat_entries(config) | overrides  # few of mlx-lm's models read rope_parameters
    try:
        model, config = load_model(folder, lazy=lazy, model_config=overrides, **options)
    except MlxeffError:
        raise
    except (Exception, SystemExit) as error:  # mlx-lm raises whatever its model classes raise
        raise _unsupported(str(folder), kind, error) from error
    widen_experts(model, str(folder))
    return AdapterModel(model, config)


def widen_experts(model: nn.Module, origin: str) -> None:
    """Convert the dense weights of experts to float32 where the default device is a CPU: MLX multiplies those of other
    types on GPUs only. A notice says so; `origin` names the checkpoint in it."""
    from mlx_lm.models.switch_layers import SwitchLinear

    if mx.default_device().type != mx.cpu:
        return
    layers = [m for m in model.modules() if isinstance(m, SwitchLinear) and m.weight.dtype != mx.float32]
    for layer in layers:
        layer.weight = layer.weight.astype(mx.float32)
    if layers:
        notices.info("%s: the experts' weights become float32: MLX has no other product of experts on a CPU", origin)


def build_foreign(config: dict, origin: str) -> nn.Module:
    """mlx-lm's model of a config, with random weights that are not evaluated. `origin` names the checkpoint in errors.
    Raises MlxeffError where mlx-lm has no such model."""
    with _keep_file_limit():
        from mlx_lm.utils import _get_classes
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model_class, arguments_class = _get_classes(config)
        return model_class(arguments_class.from_dict(config)).eval()
    except (Exception, SystemExit) as error:
        raise _unsupported(origin, config["model_type"], error) from error


def _unsupported(origin: str, kind: str, error: BaseException) -> MlxeffError:
    """The error to raise where mlx-lm does not build the model; some of its modules end the process instead of raising
    where a library is missing."""
    said = "a library is missing" if isinstance(error, SystemExit) else str(error)
    reason = said.splitlines()[0] if said else type(error).__name__
    return MlxeffError(f"{origin}: unsupported architecture {kind!r}: not one of ours, and mlx-lm says: {reason}")


def _prepared(prepare: Callable[[nn.Module], object]) -> Callable[[dict], tuple]:
    """A replacement for mlx-lm's function config → (model class, arguments class): its model class calls `prepare` on
    each new model."""
    from mlx_lm.utils import _get_classes

    def choose(config: dict) -> tuple:
        model_class, arguments_class = _get_classes(config)

        def build(arguments):
            model = model_class(arguments)
            prepare(model)
            return model

        return build, arguments_class

    return choose


@contextlib.contextmanager
def _keep_file_limit() -> Iterator[None]:
    """Keep the process's limit of open files unchanged inside the block: importing mlx-lm lowers it, and the hard limit
    too."""
    try:
        import resource
    except ImportError:  # no such module on Windows
        yield
        return
    original, resource.setrlimit = resource.setrlimit, lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = original
