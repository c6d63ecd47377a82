"""The feed-forward network with nested experts, its router and its place in a model. Costs about 10 s."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff import ops
from mlxeff.assembly.model import build_model, load_path
from mlxeff.decode import PlainReading
from mlxeff.dynamoe.calibrate import experts, mean_fraction, table
from mlxeff.dynamoe.feed_forward import DynamicFeedForward, LowRank, Router
from mlxeff.dynamoe.fractions import LARGEST, Fractions
from mlxeff.dynamoe.install import gated_layers, of, read_entry
from mlxeff.dynamoe.usage import CountedReading
from mlxeff.errors import MlxeffError
from mlxeff.modules import Linear, QuantizedLinear
from mlxeff.running import EXACT, RunOptions
from tiny_model import CONFIG, random_model

SIZE, WIDTHS = 64, (32, 64, 96)
PRICES = [width / 96 for width in WIDTHS]
DYNAMIC = {
    "version": 1,
    "widths": [list(WIDTHS)] * 2,
    "down": "own",
    "rule": "lagrangian",
    "table": [[0.3, 9], [0.9, 1]],
}


def network(down="own", rule="lagrangian", bits=None, seed=0, biases=False, widths=WIDTHS):
    """A network with random weights whose router is sensitive to the token."""
    mx.random.seed(seed)
    linear = lambda inputs, outputs, bias=False: Linear(inputs, outputs, bias=bias)  # noqa: E731
    modules = {"own": [linear(w, SIZE) for w in widths[:-1]], "shared": []}
    modules["low-rank"] = [LowRank(width, SIZE, 4) for width in widths[:-1]]
    matrices = [linear(SIZE, widths[-1], biases), linear(SIZE, widths[-1], biases), linear(widths[-1], SIZE, biases)]
    module = DynamicFeedForward(
        *matrices, widths, modules[down], [w / widths[-1] for w in widths], Fractions(rule, ((0.3, 0.5),)), SIZE
    )
    for name, value in tree_flatten(module.trainable_parameters()):
        module.load_weights([(name, mx.random.normal(value.shape) * 0.3)], strict=False)
    if bits:
        for name in ("gate_proj", "up_proj", "down_proj"):
            module[name] = QuantizedLinear.from_linear(module[name], 32, bits)
        module.experts = [QuantizedLinear.from_linear(each, 32, bits) for each in module.experts]
    if "order" in module:
        module.order = mx.random.permutation(widths[-1]).astype(mx.int32)
    mx.eval(module.parameters())
    return module.eval()


def dense(module):
    """A matrix in float64, and its bias."""
    from mlxeff.modules import dense

    weight = np.array(dense(module), np.float64)
    return weight, np.array(module.bias, np.float64) if "bias" in module else np.zeros(len(weight))


def reference(module, x, chosen):
    """The output of the chosen expert of each token, in float64."""
    (gate, gate_bias), (up, up_bias), (down, down_bias) = map(
        dense, (module.gate_proj, module.up_proj, module.down_proj)
    )
    rows = []
    for token, number in zip(np.array(x, np.float64), chosen, strict=True):
        g, u = gate @ token + gate_bias, up @ token + up_bias
        hidden = (g / (1 + np.exp(-g)) * u)[: module.widths[number]]
        own = module.smaller[number] if number + 1 < len(module.widths) else None
        order = np.array(module.order) if "order" in module else np.arange(down.shape[1])
        matrix = down[:, order[: len(hidden)]]
        if isinstance(own, LowRank):
            matrix = matrix + dense(own.left)[0] @ dense(own.right)[0]
        elif own is not None:
            matrix = dense(own)[0]
        rows.append(matrix @ hidden + down_bias)
    return np.stack(rows)


@pytest.mark.parametrize("mlx_alone", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize(("down", "rule"), [("own", "lagrangian"), ("low-rank", "tail"), ("shared", "lagrangian")])
def test_each_token_gets_the_output_of_its_expert(down, rule, tokens, mlx_alone):
    module = network(down, rule, biases=True)
    x = mx.random.normal((tokens, SIZE))
    chosen = np.array(module.router.choose(module.router.scores(x), 0.5))
    if tokens > 50:
        assert set(chosen) == {0, 1, 2}, "the test needs tokens of all experts"
    with ops.mlx_only() if mlx_alone else pytest.MonkeyPatch.context():
        got = module(x[None], RunOptions(fraction=0.3))[0]
    assert_close(got, reference(module, x, chosen), down)


@pytest.mark.parametrize("down", ["own", "shared", "low-rank"])
def test_sorting_tokens_by_expert_changes_nothing(down):
    module, x = network(down), mx.random.normal((90, SIZE))
    chosen = module.router.choose(module.router.scores(x), 0.4)
    assert_close(module._sorted(x, chosen), module._masked(x, chosen), down)


def test_quantised_networks_compute_their_experts():
    module, x = network(bits=8), mx.random.normal((80, SIZE))
    chosen = np.array(module.router.choose(module.router.scores(x), 0.5))
    assert_close(module(x[None], RunOptions(fraction=0.3))[0], reference(module, x, chosen), "8 bits", rtol=1e-5)


def test_the_whole_network_needs_no_router():
    """Exactly the operations of a dense network, whatever the router says."""
    module, x = network(), mx.random.normal((3, 5, SIZE))
    module.router.weight = mx.full(module.router.weight.shape, math.nan)
    want = module.down_proj(ops.swiglu(module.gate_proj(x), module.up_proj(x))[..., mx.argsort(module.order)])
    for options in (EXACT, RunOptions(fraction=1.0)):
        assert mx.array_equal(module(x, options), want)


def test_the_expert_of_the_least_cost():
    router = Router(2, "lagrangian", [0.25, 0.5, 1.0])
    errors = mx.log(mx.array([[0.1, 0.0001], [0.9, 0.6], [0.5, 0.2]]))
    assert router.choose(errors, 1.0).tolist() == [0, 2, 1]
    assert router.choose(errors, LARGEST["lagrangian"]).tolist() == [0, 0, 0]
    assert router.choose(errors, 1e-9).tolist() == [2, 2, 2]


def test_of_equal_costs_the_wider_expert_wins():
    router = Router(2, "lagrangian", [0.25, 0.5, 1.0])
    assert router.choose(mx.full((1, 2), -math.inf), 0.0).tolist() == [2]
    assert router.choose(mx.log(mx.array([[0.5, 0.25]])), 1.0).tolist() == [1]


def test_the_first_expert_after_which_little_probability_lies():
    router = Router(2, "tail", [0.25, 0.5, 1.0])
    scores = mx.log(mx.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    assert router.choose(scores, 0.6).tolist() == [0, 2]
    assert router.choose(scores, 0.3).tolist() == [1, 2]
    assert router.choose(scores, 0.0).tolist() == [2, 2]
    assert router.choose(scores, LARGEST["tail"]).tolist() == [0, 0]
    sure = mx.array([[40.0, 0.0, 0.0], [60.0, 0.0, 0.0]])  # 8e-18 and 2e-26 lie after the first expert: 0 in 1 - p
    assert router.choose(sure, 1e-20).tolist() == [2, 0]
    assert Router(2, "tail", [0.5, 1.0]).choose(mx.zeros((1, 2)), 0.5).tolist() == [0], "reached exactly"


@pytest.mark.parametrize("rule", ["lagrangian", "tail"])
def test_a_token_of_nan_takes_the_widest_expert(rule):
    router = Router(2, rule, [0.25, 0.5, 1.0])
    rows = 2 if rule == "lagrangian" else 3
    assert router.choose(mx.full((2, rows), math.nan), 0.5).tolist() == [2, 2]


@pytest.mark.parametrize("rule", ["lagrangian", "tail"])
def test_numpy_and_mlx_choose_the_same(rule):
    router, scores = Router(4, rule, PRICES), np.random.default_rng(1).normal(size=(500, 2 + (rule == "tail")))
    for dial in (0.01, 0.3, 0.6, 0.9, 3.0):
        got = np.array(router.choose(mx.array(scores, mx.float32), dial))
        assert (got != experts(scores, PRICES, rule, dial)).mean() <= 0.002, "but for ties of rounding"


def test_dials_between_the_rows_of_the_table():
    fractions = Fractions("lagrangian", ((0.3, 100.0), (0.5, 10.0), (0.9, 1.0)))
    assert fractions.dial(1.0) is None
    assert fractions.dial(0.5) == pytest.approx(10)
    assert fractions.dial(0.4) == pytest.approx(math.sqrt(1000))
    assert fractions.dial(0.95) == pytest.approx(0.5), "towards 0, the price at which all take the widest"
    assert fractions.dial(0.1) == LARGEST["lagrangian"]
    dials = [fractions.dial(f / 100) for f in range(100)]
    assert dials == sorted(dials, reverse=True)
    tail = Fractions("tail", ((0.4, 1e-2), (0.8, 1e-6)))
    assert tail.dial(0.1) == LARGEST["tail"] > 1
    assert tail.dial(0.6) == pytest.approx(1e-4)
    assert tail.dial(0.9) == pytest.approx(5e-7)


@pytest.mark.parametrize("rule", ["lagrangian", "tail"])
def test_the_table_reaches_its_fractions(rule):
    generator = np.random.default_rng(2)
    scores = [generator.normal(size=(2000, 2 + (rule == "tail"))) * 2 for _ in range(3)]
    prices = [PRICES] * 3
    fractions = table(scores, prices, rule)
    assert [fraction for fraction, _ in fractions.table] == sorted(fraction for fraction, _ in fractions.table)
    for wanted, dial in fractions.table:
        assert mean_fraction(scores, prices, rule, dial) == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("widths", [(32, 96), (16, 32, 48, 96)])
def test_other_numbers_of_experts(widths):
    module, x = network(widths=widths), mx.random.normal((70, SIZE))
    chosen = np.array(module.router.choose(module.router.scores(x), 0.5))
    assert_close(module(x[None], RunOptions(fraction=0.3))[0], reference(module, x, chosen), widths)


def test_tokens_are_counted_by_expert():
    module, x = network(), mx.random.normal((2, 40, SIZE))
    mx.eval(module(x, RunOptions(fraction=0.3)), module(x[:, :3], EXACT))
    chosen = np.array(module.router.choose(module.router.scores(x.reshape(-1, SIZE)), 0.5))
    want = np.bincount(chosen, minlength=3)
    want[2] += 6
    assert module.counts == want.tolist()
    for _ in range(300):  # more than are held
        module(x[:1, :1], RunOptions(fraction=0.0))
    assert module.counts[0] == want[0] + 300


class Counting:
    """A network of `size` units that has counted tokens and the units that these computed."""

    def __init__(self, size):
        self.size, self.counts = size, [5, 5]

    def computed(self, counts):
        return counts[0], counts[1], counts[0] * self.size

    def details(self, counts, networks):
        return {"layers": len(counts)}


def test_a_report_is_of_all_layers_since_the_prompt_and_of_both_executors():
    """Six tokens: the first layer computed 30 of 60 units, the second one 80 of 120."""
    networks, native = [Counting(10), Counting(20)], [{"counts": [1, 1], "bytes": 100} for _ in range(2)]
    reading = CountedReading(PlainReading(), networks, 0.5, lambda: native)
    assert reading.report() == {}
    networks[0].counts, networks[1].counts = [9, 25], [9, 45]
    native[:] = [{"counts": [3, 11], "bytes": 107}, {"counts": [3, 41], "bytes": 109}]
    assert reading.report()["dynamoe"] == {
        "sensitivity": 0.5,
        "tokens": 6,
        "mean_fraction": round(110 / 180, 4),
        "layer_fractions": [0.5, round(80 / 120, 4)],
        "layers": 2,
        "feed_forward_bytes": 16,
    }


def test_bytes_follow_the_fraction_down_to_the_smallest_expert():
    module = network()
    whole = 4 * 3 * SIZE * WIDTHS[-1]
    assert [module.read_bytes(fraction) for fraction in (1.0, 0.5, 0.1)] == [whole, whole // 2, whole // 3]


# In a model


def test_a_config_makes_a_model_with_dynamic_networks():
    model = build_model(CONFIG | {"dynamoe": DYNAMIC})
    assert [module.widths for module in of(model)] == [WIDTHS] * 2
    names = {name for name, _ in tree_flatten(model.parameters()) if ".layers.0.mlp." in name}
    assert names == {
        f"model.layers.0.mlp.{name}"
        for name in (
            "gate_proj.weight",
            "up_proj.weight",
            "down_proj.weight",
            "experts.0.weight",
            "experts.1.weight",
            "order",
            "router.weight",
            "router.bias",
        )
    }
    tokens = mx.array([[1, 2, 3]])
    assert model(tokens, model.new_cache(), RunOptions(fraction=0.5)).shape == (1, 3, CONFIG["vocab_size"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "dynamoe: version: wanted 1, got 2"),
        ({"down": "half"}, "dynamoe: down: wanted one of own, low-rank, shared, got 'half'"),
        ({"down": "low-rank"}, "dynamoe: rank: wanted a whole number above 0 with down low-rank, and none without"),
        ({"rank": 4}, "dynamoe: rank: wanted"),
        ({"rule": "best"}, "dynamoe: rule: wanted one of lagrangian, tail, got 'best'"),
        ({"widths": [[32, 64, 96]]}, "dynamoe: widths: wanted a list for each of the model's 2 layers, got 1"),
        ({"widths": [[64, 32, 96]] * 2}, "each expert within the next, got [64, 32, 96]"),
        ({"widths": [[32, 64, 95]] * 2}, "wanted a last one of 96, the model's own, got 95"),
        ({"widths": [[32, 64, 96], [32, 96]]}, "the same number in all, got [32, 96]"),
        ({"widths": 3}, "dynamoe: widths: wanted a list of widths for each layer, got 3"),
        ({"table": []}, "dynamoe: table: wanted pairs (mean fraction of the neurons, dial), got []"),
        ({"table": None}, "dynamoe: table: wanted pairs"),
        ({"table": [[0.5, math.nan]]}, "dynamoe: table: wanted pairs"),
        ({"table": [[0.5, 1], [0.4, 2]]}, "dynamoe: table: wanted rising fractions from 0 to 1"),
        ({"table": [[0.5, -1]]}, "dynamoe: table: wanted dials of 0 or more"),
        ({"surprise": 1}, "dynamoe: unknown keys ['surprise']"),
    ],
)
def test_damaged_entries_are_refused(change, message):
    with pytest.raises(MlxeffError) as caught:
        build_model(CONFIG | {"dynamoe": DYNAMIC | change})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_entry_is_written_as_it_was_read():
    for value in (DYNAMIC, DYNAMIC | {"down": "low-rank", "rank": 8}):
        got = read_entry(value, "config").as_dict()
        assert json.loads(json.dumps(got)) == value


def test_a_model_without_gated_networks_is_refused():
    with pytest.raises(MlxeffError, match="feed-forward of layer 0: wanted a gated one"):
        gated_layers(build_model(CONFIG | {"dynamoe": DYNAMIC}), "here")
    with pytest.raises(MlxeffError, match="wanted a model with gated feed-forward networks, got none"):
        gated_layers(object(), "here")


def test_a_damaged_router_or_order_is_refused(tmp_path):
    from tiny_model import write_model

    config = CONFIG | {"dynamoe": DYNAMIC}
    weights = dict(tree_flatten(random_model(config).parameters()))
    weights |= {f"model.layers.{i}.mlp.order": mx.arange(96, dtype=mx.int32) for i in range(2)}
    name = "model.layers.1.mlp.order"
    folder = write_model(tmp_path / "twice", config, weights | {name: mx.zeros((96,), mx.int32)})
    with pytest.raises(MlxeffError, match=r"mlp\.order: wanted each column once, got others: damaged"):
        load_path(folder)
    weights |= {"model.layers.1.mlp.router.bias": mx.array([0.0, math.nan])}
    folder = write_model(tmp_path / "damaged", config, weights)
    with pytest.raises(
        MlxeffError, match=r"model.layers.1.mlp.router.bias: wanted finite numbers, got others: damaged"
    ):
        load_path(folder)
