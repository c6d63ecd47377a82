"""GGUF's block types → MLX arrays: packed, in the affine form that `gguf_packing` has for a quantised type, or dense.

Sources: ggml-common.h of https://github.com/ggml-org/ggml for the types and the sizes of their blocks.
"""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError, notices
from .gguf_packing import EXACT, FORMS, Packed, pack, packed_nbytes, slices
from .tensor import Tensor, read_bytes, to_array

# Type number → (name, values per block, bytes per block)
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
DIRECT = {"F32", "F16", "BF16", "I8", "I16", "I32", "I64"}  # types that are plain numbers
CHUNK_VALUES = 1 << 22  # number of values that are dequantised at a time


class Losses:
    """Counts the tensors of a file that MLX cannot hold as they are, for a single notice when the first one is read."""

    def __init__(self, path: Path):
        self._path, self._counts, self._said = path, Counter(), False

    def count(self, kind: str) -> None:
        """Count a tensor of the block type `kind`."""
        self._counts[kind] += 1

    def say(self) -> None:
        """The notice; later calls do nothing."""
        if not self._said:
            kinds = (f"{count} of {kind} {FORMS[kind].loss}" for kind, count in sorted(self._counts.items()))
            text = "%s: tensors of types that MLX has not, kept in the nearest form: %s"
            notices.warning(text, self._path.name, ", ".join(kinds))
            self._said = True


def make_tensor(
    path: Path, name: str, shape: tuple[int, ...], code: int, start: int, nbytes: int, losses: Losses
) -> Tensor:
    """The tensor of type number `code` at byte `start` of the file. `losses` is one object for all tensors of the file.
    A quantised tensor of two or more dimensions can be read packed, and every one dense, as float16."""
    kind, values, block_bytes = BLOCKS[code]
    if kind in DIRECT:
        return Tensor(
            name, kind, shape, nbytes, path, lambda: to_array(read_bytes(path, start, nbytes), kind, shape), kind
        )

    def read_dense() -> mx.array:
        return dequantise(read_bytes(path, start, nbytes), kind, shape, f"{path.name}: tensor {name!r}")

    if len(shape) < 2:
        return Tensor(name, "F16", shape, nbytes, path, read_dense, kind)
    form = FORMS[kind]
    lossy = form.loss != EXACT
    if lossy:
        losses.count(kind)

    def read_packed() -> Packed:
        if lossy:
            losses.say()
        return pack(read_bytes(path, start, nbytes), shape, form, values, block_bytes)

    memory = packed_nbytes(shape, form)
    return Tensor(name, "F16", shape, nbytes, path, read_dense, kind, form.bits, form.group, read_packed, memory)


def dequantise(data: np.ndarray, kind: str, shape: tuple[int, ...], what: str) -> mx.array:
    """The bytes of blocks of type `kind` → a float16 array of `shape`, or float32 where float16 would overflow. The
    `gguf` library computes, some rows at a time. `what` names the tensor in errors. Raises MlxeffError for a type that
    the library does not have."""
    import gguf

    rows = data.reshape(-1, data.size * shape[-1] // np.prod(shape, dtype=np.int64))
    out = np.empty((rows.shape[0], shape[-1]), np.float16)
    for part in slices(rows.shape[0], CHUNK_VALUES // shape[-1]):
        try:
            with np.errstate(all="ignore"):
                values = gguf.quants.dequantize(rows[part], gguf.GGMLQuantizationType[kind])
        except (NotImplementedError, KeyError) as error:
            raise MlxeffError(f"{what}: the gguf library cannot dequantise {kind}") from error
        if out.dtype == np.float16 and (np.abs(values[np.isfinite(values)]) >= 65520).any():
            out = out.astype(np.float32)
        out[part] = values
    return mx.array(out.reshape(shape))
