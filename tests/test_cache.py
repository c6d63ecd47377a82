"""The KV cache: one shot = chunks = token by token, rewind and redo, growth and reserve, sliding windows, save and
restore.

What is stored and what is recomputed with the same shapes is compared exactly. Prefill in other chunks multiplies
matrices of other shapes, whose sums run in another order: those logits are compared with the float32 tolerance.
"""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

import reference_models
from helpers import assert_close
from mlxeff import MlxeffError
from mlxeff.cache import KVCache, LayerCache, OtherPrecisionError, common_prefix
from mlxeff.ops import mlx_only
from mlxeff.running import Ran, RunOptions, Tally
from tiny_model import CONFIG, random_model

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=1)


def prompt(length: int) -> mx.array:
    return mx.array(np.random.default_rng(7).integers(0, 256, (1, length)))


def draw(*shape: int, seed: int = 0, dtype=mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def filled(model, tokens: mx.array) -> KVCache:
    cache = model.new_cache()
    mx.eval(model(tokens, cache))
    return cache


def in_chunks(model, tokens: mx.array, ends: list[int]) -> tuple[mx.array, KVCache]:
    cache, start, logits = model.new_cache(), 0, []
    for end in [*ends, tokens.shape[1]]:
        logits.append(model(tokens[:, start:end], cache))
        start = end
    return mx.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("ends", [[1], [39], [7, 20, 21], list(range(1, 40))], ids=["1", "39", "uneven", "singly"])
def test_one_shot_equals_chunks(model, ends):
    tokens = prompt(40)
    want, whole = in_chunks(model, tokens, [])
    got, parts = in_chunks(model, tokens, ends)
    assert_close(got, want, "logits")
    assert parts.length == whole.length == 40
    for a, b in zip(parts.layers, whole.layers):
        for one, other in zip(a.state(), b.state()):
            assert one.shape == (1, 2, 40, 16)
            assert_close(one, other, "state")


def test_last_logits_are_the_last_of_all(model):
    tokens = prompt(20)
    all_of_them, last = model(tokens, model.new_cache()), model.last_logits(tokens, model.new_cache())
    assert last.shape == (1, CONFIG["vocab_size"])
    assert_close(last, all_of_them[:, -1], "the head on one row or on twenty")


@pytest.mark.parametrize("surplus", [1, 5, 23])
def test_rewind_then_redo_equals_never_done(model, surplus):
    """Exact: the same shapes are computed; what lies behind the length of a buffer is never read."""
    tokens, cache = prompt(24), model.new_cache()
    model(tokens[:, : 24 - surplus], cache)
    clean = model.new_cache()
    model(tokens[:, : 24 - surplus], clean)
    model(prompt(60)[:, 30 : 30 + surplus], cache)  # other tokens, taken back
    assert cache.rewind(24 - surplus) == 24 - surplus
    assert cache.length == clean.length == 24 - surplus
    rest = tokens[:, 24 - surplus :]
    assert_close(model(rest, cache), model(rest, clean), "logits", **EXACT)
    for a, b in zip(cache.layers, clean.layers):
        assert_close(a.state()[0], b.state()[0], "keys", **EXACT)
        assert_close(a.state()[1], b.state()[1], "values", **EXACT)


def test_rewind_to_nothing_equals_a_new_cache(model):
    cache = filled(model, prompt(9))
    assert cache.rewind(0) == 0
    assert_close(model(prompt(12), cache), model(prompt(12), model.new_cache()), "logits", **EXACT)


@pytest.mark.parametrize("length", [-1, 6])
def test_rewinding_to_more_than_it_holds_is_refused(model, length):
    cache = filled(model, prompt(5))
    with pytest.raises(MlxeffError, match=f"KV cache: wanted to rewind to 0 to 5 tokens, got {length}"):
        cache.rewind(length)
    assert cache.length == 5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_growth_keeps_what_was_held(dtype):
    """Across two steps of 256, in appends that end on the boundary, begin on it and cross it."""
    keys, values = draw(1, 2, 520, 8, dtype=dtype), draw(1, 2, 520, 8, seed=1, dtype=dtype)
    layer, start, capacities = LayerCache(), 0, []
    for end in (250, 256, 257, 511, 514, 520):
        held = layer.append(keys[:, :, start:end], values[:, :, start:end])
        assert_close(held[0], keys[:, :, :end], f"keys at {end}", **EXACT)
        assert_close(held[1], values[:, :, :end], f"values at {end}", **EXACT)
        capacities.append(layer.keys.shape[2])
        start = end
    assert capacities == [256, 256, 512, 512, 768, 768]
    assert layer.keys.dtype == dtype
    assert layer.nbytes == 2 * (1 * 2 * 768 * 8) * dtype.size


def test_growth_after_a_rewind():
    keys = draw(1, 1, 300, 4)
    layer = LayerCache()
    layer.append(keys[:, :, :256], keys[:, :, :256])
    assert layer.rewind(200) == 200
    got, _ = layer.append(keys[:, :, 200:300], keys[:, :, 200:300])
    assert_close(got, keys, "200 held, 100 appended", **EXACT)


def test_reserve_allocates_once():
    keys = draw(1, 1, 1000, 4)
    cache = KVCache([LayerCache(), LayerCache()])
    assert (cache.nbytes, cache.length, cache.arrays()) == (0, 0, [])
    cache.reserve(700)
    sizes = set()
    for start in range(0, 700, 100):
        for layer in cache.layers:
            layer.append(keys[:, :, start : start + 100], keys[:, :, start : start + 100])
        sizes.add(cache.nbytes)
    assert sizes == {2 * 2 * 768 * 4 * 4}, "768 tokens: 700 rounded up to the step of 256"
    assert len(cache.arrays()) == 4
    cache.reserve(1000)
    for layer in cache.layers:
        layer.append(keys[:, :, :100], keys[:, :, :100])
    assert cache.nbytes == 2 * 2 * 1792 * 4 * 4, "the 700 held and 1000 announced, rounded up"


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("chunks", [[30], [3, 3, 3, 21], [10, 1, 1, 1, 1, 10, 1, 5], [1] * 30], ids=str)
def test_attend_against_float64(window, chunks):
    """Grouped heads, a window shorter and longer than a chunk, and chunks of one token."""
    queries, keys, values = draw(1, 4, 30, 8), draw(1, 2, 30, 8, seed=1), draw(1, 2, 30, 8, seed=2)
    rows = [np.array(a[0].transpose(1, 0, 2), np.float64) for a in (queries, keys, values)]
    want = reference_models.attention(*rows, window).reshape(30, 4, 8).transpose(1, 0, 2)[None]
    layer, start, got = LayerCache(window), 0, []
    for count in chunks:
        part = slice(start, start + count)
        got.append(layer.attend(queries[:, :, part], keys[:, :, part], values[:, :, part], 8**-0.5))
        start += count
    assert_close(mx.concatenate(got, axis=2), want, f"window {window}")
    assert layer.length == 30


def test_rewind_inside_a_window():
    """Every key is kept, so tokens that left the window come back after a rewind."""
    config = CONFIG | {"model_type": "mistral", "sliding_window": 6}
    model, tokens = random_model(config, seed=3), prompt(30)
    cache, clean = filled(model, tokens), filled(model, tokens[:, :12])
    assert cache.rewind(12) == 12
    assert_close(model(tokens[:, 12:], cache), model(tokens[:, 12:], clean), "logits", **EXACT)


@pytest.mark.parametrize(
    ("held", "wanted", "length"),
    [([], [1], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 3], 3), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1)],
)
def test_common_prefix(held, wanted, length):
    assert common_prefix(held, wanted) == length


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_save_and_restore(tmp_path, model, dtype):
    model = random_model(CONFIG, seed=1)
    model.set_dtype(dtype)
    tokens = prompt(300)
    with mlx_only():  # whose activations have the type of the weights
        cache, ids = filled(model, tokens[:, :290]), tokens[0, :290].tolist()
        restored = model.new_cache()
    cache.save(tmp_path / "a.cache", ids, "model-1")
    cache.save(tmp_path / "b.cache", ids, "model-1")
    assert (tmp_path / "a.cache").read_bytes() == (tmp_path / "b.cache").read_bytes()
    assert restored.restore(tmp_path / "a.cache", "model-1") == ids
    assert restored.length == 290
    for a, b in zip(restored.layers, cache.layers):
        assert a.keys.dtype == dtype
        assert_close(a.state()[0], b.state()[0], "keys", **EXACT)
        assert_close(a.state()[1], b.state()[1], "values", **EXACT)
    restored.save(tmp_path / "c.cache", ids, "model-1")
    assert (tmp_path / "c.cache").read_bytes() == (tmp_path / "a.cache").read_bytes()
    assert_close(model(tokens[:, 290:], restored), model(tokens[:, 290:], cache), "going on", **EXACT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.cache", "b.cache", "c.cache"]


def test_a_restored_cache_has_the_windows_of_its_model(tmp_path):
    """More tokens than the window, before and after the file."""
    model, tokens = random_model(CONFIG | {"model_type": "mistral", "sliding_window": 6}, seed=3), prompt(30)
    cache, restored = filled(model, tokens[:, :20]), model.new_cache()
    cache.save(tmp_path / "a.cache", tokens[0, :20].tolist(), "m")
    restored.restore(tmp_path / "a.cache", "m")
    assert [layer.window for layer in restored.layers] == [layer.window for layer in cache.layers] == [6, 6]
    assert restored.tally == cache.tally != Tally()
    assert_close(model(tokens[:, 20:], restored), model(tokens[:, 20:], cache), "going on", **EXACT)


def test_save_replaces_an_older_file(tmp_path, model):
    path, tokens = tmp_path / "a.cache", prompt(20)
    filled(model, tokens).save(path, tokens[0].tolist(), "m")
    filled(model, tokens[:, :5]).save(path, tokens[0, :5].tolist(), "m")
    assert model.new_cache().restore(path, "m") == tokens[0, :5].tolist()


def refused(call, *arguments) -> str:
    with pytest.raises(MlxeffError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_of_another_model_is_refused(tmp_path, model):
    path = tmp_path / "a.cache"
    filled(model, prompt(5)).save(path, [1, 2, 3, 4, 5], "model-1")
    cache = model.new_cache()
    message = refused(cache.restore, path, "model-2")
    assert message == f"{path}: wanted a prompt cache of this model (model-2), got one of model-1"
    deeper = random_model(CONFIG | {"num_hidden_layers": 3}).new_cache()
    message = refused(deeper.restore, path, "model-1")
    assert message == f"{path}: wanted a KV cache of 3 layers for its 5 tokens, got others"
    assert (cache.length, deeper.length) == (0, 0)


def header(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def test_a_file_says_what_made_it(tmp_path, model):
    path = tmp_path / "a.cache"
    cache = filled(model, prompt(5))
    cache.save(path, [1, 2, 3, 4, 5], "m")
    ran, *others = cache.tally
    assert others == []
    assert json.loads(header(path)["computed"]) == [[ran.backend, "exact", 5]]
    restored = model.new_cache()
    restored.restore(path, "m")
    assert restored.tally == cache.tally
    pairs = [(draw(1, 2, 3, 16), draw(1, 2, 3, 16, seed=1))] * 2
    model.append_kv(pairs, cache)
    cache.save(path, list(range(8)), "m")
    assert json.loads(header(path)["computed"]) == [[ran.backend, "exact", 5], ["", "given", 3]]
    with pytest.raises(OtherPrecisionError, match=r"of exact float32, got exact \+ given float32"):
        model.new_cache().restore(path, "m")


@pytest.mark.parametrize(
    ("kind", "compute", "wanted", "refused_because"),
    [
        (None, "exact", RunOptions(), None),
        (None, "exact", RunOptions(kv="float32"), None),
        ("float32", "exact", RunOptions(), None),
        ("bfloat16", "exact", RunOptions(kv="bfloat16"), None),
        (None, "int8", RunOptions(compute="int8"), None),
        ("bfloat16", "exact", RunOptions(), "wanted a KV cache of exact float32, got exact bfloat16"),
        (None, "exact", RunOptions(kv="float16"), "wanted a KV cache of exact float16, got exact float32"),
        (None, "int8", RunOptions(), "wanted a KV cache of exact float32, got int8 float32"),
        (None, "exact", RunOptions(compute="int8"), "wanted a KV cache of int8 float32, got exact float32"),
        ("bfloat16", "int8", RunOptions(), "wanted a KV cache of exact float32, got int8 bfloat16"),
    ],
)
def test_another_precision_is_refused(tmp_path, model, kind, compute, wanted, refused_because):
    """The arithmetic is what the tally says: the model here computes exactly in any case."""
    path, cache = tmp_path / "a.cache", model.new_cache(kind)
    mx.eval(model(prompt(5), cache))
    cache.tally = Tally({Ran("native", compute): 5})
    cache.save(path, [1, 2, 3, 4, 5], "m")
    restored = model.new_cache(wanted.kv)
    if refused_because is None:
        assert restored.restore(path, "m", wanted) == [1, 2, 3, 4, 5]
        assert restored.stored_as == cache.stored_as
        return
    with pytest.raises(OtherPrecisionError) as caught:
        restored.restore(path, "m", wanted)
    assert str(caught.value) == f"{path}: {refused_because}"
    assert (restored.length, restored.arrays()) == (0, [])


def rewritten(path, arrays=None, **changes):
    """The file with other entries in its header (None removes one), and other arrays."""
    arrays = arrays or mx.load(str(path), format="safetensors")
    metadata = {key: value for key, value in (header(path) | changes).items() if value is not None}
    mx.save_safetensors(f"{path}.safetensors", arrays, metadata)
    path.with_name(f"{path.name}.safetensors").rename(path)


def test_a_file_that_does_not_say_what_made_it_counts_as_exact(tmp_path, model):
    path = tmp_path / "a.cache"
    filled(model, prompt(5)).save(path, [1, 2, 3, 4, 5], "m")
    rewritten(path, computed=None)
    assert model.new_cache().restore(path, "m") == [1, 2, 3, 4, 5]
    with pytest.raises(OtherPrecisionError):
        model.new_cache().restore(path, "m", RunOptions(compute="int8"))
    for nonsense in ("", "{}", "[]", "[1]", '[["a", "exact"]]', '[["a", "exact", "5"]]'):
        rewritten(path, computed=nonsense)
        assert "wanted a KV cache of 2 layers for its 5 tokens, got others" in refused(
            model.new_cache().restore, path, "m"
        )


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3, 5, 16), mx.float32), ((1, 2, 5, 8), mx.float32), ((1, 2, 5, 16), mx.int32)], ids=str
)
def test_other_heads_and_integers_are_refused(tmp_path, model, shape, dtype):
    path = tmp_path / "a.cache"
    filled(model, prompt(5)).save(path, [1, 2, 3, 4, 5], "m")
    arrays = {"tokens": mx.arange(5).astype(mx.uint32)}
    arrays |= {f"{layer}.{name}": mx.zeros(shape, dtype) for layer in (0, 1) for name in ("keys", "values")}
    rewritten(path, arrays)
    refused(model.new_cache().restore, path, "m")


def test_damaged_and_foreign_files_are_refused(tmp_path, model):
    path = tmp_path / "a.cache"
    filled(model, prompt(5)).save(path, [1, 2, 3, 4, 5], "m")
    whole = path.read_bytes()
    cut, noise, foreign, old, fewer = (tmp_path / name for name in ("cut", "noise", "foreign", "old", "fewer"))
    for size in (0, 4, 50, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        assert "wanted a prompt cache, got a damaged or foreign file" in refused(model.new_cache().restore, cut, "m")
    noise.write_bytes(b"\xff" * 400)
    assert "damaged or foreign file" in refused(model.new_cache().restore, noise, "m")
    assert "damaged or foreign file" in refused(model.new_cache().restore, tmp_path / "missing", "m")
    assert "damaged or foreign file" in refused(model.new_cache().restore, tmp_path, "m")
    mx.save_safetensors(str(foreign), {"x": mx.zeros(3)}, {"format": "mlx"})
    foreign.with_name("foreign.safetensors").rename(foreign)
    message = refused(model.new_cache().restore, foreign, "m")
    assert message == f"{foreign}: wanted a prompt cache of format version 1, got {{'format': 'mlx'}}"
    old.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    assert "format version 1, got" in refused(model.new_cache().restore, old, "m")
    arrays = {"tokens": mx.array([1, 2, 3, 4]), "0.keys": draw(1, 2, 5, 16)}
    mx.save_safetensors(f"{fewer}.safetensors", arrays, {"format": "mlxeff-kv-cache", "version": "1", "model": "m"})
    message = refused(model.new_cache().restore, f"{fewer}.safetensors", "m")
    assert "wanted a KV cache of 2 layers for its 4 tokens, got others" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"0.keys": draw(1, 3, 5, 16)},
        lambda a: a | {"0.keys": draw(1, 2, 5, 8), "0.values": draw(1, 2, 5, 8)},
        lambda a: a | {"1.values": draw(2, 2, 5, 16)},
        lambda a: a | {"1.keys": mx.ones((1, 2, 5, 16), mx.int32), "1.values": mx.ones((1, 2, 5, 16), mx.int32)},
        lambda a: a | {"1.keys": a["1.keys"].astype(mx.float16)},
        lambda a: a | {"tokens": mx.array([1, 2, 3, 4])},
        lambda a: a | {"tokens": mx.array([1, 2, 3, 4, 5, 6])},
        lambda a: a | {"tokens": mx.array([1.0, 2, 3, 4, 5])},
        lambda a: a | {"tokens": mx.array([[1], [2], [3], [4], [5]])},
        lambda a: a | {"first.keys": draw(1, 2, 5, 16)},
    ],
)
@pytest.mark.parametrize("kind", [None, "float32"])
def test_files_of_other_heads_or_types_are_refused(tmp_path, model, change, kind):
    path = tmp_path / "a.safetensors"
    filled(model, prompt(5)).save(path, [1, 2, 3, 4, 5], "m")
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    mx.save_safetensors(str(path), change(arrays), metadata)
    cache = model.new_cache(kind)
    message = refused(cache.restore, path, "m")
    assert message.startswith(f"{path}: wanted ")
    assert cache.length == 0


def test_save_of_the_wrong_tokens_is_refused(tmp_path, model):
    path = tmp_path / "a.cache"
    wanted = f"{path}: cannot save a KV cache of 5 tokens with 4 token ids"
    assert refused(filled(model, prompt(5)).save, path, [1, 2, 3, 4], "m") == wanted
    assert "cannot save a KV cache of 0 tokens" in refused(model.new_cache().save, path, [], "m")
    assert not path.exists()


def test_save_to_where_nothing_can_be_written(tmp_path, model):
    cache = filled(model, prompt(5))
    missing = tmp_path / "no" / "a.cache"
    assert refused(cache.save, missing, [1, 2, 3, 4, 5], "m").startswith(f"{missing}: cannot write the prompt cache: ")
    assert refused(cache.save, tmp_path, [1, 2, 3, 4, 5], "m").startswith(f"{tmp_path}: cannot write the prompt cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
def test_a_full_disk_leaves_no_file_and_keeps_the_old_one(tmp_path):
    """A limit on the size of files stands for the full disk: writing past it fails in the same way."""
    path = tmp_path / "a.cache"
    code = f"""if True:
        import resource, signal
        import mlx.core as mx
        from mlxeff import MlxeffError
        from mlxeff.cache import KVCache, LayerCache
        cache = KVCache([LayerCache()])
        def fill(count):
            cache.layers[0].append(mx.ones((1, 4, count, 64)), mx.ones((1, 4, count, 64)))
        fill(10)
        cache.save({str(path)!r}, list(range(10)), "m")
        fill(990)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            cache.save({str(path)!r}, list(range(1000)), "m")
        except MlxeffError as error:
            print(error)
        print(len(KVCache([LayerCache()]).restore({str(path)!r}, "m")))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = run.stdout.splitlines()
    assert len(lines) == 2, run.stdout + run.stderr
    assert lines[0].startswith(f"{path}: cannot write the prompt cache: ")
    assert lines[1] == "10", "the older file is whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a.cache"]
