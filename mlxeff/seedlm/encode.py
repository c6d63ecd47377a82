"""A weight matrix → its SeedLM blocks, by exhaustive search over all seeds (`search`).

Plain ("data-free", the paper's method): every block is the nearest to its weights. Activation-aware: given the Gram
matrix H = XᵀX of the layer's inputs, the error that counts is tr(E H Eᵀ). Columns of blocks are encoded one after the
other, and the error of each is compensated in the columns not yet encoded, as GPTQ (arXiv 2210.17323) does for single
columns; the search itself weighs the columns of a block by the diagonal of what is left of H.

Memory: a few copies of the weights, and three of H in float64. What depends on H alone, `Inputs`, is made once for all
matrices that read the same X.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..errors import MlxeffError, notices
from .codec import Blocks, pack
from .format import BIAS_LIMIT, BlockFormat
from .metal_search import search_metal
from .search import search_numpy

SLICE = 1 << 18  # weights a native call, between two reports of progress
BATCH = 16  # columns of blocks whose feedback to the far columns is applied in one product
PADDING_WEIGHT = 1 / 64  # of a column beyond the matrix, against the mean of the others: its value means nothing


@dataclass(frozen=True)
class Encoded:
    """A matrix in SeedLM blocks, and how far it is from the weights."""

    format: BlockFormat
    blocks: Blocks
    decoded: np.ndarray  # float32 (rows, cols)
    error: float  # |W - Ŵ| / |W|, or sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) where H was given

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored (`format`)."""
        return pack(self.format, self.blocks)


@dataclass(frozen=True)
class Inputs:
    """What the activation-aware method needs of H: for matrices of one format that read the same inputs X."""

    format: BlockFormat
    gram: np.ndarray  # H = XᵀX, float64 (cols, cols)
    order: np.ndarray  # columns of blocks, by descending trace of their part of H
    columns: np.ndarray  # columns of the matrix in that order
    factor: np.ndarray  # upper triangular U with UᵀU = (damped H)⁻¹ in that order

    @classmethod
    def of(cls, fmt: BlockFormat, gram: np.ndarray, damping: float = 0.01, origin: str = "weight") -> "Inputs":
        """From H (cols, cols), to whose diagonal `damping` times its mean is added."""
        gram = _checked_gram(gram, origin)
        order, columns = _processing_order(fmt, gram)
        return cls(fmt, gram, order, columns, _inverse_factor(gram[np.ix_(columns, columns)], damping))


def encode(
    fmt: BlockFormat,
    weight: np.ndarray,
    inputs: Inputs | np.ndarray | None = None,
    *,
    refine: bool = True,
    advance: Callable[[int], None] = lambda _: None,
    origin: str = "weight",
    backend: str | None = None,
) -> Encoded:
    """Encode a matrix (rows, cols).

    inputs: for the activation-aware method, `Inputs` of this format, or just H (cols, cols).
    refine: also try, for each seed, the next smaller exponent and the neighbours of each coefficient; without it, the
    rounding is the paper's. advance: called with the number of weights done since the last call. backend: that of
    `search_backend` where None.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.ndim != 2 or not weight.size:
        raise MlxeffError(f"{origin}: wanted a matrix, got shape {weight.shape}")
    if (bad := np.argwhere(~np.isfinite(weight))).size:
        at = tuple(int(i) for i in bad[0])
        raise MlxeffError(f"{origin}: wanted finite weights, got {weight[at]} at {at}")
    bias = exponent_bias(weight, origin)
    search = functools.partial(SEARCHES[(backend or search_backend(fmt)).split()[0]], fmt, bias=bias, refine=refine)
    if inputs is None:
        blocks, decoded = _plain(fmt, weight, search, bias, advance)
        return Encoded(fmt, blocks, decoded, _ratio(np.sum((weight - decoded) ** 2.0), np.sum(weight**2.0)))
    if not isinstance(inputs, Inputs):
        inputs = Inputs.of(fmt, inputs, origin=origin)
    gram, cols = inputs.gram, weight.shape[1]
    if len(gram) != cols:
        raise MlxeffError(f"{origin}: Gram matrix of the inputs: wanted shape {(cols, cols)}, got {gram.shape}")
    if inputs.format != fmt:
        raise MlxeffError(f"{origin}: wanted inputs for {fmt.name} bits, got them for {inputs.format.name}")
    blocks, decoded = _with_feedback(weight, inputs, search, bias, advance)
    error = weight - decoded.astype(np.float64)
    return Encoded(fmt, blocks, decoded, _ratio(np.sum(error @ gram * error), np.sum(weight @ gram * weight)))


def exponent_bias(weight: np.ndarray, origin: str = "weight") -> int:
    """floor(log2 rms) - 2: Gaussian blocks then use the codes 6 to 10, which leaves five octaves for larger weights."""
    rms = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
    bias = int(np.frexp(rms)[1]) - 3 if rms else 0
    if abs(bias) > BIAS_LIMIT:
        wanted = f"weights between 2^-{BIAS_LIMIT} and 2^{BIAS_LIMIT}"
        raise MlxeffError(f"{origin}: wanted {wanted}, got a root mean square of {rms:.3g}")
    return bias


def _ratio(error: float, size: float) -> float:
    return float(np.sqrt(max(error, 0.0) / size)) if size > 0 else 0.0


def _checked_gram(gram: np.ndarray, origin: str) -> np.ndarray:
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise MlxeffError(f"{origin}: Gram matrix of the inputs: wanted a square one, got shape {gram.shape}")
    if not np.isfinite(gram).all() or (np.diagonal(gram) < 0).any():
        raise MlxeffError(f"{origin}: Gram matrix of the inputs: wanted finite values, none negative on the diagonal")
    return gram


def _empty(fmt: BlockFormat, rows: int, cols: int, bias: int) -> Blocks:
    """Blocks that decode to zeros."""
    shape = (rows, fmt.blocks(cols))
    coefficients = np.zeros((*shape, fmt.states), np.int8)
    return Blocks(np.ones(shape, np.uint16), coefficients, np.zeros(shape, np.uint8), bias)


def search_backend(fmt: BlockFormat) -> str:
    """What searches: "metal" where the default device is a GPU, "native" and the instruction set, or "numpy".

    All find the same blocks. Metal's are compared with NumPy's once a process and format; what is not as wanted is a
    warning.
    """
    if kernels.device() == "gpu" and kernels.has_metal():
        if not (reason := _metal_reason(fmt)):
            return "metal"
        notices.warning(f"SeedLM encoding: not on Metal: {reason}")
    native, reason = kernels.native()
    if native is None:
        notices.warning(f"SeedLM encoding: in NumPy, some 3,000 weights a second: the native kernels are {reason}")
    return f"native {native.isa()}" if native else "numpy"


@functools.cache
def _metal_reason(fmt: BlockFormat) -> str:
    """Why the Metal kernels cannot be used; "" if they can."""
    weight = np.random.default_rng(0).standard_normal((5, fmt.columns)).astype(np.float32)
    diagonal = np.geomspace(0.2, 3, fmt.columns, dtype=np.float32)
    try:
        found = search_metal(fmt, weight, diagonal, -2, True)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    wanted = search_numpy(fmt, weight, diagonal, -2, True)
    same = all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))
    return "" if same else "a test of it finds other blocks than NumPy"


def _search_native(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int, refine: bool) -> tuple:
    """As `search.search_numpy`; weight C-contiguous."""
    native, reason = kernels.native()
    if native is None:
        raise MlxeffError(f"SeedLM encoding: wanted the native kernels, they are {reason}")
    return native.seedlm_encode(weight, diagonal, fmt.columns, fmt.states, bias, refine)


SEARCHES = {"metal": search_metal, "native": _search_native, "numpy": search_numpy}


def _plain(fmt, weight, search, bias, advance) -> tuple[Blocks, np.ndarray]:
    rows, cols = weight.shape
    blocks, decoded = _empty(fmt, rows, cols, bias), np.empty_like(weight)
    step = max(1, SLICE // cols)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = search(weight[part], None)
        blocks.seeds[part], blocks.coefficients[part], blocks.codes[part], decoded[part] = found
        advance(weight[part].size)
    return blocks, decoded


def _with_feedback(weight, inputs, search, bias, advance) -> tuple[Blocks, np.ndarray]:
    rows, cols = weight.shape
    fmt, order, column_order, factor = inputs.format, inputs.order, inputs.columns, inputs.factor
    target = np.ascontiguousarray(weight[:, column_order])
    blocks, decoded = _empty(fmt, rows, cols, bias), np.empty_like(weight)
    start = 0
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        begin, end = start, start + sum(_width(fmt, group, cols) for group in batch)
        scaled = np.empty((rows, end - begin), np.float32)  # errors times the inverse of their part of the factor
        for group in batch:
            here = slice(start, start + _width(fmt, group, cols))
            inverse = np.linalg.inv(factor[here, here])
            found = search(np.ascontiguousarray(target[:, here]), _diagonal(fmt, inverse))
            seeds, coefficients, codes, values = found
            blocks.seeds[:, group], blocks.coefficients[:, group] = seeds[:, 0], coefficients[:, 0]
            blocks.codes[:, group] = codes[:, 0]
            decoded[:, column_order[here]] = values
            feedback = (values - target[:, here]) @ inverse
            scaled[:, here.start - begin : here.stop - begin] = feedback
            target[:, here.stop : end] += feedback @ factor[here, here.stop : end]
            start = here.stop
            advance(values.size)
        target[:, end:] += scaled @ factor[begin:end, end:].astype(np.float32)
    return blocks, decoded


def _width(fmt: BlockFormat, group: int, cols: int) -> int:
    return min(fmt.columns, cols - group * fmt.columns)


def _processing_order(fmt: BlockFormat, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of blocks by descending trace of their part of H, and the columns of the matrix in that order."""
    cols, starts = len(gram), range(0, len(gram), fmt.columns)
    traces = np.array([np.diagonal(gram)[start : start + fmt.columns].sum() for start in starts])
    order = np.argsort(-traces, kind="stable")
    columns = [np.arange(g * fmt.columns, min((g + 1) * fmt.columns, cols)) for g in order]
    return order, np.concatenate(columns)


def _inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """Upper triangular U with UᵀU = (damped H)⁻¹; its trailing parts are the factors for the columns that are left."""
    mean = float(np.diagonal(gram).mean())
    damped = gram + np.eye(len(gram)) * (damping * mean if mean > 0 else 1.0)
    return np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1]))[::-1, ::-1]


def _diagonal(fmt: BlockFormat, inverse: np.ndarray) -> np.ndarray:
    """Weights of the C columns of a block: the diagonal of (UᵀU)⁻¹, given U⁻¹."""
    diagonal = np.sum(inverse**2, axis=1)
    padding = np.full(fmt.columns - len(diagonal), diagonal.mean() * PADDING_WEIGHT)
    return np.concatenate([diagonal, padding]).astype(np.float32)
