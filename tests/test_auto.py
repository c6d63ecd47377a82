"""`--auto`: real processes whose calibration is a file of this test, and the choice itself on made-up machines. Some
15 s."""

import json
from dataclasses import replace

import pytest

import plan_quality
from mlxeff.bench import machine
from mlxeff.plan import auto, memory
from mlxeff.plan.auto import Choice, Task, choose
from mlxeff.plan.calibrate import machine_key
from mlxeff.plan.chips import Machine
from mlxeff.plan.constants import Constants
from mlxeff.plan.costs import Engine
from mlxeff.plan.predict import Predictor
from mlxeff.plan.source import describe
from test_cli import document, fails, generate
from tiny_model import MAMBA, write_foreign

QUALITY = plan_quality.quality()
KINDS = {name: entry["kl"] for name, entry in QUALITY["options"]["kv_cache"].items()}
PRODUCTS = dict.fromkeys(("dense", "quantised", "attention"), 1.0)


@pytest.fixture(autouse=True)
def default_threads(monkeypatch):
    """The tests run with one thread a process, which counts as given."""
    monkeypatch.delenv("MLXEFF_NUM_THREADS", raising=False)


def kept(place, **threads):
    """A cache folder with calibrations: number of threads → constant of the decode steps."""
    card = machine.card()
    about = {"prefill": PRODUCTS, "errors": {"prefill": 0.05, "decode": 0.05}, "source": "this test"}
    found = {}
    for count, cost in threads.items():
        key = machine_key(card | {"threads": int(count[1:])}, "cpu")
        found[key] = about | {"decode": {"bytes": cost, "kv": 50 * cost}, "bandwidth": 1e10, "flops": 1e11}
    place.mkdir(exist_ok=True)
    (place / "plan.json").write_text(json.dumps(found))
    return {"MLXEFF_CACHE": str(place)}


def test_the_losses_are_those_of_committed_results():
    assert json.loads(plan_quality.PATH.read_text()) == QUALITY
    assert auto.known(QUALITY["fingerprint"]) == QUALITY["options"]
    assert auto.known("another") == {}


def test_without_a_loss_the_answer_stays(tiny_folder, tmp_path):
    cache = kept(tmp_path / "cache", t2=1.0)
    plain = document(tiny_folder, "Hello", **cache)
    found = document(tiny_folder, "--auto", "Hello", **cache)
    assert plain["auto"] is None
    assert found["token_ids"] == plain["token_ids"]
    chosen = found["auto"]
    assert (chosen["kl"], chosen["kl_from"], chosen["max_kl"], chosen["given"]) == (0, [], 0, [])
    assert set(chosen["chosen"]) <= {"prefill_step", "threads"}
    assert chosen["reason"] in "".join(found["notices"])
    _, err = generate(tiny_folder, "--auto", "Hello", **cache)
    assert sum(line.startswith("mlxeff: note: auto: ") for line in err.splitlines()) == 1


def test_threads_are_those_of_the_fastest_calibration(tiny_folder, tmp_path):
    cache = kept(tmp_path / "cache", t1=0.5, **{f"t{machine.cores()}": 1.0})
    if machine.cores() == 1:
        pytest.skip("one core: no other number of threads")
    assert document(tiny_folder, "--auto", "Hello", **cache)["auto"]["chosen"] == {"threads": 1}
    given = document(tiny_folder, "--auto", "Hello", **cache, MLXEFF_NUM_THREADS="2")["auto"]
    assert given["chosen"] == {}
    assert given["given"] == ["threads"]
    assert "given and kept: threads" in given["reason"]


@pytest.mark.parametrize(("most", "kind"), [(1e-5, "float16"), (KINDS["int8"], "int8"), (0.005, "int4")])
def test_kinds_of_cache_up_to_the_allowed_loss(most, kind, smollm2_gguf, tmp_path):
    """Where keys and values are most of a step, the smallest kind that is allowed is the fastest."""
    how = ("--auto", "--max-kl", most, "--max-tokens", 12, "Hi " * 300, "--device", "cpu")
    found = document(smollm2_gguf, *how, **kept(tmp_path / "cache", **{f"t{machine.cores()}": 1.0}))
    chosen = found["auto"]
    assert chosen["chosen"]["kv_cache"] == kind == found["timings"]["kv_dtype"]
    assert chosen["kl"] == KINDS[kind] <= most
    assert chosen["kl_from"] == [f"benchmarks/results/{plan_quality.CACHE}"]
    assert chosen["predicted_s"]["total"] < chosen["default_s"]["total"]


def test_what_is_given_wins_and_is_named(smollm2_gguf, tmp_path):
    how = ("--auto", "--max-kl", 0.005, "--kv-cache", "float16", "--prefill-step", 64, "--max-tokens", 3, "Hi")
    found = document(smollm2_gguf, *how, **kept(tmp_path / "cache", **{f"t{machine.cores()}": 1.0}))
    assert found["timings"]["kv_dtype"] == "float16"
    assert found["auto"]["given"] == ["kv_cache", "prefill_step"]
    assert found["auto"]["chosen"] == {}
    assert "given and kept: KV cache, prefill step" in found["auto"]["reason"]


def test_lines_about_what_cannot_be_chosen(tiny_folder, tmp_path):
    cache = kept(tmp_path / "cache", t2=1.0)
    assert fails("generate", "--model", tiny_folder, "--max-kl", 0.1, "x").startswith("--max-kl: wanted --auto with it")
    other = document(tiny_folder, "--auto", "--max-kl", 0.1, "x", **cache)["auto"]
    assert "measured for the built-in model only" in other["reason"]
    assert other["kl"] == 0
    states = write_foreign(tmp_path / "mamba", MAMBA)
    found = document(states, "--auto", "--raw", "x", **cache)
    assert found["auto"]["chosen"] == {}
    assert any(line.startswith("auto: nothing is chosen: ") for line in found["notices"])
    assert found["token_ids"]


# The choice itself.


@pytest.fixture(scope="module")
def model():
    return describe("smollm2-135m", offline=True)


def predictor(kv=1.0, usable=0.0, **constants):
    machine = Machine("made up", 1e10, 1e11, kind="cpu", usable=usable)
    known = Constants(PRODUCTS | constants, {"bytes": 1.0, "kv": kv}, {"prefill": 0.1, "decode": 0.1}, "here", "probed")
    return Predictor(machine, Engine(), known)


def task(model, **more):
    return replace(Task(model.shape, model.bits, QUALITY["fingerprint"], 4.0, 1000, 200), **more)


@pytest.mark.parametrize("most", [0.0, 1e-6, 1e-3, 0.014, 0.06, 1.0])
def test_no_choice_loses_more_than_allowed(model, most):
    best, plain = choose(task(model, most=most), {None: predictor(kv=50)})
    assert best.kl <= most
    assert plain.options(task(model)) == {}
    assert best.seconds(task(model)) <= 1.02 * plain.seconds(task(model))
    if most == 1.0:
        assert best.kv_predict == "smollm2-135m-0-18"
        assert best.kv_cache == "int4"
        parts = QUALITY["options"]["kv_predict"]["smollm2-135m-0-18"]["kl"] + KINDS["int4"]
        assert best.kl == pytest.approx(parts)


def test_drafts_only_where_they_pay_on_an_int8_cache(model):
    """A draft reads half of the cache: it pays where the cache is most of a step and further rows are cheap."""
    slow = {None: predictor(kv=1000, dense=0.0, quantised=0.0, attention=0.0)}
    drafting, _ = choose(task(model, given={"kv_cache": "int8"}), slow)
    assert drafting.quantspec
    assert 1 <= drafting.num_draft_tokens <= 7
    fixed, _ = choose(task(model, given={"kv_cache": "int8", "num_draft_tokens": 2}), slow)
    assert fixed.num_draft_tokens == 2
    for other in ({"given": {"kv_cache": "int8"}, "drafts": False}, {"given": {"kv_cache": "k8v4"}}, {}):
        assert not choose(task(model, **other), slow)[0].quantspec
    assert not choose(task(model, given={"kv_cache": "int8"}), {None: predictor(kv=1.0)})[0].quantspec


def test_a_smaller_chunk_where_the_default_does_not_fit(model):
    peaks = {n: memory.peak_bytes(model.shape, model.bits, 1200, n, 4.0, predictor().machine) for n in (256, 512)}
    best, _ = choose(task(model), {None: predictor(usable=sum(peaks.values()) / 2)})
    assert best.prefill_step == 256
    assert choose(task(model), {None: predictor(usable=2 * peaks[512])})[0].prefill_step in (None, 1024, 2048, 4096)


def test_values_are_those_of_the_options():
    assert auto.value("kv_predict", "smollm2-135m-0-21") == ("smollm2-135m-0-21", None, False)
    assert auto.value("prefill_step", 64) == 64
    found = Choice(None, "int8", True, 3, None, None, kl=0.1).options(Task(None, None, "", 4.0, 1, 1))
    assert found == {"kv_cache": "int8", "quantspec": True, "num_draft_tokens": 3}
