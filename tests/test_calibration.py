"""Windows of a text, and their way through a model layer by layer: against a pass of the whole model, to the bit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from helpers import assert_close
from mlxeff import calibration
from mlxeff.calibration import LayerStream
from mlxeff.errors import MlxeffError
from tiny_model import CONFIG, random_model

WINDOWS = np.random.default_rng(4).integers(0, 256, (10, 12))
READERS = [  # of a layer, by what they read, in the order of the calls
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
NAMES = [name for names in READERS for name in names]


@pytest.fixture(autouse=True)
def three_windows_a_batch(monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 3 * WINDOWS.shape[1] + 5)


def model_of(layers=3):
    return random_model(CONFIG | {"num_hidden_layers": layers})


def batches():
    return [mx.array(WINDOWS[start : start + 3]) for start in range(0, 10, 3)]


def test_the_outputs_of_the_last_layer_are_those_of_the_whole_model():
    model = model_of()
    stream = LayerStream(model, WINDOWS)
    for index, layer in enumerate(model.layers):
        assert stream.index == index
        assert stream.layer is layer
        assert [batch.shape for batch in stream.hidden] == [(3, 12, 64)] * 3 + [(1, 12, 64)]
        stream.next_layer()
    for hidden, tokens in zip(stream.hidden, batches(), strict=True):
        want = model(tokens, model.new_cache())
        assert_close(model.head(model.end_parts().norm(hidden)), want, "logits", rtol=0, atol=0)


def test_what_is_watched_is_shown_batch_by_batch_and_changes_nothing():
    model = model_of()
    stream = LayerStream(model, WINDOWS)
    before, modules = list(stream.hidden), dict(model.layers[0].named_modules())
    seen = []
    stream.watch(NAMES, lambda readers, x: seen.append((readers, x)))
    assert [readers for readers, _ in seen] == READERS * 4
    assert [x.shape for _, x in seen] == [(b, 12, width) for b in (3, 3, 3, 1) for width in (64, 64, 64, 96)]
    assert (stream.index, list(map(id, stream.hidden))) == (0, list(map(id, before)))
    again = []
    stream.watch(NAMES[-1:], lambda readers, x: again.append((readers, x)))
    assert [readers for readers, _ in again] == READERS[-1:] * 4
    assert_close(again[2][1], seen[11][1], "seen again", rtol=0, atol=0)

    def stop(readers, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.watch(NAMES, stop)
    assert dict(model.layers[0].named_modules()) == modules


def test_one_run_shows_a_layer_and_goes_on():
    model, seen = model_of(), [[], []]
    streams = [LayerStream(model, WINDOWS) for _ in range(2)]
    streams[0].watch(NAMES, lambda readers, x: seen[0].append((readers, x)))
    streams[0].next_layer()
    streams[1].next_layer(NAMES, lambda readers, x: seen[1].append((readers, x)))
    assert [stream.index for stream in streams] == [1, 1]
    for (first, a), (second, b) in zip(*seen, strict=True):
        assert first == second
        assert mx.array_equal(a, b)
    assert all(mx.array_equal(a, b) for a, b in zip(streams[0].hidden, streams[1].hidden, strict=True))


def test_a_layer_reads_what_the_changed_layers_before_it_compute():
    """A matrix of each layer is replaced when the layer has been watched."""
    model, seen = model_of(), []
    stream = LayerStream(model, WINDOWS)
    for index in range(3):
        # Each layer is seen as it was made; those before it as they were changed.
        so_far = [model.layer_states(tokens, model.new_cache(), inputs=[index])[0][0] for tokens in batches()]
        shown = []
        stream.watch(["self_attn.q_proj"], lambda _, x, shown=shown: shown.append(x))
        seen.append((shown, so_far))
        stream.layer.update_modules({"mlp": {"down_proj": Doubled(stream.layer.mlp.down_proj)}})
        stream.next_layer()
    for index, (shown, so_far) in enumerate(seen):
        for got, want, tokens in zip(shown, so_far, batches(), strict=True):
            assert_close(got, want, f"layer {index}, at the time", rtol=0, atol=0)
            changed = model.layer_states(tokens, model.new_cache(), inputs=[index])[0][0]
            assert_close(got, changed, f"layer {index}, of the changed model", rtol=0, atol=0)
    untouched = model_of().layer_states(batches()[0], model.new_cache(), inputs=[2])[0][0]
    assert mx.abs(seen[2][0][0] - untouched).max() > 0.1


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return 2 * self.inner(x)


class Toy:
    """Two layers, each of which widens what it reads 64 times; notes (layer, windows) of each call."""

    def __init__(self):
        self.calls = []
        self.layers = [Wide(self.calls, index) for index in range(2)]
        self.embed = nn.Embedding(1, 16)

    def layer_cache(self, index):
        return self.layers[index]


class Wide(nn.Module):
    def __init__(self, calls, index):
        super().__init__()
        self.up, self.down = nn.Linear(16, 1024), nn.Linear(1024, 16)
        self._calls, self._index = calls, index

    def __call__(self, x, cache):
        assert cache._index == self._index
        self._calls.append((self._index, x.shape[0]))
        return self.down(self.up(x))


def test_layers_run_in_order_in_bounded_memory():
    """At any time beside the hidden states what one batch makes, and not what all of them do."""
    toy = Toy()
    mx.eval([layer.parameters() for layer in toy.layers])
    stream = LayerStream(toy, np.zeros((300, 12), np.int32))
    start, held, wide = mx.get_active_memory(), 300 * 12 * 16 * 4, 3 * 12 * 1024 * 4
    for index in range(2):
        mx.reset_peak_memory()
        count = []
        stream.watch(["up", "down"], lambda readers, x, count=count: count.append(x.shape))
        assert count == [(3, 12, 16), (3, 12, 1024)] * 100
        assert mx.get_peak_memory() - start < 4 * wide
        toy.calls.clear()
        mx.reset_peak_memory()
        stream.next_layer()
        assert toy.calls == [(index, 3)] * 100
        assert wide < mx.get_peak_memory() - start < held + 4 * wide < 100 * wide  # computed when it returns
        assert mx.get_active_memory() - start < wide
    assert sum(batch.nbytes for batch in stream.hidden) == held


class Bytes:
    """A token a byte."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return list(text.encode())


@pytest.mark.parametrize(("tokens", "shape"), [(1024, (4, 256)), (1100, (4, 256)), (100, (1, 100)), (3000, (11, 256))])
def test_windows_are_spread_evenly_over_the_text(tokens, shape):
    text = "".join(chr(32 + i % 90) for i in range(2900))
    got = calibration.windows(text, Bytes(), tokens, "here")
    assert got.shape == shape
    starts = np.linspace(0, 2900 - shape[1], shape[0]).astype(int)
    assert got.tolist() == [list(text.encode()[start : start + shape[1]]) for start in starts]


def test_a_text_that_is_short_is_read_whole_or_refused(caplog):
    with caplog.at_level("WARNING", "mlxeff"):
        assert calibration.windows("x" * 600, Bytes(), 32768, "here").shape == (2, 256)
    assert "here: calibration on 512 tokens and not 32768: the text has no more" in caplog.text
    with pytest.raises(MlxeffError, match="here: calibration text: wanted at least 256 tokens, got 255"):
        calibration.windows("x" * 255, Bytes(), 32768, "here")


def test_the_shipped_text_suffices_for_many_tokens():
    text, name = calibration.read_text(None)
    assert name.startswith("the package's text (sha256 ")
    assert 300_000 < len(text.encode()) < 500_000
    assert text.count("\n\n") > 256  # paragraphs
    assert len(text) / 6 >= calibration.TOKENS


def test_a_text_has_the_name_and_the_hash_of_its_file(tmp_path):
    (tmp_path / "some.txt").write_bytes("Grüße".encode())
    assert calibration.read_text(tmp_path / "some.txt") == ("Grüße", "some.txt (sha256 f83e039796c6)")
    (tmp_path / "some.txt").write_bytes(b"\xff")
    with pytest.raises(MlxeffError, match=r"some\.txt: wanted UTF-8 text, got invalid start byte at byte 0"):
        calibration.read_text(tmp_path / "some.txt")
    with pytest.raises(MlxeffError, match=r"none\.txt: cannot be read: No such file"):
        calibration.read_text(str(tmp_path / "none.txt"))


def test_a_text_with_a_token_that_the_model_has_no_row_for():
    """A tokenizer may have more tokens than its model."""
    assert calibration.windows("a" * 600, Bytes(), 512, "here", 98).shape == (2, 256)
    with pytest.raises(MlxeffError, match="here: calibration text: wanted token ids below 97, got 97"):
        calibration.windows("a" * 600, Bytes(), 512, "here", 97)
