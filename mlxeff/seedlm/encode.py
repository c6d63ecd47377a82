"""A weight matrix W → its SeedLM blocks, by an exhaustive search over all seeds (`search`). Ŵ is the decoded matrix.

The data-free method, which is the paper's, takes for each block the nearest one to its weights. The activation-aware
method minimises the error of the layer's outputs instead: with the Gram matrix H = XᵀX of the layer's inputs X
(tokens, cols), that error is tr(E H Eᵀ), where E = W - Ŵ. It encodes one column of blocks (a block from each row) after
the other and compensates the error of each in the columns that are not encoded yet, as GPTQ (arXiv 2210.17323) does
with single columns. Within a block, the search weights the errors of the columns by a diagonal that follows from H.

Memory: a few copies of W, and three of H in float64. `Inputs` has everything that depends on H alone, so it is computed
once for all matrices with the same inputs.
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

SLICE = 1 << 18  # weights per call of the search in the data-free method, after each of which progress is reported
BATCH = 16  # columns of blocks after which their errors are compensated in all later columns, with one matrix product
# Weight of the error in a column beyond the matrix, relative to the mean of the other columns in the block. The decoded
# values of such a column have no meaning.
PADDING_WEIGHT = 1 / 64


@dataclass(frozen=True)
class Encoded:
    """An encoded matrix and its distance to the weights."""

    format: BlockFormat
    blocks: Blocks
    decoded: np.ndarray  # Ŵ, float32 (rows, cols)
    error: float  # |E| / |W| in the Frobenius norm; sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) in the activation-aware method

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The stored arrays by name, as in `format`."""
        return pack(self.format, self.blocks)


@dataclass(frozen=True)
class Inputs:
    """What the activation-aware method derives from the inputs X, for all matrices of one format with these inputs."""

    format: BlockFormat
    gram: np.ndarray  # H = XᵀX, float64 (cols, cols)
    order: np.ndarray  # column-of-block numbers in the order of encoding: by descending trace of their part of H
    columns: np.ndarray  # numbers of the columns of the matrix in the same order
    factor: np.ndarray  # upper triangular U with UᵀU = (damped H)⁻¹, float64 (cols, cols), columns in the same order

    @classmethod
    def of(cls, fmt: BlockFormat, gram: np.ndarray, damping: float = 0.01, origin: str = "weight") -> "Inputs":
        """From `gram`, H (cols, cols). For the inverse, H is damped: `damping` times the mean of its diagonal is added
        to the diagonal. Raises MlxeffError where `gram` cannot be a Gram matrix; `origin` names the matrix in errors.
        """
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
    """Encode the matrix `weight` (rows, cols).

    inputs   for the activation-aware method: `Inputs` of this format, or H (cols, cols). None: the data-free method
    refine   for each seed, also try the next smaller exponent and the neighbours of each rounded coefficient;
             without it, coefficients are rounded as in the paper
    advance  called with the number of weights that were encoded since its last call
    origin   names the matrix in errors
    backend  "metal", "native" or "numpy"; None: that of `search_backend`

    Raises MlxeffError for anything but a matrix of finite weights, and for inputs of another size or format.
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
    """The exponent bias for a matrix: floor(log2(root mean square)) - 2. The blocks of Gaussian weights then use the
    exponent codes 6 to 10, and the codes up to 15 are left for weights that are up to 2^5 times as large. Raises
    MlxeffError for weights whose root mean square is out of range."""
    rms = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
    bias = int(np.frexp(rms)[1]) - 3 if rms else 0
    if abs(bias) > BIAS_LIMIT:
        wanted = f"weights between 2^-{BIAS_LIMIT} and 2^{BIAS_LIMIT}"
        raise MlxeffError(f"{origin}: wanted {wanted}, got a root mean square of {rms:.3g}")
    return bias


def _ratio(error: float, size: float) -> float:
    """The square root of error / size."""
    return float(np.sqrt(max(error, 0.0) / size)) if size > 0 else 0.0


def _checked_gram(gram: np.ndarray, origin: str) -> np.ndarray:
    """`gram` in float64. Raises MlxeffError where it cannot be a Gram matrix."""
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
    """The name of the implementation that searches: "metal" where the default device is a GPU, otherwise "native" with
    the instruction set, or "numpy" where the extension is missing.

    All implementations find the same blocks. Those of Metal are compared with NumPy's on a few blocks, once for each
    format in a process, and Metal is not used where they differ. A notice says why a faster one is not used.
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
    """The reason why the Metal kernels cannot be used; "" where they can."""
    weight = np.random.default_rng(0).standard_normal((5, fmt.columns)).astype(np.float32)
    diagonal = np.geomspace(0.2, 3, fmt.columns, dtype=np.float32)
    try:
        on_metal = search_metal(fmt, weight, diagonal, -2, True)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    reference = search_numpy(fmt, weight, diagonal, -2, True)
    same = all(np.array_equal(*pair) for pair in zip(on_metal, reference, strict=True))
    return "" if same else "a test of it finds other blocks than NumPy"


def _search_native(fmt: BlockFormat, weight: np.ndarray, diagonal: np.ndarray | None, bias: int, refine: bool) -> tuple:
    """`search.search_numpy` by the native kernel; `weight` has to be C-contiguous."""
    native, reason = kernels.native()
    if native is None:
        raise MlxeffError(f"SeedLM encoding: wanted the native kernels, they are {reason}")
    return native.seedlm_encode(weight, diagonal, fmt.columns, fmt.states, bias, refine)


# (matrix, diagonal of the metric or None) → (seeds, coefficients, codes, decoded), see `search.search_numpy`.
Search = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
SEARCHES = {"metal": search_metal, "native": _search_native, "numpy": search_numpy}


def _plain(
    fmt: BlockFormat, weight: np.ndarray, search: Search, bias: int, advance: Callable[[int], None]
) -> tuple[Blocks, np.ndarray]:
    """The data-free method: (blocks, decoded matrix)."""
    rows, cols = weight.shape
    blocks, decoded = _empty(fmt, rows, cols, bias), np.empty_like(weight)
    step = max(1, SLICE // cols)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        result = search(weight[part], None)
        blocks.seeds[part], blocks.coefficients[part], blocks.codes[part], decoded[part] = result
        advance(weight[part].size)
    return blocks, decoded


def _with_feedback(
    weight: np.ndarray, inputs: Inputs, search: Search, bias: int, advance: Callable[[int], None]
) -> tuple[Blocks, np.ndarray]:
    """The activation-aware method: (blocks, decoded matrix).

    `target` are the weights in the order of encoding, plus the compensation of the errors of all columns before. As in
    GPTQ, columns within a batch are compensated at once, and those after the batch when the batch is complete.
    """
    rows, cols = weight.shape
    fmt, order, column_order, factor = inputs.format, inputs.order, inputs.columns, inputs.factor
    target = np.ascontiguousarray(weight[:, column_order])
    blocks, decoded = _empty(fmt, rows, cols, bias), np.empty_like(weight)
    start = 0
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        begin, end = start, start + sum(_width(fmt, group, cols) for group in batch)
        scaled = np.empty((rows, end - begin), np.float32)  # (Ŵ - target) times the inverse of its block of the factor
        for group in batch:
            here = slice(start, start + _width(fmt, group, cols))
            inverse = np.linalg.inv(factor[here, here])
            part = np.ascontiguousarray(target[:, here])
            seeds, coefficients, codes, values = search(part, _diagonal(fmt, inverse))
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
    """Columns of the matrix in column of blocks number `group`: fewer than C in the last one, if it is not full."""
    return min(fmt.columns, cols - group * fmt.columns)


def _processing_order(fmt: BlockFormat, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Inputs.order` and `Inputs.columns`."""
    cols, starts = len(gram), range(0, len(gram), fmt.columns)
    traces = np.array([np.diagonal(gram)[start : start + fmt.columns].sum() for start in starts])
    order = np.argsort(-traces, kind="stable")
    columns = [np.arange(g * fmt.columns, min((g + 1) * fmt.columns, cols)) for g in order]
    return order, np.concatenate(columns)


def _inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with UᵀU = (damped H)⁻¹. Its lower right part without the first n rows and columns is the
    same factor for H without its first n columns, so it serves after n columns are encoded."""
    mean = float(np.diagonal(gram).mean())
    damped = gram + np.eye(len(gram)) * (damping * mean if mean > 0 else 1.0)
    return np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1]))[::-1, ::-1]


def _diagonal(fmt: BlockFormat, inverse: np.ndarray) -> np.ndarray:
    """The weights of the errors in the C columns of a block, float32 (C): the diagonal of (UᵀU)⁻¹, where `inverse` is
    the inverse of the block of U on its diagonal."""
    diagonal = np.sum(inverse**2, axis=1)
    padding = np.full(fmt.columns - len(diagonal), diagonal.mean() * PADDING_WEIGHT)
    return np.concatenate([diagonal, padding]).astype(np.float32)
