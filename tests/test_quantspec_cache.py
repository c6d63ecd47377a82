"""The KV cache in planes of 4 bits: what it stores, beside the keys and values that went in; the native store beside
the plain one; rewinding, files, sessions, the command. Some 25 s in all."""

import itertools
import json
import os

import mlx.core as mx
import numpy as np
import pytest

from mlxeff import MlxeffError, RunOptions, kernels
from mlxeff.assembly.model import load_path
from mlxeff.assembly.techniques import CACHES
from mlxeff.cache import KVCache, LayerShape
from mlxeff.decode import decode, prefill
from mlxeff.generation import Session
from mlxeff.quantspec import planes
from mlxeff.quantspec.cache import PARTS, WHOLE, PlaneLayer
from mlxeff.sampling import make_sampler
from test_cli import document, fails, mlxeff
from tiny_model import CONFIG, random_model, write_tiny_model

needs_native = pytest.mark.skipif(kernels.native()[0] is None, reason="needs the native kernels")
G = 64
VIEWS = [(kind, "full") for kind in CACHES] + [("int8", "draft")]


def rows(count: int, seed: int = 0, heads: int = 2, size: int = 64):
    """Keys and values (1, heads, count, size)."""
    rng = np.random.default_rng(seed)
    return tuple(mx.array(rng.standard_normal((1, heads, count, size)).astype(np.float32)) for _ in range(2))


def newest(tokens: int) -> int:
    """The first of the newest tokens before an append to `tokens` tokens."""
    return max(0, tokens // G - 1) * G


def rounded(exact, coarse: int):
    """Rows (1, G, T, E) as an oracle stores them: of the first `coarse` tokens the upper plane alone."""
    codes, scale, zero = planes.encode(planes.rotate(exact))
    upper = (codes >> 4).astype(mx.float32) * 16 + planes.MIDDLE
    read = mx.where(mx.arange(exact.shape[2])[:, None] < coarse, upper, codes.astype(mx.float32))
    return planes.decode(read, scale, zero)


@pytest.mark.parametrize(("kind", "view"), VIEWS)
@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("chunks", [[1] * 200, [200], [63, 1, 64, 72], [129, 71], [130, 1, 1, 68]], ids=len)
def test_what_is_stored(kind, view, size, chunks):
    """Every token is quantised as an oracle does, and read in the bits that its age gives it, whatever the chunks."""
    exact = rows(sum(chunks), size=size)
    layer, start = PlaneLayer(LayerShape(2, size), kind), 0
    for chunk in chunks:
        coarse = layer.room(chunk, (1, 2, size), view=view)
        layer.append(*(each[:, :, start : start + chunk] for each in exact))
        for part, each in zip(PARTS, exact, strict=True):
            whole = part in WHOLE[kind] and view == "full"
            assert coarse[f"coarse_{part}"] * 16 == (0 if whole else newest(start))
            got = layer._rotated(part, coarse[f"coarse_{part}"])
            want = rounded(each[:, :, : start + chunk], coarse[f"coarse_{part}"] * 16)
            assert mx.array_equal(got, want)
        start += chunk
        assert layer.length == start
    turned = [planes.rotate(layer._rotated(part, layer._first[part])) for part in PARTS]
    assert all(mx.array_equal(*pair) for pair in zip(turned, layer.state(), strict=True))


def content(layer):
    """The bytes of all committed tokens: unpacked, so that those of slots without a token do not count."""
    return [np.array(layer._rotated(part, layer._first[part])).tobytes() for part in PARTS]


@pytest.mark.parametrize("kind", CACHES)
def test_random_appends_and_rewinds(kind):
    """Cycles of drafting a few tokens and taking some of them back: the cache holds what the committed tokens alone
    decide, to the byte, and nothing grows. With MLXEFF_EXHAUSTIVE=1 they are 20,000 for all kinds."""
    rng, committed = np.random.default_rng(7), 0
    keys, values = rows(1500, heads=1)
    layer = PlaneLayer(LayerShape(1, 64), kind)
    junk = rows(8, seed=9, heads=1)
    capacity = set()
    for cycle in range(6_667 if os.environ.get("MLXEFF_EXHAUSTIVE") else 1_200):
        if committed > 1400:  # start again in the middle
            target, first = int(rng.integers(0, 1400)), max(layer._first.values()) * 16
            kept = layer.rewind(target)
            assert kept == (target if target >= first else target // G * G)
            committed = kept
        width = int(rng.integers(1, 8))
        accepted = int(rng.integers(0, width + 1)) if cycle % 3 else width
        good = [each[:, :, committed : committed + accepted] for each in (keys, values)]
        wrong = [each[:, :, : width - accepted] for each in junk]
        layer.append(*(mx.concatenate(pair, axis=2) for pair in zip(good, wrong, strict=True)))
        assert layer.rewind(committed + accepted) == committed + accepted
        committed += accepted
        capacity.add(layer._buffers["lower_values"].shape[2])
        if cycle % 20 == 0:
            mx.eval(layer.arrays())
        if cycle % 199 == 0 and committed:
            again = PlaneLayer(LayerShape(1, 64), kind)
            again.append(keys[:, :, :committed], values[:, :, :committed])
            for part, each in zip(PARTS, (keys, values), strict=True):
                first = max(layer._first[part], again._first[part])
                assert mx.array_equal(layer._rotated(part, first), rounded(each[:, :, :committed], first * 16))
    assert max(capacity) <= (1536 // 16 if kind == "int8" else 9)


def model_of(head_size: int, heads: int, groups: int, window: int | None = None, biased: bool = False):
    config = {"head_dim": head_size, "num_attention_heads": heads, "num_key_value_heads": groups}
    config |= {"max_position_embeddings": 4096, "attention_bias": biased}
    if window:
        config |= {"model_type": "mistral", "sliding_window": window}
    return random_model(CONFIG | config, seed=2, scale=0.15)


SINGLE = [(start, start + 1) for start in range(300, 330)]
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
    bound = {"int8": 0.02, "k8v4": 0.05, "int4": 0.1}[kind]
    assert 0 < np.abs(got - full).mean() < bound * full.std()


@needs_native
@pytest.mark.parametrize(("kind", "view"), VIEWS)
def test_a_token_has_the_same_logits_alone_and_in_a_draft(kind, view):
    """To the bit, in passes of as many tokens as `together` allows. Which tokens a draft reads in 8 bits may differ by
    those of one pass."""
    model, options = model_of(64, 6, 2), RunOptions(view=view)
    assert model.use_native()
    found = {}
    for most in (1, 2, 5, 8):
        held, rows, start = model.new_cache(kind), [], 390
        mx.eval(model.last_logits(mx.array(IDS[None, :390]), held))
        while start < 460:
            width = min(most, held.together or most)
            rows.append(np.array(model(mx.array(IDS[None, start : start + width]), held, options)))
            start += width
        found[most] = np.concatenate(rows, axis=1)[:, :70]
    for most in (2, 5, 8):
        if view == "full":
            assert np.array_equal(found[most], found[1])
        assert np.abs(found[most] - found[1]).mean() < 0.05 * found[1].std()


def stored(model, kind, tokens):
    held = model.new_cache(kind)
    mx.eval(model.last_logits(mx.array(IDS[None, :tokens]), held))
    model.last_logits(mx.array(IDS[None, tokens : tokens + 1]), held)
    return held


@needs_native
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("native", [True, False])
def test_stale_places_are_not_read(kind, native):
    """NaN in the scales of slots without a token, in a tile with others and in tiles without any, changes nothing."""
    model = model_of(64, 6, 2)
    answers = []
    for poison in (False, True):
        assert model.use_native()
        held = stored(model, kind, 330)  # 331 tokens: the last tile has 5 free slots
        model.native = model.native if native else None
        if poison:
            for layer in held.layers:
                upper = np.array(layer._buffers["upper"])
                scales = upper[..., :128].view(np.float16).reshape(*upper.shape[:3], 4, 16)
                scales[:, :, 20, :, 11:] = np.nan
                upper[..., :128] = scales.reshape(*upper.shape[:3], 64).view(np.uint8)
                upper[:, :, 21:] = 0xFF
                layer._buffers["upper"] = mx.array(upper)
        answers.append(np.array(model(mx.array(IDS[None, 331:334]), held)))
    assert np.isfinite(answers[0]).all()
    assert np.array_equal(*answers)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_a_draft_never_reads_the_lower_plane_of_older_tokens(native):
    """Other lower halves of older tokens change the full view, and nothing in the view of drafts."""
    model = model_of(64, 6, 2)
    if native:
        assert model.use_native()
    held = stored(model, "int8", 330)
    found = {}
    for poison in (False, True):
        for layer in held.layers if poison else ():
            for part in PARTS:
                low = np.array(layer._buffers[f"lower_{part}"])
                low[:, :, : newest(331) // 16] ^= 0x5A
                layer._buffers[f"lower_{part}"] = mx.array(low)
        for view in ("full", "draft"):
            found[poison, view] = np.array(model(mx.array(IDS[None, 331:334]), held, RunOptions(view=view)))
            held.rewind(331)
    assert np.array_equal(found[False, "draft"], found[True, "draft"])
    assert not np.array_equal(found[False, "full"], found[True, "full"])
    assert not np.array_equal(found[False, "full"], found[False, "draft"])


def test_a_cache_without_that_view_refuses_it():
    model = model_of(64, 6, 2)
    with pytest.raises(MlxeffError, match="KV cache: wanted a view of full, got 'draft'"):
        model(mx.array(IDS[None, :5]), model.new_cache("float32"), RunOptions(view="draft"))


def test_bytes_are_those_of_the_formula():
    """2 E + 8 bytes a token, head and layer in int8, E + 8 in int4 and 1.5 E + 8 in k8v4, each with the lower halves of
    the newest tokens."""
    for kind, per_token, parts in (("int8", 2 * 64 + 8, 0), ("int4", 64 + 8, 2), ("k8v4", 96 + 8, 1)):
        layer = PlaneLayer(LayerShape(2, 64), kind)
        layer.reserve(8192)
        for start in range(0, 8192, 512):
            layer.append(*rows(512, seed=start))
        layer.room(1, (1, 2, 64))
        mx.eval(layer.arrays())
        tiles = layer._buffers["upper"].shape[2]
        assert tiles <= (8192 + 256) // 16
        assert layer.nbytes == 2 * (tiles * 16 * per_token + parts * 9 * 16 * 32)
        if kind == "int8":
            assert layer.nbytes <= 0.55 * 8192 * 2 * 2 * 2 * 64


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_keys_with_biases_stay_in_8_bits(native, caplog):
    """Seeded biases many times as large as what the keys differ by: 4 bits for the keys would lose these. A line says
    what is stored, and the draft's view reads 8 bits of them too."""
    caplog.set_level("INFO", "mlxeff")
    model = model_of(64, 6, 2, biased=True)
    rng = np.random.default_rng(3)
    for layer in model.layers:
        bias = np.zeros((2, 64), np.float32)
        for head in bias:
            head[rng.choice(np.arange(20, 32), 3, replace=False)] = rng.choice([-1, 1], 3) * rng.uniform(20, 60, 3)
        layer.self_attn.k_proj.bias = mx.array(bias.reshape(-1))
    if native:
        assert model.use_native()
    chunks = [300, *[1] * 30]
    want, _ = logits(model, None, chunks)
    errors = {}
    for kind in ("int8", "int4"):
        got, held = logits(model, kind, chunks)
        errors[kind] = np.abs(got - want).mean() / want.std()
        assert held.stored_as == {"int8": "int8", "int4": "k8v4"}[kind]
        draft = held.layers[0].room(1, (1, 2, 64), view="draft")
        assert (draft["coarse_keys"], draft["coarse_values"]) == (0, newest(330) // 16)
    four = KVCache([PlaneLayer(LayerShape(2, 64), "int4") for _ in model.layers])
    got = [np.array(model(mx.array(IDS[None, start:end]), four)) for start, end in [(0, 300), *SINGLE]]
    without = np.abs(np.concatenate(got, axis=1) - want).mean() / want.std()
    assert errors["int8"] < 0.05
    assert errors["int4"] < 0.1
    assert without > 1.5 * errors["int4"]
    assert "KV cache int4: 2 of 2 layers are stored as k8v4" in caplog.text


def test_head_sizes_without_planes_are_refused():
    with pytest.raises(MlxeffError, match="wanted heads of 64, 80, 96, 128 numbers for int8, got 16"):
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


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"upper": a["upper"][:, :, :-1]},
        lambda a: a | {"lower_keys": a["lower_keys"][:, :, :-1]},
        lambda a: a | {"lower_values": a["lower_values"][:, :, 1:]},
        lambda a: a | {"lower_values": mx.concatenate([a["lower_values"]] * 9, axis=2)},
        lambda a: {name: each[:, :1] for name, each in a.items()},
        lambda a: {name: mx.concatenate([each, each]) for name, each in a.items()},
        lambda a: a | {"upper": a["upper"][..., :-64]},
        lambda a: a | {"upper": a["upper"].view(mx.int8)},
        lambda a: {name: each for name, each in a.items() if name != "lower_values"},
    ],
)
def test_planes_that_are_not_those_of_the_tokens_are_refused(change):
    """Of 150 tokens 10 tiles, the lower plane of the values from tile 4 on."""
    layer, shape = PlaneLayer(LayerShape(2, 64), "k8v4"), LayerShape(2, 64)
    layer.append(*rows(140))
    layer.append(*rows(10))
    arrays = {name: mx.contiguous(each) for name, each in layer.saved().items()}
    assert [arrays[name].shape[2] for name in ("upper", "lower_keys", "lower_values")] == [10, 10, 6]
    PlaneLayer(shape, "k8v4").restore(arrays, 150)
    with pytest.raises(ValueError, match="planes of"):
        PlaneLayer(shape, "k8v4").restore(change(arrays), 150)
    with pytest.raises(ValueError, match="planes of 144 tokens"):
        PlaneLayer(shape, "k8v4").restore(arrays, 144)


def test_what_a_layer_says_of_going_back_and_of_passes():
    """int8 goes back to any token and takes any pass; the others end a pass where the next tokens become old."""
    for kind in CACHES:
        layer = PlaneLayer(LayerShape(2, 64), kind)
        assert layer.rewinds_exactly == (kind == "int8")
        for length, room in ((0, 64), (1, 63), (63, 1), (64, 64), (130, 62)):
            layer.length = length
            assert layer.together == (None if kind == "int8" else room)


@pytest.mark.parametrize(("kind", "reused"), [("int8", 150), ("int4", 128)])
def test_a_session_goes_on_and_goes_back(folder, caplog, kind, reused):
    """A second prompt that shares the whole first one is continued, and so is one that leaves it early. Where the lower
    halves of the tokens there are gone, it is computed again from a multiple of 64 tokens on, with a notice. Answers of
    int8 are those of a new session."""
    loaded = load_path(folder)
    options = RunOptions(kv=kind)

    def answer(session, ids):
        return [response.token for response in session.stream(ids, max_tokens=6, options=options)]

    session = Session(loaded.model, loaded.tokenizer)
    first = IDS[:300].tolist()
    begun = answer(session, first)
    longer = [*first, *begun, *IDS[300:350].tolist()]
    continued = answer(session, longer)
    if kind == "int8":  # what a prompt's own tokens see of each other depends on the pieces that it is read in
        assert continued == answer(Session(loaded.model, loaded.tokenizer), longer)
    assert session.reused == len(first) + len(begun) - 1
    turned = [*first[:150], *IDS[400:450].tolist()]
    again = answer(session, turned)
    if kind == "int8":
        assert again == answer(Session(loaded.model, loaded.tokenizer), turned)
    assert session.reused == reused
    assert ("KV cache: 22 tokens recomputed" in caplog.text) == (kind == "int4")


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
    assert error == "KV cache: wanted heads of 64, 80, 96, 128 numbers for int8, got 16"


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
    assert answers[None][:4] == answers["int8"][:4]
    refining = pair.dialled(refine=True)
    with pytest.raises(MlxeffError, match="refine: wanted a KV cache that can be taken back to every token, got int4"):
        refining.read(loaded.model, loaded.model.new_cache("int4"), mx.array(prompt), 256, options=options)
