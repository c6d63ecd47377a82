"""A KV cache as a safetensors file: the layers' arrays, the ids of the tokens, and what computed them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoint import save_arrays
from ..errors import MlxeffError
from ..names import readable_by_mlx
from ..running import EXACT, Ran, RunOptions, Tally
from .layer import LayerCache

if TYPE_CHECKING:
    from .model import KVCache

FORMAT_VERSION = "1"  # of the cache files that `KVCache.save` writes
GIVEN = "given"  # stands for an arithmetic in a cache file: keys and values that were appended without a forward pass


class OtherPrecisionError(MlxeffError):
    """A cache file holds keys and values of another form, numeric type or arithmetic than those that are wanted."""


def save(cache: KVCache, path: str | os.PathLike, tokens: Sequence[int], model: str) -> None:
    """Write the cache and the ids of its tokens to the safetensors file `path`.

    `model` is the fingerprint of the model, which `restore` compares. An existing file is replaced only by a
    complete one. Raises MlxeffError for an empty cache, for a number of token ids other than `length`, and for a
    file that cannot be written.
    """
    if cache.length == 0 or len(tokens) != cache.length:
        raise MlxeffError(f"{path}: cannot save a KV cache of {cache.length} tokens with {len(tokens)} token ids")
    arrays = {"tokens": mx.array(list(tokens), dtype=mx.uint32)}
    for index, layer in enumerate(cache.layers):
        arrays |= {f"{index}.{name}": value for name, value in layer.saved().items()}
    metadata = {"format": "mlxeff-kv-cache", "version": FORMAT_VERSION, "model": model, "storage": _storage(cache)}
    if cache.tally:
        metadata["computed"] = json.dumps(_computed(cache))
    save_arrays(Path(path), arrays, metadata, "the prompt cache")


def restore(cache: KVCache, path: str | os.PathLike, model: str, options: RunOptions = EXACT) -> list[int]:
    """Fill this cache, which must be empty, from a file that `save` wrote; returns the ids of its tokens.

    Raises OtherPrecisionError for a file whose keys and values have another type or storage format than this cache's,
    or were computed in another arithmetic than that of `options`: these would change the result of an exact run without
    a trace. A file that does not say what computed it counts as exact. Raises MlxeffError for a file of another model
    (fingerprint `model`) or of other layers, and for a damaged or foreign file. The cache is then still empty.
    """
    arrays, metadata = _read(Path(path), model)
    storage = metadata.get("storage", LayerCache.storage)
    if storage != _storage(cache):
        raise OtherPrecisionError(f"{path}: wanted a KV cache stored as {_storage(cache)}, got {storage}")
    ids = arrays.pop("tokens", mx.zeros((0,), mx.uint32))
    if ids.ndim != 1 or not mx.issubdtype(ids.dtype, mx.integer):
        raise MlxeffError(f"{path}: wanted token ids (T), got {ids.dtype} {ids.shape}")
    tokens = ids.tolist()
    parts: dict[str, dict[str, mx.array]] = {}
    for name, value in arrays.items():
        index, _, part = name.partition(".")
        parts.setdefault(index, {})[part] = value
    try:
        if set(parts) != {str(index) for index in range(len(cache.layers))}:
            raise ValueError
        computed = _tally(metadata, len(tokens))
        _check_heads(cache, parts)
        _check_precision(cache, path, parts, computed, options)
        for index, layer in enumerate(cache.layers):
            layer.restore(parts[str(index)], len(tokens))
    except OtherPrecisionError:
        raise
    except ValueError:
        cache.rewind(0)
        layers = len(cache.layers)
        raise MlxeffError(
            f"{path}: wanted a KV cache of {layers} layers for its {len(tokens)} tokens, got others"
        ) from None
    cache.tally.update(computed)
    return tokens


def _computed(cache: KVCache) -> list[list]:
    """What computed the cached tokens, for a cache file: [backend, arithmetic, number of tokens] of each, and where it
    is not 1, the fraction of the neurons."""
    rows = [
        [ran.backend, ran.compute, count] + ([ran.fraction] if ran.fraction != 1 else [])
        for ran, count in cache.tally.items()
    ]
    given = cache.length - cache.tally.total()
    return rows + ([["", GIVEN, given]] if given > 0 else [])


def _check_heads(cache: KVCache, parts: dict[str, dict[str, mx.array]]) -> None:
    """Raises ValueError for dense arrays of other layers than those of this cache."""
    if _storage(cache) != LayerCache.storage or cache.shapes is None:
        return
    for index, shape in enumerate(cache.shapes):
        for array in parts[str(index)].values():
            if array.ndim != 4 or (array.shape[1], array.shape[3]) != (shape.groups, shape.head_size):
                raise ValueError(f"{shape.groups} heads of {shape.head_size}")


def _check_precision(
    cache: KVCache, path: str | os.PathLike, parts: dict, computed: Tally, options: RunOptions
) -> None:
    """Raises OtherPrecisionError where a file's arrays or what `computed` them is not what this cache stores or
    `options` compute."""
    wanted_type = (cache.layers[0].stored_as if cache.kind else cache.dtype) or None
    types = [str(array.dtype).removeprefix("mlx.core.") for part in parts.values() for array in part.values()]
    got_type = " + ".join(dict.fromkeys(types))
    if wanted_type is None or _storage(cache) != LayerCache.storage:
        wanted_type = got_type
    arithmetic = " + ".join(dict.fromkeys(ran.precision for ran in computed))
    if (got_type, arithmetic) != (wanted_type, options.precision):
        got = f"{arithmetic} {got_type}"
        raise OtherPrecisionError(f"{path}: wanted a KV cache of {options.precision} {wanted_type}, got {got}")


def _storage(cache: KVCache) -> str:
    """The names of the layers' storage formats, joined, for the metadata of a cache file."""
    return "+".join(dict.fromkeys(layer.storage for layer in cache.layers))


def _tally(metadata: dict[str, str], tokens: int) -> Tally:
    """What computed the `tokens` tokens of a cache file. A file that does not say it counts as exact. Raises
    ValueError for an entry that `save` did not write."""
    rows = json.loads(metadata.get("computed", f'[["unknown", "exact", {tokens}]]'))
    if not isinstance(rows, list) or not rows:
        raise ValueError("no rows")
    tally = Tally()
    for row in rows:
        if not isinstance(row, list) or [type(item) for item in row] not in ([str, str, int], [str, str, int, float]):
            raise ValueError(f"{row!r}")
        tally[Ran(row[0], row[1], *row[3:])] += row[2]
    return tally


def _read(path: Path, model: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a cache file of the model with fingerprint `model`: its arrays by name, and the entries of its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise MlxeffError(f"{path}: wanted a prompt cache, got a damaged or foreign file ({error})") from error
    if metadata.get("format") != "mlxeff-kv-cache" or metadata.get("version") != FORMAT_VERSION:
        raise MlxeffError(f"{path}: wanted a prompt cache of format version {FORMAT_VERSION}, got {metadata}")
    if metadata.get("model") != model:
        raise MlxeffError(f"{path}: wanted a prompt cache of this model ({model}), got one of {metadata.get('model')}")
    try:
        with readable_by_mlx(path) as name:
            return mx.load(name, format="safetensors"), metadata
    except (RuntimeError, ValueError) as error:
        raise MlxeffError(f"{path}: wanted a prompt cache, got a damaged or foreign file ({error})") from error
