"""The Metal kernels of QuantSpec's KV cache against attention to the decoded planes in float64: on the GPU, or emulated
where there is none. Costs some 20 seconds there: most of it compiles a dozen instances of the kernels.
"""

import contextlib

import mlx.core as mx
import numpy as np
import pytest

import metal_on_cpu
from helpers import HALF, TOLERANCE, assert_close, dtype_name, to_numpy
from mlxeff import RunOptions, kernels
from mlxeff.cache import LayerShape
from mlxeff.quantspec import cache, metal, planes
from plane_buffers import FULL, Buffers, View

# Largest error in float32 of values of size 1 to 4: sums of codes up to 255 steps, and sums of zeros of the other sign.
BOUND = 1e-5
# Head size, query heads for each KV head, new tokens: each size, and 1 to 8 blocks of 8 rows.
SHAPES = [(64, 1, 1), (64, 4, 8), (80, 3, 5), (96, 3, 8), (128, 8, 8), (128, 1, 3)]


def queries_for(buffers, heads, tokens, dtype=mx.float32, factor=1.0):
    shape = (buffers.lead[0], buffers.lead[1] * heads, tokens, buffers.size)
    return (factor * mx.random.normal(shape, key=mx.random.key(heads * 8 + tokens))).astype(dtype)


def attend(buffers, queries, view=FULL, scale=None, window=None, arrays=None, **options):
    scale = buffers.size**-0.5 if scale is None else scale
    arguments = (*(arrays or buffers.arrays(view)), buffers.length, *view, scale, window)
    return metal_on_cpu.run(metal.attend, queries, *arguments, **options)


def check(buffers, queries, view=FULL, scale=None, window=None, **options):
    got = attend(buffers, queries, view, scale, window, **options)
    assert got.dtype == queries.dtype
    want = buffers.attention(queries, buffers.size**-0.5 if scale is None else scale, view, window)
    rtol, what = TOLERANCE[dtype_name(got)], f"{buffers.length} tokens, queries {queries.shape}, {view}, {window}"
    assert_close(got, want, what, rtol=rtol if dtype_name(got) in HALF else 0, atol=BOUND)
    return got


# ---- Attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 511, 512, 513, 1100])
def test_attention_of_any_length(length):
    for heads, tokens in ((1, 1), (4, min(length, 2))):
        buffers = Buffers(length, 64)
        check(buffers, queries_for(buffers, heads, tokens))
        last = length // 16
        check(buffers, queries_for(buffers, heads, tokens), View(last // 2, 0, last, last // 2))


@pytest.mark.parametrize(("size", "heads", "tokens"), SHAPES)
def test_attention_of_any_shape(size, heads, tokens):
    for length, view, window in [(77, FULL, 0), (525, View(2, 1, 30, 3), 0), (525, View(0, 4, 31, 32), 20)]:
        buffers = Buffers(length, size, groups=1)
        check(buffers, queries_for(buffers, heads, tokens), view, window=window)


@pytest.mark.parametrize(("tokens", "window"), [*zip(range(1, 9), [None, 3] * 4, strict=True), (8, None)])
def test_a_row_has_the_same_bits_alone_and_among_others(tokens, window):
    length, view = 512 + tokens // 2, View(1, 1, 8, 9)  # the rows end on both sides of a part's end
    buffers = Buffers(length, 64)
    queries, arrays = queries_for(buffers, 4, tokens), buffers.arrays(view)
    together = to_numpy(check(buffers, queries, view, window=window))
    for row in range(tokens):
        buffers.length = length - tokens + row + 1
        alone = attend(buffers, queries[:, :, row : row + 1], view, window=window, arrays=arrays)
        assert np.array_equal(to_numpy(alone)[:, :, 0], together[:, :, row]), f"row {row} of {tokens}"


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_queries_of_half_precision(dtype):
    buffers = Buffers(70, 64, batch=2, groups=3)
    check(buffers, queries_for(buffers, 4, 2, dtype))


@pytest.mark.parametrize("window", [1, 5, 16, 64, 100, 512, 600, 5000])
def test_a_window(window):
    buffers = Buffers(600, 64, groups=1)
    for heads, tokens in ((1, 1), (2, 4)):
        check(buffers, queries_for(buffers, heads, tokens), View(0, 0, 33, 35), window=window)


def test_lower_planes_without_tiles_and_of_few():
    buffers = Buffers(100, 64, tiles=0)
    upper, keys, values = buffers.arrays(FULL)
    queries = queries_for(buffers, 1, 1)
    for first in (6, 7):
        view = View(first, first, first, first)
        got = attend(buffers, queries, view, arrays=(upper, keys[:, :, first:], values[:, :, first:]))
        assert_close(got, buffers.attention(queries, 0.125, view), f"from tile {first}", 0, BOUND)


def test_values_of_one_give_one():
    buffers = Buffers(530, 64)
    buffers.values[0][:], buffers.values[1][:, :, :530], buffers.values[2][:, :, :530] = 0, 1, 0
    buffers.values[0][..., 0] = 128  # decoded: 8 in the first channel, which is 1 in each, rotated
    got = attend(buffers, queries_for(buffers, 4, 2))
    assert_close(got, np.ones(got.shape), "values of one", rtol=0, atol=2e-6)


def test_queries_of_zero_give_the_mean_of_the_values():
    for length in (1, 17, 513):
        buffers = Buffers(length, 64)
        got = attend(buffers, mx.zeros((1, 2, 1, 64)))
        assert_close(got[:, :, 0], buffers.decoded()[1].mean(axis=2), f"mean of {length} values", 0, BOUND)


@pytest.mark.parametrize("where", [0, 15, 16, 63, 64, 511, 512, 599])
def test_one_key_that_dominates(where):
    keys = np.random.default_rng(where).standard_normal((1, 2, 600, 64))
    keys[:, :, where] = 3
    buffers = Buffers(600, 64, keys=keys)
    got = check(buffers, mx.full((1, 2, 1, 64), 3.0), scale=1.0)  # its score is 576
    assert_close(got[:, :, 0], buffers.decoded()[1][:, :, where], f"token {where}", 0, BOUND)


def test_scores_of_any_size():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 2, 530, 64))
    queries = mx.array(keys[:, :, -2:].astype(np.float32))
    for factor in (1.25, -1.25, 1e3, 0.0):  # the query's own key has a score of some ±80 with the first two
        check(Buffers(530, 64, keys=keys), factor * queries, scale=1.0)
    same = np.broadcast_to(keys[:, :, :1], keys.shape)
    check(Buffers(530, 64, keys=same), queries, scale=1.0)


def test_a_token_changes_no_row_before_it():
    buffers = Buffers(515, 64, groups=1)
    queries = queries_for(buffers, 2, 4)
    before = to_numpy(attend(buffers, queries))
    for codes in (buffers.keys, buffers.values):
        codes[0][:, :, 513:] = 255 - codes[0][:, :, 513:]
        codes[1][:, :, 514:] = np.nan
    after = to_numpy(attend(buffers, queries))
    assert np.array_equal(before[:, :, :2], after[:, :, :2])
    assert np.isnan(after[:, :, 3]).all()
    assert (before[:, :, 2] != after[:, :, 2]).any()


def test_a_draft_is_a_verification_of_the_middle_of_each_upper_half():
    """No lower half is 7.5, but with lower halves of 7, zeros that are half a step larger have the same numbers. They
    are exact here: steps are powers of two, zeros multiples of half of them."""
    buffers, last = Buffers(100, 64), View(0, 0, 7, 7)
    for codes, scale, zero in (buffers.keys, buffers.values):
        scale[:, :, :100], zero[:, :, :100] = 0.5, buffers.rng.integers(-64, 64, zero[:, :, :100].shape) / 64
        codes[:] = codes // 16 * 16 + 7
    queries = queries_for(buffers, 2, 4)
    draft = check(buffers, queries, last)
    for _, scale, zero in (buffers.keys, buffers.values):
        zero += scale / 32
    assert_close(check(buffers, queries), draft, "verify with lower halves of 7.5", rtol=1e-6)


def test_what_is_read_coarsely_has_no_influence():
    buffers = Buffers(200, 64)
    queries, view = queries_for(buffers, 2, 1), View(2, 3, 8, 9)
    first, second = (to_numpy(attend(buffers, queries, view)) for _ in range(2))  # other random halves each time
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("length", "queries", "size"), [(33, (1, 2, 1, 64), 64), (4, (1, 2, 5, 64), 64), (9, (1, 32, 5, 64), 64)]
)
def test_what_the_kernel_does_not_compute_is_refused(length, queries, size):
    buffers = Buffers(32, size)
    with pytest.raises(ValueError, match="attention to planes"):
        metal.attend(mx.zeros(queries), *buffers.arrays(), length + 16 * (length == 33), *FULL, 1.0)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_attention(sanitizer):
    buffers = Buffers(150, 80, tiles=0)
    check(buffers, queries_for(buffers, 3, 3), View(2, 3, 4, 3), window=90, sanitizer=sanitizer)


def test_the_order_of_threads_changes_nothing_in_attention():
    buffers = Buffers(530, 80)
    got = [to_numpy(attend(buffers, queries_for(buffers, 3, 5), descending=each)) for each in (False, True)]
    assert np.array_equal(*got)


# ---- Storing --------------------------------------------------------------------------------------------------------


def stored_by_numpy(buffers, keys, values, length):
    """Buffers that also hold the new keys and values (B, G, S, E), from `length` on: what storing must give."""
    for encoded, numbers in ((buffers.keys, keys), (buffers.values, values)):
        for whole, part in zip(encoded, planes.encode(planes.rotate(numbers)), strict=True):
            whole[:, :, length : length + numbers.shape[2]] = np.array(part)
    return buffers.arrays()


def store_and_compare(buffers, keys, values, view=FULL, **options):
    """Store new tokens after those of the buffers; every byte of the result must be that of `planes`."""
    length, firsts = buffers.length, (0, view.first_keys, view.first_values)
    before = buffers.arrays(view)
    tiles = metal_on_cpu.run(metal.store, keys, values, *before, length, *firsts[1:], **options)
    want = stored_by_numpy(buffers, keys, values, length)
    for got, wanted, first in zip(tiles, want, firsts, strict=True):
        begin, end = max(length // 16, first), -(-(length + keys.shape[2]) // 16)
        assert got.shape[2] == max(end - begin, 0)
        assert np.array_equal(np.array(got), np.array(wanted)[:, :, begin : max(begin, end)])


def tokens_for(buffers, count, dtype=mx.float32):
    shape = (*buffers.lead, count, buffers.size)
    return [mx.random.normal(shape, key=mx.random.key(count + each)).astype(dtype) for each in (0, 99)]


@pytest.mark.parametrize("size", planes.HEAD_SIZES)
def test_stored_tiles_are_those_of_the_reference(size):
    for length, count in [(0, 1), (0, 16), (1, 1), (7, 1), (8, 8), (15, 2), (16, 3), (30, 40)]:
        buffers = Buffers(length, size, batch=2 if size == 64 else 1, tiles=4)
        store_and_compare(buffers, *tokens_for(buffers, count))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_new_tokens_of_half_precision(dtype):
    buffers = Buffers(5, 64, tiles=1)
    store_and_compare(buffers, *tokens_for(buffers, 3, dtype))


def test_lower_planes_that_begin_later():
    for first_keys, first_values in [(0, 2), (2, 0), (3, 3), (4, 9)]:
        buffers = Buffers(37, 64, tiles=3)
        store_and_compare(buffers, *tokens_for(buffers, 20), View(first_keys, first_values))
    buffers = Buffers(37, 64, tiles=0)
    with pytest.raises(ValueError, match="storing in planes: 20 tokens after 37"):
        metal.store(*tokens_for(buffers, 20), *buffers.arrays(), 37, 0, 0)


def test_groups_of_any_range():
    buffers = Buffers(3, 64, tiles=1)
    keys, values = (np.array(each) for each in tokens_for(buffers, 8))
    for token, factor in enumerate([0, 1e-30, 6e-5, 1e-7, 1e3, 6e4, -1]):
        keys[:, :, token] *= factor
        values[:, :, token] *= factor
    keys[:, :, 7], values[:, :, 7] = 5, np.eye(64)[3] * 1e4  # constant; one number much larger than the others
    store_and_compare(buffers, mx.array(keys), mx.array(values))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_numbers_that_float16_does_not_hold_give_scales_that_are_not_finite(value):
    buffers = Buffers(3, 80, groups=1)  # a head of five blocks: a NaN in one leaves the numbers of the others
    keys, values = (np.array(each) for each in tokens_for(buffers, 3))
    keys[0, 0, 1, 40] = values[0, 0, 1, 0] = value
    new = mx.array(keys), mx.array(values)
    got = metal_on_cpu.run(metal.store, *new, *buffers.arrays(), 3, 0, 0)
    for upper in (got[0], stored_by_numpy(buffers, *new, 3)[0]):
        scales = np.array(upper[0, 0, 0, :128]).view(np.float16).reshape(2, 2, 16)  # kind, scale and zero, token
        finite = np.isfinite(scales).all(axis=1)
        assert finite[:, [0, 1, 2, 3, 5]].all()
        assert not finite[:, 4].any()


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_storing(sanitizer):
    buffers = Buffers(13, 80, tiles=1)
    store_and_compare(buffers, *tokens_for(buffers, 5), View(1, 0), sanitizer=sanitizer)


def test_what_was_stored_is_attended_to():
    buffers = Buffers(20, 64, tiles=1)
    cached, new = buffers.arrays(), tokens_for(buffers, 3)
    tiles = metal_on_cpu.run(metal.store, *new, *cached, 20, 0, 0)
    arrays = [
        mx.concatenate([old[:, :, :1], tile, old[:, :, 2:]], axis=2) for old, tile in zip(cached, tiles, strict=True)
    ]
    stored_by_numpy(buffers, *new, 20)
    buffers.length = 23
    queries = queries_for(buffers, 1, 3)
    assert_close(attend(buffers, queries, arrays=arrays), buffers.attention(queries, 0.125), "stored", 0, BOUND)


@pytest.mark.parametrize(("kind", "view"), [("int8", "full"), ("int8", "draft"), ("int4", "full"), ("k8v4", "full")])
def test_the_cache_on_a_gpu(monkeypatch, kind, view):
    """A prompt, a draft of three tokens of which one stays, and single tokens: the cache has the same bytes as on a
    CPU, and attention gives the same."""
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(cache, "on_gpu", lambda gpu=gpu: gpu)
        layer, outputs, rng = cache.PlaneLayer(LayerShape(2, 64), kind), [], np.random.default_rng(6)
        with metal_on_cpu.emulated() if gpu and not kernels.has_metal() else contextlib.nullcontext():
            for count, kept in ((150, 150), (3, 1), (1, 1), (1, 1)):
                queries = mx.array(rng.standard_normal((1, 6, count, 64)).astype(np.float32))
                keys, values = (mx.array(rng.standard_normal((1, 2, count, 64)).astype(np.float32)) for _ in range(2))
                length = layer.length
                outputs.append(np.array(layer.attend(queries, keys, values, 0.125, RunOptions(view=view))))
                layer.rewind(length + kept)
        found.append((outputs, layer))
    for plain, metal_ in zip(found[0][0], found[1][0], strict=True):
        assert np.abs(plain - metal_).max() < 2e-3
    for name, buffer in found[0][1]._buffers.items():
        assert mx.array_equal(buffer, found[1][1]._buffers[name]), name
