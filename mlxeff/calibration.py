"""Calibration: windows of tokens of a text, and their way through a model, one layer after the other.

A method that changes a model layer by layer needs to see what a layer reads when the layers before it are changed
already. `LayerStream` keeps the hidden states of all windows between two layers, shows what the matrices of the next
layer read, and goes on with the outputs of that layer as it then is. Knows neither the method nor where weights come
from. Shapes: W windows, T tokens of a window, B windows of a batch, D width of the model.
"""

import hashlib
import importlib.resources
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .errors import MlxeffError, notices
from .tokenizer import Tokenizer

TOKENS = 32768  # of the text that are read by default
WINDOW = 256  # tokens that attend to each other
BATCH_TOKENS = 2048  # that run through a layer at a time
TEXT = importlib.resources.files(__package__).joinpath("texts", "calibration.txt")  # the default text


def read_text(path: str | Path | None) -> tuple[str, str]:
    """(text, its name and hash) of a UTF-8 file, or of the default text. Raises MlxeffError."""
    place = TEXT if path is None else Path(path)
    try:
        raw = place.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise MlxeffError(f"{place}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MlxeffError(f"{place}: wanted UTF-8 text, got {error.reason} at byte {error.start}") from error
    name = "the package's text" if path is None else place.name
    return text, f"{name} (sha256 {hashlib.sha256(raw).hexdigest()[:12]})"


def windows(text: str, tokenizer: Tokenizer, tokens: int, origin: str, rows: int = 1 << 31) -> np.ndarray:
    """Token ids (W, T): W · T ≤ `tokens`, in windows that are spread evenly over the text.

    `origin` begins the messages. Raises MlxeffError for a text that is shorter than one window, and for one with a
    token that has no row among the `rows` of the model's embedding table.
    """
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    if len(ids) and ids.max() >= rows:  # MLX would read memory outside of the table
        raise MlxeffError(f"{origin}: calibration text: wanted token ids below {rows}, got {ids.max()}")
    length = min(WINDOW, tokens)
    count, most = max(1, tokens // length), len(ids) // length
    if most == 0:
        raise MlxeffError(f"{origin}: calibration text: wanted at least {length} tokens, got {len(ids)}")
    if count > most:
        notices.warning(f"{origin}: calibration on {most * length} tokens and not {tokens}: the text has no more")
    starts = np.linspace(0, len(ids) - length, min(count, most)).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


class LayerStream:
    """Windows on their way through the layers of a model: `hidden` holds what the layer of number `index` reads.

        stream = LayerStream(model, windows)
        for layer in model.layers:
            stream.watch(names, see)     # what modules of the layer read, as often as it is wanted
            layer.update_modules(…)      # the layer may be changed
            stream.next_layer()          # its outputs, as it now is, are what the next layer reads

    In memory are the hidden states of all windows, a list of (B, T, D), and what one batch of BATCH_TOKENS makes within
    a layer. A layer's weights are needed from when it is watched until `next_layer` has returned, and may be read and
    given up around that by the caller; those of the embedding are needed at the beginning only.
    """

    def __init__(self, model, windows: np.ndarray):
        """`model`: a decoder of `mlxeff.models`; `windows`: token ids (W, T)."""
        step = max(1, BATCH_TOKENS // windows.shape[1])
        batches = [mx.array(windows[start : start + step]) for start in range(0, len(windows), step)]
        self.model, self.index = model, 0
        self.hidden = [model.embed(batch) for batch in batches]
        mx.eval(self.hidden)

    @property
    def layer(self) -> nn.Module:
        """The layer that reads `hidden`."""
        return self.model.layers[self.index]

    def watch(self, names: Iterable[str], see: Callable[[tuple[str, ...], mx.array], None]) -> None:
        """Run all windows through the layer, and show `see` what the modules of these names read.

        For each batch, and for each array that is read there: `see(readers, x)`, with the names of all modules that
        read this one array, in the order in which they are called, and x (B, T, columns), evaluated. Names are as of
        `layer.named_modules()`; the modules are called with one argument.
        """
        for _ in self._watched(names, see):
            pass

    def next_layer(
        self, names: Iterable[str] = (), see: Callable[[tuple[str, ...], mx.array], None] = lambda *_: None
    ) -> None:
        """Run all windows through the layer as it now is; its outputs are what the next layer reads. `names` and `see`
        as in `watch`, for a caller that does not change the layer in between."""
        for place, output in enumerate(self._watched(names, see)):
            self.hidden[place] = output
        self.index += 1

    def _watched(self, names: Iterable[str], see: Callable[[tuple[str, ...], mx.array], None]) -> Iterator[mx.array]:
        """Yield the layer's output for each batch, evaluated, after `see` was called as `watch` says."""
        found = dict(self.layer.named_modules())
        modules = {name: found[name] for name in names}
        seen: list[tuple[str, mx.array]] = []
        watched = [(name, _Watched(module, name, seen)) for name, module in modules.items()]
        layer = self.layer
        if watched:
            layer.update_modules(tree_unflatten(watched))
        try:
            for batch in list(self.hidden):
                output = self._run(batch)
                mx.eval(output)
                _show(seen, see)
                seen.clear()
                yield output
        finally:
            if watched:
                layer.update_modules(tree_unflatten(list(modules.items())))

    def _run(self, batch: mx.array) -> mx.array:
        """Hidden states (B, T, D) of whole windows → the layer's outputs."""
        return self.layer(batch, self.model.layer_cache(self.index))


class _Watched(nn.Module):
    """A module that notes (its name, what it reads) in a list when it is called."""

    def __init__(self, inner: nn.Module, name: str, seen: list[tuple[str, mx.array]]):
        super().__init__()
        self.inner, self._note = inner, lambda x: seen.append((name, x))

    def __call__(self, x: mx.array) -> mx.array:
        self._note(x)
        return self.inner(x)


def _show(seen: list[tuple[str, mx.array]], see: Callable[[tuple[str, ...], mx.array], None]) -> None:
    """Call `see` once for each array of those noted."""
    readers: dict[int, tuple[list[str], mx.array]] = {}
    for name, x in seen:
        readers.setdefault(id(x), ([], x))[0].append(name)
    for names, x in readers.values():
        see(tuple(names), x)
