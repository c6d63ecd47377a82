"""What crosses from Python to the native decoder: everything by name, and one line that names what does not fit."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from helpers import assert_close
from mlxeff import kernels

native, reason = kernels.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)

DIM, HEAD_DIM, HEADS, GROUPS, WIDTH, VOCABULARY = 32, 8, 4, 2, 64, 20


def dense(rows, columns):
    return {"kind": "dense", "weight": mx.random.normal((rows, columns)) * 0.2}


def affine(rows, columns):
    weight, scales, biases = mx.quantize(mx.random.normal((rows, columns)) * 0.2, 32, 4)
    return {"kind": "affine", "weight": weight, "scales": scales, "biases": biases, "group_size": 32, "bits": 4}


def seedlm(rows, columns):
    blocks = mx.random.randint(0, 1 << 30, (rows, columns // 8)).astype(mx.uint32) * 2 + 1  # seeds are not 0
    return {"kind": "seedlm", "blocks": blocks, "cols": columns, "columns": 8, "states": 3, "exponent_bias": 0}


def ends():
    mx.random.seed(0)
    return {
        "dim": DIM,
        "head_dim": HEAD_DIM,
        "eps": 1e-5,
        "rope": {"frequencies": mx.array([1.0, 0.5, 0.25, 0.125]), "magnitude": 1.0},
        "norm": mx.ones(DIM),
        "embedding": dense(VOCABULARY, DIM),
        "head": {**affine(VOCABULARY, DIM), "bias": None},
    }


def layer():
    mx.random.seed(1)
    wide, narrow = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    return {
        "norms": {"attention": mx.ones(DIM), "feed_forward": mx.ones(DIM), "query": None, "key": mx.ones(HEAD_DIM)},
        "attention": {
            "query": {**dense(wide, DIM), "bias": mx.ones(wide)},
            "key": dense(narrow, DIM),
            "value": seedlm(narrow, DIM),
            "output": dense(DIM, wide),
        },
        "heads": HEADS,
        "groups": GROUPS,
        "window": 0,
        "feed_forward": {
            "kind": "gated",
            "gate": affine(WIDTH, DIM),
            "up": dense(WIDTH, DIM),
            "down": dense(DIM, WIDTH),
        },
    }


def decoder(layers=2):
    made = native.Decoder(**ends())
    for _ in range(layers):
        made.add_layer(**layer())
    return made


def store(batch=1, capacity=8, dtype=mx.float32):
    buffers = {name: mx.zeros((batch, GROUPS, capacity, HEAD_DIM), dtype) for name in ("keys", "values")}
    return {"kind": "dense", **buffers}


def changed(tree, path, value):
    """A copy of nested dicts in which the entry at `path` is `value`, or missing for the ellipsis."""
    tree = copy.copy(tree)
    name, *rest = path
    if rest:
        tree[name] = changed(tree[name], rest, value)
    elif value is ...:
        del tree[name]
    else:
        tree[name] = value
    return tree


def refuses(call, message):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("head", "kind"), "ternary", "head: unknown kind 'ternary', known are dense, affine, seedlm, affine_planes"),
        (("head", "kind"), ..., "head: missing kind"),
        (("head", "kind"), 4, "head: kind: wanted a str, got int"),
        (("head", "scales"), ..., "head: missing scales"),
        (("head", "zeros"), 1, "head: unknown zeros"),
        (("head", "scales"), [1.0], "head: scales: wanted an mlx array, got list"),
        (("head", "bits"), "4", "head: bits: wanted an integer, got str"),
        (("head", "bits"), 7, "head: bits: wanted 2, 3, 4, 5, 6 or 8"),
        (("head", "group_size"), 0, "head: group_size: wanted 32, 64 or 128"),
        (("head", "weight"), mx.zeros((4, 4)), "head: weight: wanted a matrix of uint32"),
        (("head", "scales"), mx.ones((4, 1)), "head: scales: wanted floats of shape (20, 1), got float32 (4, 1)"),
        (("head", "biases"), mx.ones((20, 1), mx.float16), "head: biases: wanted the type of scales"),
        (("head", "bias"), mx.ones(3), "head: bias: wanted floats of shape (20,), got float32 (3,)"),
        (("embedding", "weight"), mx.ones(DIM), "embedding: weight: wanted a matrix, got shape (32,)"),
        (("embedding", "weight"), mx.ones((9, 3)), "embedding: wanted a matrix of 32 columns, got (9, 3)"),
        (("rope",), {"frequency": 1}, "rope: missing frequencies, magnitude; unknown frequency"),
        (("rope", "magnitude"), "1", "rope: magnitude: wanted a number, got str"),
        (("rope", "frequencies"), mx.ones(3), "rope: frequencies: wanted floats of shape (4,), got float32 (3,)"),
        (("norm",), mx.ones(3), "norm: wanted shape (32,), got float32 (3,)"),
        (("head_dim",), 7, "wanted dim of at least 1 and an even head_dim"),
    ],
)
def test_ends_that_do_not_fit(path, value, message):
    refuses(lambda: native.Decoder(**changed(ends(), path, value)), f"decoder: {message}")


def test_the_kinds_that_python_asks_for():
    assert native.feed_forward_kinds == ["gated", "dynamic", "sparse"]
    assert native.store_kinds == ["dense", "planes"]


def test_planes_of_two_shapes_are_refused():
    def plane(name, prefix, rows):
        scale = mx.ones((rows, DIM // 32))
        return {name: mx.zeros((rows, DIM // 8), mx.uint32), f"{prefix}scales": scale, f"{prefix}biases": scale}

    head = {"kind": "affine_planes", "group_size": 32, **plane("upper", "", 20)}
    native.Decoder(**changed(ends(), ("head",), head | plane("lower", "lower_", 20)))
    other = changed(ends(), ("head",), head | plane("lower", "lower_", 10))
    refuses(lambda: native.Decoder(**other), "decoder: head: lower: wanted the shape of upper")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("norms", "key"), ..., "norms: missing key"),
        (("norms", "value"), None, "norms: unknown value"),
        (("norms", "attention"), None, "norms: attention: wanted an mlx array, got NoneType"),
        (("norms", "key"), mx.ones(3), "norms: key: wanted floats of shape (8,), got float32 (3,)"),
        (("attention", "query"), ..., "attention: missing query"),
        (("attention", "gate"), dense(1, 1), "attention: unknown gate"),
        (("attention", "key"), None, "attention: key: wanted a dict, got NoneType"),
        (("attention", "key"), dense(32, 32), "attention: key: wanted a matrix (16, 32), got (32, 32)"),
        (("attention", "value", "blocks"), ..., "attention: value: missing seeds, coefficients, exponents"),
        (("attention", "value", "states"), 5, "attention: value: seedlm: the blocks are of no known format"),
        (("heads",), 3, "wanted heads, groups that divide them, and a window of 0 or more"),
        (("feed_forward", "kind"), "mixed", "feed_forward: unknown kind 'mixed', known are gated, dynamic, sparse"),
        (("feed_forward", "gate"), ..., "feed_forward: missing gate"),
        (("feed_forward", "router"), dense(4, 32), "feed_forward: unknown router"),
        (("feed_forward", "down"), dense(32, 63), "feed_forward: down: wanted a matrix (32, 64), got (32, 63)"),
    ],
)
def test_layers_that_do_not_fit(path, value, message):
    made = decoder(1)
    refuses(lambda: made.add_layer(**changed(layer(), path, value)), f"decoder: layer 1: {message}")


def sparse():
    """A feed-forward that leaves out inputs. Its down has DIM outputs, which are too few."""
    scale = mx.ones(DIM // 32 * 2 * WIDTH)
    gate_up = {"kind": "columns", "weight": mx.zeros(DIM * 2 * WIDTH // 8, mx.uint32), "scales": scale, "biases": scale}
    return {
        "kind": "sparse",
        "gate_up": {**gate_up, "group_size": 32, "bits": 4, "bias": None},
        "down": {"kind": "columns", "weight": mx.zeros((WIDTH, DIM)), "bias": None},
        "input_weights": mx.ones(DIM),
        "neuron_weights": mx.ones(WIDTH),
    }


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gate_up", "kind"), "affine", "gate_up: unknown kind 'affine', known are columns"),
        (("gate_up", "biases"), ..., "gate_up: missing biases"),
        (("gate_up", "bits"), 5, "gate_up: bits: wanted 4 or 8, got 5"),
        (("gate_up", "group_size"), 16, "gate_up: group_size: wanted 32, 64 or 128"),
        (("gate_up", "group_size"), 64, "gate_up: wanted whole groups of inputs, got 32 inputs"),
        (("gate_up", "scales"), mx.ones(3), "gate_up: scales: wanted floats of shape (128,), got float32 (3,)"),
        (("gate_up", "biases"), mx.ones(128, mx.float16), "gate_up: biases: wanted the type of scales"),
        (("gate_up", "weight"), mx.zeros(512), "gate_up: weight: wanted uint32"),
        (("gate_up", "weight"), mx.zeros(9, mx.uint32), "gate_up: weight: wanted shape (512,), got (9,)"),
        (("gate_up", "bias"), mx.ones(128), "gate_up: wanted no bias"),
        (("down", "weight"), mx.ones((DIM, WIDTH)), "down: weight: wanted shape (64, 32), got (32, 64)"),
        ((), ..., "down: wanted multiples of 64 outputs and of 32 inputs, got (32, 64)"),
    ],
)
def test_columns_that_do_not_fit(path, value, message):
    made, given = decoder(1), changed(sparse(), path, value) if path else sparse()
    refuses(lambda: made.add_layer(**layer() | {"feed_forward": given}), f"decoder: layer 1: feed_forward: {message}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "paged", "unknown kind 'paged', known are dense, planes"),
        (("values",), ..., "missing values"),
        (("scales",), mx.ones(1), "unknown scales"),
        (("values",), 1, "values: wanted an mlx array, got int"),
        (("values",), mx.zeros((1, 2, 9, 8)), "values: wanted floats of shape (1, 2, 8, 8), got float32 (1, 2, 9, 8)"),
        (("values",), mx.zeros((1, 2, 8, 8), mx.float16), "values: wanted the type of keys"),
        (("keys",), mx.zeros((1, 2, 8)), "keys: wanted floats of shape (1, 2, 0, 8), got float32 (1, 2, 8)"),
    ],
)
def test_stores_that_do_not_fit(path, value, message):
    stores = [store(), changed(store(), path, value)]
    tokens, rows = mx.array([[1, 2]]), [mx.ones((1, GROUPS, 2, HEAD_DIM))] * 2
    refuses(lambda: native.forward(decoder(), tokens, stores, 0, True, native.EXACT), f"decoder: store 1: {message}")
    refuses(lambda: native.append(decoder(), rows, rows, stores, 0), f"decoder: store 1: {message}")


def test_calls_that_do_not_fit():
    made, tokens = decoder(), mx.array([[1, 2]])

    def forward(stores, offset=0, mode=native.EXACT):
        return lambda: native.forward(made, tokens, stores, offset, False, mode)

    refuses(forward([store()]), "decoder: wanted a store for each of 2 layers, got 1")
    refuses(forward([store(), store()], 7), "decoder: store 0: wanted room for 9 tokens, got 8")
    refuses(forward([store(), 1]), "decoder: store 1: wanted a dict, got int")
    refuses(forward([store(), store()], mode=3), "decoder: wanted mode EXACT, COMPUTE_BF16 or COMPUTE_INT8, got 3")
    empty = native.Decoder(**ends())
    refuses(lambda: native.forward(empty, tokens, [], 0, True, 0), "decoder: wanted layers, got none")
    with pytest.raises(RuntimeError, match="a layer after the first call"):
        made.add_layer(**layer())
    with pytest.raises(TypeError):
        native.Decoder(*ends().values())


def test_a_call_adds_the_tokens_to_the_stores():
    made, tokens = decoder(), mx.array([[1, 2, 3], [4, 5, 6]])
    stores, read, appended = [store(2), store(2)], [store(2)], [store(2), store(2)]
    logits = native.forward(made, tokens, stores, 0, True, native.EXACT)
    assert logits.shape == (2, 3, VOCABULARY)
    assert [each["kind"] for each in stores] == ["dense", "dense"]
    assert all(set(each) == {"kind", "keys", "values"} for each in stores)
    inputs, keys, values = native.read(made, tokens, read, 0, [0, 1], [0, 1], native.EXACT)
    assert (len(inputs), len(keys), len(values)) == (2, 2, 2)
    assert inputs[0].shape == (2, 3, DIM)
    heads = [[x.reshape(2, 3, GROUPS, HEAD_DIM).swapaxes(1, 2) for x in rows] for rows in (keys, values)]
    assert native.append(made, *heads, appended, 0) is None
    for got, want in zip(appended, stores, strict=True):
        for name in ("keys", "values"):
            assert_close(got[name], want[name], name, rtol=0, atol=0)
    for name in ("keys", "values"):
        assert_close(read[0][name], stores[0][name], name, rtol=0, atol=0)
        assert mx.all(mx.any(stores[0][name][:, :, :3] != 0, axis=-1)).item()
        assert_close(stores[0][name][:, :, 3:], mx.zeros((2, GROUPS, 5, HEAD_DIM)), "the rest", rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64, mx.uint8])
def test_tokens_of_any_integers_and_layout(dtype):
    made, tokens = decoder(), [[1, 2, 3], [4, 5, 6]]
    want = native.forward(made, mx.array(tokens), [store(2), store(2)], 0, True, native.EXACT)
    turned = mx.array([list(row) for row in zip(*tokens, strict=True)]).astype(dtype).T
    got = native.forward(made, turned, [store(2), store(2)], 0, True, native.EXACT)
    assert_close(got, want, "logits", rtol=0, atol=0)
    bad = mx.array([[2**32 - 1]], mx.uint32)
    with pytest.raises(RuntimeError, match="native kernel"):
        native.forward(made, bad, [store(), store()], 0, True, native.EXACT)


@pytest.mark.parametrize("holder", ["one owner", "somebody else", "a graph", "a part of its memory"])
def test_a_store_that_somebody_else_holds_is_copied(holder):
    """The dict and one owner, the layer of a cache, may refer to an array that is written."""
    made, stores = decoder(), [store(), store()]
    native.forward(made, mx.array([[1, 2, 3]]), stores, 0, False, native.EXACT)
    before = [{name: np.array(each[name]) for name in ("keys", "values")} for each in stores]
    owner = [[each["keys"], each["values"]] for each in stores]
    held = {
        "one owner": lambda array: None,
        "somebody else": lambda array: array,
        "a graph": lambda array: array + 0,
        "a part of its memory": lambda array: array.reshape(-1),
    }
    others = [{name: held[holder](each[name]) for name in before[0]} for each in stores]
    if holder == "a part of its memory":
        mx.eval([list(each.values()) for each in others])
    logits = native.forward(made, mx.array([[4, 5]]), stores, 3, False, native.EXACT)
    for old, kept, new, owned in zip(before, others, stores, owner, strict=True):
        for name, mine in zip(("keys", "values"), owned, strict=True):
            assert (new[name] is mine) == (holder == "one owner")
            if holder != "one owner":
                assert np.array_equal(np.array(kept[name]).reshape(-1), old[name].reshape(-1)), "what others hold"
            assert np.array_equal(np.array(new[name])[:, :, :3], old[name][:, :, :3]), "what was there"
            assert mx.all(mx.any(new[name][:, :, 3:5] != 0, axis=-1)).item()
    want = native.forward(made, mx.array([[1, 2, 3, 4, 5]]), [store(), store()], 0, False, native.EXACT)
    assert_close(logits, want, "logits", rtol=2.0**-15)


def test_a_call_refuses_to_be_differentiated():
    """The result of a call is a constant, so a gradient through it would be lost without a word."""
    made, stores = decoder(), [store(), store()]
    keys = mx.zeros((1, GROUPS, 1, HEAD_DIM))

    def loss(x):
        native.append(made, [x, x], [x, x], [store(), store()], 0)
        return x.sum()

    message = "native decoder: has no gradient; call model.train() first, which computes operator by operator"
    refuses(lambda: mx.grad(loss)(keys), message)

    def through_the_store(x):
        stores[0]["keys"] = stores[0]["keys"] + x
        return native.forward(made, mx.array([[1]]), stores, 0, False, native.EXACT).sum()

    refuses(lambda: mx.grad(through_the_store)(mx.array(1.0)), message)


def test_objects_are_found_in_their_place():
    one, other = mx.zeros(3), mx.zeros(3)
    module = nn.Module()
    module.weight = one
    assert native.holds([])
    assert native.holds([(module, "weight", one), ({"b": other}, "b", other)])
    assert not native.holds([(module, "weight", one), (module, "weight", other)]), "an equal one is another one"
    assert not native.holds([(module, "bias", one)])
    for wrong in ([(module, "weight")], [([], "weight", one)], [3]):
        with pytest.raises((TypeError, RuntimeError)):
            native.holds(wrong)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_step_is_noted_with_its_threads(threads):
    """Two layers of ten steps, and four around them; each has a thread that worked, and none began before it came."""
    made, tokens = decoder(), mx.array([[1]])
    native.set_num_threads(threads)
    native.note_step_times(1000)
    try:
        for _ in range(3):
            native.forward(made, tokens, [store(), store()], 0, False, native.EXACT)
        notes = native.step_times()
    finally:
        native.note_step_times(0)
        native.set_num_threads(0)
    assert {step for _, step, *_ in notes} == set(range(24))
    worked = [note for note in notes if note[4]]
    assert all(came <= done <= went for _, _, _, came, done, went in worked)
    assert all(came <= went for _, _, _, came, _, went in notes)
    assert len({(note[0], note[1]) for note in worked}) == (24 if threads == 1 else 72)
    assert {note[2] for note in notes} <= set(range(threads)) >= {0}
    assert native.step_times() == []


def test_no_more_steps_are_noted_than_wanted():
    native.note_step_times(5)
    native.forward(decoder(), mx.array([[1]]), [store(), store()], 0, False, native.EXACT)
    assert len(native.step_times()) == 5
    native.note_step_times(0)
