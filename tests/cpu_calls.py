"""The attention kernels on numpy arrays, and the comparison for the families beside the matrix products."""

import ctypes as C

import numpy as np

from cpu_library import EXACT, call, dtype_of, widen


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
