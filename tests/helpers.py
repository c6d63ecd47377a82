"""What several tests share: one comparison of arrays, with one table of tolerances. Knows nothing of the package."""

import numpy as np

# dtype of `got` -> relative tolerance. The absolute one is the same fraction of the largest |want|, because the error
# of a sum follows the size of its terms and not that of a result in which they cancelled.
TOLERANCE = {
    "float64": 2.0**-40,  # a sum of 4096 terms in another order: 64 roundings of 2^-53, and some room
    "float32": 2.0**-18,  # the same 64 roundings, of 2^-24
    "float16": 2.0**-10,  # input and output rounded once each, 2^-11 a rounding; sums are kept in float32
    "bfloat16": 2.0**-7,  # input and output rounded once each, 2^-8 a rounding; sums are kept in float32
}
HALF = ("float16", "bfloat16")


def assert_close(got, want, what, rtol=None, atol=None):
    """Fail unless |got - want| <= rtol * |want| + atol everywhere; the message names the worst place and both values.

    got, want: mlx or NumPy arrays of one shape (or numbers). The tolerances come from TOLERANCE by the dtype of `got`;
    integers and booleans are compared exactly. A half-precision result must be compared with a reference of float32 or
    wider, unless rtol and atol are both 0. NaN equals NaN, and an infinity the same infinity.
    """
    dtype, reference = dtype_name(got), dtype_name(want)
    if dtype in HALF and reference in HALF and not (rtol == 0 and atol == 0):
        raise TypeError(
            f"{what}: compare {dtype} with a float32 reference, not {reference}, or exactly (rtol=0, atol=0)"
        )
    got, want = to_numpy(got), to_numpy(want)
    assert got.shape == want.shape, f"{what}: wanted shape {want.shape}, got {got.shape}"
    rtol = TOLERANCE.get(dtype, 0.0) if rtol is None else rtol
    atol = rtol * largest(want) if atol is None else atol
    error = distance(got, want)
    excess = error - (atol + rtol * np.where(np.isfinite(want), np.abs(want), 0.0))
    if not (excess > 0).any():
        return
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    place = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{what}: error {error[worst]:.4g} at {place}: got {got[worst]}, wanted {want[worst]};"
        f" {int((excess > 0).sum())} of {excess.size} elements are off, max error {error.max():.4g}"
        f" ({dtype}, rtol {rtol:.3g}, atol {atol:.3g})"
    )


def dtype_name(array):
    """`mlx.core.bfloat16`, `dtype('float32')` or a Python number -> "bfloat16", "float32", …"""
    dtype = getattr(array, "dtype", None)
    return str(np.asarray(array).dtype if dtype is None else dtype).rpartition(".")[2]


def to_numpy(array):
    """An array of any kind -> NumPy; integers stay integers, floats become float64 (bfloat16 by way of float32)."""
    if dtype_name(array) == "bfloat16":
        import mlx.core as mx

        array = array.astype(mx.float32)
    array = np.asarray(array)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def largest(array):
    """The largest finite magnitude; 0 of an array without any."""
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(finite.max()) if finite.size else 0.0


def distance(got, want):
    """|got - want| in float64; 0 where both are NaN or the same infinity, infinity where only one of them is."""
    if got.dtype.kind != "f" and want.dtype.kind != "f":
        return np.where(got == want, 0.0, np.maximum(np.abs(got.astype(np.float64) - want.astype(np.float64)), 1.0))
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
