"""assert_close itself: what passes, what fails, and what the message says."""

import mlx.core as mx
import numpy as np
import pytest

from helpers import TOLERANCE, assert_close


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_tolerance_of_a_dtype_is_its_boundary(dtype):
    want = mx.array([1.0, 2.0, -4.0])
    tolerance = TOLERANCE[str(dtype).rpartition(".")[2]]
    assert_close(want.astype(dtype), want, "rounded")
    assert_close(want.astype(dtype), want * (1 + 1.5 * tolerance), "rtol and atol add up at the largest element")
    with pytest.raises(AssertionError):
        assert_close(want.astype(dtype), want * (1 + 3 * tolerance), "too far")


def test_the_message_names_the_worst_element_and_both_values():
    want = np.zeros((2, 3), np.float32)
    got = want.copy()
    got[0, 1], got[1, 2] = 0.25, -0.5
    with pytest.raises(AssertionError, match=r"logits: error 0\.5 at \(1, 2\): got -0\.5, wanted 0\.0; 2 of 6"):
        assert_close(mx.array(got), want, "logits")


def test_half_precision_wants_a_float32_reference():
    half = mx.array([1.0, 3.0], mx.bfloat16)
    with pytest.raises(TypeError, match="float32 reference"):
        assert_close(half, half, "two halves")
    assert_close(half, half, "exactly", rtol=0, atol=0)
    assert_close(half, half.astype(mx.float32), "its own value")
    with pytest.raises(AssertionError):
        assert_close(half, mx.array([1.0, 3.015625], mx.bfloat16), "one step apart", rtol=0, atol=0)


def test_integers_and_shapes_are_exact():
    assert_close(mx.array([1, 2]), np.array([1, 2]), "ids")
    assert_close(mx.array([True, False]), [True, False], "mask")
    with pytest.raises(AssertionError, match=r"error 1 at \(1,\)"):
        assert_close(mx.array([1, 2]), [1, 3], "ids")
    with pytest.raises(AssertionError, match=r"error 1 at \(0,\)"):
        assert_close(
            mx.array(np.array([2**63 + 1], np.uint64)), np.array([2**63], np.uint64), "beyond float64's integers"
        )
    with pytest.raises(AssertionError, match=r"wanted shape \(2,\), got \(2, 1\)"):
        assert_close(mx.zeros((2, 1)), mx.zeros(2), "shapes do not broadcast")


def test_what_is_not_finite():
    odd = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert_close(mx.array(odd), odd, "the same")
    for place, value in [(0, 1.0), (1, -np.inf), (2, 0.0), (3, np.nan)]:
        other = odd.copy()
        other[place] = value
        with pytest.raises(AssertionError, match=rf"at \({place},\)"):
            assert_close(mx.array(other), odd, "one differs")


def test_empty_arrays_and_numbers():
    assert_close(mx.zeros((0, 3)), np.zeros((0, 3)), "nothing")
    assert_close(mx.array(2.0), 2.0, "a number")
    with pytest.raises(AssertionError, match=r"at \(\): got 2\.0, wanted 3\.0"):
        assert_close(mx.array(2.0), 3.0, "a number")
