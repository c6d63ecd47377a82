"""Which modules of a model become seed-encoded and which stay, and the search, layer by layer.

Every linear layer is encoded but those named by `keep`: by default the embedding and the head, in 8-bit affine groups.
A kept module that is quantised already, with no more bits, stays as it is. With calibration, windows of a text run
through the layers one after the other (`mlxeff.calibration`): the inputs of a layer, computed by the encoded layers
before it, give the Gram matrices that its encoder weighs errors by (as GPTQ does, arXiv 2210.17323). In memory are the
text's hidden states between two layers, and the weights of one layer.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..assembly.model import build_model
from ..calibration import LayerStream
from ..errors import MlxeffError
from ..modules import dense
from ..ops import BITS, fitting_group, linear
from ..seedlm import install
from ..seedlm.encode import Inputs, encode
from ..seedlm.format import BlockFormat, block_format
from ..seedlm.linear import SeedLinear
from .plan import Weight
from .store import Store

KEEP = (("embed", 8), ("lm_head", 8))
KEEP_BITS = (*BITS, 16)  # 16: as stored


@dataclass(frozen=True)
class SeedOptions:
    """How to encode.

    bits: a name of seedlm.format.FORMATS. keep: (part of a module's name, bits) of modules that are not encoded.
    tokens: how many tokens of text to calibrate on, 0 for the data-free method.
    """

    bits: str
    keep: tuple[tuple[str, int], ...] = KEEP
    tokens: int = 0
    calibration: str | None = None  # name and hash of the calibration text

    def __post_init__(self):
        block_format(self.bits)
        for name, bits in self.keep:
            if bits not in KEEP_BITS:
                raise MlxeffError(f"convert: keep: {name}: wanted bits of {KEEP_BITS}, got {bits}")

    @property
    def format(self) -> BlockFormat:
        return block_format(self.bits)

    def choose(self, model: nn.Module, weights: list[Weight], config: dict) -> "Choice":
        """What becomes of the matrices of `model`, the dense one that the config describes."""
        return _choose(model, weights, config, self)

    def as_dict(self) -> dict:
        keep = ",".join(f"{name}:{bits}" for name, bits in self.keep) or "none"
        method = f"{self.calibration}, {self.tokens} tokens" if self.tokens else "data-free"
        return {"seedlm": self.bits, "keep": keep, "calibration": method}


@dataclass(frozen=True)
class Choice:
    """What becomes of each matrix, by the name of its module. A matrix that is named nowhere here stays dense.

    seeded: format, rows and columns of the matrices to encode. kept: the schemes of `mx.quantize` of those that are
    not encoded but quantised. requantised: of `kept`, those which the source holds in another form, with the scheme
    that they have there, None for dense ones.
    """

    seeded: dict[str, tuple[BlockFormat, int, int]]
    kept: dict[str, dict]
    requantised: dict[str, dict | None]

    @property
    def weights(self) -> int:
        """How many weights are to be encoded."""
        return sum(rows * cols for _, rows, cols in self.seeded.values())

    def config(self) -> dict:
        """What config.json says: the encoded modules, the commonest scheme of the kept ones, and an entry for each
        module that has another scheme."""
        described = {"seedlm": install.entry(self.seeded)} if self.seeded else {}
        if schemes := list(self.kept.values()):
            default = max(schemes, key=schemes.count)
            others = {module: scheme for module, scheme in self.kept.items() if scheme != default}
            described["quantization"] = default | others
        return described

    def report(self, errors: dict[str, float], encoder: str | None) -> dict:
        """Sizes, the kept modules, what computed the search (`encoder`), and the encoded modules' relative errors."""
        count = self.weights
        nbytes = sum(_nbytes(*each) for each in self.seeded.values())
        return {
            "modules": len(self.seeded),
            "weights": count,
            "bits_per_weight": 8 * nbytes / count if count else 0.0,
            "kept": {name: f"{s['bits']} bits, groups of {s['group_size']}" for name, s in self.kept.items()},
            "encoder": encoder,
            "errors": errors,
        }


def _nbytes(fmt: BlockFormat, rows: int, cols: int) -> int:
    arrays = fmt.arrays(rows, cols).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def _choose(model: nn.Module, weights: list[Weight], config: dict, options: SeedOptions) -> Choice:
    """Raises MlxeffError for a `keep` that names nothing."""
    matrices = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    choice, used = Choice({}, {}, {}), set()
    for weight in weights:
        if weight.module not in matrices or not weight.name.endswith(".weight"):
            continue
        names = [(name, bits) for name, bits in options.keep if name in weight.module]
        used |= {name for name, _ in names}
        if not names:
            choice.seeded[weight.module] = (options.format, *weight.shape)
        elif scheme := _scheme(weight, config, names[0][1]):
            choice.kept[weight.module] = scheme
            if scheme != (stored := _stored_scheme(weight, config)):
                choice.requantised[weight.module] = stored
    if unknown := sorted({name for name, _ in options.keep} - used - {name for name, _ in KEEP}):
        raise MlxeffError(f"convert: keep: {', '.join(unknown)}: wanted parts of names of linear layers, got others")
    return choice


def _scheme(weight: Weight, config: dict, bits: int) -> dict | None:
    """How a matrix that is kept in `bits` bits is stored: in the source's own scheme where that has no more bits. None:
    dense."""
    stored = _stored_scheme(weight, config)
    if stored and stored["bits"] <= bits:
        return stored
    group = fitting_group(weight.shape[-1])
    if bits == 16 or group is None:
        return stored
    return {"group_size": group, "bits": bits, "mode": "affine"}


def _stored_scheme(weight: Weight, config: dict) -> dict | None:
    if not weight.packed:
        return None
    (_, _, words), (_, _, groups) = weight.packed[:2]
    columns, quantization = weight.shape[-1], config.get("quantization") or {}
    own = quantization.get(weight.module)
    mode = (own if isinstance(own, dict) else quantization).get("mode", "affine")
    return {"group_size": columns // groups[-1], "bits": words[-1] * 32 // columns, "mode": mode}


class Encoder:
    """Encodes a model layer by layer: fills a store with the blocks of every layer that is not in it yet.

    Of the model's weights only those of one layer are in memory, besides the embedding. `origin` begins the messages;
    `backend` names what computes the search.
    """

    def __init__(self, config: dict, weights: list[Weight], choice: Choice, store: Store, origin: str, backend: str):
        names = {name for weight in weights for name in ([s[0] for s in weight.packed] or [weight.name])}
        self.model = build_model(config, names)
        self.weights, self.choice, self.store, self.origin, self.backend = weights, choice, store, origin, backend
        self.paths = {id(module): name for name, module in self.model.named_modules()}
        self.prefixes = tuple(f"{self.paths[id(layer)]}." for layer in self.model.layers)

    def run(self, windows: np.ndarray | None, advance: Callable[[int], None]) -> None:
        """Encode every layer. `windows`: token ids (W, T) to calibrate on, None for the data-free method. `advance` is
        called again and again with the number of weights that were encoded since the last call."""
        stream = None if windows is None else self._stream(windows)
        ends = [name for name in self.choice.seeded if not name.startswith(self.prefixes)]
        for index, prefix in enumerate(self.prefixes):
            self._fill(lambda name, prefix=prefix: name.startswith(prefix))
            self._layer(index, prefix, stream, advance)
            if stream is not None and (ends or index + 1 < len(self.prefixes)):
                self._replace(index, prefix)
                stream.next_layer()
            self.model.layers[index] = nn.Module()
        self._ends(ends, stream, advance)

    def _stream(self, windows: np.ndarray) -> LayerStream:
        """The windows before the first layer; of the weights the embedding alone is read."""
        embedding = self.model.end_parts().embedding.module
        self._fill(lambda name: name.startswith(f"{self.paths[id(embedding)]}."))
        return LayerStream(self.model, windows)

    def _fill(self, chosen: Callable[[str], bool]) -> None:
        """Read the weights whose names are chosen."""
        found = []
        for weight in self.weights:
            if chosen(weight.name):
                names = [spec[0] for spec in weight.packed] or [weight.name]
                found += zip(names, weight.read(), strict=True)
        self.model.update(tree_unflatten(found))

    def _layer(self, index: int, prefix: str, stream: LayerStream | None, advance: Callable) -> None:
        """Encode what is to be encoded of a layer, unless the store has it."""
        layer, unit = self.model.layers[index], f"layer-{index:04d}"
        modules = {name: module for name, module in layer.named_modules() if prefix + name in self.choice.seeded}
        full = [prefix + name for name in modules]
        if self.store.has(unit, full):
            advance(self._count(full))
            return
        grams = {} if stream is None else _input_grams(stream, modules)
        self._encode(unit, {prefix + name: (module, grams.get(name)) for name, module in modules.items()}, advance)

    def _replace(self, index: int, prefix: str) -> None:
        """Put the encoded modules of a layer in place of those that were encoded."""
        layer = self.model.layers[index]
        seeded = [
            (name, self._seeded(prefix + name, module))
            for name, module in layer.named_modules()
            if prefix + name in self.choice.seeded
        ]
        layer.update_modules(tree_unflatten(seeded))

    def _ends(self, names: list[str], stream: LayerStream | None, advance: Callable) -> None:
        """Encode the head or the embedding, where it is to be encoded; only a head that is not the embedding has inputs
        to calibrate on."""
        if not names:
            return
        if self.store.has("ends", names):
            advance(self._count(names))
            return
        ends = self.model.end_parts()
        self._fill(lambda name: not name.startswith(self.prefixes))
        found, grams = dict(self.model.named_modules()), {}
        if stream is not None:
            for name in names:
                if isinstance(found[name], (nn.Linear, nn.QuantizedLinear)):
                    grams[name] = sum(_gram(ends.norm(batch)) for batch in stream.hidden)
        self._encode("ends", {name: (found[name], grams.get(name)) for name in names}, advance)

    def _count(self, names: Iterable[str]) -> int:
        return sum(rows * cols for _, rows, cols in (self.choice.seeded[name] for name in names))

    def _encode(self, unit: str, modules: dict[str, tuple[nn.Module, np.ndarray | None]], advance: Callable) -> None:
        arrays, errors = {}, {}
        inputs, source = None, (None, None)  # of the latest matrix: those that read the same inputs follow each other
        for name, (module, gram) in modules.items():
            fmt, weight, origin = self.choice.seeded[name][0], np.array(dense(module)), f"{self.origin}: {name}.weight"
            if source[0] is not fmt or source[1] is not gram:
                inputs, source = None if gram is None else Inputs.of(fmt, gram, origin=origin), (fmt, gram)
            found = encode(fmt, weight, inputs, advance=advance, origin=origin, backend=self.backend)
            arrays[name] = {kind: mx.array(array) for kind, array in found.arrays.items()}
            errors[name] = found.error
        self.store.write(unit, arrays, errors)

    def _seeded(self, name: str, module: nn.Module) -> SeedLinear:
        fmt, rows, cols = self.choice.seeded[name]
        seeded = SeedLinear(fmt, rows, cols, "bias" in module)
        seeded.update(dict(zip(fmt.arrays(rows, cols), self.store.read(name), strict=True)))
        if "bias" in module:
            seeded.bias = module.bias
        return seeded


def _input_grams(stream: LayerStream, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Module name → XᵀX of what it reads of all windows, float64 (D, D); those that read the same x share an array."""
    grams: dict[tuple[str, ...], np.ndarray] = {}

    def add(readers: tuple[str, ...], x: mx.array) -> None:
        gram = _gram(x)
        grams[readers] = grams[readers] + gram if readers in grams else gram

    stream.watch(names, add)
    return {name: gram for readers, gram in grams.items() for name in readers}


def _gram(x: mx.array) -> np.ndarray:
    """XᵀX of inputs (..., D), summed in float32 over a batch: the same bits for any number of threads."""
    columns = mx.contiguous(x.reshape(-1, x.shape[-1]).astype(mx.float32).T)
    return np.array(linear(columns, columns), np.float64)
