"""The stored form of SeedLM: the register, windows, coefficients, packing, golden bytes, decoders, damaged data."""

import mlx.core as mx
import numpy as np
import pytest

from mlxeff import MlxeffError
from mlxeff.seedlm import codec, lfsr
from mlxeff.seedlm.format import BIAS_LIMIT, FORMATS, block_format, check_arrays, check_header, header

ALL_SEEDS = np.arange(1, 1 << 16)
# Table 6 of the paper: tapped bits of registers of K bits.
PAPER_TAPS = {2: (0, 1), 3: (0, 1), 4: (0, 1), 5: (0, 2), 6: (0, 1), 7: (0, 1), 8: (0, 2, 3, 4), 9: (0, 4),
              10: (0, 3), 11: (0, 2), 12: (0, 1, 2, 8), 13: (0, 1, 2, 5), 14: (0, 1, 2, 12), 15: (0, 1),
              16: (0, 1, 3, 12)}  # fmt: skip


@pytest.fixture(scope="module")
def windows():
    """States 0 … 47 of every seed, by stepping."""
    return lfsr.states(ALL_SEEDS, 48)


def random_blocks(fmt, rng, rows, cols, bias=-7):
    shape = (rows, fmt.blocks(cols))
    seeds = np.resize(rng.permutation(ALL_SEEDS), shape).astype(np.uint16)
    coefficients = rng.integers(-8, 8, (*shape, fmt.states)).astype(np.int8)
    return codec.Blocks(seeds, coefficients, rng.integers(0, 16, shape).astype(np.uint8), bias)


def test_figure_4_of_the_paper():
    """K = 3, taps (0, 1), paper seed 4, C = 4, P = 2: V is filled by rows with the states after the seed."""
    first = lfsr.step(4, 3, (0, 1))
    assert lfsr.states(first, 8, 3, (0, 1)).reshape(4, 2).tolist() == [[2, 5], [6, 7], [3, 1], [4, 2]]


@pytest.mark.parametrize("bits", PAPER_TAPS)
def test_the_register_visits_every_state_but_zero(bits):
    cycle = [1]
    while (state := lfsr.step(cycle[-1], bits, PAPER_TAPS[bits])) != 1:
        cycle.append(state)
    assert sorted(cycle) == list(range(1, 1 << bits))
    assert lfsr.step(0, bits, PAPER_TAPS[bits]) == 0


def test_step_against_a_list_of_bits():
    bits = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]  # bit 0 first
    state = sum(bit << i for i, bit in enumerate(bits))
    for _ in range(100):
        bits = [*bits[1:], bits[0] ^ bits[1] ^ bits[3] ^ bits[12]]
        state = lfsr.step(state)
        assert state == sum(bit << i for i, bit in enumerate(bits))
    assert lfsr.step(1) == 0x8000


def test_states_are_windows_of_the_expanded_word(windows):
    words = lfsr.expand(ALL_SEEDS)
    for n in range(48):
        np.testing.assert_array_equal(words >> np.uint64(n) & np.uint64(0xFFFF), windows[:, n])


def test_neighbouring_columns_are_tied_by_a_sign(windows):
    """u(n + 1) = (u(n) + s) / 2 - tiny, s the sign of the new top bit."""
    u = (windows - 32768) / 32767
    assert (u.min(), u.max()) == (-1, 1)
    assert abs(u[:, 0].mean()) < 1e-12
    sign = np.where(windows[:, 1:] >= 32768, 1, -1)
    assert np.abs(u[:, 1:] - (u[:, :-1] + sign) / 2).max() < 4.6e-5


@pytest.mark.parametrize("name", FORMATS)
def test_pack_and_unpack(name):
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    for rows, cols in ((1, 1), (3, 576), (2, 1536), (5, 100)):
        blocks = random_blocks(fmt, rng, rows, cols, int(rng.integers(-BIAS_LIMIT, BIAS_LIMIT + 1)))
        arrays = codec.pack(fmt, blocks)
        got = codec.unpack(fmt, rows, cols, {key: mx.array(value) for key, value in arrays.items()})
        for field in ("seeds", "coefficients", "codes", "exponent_bias"):
            np.testing.assert_array_equal(getattr(got, field), getattr(blocks, field))
        if cols % (2 * fmt.columns) == 0:
            assert sum(a.nbytes for a in arrays.values()) - 4 == rows * cols * fmt.bits / 8


def test_bits_a_weight():
    assert {name: fmt.bits for name, fmt in FORMATS.items()} == {"3": 3.0, "4": 4.0, "4.5": 4.5}
    assert [FORMATS["3"].blocks(cols) for cols in (1, 24, 25, 4096)] == [2, 2, 4, 342]
    assert [FORMATS["4"].blocks(cols) for cols in (1, 8, 9, 576)] == [1, 1, 2, 72]


PLANAR = {"seeds": [[0x1234, 1]], "coefficients": [[0x78F7, 1]], "exponents": [[0x0C]]}
GOLDEN = {"4": {"blocks": [[0xC8F71234, 0x00010001]]}, "4.5": PLANAR, "3": PLANAR}


@pytest.mark.parametrize("name", FORMATS)
def test_golden_words(name):
    """Seed 0x1234 with q = 7, -1, -8 (, 7), code 12, then seed 1 with q = 1, 0, 0 (, 0), code 0; bias -3."""
    fmt, q = FORMATS[name], np.zeros((1, 2, FORMATS[name].states), np.int8)
    q[0, 0], q[0, 1, 0] = [7, -1, -8, 7][: fmt.states], 1
    blocks = codec.Blocks(np.array([[0x1234, 1]], np.uint16), q, np.array([[12, 0]], np.uint8), -3)
    arrays = codec.pack(fmt, blocks)
    assert {k: v.tolist() for k, v in arrays.items()} == {**GOLDEN[name], "exponent_bias": [-3]}
    want = []
    for seed, coefficients, code in zip((0x1234, 1), q[0].tolist(), (12, 0)):
        for _ in range(fmt.columns):
            total = 0
            for coefficient in coefficients:
                total += coefficient * (seed - 32768)
                seed = lfsr.step(seed)
            want.append(np.float32(total) * np.float32(2.0 ** (code - 8 - 3) / 32767))
    np.testing.assert_array_equal(codec.decode(fmt, blocks, 2 * fmt.columns)[0], np.array(want, np.float32))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [-BIAS_LIMIT, -7, BIAS_LIMIT])
def test_every_seed_decodes_to_the_formula_in_both_decoders(name, bias, windows):
    """All 65,535 seeds with random coefficients and all codes: NumPy and mx give the same bits."""
    fmt = FORMATS[name]
    cols = fmt.columns * 65536
    blocks = random_blocks(fmt, np.random.default_rng(2), 1, cols, bias)
    got = codec.decode(fmt, blocks, cols)
    states = windows[blocks.seeds[0].astype(int) - 1, : fmt.columns * fmt.states] - 32768
    isum = (states.reshape(-1, fmt.columns, fmt.states) * blocks.coefficients[0][:, None].astype(int)).sum(-1)
    assert np.abs(isum).max() < 1 << 20
    scale = (2.0 ** (blocks.codes[0].astype(float) - 8 + bias) / 32767).astype(np.float32)
    np.testing.assert_array_equal(got[0], (isum.astype(np.float32) * scale[:, None]).reshape(-1))
    arrays = {key: mx.array(value) for key, value in codec.pack(fmt, blocks).items()}
    np.testing.assert_array_equal(np.array(codec.decode_ops(fmt, cols, arrays)), got)
    half = np.array(codec.decode_ops(fmt, cols, arrays, mx.float16))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, got.astype(np.float16))


@pytest.mark.parametrize("name", FORMATS)
def test_ops_product_and_rows(name):
    fmt, rng = FORMATS[name], np.random.default_rng(3)
    blocks = random_blocks(fmt, rng, 7, 100)
    arrays = {key: mx.array(value) for key, value in codec.pack(fmt, blocks).items()}
    dense = codec.decode(fmt, blocks, 100)
    x = rng.standard_normal((2, 3, 100)).astype(np.float32)
    got = np.array(codec.matmul_ops(fmt, arrays, mx.array(x)))
    np.testing.assert_allclose(got, x @ dense.T, rtol=0, atol=1e-5 * np.abs(x @ dense.T).max())  # sums of 100 in fp32
    ids = np.array([[6, 0], [3, 3]])
    np.testing.assert_array_equal(np.array(codec.rows_ops(fmt, 100, arrays, mx.array(ids))), dense[ids])


def damaged(change):
    fmt = FORMATS["4.5"]
    arrays = codec.pack(fmt, random_blocks(fmt, np.random.default_rng(4), 2, 32))
    change(arrays)
    return fmt, arrays


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a["seeds"].__setitem__((1, 2), 0), "x: wanted seeds 1 to 65535, got 0 at row 1, block 2"),
        (lambda a: a["exponent_bias"].__setitem__(0, 97), "x: exponent_bias: wanted -96 to 96, got 97"),
        (lambda a: a.update(seeds=a["seeds"][:, :3]), r"x: seeds: wanted uint16 \(2, 4\), got uint16 \(2, 3\)"),
        (lambda a: a.update(exponents=a["exponents"].astype(np.int8)), r"x: exponents: wanted uint8 .*, got int8"),
        (lambda a: a.pop("exponents"), "wanted arrays .*'exponents'.*got"),
    ],
)
def test_damaged_arrays_are_refused(change, complaint):
    fmt, arrays = damaged(change)
    with pytest.raises(MlxeffError, match=complaint):
        codec.unpack(fmt, 2, 32, arrays, "x")


def test_blocks_that_cannot_be_stored_are_refused():
    fmt = FORMATS["4"]
    good = random_blocks(fmt, np.random.default_rng(5), 2, 32)
    for field, value, complaint in (
        ("coefficients", good.coefficients + 8, "coefficients: wanted -8 to 7"),
        ("codes", good.codes + 16, "codes: wanted 0 to 15"),
        ("seeds", good.seeds[:, :1], "of shapes"),
    ):
        with pytest.raises(MlxeffError, match=complaint):
            codec.pack(fmt, codec.Blocks(**{**vars(good), field: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", 2), ("taps", [0, 1, 3, 13]), ("register_bits", 17), ("seed", "paper"), ("taps", None)],
)
def test_another_header_is_refused(key, value):
    check_header(header(), "config.json")
    with pytest.raises(MlxeffError, match=f"config.json: SeedLM header: {key}: wanted"):
        check_header({**header(), key: value}, "config.json")


def test_headers_and_formats_that_are_none():
    with pytest.raises(MlxeffError, match="missing key 'taps'"):
        check_header({"version": 1, "register_bits": 16}, "x")
    with pytest.raises(MlxeffError, match="wanted a table"):
        check_header(None, "x")
    with pytest.raises(MlxeffError, match=r"wanted 3, 4, 4.5 bits, got 5"):
        block_format(5)
    assert block_format(4) is FORMATS["4"]
    with pytest.raises(MlxeffError, match="wanted arrays"):
        check_arrays(FORMATS["4"], 1, 8, {}, "x")
