"""The dynamic feed-forward of the native decoder against NumPy: about 5 seconds.

The decoder under test has one layer whose attention adds nothing, an output head that is the identity, and no weights
in its norms. So its logits are norm(x + feed_forward(norm(x))), with x the embeddings of the tokens.
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from helpers import assert_close
from mlxeff import kernels
from test_native_boundary import changed, refuses

native, reason = kernels.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)

DIM, WIDTH, WIDTHS, RANK, VOCABULARY, HEAD_DIM, EPS = 64, 160, (32, 96, 160), 32, 256, 16, 1e-5
KINDS = ["float32", "float16", "bfloat16", "affine", "affine_planes", "seedlm"]


def packed(weight, names):
    return dict(zip(names, mx.quantize(weight, 32, 4), strict=True))


def matrix(kind, rows, columns, bias=False):
    """A random matrix in the form that the native decoder takes."""
    weight = mx.random.normal((rows, columns)) * 0.2
    if kind == "affine":
        made = {"kind": kind, "group_size": 32, "bits": 4, **packed(weight, ("weight", "scales", "biases"))}
    elif kind == "affine_planes":
        upper = packed(weight, ("upper", "scales", "biases"))
        rest = weight - mx.dequantize(*upper.values(), 32, 4)
        lower = packed(rest, ("lower", "lower_scales", "lower_biases"))
        made = {"kind": kind, "group_size": 32, **upper, **lower}
    elif kind == "seedlm":
        blocks = mx.random.randint(0, 1 << 30, (rows, columns // 8)).astype(mx.uint32) * 2 + 1  # seeds are not 0
        made = {"kind": kind, "blocks": blocks, "cols": columns, "columns": 8, "states": 3, "exponent_bias": -10}
    else:
        made = {"kind": "dense", "weight": weight.astype(getattr(mx, kind))}
    return made | ({"bias": mx.random.normal((rows,)) * 0.2} if bias else {})


def values(given):
    """The matrix in float64."""
    if given["kind"] == "affine":
        weight = mx.dequantize(given["weight"], given["scales"], given["biases"], 32, 4)
    elif given["kind"] == "affine_planes":
        names = ("upper", "scales", "biases"), ("lower", "lower_scales", "lower_biases")
        weight = sum(mx.dequantize(*(given[name] for name in plane), 32, 4) for plane in names)
    elif given["kind"] == "seedlm":
        layout = {name: given[name] for name in ("cols", "columns", "states", "exponent_bias")}
        rows = given["blocks"].shape[0]
        weight = native.seedlm_decode([given["blocks"]], None, rows=rows, **layout, dtype=mx.float32)
    else:
        weight = given["weight"]
    return np.array(weight.astype(mx.float32), np.float64)


def bias_of(given):
    return np.array(given["bias"], np.float64) if "bias" in given else 0.0


def row_bytes(given, share=1.0):
    """The bytes of a row of the matrix, or of the first `share` of its columns."""
    arrays = [a for name, a in given.items() if name != "bias" and isinstance(a, mx.array)]
    whole = sum(a.nbytes // a.shape[0] for a in arrays) * share
    assert whole == int(whole)
    return int(whole)


def ordered(kind="affine", **more):
    """A random dynamic feed-forward whose experts have matrices of their own, and whose widest one has its columns in
    another order than that of the neurons."""
    made = feed_forward(kind, **more)
    made["experts"][0]["down"] = matrix(kind, DIM, WIDTHS[0])
    return made | {"order": mx.random.permutation(WIDTH).astype(mx.int32)}


def feed_forward(kind="affine", other=None, rule="lagrangian", bias=True, experts=2):
    """A random dynamic feed-forward of three experts, or of two. The narrowest takes columns of `down`; the next has
    its own and a low-rank correction."""
    other = other or kind
    scores = experts if rule == "lagrangian" else experts + 1
    return {
        "kind": "dynamic",
        "gate": matrix(kind, WIDTH, DIM, bias),
        "up": matrix(other, WIDTH, DIM, bias),
        "down": matrix(kind, DIM, WIDTH, bias),
        "experts": [
            {"width": WIDTHS[0], "down": None, "left": None, "right": None},
            {
                "width": WIDTHS[1],
                "down": matrix(other, DIM, WIDTHS[1]),
                "left": matrix(kind, DIM, RANK),
                "right": matrix(other, RANK, WIDTHS[1]),
            },
        ][:experts],
        "router": {
            "rule": rule,
            "weight": mx.random.normal((scores, DIM)) * (0.2 if rule == "lagrangian" else 0.4),
            "bias": mx.random.normal((scores,)) * 0.1,
        },
        "prices": mx.array([*(w / WIDTH for w in WIDTHS[:experts]), 1.0]),
    }


def decoder(*feed_forwards):
    zeros = {name: {"kind": "dense", "weight": mx.zeros((HEAD_DIM, DIM))} for name in ("query", "key", "value")}
    zeros["output"] = {"kind": "dense", "weight": mx.zeros((DIM, HEAD_DIM))}
    made = native.Decoder(
        dim=DIM,
        head_dim=HEAD_DIM,
        eps=EPS,
        rope={"frequencies": mx.ones(HEAD_DIM // 2), "magnitude": 1.0},
        norm=mx.ones(DIM),
        embedding={"kind": "dense", "weight": EMBEDDING},
        head={"kind": "dense", "weight": mx.eye(DIM)},
    )
    norms = {"attention": mx.ones(DIM), "feed_forward": mx.ones(DIM), "query": None, "key": None}
    for each in feed_forwards:
        made.add_layer(norms=norms, attention=zeros, heads=1, groups=1, window=0, feed_forward=each)
    return made


EMBEDDING = mx.random.normal((VOCABULARY, DIM), key=mx.random.key(0))


def run(made, tokens, dial=None, mode=None, last=False, layers=1, offset=0, stores=None):
    batch, length = tokens.shape
    buffers = (batch, 1, offset + length, HEAD_DIM)
    stores = stores or [
        {"kind": "dense", "keys": mx.zeros(buffers), "values": mx.zeros(buffers)} for _ in range(layers)
    ]
    mode = native.EXACT if mode is None else mode
    logits = native.forward(made, tokens, stores, offset, not last, mode, dial=dial)
    return np.array(logits)


def norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def routed(given, x, dial):
    """The expert of each row of x, and how clear each choice is."""
    router, prices = given["router"], np.array(given["prices"], np.float64)
    scores = x @ np.array(router["weight"], np.float64).T + np.array(router["bias"], np.float64)
    if router["rule"] == "lagrangian":
        costs = np.concatenate([np.exp(scores), np.zeros((len(x), 1))], axis=1) + dial * prices
        ordered = np.sort(costs, axis=1)
        return costs.argmin(1), ordered[:, 1] - ordered[:, 0]
    shares = np.exp(scores - scores.max(1, keepdims=True))
    tails = (shares / shares.sum(1, keepdims=True))[:, :0:-1].cumsum(1)[:, ::-1]
    chosen = np.concatenate([tails <= dial, np.ones((len(x), 1))], axis=1).argmax(1)
    return chosen, np.abs(tails - dial).min(1)


def wanted(given, tokens, experts):
    """The logits of the tokens, each of which takes the expert given for it."""
    x = np.array(EMBEDDING, np.float64)[tokens]
    gate, up, down = (values(given[name]) for name in ("gate", "up", "down"))
    normed = norm(x)
    g, u = normed @ gate.T + bias_of(given["gate"]), normed @ up.T + bias_of(given["up"])
    hidden, out = g / (1 + np.exp(-g)) * u, np.zeros_like(x)
    narrower = given["experts"]
    for e in set(experts.tolist()):
        rows, last = experts == e, narrower[e] if e < len(narrower) else {}
        h = hidden[rows, : last.get("width", WIDTH)]
        own = last.get("down")
        whole = down[:, np.array(given["order"])] if "order" in given else down
        out[rows] = h @ (values(own) if own else whole[:, : h.shape[1]]).T
        if last.get("right"):
            out[rows] += h @ values(last["right"]).T @ values(last["left"]).T
    return norm(x + out + bias_of(given["down"]))


def bytes_read(given, experts):
    """Of a pass whose tokens take `experts`: each matrix, or the part that some token needs, once."""
    narrower, taken = given["experts"], sorted(set(experts.tolist()))
    widths = [each["width"] for each in narrower] + [WIDTH]
    total = given["router"]["weight"].nbytes
    total += widths[taken[-1]] * (row_bytes(given["gate"]) + row_bytes(given["up"]))
    for e in taken:
        last = narrower[e] if e < len(narrower) else {}
        own = last.get("down")
        total += DIM * (row_bytes(own) if own else row_bytes(given["down"], widths[e] / WIDTH))
        if last.get("right"):
            total += RANK * row_bytes(last["right"]) + DIM * row_bytes(last["left"])
    return total


def usage(made):
    (only,) = made.usage()
    return np.array(only["counts"]), only["bytes"]


def clear_tokens(given, dial, count):
    """`count` tokens about whose expert there is no doubt, and their experts, of which there are all."""
    experts, margins = routed(given, norm(np.array(EMBEDDING, np.float64)), dial)
    clear = np.flatnonzero(margins > 1e-4)
    tokens = np.resize(clear[np.random.default_rng(count).permutation(len(clear))], count)
    if count >= 40:
        assert set(experts[tokens].tolist()) == set(range(len(given["prices"])))
    return tokens, experts[tokens]


def check(given, dial, tokens, experts, batch=1, mode=None, rtol=2.0**-14):
    """Logits and counters of one pass."""
    made = decoder(given)
    got = run(made, mx.array(tokens.reshape(batch, -1)), dial, mode)
    assert_close(got.reshape(-1, DIM), wanted(given, tokens, experts), "logits", rtol=rtol)
    counts, total = usage(made)
    assert counts.tolist() == np.bincount(experts, minlength=len(given["prices"])).tolist()
    assert total == bytes_read(given, experts)


def tolerance(*kinds):
    return 2.0**-8 if "seedlm" in kinds else 2.0**-14


DIALS = {"lagrangian": 2.0, "tail": 0.45}


@pytest.mark.parametrize("rule", DIALS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_counters(kind, rule):
    mx.random.seed(KINDS.index(kind))
    given, dial = feed_forward(kind, rule=rule), DIALS[rule]
    for rows in (1, 5, 40, 200):
        check(given, dial, *clear_tokens(given, dial, rows), rtol=tolerance(kind))
    check(given, dial, *clear_tokens(given, dial, 40), batch=2, rtol=tolerance(kind))


@pytest.mark.parametrize("kind", ["float32", "affine"])
def test_columns_of_the_widest_matrix_in_another_order(kind):
    mx.random.seed(11)
    given = ordered(kind)
    for rows in (1, 5, 40):
        check(given, 2.0, *clear_tokens(given, 2.0, rows))
    tokens = np.arange(20)
    whole = run(decoder(given), mx.array(tokens[None]))[0]  # without a dial all tokens take the widest
    assert_close(whole, wanted(given, tokens, np.full(20, 2)), "widest", rtol=2.0**-14)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (mx.zeros((WIDTH,), mx.int32), "order: wanted each column once"),
        (mx.arange(1, WIDTH + 1, dtype=mx.int32), "order: wanted each column once"),
        (mx.arange(9, dtype=mx.int32), f"order: wanted int32 of shape ({WIDTH},), got (9,)"),
    ],
)
def test_orders_that_do_not_fit(order, message):
    given = ordered() | {"order": order}
    refuses(lambda: decoder(given), f"decoder: layer 0: feed_forward: {message}")
    given = feed_forward() | {"order": mx.arange(WIDTH, dtype=mx.int32)}
    refuses(lambda: decoder(given), "decoder: layer 0: feed_forward: order: wanted experts with a down of their own")


@pytest.mark.parametrize(("kind", "other"), list(itertools.pairwise([*KINDS, KINDS[0]])))
def test_each_expert_alone_with_two_kinds(kind, other):
    mx.random.seed(7)
    given = feed_forward(kind, other, bias=False)
    for expert, rows in itertools.product(range(3), (1, 5, 40)):
        bias = [30.0, 30.0]
        if expert < 2:
            bias[expert] = -30.0
        forced = changed(given, ("router",), {**given["router"], "weight": mx.zeros((2, DIM)), "bias": mx.array(bias)})
        check(forced, 2.0, np.arange(rows), np.full(rows, expert), rtol=tolerance(kind, other))


def test_two_experts():
    mx.random.seed(3)
    given = feed_forward(experts=1)
    for rows in (1, 5, 40):
        check(given, 2.0, *clear_tokens(given, 2.0, rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["COMPUTE_BF16", "COMPUTE_INT8"])
def test_compute_modes(kind, mode):
    mx.random.seed(4)
    given = feed_forward(kind)
    for rows in (1, 5, 40):
        check(given, 2.0, *clear_tokens(given, 2.0, rows), mode=getattr(native, mode), rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_dial_it_is_the_gated_feed_forward(kind):
    mx.random.seed(5)
    given = feed_forward(kind)
    gated = {"kind": "gated", **{name: given[name] for name in ("gate", "up", "down")}}
    for rows in (1, 5, 40):
        tokens = mx.arange(rows)[None]
        made, plain = decoder(given), decoder(gated)
        assert (run(made, tokens) == run(plain, tokens)).all()
        assert (run(plain, tokens, dial=2.0) == run(plain, tokens)).all()
        assert plain.usage() == [None]
        counts, total = usage(made)
        assert counts.tolist() == [0, 0, rows]
        assert total == bytes_read(given, np.array([2])) - given["router"]["weight"].nbytes


def test_tokens_of_a_draft_have_the_bits_that_they_have_alone():
    mx.random.seed(6)
    for kind in KINDS[:-1]:
        given = feed_forward(kind)
        made, (tokens, _) = decoder(given), clear_tokens(given, 2.0, 8)
        together = run(made, mx.array(tokens[None]), 2.0)[0]
        for row, token in zip(together, tokens, strict=True):
            assert (run(made, mx.array([[int(token)]]), 2.0)[0, 0] == row).all()


def test_counters_of_several_passes_and_layers():
    mx.random.seed(8)
    given, other = feed_forward(), feed_forward()
    gated = {"kind": "gated", **{name: given[name] for name in ("gate", "up", "down")}}
    made = decoder(given, gated, other)
    assert made.usage() == [{"counts": [0, 0, 0], "bytes": 0}, None, {"counts": [0, 0, 0], "bytes": 0}]
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    run(made, tokens, 2.0, last=True, layers=3)
    first, none, last = made.usage()
    assert (sum(first["counts"]), none, sum(last["counts"])) == (6, None, 2)  # the last layer has the last tokens only
    run(made, tokens, 2.0, layers=3)
    assert [sum(made.usage()[i]["counts"]) for i in (0, 2)] == [12, 8]
    assert made.usage()[0]["bytes"] == 2 * first["bytes"] > 0
    stores = [{"kind": "dense", **{name: mx.zeros((2, 1, 3, HEAD_DIM)) for name in ("keys", "values")}}] * 2
    inputs, *_ = native.read(made, tokens, stores, 0, [2], [], native.EXACT, dial=2.0)
    wide, *_ = native.read(made, tokens, stores, 0, [2], [], native.EXACT)
    assert not mx.array_equal(inputs[0], wide[0]).item()
    assert [sum(made.usage()[i]["counts"]) for i in (0, 2)] == [24, 8]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gate",), ..., "missing gate"),
        (("neurons",), 1, "unknown neurons"),
        (("up",), matrix("affine", 128, DIM), "up: wanted a matrix (160, 64), got (128, 64)"),
        (("down",), matrix("affine", DIM, 128), "down: wanted a matrix (64, 160), got (64, 128)"),
        (("experts",), 2, "experts: wanted a list, got int"),
        (("experts",), [], "experts: wanted 1 to 15 beside the widest, got 0"),
        (("experts",), [3], "experts 0: wanted a dict, got int"),
        (("experts",), [{"down": None}], "experts 0: missing width"),
        (("experts",), [{"width": 32, "up": 1}], "experts 0: unknown up"),
        (("experts",), [{"width": 0}], "experts 0: width: wanted rising widths from 1 to 159, got 0"),
        (("experts",), [{"width": 160}], "experts 0: width: wanted rising widths from 1 to 159, got 160"),
        (
            ("experts",),
            [{"width": 64}, {"width": 64}],
            "experts 1: width: wanted rising widths from 1 to 159, got 64",
        ),
        (
            ("experts",),
            [{"width": 48}],
            "experts 0: width: wanted a multiple of the group size 32 of the widest down, or a down of its own, got 48",
        ),
        (
            ("experts",),
            [{"width": 32, "down": matrix("affine", DIM, 64)}],
            "experts 0: down: wanted a matrix (64, 32), got (64, 64)",
        ),
        (
            ("experts",),
            [{"width": 32, "down": matrix("affine", DIM, 32, bias=True)}],
            "experts 0: down: wanted no bias, that of the widest down is added",
        ),
        (
            ("experts",),
            [{"width": 32, "left": matrix("float32", DIM, 4)}],
            "experts 0: wanted both left and right, or neither",
        ),
        (
            ("experts",),
            [{"width": 32, "left": matrix("float32", DIM, 4), "right": matrix("float32", 5, 32)}],
            "experts 0: left: wanted a matrix (64, 5), got (64, 4)",
        ),
        (
            ("experts",),
            [{"width": 32, "left": matrix("float32", DIM, 4), "right": matrix("float32", 4, 16)}],
            "experts 0: right: wanted a matrix of 32 columns, got (4, 16)",
        ),
        (("router",), None, "router: wanted a dict, got NoneType"),
        (("router", "rule"), "greedy", "router: unknown rule 'greedy', known are lagrangian, tail"),
        (("router", "rule"), 1, "router: rule: wanted a str, got int"),
        (("router", "rule"), "tail", "router: weight: wanted floats of shape (3, 64), got float32 (2, 64)"),
        (
            ("router", "weight"),
            mx.ones((3, DIM)),
            "router: weight: wanted floats of shape (2, 64), got float32 (3, 64)",
        ),
        (("router", "bias"), mx.ones(3), "router: bias: wanted floats of shape (2,), got float32 (3,)"),
        (("router", "bias"), mx.array([0, float("nan")]), "router: bias: wanted finite numbers"),
        (("prices",), mx.ones(2), "prices: wanted floats of shape (3,), got float32 (2,)"),
        (("prices",), mx.array([0, 1, float("inf")]), "prices: wanted finite numbers"),
    ],
)
def test_feed_forwards_that_do_not_fit(path, value, message):
    given = changed(feed_forward(), path, value)
    refuses(lambda: decoder(given), f"decoder: layer 0: feed_forward: {message}")


def test_widths_that_no_group_ends_at():
    mx.random.seed(9)
    given = feed_forward("float32")
    given["experts"][0] = {"width": 41}
    for rows in (1, 5, 40):
        check(given, 2.0, *clear_tokens(given, 2.0, rows))


@pytest.mark.parametrize("dial", [float("nan"), float("inf")])
def test_a_dial_that_is_no_number(dial):
    made = decoder(feed_forward())
    refuses(lambda: run(made, mx.array([[1]]), dial), "decoder: dial: wanted a finite number or None")
