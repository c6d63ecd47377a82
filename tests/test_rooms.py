"""What the seams promise: a technique is added by an entry in `assembly.techniques`, and the command line, generation
and the decode loop carry it without knowing it. The techniques here are toys of a few lines. About 5 seconds.

`BlockLayer` is a KV cache that changes its storage when it is full, takes back only what lies in its newest tokens or
whole blocks, and has another form in a file: what a quantised cache does.
"""

import itertools
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxeff import MlxeffError, RunOptions, cache, cli, stream_generate
from mlxeff.assembly import techniques
from mlxeff.assembly.model import load_path
from mlxeff.assembly.options import option, positive
from mlxeff.assembly.techniques import Stored, Subcommand, Switched
from mlxeff.cache import KVCache
from mlxeff.decode import PlainReading, Setup, decode, prefill
from mlxeff.generation import Session
from mlxeff.ops import attention
from mlxeff.running import EXACT
from mlxeff.sampling import make_sampler
from tiny_model import CONFIG, random_model, write_tiny_model

BLOCK = 8


class BlockLayer:
    """Full blocks of BLOCK tokens, and up to 2 · BLOCK tokens after them in one buffer, flushed before an append."""

    storage = "blocks"
    stored_as = "blocks"

    def __init__(self, window=None):
        self.window, self.blocks, self.tail, self.flushes = window, [], None, 0

    @property
    def length(self) -> int:
        return len(self.blocks) * BLOCK + (0 if self.tail is None else self.tail[0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    @property
    def capacity(self) -> int:
        return self.length

    def append(self, keys, values):
        pair = keys, values
        if self.tail is not None:
            pair = tuple(mx.concatenate(both, axis=2) for both in zip(self.tail, pair, strict=True))
        while pair[0].shape[2] > 2 * BLOCK:
            self.blocks.append(tuple(mx.contiguous(each[:, :, :BLOCK]) for each in pair))
            pair = tuple(each[:, :, BLOCK:] for each in pair)
            self.flushes += 1
        self.tail = pair

    def attend(self, queries, keys, values, scale, options=EXACT):
        self.append(keys, values)
        held = [mx.concatenate(parts, axis=2) for parts in zip(*self.blocks, self.tail, strict=True)]
        return attention(queries, *held, scale, self.window)

    def rewind(self, length):
        kept = len(self.blocks) * BLOCK
        if length >= kept:
            self.tail = tuple(each[:, :, : length - kept] for each in self.tail) if self.tail else None
        else:
            self.blocks, self.tail = self.blocks[: length // BLOCK], None
        return self.length

    def reserve(self, tokens):
        pass

    def arrays(self):
        return [array for pair in [*self.blocks, *([self.tail] if self.tail else [])] for array in pair]

    def saved(self):
        return {f"part{i}.{kind}": a for i, pair in enumerate([*self.blocks, self.tail]) for kind, a in zip("kv", pair)}

    def restore(self, arrays, tokens):
        pairs = [(arrays[f"part{i}.k"], arrays[f"part{i}.v"]) for i in range(len(arrays) // 2)]
        self.blocks, self.tail = pairs[:-1], pairs[-1]
        if self.length != tokens:
            raise ValueError(f"blocks of {tokens} tokens")


@pytest.fixture
def blocks(monkeypatch):
    """A kind of cache that a technique has registered."""
    monkeypatch.setitem(cache.KINDS, "blocks", lambda shape: BlockLayer(shape.window))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=4)


PROMPT = mx.array(np.random.default_rng(3).integers(0, 256, 21))


class Silent:
    """A detokenizer that shows nothing."""

    last_segment = ""

    def add_token(self, token):
        pass

    def finalize(self):
        pass


class Tokenizer:
    """Ids only: nothing ends an answer."""

    eos_token_ids = frozenset()
    bos_token = None
    detokenizer = Silent()


def greedy(model, kind, count, stop=None):
    """(tokens, the cache) of a greedy answer; the consumer stops after `stop` of `count` tokens."""
    held = model.new_cache(kind)
    logits = prefill(model, held, PROMPT, 6)
    steps = decode(model, held, logits, make_sampler(), max_tokens=count)
    tokens = [step.token for step in itertools.islice(steps, stop)]
    steps.close()
    return tokens, held


def test_a_step_in_flight_is_safe_with_a_cache_that_changes_its_storage(model, blocks):
    """Stopped after every number of tokens, around several flushes: the cache holds what was promised, and what it
    holds goes on as the plain one."""
    want, _ = greedy(model, None, 40)
    assert len(set(want)) > 3
    flushes = set()
    for stop in range(1, 40):
        got, held = greedy(model, "blocks", 40, stop)
        assert got == want[:stop]
        assert held.length == len(PROMPT) + stop - 1
        flushes.add(held.layers[0].flushes)
        logits = model.last_logits(mx.array([[got[-1]]]), held)
        assert logits.argmax().item() == want[stop]
    assert len(flushes) > 4


def test_a_session_recomputes_what_a_cache_cannot_restore(model, blocks, caplog):
    def answer(session, ids, kind):
        return [r.token for r in session.stream(ids, max_tokens=20, options=RunOptions(kv=kind))]

    session, ids = Session(model, Tokenizer()), PROMPT.tolist()
    first = answer(session, ids, "blocks")
    assert first == answer(Session(model, Tokenizer()), ids, None)
    changed = [*ids[:11], 7, *ids[12:]]
    assert answer(session, changed, "blocks") == answer(Session(model, Tokenizer()), changed, None)
    assert session.reused == BLOCK, "11 tokens agree, the cache can restore the first 8"
    assert "3 tokens recomputed" in caplog.text


def test_a_cache_of_another_kind_goes_to_a_file_and_back(model, blocks, tmp_path):
    tokens, held = greedy(model, "blocks", 20)
    ids = [*PROMPT.tolist(), *tokens[:-1]]
    held.save(tmp_path / "a.cache", ids, "m")
    restored = model.new_cache("blocks")
    assert restored.restore(tmp_path / "a.cache", "m") == ids
    last = mx.array([[tokens[-1]]])
    assert mx.array_equal(model.last_logits(last, restored), model.last_logits(last, held))
    plain = model.new_cache()
    with pytest.raises(MlxeffError, match="wanted a KV cache stored as dense, got blocks"):
        plain.restore(tmp_path / "a.cache", "m")
    assert plain.length == 0


def test_a_prompt_cache_of_another_kind_than_the_options_is_refused(model, blocks):
    with pytest.raises(MlxeffError, match="wanted a KV cache of the kind blocks, got one of the type"):
        next(
            stream_generate(model, Tokenizer(), [1, 2], prompt_cache=model.new_cache(), options=RunOptions(kv="blocks"))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fraction": 0.5},
            (
                "sensitivity 0.5: wanted a DynaMoE model (mlxeff fit dynamoe makes one), got one with dense "
                "feed-forward networks"
            ),
        ),
        ({"view": "draft"}, "KV cache: wanted a view of full, got 'draft'"),
    ],
)
def test_options_that_nothing_here_has_are_refused(model, options, message):
    with pytest.raises(MlxeffError) as caught:
        model(mx.array([[1, 2]]), model.new_cache(), RunOptions(**options))
    assert str(caught.value) == message


@pytest.mark.parametrize("fraction", [-0.1, -1, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(MlxeffError, match="wanted 0 to 1"):
        RunOptions(fraction=fraction)


class HalfFeedForward(nn.Module):
    """A feed-forward of which a fraction of the neurons can be left out; counts the calls by fraction."""

    fractions = True

    def __init__(self, whole):
        super().__init__()
        self.whole, self._calls = whole, []

    def __call__(self, x, options=EXACT):
        self._calls.append(options.fraction)
        return self.whole(x) * options.fraction


def test_a_feed_forward_that_can_be_cut_is_handed_the_options():
    model = random_model(CONFIG, seed=4)
    for layer in model.layers:
        layer[layer.FEED_FORWARD] = HalfFeedForward(layer.feed_forward)
    tokens = mx.array([[1, 2, 3]])
    whole, half = (model(tokens, model.new_cache(), RunOptions(fraction=f)) for f in (1.0, 0.5))
    assert mx.abs(whole - half).max().item() > 1e-2
    assert model.layers[0].feed_forward._calls == [1.0, 0.5]
    assert not model.use_native(), "the native decoder does not know this feed-forward"


class Backwards(PlainReading):
    """Reads a prompt in the opposite order: a reading that is not the plain one."""

    def __init__(self, times):
        self.times, self.seen = times, 0

    def read(self, model, cache, tokens, step_size, progress=None, options=EXACT):
        self.seen = tokens.shape[-1]
        for _ in range(self.times):
            tokens = tokens[..., ::-1]
        return prefill(model, cache, tokens, step_size, progress, options)

    def report(self):
        return {"backwards": {"times": self.times, "tokens": self.seen}}

    def summary(self):
        return f"read {self.times} times backwards"


@pytest.fixture
def backwards(monkeypatch):
    """The technique by its one entry."""

    def check(value, values):
        if getattr(values, "prompt_cache", None):
            raise MlxeffError("--backwards: not with --prompt-cache")

    technique = Switched(
        name="backwards",
        option=option("--backwards", metavar="N", type=positive, help="read the prompt backwards N times"),
        verbs=("generate", "bench ttft", "eval"),
        apply=lambda setup, base, value, offline: replace(setup, reading=Backwards(value)),
        label=lambda value: f"backwards {value}",
        identity=str,
        check=check,
    )
    monkeypatch.setattr(techniques, "SWITCHED", (*techniques.SWITCHED, technique))


def run(capsys, *arguments):
    code = cli.main([str(each) for each in arguments])
    return code, *capsys.readouterr()


def test_an_option_of_a_new_technique_reaches_generation_and_its_report(backwards, tiny_folder, capsys):
    base = ("generate", "Hello there", "--raw", "--model", tiny_folder, "--max-tokens", 4)
    plain, once, twice = (
        json.loads(run(capsys, *base, "--json", *more)[1])
        for more in ((), ("--backwards", 1), ("--backwards", 2))
    )  # fmt: skip
    assert plain["timings"]["backwards"] is None
    assert once["timings"]["backwards"] == {"times": 1, "tokens": len(plain["prompt_token_ids"])}
    assert twice["token_ids"] == plain["token_ids"] != once["token_ids"]
    assert "| read 1 times backwards |" in run(capsys, *base, "--backwards", 1)[2]
    code, _, err = run(capsys, *base, "--backwards", 1, "--prompt-cache", "x")
    assert (code, "--backwards: not with --prompt-cache" in err) == (1, True)


def test_a_new_technique_is_an_arm_of_the_benchmark(backwards, tiny_folder, capsys):
    arguments = ("--vs", "--backwards 3", "-p", 8, "-r", 1, "--json", "--quiet")
    code, out, _ = run(capsys, "bench", "ttft", tiny_folder, "--backwards", 1, *arguments)
    assert code == 0
    assert list(json.loads(out)["arms"]) == [f"{tiny_folder} --backwards {times}" for times in (1, 3)]


def test_a_new_technique_is_measured(backwards, tiny_folder, capsys):
    arguments = ("--context", 32, "--prompt", 16, "--tokens", 100, "--json", "--quiet")
    code, out, _ = run(capsys, "eval", "kl", tiny_folder, "--backwards", 1, *arguments)
    found = json.loads(out)
    assert (code, found["techniques"], found["against"]["techniques"]) == (0, {"backwards": "backwards 1"}, {})
    assert found["statistics"] == {"backwards": {"times": 1, "tokens": 16}}
    assert found["kl"] > 1e-6
    _, out, _ = run(capsys, "eval", "kl", tiny_folder, "--against-options", "--backwards 2", *arguments)
    assert json.loads(out)["kl"] == pytest.approx(0, abs=1e-6)


def test_a_new_fit_is_a_verb(monkeypatch, tmp_path, capsys):
    def fit(progress, count, out):
        with progress("counting", "tok") as show:
            assert show is None or callable(show)
        return {"out": out, "sum": sum(range(count))}

    monkeypatch.setenv("MLXEFF_CACHE", str(tmp_path / "cache"))  # where the command keeps what nobody expected
    options = (option("out", metavar="OUT"), option("--count", type=positive, default=4))
    entry = Subcommand("sum", "a sum", options, fit, lambda report: [f"the sum is {report['sum']}"])
    monkeypatch.setattr(techniques, "FITTED", (*techniques.FITTED, entry))
    with pytest.raises(TypeError, match="offline"):
        run(capsys, "fit", "sum", "x")  # every fit is told whether it may use the network
    entry = replace(entry, run=lambda progress, offline, **values: fit(progress, **values))
    monkeypatch.setattr(techniques, "FITTED", (*techniques.FITTED[:-1], entry))
    assert run(capsys, "fit", "sum", "x")[1] == "the sum is 6\n"
    assert json.loads(run(capsys, "fit", "sum", "x", "--count", 5, "--json")[1]) == {
        "out": "x",
        "sum": 10,
        "notices": [],
    }


def test_a_technique_that_a_checkpoint_names_is_checked_installed_and_finished(monkeypatch, tmp_path):
    log = []

    def install(model, config, tensors):
        log.append(("install", config["halving"], tensors is not None))
        for layer in model.layers:
            layer[layer.FEED_FORWARD]._halved = True

    entry = Stored(
        key="halving",
        check=lambda source: log.append(("check", source.path.name)),
        install=install,
        finish=lambda model, origin: log.append(("finish", origin)),
    )
    monkeypatch.setattr(techniques, "STORED", (*techniques.STORED, entry))
    folder = write_tiny_model(tmp_path / "tiny")
    plain = load_path(folder)
    assert log == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"halving": 2}))
    loaded = load_path(folder)
    assert log == [("check", "tiny"), ("install", 2, True), ("finish", str(folder))]
    assert loaded.fingerprint != plain.fingerprint


def test_a_setup_is_a_model_and_how_it_is_run(model):
    setup = Setup(model, Backwards(2), options=RunOptions(kv="float16"))
    held = setup.new_cache()
    assert held.kind == held.stored_as == "float16"
    want = prefill(model, model.new_cache("float16"), PROMPT, 6)
    assert mx.array_equal(setup.read(PROMPT, held, 6), want)
    assert setup.report() == {"backwards": {"times": 2, "tokens": 21}}
    assert setup.summary() == ["read 2 times backwards"]
    assert isinstance(held, KVCache)
    assert held.length == len(PROMPT)
