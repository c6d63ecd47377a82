"""mlxeff/plan: shapes against the parameter counts of releases and numbers worked out by hand, properties of the
predictions, calibration on times that are known, and the command. About 4 seconds.

The errors of the predictions are in benchmarks/RESULTS.md, and `benchmarks/plan_score.py` computes them.
"""

import contextlib
import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plan_score
import saving
from mlxeff import MlxeffError, __version__, cli, hub
from mlxeff.models.openelm import published_config
from mlxeff.plan import calibrate, chips, constants, costs, fit, formats, memory, probe, published, techniques
from mlxeff.plan.chips import Machine
from mlxeff.plan.constants import Constants
from mlxeff.plan.costs import LLAMA, Bits, Engine
from mlxeff.plan.predict import Predictor
from mlxeff.plan.request import CHECKED, Here, Request, plan
from mlxeff.plan.shapes import Layer, Matrix, Shape, read_shape
from tiny_model import CONFIG, write_tiny_model

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
RELEASES = json.loads(published.data("published-models.json"))
MODELS = {name: read_shape(each["config"]) for name, each in RELEASES.items()}
PRODUCTS, BARS = {"quantised": 1.0, "dense": 1.0, "attention": 1.0}, {"prefill": 0.2, "decode": 0.2}
ONE = Constants(PRODUCTS, {"bytes": 1.0, "kv": 1.0}, BARS, "ones", "calibrated")
NEWEST = Engine()
HERE = Here({"cpu": "A CPU", "cpu_backend": "native avx2", "threads": 2}, "cpu", 16e9, 8e9)


def gpu(**more):
    return Machine(**{"name": "a GPU", "bandwidth": 100e9, "flops": 10e12, "memory": 64e9, "usable": 48e9} | more)


# Shapes


def test_llama_3_2_1b_by_hand():
    """16 layers: 2048² for queries and for the output, a quarter of it for keys and for values, 3 · 2048 · 8192, two
    norms; the embedding, which is the head too; one norm. 2 bytes a weight; 2 · 16 · 8 · 64 numbers of keys and values
    a token."""
    shape = read_shape(LLAMA_1B)
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    assert shape.parameters == 16 * (layer + 2 * 2048) + 128256 * 2048 + 2048 == 1_235_814_400
    assert shape.active == 16 * layer + 128256 * 2048
    assert shape.kv_numbers == 16384
    assert costs.weight_bytes(shape, Bits.of(16), True) == 2 * (shape.active + 16 * 2 * 2048)
    assert costs.weight_bytes(shape, Bits.of(4.5), True) == 4.5 / 8 * shape.active + 2 * 16 * 2 * 2048
    assert memory.kv_bytes(shape, 1000, 2.0) == 1000 * 32768
    assert shape.matrix_flops(10) == 20 * 16 * layer


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("LLaMA-2-7B", 6.738),
        ("Llama-3-8B", 8.030),
        ("Llama-3-70B", 70.55),
        ("Llama-3.2-3B-Instruct", 3.213),
        ("Qwen3-0.6B", 0.596),
        ("mlx-community/Qwen3-8B-4bit", 8.19),
        ("Qwen3-30B-A3B", 30.53),
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.8),
    ],
)
def test_parameters_are_those_of_the_releases(name, billions):
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert MODELS[name].model_type in CHECKED


def test_openelm_has_heads_and_widths_of_its_own_in_each_layer():
    shape = read_shape(published_config("1_1B"))
    assert shape.parameters == 1_079_891_456
    assert [layer.groups for layer in shape.layers] == [4] * 3 + [5] * 7 + [6] * 8 + [7] * 6 + [8] * 4
    assert 2 * shape.kv_numbers == 43_264  # bytes of a float16 cache a token


def test_of_a_mixture_a_token_reads_the_chosen_experts():
    """Qwen3-30B-A3B: 8 of 128 experts of 3 · 2048 · 768 weights in each of 48 layers."""
    shape = MODELS["Qwen3-30B-A3B"]
    assert costs.expert_weights(shape) == pytest.approx(48 * 8 * 3 * 2048 * 768)
    assert shape.active / 1e9 == pytest.approx(3.04, abs=0.01)


def test_recurrent_layers_keep_a_state_and_no_keys():
    shape = MODELS["Qwen3.5-9B"]
    assert sum(1 for layer in shape.layers if layer.state) == 24
    assert shape.kv_numbers == 8 * 2 * 4 * 256
    assert costs.state_bytes(shape) == 24 * 32 * 128 * 128 * 4


@given(window=st.one_of(st.none(), st.integers(1, 60)), first=st.integers(0, 80), count=st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_attended_tokens_are_summed_position_by_position(window, first, count):
    layer = Layer((), 0, 2, 1, 8, window)
    want = sum(min(i, window or i) for i in range(first + 1, first + count + 1))
    assert layer.attended_sum(first, first + count) == want
    assert layer.attention_flops(first, first + count) == 4 * 2 * 8 * want


def test_windows_bound_the_cache():
    shape = MODELS["mlx-community/gemma-3-1b-it-4bit"]
    assert [layer.window for layer in shape.layers[:6]] == [512] * 5 + [None]
    assert shape.cached_numbers(10_000) == 2 * 256 * (22 * 512 + 4 * 10_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None, "vocab_size": None}, "missing keys ['hidden_size', 'vocab_size']"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: wanted a whole number from 1 to 1000, got 0"),
        ({"kv_lora_rank": 512}, "kv_lora_rank: latent attention is not predicted"),
        ({"layer_types": ["mamba"] * 16}, "layer_types: wanted 16 of full_attention, sliding_attention"),
        ({"num_experts": 8}, "missing keys ['num_experts_per_tok'], which a prediction needs"),
        ({"model_type": 3}, "model_type: wanted the name of an architecture, got 3"),
    ],
)  # fmt: skip
def test_configs_without_what_a_prediction_needs_are_refused(change, message):
    with pytest.raises(MlxeffError) as caught:
        read_shape(LLAMA_1B | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["x", -1, 1.5, [], ["x"], {"a": 1}, True, 10**40])
def test_a_wrong_value_is_an_error_of_one_line_or_changes_nothing(value):
    mixture = RELEASES["Qwen3.5-35B-A3B"]["config"] | {"first_k_dense_replace": 1, "n_shared_experts": 1}
    mixture |= {"quantization": {"bits": 4, "group_size": 64}, "seedlm": None, "text_config": None}
    mixture |= {"layer_types": None, "sliding_window": 8, "sliding_window_pattern": 2, "mlp_only_layers": []}
    for key in mixture:
        config = mixture | {key: value}
        with contextlib.suppress(MlxeffError):
            shape = read_shape(config)
            assert costs.stored_bytes(shape, formats.stored(config, shape)) > 0


# Bits


def test_bits_of_what_is_stored():
    shape = read_shape(LLAMA_1B)
    assert formats.stored(LLAMA_1B, shape) == Bits.of(16)
    assert formats.stored(LLAMA_1B | {"torch_dtype": "float32"}, shape).layers == 32
    affine = LLAMA_1B | {"quantization": {"bits": 4, "group_size": 64}}
    assert formats.stored(affine, shape) == Bits.of(4.5)
    own = {"bits": 8, "group_size": 32}
    mixed = LLAMA_1B | {"quantization": {"bits": 4, "group_size": 64, "model.embed_tokens": own}}
    assert formats.stored(mixed, shape) == Bits.of(4.5, 9, 4.5)
    listed = affine["quantization"] | {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}}
    assert formats.stored(LLAMA_1B | {"quantization": listed}, shape).layers == 4.5 + 4 / 112
    with pytest.raises(MlxeffError, match="quantization: wanted bits"):
        formats.stored(LLAMA_1B | {"quantization": {"bits": 40, "group_size": 64}}, shape)
    with pytest.raises(MlxeffError, match="quantization_config: 'gptq'"):
        formats.stored(LLAMA_1B | {"quantization_config": {"quant_method": "gptq"}}, shape)


def test_fewer_bits_are_offered_only():
    made = ["affine 8", "affine 4", "seedlm 3", "seedlm 4", "seedlm 4.5"]
    assert [*formats.choices(Bits.of(16))] == ["as stored", *made]
    assert [*formats.choices(Bits.of(4.5))] == ["as stored", "seedlm 3", "seedlm 4"]


# Chips


def test_chips_are_found_by_any_spelling_and_unknown_ones_list_all():
    assert chips.find("Apple M2 Pro") is chips.find("m2-pro") is chips.find("m2_PRO")
    with pytest.raises(MlxeffError) as caught:
        chips.find("m9")
    assert all(name in str(caught.value) for name in chips.CHIPS)
    with pytest.raises(MlxeffError, match="M3 Max has 30 or 40 GPU cores, got 31"):
        chips.machine(chips.find("m3-max"), 31)


def test_machines_of_a_chip():
    small, large = chips.machine(chips.find("m4-max"), 32, 36), chips.machine(chips.find("m4-max"))
    assert (small.bandwidth, large.bandwidth) == (410e9, 546e9)
    assert (small.usable, large.usable) == (24e9, 96e9)
    assert chips.usable_bytes(32) / 1e9 == pytest.approx(21.3, abs=0.1)
    assert chips.machine(chips.find("m5"), 10).accelerated == 16e12
    assert chips.machine(chips.find("m5"), 10, accelerators=False).accelerated is None
    assert [chips.machine(chips.find(name)).bf16 for name in ("m1", "m2-max", "m3")] == [False, False, True]


# Constants


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_fit_is_the_best_of_all_sets_of_terms(seed):
    """Against least squares on every subset of the terms whose solution has no negative constant."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 5))
    rows = [{f"t{i}": float(v) for i, v in enumerate(random.random(count))} for _ in range(8)]
    seconds = [float(v) for v in random.random(8) + 0.1]
    found = fit.constants(rows, seconds)
    matrix = np.array([[row[f"t{i}"] for i in range(count)] for row in rows]) / np.array(seconds)[:, None]

    def error(x):
        return float(((matrix @ x - 1) ** 2).sum())

    best = error(np.zeros(count))
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            x = np.zeros(count)
            x[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], np.ones(8), rcond=None)[0]
            best = min(best, error(x)) if (x >= 0).all() else best
    assert min(found.values()) >= 0
    assert error(np.array([found[f"t{i}"] for i in range(count)])) == pytest.approx(best, abs=1e-9)


def test_the_committed_constants_and_results_are_those_of_the_script():
    """After a change of the model come `--save` and `--report`."""
    rows, left_out = published.read()
    document = saving.read_json(plan_score.PATH)
    assert document["left_out"] == left_out
    committed = json.loads(published.data("constants.json"))
    again = plan_score.fitted(rows, document["errors"])
    assert committed["provenance"] == again["provenance"]
    for phase in plan_score.PHASES:
        assert committed[phase] == pytest.approx(again[phase], rel=1e-3, abs=1e-4)
    assert document["errors"] == plan_score.errors(document["samples"])
    decoding = [row for row in rows if row.phase == "decode" and row.chip in ("M1", "M2", "M3")]
    held = plan_score.left_out(decoding)
    assert len(held) == len(decoding)
    assert {sample["phase"] for sample in held} == {"decode"}
    begin, end = (f"<!-- {plan_score.SECTION}: {edge} -->\n" for edge in ("begin", "end"))
    report = saving.REPORT.read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    assert report.strip("\n").startswith(plan_score.text(document))


def test_published_rows():
    rows, left_out = published.read()
    assert len(rows) + sum(left_out.values()) == 344
    by_test = {(row.phase, row.tokens) for row in rows}
    assert {("prefill", 512), ("decode", 64), ("decode", 576), ("decode", 4096), ("decode", 2112)} <= by_test
    assert published.engine_of("mlx-lm 0.31.3 / mlx 0.32.1") == Engine("mlx", (0, 32, 1))
    assert published.engine_of("llama.cpp Metal (8e672ef 2023-11 or later rows)") == Engine(LLAMA, (2023,))
    accelerated = {row.engine_name for row in rows if row.machine.accelerated}
    assert accelerated
    assert not any("no tensor API" in name for name in accelerated)


# Predictions


def test_decoding_by_hand():
    """10⁹ weights of 4.5 bits and 1000 tokens of 1000 numbers in 2 bytes, at 100 GB/s of which all is reached."""
    layer = Layer((Matrix("mlp.up_proj", 10**9),), 0, 1, 1, 500)
    predictor = Predictor(gpu(), Engine(), ONE)
    shape = Shape("llama", (layer,), 0, 0, 1)
    assert predictor.decode(shape, Bits.of(4.5), 1000) == pytest.approx((0.5625e9 + 2e6) / 100e9)
    assert predictor.decode(shape, Bits.of(4.5), 1000, share=0.5) == pytest.approx((0.28125e9 + 2e6) / 100e9)
    want = (2 * 10**9 * 64 + 4 * 500 * 64 * 65 / 2) / 10e12
    assert predictor.prefill(shape, Bits.of(4.5), 64) == pytest.approx(want)
    assert predictor.prefill(shape, Bits.of(4.5), 2) == pytest.approx(0.5625e9 / 100e9)  # the weights are read once
    want = (2 * 10**9 * 2000 + 4 * 500 * 2000 * 2001 / 2) / 10e12
    assert predictor.prefill(shape, Bits.of(4.5), 2000, step=500) == pytest.approx(want)  # chunks see all before them


def test_versions_and_accelerators_are_inputs():
    shape, bits = MODELS["Llama-3-8B"], Bits.of(4.5)
    found = constants.fitted("mlx")

    def seconds(chip, engine=NEWEST, **more):
        return Predictor(chips.machine(chips.find(chip), **more), engine, found).prefill(shape, bits, 2048)

    assert seconds("m5") < 0.5 * seconds("m5", accelerators=False)
    old = seconds("m2-pro", Engine(version=(0, 31, 2)))
    assert 1.1 < old / seconds("m2-pro") < costs.EMULATION_GAIN + 1e-9
    assert seconds("m2-pro", Engine(bf16=False)) < seconds("m2-pro")
    assert seconds("m4-pro", Engine(version=(0, 31, 2))) == seconds("m4-pro")


@given(
    model=st.sampled_from(sorted(MODELS)),
    bits=st.sampled_from([Bits.of(16), Bits.of(8.5), Bits.of(4.5), formats.MADE["seedlm 4"]]),
    chip=st.sampled_from(sorted(chips.CHIPS)),
    depth=st.integers(0, 30_000),
    more=st.integers(1, 5000),
)
@settings(max_examples=80, deadline=None)
def test_more_work_is_never_faster_and_more_bandwidth_never_slower(model, bits, chip, depth, more):
    shape, machine = MODELS[model], chips.machine(chips.find(chip))
    here = Predictor(machine, Engine(), constants.fitted("mlx"))
    assert here.decode(shape, bits, depth + more) >= here.decode(shape, bits, depth)
    assert here.prefill(shape, bits, depth + more) >= here.prefill(shape, bits, max(1, depth))
    assert here.prefill(shape, bits, 1) >= 0.5 * here.decode(shape, bits, 0)
    assert here.decode(shape, bits, depth, 1.0625) <= here.decode(shape, bits, depth, 2.0)
    assert here.decode(shape, bits, depth, share=0.6) <= here.decode(shape, bits, depth)
    assert here.further_row(shape, bits, depth + more) >= here.further_row(shape, bits, depth) > 0
    wide = Machine(**{**machine.__dict__, "bandwidth": 1.5 * machine.bandwidth})
    faster = Predictor(wide, Engine(), here.constants)
    assert faster.decode(shape, bits, depth) <= here.decode(shape, bits, depth) * (1 + 1e-12)
    assert faster.prefill(shape, bits, depth + 1) <= here.prefill(shape, bits, depth + 1)
    bar = here.bar("decode", here.decode(shape, bits, depth))
    assert bar.low < bar.value < bar.high
    assert bar.inverse().low < bar.inverse().value < bar.inverse().high


def test_quantspec_by_hand():
    """As in tests/test_quantspec_prediction.py: 10⁹ weights of 2 bytes and a cache of 10⁹ numbers at 80 GB/s. A draft
    reads 0.8125 and 0.5625 GB, 17.1875 ms; verification 2 and 1.0625 GB, 38.28125 ms."""
    shape = Shape("llama", (Layer((Matrix("mlp.up_proj", 10**9),), 0, 0, 1, 500_000),), 0, 0, 1)
    constants_ = Constants({}, {"bytes": 1.0, "kv": 1.0}, {}, "", "")
    predictor = Predictor(gpu(bandwidth=80e9, kind="cpu"), Engine(), constants_)
    found = techniques.quantspec(predictor, shape, Bits.of(16), 1000, 0.9)
    by_width = {k: (k * 17.1875e-3 + 38.28125e-3) / sum(0.9**i for i in range(k + 1)) for k in range(1, 8)}
    assert found.plain == pytest.approx(38.28125e-3)
    assert found.width == min(by_width, key=by_width.get)
    assert found.seconds == pytest.approx(min(by_width.values()))
    doubtful = techniques.quantspec(predictor, shape, Bits.of(16), 1000, 0.9, doubt=2.0)
    assert doubtful.seconds == found.seconds  # no constant for products: further rows are free here
    # One token drafted pays where (17.1875 + 38.28125) / (1 + a) is below 38.28125.
    assert found.break_even == pytest.approx(17.1875 / 38.28125, abs=2e-3)


def test_kv_prediction_reads_the_prompt_with_fewer_layers():
    shape, bits = MODELS["Llama-3-8B"], Bits.of(4.5)
    predictor = Predictor(chips.machine(chips.find("m3-max")), Engine(), constants.fitted("mlx"))
    whole = predictor.prefill(shape, bits, 2048)
    half = techniques.kv_prediction(predictor, shape, bits, 2048, 16, None)
    assert 0.5 * whole < half < 0.65 * whole
    assert techniques.kv_prediction(predictor, shape, bits, 2048, 32, None) == whole
    maps = techniques.pruned(shape, 16).layers[-1].matrices[0]
    assert maps.weights == 16 * 4096 * 2 * 1024


def test_memory_bounds_the_context():
    shape, bits = read_shape(LLAMA_1B), Bits.of(16)
    machine = gpu(usable=4e9)
    most = memory.most_context(shape, bits, 512, 2.0, machine)
    assert memory.peak_bytes(shape, bits, most, 512, 2.0, machine) <= 4e9
    assert memory.peak_bytes(shape, bits, most + 1, 512, 2.0, machine) > 4e9
    assert memory.most_context(shape, bits, 512, 2.0, gpu(usable=1e9)) == 0
    assert memory.most_context(shape, bits, 512, 2.0, gpu()) == 131072


# Calibration


RATES = {"quantised": 3.0, "attention": 5.0}, {"bytes": 1.3, "kv": 2.5}


def document(tmp_path, points=(64, 256, 1024), **changes):
    """A result of `mlxeff bench ttft`, with the times of a machine whose constants are RATES."""
    shape = read_shape(CONFIG)
    known = Constants(*RATES, {}, "", "")
    predictor = Predictor(Machine("", 1e9, 1e9, kind="cpu"), Engine(), known)
    results = []
    for tokens in points:
        decode = predictor.decode(shape, Bits.of(32), tokens + 2, 4.0)
        ttft = predictor.prefill(shape, Bits.of(4.5), tokens, 512)
        place = {"device": "cpu", "batch": 1, "tokens": tokens, "depth": 0, "arm": "tiny", "test": f"pp{tokens}"}
        results += [
            place | {"metric": "ttft_s", "median": ttft},
            place | {"metric": "decode_tps", "median": 1 / decode},
        ]
    settings_ = {"verb": "bench ttft", "model": "tiny", "arm": "tiny", "compute": "exact", "kv_dtype": "float32"}
    settings_ |= {"prefill_step": {"cpu": 512}, "steps": 4}
    found = {
        "card": HERE.card | {"mlxeff": __version__},
        "settings": settings_,
        "arms": {"tiny": {"base": shape.parameters}},
        "results": results,
    } | changes
    path = tmp_path / "result.json"
    path.write_text(json.dumps(found))
    return path


def test_a_calibration_finds_the_constants_that_made_the_times(tmp_path):
    measured = calibrate.read(str(document(tmp_path)))
    machine = Machine("", 1e9, 1e9, kind="cpu")
    found = calibrate.calibrate(measured, read_shape(CONFIG), Bits.of(32), machine, Engine())
    assert found.prefill["quantised"] == pytest.approx(3.0)
    assert found.prefill["dense"] == found.prefill["quantised"]  # whatever the weights of another model are
    assert found.prefill["attention"] == pytest.approx(5.0)
    assert found.decode == pytest.approx(RATES[1])
    assert found.errors == {"prefill": 0.05, "decode": 0.05}
    scored = calibrate.score(Predictor(machine, Engine(), found), measured, read_shape(CONFIG), Bits.of(32))
    assert len(scored) == 6
    assert calibrate.mape(scored) == pytest.approx(0, abs=1e-9)


def test_an_error_is_that_of_the_speed():
    assert calibrate.Scored("decode", 8, 2.0, 1.0).error == 1.0  # predicted twice as fast
    assert calibrate.Scored("decode", 8, 1.0, 2.0).error == -0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"card": HERE.card | {"mlxeff": "0.0.1"}}, f"measured by mlxeff 0.0.1, this is {__version__}: measure again"),
        ({"settings": {"suite": "kvp-paper"}}, "wanted a measurement of a MODEL, got one of the suite 'kvp-paper'"),
        (
            {"settings": {"model": "m", "verb": "bench decode"}},
            "wanted a result of `mlxeff bench ttft MODEL`, got one of",
        ),
        ({"results": []}, "wanted results of tiny with one prompt at a time, got none"),
        ({"results": [{"arm": "tiny", "batch": 1, "depth": 0}]}, "damaged result: KeyError"),
        ({"card": []}, "wanted the document of `mlxeff bench ttft --json`, got other JSON"),
    ],
)
def test_results_of_another_kind_are_refused(tmp_path, changes, message):
    with pytest.raises(MlxeffError) as caught:
        calibrate.read(str(document(tmp_path, **changes)))
    assert message in str(caught.value)


def test_a_calibration_needs_two_prompt_lengths(tmp_path):
    measured = calibrate.read(str(document(tmp_path, points=(64,))))
    with pytest.raises(MlxeffError, match="two prompt lengths at least"):
        calibrate.calibrate(measured, read_shape(CONFIG), Bits.of(32), Machine("", 1e9, 1e9, kind="cpu"), Engine())


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXEFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plan.json"


def test_calibrations_of_other_machines_stay(own_cache):
    constants.keep("a", ONE, 1e9, 2e9)
    constants.keep("b", ONE, 3e9, 4e9)
    found, numbers = constants.kept("a")
    assert (found.decode, numbers, found.kind) == (ONE.decode, {"bandwidth": 1e9, "flops": 2e9}, "calibrated")
    assert constants.kept("c") is None
    own_cache.write_text("{")
    assert constants.kept("a") is None


def test_a_probe_finds_rates():
    assert all(rate > 0 for rate in probe.probe("cpu"))
    assert set(probe.constants()) == {"prefill", "decode"}


# The command


def run(capsys, *arguments):
    code = cli.main(["plan", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    """A folder with a config.json and nothing else."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(LLAMA_1B))
    return tmp_path / "llama"


def test_a_plan_needs_no_weights(folder, capsys):
    code, out, _ = run(capsys, folder, "--chip", "m2-pro", "--cores", 16, "--memory", 16, "--explain")
    assert code == 0
    assert "1.24 billion weights of 16 bits" in out
    assert out.count("predicted:") == 5
    assert "FLOPs of products" in out
    found = json.loads(run(capsys, folder, "--chip", "m2-pro", "--json", "--depths", "0,100", "--quiet")[1])
    assert found["kind"] == "predicted"
    names = ("weights", "kv_cache", "quantspec", "sensitivity", "kv_predict_layers")
    assert len({tuple(each[name] for name in names) for each in found["combinations"]}) == 6 * 5 * 3 * 3
    assert all(bar["low"] < bar["tps"] < bar["high"] for each in found["combinations"] for bar in each["decode"])
    assert found["layers"] is None


def test_what_does_not_fit_is_said(folder, capsys):
    (folder / "config.json").write_text(json.dumps(LLAMA_1B | {"num_hidden_layers": 150}))
    code, out, _ = run(capsys, folder, "--chip", "m1", "--weights", "as stored", "--kv-cache", "int8")
    assert code == 0
    assert "Nothing fits" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "m9"), "unknown chip 'm9'; wanted this or one of: m1, m1-pro"),
        (("--chip", "m1", "--cores", 3), "--cores: M1 has 7 or 8 GPU cores, got 3"),
        (("--chip", "m1", "--weights", "paper"), "--weights: wanted as stored, affine 8"),
        (("--chip", "m1", "--kv-cache", "int3"), "--kv-cache: wanted float32, float16"),
        (("--chip", "m1", "--depths", 999999), "999999 tokens: the model's context is 131072 tokens"),
        (("--score", "/no/such/file"), "/no/such/file: cannot be read"),
    ],
)
def test_bad_options_are_one_line(folder, capsys, arguments, message):
    code, out, err = run(capsys, folder, *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_without_a_config_is_one_line(tmp_path, capsys):
    assert "wanted a folder with a config.json" in run(capsys, tmp_path, "--chip", "m1")[2]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    wanted = f"{tmp_path / 'config.json'}: llama config: missing keys ['hidden_size'"
    assert wanted in run(capsys, tmp_path, "--chip", "m1")[2]


def test_this_machine_is_probed_then_calibrated_then_scored(tmp_path, own_cache, capsys):
    """With a real measurement of a tiny model. A result that is refused changes nothing that was kept."""
    model = write_tiny_model(tmp_path / "tiny")
    bench = ["bench", "ttft", str(model), "--prompt-lengths", "16,64,128", "--rounds", "1", "--json", "--quiet"]
    assert cli.main([*bench, "--device", "cpu"]) == 0
    result = tmp_path / "result.json"
    result.write_text(capsys.readouterr().out)
    if mx.metal.is_available():
        pytest.skip("the plan is for the GPU here")
    assert "probed" in run(capsys, model, "--depths", 0)[2]
    code, out, _ = run(capsys, model, "--calibrate", result)
    assert (code, "kept in" in out) == (0, True)
    _, out, err = run(capsys, model, "--depths", 0)
    assert "calibrated by result.json" in err
    found = json.loads(run(capsys, model, "--score", result, "--json")[1])
    assert [point["tokens"] for point in found["score"]["points"]] == [16, 16, 64, 64, 128, 128]
    kept = own_cache.read_bytes()
    other = json.loads(result.read_text())
    other["card"]["cpu"] = "another"
    result.write_text(json.dumps(other))
    assert "measured on another machine" in run(capsys, model, "--calibrate", result)[2]
    other["arms"][str(model)]["base"] *= 2
    result.write_text(json.dumps(other))
    assert "wanted a result of MODEL" in run(capsys, model, "--score", result)[2]
    assert own_cache.read_bytes() == kept


def test_a_gguf_file_is_read_by_its_header(smollm2_gguf):
    document_ = plan(Request(str(smollm2_gguf), "m2-pro", lengths=[128], depths=[0]), HERE)
    assert document_["shape"]["parameters"] == 134_515_008
    built_in = json.loads(published.data("built-in.json"))["smollm2-135m"]
    assert document_["shape"]["bits"] == built_in["bits"]["layers"]
    assert read_shape(built_in["config"]).parameters == 134_515_008


def test_the_built_in_model_is_known_before_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXEFF_CACHE", str(tmp_path))
    assert hub.describe(hub.DEFAULT_MODEL) is None
    found = plan(Request(hub.DEFAULT_MODEL, "m4", lengths=[128], depths=[0]), HERE)
    assert found["shape"]["parameters"] == 134_515_008
