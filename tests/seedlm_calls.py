"""The SeedLM kernels through ctypes, and random encoded matrices."""

import ctypes

import numpy as np

from cpu_library import EXACT, F32, OK, address, dtype_of, empty, lib
from mlxeff.seedlm import codec
from mlxeff.seedlm.format import FORMATS

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class SeedWeight(ctypes.Structure):
    _fields_ = [("seeds", _pointer), ("coefficients", _pointer), ("exponents", _pointer), ("N", _long), ("K", _long),
                ("ld", _long), ("columns", _int), ("states", _int), ("exponent_bias", _int)]  # fmt: skip


_weight = ctypes.POINTER(SeedWeight)
_operand = [_pointer, _long, _int]
lib.mlxeff_seedlm_matmul.argtypes = [_weight, *_operand, *_operand, _long, _int, _int]
lib.mlxeff_seedlm_rows.argtypes = [_weight, _pointer, _long, _pointer, _long, _int]
lib.mlxeff_seedlm_decode.argtypes = [_weight, _pointer, _long, _int]


def random_blocks(fmt, rng, rows, cols, bias=-7):
    """Blocks of uniformly random seeds, coefficients and codes."""
    shape = (rows, fmt.blocks(cols))
    return codec.Blocks(
        rng.integers(1, 1 << 16, shape).astype(np.uint16),
        rng.integers(-8, 8, (*shape, fmt.states)).astype(np.int8),
        rng.integers(0, 16, shape).astype(np.uint8),
        bias,
    )


class Seeded:
    """An encoded matrix (rows, cols): blocks, arrays and the ctypes form."""

    def __init__(self, name, blocks, cols):
        self.format, self.blocks, self.cols = FORMATS[name], blocks, cols
        self.rows = blocks.seeds.shape[0]
        self.arrays = codec.pack(self.format, blocks)
        first = self.arrays["seeds" if self.format.planar else "blocks"]
        others = [address(self.arrays[n]) if self.format.planar else None for n in ("coefficients", "exponents")]
        arrays, layout = (address(first), *others), (self.format.columns, self.format.states, blocks.exponent_bias)
        self.c = SeedWeight(*arrays, self.rows, cols, cols, *layout)

    @classmethod
    def random(cls, name, rng, rows, cols, bias=-7):
        return cls(name, random_blocks(FORMATS[name], rng, rows, cols, bias), cols)

    def columns(self, begin, count):
        """The columns [begin, begin + count), as a matrix of their own and in place, amid blocks that are poisoned.

        `begin` is at an even block."""
        fmt, blocks, first = self.format, self.blocks, begin // self.format.columns
        own = [a[:, first : first + fmt.blocks(count)] for a in (blocks.seeds, blocks.coefficients, blocks.codes)]
        seeds, coefficients, codes = blocks.seeds.copy(), blocks.coefficients.copy(), blocks.codes.copy()
        around = np.ones(seeds.shape[1], bool)
        around[first : first - (-count // fmt.columns)] = False
        seeds[:, around], coefficients[:, around], codes[:, around] = 0xFFFF, -1, 15
        part = Seeded(fmt.name, codec.Blocks(seeds, coefficients, codes, blocks.exponent_bias), self.cols)
        part.cols = part.c.K = count
        part.c.seeds += first * (2 if fmt.planar else 4)
        if fmt.planar:
            part.c.coefficients += first * 2
            part.c.exponents += first // 2
        return Seeded(fmt.name, codec.Blocks(*own, blocks.exponent_bias), count), part

    def dense(self):
        """float32 (rows, cols), by the NumPy reference."""
        return codec.decode(self.format, self.blocks, self.cols)


def matmul(weight, x, y_dtype=F32, mode=EXACT, added_to=None):
    y = empty((x.shape[0], weight.rows), y_dtype) if added_to is None else added_to.copy()
    code = lib.mlxeff_seedlm_matmul(
        ctypes.byref(weight.c), address(x), x.strides[0] // x.itemsize, dtype_of(x), address(y), y.shape[1], y_dtype,
        x.shape[0], mode, added_to is not None)  # fmt: skip
    assert code == OK, lib.mlxeff_error_string(code)
    return y


def decode(weight, dtype=F32):
    out = empty((weight.rows, weight.cols), dtype)
    code = lib.mlxeff_seedlm_decode(ctypes.byref(weight.c), address(out), weight.cols, dtype)
    assert code == OK, lib.mlxeff_error_string(code)
    return out


def rows(weight, ids, dtype=F32):
    ids = np.asarray(ids, np.int32)
    out = empty((len(ids), weight.cols), dtype)
    code = lib.mlxeff_seedlm_rows(ctypes.byref(weight.c), address(ids), len(ids), address(out), weight.cols, dtype)
    assert code == OK, lib.mlxeff_error_string(code)
    return out


class EncodeArgs(ctypes.Structure):
    _fields_ = [("weights", _pointer), ("ld", _long), ("rows", _long), ("cols", _long), ("diagonal", _pointer),
                ("columns", _int), ("states", _int), ("exponent_bias", _int), ("refine", _int), ("seeds", _pointer),
                ("coefficients", _pointer), ("codes", _pointer), ("decoded", _pointer),
                ("errors", _pointer)]  # fmt: skip


lib.mlxeff_seedlm_encode.argtypes = [ctypes.POINTER(EncodeArgs)]


def encode(name, weights, bias=0, refine=True, diagonal=None, code=OK):
    """-> Blocks, decoded (rows, cols), errors (rows, blocks); asserts the returned code."""
    fmt, (count, cols) = FORMATS[name], weights.shape
    blocks = fmt.blocks(cols) if diagonal is None else 1
    out = codec.Blocks(
        np.zeros((count, blocks), np.uint16),
        np.zeros((count, blocks, fmt.states), np.int8),
        np.zeros((count, blocks), np.uint8),
        bias,
    )
    decoded, errors = np.empty((count, cols), np.float32), np.empty((count, blocks))
    args = EncodeArgs(
        address(weights), weights.strides[0] // 4, count, cols, None if diagonal is None else address(diagonal),
        fmt.columns, fmt.states, bias, refine, address(out.seeds), address(out.coefficients), address(out.codes),
        address(decoded), address(errors))  # fmt: skip
    got = lib.mlxeff_seedlm_encode(ctypes.byref(args))
    assert got == code, lib.mlxeff_error_string(got)
    return out, decoded, errors
