"""The decode loop with a mock model that counts its calls, and with a tiny real one against a loop without a cache."""

import contextlib
import itertools
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from helpers import assert_close
from mlxeff import MlxeffError
from mlxeff.decode import decode, prefill
from mlxeff.ops import mlx_only
from mlxeff.running import EXACT, RunOptions, Tally
from mlxeff.sampling import make_logits_processors, make_sampler
from tiny_model import CONFIG, quantise_folder, random_model, write_tiny_model

VOCABULARY = 50
GREEDY = make_sampler()


class MockCache:
    """Holds the tokens themselves, and notes what it is asked."""

    kind = None

    def __init__(self, rewinds: bool = True):
        self.rewinds, self.tokens, self.log, self.tally = rewinds, [], [], Tally()

    @property
    def length(self) -> int:
        return len(self.tokens)

    def reserve(self, tokens: int) -> None:
        self.log.append(("reserve", tokens))

    def arrays(self) -> list:
        self.log.append(("arrays", self.length))
        return []

    def rewind(self, length: int) -> int:
        if self.rewinds:
            self.log.append(("rewind", length - len(self.tokens)))
            del self.tokens[length:]
        return len(self.tokens)


class MockModel:
    """The next token is the sum of all tokens so far, so any token lost or fed twice changes all that follow."""

    def __init__(self, fail_at: int | None = None):
        self.calls, self.fail_at = [], fail_at

    def last_logits(self, tokens: mx.array, cache: MockCache, options: RunOptions = EXACT) -> mx.array:
        assert tokens.shape[0] == 1
        self.calls.append(tokens.shape[1])
        if len(self.calls) == self.fail_at:
            raise RuntimeError("out of memory")
        cache.tokens += tokens[0].tolist()
        return (mx.arange(VOCABULARY)[None] == sum(cache.tokens) % VOCABULARY).astype(mx.float32) * 10


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]


def continuation(count: int, tokens: list[int] = PROMPT) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(sum(tokens) % VOCABULARY)
    return tokens[-count:]


def start(rewinds: bool = True, **more) -> tuple[MockModel, MockCache, mx.array]:
    model, cache = MockModel(**more), MockCache(rewinds)
    return model, cache, prefill(model, cache, mx.array(PROMPT), 64)


@pytest.mark.parametrize(
    ("step", "chunks"), [(1, [1] * 10), (3, [3, 3, 3, 1]), (4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (64, [10])]
)
def test_prefill_in_chunks(step, chunks):
    """Between chunks the cache is evaluated, after the last it is not; the prompt and the first token are reserved."""
    model, cache, progress = MockModel(), MockCache(), []
    logits = prefill(model, cache, mx.array(PROMPT), step, lambda done, total: progress.append((done, total)))
    assert model.calls == chunks
    assert cache.tokens == PROMPT
    starts = [0, *itertools.accumulate(chunks)][:-1]
    assert progress == [(done, 10) for done in starts]
    assert cache.log == [("reserve", 11)] + [("arrays", done) for done in starts[1:]]
    assert logits.shape == (1, VOCABULARY)
    assert logits.argmax().item() == sum(PROMPT) % VOCABULARY


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens_costs_one_call_less(count):
    model, cache, logits = start()
    steps = list(decode(model, cache, logits, GREEDY, max_tokens=count))
    assert [step.token for step in steps] == continuation(count)
    assert model.calls == [10] + [1] * (count - 1)
    assert cache.tokens == PROMPT + continuation(count)[:-1]
    assert not any(entry[0] == "rewind" for entry in cache.log)


def test_a_step_is_what_it_says():
    model, cache, logits = start()
    (step,) = decode(model, cache, logits, GREEDY, max_tokens=1)
    assert type(step.token) is int
    assert step.from_draft is False
    assert_close(step.logprobs, (logits - mx.logsumexp(logits))[0], "log-probabilities")
    assert_close(mx.exp(step.logprobs).sum(), 1.0, "they sum to one")
    model, cache, logits = start()
    for step in decode(model, cache, logits, GREEDY, max_tokens=5):
        assert step.logprobs.argmax().item() == step.token, "each has its own"


@pytest.fixture(params=["cpu", "gpu"])
def in_flight(request, monkeypatch):
    """How many steps `decode` launches ahead on a device."""
    monkeypatch.setattr("mlxeff.decode.device", lambda: request.param)
    return int(request.param == "gpu")


def test_one_token_is_in_flight_on_a_gpu(in_flight):
    """When the consumer has token n, the step that reads it is launched already; before the last one none is."""
    model, cache, logits = start()
    for count, step in enumerate(decode(model, cache, logits, GREEDY, max_tokens=6), start=1):
        assert len(model.calls) - 1 == min(count - 1 + in_flight, 5)
        assert step.token == continuation(count)[-1]


@pytest.mark.parametrize("taken", [1, 2, 5])
@pytest.mark.parametrize("limit", [-1, 20])
def test_closing_early_takes_back_the_step_in_flight(taken, limit, in_flight):
    model, cache, logits = start()
    steps = decode(model, cache, logits, GREEDY, max_tokens=limit)
    got = [step.token for step in itertools.islice(steps, taken)]
    assert cache.length == 10 + taken - 1 + in_flight
    steps.close()
    assert got == continuation(taken)
    assert cache.tokens == PROMPT + got[:-1]
    assert (cache.log[-1:] == [("rewind", -1)]) == bool(in_flight)
    logits = model.last_logits(mx.array([[got[-1]]]), cache)
    assert [s.token for s in decode(model, cache, logits, GREEDY, max_tokens=3)] == continuation(taken + 3)[taken:]


def test_closing_before_the_first_step_leaves_the_prompt():
    model, cache, logits = start()
    steps = decode(model, cache, logits, GREEDY)
    steps.close()
    assert cache.tokens == PROMPT
    assert model.calls == [10]


def test_a_cache_that_takes_nothing_back_keeps_the_step_in_flight(in_flight):
    model, cache, logits = start(rewinds=False)
    steps = decode(model, cache, logits, GREEDY)
    got = [step.token for step in itertools.islice(steps, 3)]
    steps.close()
    assert cache.tokens == PROMPT + got[: 2 + in_flight]
    assert not any(entry[0] == "rewind" for entry in cache.log)


def test_a_failing_model_leaves_the_cache_consistent(in_flight):
    """The fourth call is the third token's: three were yielded, or two where it was launched ahead, and the second one,
    which is in the cache, is taken back."""
    model, cache, logits = start(fail_at=4)
    got = []
    with pytest.raises(RuntimeError, match="out of memory"):
        got.extend(step.token for step in decode(model, cache, logits, GREEDY))
    assert got == continuation(3 - in_flight)
    assert cache.tokens == PROMPT + got[:-1]


def test_processors_see_the_prompt_and_every_token():
    seen = []

    def forbid_last(history: mx.array, logits: mx.array) -> mx.array:
        seen.append(history.tolist())
        return mx.where(mx.arange(VOCABULARY)[None] == history[-1], -mx.inf, logits)

    model, cache, logits = start()
    steps = decode(model, cache, logits, GREEDY, [forbid_last, forbid_last], mx.array(PROMPT), max_tokens=5)
    got = [step.token for step in steps]
    assert seen[::2] == seen[1::2] == [PROMPT + got[:n] for n in range(5)]
    assert all(a != b for a, b in itertools.pairwise([PROMPT[-1], *got]))


def test_processors_are_applied_in_their_order():
    model, cache, logits = start()
    processors = [lambda _, logits: logits * 0 + mx.arange(VOCABULARY)[None], lambda _, logits: -logits]
    steps = decode(model, cache, logits, GREEDY, processors, mx.array(PROMPT), max_tokens=3)
    assert [step.token for step in steps] == [0, 0, 0]


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "windowed"])
def test_greedy_tokens_equal_a_loop_without_a_cache(kind, processed):
    config = CONFIG | ({"model_type": "mistral", "sliding_window": 8} if kind == "windowed" else {})
    model = random_model(config, seed=2)
    tokens = np.random.default_rng(0).integers(0, 256, 21).tolist()
    processors = make_logits_processors(repetition_penalty=1.5, logit_bias={7: 3.0}) if processed else []
    want = list(tokens)
    for _ in range(30):
        logits = model(mx.array([want]), model.new_cache())[:, -1]
        for process in processors:
            logits = process(mx.array(want), logits)
        want.append(logits.argmax().item())
    cache = model.new_cache()
    logits = prefill(model, cache, mx.array(tokens), 8)
    steps = decode(model, cache, logits, GREEDY, processors, mx.array(tokens), max_tokens=30)
    got = [step.token for step in steps]
    assert got == want[21:]
    assert len(set(got)) > 3, "a constant sequence would compare nothing"


@pytest.mark.parametrize("options", [{"temp": 0.0}, {"temp": 1.0}, {"temp": 0.7, "top_p": 0.9}])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bad", [[mx.nan], [0.0] * 9 + [mx.nan], [mx.inf], [0.0] * 9 + [mx.inf], [-mx.inf] * 261])
def test_logits_that_are_no_numbers_are_one_line(options, native, dtype, bad):
    """Greedy and sampled, by the native kernels and by MLX: no token is made of them."""
    model, cache, logits = start()
    logits = mx.concatenate([mx.array(bad), logits[0, len(bad) :]])[None].astype(dtype)
    with contextlib.nullcontext() if native else mlx_only():
        steps = decode(model, cache, logits, make_sampler(**options), max_tokens=3)
        with pytest.raises(MlxeffError, match=r"^decoding: wanted logits without NaN and \+inf, one above -inf, got"):
            next(steps)


def test_a_weight_that_is_no_number_is_one_line(tmp_path):
    """A NaN scale in a file: the command ends with a line and exit code 1, greedy and sampled, not with an empty
    answer."""
    folder = quantise_folder(write_tiny_model(tmp_path / "tiny"))
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    weights["model.layers.1.mlp.down_proj.scales"][3, 0] = mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    for temperature in ("0", "1"):
        command = [sys.executable, "-m", "mlxeff", "generate", "Hi", "--model", str(folder), "--temp", temperature]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.splitlines()[-1].startswith("mlxeff: error: decoding: wanted logits without NaN")
