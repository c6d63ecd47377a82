"""The C functions of the native kernels through ctypes, with numpy arrays; bfloat16 arrays are uint16 bit patterns.

They are those of the installed extension, or of the library that MLXEFF_CPU_LIBRARY names (a sanitizer build, say; then
neither the package nor MLX is imported). Their types are read from the header.
"""

import copy
import ctypes
import os
import re
from pathlib import Path

import numpy as np
import pytest

F32, F16, BF16 = 0, 1, 2
EXACT, COMPUTE_BF16, COMPUTE_INT8 = 0, 1, 2
OK, BAD_ARGUMENT, BAD_DTYPE, UNSUPPORTED, NO_MEMORY, BUSY = range(6)

HEADER = Path(__file__).parent.parent / "cpu" / "mlxeff_cpu.h"


def prototypes():
    """(result, name, [argument, ...]) of each function of the header, in C."""
    text = re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))
    for result, name, arguments in re.findall(r"MLXEFF_API ([\w *]+?) ?(mlxeff_\w+)\(([^)]*)\);", text):
        yield result, name, [" ".join(a.split()) for a in arguments.split(",") if a.strip() != "void"]


def _ctype(declaration):
    if "char*" in declaration:
        return ctypes.c_char_p
    types = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}
    return ctypes.c_void_p if "*" in declaration else types[declaration.split()[0]]


def _load():
    path = os.environ.get("MLXEFF_CPU_LIBRARY")
    if not path:
        from mlxeff import kernels

        native, reason = kernels.native()
        if native is None:
            pytest.skip(f"the native kernels are {reason}", allow_module_level=True)
        path = native.__file__
    library = ctypes.CDLL(path)
    for result, name, arguments in prototypes():
        getattr(library, name).restype = _ctype(result)
        getattr(library, name).argtypes = [_ctype(a) for a in arguments]
    return library


lib = _load()
LEVELS = lib.mlxeff_isa_available().decode().split()


class NativeError(Exception):
    def __init__(self, code):
        super().__init__(lib.mlxeff_error_string(code).decode())
        self.code = code


def call(name, *args):
    """Run an entry point, arrays as pointers; raise on a code other than OK."""
    if code := getattr(lib, name)(*(address(a) if isinstance(a, np.ndarray) else a for a in args)):
        raise NativeError(code)


def set_isa(name):
    """None restores the best level."""
    call("mlxeff_set_isa", name and name.encode())


def set_threads(n):
    """0 restores the default number."""
    call("mlxeff_set_num_threads", n)


class QuantizedWeight(ctypes.Structure):
    _pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    _fields_ = [("packed", _pointer), ("scales", _pointer), ("biases", _pointer), ("N", _long), ("K", _long),
                ("ld", _long), ("bits", _int), ("group", _int), ("scale_dtype", _int)]  # fmt: skip


def cast(values, dtype):
    """float array -> contiguous storage array of the dtype, rounded to nearest even."""
    if dtype != BF16:
        return np.ascontiguousarray(values, np.float16 if dtype == F16 else np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(array):
    """storage array -> float64."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def dtype_of(array):
    return {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.uint16): BF16}[array.dtype]


def empty(shape, dtype):
    return np.full(shape, 0x7FC0 if dtype == BF16 else np.nan, [np.float32, np.float16, np.uint16][dtype])


def address(array):
    return array.ctypes.data


def operand(array):
    """A matrix, possibly a view with contiguous rows, as three arguments: the array, its row stride, its dtype."""
    return array, array.strides[0] // array.itemsize, dtype_of(array)


def pack(q, bits):
    """(N, K) integers -> (N, K * bits / 32) uint32 words, least significant bits first."""
    n, k = q.shape
    stream = (q[:, :, None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32) & 1).reshape(n, k * bits // 32, 32)
    return np.ascontiguousarray((stream << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32))


class Quantized:
    """A random quantised matrix: its arrays, its ctypes form and its dequantised float64 values."""

    def __init__(self, rng, n, k, bits, group, scale_dtype=F32):
        self.q = rng.integers(0, 1 << bits, (n, k))
        scale = rng.uniform(0.5, 1.5, (n, k // group)) / (1 << bits)
        self.packed = pack(self.q, bits)
        self.scales = cast(scale, scale_dtype)
        self.biases = cast(-scale * (1 << bits) / 2 * rng.uniform(0.8, 1.2, scale.shape), scale_dtype)
        self.bits, self.group, self.scale_dtype = bits, group, scale_dtype
        self._bind(0, k)

    def _bind(self, begin, count):
        """The ctypes form of the columns [begin, begin + count) of the arrays."""
        (n, words), word, group = self.packed.shape, begin * self.bits // 32, begin // self.group
        first = self.packed[:, word:], self.scales[:, group:], self.biases[:, group:]
        columns = words * 32 // self.bits
        self.c = QuantizedWeight(*map(address, first), n, count, columns, self.bits, self.group, self.scale_dtype)

    def columns(self, begin, count):
        """The columns [begin, begin + count), as a matrix of their own and in place, amid columns that are poisoned."""
        words = slice(begin * self.bits // 32, (begin + count) * self.bits // 32)
        groups = slice(begin // self.group, (begin + count) // self.group)
        own, part = copy.copy(self), copy.copy(self)
        own.q = self.q[:, begin : begin + count]
        part.packed = np.full_like(self.packed, 0xFFFFFFFF)
        part.scales, part.biases = (empty(a.shape, self.scale_dtype) for a in (self.scales, self.biases))
        for name, where in (("packed", words), ("scales", groups), ("biases", groups)):
            setattr(own, name, np.ascontiguousarray(getattr(self, name)[:, where]))
            getattr(part, name)[:, where] = getattr(own, name)
        own._bind(0, count)
        part._bind(begin, count)
        return own, part

    def scale_bias(self):
        return (np.repeat(widen(a), self.group, axis=1) for a in (self.scales, self.biases))

    def dense(self):
        scale, bias = self.scale_bias()
        return self.q * scale + bias


def qmm(weight, x, y_dtype, mode=EXACT, added_to=None):
    y = empty((x.shape[0], weight.c.N), y_dtype) if added_to is None else added_to.copy()
    call("mlxeff_qmm", ctypes.byref(weight.c), *operand(x), *operand(y), x.shape[0], mode, added_to is not None)
    return y


def matmul(name, a, b, out_shape, sizes, out_dtype=F32, mode=EXACT, added_to=None):
    """`name` is matmul, matmul_dx or matmul_dw; sizes = (M, N, K)."""
    out = empty(out_shape, out_dtype) if added_to is None else added_to.copy()
    call(f"mlxeff_{name}", *operand(a), *operand(b), *operand(out), *sizes, mode, added_to is not None)
    return out


def product(x, w):
    """x @ w.T in float64, and the size of a typical element: |x| |w| / sqrt(K), the scale of errors that cancel."""
    x, w = widen(x), widen(w)
    size = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(w, axis=1).max() / np.sqrt(x.shape[1])
    return x @ w.T, size


# Relative to the largest |output| of a row, or to a typical one if that is larger: sums of K products in fp32 cost a
# few units of 2^-24 each, growing like
# sqrt(K); storing in half precision adds half a unit of its last place.
STORAGE_ERROR = {F32: 2e-6, F16: 2**-11, BF16: 2**-8}


def assert_unbiased(got, want, what):
    """The errors of many products are as often above as below: no factor is in them. Rounding both operands to 8 bits
    leaves less than a thousandth of one. Fewer than 1000 products say nothing."""
    want, got = want[0] if isinstance(want, tuple) else want, widen(got)
    factor = (got * want).sum() / (want * want).sum()
    assert want.size < 1000 or abs(factor - 1) < 2e-3, f"{what}: {factor} times what is wanted"


def assert_close(got, want, tolerance, what):
    """`want` is an array, or the pair that product() returns."""
    want, size = want if isinstance(want, tuple) else (want, 0)
    got = widen(got)
    assert np.isfinite(got).all(), f"{what}: not finite at {np.argwhere(~np.isfinite(got))[0]}"
    scale = np.maximum(np.abs(want).max(axis=-1, keepdims=True), size) + 1e-30
    error = np.abs(got - want) / scale
    at = np.unravel_index(error.argmax(), error.shape)
    assert error[at] <= tolerance, (
        f"{what}: error {error[at]:.3g} > {tolerance:.3g} at {at}: got {got[at]}, want {want[at]}"
    )
