"""Samplers and logits processors against NumPy written from their definitions, and against mlx-lm's; draws by
chi-square; refused values.
"""

import contextlib

import mlx.core as mx
import numpy as np
import pytest

from helpers import assert_close
from mlxeff import MlxeffError, kernels
from mlxeff.ops import log_softmax, mlx_only
from mlxeff.sampling import draw, keep_min_p, keep_top_k, keep_top_p, make_logits_processors, make_sampler

VOCABULARY = 40
# Upper quantile of chi-square at 1e-6 by Wilson and Hilferty: one false alarm in a million, and the seed is fixed.
CHI_SQUARE = {df: df * (1 - 2 / (9 * df) + 4.753 * (2 / (9 * df)) ** 0.5) ** 3 for df in range(1, VOCABULARY)}


def logprobs_of(logits: np.ndarray) -> mx.array:
    logits = mx.array(logits, mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def random_logits(rows: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, VOCABULARY)).astype(np.float32) * 3


def hostile_logits() -> np.ndarray:
    """Rows with ties, with -inf, with one value far above the rest, all but one impossible, and all equal."""
    rows = random_logits(5, seed=9)
    rows[0] = np.round(rows[0])
    rows[1, ::2] = -np.inf
    rows[2, 7] = 1e4
    rows[3] = np.where(np.arange(VOCABULARY) == 3, 0.0, -np.inf)
    rows[4] = 1e6
    return rows


def kept(filtered: mx.array) -> np.ndarray:
    return np.array(filtered) > -np.inf


def softmax(row: np.ndarray) -> np.ndarray:
    shifted = np.exp(row.astype(np.float64) - row.max())
    return shifted / shifted.sum()


@pytest.fixture(params=["native", "mlx"])
def arithmetic(request):
    """Both ways to draw; one and the same where the native kernels are not built."""
    with mlx_only() if request.param == "mlx" else contextlib.nullcontext():
        yield


LOGITS = {"random": random_logits(), "hostile": hostile_logits()}


@pytest.mark.parametrize("kind", LOGITS)
def test_greedy(kind, arithmetic):
    logits = LOGITS[kind]
    got = make_sampler()(logprobs_of(logits))
    assert got.tolist() == logits.argmax(axis=-1).tolist()
    assert make_sampler(temp=1e-45)(logprobs_of(logits)).tolist() == got.tolist()
    assert make_sampler(temp=0, top_p=0.5, top_k=3, min_p=0.2)(logprobs_of(logits)).tolist() == got.tolist()


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("top_k", [1, 2, 7, VOCABULARY - 1])
def test_top_k(kind, top_k):
    """Exactly k places are kept, and none dropped is larger than one kept; values stay as they were."""
    logprobs = logprobs_of(LOGITS[kind])
    got, values = np.array(keep_top_k(logprobs, top_k)), np.array(logprobs)
    for row, given in zip(got, values):
        largest = np.sort(given)[::-1][:top_k]
        assert np.sort(row)[::-1][:top_k].tolist() == largest.tolist()
        assert np.isneginf(row).sum() >= VOCABULARY - top_k
        assert ((row == given) | np.isneginf(row)).all()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(top_p):
    """The smallest set of most probable tokens whose mass reaches p."""
    logits = random_logits(20, seed=2)
    got = kept(keep_top_p(logprobs_of(logits), top_p))
    for row, mask in zip(logits, got):
        probabilities = softmax(row)
        order = np.argsort(-probabilities)
        count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
        assert set(np.flatnonzero(mask)) == set(order[:count])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.99])
def test_top_p_of_hostile_rows(top_p):
    """With ties the set is not unique: its mass reaches p, and without its least token it would not."""
    logits = hostile_logits()
    got = kept(keep_top_p(logprobs_of(logits), top_p))
    for row, mask in zip(logits, got):
        probabilities = softmax(row)
        chosen = probabilities[mask]
        assert mask.any()
        assert chosen.sum() >= top_p - 1e-6
        assert chosen.sum() - chosen.min() < top_p + 1e-6
        assert chosen.min() >= probabilities[~mask].max(initial=0)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9])
def test_min_p(kind, min_p):
    logits = LOGITS[kind]
    got = kept(keep_min_p(logprobs_of(logits), min_p))
    for row, mask in zip(logits, got):
        probabilities = softmax(row)
        assert mask.tolist() == (probabilities >= min_p * probabilities.max()).tolist()


def test_min_p_keeps_a_minimum():
    logits = random_logits(8, seed=4)
    got = kept(keep_min_p(logprobs_of(logits), 0.99, min_tokens_to_keep=3))
    for row, mask in zip(logits, got):
        assert set(np.flatnonzero(mask)) >= set(np.argsort(-row)[:3])
        assert mask.sum() == 3
    assert kept(keep_min_p(logprobs_of(logits), 0.99, min_tokens_to_keep=1000)).all()


@pytest.mark.parametrize("ours", [keep_top_k, keep_top_p, keep_min_p])
def test_filters_equal_mlx_lms(ours):
    from mlx_lm import sample_utils

    theirs = getattr(sample_utils, ours.__name__.replace("keep", "apply"))
    values = (1, 5, 39) if ours is keep_top_k else (0.05, 0.5, 0.95)
    for value in values:
        logprobs = logprobs_of(random_logits(50, seed=5))
        assert_close(ours(logprobs, value), theirs(logprobs, value), f"{ours.__name__} {value}", rtol=0, atol=0)


def expected(logits: np.ndarray, temp: float, top_p: float = 0, min_p: float = 0, top_k: int = 0) -> np.ndarray:
    """The distribution that the sampler's documentation promises: the filters in their order, then the temperature."""
    row = logits.astype(np.float64).copy()
    if top_p:
        order = np.argsort(-row)
        before = np.cumsum(softmax(row)[order]) - softmax(row)[order]
        row[order[before >= top_p]] = -np.inf
    if min_p:
        row[softmax(row) < min_p * softmax(row).max()] = -np.inf
    if top_k:
        row[np.argsort(-row)[top_k:]] = -np.inf
    return softmax(row / temp)


SAMPLED = [
    {"temp": 1.0},
    {"temp": 0.5},
    {"temp": 1.7},
    {"temp": 0.8, "top_k": 5},
    {"temp": 1.3, "top_p": 0.8},
    {"temp": 1.0, "min_p": 0.1},
    {"temp": 1.5, "top_p": 0.95, "min_p": 0.02, "top_k": 6},
]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_draws_follow_the_distribution(options, arithmetic):
    """Pearson's chi-square of 40,000 draws; tokens expected fewer than 5 times are counted together."""
    logits = random_logits(1, seed=11)[0] / 2
    draws, want = 40_000, expected(logits, **options)
    mx.random.seed(1)
    tokens = make_sampler(**options)(mx.broadcast_to(logprobs_of(logits), (draws, VOCABULARY)))
    counts = np.bincount(np.array(tokens), minlength=VOCABULARY)
    assert counts[want == 0].sum() == 0, "a filtered token was drawn"
    rare = want * draws < 5
    got = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(want[~rare], want[rare].sum()) * draws
    got, wanted = got[wanted > 0], wanted[wanted > 0]
    statistic = ((got - wanted) ** 2 / wanted).sum()
    assert statistic < CHI_SQUARE[len(wanted) - 1], f"chi-square {statistic:.1f} of {len(wanted)} classes"


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_the_distribution_is_the_one_that_tokens_are_drawn_from(options, kind, arithmetic):
    """Against the definition, row by row; it sums to one, and what a filter drops is impossible."""
    logits = LOGITS[kind]
    got = np.array(make_sampler(**options).distribution(logprobs_of(logits)))
    for row, given in zip(got, logits):
        if len(set(given.tolist())) < len(given):
            continue  # of equal logits the definition does not say which are kept
        want = expected(given, **options)
        assert not np.exp(row)[want == 0].any()
        assert want[np.isneginf(row)].max(initial=0) == 0
        assert_close(mx.array(np.exp(row)), mx.array(want.astype(np.float32)), "probabilities")
    assert_close(mx.array(np.exp(got.astype(np.float64)).sum(-1).astype(np.float32)), mx.ones(len(got)), "sums")


@pytest.mark.parametrize("kind", LOGITS)
def test_the_distribution_of_a_greedy_sampler_is_one_certain_token(kind, arithmetic):
    sampler, logprobs = make_sampler(temp=0, top_p=0.5), logprobs_of(LOGITS[kind])
    got = mx.exp(sampler.distribution(logprobs))
    assert_close(got.sum(axis=-1), mx.ones(len(LOGITS[kind])), "sums", rtol=0, atol=0)
    assert got.argmax(axis=-1).tolist() == sampler(logprobs).tolist()


def test_the_distribution_comes_after_the_penalties():
    """What `decode` hands to the sampler is the log-probabilities after the logits processors."""
    logits, tokens = mx.array(random_logits(1)), mx.array([3, 3, 5])
    (process,) = make_logits_processors(repetition_penalty=2.0)
    sampler = make_sampler(temp=0.7, top_k=4)
    penalised = process(tokens, logits)
    got = sampler.distribution(logprobs_of(penalised))
    assert mx.abs(penalised - logits).max().item() > 0
    want = expected(np.array(penalised)[0], temp=0.7, top_k=4)
    assert_close(mx.exp(got)[0], mx.array(want.astype(np.float32)), "probabilities")


def test_the_test_of_draws_can_fail():
    """Draws at another temperature lie far outside the same bound."""
    logits = random_logits(1, seed=11)[0] / 2
    mx.random.seed(1)
    tokens = make_sampler(temp=1.1)(mx.broadcast_to(logprobs_of(logits), (40_000, VOCABULARY)))
    wanted = expected(logits, 1.0) * 40_000
    counts = np.bincount(np.array(tokens), minlength=VOCABULARY)
    assert ((counts - wanted) ** 2 / wanted).sum() > CHI_SQUARE[VOCABULARY - 1]


def test_one_seed_one_sequence(arithmetic):
    logprobs, sample = logprobs_of(random_logits(1)), make_sampler(temp=1.0, top_p=0.9)

    def draw(seed: int) -> list[int]:
        mx.random.seed(seed)
        return [sample(logprobs).item() for _ in range(30)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def needs_native():
    native, reason = kernels.native()
    if native is None or kernels.device() != "cpu":
        pytest.skip(reason or "the device is a GPU")
    return native


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}, {"top_p": 0.95, "top_k": 400}])
def test_the_native_kernel_inverts_the_distribution_of_mlxs_filters(options):
    """At evenly spaced numbers each token comes as often as the filtered softmax says, give or take one."""
    native, rows, vocabulary = needs_native(), 8_000, 5_003
    logits = np.random.default_rng(6).standard_normal(vocabulary).astype(np.float32) * 3
    want = expected(logits, 0.7, **options) * rows
    settings = {"top_p": 0.0, "min_p": 0.0, "top_k": 0} | options
    u = mx.array((np.arange(rows) + 0.5) / rows, mx.float32)
    tokens = native.sample(mx.broadcast_to(mx.array(logits), (rows, vocabulary)), u, 0.7, **settings)
    counts = np.bincount(np.array(tokens), minlength=vocabulary)
    # One for the spacing at each end; rounding u to 2^-25 moves an end by less than a thousandth of the spacing.
    assert np.abs(counts - want).max() < 1.01
    assert counts[want == 0].sum() == 0


def test_a_minimum_of_tokens_to_keep_is_drawn_by_mlx():
    mx.random.seed(2)
    logprobs = mx.broadcast_to(logprobs_of(random_logits(1)), (500, VOCABULARY))
    tokens = make_sampler(temp=1.0, min_p=0.99, min_tokens_to_keep=3)(logprobs)
    assert set(tokens.tolist()) == set(np.argsort(-random_logits(1)[0])[:3].tolist())


def test_one_seed_draws_the_same_on_any_number_of_threads_and_in_a_batch():
    native, logprobs = needs_native(), logprobs_of(random_logits(8))
    draws = []
    try:
        for threads in (1, 2, 5):
            native.set_num_threads(threads)
            mx.random.seed(4)
            draws.append(make_sampler(temp=1.2, top_p=0.95)(logprobs).tolist())
    finally:
        native.set_num_threads(0)
    assert draws[0] == draws[1] == draws[2]
    mx.random.seed(4)
    u = mx.random.uniform(shape=(8,))
    alone = [native.sample(logprobs[i : i + 1], u[i : i + 1], 1.2, 0, 0.95, 0.0).item() for i in range(8)]
    assert alone == draws[0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temp": 0.9}, {"temp": 1.3, "top_p": 0.9}, {"temp": 1.0, "top_k": 5}])
def test_drawing_in_one_call_equals_its_steps(options, dtype):
    """Bit by bit: log-probabilities, the sampler, the token's own one; also of logits that are not evaluated yet and
    have gaps in memory."""
    needs_native()
    sampler = make_sampler(**options)
    logits = mx.array(random_logits(5)).astype(dtype)
    wide = mx.concatenate([logits, logits], axis=-1)
    mx.random.seed(6)
    logprobs = log_softmax(logits)
    tokens = sampler(logprobs)
    for given in (logits, wide[:, :VOCABULARY]):
        mx.random.seed(6)
        got_tokens, got_logprobs, own = draw(sampler, given)
        assert (got_tokens.dtype, got_logprobs.dtype, own.dtype) == (mx.uint32, dtype, dtype)
        assert got_tokens.tolist() == tokens.tolist()
        assert mx.array_equal(got_logprobs, logprobs)
        assert mx.array_equal(own, mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0])


def test_drawing_with_a_sampler_of_ones_own(arithmetic):
    """Any function of log-probabilities serves, as in mlx-lm."""
    logits = mx.array(random_logits(5))
    tokens, logprobs, own = draw(lambda logprobs: mx.argmin(logprobs, axis=-1), logits)
    assert_close(logprobs, logprobs_of(random_logits(5)), "log-probabilities")
    assert mx.array_equal(tokens, mx.argmin(logits, axis=-1))
    assert mx.array_equal(own, logprobs.min(axis=-1))


def test_drawing_refuses_what_does_not_fit():
    native = needs_native()
    logits = mx.array(random_logits(2))
    for wrong, message in (
        (lambda: native.next_token(logits[0], 0.0, 0, 0.0, 0.0), r"logits of shape \(B, V\), got float32 \(40,\)"),
        (lambda: native.next_token(logits, 1.0, 0, 0.0, 0.0, mx.zeros(3)), r"u in \[0, 1\), float32 \(B\), got"),
        (lambda: native.next_token(logits, 1.0, 0, 0.0, 0.0), "wanted u"),
        (lambda: native.next_token(logits.astype(mx.int32), 0.0, 0, 0.0, 0.0), "wanted a float32, float16 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(RuntimeError, match="wanted logits without NaN"):
        native.next_token(logits * mx.nan, 1.0, 0, 0.0, 0.0, mx.zeros(2))


def test_impossible_tokens_are_never_drawn(arithmetic):
    logits = hostile_logits()
    mx.random.seed(0)
    for options in (
        {"temp": 1.0},
        {"temp": 5.0, "top_p": 0.99},
        {"temp": 5.0, "min_p": 0.01},
        {"temp": 5.0, "top_k": 30},
    ):
        for _ in range(50):
            tokens = make_sampler(**options)(logprobs_of(logits)).tolist()
            assert all(logits[row, token] > -np.inf for row, token in enumerate(tokens))
            assert tokens[2:4] == [7, 3]


def reference_processor(name: str, value: float, history: list[int], logits: np.ndarray) -> np.ndarray:
    out = logits.copy()
    for token in history if name == "frequency" else set(history):
        column = out[:, token]
        if name == "repetition":
            out[:, token] = np.where(column < 0, column * value, column / value)
        else:
            out[:, token] = column - value
    return out


HISTORIES = {"none": [], "one": [3], "repeats": [3, 3, 5, 3, 39, 0], "long": [*range(40), *range(0, 40, 3), 1, 1]}


@pytest.mark.parametrize("context", [None, 1, 5, 20])
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(
    ("name", "value"), [("repetition", 1.3), ("repetition", 0.7), ("presence", 0.5), ("frequency", 0.4)]
)
def test_penalties(name, value, history, context):
    from mlx_lm import sample_utils

    tokens, logits = HISTORIES[history], random_logits(2, seed=6)
    options = {f"{name}_penalty": value, f"{name}_context_size": context}
    (process,) = make_logits_processors(**options)
    got = process(mx.array(tokens, mx.int32), mx.array(logits))
    recent = tokens if context is None else tokens[-context:]
    assert_close(got, reference_processor(name, value, recent, logits), f"{name} against NumPy", atol=1e-6)
    if context is not None:
        (theirs,) = sample_utils.make_logits_processors(**options)
        want = theirs(mx.array(tokens, mx.int32), mx.array(logits))
        assert_close(got, want, f"{name} against mlx-lm", rtol=0, atol=0)


def test_logit_bias():
    from mlx_lm import sample_utils

    logits, bias = random_logits(2, seed=7), {3: -100.0, 39: 2.5}
    (process,), (theirs,) = (
        make_logits_processors(logit_bias=bias),
        sample_utils.make_logits_processors(logit_bias=bias),
    )
    want = logits.copy()
    want[:, 3] -= 100
    want[:, 39] += 2.5
    got = process(mx.array([1]), mx.array(logits))
    assert_close(got, want, "logit bias", rtol=0, atol=0)
    assert_close(got, theirs(mx.array([1]), mx.array(logits)), "logit bias against mlx-lm", rtol=0, atol=0)
    half = process(mx.array([1]), mx.array(logits).astype(mx.float16))
    assert half.dtype == mx.float16


def test_processors_leave_their_input_alone():
    logits = mx.array(random_logits(1))
    before = np.array(logits)
    options = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {1: 5.0}}
    for process in make_logits_processors(**options):
        process(mx.array([1, 2, 3]), logits)
    assert_close(logits, before, "the given logits", rtol=0, atol=0)


def test_which_options_make_processors():
    assert make_logits_processors() == []
    assert make_logits_processors({}, 0, presence_penalty=0.0, frequency_penalty=None) == []
    assert len(make_logits_processors({1: 1.0}, 1.1, 20, 0.1, 20, 0.1, 20)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temp": -0.1}, "temperature: wanted 0 or more, got -0.1"),
        ({"temp": float("nan")}, "temperature: wanted 0 or more, got nan"),
        ({"temp": float("inf")}, "temperature: wanted 0 or more, got inf"),
        ({"temp": 1, "top_p": 1.5}, "top-p: wanted 0 to 1, got 1.5"),
        ({"temp": 1, "top_p": -1}, "top-p: wanted 0 to 1, got -1"),
        ({"temp": 1, "min_p": 2}, "min-p: wanted 0 to 1, got 2"),
        ({"temp": 1, "top_k": -1}, "top-k: wanted a whole number, 0 or more, got -1"),
        ({"temp": 1, "top_k": 2.5}, "top-k: wanted a whole number, 0 or more, got 2.5"),
        ({"temp": 1, "min_p": 0.1, "min_tokens_to_keep": 0}, "min_tokens_to_keep: wanted 1 or more, got 0"),
    ],
)
def test_refused_sampler_options(options, message):
    with pytest.raises(MlxeffError) as caught:
        make_sampler(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": -1.0}, "repetition penalty: wanted more than 0, got -1.0"),
        ({"repetition_penalty": 1.1, "repetition_context_size": 0}, "context size: wanted 1 or more, or None, got 0"),
        ({"presence_penalty": 1.0, "presence_context_size": -3}, "context size: wanted 1 or more, or None, got -3"),
        ({"frequency_penalty": 1.0, "frequency_context_size": 0}, "context size: wanted 1 or more, or None, got 0"),
    ],
)
def test_refused_penalties(options, message):
    with pytest.raises(MlxeffError) as caught:
        make_logits_processors(**options)
    assert str(caught.value) == message
