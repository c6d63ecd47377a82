"""The plan of a conversion: what has to be written for the weights of a source and the user's options.

`plan` compares the weights with the model that the config describes, and decides how each weight is cast, quantised or
encoded. Quantisation is the affine mode of `mx.quantize`, stored as mlx-lm stores it. This module reads no weights
before they are written, and knows neither file formats nor source families.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..assembly.model import MODELS, build_model
from ..assembly.techniques import architecture
from ..checkpoint import FLOATS, Piece, cast
from ..checkpoint.tensor import NAMES
from ..errors import MlxeffError, notices, some
from . import quantization

if TYPE_CHECKING:
    from .seedlm import Choice, SeedOptions

# The float types of the option --dtype → their names in safetensors, such as "F16". All dtypes below are such names.
DTYPES = {name: NAMES[getattr(mx, name)] for name in ("float16", "bfloat16", "float32")}
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Weight:
    """A parameter of the model, as a source stores it.

    dtype, shape  of the dense array; for a quantised one `dtype` is that of its scales
    nbytes        bytes in the source
    read          returns the stored arrays: one for a dense weight, the parts of a quantised or encoded one otherwise
    packed        for a quantised or encoded weight the specs of its parts (weight, scales, biases) in the order of
                  `read`; otherwise empty
    dense         returns the dense matrix of a quantised or encoded weight; None for a dense weight
    form          how the source stores a weight of reduced precision, such as "affine 4 bits" or "Q4_0"; otherwise ""
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], list[mx.array]] = field(repr=False)
    packed: tuple[Spec, ...] = ()
    dense: Callable[[], mx.array] | None = field(default=None, repr=False)
    form: str = ""

    @property
    def module(self) -> str:
        """The name of the module that has this parameter."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """What the module of a source family reads from a source: the config, and the weights under the model's names."""

    name: str
    config: dict
    weights: list[Weight]
    uniform: bool = False  # whether all weights are written in the float type of most bytes, if the user names none


@dataclass(frozen=True)
class Options:
    """The user's options.

    dtype             a key of DTYPES; None: as stored
    bits, group_size  of affine quantisation; None: not quantised
    seedlm            the options of the SeedLM encoding; None: not encoded
    recipe            a key of `quantization.RECIPES`, which gives some matrices more bits than `bits`
    keep              (part of a module's name, bits) of matrices with other bits than `bits`; 16: dense
    dequantize        whether quantised matrices become dense
    ignored           entries of the source's config.json that are read as absent
    export_dense      whether a DynaMoE becomes dense
    """

    dtype: str | None = None
    bits: int | None = None
    group_size: int | None = None
    seedlm: "SeedOptions | None" = None
    recipe: str | None = None
    keep: tuple[tuple[str, int], ...] = ()
    dequantize: bool = False
    ignored: tuple[str, ...] = ()
    export_dense: bool = False

    def as_dict(self) -> dict:
        """The options as the report shows them and config.json records them."""
        quantize = f"{self.recipe or self.bits}:{self.group_size}" if self.bits else None
        result = {"dtype": self.dtype, "quantize": quantize} | (self.seedlm.as_dict() if self.seedlm else {})
        if self.keep:
            result["keep"] = ",".join(f"{name}:{bits}" for name, bits in self.keep)
        if self.ignored:
            result["ignore_keys"] = ",".join(self.ignored)
        flags = ("dequantize", "export_dense")
        return result | {name: True for name in flags if getattr(self, name)}


@dataclass
class Conversion:
    """The result of `plan`: the pieces to write, the config that describes them, and the differences from the model.

    missing, unexpected  names of tensors that only the model has, and that only the source has
    wrong_shape          (name, shape in the model, shape in the source)
    dropped              name of a tensor that is not written → reason
    changes              (name, shape, dtype or form in the source, dtype or form written)
    parameters           number of weights; peak_bytes: memory for the weight that needs the most
    """

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
    choice: "Choice | None"  # which modules SeedLM encodes; None without `options.seedlm`

    @property
    def tensors(self) -> int:
        """The number of tensors to write."""
        return sum(len(piece.specs) for piece in self.pieces)

    def refuse_differences(self, origin: str | Path) -> None:
        """Raises MlxeffError unless the source has exactly the tensors of the model, in their shapes. `origin` names
        the source in the message."""
        if self.missing:
            raise MlxeffError(f"{origin}: missing {len(self.missing)} tensors: {some(self.missing)}")
        if self.unexpected:
            raise MlxeffError(f"{origin}: {len(self.unexpected)} unknown tensors: {some(self.unexpected)}")
        for name, own, got in self.wrong_shape:
            raise MlxeffError(f"{origin}: tensor {name}: wanted shape {own}, got {got}")


def plan(family: Family, options: Options, encoded: Callable[[str], list[mx.array]] | None = None) -> Conversion:
    """Compare the weights of `family` with the model, and plan the pieces to write. Reads no weights.

    encoded: called with the name of a module that SeedLM encodes, when its piece is written; returns its arrays. Raises
    MlxeffError for options that do not fit the source; differences from the model are only listed in the result.
    """
    config = dict(family.config)
    if options.seedlm and "seedlm" in config:
        raise MlxeffError(
            "convert: seedlm: wanted dense or affine weights, got a checkpoint that is seed-encoded already"
        )
    source_weights = family.weights
    if options.bits or options.dequantize:
        source_weights = _all_dense(source_weights, options)
        config = {key: value for key, value in config.items() if key not in ("quantization", "seedlm")}
    unused = MODELS[config["model_type"]].unused if config.get("model_type") in MODELS else None
    plain = {key: value for key, value in config.items() if not key.startswith("quantization") and key != "seedlm"}
    model = build_model(plain)
    expected = {name: value.shape for name, value in tree_flatten(model.parameters())}
    described = architecture(config)
    dropped = {weight.name: "not used by the model" for weight in source_weights if unused(weight.name, described)}
    weights = [weight for weight in source_weights if weight.name not in dropped]
    schemes = quantization.schemes(model, weights, options) if options.bits else {}
    default = DTYPES[options.dtype] if options.dtype else _commonest(weights) if family.uniform else None
    _say_rounding(weights, default)
    found = {weight.name: weight.shape for weight in weights}
    choice = options.seedlm.choose(model, weights, config) if options.seedlm else None
    jobs = [
        _chosen_job(weight, default, choice, encoded) if choice else _job(weight, default, schemes.get(weight.module))
        for weight in weights
    ]
    return Conversion(
        family=family.name,
        options=options,
        config=_config(config, weights, default, quantization.entry(schemes, options), choice),
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
    """The float type in which the source stores the most bytes; None where it stores no floats."""
    sizes = Counter()
    for weight in weights:
        sizes[weight.dtype] += weight.nbytes
    floats = [dtype for dtype, _ in sizes.most_common() if dtype in FLOATS]
    return floats[0] if floats else None


def _say_rounding(weights: list[Weight], default: str | None) -> None:
    """Warn where the scales of quantised weights are cast to the float type `default` with a loss of precision, since
    this changes the weights."""
    exact = {("F16", "F32"), ("BF16", "F32")}
    rounded = {w.module for w in weights for _, old, _ in w.packed if old in FLOATS and default not in (None, old)}
    rounded -= {w.module for w in weights if (w.dtype, default) in exact}
    if rounded:
        notices.warning(f"convert: scales of {len(rounded)} quantised modules are rounded to {default}")


def _config(
    config: dict, weights: list[Weight], default: str | None, quantized: dict | None, choice: "Choice | None"
) -> dict:
    """The config.json to write: `config` with the float type, and the entries on quantisation and SeedLM."""
    names = {value: key for key, value in DTYPES.items()}
    if (dtype := default or _commonest(weights)) in names:
        config.pop("dtype", None)
        config["torch_dtype"] = names[dtype]
    if quantized:
        config["quantization"] = quantized
    if choice:
        config.pop("quantization", None)
        config |= choice.config()
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]  # as mlx-lm writes it
    return config


@dataclass(frozen=True)
class _Job:
    """How one weight is written: its piece, its entries in `Conversion.changes`, and the memory for it in bytes."""

    piece: Piece
    changes: list[tuple[str, tuple, str, str]]
    peak_bytes: int


def _job(weight: Weight, default: str | None, scheme: dict | None) -> _Job:
    """How one weight is written: the parts of a quantised weight keep their form, a dense weight is cast, and a matrix
    with a `scheme` (bits and group_size) is quantised. Floats become the type `default`; None: as stored."""
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
        if scheme and weight.name == f"{weight.module}.weight":
            piece = _quantised(weight, dense, scheme["bits"], scheme["group_size"])
    changes = [
        (old[0], old[2], old[1], new[1]) for old, new in zip(before, piece.specs, strict=False) if old[1] != new[1]
    ]
    return _Job(piece, changes, weight.nbytes + work + piece.nbytes)


def _chosen_job(
    weight: Weight, default: str | None, choice: "Choice", encoded: Callable[[str], list[mx.array]]
) -> _Job:
    """How one weight of a model is written that SeedLM encodes: as SeedLM blocks, or for a kept module, as `choice`
    says, quantised or as stored."""
    if weight.name == f"{weight.module}.weight" and weight.module in choice.seeded:
        fmt, rows, cols = choice.seeded[weight.module]
        arrays = fmt.arrays(rows, cols).items()
        specs = tuple((f"{weight.module}.{kind}", NAMES[getattr(mx, dtype)], shape) for kind, (shape, dtype) in arrays)
        work = 16 * rows * cols + 24 * cols * cols  # float32 copies of the weights, float64 ones of the Gram matrix
        piece = Piece(specs, lambda: encoded(weight.module))
        return _Job(piece, [(weight.name, weight.shape, weight.dtype, f"SeedLM {fmt.name}")], weight.nbytes + work)
    if weight.name == f"{weight.module}.weight" and weight.module in choice.requantised:
        scheme = choice.kept[weight.module]
        plain = _dequantised(weight, default or "F16") if weight.packed else weight
        return _job(plain, default, scheme)
    return _job(weight, default, None)


def _all_dense(weights: list[Weight], options: Options) -> list[Weight]:
    """The weights, with dense ones in place of quantised ones. Warns where quantised weights are quantised again.
    Raises MlxeffError where there is nothing to dequantise."""
    forms = Counter(weight.form for weight in weights if weight.form)
    if not forms and options.dequantize:
        raise MlxeffError("convert: dequantize: wanted a checkpoint that is quantised, got dense weights")
    if forms and options.bits:
        listed = some(f"{count} of {form}" for form, count in forms.most_common())
        text = "convert: quantize: %d matrices are rounded already (%s): this loses more than quantising the original"
        notices.warning(text, sum(forms.values()), listed)
    commonest = _commonest([weight for weight in weights if not weight.packed]) or "F16"
    return [_dequantised(weight, commonest) if weight.packed else weight for weight in weights]


def _dequantised(weight: Weight, commonest: str) -> Weight:
    """A quantised or encoded weight as a dense one, in the type of its scales, or `commonest` where it has no float
    scales."""
    dtype = weight.dtype if weight.dtype in FLOATS else commonest
    read = lambda: [_finite(weight.name, weight.dense().astype(FLOATS[dtype]))]  # noqa: E731
    return Weight(weight.name, dtype, weight.shape, weight.nbytes, read, form=weight.form)


def _finite(name: str, weight: mx.array) -> mx.array:
    """The weight; raises MlxeffError where a value is NaN or infinite."""
    if mx.isfinite(weight).all().item():
        return weight
    at = int(mx.argmax(~mx.isfinite(weight.reshape(-1))).item())
    place = tuple(int(each) for each in np.unravel_index(at, weight.shape))
    raise MlxeffError(f"tensor {name}: wanted finite weights, got {weight.reshape(-1)[at].item()} at {place}")


def _target(dtype: str, default: str | None) -> str:
    """The dtype in which a tensor is written: `default`, if any, for floats; otherwise the stored one."""
    return default if default and dtype in FLOATS else dtype


def _quantised(weight: Weight, dense: Spec, bits: int, group_size: int) -> Piece:
    """The piece of a matrix that is cast to the dtype of `dense` and then quantised."""
    rows, columns = weight.shape
    grouped = (rows, columns // group_size)
    specs = (
        (weight.name, "U32", (rows, columns * bits // 32)),
        (f"{weight.module}.scales", dense[1], grouped),
        (f"{weight.module}.biases", dense[1], grouped),
    )
    return Piece(
        specs, lambda: list(mx.quantize(_finite(weight.name, cast(weight.read()[0], dense)), group_size, bits))
    )
