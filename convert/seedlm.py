"""The conversion of a model to SeedLM: the choice of the modules to encode, and the encoding, layer by layer.

Every linear layer and embedding is encoded, but for the modules that `keep` names: by default the embedding and the
output head, which are quantised in affine groups with 8 bits. A kept module that the source stores quantised, with no
more bits than asked for, is not changed.

Encoding is data-free, or calibrated on a text. For calibration, windows of the text run through the layers one after
the other (`mlxeff.calibration`). The inputs of a layer, as the encoded layers before it compute them, give the Gram
matrices by which the encoder weights errors, as GPTQ does (Frantar et al., arXiv 2210.17323). Memory holds the hidden
states of the text between two layers, and the weights of one layer.

The search for the blocks is in `mlxeff.seedlm.encode`, and the finished layers are kept by `store`. Shapes: W windows,
T tokens of a window, D inputs of a linear layer.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..assembly import quantization
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
from .quantization import TIED
from .store import Store

KEEP = (("embed", 8), ("lm_head", 8))
KEEP_BITS = (*BITS, 16)  # 16: not quantised further than in the source


@dataclass(frozen=True)
class SeedOptions:
    """The options of the encoding.

    bits         the name of a block format in seedlm.format.FORMATS: bits a weight
    keep         (part of a module's name, bits) of the modules that are not encoded
    tokens       how many tokens of text calibrate the encoding; 0: data-free
    calibration  name and hash of the text; None: data-free

    Raises MlxeffError for unknown bits.
    """

    bits: str
    keep: tuple[tuple[str, int], ...] = KEEP
    tokens: int = 0
    calibration: str | None = None

    def __post_init__(self):
        block_format(self.bits)
        for name, bits in self.keep:
            if bits not in KEEP_BITS:
                raise MlxeffError(f"convert: keep: {name}: wanted bits of {KEEP_BITS}, got {bits}")

    @property
    def format(self) -> BlockFormat:
        """The block format."""
        return block_format(self.bits)

    def choose(self, model: nn.Module, weights: list[Weight], config: dict) -> "Choice":
        """Choose the matrices to encode. `model` is the dense model that `config` describes, `weights` are those of the
        source. Raises MlxeffError for a name in `keep` that no module has."""
        return _choose(model, weights, config, self)

    def as_dict(self) -> dict:
        """The options as the report shows them and config.json records them."""
        keep = ",".join(f"{name}:{bits}" for name, bits in self.keep) or "none"
        method = f"{self.calibration}, {self.tokens} tokens" if self.tokens else "data-free"
        return {"seedlm": self.bits, "keep": keep, "calibration": method}


@dataclass(frozen=True)
class Choice:
    """How each matrix is written, by the name of its module. Matrices that are in none of the three tables stay dense.

    seeded       the matrices to encode: block format, rows, columns
    kept         the matrices that are quantised instead: the arguments (scheme) for `mx.quantize`
    requantised  those in `kept` that the source stores otherwise: their scheme in the source, None where it is dense
    """

    seeded: dict[str, tuple[BlockFormat, int, int]]
    kept: dict[str, dict]
    requantised: dict[str, dict | None]

    @property
    def weights(self) -> int:
        """The number of weights to encode."""
        return sum(rows * cols for _, rows, cols in self.seeded.values())

    def config(self) -> dict:
        """The entries of config.json: `seedlm` describes the encoded modules; `quantization` has the commonest scheme
        of the kept modules, and an entry for each module with another scheme."""
        described = {"seedlm": install.entry(self.seeded)} if self.seeded else {}
        if self.kept:
            described["quantization"] = quantization.entry(self.kept)
        return described

    def report(self, errors: dict[str, float], encoder: str | None) -> dict:
        """The entries for the report: sizes, the kept modules, `encoder`, the name of the backend that ran the search,
        and `errors`, the relative error of each encoded module."""
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
    """The bytes of an encoded matrix."""
    arrays = fmt.arrays(rows, cols).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def _choose(model: nn.Module, weights: list[Weight], config: dict, options: SeedOptions) -> Choice:
    """See `SeedOptions.choose`."""
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
    if unknown := sorted({name for name, _ in options.keep if name not in TIED} - used - {name for name, _ in KEEP}):
        raise MlxeffError(f"convert: keep: {', '.join(unknown)}: wanted parts of names of linear layers, got others")
    return choice


def _scheme(weight: Weight, config: dict, bits: int) -> dict | None:
    """The scheme in which a matrix is kept with `bits` bits: that of the source where it has no more bits than these.
    None: dense."""
    stored = _stored_scheme(weight, config)
    if stored and stored["bits"] <= bits:
        return stored
    group = fitting_group(weight.shape[-1])
    if bits == 16 or group is None:
        return stored
    return {"group_size": group, "bits": bits, "mode": "affine"}


def _stored_scheme(weight: Weight, config: dict) -> dict | None:
    """The scheme in which the source stores a matrix; None where it is dense."""
    if not weight.packed:
        return None
    (_, _, words), (_, _, groups) = weight.packed[:2]
    columns, quantization = weight.shape[-1], config.get("quantization") or {}
    own = quantization.get(weight.module)
    mode = (own if isinstance(own, dict) else quantization).get("mode", "affine")
    return {"group_size": columns // groups[-1], "bits": words[-1] * 32 // columns, "mode": mode}


class Encoder:
    """Encodes a model layer by layer into a store. Layers that are in the store already are not encoded again.

    Of the model's weights, only the embedding and those of one layer are in memory. `origin` names the source in
    messages, `backend` what runs the search (as in `seedlm.encode.encode`).
    """

    def __init__(self, config: dict, weights: list[Weight], choice: Choice, store: Store, origin: str, backend: str):
        names = {name for weight in weights for name in ([s[0] for s in weight.packed] or [weight.name])}
        self.model = build_model(config, names)
        self.weights, self.choice, self.store, self.origin, self.backend = weights, choice, store, origin, backend
        self.paths = {id(module): name for name, module in self.model.named_modules()}
        self.prefixes = tuple(f"{self.paths[id(layer)]}." for layer in self.model.layers)

    def run(self, windows: np.ndarray | None, advance: Callable[[int], None]) -> None:
        """Encode the whole model.

        windows: token ids (W, T) for calibration; None: data-free. advance: called many times, with the number of
        weights that were encoded since the last call.
        """
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
        """The stream of the windows' hidden states before the first layer. Reads the weights of the embedding."""
        embedding = self.model.end_parts().embedding.module
        self._fill(lambda name: name.startswith(f"{self.paths[id(embedding)]}."))
        return LayerStream(self.model, windows)

    def _fill(self, chosen: Callable[[str], bool]) -> None:
        """Load the weights whose names `chosen` accepts into the model."""
        found = []
        for weight in self.weights:
            if chosen(weight.name):
                names = [spec[0] for spec in weight.packed] or [weight.name]
                found += zip(names, weight.read(), strict=True)
        self.model.update(tree_unflatten(found))

    def _layer(self, index: int, prefix: str, stream: LayerStream | None, advance: Callable) -> None:
        """Encode the chosen modules of a layer, unless the store has them."""
        layer, unit = self.model.layers[index], f"layer-{index:04d}"
        modules = {name: module for name, module in layer.named_modules() if prefix + name in self.choice.seeded}
        full = [prefix + name for name in modules]
        if self.store.has(unit, full):
            advance(self._count(full))
            return
        grams = {} if stream is None else _input_grams(stream, modules)
        self._encode(unit, {prefix + name: (module, grams.get(name)) for name, module in modules.items()}, advance)

    def _replace(self, index: int, prefix: str) -> None:
        """Replace the chosen modules of a layer by their encoded form, read from the store."""
        layer = self.model.layers[index]
        seeded = [
            (name, self._seeded(prefix + name, module))
            for name, module in layer.named_modules()
            if prefix + name in self.choice.seeded
        ]
        layer.update_modules(tree_unflatten(seeded))

    def _ends(self, names: list[str], stream: LayerStream | None, advance: Callable) -> None:
        """Encode the output head and the embedding, where they are chosen (`names`). Only a head with a matrix of its
        own is calibrated; an embedding is encoded data-free."""
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
        """The number of weights in the modules `names`."""
        return sum(rows * cols for _, rows, cols in (self.choice.seeded[name] for name in names))

    def _encode(self, unit: str, modules: dict[str, tuple[nn.Module, np.ndarray | None]], advance: Callable) -> None:
        """Encode modules and write them to the store as `unit`. `modules`: name → (the module, the Gram matrix of its
        inputs or None)."""
        arrays, errors = {}, {}
        # Matrices that read the same inputs follow each other: they share what is computed from the Gram matrix.
        inputs, source = None, (None, None)
        for name, (module, gram) in modules.items():
            fmt, weight, origin = self.choice.seeded[name][0], np.array(dense(module)), f"{self.origin}: {name}.weight"
            if source[0] is not fmt or source[1] is not gram:
                inputs, source = None if gram is None else Inputs.of(fmt, gram, origin=origin), (fmt, gram)
            found = encode(fmt, weight, inputs, advance=advance, origin=origin, backend=self.backend)
            arrays[name] = {kind: mx.array(array) for kind, array in found.arrays.items()}
            errors[name] = found.error
        self.store.write(unit, arrays, errors)

    def _seeded(self, name: str, module: nn.Module) -> SeedLinear:
        """The encoded form of `module`, with the arrays of the store and the module's own bias."""
        fmt, rows, cols = self.choice.seeded[name]
        seeded = SeedLinear(fmt, rows, cols, "bias" in module)
        seeded.update(dict(zip(fmt.arrays(rows, cols), self.store.read(name), strict=True)))
        if "bias" in module:
            seeded.bias = module.bias
        return seeded


def _input_grams(stream: LayerStream, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Module name → the Gram matrix XᵀX, (D, D) in float64, of the module's inputs X in all windows. Modules that read
    the same inputs share one array."""
    grams: dict[tuple[str, ...], np.ndarray] = {}

    def add(readers: tuple[str, ...], x: mx.array) -> None:
        gram = _gram(x)
        grams[readers] = grams[readers] + gram if readers in grams else gram

    stream.watch(names, add)
    return {name: gram for readers, gram in grams.items() for name in readers}


def _gram(x: mx.array) -> np.ndarray:
    """XᵀX of inputs (..., D) of one batch, summed in float32 and returned in float64. The result does not depend on the
    number of threads."""
    columns = mx.contiguous(x.reshape(-1, x.shape[-1]).astype(mx.float32).T)
    return np.array(linear(columns, columns), np.float64)
