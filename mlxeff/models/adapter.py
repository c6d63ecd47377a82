"""Any other model that mlx-lm can load (Gemma 3, Phi, …), for plain decoding.

mlx-lm builds and owns the model and its caches; here they get the call protocol of our own models. There are no
seams, so a technique that needs one says so. Importing mlx-lm brings `transformers`: only this path pays for it.
"""

import contextlib
import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import mlx.core as mx

from ..errors import MlxeffError
from ..running import EXACT, Ran, RunOptions, Tally

RAN = Ran("mlx", EXACT.compute)


class AdapterCache:
    """mlx-lm's list of layer caches, whatever their kinds, under the protocol `cache.Cache`."""

    kind = None

    def __init__(self, layers: list):
        self.layers, self.tally = layers, Tally()
        self.length = 0  # tokens fed so far

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def stored_as(self) -> None:
        """mlx-lm's caches do not say."""
        return None

    def rewind(self, length: int) -> int:
        """As `Cache.rewind`; all tokens are kept where a layer has a state that cannot be taken back (recurrent layers,
        full rotating caches)."""
        if not 0 <= length <= self.length:
            raise MlxeffError(f"KV cache: wanted to rewind to 0 to {self.length} tokens, got {length}")
        if all(layer.is_trimmable() for layer in self.layers):
            for layer in self.layers:
                layer.trim(self.length - length)
            self.length = length
        return self.length

    def reserve(self, tokens: int) -> None:
        """mlx-lm's caches grow by themselves."""

    def arrays(self) -> list:
        """The state to be evaluated after a prefill chunk."""
        return [layer.state for layer in self.layers]


class AdapterModel:
    """An mlx-lm model: `model(tokens, cache) → logits`; token ids (B, S) → (B, S, V)."""

    seams: frozenset[str] = frozenset()

    def __init__(self, model, config: dict):
        self.model = model
        self.config = config

    @property
    def context_length(self) -> int | None:
        """Tokens of context by the model's config, None if it does not say."""
        return self._key("max_position_embeddings")

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding table by the model's config, None if it does not say."""
        return self._key("vocab_size")

    def _key(self, name: str):
        return self.config.get(name) or (self.config.get("text_config") or {}).get(name)

    def check(self, options: RunOptions) -> None:
        """Refuse, in one line, all options but the defaults: mlx-lm's models have none of them."""
        if options != EXACT:
            given = ", ".join(
                f"{f.name} {getattr(options, f.name)}" for f in fields(options) if getattr(options, f.name) != f.default
            )
            kind = self.config.get("model_type")
            raise MlxeffError(f"{given}: wanted a model of our own families, {kind!r} runs through mlx-lm")

    def new_cache(self, kind: str | None = None) -> AdapterCache:
        """An empty cache of the kinds that mlx-lm gives the model's layers."""
        from mlx_lm.models.cache import make_prompt_cache

        if kind is not None:
            self.check(RunOptions(kv=kind))
        return AdapterCache(make_prompt_cache(self.model))

    def __call__(self, tokens: mx.array, cache: AdapterCache, options: RunOptions = EXACT) -> mx.array:
        self.check(options)
        logits = self.model(tokens, cache=cache.layers)
        cache.length += tokens.shape[1]
        cache.tally[RAN] += tokens.shape[1]
        return logits

    def last_logits(self, tokens: mx.array, cache: AdapterCache, options: RunOptions = EXACT) -> mx.array:
        """Logits of the last position, (B, V). The others are never computed: their head has no consumer."""
        if tokens.shape[1] > 1:
            self(tokens[:, :-1], cache, options)
        return self(tokens[:, -1:], cache, options)[:, -1]

    def parameters(self) -> dict:
        return self.model.parameters()


def _refuse_code(folder: Path, overrides: dict) -> None:
    """For mlx-lm before 0.32, the newest on Python 3.10: it runs a checkpoint's own code without asking."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | overrides
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
    prepare: Callable | None = None,
) -> AdapterModel:
    """The model of an mlx-lm or Hugging Face folder, built by mlx-lm; `overrides` are laid over its config.json.

    `prepare(model)` may replace modules before the weights are put in.
    """
    with _keep_file_limit():
        from mlx_lm.utils import load_model
    options = {"get_model_classes": _prepared(prepare)} if prepare else {}
    if "trust_remote_code" in inspect.signature(load_model).parameters:
        options["trust_remote_code"] = trust_remote_code
    elif not trust_remote_code:
        _refuse_code(folder, overrides)
    try:
        model, config = load_model(folder, lazy=lazy, model_config=overrides, **options)
    except MlxeffError:
        raise
    except Exception as error:  # mlx-lm raises whatever its model classes raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MlxeffError(
            f"{folder}: unsupported architecture {kind!r}: not one of ours, and mlx-lm says: {reason}"
        ) from error
    return AdapterModel(model, config)


def _prepared(prepare: Callable) -> Callable:
    """mlx-lm's choice of classes, with a model class that builds and then prepares."""
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
def _keep_file_limit():
    """mlx-lm lowers the process's limit of open files when imported, hard limit included: hold it off meanwhile."""
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
