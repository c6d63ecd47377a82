"""What memory a process may use, the one line where weights or a prompt need more, and what failures become.

Four processes with a limit of the address space: some 5 s.
"""

import os
import re
import resource
import subprocess
import sys

import mlx.core as mx
import pytest

from mlxeff import MlxeffError, generation, load, memory, stream_generate
from mlxeff.running import EXACT
from test_cli import COMMAND, environment
from tiny_model import write_tiny_model

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits and tells the address space")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A tiny model with a long context, 4 KiB of keys and values a token."""
    config = {"max_position_embeddings": 10**6, "num_key_value_heads": 4, "num_hidden_layers": 8}
    return write_tiny_model(tmp_path_factory.mktemp("models") / "roomy", config)


def limited(megabytes, *arguments, stdin=b"", **more):
    """(exit code, standard error) with a limit of the address space."""
    size = megabytes << 20
    run = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, env=environment(**more), timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )  # fmt: skip
    assert b"Traceback" not in run.stderr, run.stderr.decode()
    return run.returncode, run.stderr.decode()


@LINUX
@pytest.mark.parametrize("native", ["1", "0"])
def test_a_prompt_that_does_not_fit_is_one_line(roomy, native):
    """120,001 tokens are 480 MB of keys and values."""
    options = ("--raw", "--max-tokens", 2, "--model", roomy)
    code, err = limited(700, "generate", *options, stdin=b"word " * 24000, MLXEFF_NATIVE=native)
    line = err.splitlines()[-1]
    want = r"mlxeff: error: prompt: the KV cache and computation of 120001 tokens: need [01]\.\d\d GB, .* may be used "
    assert code == 1
    assert re.match(want + r"\(the limit of the address space, ulimit -v\): about \d+ tokens would", line), err


@LINUX
def test_the_chat_goes_on_after_it(roomy, tmp_path):
    saved = tmp_path / "talk.json"
    lines = b"Hello\n" + b"word " * 24000 + b"\n/save " + os.fsencode(saved) + b"\n"
    code, err = limited(700, "chat", "--max-tokens", 2, "--model", roomy, stdin=lines)
    assert code == 0
    assert "need 0." in err
    assert saved.exists()


def test_weights_that_do_not_fit_are_one_line(tiny_folder, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: (1000.0, "a test"))
    with pytest.raises(MlxeffError) as caught:
        load(str(tiny_folder))
    want = rf"{tiny_folder}: the weights: need 0\.3 MB, 0\.0 MB may be used \(a test\): 0% of these would fit .*"
    assert re.fullmatch(want, str(caught.value))
    load(str(tiny_folder), lazy=True)


def test_as_many_tokens_as_would_fit_do_fit(tiny_folder, monkeypatch):
    model, tokenizer = load(str(tiny_folder))
    cache = model.new_cache()
    need = model.prefill_bytes(cache, 100, 512, EXACT)
    monkeypatch.setattr(memory, "available", lambda: (float(need), "a test"))
    generation.require_memory(model, cache, 100, 512, EXACT)
    with pytest.raises(MlxeffError, match=r"about (\d+) tokens would") as caught:
        generation.require_memory(model, cache, 5000, 512, EXACT)
    fit = int(re.search(r"about (\d+)", str(caught.value))[1])
    assert 100 <= fit < 5000
    generation.require_memory(model, cache, fit, 512, EXACT)
    with pytest.raises(MlxeffError):
        generation.require_memory(model, cache, fit + 1, 512, EXACT)
    assert list(stream_generate(model, tokenizer, [256, 72], max_tokens=2))


def test_the_cache_is_counted_as_it_grows(tiny_folder):
    """Reading 100 tokens allocates what `prefill_bytes` counts for the cache; the next 100 need none."""
    model, _ = load(str(tiny_folder))
    cache = model.new_cache()
    before = model.prefill_bytes(cache, 100, 100)
    mx.eval(model(mx.zeros((1, 100), mx.int32), cache), cache.arrays())
    assert cache.nbytes < before < cache.nbytes + 100_000
    assert model.prefill_bytes(cache, 100, 100) < 100_000


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("std::bad_alloc"), "out of memory"),
        (RuntimeError("native kernel: out of memory"), "native kernel: out of memory"),
        (RuntimeError("[malloc] Unable to allocate 12 bytes."), "out of memory: [malloc] Unable to allocate 12 bytes."),
        (RuntimeError("std::bad_alloc"), "out of memory: std::bad_alloc"),
        (RuntimeError("Resource temporarily unavailable"), "out of memory: Resource temporarily unavailable"),
    ],
    ids=str,
)
def test_failures_are_one_line(tiny_folder, error, line, monkeypatch):
    model, tokenizer = load(str(tiny_folder))

    def fail(*_):
        raise error

    monkeypatch.setattr(type(model), "last_logits", fail)
    with pytest.raises(MlxeffError) as caught:
        list(stream_generate(model, tokenizer, [256, 72]))
    assert str(caught.value) == f"prompt: {line}"


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("a bug"), ValueError("out of memory")):
        with pytest.raises(type(error)), memory.explained("prompt"):
            raise error


def test_limits_of_control_groups(tmp_path, monkeypatch):
    """The tightest of the group's and its parents'; cached pages of files can be freed."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit in ((tmp_path / "a", "5000"), (inner, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 2000\ninactive_file 700\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_lines", lambda path, read=memory._lines: (
        ["0::/a/b"] if str(path) == "/proc/self/cgroup" else read(path)))  # fmt: skip
    assert list(memory._cgroup_limits()) == [(2700.0, "the limit of the container or control group")]
