"""ctypes access to the attention, norm, RoPE, SwiGLU, softmax and sampling kernels, on numpy arrays.

numpy has no bfloat16: arrays of uint16 stand for it (`to_bf16`, `widen`).
"""

import ctypes as C

import numpy as np

from cpu_library import lib as library

F32, F16, BF16 = 0, 1, 2
EXACT, COMPUTE_BF16 = 0, 1
BAD_ARGUMENT, BAD_DTYPE = 1, 2


class NativeError(Exception):
    def __init__(self, code: int):
        super().__init__(library.mlxeff_error_string(code).decode())
        self.code = code


def call(name: str, *args) -> None:
    """Run an entry point with arrays as pointers, ints as int64 and floats as float; raise on a code other than OK."""
    if code := getattr(library, name)(*[_plain(a) for a in args]):
        raise NativeError(code)


def _plain(value):
    if value is None:
        return C.c_void_p(None)
    if isinstance(value, np.ndarray):
        return C.c_void_p(value.ctypes.data)
    if isinstance(value, (int, np.integer)):
        return C.c_int64(int(value))
    if isinstance(value, float):
        return C.c_float(value)
    return value  # ctypes values, structures by reference


def isa() -> str:
    return library.mlxeff_isa().decode()


def levels() -> list[str]:
    return library.mlxeff_isa_available().decode().split()


def set_isa(name: str | None) -> None:
    call("mlxeff_set_isa", C.c_char_p(name.encode() if name else None))


def set_threads(n: int) -> None:
    call("mlxeff_set_num_threads", C.c_int(n))


def dtype_of(x: np.ndarray) -> int:
    return {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.uint16): BF16}[x.dtype]


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def cast(x: np.ndarray, dtype: int) -> np.ndarray:
    return to_bf16(x) if dtype == BF16 else np.asarray(x, np.float16 if dtype == F16 else np.float32)


def widen(x: np.ndarray) -> np.ndarray:
    """Any of the three as float64."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


class Heads(C.Structure):
    _fields_ = [
        ("data", C.c_void_p),
        ("batch", C.c_int64),
        ("head", C.c_int64),
        ("token", C.c_int64),
        ("dtype", C.c_int),
    ]

    def __init__(self, x: np.ndarray):
        """x (B, heads, tokens, E), possibly a view whose last axis is contiguous."""
        size = x.itemsize
        assert x.ndim == 4
        assert x.strides[3] == size or x.shape[3] == 1
        super().__init__(x.ctypes.data, *(s // size for s in x.strides[:3]), dtype_of(x))


class AttentionArgs(C.Structure):
    _fields_ = (
        [(name, Heads) for name in ("q", "k", "v", "out")]
        + [(name, C.c_int64) for name in "BHGSTE"]
        + [("scale", C.c_float), ("window", C.c_int64), ("mode", C.c_int), ("lse", C.c_void_p)]
    )


def attention_args(q, k, v, out, scale, window=0, mode=EXACT, lse=None) -> AttentionArgs:
    (B, H, S, E), (_, G, T, _) = q.shape, k.shape
    pointer = None if lse is None else lse.ctypes.data
    return AttentionArgs(Heads(q), Heads(k), Heads(v), Heads(out), B, H, G, S, T, E, scale, window, mode, pointer)


def attention(args: AttentionArgs) -> None:
    call("mlxeff_attention", C.byref(args))


def attention_backward(args: AttentionArgs, dout, dq, dk, dv) -> None:
    call("mlxeff_attention_backward", C.byref(args), *(C.byref(Heads(x)) for x in (dout, dq, dk, dv)))


def assert_close(got, want, tolerance, what=""):
    """|got - want| <= tolerance * max(1, |want|) everywhere; on failure, where and how much."""
    got, want = widen(got), np.asarray(want, np.float64)
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    error = np.where(np.isnan(got) & np.isnan(want) | (got == want), 0, error)
    if not np.all(error <= tolerance):
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        raise AssertionError(
            f"{what}: error {error[worst]:.3g} > {tolerance:.3g} at {worst}: got {got[worst]}, want {want[worst]}"
        )
