"""The KV cache in planes of 4 bits: what it stores, beside the keys and values that went in; the native store beside
the plain one; rewinding, files, sessions, the command. Some 25 s in all."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest

from mlxeff import MlxeffError, RunOptions, kernels
from mlxeff.assembly.model import load_path
from mlxeff.assembly.techniques import CACHES
from mlxeff.cache import LayerShape
from mlxeff.decode import decode, prefill
from mlxeff.generation import Session
from mlxeff.quantspec.cache import LOWER, PlaneLayer
from mlxeff.quantspec.planes import decode as decode_planes
from mlxeff.quantspec.planes import encode
from mlxeff.sampling import make_sampler
from test_cli import document, fails, mlxeff
from tiny_model import CONFIG, random_model, write_tiny_model

needs_native = pytest.mark.skipif(kernels.native()[0] is None, reason="needs the native kernels")
G = 64


def rows(count: int, seed: int = 0, heads: int = 2, size: int = 64):
    """Keys and values (1, heads, count, size)."""
    rng = np.random.default_rng(seed)
    return tuple(mx.array(rng.standard_normal((1, heads, count, size)).astype(np.float32)) for _ in range(2))


def filled(tokens: int) -> int:
    """Blocks in the planes before an append to `tokens` tokens."""
    return max(0, tokens // G - 1)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("chunks", [[1] * 200, [200], [63, 1, 64, 72], [129, 71], [130, 1, 1, 68]], ids=len)
def test_what_is_stored(kind, chunks):
    """Whole blocks are quantised as an oracle does, the rest is in float16, whatever the chunks."""
    keys, values = rows(sum(chunks))
    layer, start = PlaneLayer(LayerShape(2, 64), kind), 0
    for chunk in chunks:
        layer.append(keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
        assert layer.filled == filled(start)
        start += chunk
        assert layer.length == start
    layer.room(1, (1, 2, 64), mx.float32)  # moves what the next append would
    assert (layer.filled, layer.tail) == (filled(start), start - G * filled(start))
    for part, exact, got in (("key", keys, layer.state()[0]), ("value", values, layer.state()[1])):
        moved = layer.filled * G
        block = exact[:, :, :moved].reshape(1, 2, -1, G, 64).astype(mx.float16)
        upper, low, scale, zero = encode(block.swapaxes(-1, -2) if part == "key" else block)
        want = decode_planes(upper, low if part in LOWER[kind] else None, scale, zero, 64)
        want = (want.swapaxes(-1, -2) if part == "key" else want).reshape(1, 2, moved, 64)
        assert mx.array_equal(got[:, :, :moved], want)
        assert mx.array_equal(got[:, :, moved:], exact[:, :, moved:].astype(mx.float16).astype(mx.float32))


def test_random_appends_and_rewinds():
    """20,000 cycles of drafting a few tokens and taking some of them back: the planes are append-only and hold what the
    committed tokens alone decide, the tail holds them exactly, and nothing grows."""
    rng, committed = np.random.default_rng(7), 0
    keys, values = rows(3000, heads=1)
    layer = PlaneLayer(LayerShape(1, 64), "int8")
    junk = rows(8, seed=9, heads=1)
    hashes, capacity = {}, set()
    for cycle in range(20_000):
        if committed > 2900:  # start again in the middle of a block: that block is computed again
            target, before = int(rng.integers(0, 2900)), layer.filled * G
            kept = layer.rewind(target)
            assert kept == (target if target >= before else target // G * G)
            committed = kept
        width = int(rng.integers(1, 8))
        accepted = int(rng.integers(0, width + 1)) if cycle % 3 else width
        good = [each[:, :, committed : committed + accepted] for each in (keys, values)]
        wrong = [each[:, :, : width - accepted] for each in junk]
        layer.append(*(mx.concatenate(pair, axis=2) for pair in zip(good, wrong, strict=True)))
        assert layer.rewind(committed + accepted) == committed + accepted
        committed += accepted
        capacity.add(layer._buffers["tail"].shape[3])
        if cycle % 50 == 0:
            mx.eval(layer.arrays())
        if cycle % 997 == 0 and layer.filled:
            start = layer.filled * G
            assert layer.tail == committed - start
            tail = layer._buffers["tail"][0, :, :, : layer.tail]
            assert mx.array_equal(tail, keys[:, :, start:committed].astype(mx.float16))
            for index in range(layer.filled):
                words = np.array(layer._buffers["upper"][:, :, index]).tobytes()
                assert hashes.setdefault(index, words) == words
    assert len(hashes) > 20
    assert max(capacity) <= 2 * G + 16


def model_of(head_size: int, heads: int, groups: int, window: int | None = None):
    config = {"head_dim": head_size, "num_attention_heads": heads, "num_key_value_heads": groups}
    config |= {"max_position_embeddings": 4096}
    if window:
        config |= {"model_type": "mistral", "sliding_window": window}
    return random_model(CONFIG | config, seed=2, scale=0.15)


IDS = np.random.default_rng(11).integers(0, 256, 600)


def logits(model, kind, chunks, batch=1):
    """(rows of logits, the cache) of IDS read in these chunks."""
    held, start, found = model.new_cache(kind), 0, []
    for chunk in chunks:
        ids = mx.array(np.tile(IDS[start : start + chunk], (batch, 1)))
        found.append(np.array(model(ids, held).astype(mx.float32)))
        start += chunk
    return np.concatenate(found, axis=1), held


@needs_native
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("head_size", "heads", "groups", "window"),
    [(64, 6, 2, None), (80, 4, 4, None), (96, 8, 1, None), (128, 4, 2, None), (64, 4, 2, 100)],
)
def test_the_native_store_is_the_plain_one(kind, head_size, heads, groups, window):
    """Prompt chunks, single tokens and short drafts, with blocks full and half full, one sequence and two."""
    model = model_of(head_size, heads, groups, window)
    chunks = [300, 5, *[1] * 20, 8, 2, 120, *[1] * 10]
    assert model.use_native()
    got, held = logits(model, kind, chunks, batch=2)
    assert {ran.backend for ran in held.tally} == {model.native.backend}
    model.native = None
    want, _ = logits(model, kind, chunks, batch=2)
    # A number at the edge of two codes may get the other one where the keys differ in their last bit.
    assert np.abs(got - want).max() < 0.1 * want.std()
    assert np.abs(got - want).mean() < 5e-4 * want.std()
    full, _ = logits(model, None, chunks, batch=2)
    bound = {"int8": 0.005, "k8v4": 0.05, "int4": 0.1}[kind]
    assert 0 < np.abs(got - full).mean() < bound * full.std()


@needs_native
@pytest.mark.parametrize("kind", CACHES)
def test_a_token_has_the_same_logits_alone_and_in_a_draft(kind):
    """Drafts that do not reach over the edge of a block. The products round otherwise with several rows, attention does
    not (tests/native_driver)."""
    model = model_of(64, 6, 2)
    assert model.use_native()
    found = {}
    for width in (1, 2, 5, 10):
        held, rows = model.new_cache(kind), []
        mx.eval(model.last_logits(mx.array(IDS[None, :390]), held))
        for start in range(390, 440, width):
            rows.append(np.array(model(mx.array(IDS[None, start : start + width]), held)))
        found[width] = np.concatenate(rows, axis=1)
    for width in (2, 5, 10):
        assert np.abs(found[width] - found[1]).max() < 5e-3 * found[1].std()
        assert np.abs(found[width] - found[1]).mean() < 1e-4 * found[1].std()


def stored(model, kind, tokens):
    held = model.new_cache(kind)
    mx.eval(model.last_logits(mx.array(IDS[None, :tokens]), held))
    model.last_logits(mx.array(IDS[None, tokens : tokens + 1]), held)
    return held


@needs_native
@pytest.mark.parametrize("kind", CACHES)
def test_stale_places_are_not_read(kind):
    """NaN in tail slots after the last token, and in blocks that are not filled, changes nothing."""
    model = model_of(64, 6, 2)
    assert model.use_native()
    answers = []
    for poison in (False, True):
        held = stored(model, kind, 330)
        if poison:
            for layer in held.layers:
                layer._buffers["tail"][:, :, :, layer.tail :] = mx.array(np.nan, mx.float16)
                layer._buffers["upper"][:, :, layer.filled :] = mx.array(0xFF, mx.uint8)  # scales of NaN
        answers.append([np.array(model(mx.array(IDS[None, 331:334]), held)) for _ in range(1)])
    assert np.isfinite(answers[0]).all()
    assert np.array_equal(*answers)


@needs_native
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("new", [1, 4, 40])
def test_equal_values_come_out_as_they_are(kind, new):
    """Attention to values that are all the same gives that value, whatever the scores: a missing or a doubled block, or
    sums that are not merged right, would change it."""
    model = model_of(64, 6, 2)
    assert model.use_native()
    held = stored(model, kind, 330)
    for layer in held.layers:
        layer._buffers["tail"][1] = mx.array(1, mx.float16)
        scales = mx.view(mx.array([0.0] * G + [1.0] * G, mx.float16), mx.uint8)  # of the values, and their zeros
        layer._buffers["upper"][..., 4 * 64 : 4 * (64 + G)] = scales
    for layer in model.layers:
        layer.self_attn.v_proj.weight = mx.zeros_like(layer.self_attn.v_proj.weight)
        layer.self_attn.v_proj.bias = mx.ones((128,))
    # Both executors on the same cache: the plain one's oracle is dense attention.
    import copy

    other = copy.copy(held)
    other.layers = [copy.copy(layer) for layer in held.layers]
    model.native = None
    want = np.array(model(mx.array(IDS[None, 331 : 331 + new]), other))
    assert model.use_native()
    got = np.array(model(mx.array(IDS[None, 331 : 331 + new]), held))
    assert np.abs(got - want).max() < 1e-4 * want.std()


def test_bytes_are_those_of_the_formula():
    """2 E + 8 bytes a token, head and layer in the planes of int8, E + 8 in those of int4, and a tail of float16."""
    for kind, per_token in (("int8", 2 * 64 + 8), ("int4", 64 + 8), ("k8v4", 96 + 8)):
        layer = PlaneLayer(LayerShape(2, 64), kind)
        layer.reserve(8192)
        for start in range(0, 8192, 512):
            keys, values = rows(512, seed=start)
            layer.append(keys, values)
        layer.room(1, (1, 2, 64), mx.float32)
        mx.eval(layer.arrays())
        blocks, tail = layer._buffers["upper"].shape[2], layer._buffers["tail"].shape[3]
        assert blocks == 128
        assert tail <= 2 * G + 8
        assert layer.nbytes == 2 * (blocks * G * per_token + tail * 2 * 2 * 64)
        if kind == "int8":
            assert layer.nbytes <= 0.55 * 8192 * 2 * 2 * 2 * 64


def test_head_sizes_without_planes_are_refused():
    with pytest.raises(MlxeffError, match="wanted heads of 64, 80, 96, 128 numbers for int8, int4 and k8v4, got 16"):
        random_model(CONFIG).new_cache("int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with heads of 64 numbers and room for 1024 tokens."""
    config = CONFIG | {"head_dim": 64, "max_position_embeddings": 1024, "eos_token_id": 258}
    return write_tiny_model(tmp_path_factory.mktemp("planes") / "tiny", config)


def greedy(model, kind, prompt, count):
    held = model.new_cache(kind)
    first = prefill(model, held, mx.array(prompt), 100)
    return [step.token for step in decode(model, held, first, make_sampler(), max_tokens=count)], held


def test_a_file_keeps_the_planes(folder, tmp_path):
    """Written and read back, the cache goes on with the same bits; another kind, and another form, are refused."""
    model = load_path(folder).model
    prompt = IDS[:333].tolist()
    tokens, held = greedy(model, "k8v4", prompt, 5)
    path = tmp_path / "cache.safetensors"
    held.save(path, prompt + tokens[:-1], "x")
    again = model.new_cache("k8v4")
    assert again.restore(path, "x") == prompt + tokens[:-1]
    rest = [np.array(model(mx.array([tokens[-1:]]), each)) for each in (held, again)]
    assert np.array_equal(*rest)
    for kind in ("int8", "float16"):
        with pytest.raises(MlxeffError, match=r"wanted a KV cache stored as .*, got k8v4"):
            model.new_cache(kind).restore(path, "x")
    with pytest.raises(MlxeffError, match="wanted a KV cache of 3 layers for its 337 tokens, got others") as caught:
        model.new_cache("k8v4").__class__([*again.layers, again.layers[0]], "k8v4").restore(path, "x")
    assert "\n" not in str(caught.value)


def test_a_session_goes_on_and_goes_back(folder, caplog):
    """A second prompt that shares the whole first one is continued; one that leaves it inside the planes is computed
    again from the beginning of that block, with a notice. Both answers are those of a new session."""
    loaded = load_path(folder)
    options = RunOptions(kv="int8")

    def answer(session, ids):
        return [response.token for response in session.stream(ids, max_tokens=6, options=options)]

    session = Session(loaded.model, loaded.tokenizer)
    first = IDS[:300].tolist()
    begun = answer(session, first)
    longer = [*first, *begun, *IDS[300:350].tolist()]
    assert answer(session, longer) == answer(Session(loaded.model, loaded.tokenizer), longer)
    assert session.reused == len(first) + len(begun) - 1
    turned = [*first[:150], *IDS[400:450].tolist()]
    assert answer(session, turned) == answer(Session(loaded.model, loaded.tokenizer), turned)
    assert session.reused == 128
    assert "KV cache: 22 tokens recomputed" in caplog.text


def test_the_prompt_is_read_in_any_chunks(folder):
    """How a prompt is divided changes what its own tokens see, by rounding alone."""
    model = load_path(folder).model
    found = []
    for step in (37, 128, 400):
        held = model.new_cache("int8")
        found.append(np.array(prefill(model, held, mx.array(IDS[:400]), step)))
        assert held.length == 400
    assert np.abs(found[0] - found[1]).max() < 0.05 * found[0].std()
    assert np.abs(found[0] - found[2]).max() < 0.05 * found[0].std()


@pytest.mark.parametrize("kind", CACHES)
def test_through_the_command(folder, kind, tmp_path):
    text = "The planes hold the older tokens. " * 12
    arguments = (text, "--raw", "--max-tokens", 8, "--kv-cache", kind, "--prompt-cache", tmp_path / "cache.safetensors")
    got = document(folder, *arguments)
    assert got["timings"]["kv_dtype"] == kind
    again = document(folder, *arguments)
    assert again["token_ids"] == got["token_ids"]
    assert again["timings"]["reused_tokens"] == len(got["prompt_token_ids"]) - 1
    out, error = mlxeff("generate", *arguments, "--model", folder, "--kv-cache", "float32", "--json")
    assert f"wanted a KV cache stored as dense, got {kind}: not reused, computed anew" in error
    assert json.loads(out)["timings"]["reused_tokens"] == 0


def test_the_old_name_of_the_option(folder):
    assert document(folder, "Hello", "--kv-dtype", "float16")["timings"]["kv_dtype"] == "float16"


def test_heads_of_another_size_are_one_line(tiny_folder):
    error = fails("generate", "Hello", "--model", tiny_folder, "--kv-cache", "int8")
    assert error == "KV cache: wanted heads of 64, 80, 96, 128 numbers for int8, int4 and k8v4, got 16"


def test_bench_takes_it(folder):
    out, _ = mlxeff(
        "bench", "ttft", folder, "--prompt-lengths", 200, "--rounds", 1, "--warmup", 0, "--kv-cache", "int4", "--json"
    )
    assert "int4" in json.dumps(json.loads(out))


def test_kv_prediction_fills_it(smollm2_gguf):
    """The predicted keys and values are quantised as computed ones; `refine` needs a cache that goes back exactly."""
    import mlxeff as package

    loaded = load_path(smollm2_gguf)
    pair = package.load_pair("smollm2-135m-0-21", loaded)
    prompt = loaded.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 30)
    answers = {}
    for kind in (None, "int8"):
        options = RunOptions(kv=kind)
        held = loaded.model.new_cache(kind)
        first = pair.read(loaded.model, held, mx.array(prompt), 256, options=options)
        steps = decode(loaded.model, held, first, make_sampler(), max_tokens=12, options=options)
        answers[kind] = [step.token for step in itertools.islice(steps, 12)]
        assert held.length == len(prompt) + 11
    assert held.layers[0].filled == filled(held.length - 1)
    assert answers[None][:4] == answers["int8"][:4]
    refining = pair.dialled(refine=True)
    with pytest.raises(MlxeffError, match="refine: wanted a KV cache that can be taken back to every token, got int8"):
        refining.read(loaded.model, loaded.model.new_cache("int8"), mx.array(prompt), 256, options=options)
