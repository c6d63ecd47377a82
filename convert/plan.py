"""A family's weights and options -> what has to be written: the comparison with the model, and each tensor's cast and
packing.

The expected names and shapes are those of the model that the config builds. Quantisation is `mx.quantize`'s affine
mode, written as mlx-lm writes it. Knows no file format and no family.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from ..assembly.model import MODELS, build_model
from ..assembly.techniques import architecture
from ..checkpoint import FLOATS, Piece, cast
from ..checkpoint.tensor import NAMES
from ..errors import MlxeffError, notices, some

if TYPE_CHECKING:
    from .seedlm import Choice, SeedOptions

DTYPES = {name: NAMES[getattr(mx, name)] for name in ("float16", "bfloat16", "float32")}
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Weight:
    """A parameter of the model: its dense dtype and shape, the bytes it takes in the source, and how to read it.

    One that is already quantised has `packed`, the specs of its parts (weight, scales, biases) in the order of `read`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], list[mx.array]] = field(repr=False)
    packed: tuple[Spec, ...] = ()

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """What a family's module reads from a source: the config, the parameters under the model's names."""

    name: str
    config: dict
    weights: list[Weight]
    uniform: bool = False  # mixed float types become the commonest one


@dataclass(frozen=True)
class Options:
    """The float type, or None as stored; bits and group size of affine quantisation; or how to encode seeds."""

    dtype: str | None = None
    bits: int | None = None
    group_size: int | None = None
    seedlm: "SeedOptions | None" = None

    def as_dict(self) -> dict:
        quantize = f"{self.bits}:{self.group_size}" if self.bits else None
        seedlm = self.seedlm.as_dict() if self.seedlm else {}
        return {"dtype": self.dtype, "quantize": quantize} | seedlm


@dataclass
class Conversion:
    """The outcome of `plan`: pieces to write, the config that describes them, and the differences from the model."""

    family: str
    options: Options
    config: dict
    pieces: list[Piece]
    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[tuple[str, tuple, tuple]]
    dropped: dict[str, str]
    changes: list[tuple[str, tuple, str, str]]
    parameters: int
    peak_bytes: int
    weights: list[Weight]
    choice: "Choice | None"  # of `options.seedlm`

    @property
    def tensors(self) -> int:
        return sum(len(piece.specs) for piece in self.pieces)

    def refuse_differences(self, origin: str | Path) -> None:
        """Raises MlxeffError unless the checkpoint has what the model has."""
        if self.missing:
            raise MlxeffError(f"{origin}: missing {len(self.missing)} tensors: {some(self.missing)}")
        if self.unexpected:
            raise MlxeffError(f"{origin}: {len(self.unexpected)} unknown tensors: {some(self.unexpected)}")
        for name, own, got in self.wrong_shape:
            raise MlxeffError(f"{origin}: tensor {name}: wanted shape {own}, got {got}")


def plan(family: Family, options: Options, encoded: Callable[[str], list[mx.array]] | None = None) -> Conversion:
    """Compare with the model and lay out the pieces; reads no weights. Raises MlxeffError.

    `encoded` gives the arrays of a seed-encoded module when its piece is written.
    """
    config = dict(family.config)
    if options.seedlm and "seedlm" in config:
        raise MlxeffError(
            "convert: seedlm: wanted dense or affine weights, got a checkpoint that is seed-encoded already"
        )
    if options.bits and ({"quantization", "seedlm"} & set(config) or any(weight.packed for weight in family.weights)):
        raise MlxeffError(
            "convert: quantize: wanted weights of full precision, got a checkpoint that is quantised already"
        )
    unused = MODELS[config["model_type"]].unused if config.get("model_type") in MODELS else None
    model = build_model({key: value for key, value in config.items() if not key.startswith("quantization")})
    expected = {name: value.shape for name, value in tree_flatten(model.parameters())}
    quantisable = (
        {name for name, module in model.named_modules() if hasattr(module, "to_quantized")} if options.bits else set()
    )
    described = architecture(config)
    dropped = {weight.name: "not used by the model" for weight in family.weights if unused(weight.name, described)}
    weights = [weight for weight in family.weights if weight.name not in dropped]
    default = DTYPES[options.dtype] if options.dtype else _commonest(weights) if family.uniform else None
    _say_rounding(weights, default)
    found = {weight.name: weight.shape for weight in weights}
    choice = options.seedlm.choose(model, weights, config) if options.seedlm else None
    jobs = [
        _chosen_job(weight, default, choice, encoded)
        if choice
        else _job(weight, default, options if weight.module in quantisable else Options())
        for weight in weights
    ]
    return Conversion(
        family=family.name,
        options=options,
        config=_config(config, weights, default, options, choice),
        pieces=[job.piece for job in jobs],
        missing=sorted(expected.keys() - found.keys()),
        unexpected=sorted(found.keys() - expected.keys()),
        wrong_shape=[(n, s, found[n]) for n, s in sorted(expected.items()) if n in found and found[n] != s],
        dropped=dropped,
        changes=[change for job in jobs for change in job.changes],
        parameters=sum(math.prod(weight.shape) for weight in weights),
        peak_bytes=max((job.peak_bytes for job in jobs), default=0),
        weights=weights,
        choice=choice,
    )


def _commonest(weights: list[Weight]) -> str | None:
    sizes = Counter()
    for weight in weights:
        sizes[weight.dtype] += weight.nbytes
    floats = [dtype for dtype, _ in sizes.most_common() if dtype in FLOATS]
    return floats[0] if floats else None


def _say_rounding(weights: list[Weight], default: str | None) -> None:
    """Scales of packed weights are part of their values: a narrower type than the source's changes them."""
    exact = {("F16", "F32"), ("BF16", "F32")}
    rounded = {w.module for w in weights for _, old, _ in w.packed if old in FLOATS and default not in (None, old)}
    rounded -= {w.module for w in weights if (w.dtype, default) in exact}
    if rounded:
        notices.warning(f"convert: scales of {len(rounded)} quantised modules are rounded to {default}")


def _config(
    config: dict, weights: list[Weight], default: str | None, options: Options, choice: "Choice | None"
) -> dict:
    names = {value: key for key, value in DTYPES.items()}
    if (dtype := default or _commonest(weights)) in names:
        config.pop("dtype", None)
        config["torch_dtype"] = names[dtype]
    if options.bits:
        config["quantization"] = {"group_size": options.group_size, "bits": options.bits, "mode": "affine"}
    if choice:
        config.pop("quantization", None)
        config |= choice.config()
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]  # as mlx-lm writes it
    return config


@dataclass(frozen=True)
class _Job:
    piece: Piece
    changes: list[tuple[str, tuple, str, str]]
    peak_bytes: int


def _job(weight: Weight, default: str | None, options: Options) -> _Job:
    """How one weight is written: packed parts pass through, dense ones are cast and perhaps quantised."""
    if weight.packed:
        before, work = weight.packed, 0
        specs = tuple((name, _target(dtype, default), shape) for name, dtype, shape in before)
        piece = Piece(specs, lambda: [cast(array, spec) for array, spec in zip(weight.read(), specs, strict=True)])
    else:
        dense = (weight.name, _target(weight.dtype, default), weight.shape)
        before, piece = (
            ((weight.name, weight.dtype, weight.shape),),
            Piece((dense,), lambda: [cast(weight.read()[0], dense)]),
        )
        work = piece.nbytes
        if options.bits and len(weight.shape) == 2 and weight.shape[-1] % options.group_size == 0:
            piece = _quantised(weight, dense, options)
    changes = [
        (old[0], old[2], old[1], new[1]) for old, new in zip(before, piece.specs, strict=False) if old[1] != new[1]
    ]
    return _Job(piece, changes, weight.nbytes + work + piece.nbytes)


def _chosen_job(
    weight: Weight, default: str | None, choice: "Choice", encoded: Callable[[str], list[mx.array]]
) -> _Job:
    """How one weight of a seed-encoded model is written: as blocks, or in the scheme of what is kept."""
    if weight.name == f"{weight.module}.weight" and weight.module in choice.seeded:
        fmt, rows, cols = choice.seeded[weight.module]
        arrays = fmt.arrays(rows, cols).items()
        specs = tuple((f"{weight.module}.{kind}", NAMES[getattr(mx, dtype)], shape) for kind, (shape, dtype) in arrays)
        work = 16 * rows * cols + 24 * cols * cols  # float32 copies of the weights, float64 ones of the Gram matrix
        piece = Piece(specs, lambda: encoded(weight.module))
        return _Job(piece, [(weight.name, weight.shape, weight.dtype, f"SeedLM {fmt.name}")], weight.nbytes + work)
    if weight.name == f"{weight.module}.weight" and weight.module in choice.requantised:
        scheme = choice.kept[weight.module]
        plain = _dequantised(weight, choice.requantised[weight.module]) if weight.packed else weight
        return _job(plain, default, Options(bits=scheme["bits"], group_size=scheme["group_size"]))
    return _job(weight, default, Options())


def _dequantised(weight: Weight, scheme: dict) -> Weight:
    """A packed weight as a dense one of the type of its scales."""
    read = lambda: [mx.dequantize(*weight.read(), **scheme).astype(FLOATS[weight.dtype])]  # noqa: E731
    return Weight(weight.name, weight.dtype, weight.shape, weight.nbytes, read)


def _target(dtype: str, default: str | None) -> str:
    return default if default and dtype in FLOATS else dtype


def _quantised(weight: Weight, dense: Spec, options: Options) -> Piece:
    rows, columns = weight.shape
    grouped = (rows, columns // options.group_size)
    specs = (
        (weight.name, "U32", (rows, columns * options.bits // 32)),
        (f"{weight.module}.scales", dense[1], grouped),
        (f"{weight.module}.biases", dense[1], grouped),
    )
    return Piece(specs, lambda: list(mx.quantize(cast(weight.read()[0], dense), options.group_size, options.bits)))
