"""Other engines as arms of `mlxeff bench`: mlx-lm itself, and llama.cpp by a stand-in for its llama-bench, which is not
installed where tests run. Some 12 s."""

import json
import sys

import numpy as np
import pytest

from mlxeff.bench import peers
from mlxeff.bench.peers import LlamaCpp, MlxLm
from mlxeff.bench.points import Point
from mlxeff.errors import MlxeffError
from test_cli import mlxeff
from tiny_model import write_tiny_model

SHORT = ("-p", "8", "-n", "4", "-r", "3", "--device", "cpu", "--json")
# Answers as llama-bench does with -o json, and keeps its arguments.
LLAMA = """#!{python}
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
if words["-d"] == "77":
    sys.exit("main: error: failed to load model")
tokens = int(words["-p"]) or int(words["-n"])
print(json.dumps([{{"build_commit": "abc", "build_number": 9999, "n_gen": int(words["-n"]),
                   "samples_ns": [2000000000], "samples_ts": [tokens / 2]}}]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("peers") / "base")


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """The file in which the stand-in keeps its arguments; it is on the PATH."""
    log, program = tmp_path / "log", tmp_path / "llama-bench"
    program.write_text(LLAMA.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return log


def test_mlx_lm_is_an_arm_beside_ours(folder):
    out, err = mlxeff("bench", "decode", folder, *SHORT, "-d", "0,8", "--peer", "mlx-lm")
    found = json.loads(out)
    theirs = f"mlx-lm {folder.name}"
    assert list(found["arms"]) == [str(folder), theirs]
    assert found["arms"][theirs]["engine_version"]
    metrics = {(row["test"], row["metric"]) for row in found["results"] if row["arm"] == theirs}
    ours = {(row["test"], row["metric"]) for row in found["results"] if row["arm"] == str(folder)}
    assert metrics == ours
    assert {r["arm"] for r in found["ratios"]} == {theirs}
    order = [sample["arm"] for sample in found["samples"]]
    assert order == [str(folder), theirs] * (len(order) // 2)  # they take turns
    assert found["skipped"] == []
    assert "mlx-lm" in err


def test_what_mlx_lm_measures_is_timed_from_the_prompt_on(folder):
    arm = MlxLm(folder, 200, "cpu", 1)
    try:
        found = arm.measure(Point(1, 8), np.ones((1, 8), int), 8, steps=2)["values"]
        assert set(found) == {"ttft_s", "prompt_tps", "decode_tps", "peak_bytes"}
        assert found["prompt_tps"] == pytest.approx(8 / found["ttft_s"])
        deep = arm.measure(Point(1, 5, 8, "tg"), np.ones((1, 8), int), 8, steps=0)["values"]
        assert set(deep) == {"ttft_s", "decode_tps", "peak_bytes"}
        with pytest.raises(MlxeffError, match="one prompt at a time"):
            arm.measure(Point(2, 8), np.ones((2, 8), int), 8, steps=0)
        with pytest.raises(MlxeffError, match="ValueError: Invalid type str"):
            arm.measure(Point(1, 8), np.array([["no token"]]), 8, steps=0)
        assert arm.measure(Point(1, 8), np.ones((1, 8), int), 8, steps=0)["values"]["ttft_s"] > 0  # it goes on
        arm.process.kill()
        with pytest.raises(MlxeffError, match="ended with -9"):
            arm.measure(Point(1, 8), np.ones((1, 8), int), 8, steps=0)
    finally:
        arm.close()


def test_times_of_mlx_lm_become_the_values_of_ours():
    assert MlxLm.values(Point(1, 8), [5.0, 6.0, 7.0]) == {"ttft_s": 5, "prompt_tps": 1.6, "decode_tps": 1}
    assert MlxLm.values(Point(1, 3, 8, "tg"), [5.0, 6.0, 7.0]) == {"ttft_s": 5, "decode_tps": 1}
    assert MlxLm.values(Point(1, 3, 0, "tg"), [5.0, 6.0, 7.0]) == {"decode_tps": 1}


def test_llama_cpp_is_called_as_its_users_call_it(llama, tmp_path):
    model = tmp_path / "m.gguf"
    arm = LlamaCpp(model, 200, "cpu", 3)
    found = arm.measure(Point(1, 512, 64), np.ones((1, 576), int), 8, 4)
    assert found["values"] == {"ttft_s": 2.0, "prompt_tps": 256.0}
    assert arm.measure(Point(1, 128, 0, "tg"), np.ones((1, 1), int), 8, 0)["values"] == {"decode_tps": 64.0}
    calls = [json.loads(line) for line in llama.read_text().splitlines()]
    common = {"-m": str(model), "-r": "1", "-t": "3", "-ngl": "0", "-o": "json"}
    assert calls == [common | {"-p": "512", "-n": "0", "-d": "64"}, common | {"-p": "0", "-n": "128", "-d": "0"}]
    assert arm.describe()["engine_version"] == "abc (9999)"
    with pytest.raises(MlxeffError, match="failed to load model"):
        arm.measure(Point(1, 8, 77), np.ones((1, 85), int), 8, 0)


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("llama.cpp", "llama-bench is not installed or not on the PATH"),
        ("mlx-lm=/no/such/model", "/no/such/model: no such file or folder"),
    ],
)
def test_a_peer_that_is_missing_is_left_out_visibly(folder, peer, words):
    out, err = mlxeff("bench", "decode", folder, *SHORT, "--peer", peer, code=1, PATH="/usr/bin:/bin")
    found = json.loads(out)
    assert list(found["arms"]) == [str(folder)]
    assert len(found["results"]) > 0
    assert [words in line for line in found["skipped"]] == [True]
    assert "skipped: --peer" in err


def test_a_peer_of_another_form_of_model_says_what_it_wants(llama, folder, tmp_path):
    with pytest.raises(MlxeffError, match=r"loads \.gguf files, not base: --peer llama\.cpp=FILE\.gguf"):
        LlamaCpp(folder, 200, "cpu", 1)
    with pytest.raises(MlxeffError, match=r"loads folders, not m\.gguf"):
        MlxLm(tmp_path / "m.gguf", 200, "cpu", 1)
    assert set(peers.PEERS) == {"mlx-lm", "llama.cpp"}


def test_the_names_of_peers_are_checked(folder):
    _, err = mlxeff("bench", "decode", folder, "--peer", "ollama", code=2)
    assert "wanted NAME or NAME=MODEL with a NAME of mlx-lm, llama.cpp, got 'ollama'" in err
