"""What memory a process may use, the one line where weights or a prompt need more, and what failures become.

Some 25 processes with a limit of the address space or the data segment, most of which end at once: some 20 s.
"""

import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys

import mlx.core as mx
import pytest

from mlxeff import MlxeffError, generation, limits, load, memory, stream_generate
from mlxeff.assembly.model import load_path
from mlxeff.ops import mlx_only
from mlxeff.running import EXACT
from test_cli import COMMAND, environment
from tiny_model import GEMMA, PHI, write_foreign, write_tiny_model

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits and tells the address space")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A tiny model with a long context, 4 KiB of keys and values a token."""
    config = {"max_position_embeddings": 10**6, "num_key_value_heads": 4, "num_hidden_layers": 8}
    return write_tiny_model(tmp_path_factory.mktemp("models") / "roomy", config)


def limited(megabytes, *arguments, stdin=b"", limit=resource.RLIMIT_AS, output=False, **more):
    """(exit code, standard error, and with `output` standard output) with a limit of the address space, or another
    one."""
    size = int(megabytes * 2**20)
    run = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, env=environment(**more), timeout=60,
        preexec_fn=lambda: resource.setrlimit(limit, (size, size)),
    )  # fmt: skip
    assert b"Traceback" not in run.stderr, run.stderr.decode()
    return run.returncode, run.stderr.decode(), *([run.stdout.decode()] if output else [])


@LINUX
@pytest.mark.parametrize(("kind", "native"), [("roomy", "1"), ("roomy", "0"), ("foreign", "0")])
def test_a_prompt_that_does_not_fit_is_one_line(request, kind, native):
    """120,001 tokens are 480 MB of keys and values, or 1 GB of MLX's scores."""
    options = ("--raw", "--max-tokens", 2, "--model", request.getfixturevalue(kind))
    code, err = limited(700, "generate", *options, stdin=b"word " * 24000, MLXEFF_NATIVE=native)
    line = err.splitlines()[-1]
    want = r"mlxeff: error: prompt: the KV cache and computation of 120001 tokens: need [0-9.]+ [MG]B, .* may be used "
    assert code == 1
    assert re.match(want + r"\(the limit of the address space, ulimit -v\): about \d+ tokens would", line), err


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The same size of context for a model that mlx-lm computes."""
    return write_foreign(tmp_path_factory.mktemp("models") / "foreign", PHI | {"max_position_embeddings": 10**6})


# All sizes on request: how much is just enough differs between machines.
EVERY = [150, 170, 200, 225, 236, 250, 262, 270, 280, 330, 380, 420, 440] if os.getenv("MLXEFF_EXHAUSTIVE") else []


@LINUX
@pytest.mark.parametrize(
    ("kind", "limit", "sizes"),
    [
        # MB, from too little for numpy to enough
        ("roomy", resource.RLIMIT_AS, EVERY or [150, 200, 225, 330, 440]),
        ("foreign", resource.RLIMIT_AS, EVERY or [200, 250, 420]),
        ("foreign", resource.RLIMIT_DATA, [100, 150, 300]),
    ],
)
def test_mlx_under_every_limit(request, kind, limit, sizes):
    """MLX writes to address 0 where an allocation of its CPU backend fails, and threads that cannot start end or stop
    the process. No limit comes so far: the answer, or one line. More memory never does worse."""
    options = ("generate", "--raw", "--quiet", "--max-tokens", 2, "--model", request.getfixturevalue(kind))
    codes, said = [], ""
    for size in sizes:
        code, err = limited(size, *options, stdin=b"word " * 300, limit=limit, MLXEFF_NATIVE="0")
        lines = [line for line in err.splitlines() if ": error: " in line]
        codes.append(code)
        said += err
        assert code in (0, 1), (size, code, err)
        assert len(lines) == code, (size, err)
        if code:
            assert re.search(
                r": need \d+\.\d MB, \d+\.\d MB may be used \(the limit of the .*(would|fit|start)", lines[0]
            ), err
    assert codes == sorted(codes, reverse=True)
    assert (codes[0], codes[-1]) == (1, 0)
    assert ("mlx-lm and the weights: need 4" in said) == (kind == "foreign")


@LINUX
@pytest.mark.skipif("glibc" not in " ".join(platform.libc_ver()), reason="the GNU C library's arenas")
def test_threads_take_little_of_a_limited_address_space():
    """MLX's first thread takes its stack, and no pool of 64 MB."""
    code = """if True:
        import resource
        from mlxeff import limits
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        limits.start()
        import mlx.core as mx
        used = lambda: limits._table(limits.Path("/proc/self/status"))["VmSize"]
        before = used()
        mx.eval(mx.random.normal((64, 64)) @ mx.zeros((64, 64)))
        print(used() - before)"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
    assert grown < max(limits.STACK, resource.getrlimit(resource.RLIMIT_STACK)[0]) + (8 << 20)


@LINUX
def test_what_a_start_needs_is_enough(roomy):
    """With the limit that the line names the libraries start."""
    _, err = limited(120, "generate", "Hello", "--model", roomy)
    kilobytes = int(re.search(r": ulimit -v (\d+) is enough to start$", err.strip())[1])
    _, err = limited(kilobytes / 1024, "generate", "Hello", "--raw", "--model", roomy, "--max-tokens", 2)
    assert "the libraries" not in err


@LINUX
def test_the_chat_goes_on_after_it(roomy, tmp_path):
    saved = tmp_path / "talk.json"
    lines = b"Hello\n" + b"word " * 24000 + b"\n/save " + os.fsencode(saved) + b"\n"
    code, err = limited(700, "chat", "--max-tokens", 2, "--model", roomy, stdin=lines)
    assert code == 0
    assert "tokens: need " in err
    assert saved.exists()


def test_weights_that_do_not_fit_are_one_line(tiny_folder, monkeypatch):
    monkeypatch.setattr(limits, "available", lambda: (1000.0, "a test"))
    with pytest.raises(MlxeffError) as caught:
        load(str(tiny_folder))
    want = rf"{tiny_folder}: the weights: need 0\.3 MB, 0\.0 MB may be used \(a test\): 0% of the weights would fit .*"
    assert re.fullmatch(want, str(caught.value))
    load(str(tiny_folder), lazy=True)


def test_as_many_tokens_as_would_fit_do_fit(tiny_folder, monkeypatch):
    model, tokenizer = load(str(tiny_folder))
    cache = model.new_cache()
    need = model.prefill_bytes(cache, 100, 512, EXACT)
    monkeypatch.setattr(limits, "available", lambda: (float(need), "a test"))
    generation.require_memory(model, cache, 100, 512, EXACT)
    with pytest.raises(MlxeffError, match=r"about (\d+) tokens would") as caught:
        generation.require_memory(model, cache, 5000, 512, EXACT)
    fit = int(re.search(r"about (\d+)", str(caught.value))[1])
    assert 100 <= fit < 5000
    generation.require_memory(model, cache, fit, 512, EXACT)
    with pytest.raises(MlxeffError):
        generation.require_memory(model, cache, fit + 1, 512, EXACT)
    assert list(stream_generate(model, tokenizer, [256, 72], max_tokens=2))


SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
# MLX's peak is lower where other jobs hold up the thread that allocates, so the largest of some tries counts.
TRIES = 3


@pytest.mark.parametrize("kind", ["own", "foreign"])
@pytest.mark.skipif(mx.metal.is_available(), reason="what MLX's CPU backend holds")
@pytest.mark.parametrize("tokens", [256, 1024])
def test_what_is_counted_is_what_mlx_holds(tmp_path, kind, tokens):
    """Between 0.7 and 1.4 times the peak of a prefill in chunks of 256 tokens."""
    write = write_tiny_model if kind == "own" else write_foreign
    base = {"max_position_embeddings": 2048} if kind == "own" else PHI
    with mlx_only():
        model, peak = load_path(write(tmp_path / kind, base | SIZES)).model, 0
        for _ in range(TRIES):
            cache, before = model.new_cache(), mx.get_active_memory()
            need = model.prefill_bytes(cache, tokens, 256)
            mx.reset_peak_memory()
            for _ in range(0, tokens, 256):
                mx.eval(model.last_logits(mx.zeros((1, 256), mx.int32), cache), cache.arrays())
            peak = max(peak, mx.get_peak_memory() - before)
            if need / peak < 1.4:
                break
            del cache
    assert 0.7 < need / peak < 1.4, (need, peak)


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
    monkeypatch.setattr(limits, "CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_lines", lambda path, read=limits._lines: (
        ["0::/a/b"] if str(path) == "/proc/self/cgroup" else read(path)))  # fmt: skip
    assert list(limits._cgroup_limits()) == [(2700.0, "the limit of the container or control group")]


BIG = {
    "head_dim": 2048,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 10**5,
    "eos_token_id": None,
}
GROWTH = r"KV cache: growth from \d+ to \d+ tokens: need [0-9.]+ MB, [0-9.]+ MB may be used \(.*\): about \d+ would fit"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Folders of models whose keys and values take 64 KiB a token and more: with wide heads, with many heads, of
    mlx-lm."""
    folder = tmp_path_factory.mktemp("wide")
    window = {"sliding_window_pattern": 1, "query_pre_attn_scalar": 2048}
    folders = {
        "wide": write_tiny_model(folder / "wide", BIG),
        "many": write_tiny_model(
            folder / "many", BIG | {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 32}
        ),
        "foreign": write_foreign(folder / "foreign", GEMMA | BIG | window),
    }
    for each in folders.values():  # none has an end token
        for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
            entries = json.loads((each / name).read_text()) | {key: None}
            (each / name).write_text(json.dumps(entries))
    return folders


@LINUX
@pytest.mark.parametrize(
    ("model", "native", "options"),
    [
        ("wide", "1", ("--kv-cache", "float16")),
        ("wide", "0", ()),
        ("many", "1", ("--kv-cache", "int8")),
        ("many", "0", ("--kv-cache", "int4")),
        ("foreign", "0", ()),
    ],
)
def test_an_answer_that_outgrows_the_memory_is_kept(wide, model, native, options):
    """The KV cache is compared with the limit before it grows: the answer ends there, with one line."""
    arguments = ("generate", "--raw", "--json", "--max-tokens", 6000, "--model", wide[model], *options)
    size = 400 if model == "foreign" else 320
    code, err, out = limited(size, *arguments, stdin=b"word " * 46, output=True, MLXEFF_NATIVE=native)
    document = json.loads(out)
    assert code == 1
    assert document["finish_reason"] == "memory"
    assert len(document["token_ids"]) > 10
    assert document["text"]
    assert re.fullmatch(f"stopped: {GROWTH}.*", document["notices"][-1])
    assert err.splitlines()[-1] == f"mlxeff: warning: {document['notices'][-1]}"


@LINUX
def test_the_chat_goes_on_after_an_answer_that_outgrew_the_memory(wide, tmp_path):
    saved = tmp_path / "talk.json"
    lines = b"Hello\n/save " + os.fsencode(saved) + b"\n"
    code, err = limited(330000 / 1024, "chat", "--max-tokens", 6000, "--model", wide["wide"], stdin=lines)
    assert code == 0
    assert re.search(f"warning: stopped: {GROWTH}", err)
    assert [message["role"] for message in json.loads(saved.read_bytes())["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_memory_is_asked_only_where_the_cache_grows(tmp_path, kind, monkeypatch):
    """Twice more for 600 tokens than for 200: the buffers grow by 256."""
    model, tokenizer = load(
        str(write_tiny_model(tmp_path / kind) if kind == "own" else write_foreign(tmp_path / kind, PHI))
    )
    tokenizer.eos_token_ids, asked = set(), []

    def available():
        asked.append(1)
        return 1e12, "a test"

    monkeypatch.setattr(limits, "available", available)
    list(stream_generate(model, tokenizer, [256, 72], max_tokens=200, context_limit=2048))
    few, asked[:] = len(asked), []
    found = list(stream_generate(model, tokenizer, [256, 72], max_tokens=600, context_limit=2048))
    assert (len(asked) - few, found[-1].finish_reason) == (2, "length")


def test_every_call_that_grows_a_cache_asks(tiny_folder, monkeypatch):
    """Programs that call the model themselves, such as the sampling of `fit`, get the line too."""
    model, _ = load(str(tiny_folder))
    cache = model.new_cache()
    tokens = mx.zeros((16, 100), mx.int32)
    monkeypatch.setattr(limits, "available", lambda: (1000.0, "a test"))
    for call in (model, model.last_logits, model.layer_states):
        with pytest.raises(MlxeffError, match=r"KV cache: growth from 0 to 256 tokens: .* of 16 texts at once$"):
            call(tokens, cache)
    pairs = [(mx.zeros((1, groups, 8, size)),) * 2 for groups, size in model.kv_shapes]
    with pytest.raises(MlxeffError, match="KV cache: growth from 0 to 256 tokens"):
        model.append_kv(pairs, cache)
    assert cache.length == 0


@pytest.mark.skipif(mx.metal.is_available(), reason="what MLX's CPU backend holds")
@pytest.mark.parametrize("kind", [None, "float16", "int8"])
@pytest.mark.parametrize("native", [True, False])
def test_what_a_growth_needs_is_what_mlx_holds(wide, kind, native, monkeypatch):
    """Between 0.8 and 1.6 times the peak of the step in which the cache grows: decoded planes are counted as of a full
    cache."""
    with contextlib.nullcontext() if native else mlx_only():
        model, peak = load_path(wide["many"]).model, 0
        for _ in range(TRIES):
            cache, asked, held = model.new_cache(kind), [], 0
            mx.eval(model.last_logits(mx.zeros((1, 511), mx.int32), cache), cache.arrays())
            with monkeypatch.context() as patched:
                patched.setattr("mlxeff.models.decoder.require", lambda need, *_, told=asked, **__: told.append(need))
                cache.checked = 0
                for _ in range(2):
                    mx.reset_peak_memory()
                    held = mx.get_active_memory()
                    mx.eval(model.last_logits(mx.zeros((1, 1), mx.int32), cache))
            peak = max(peak, mx.get_peak_memory() - held)
            assert len(asked) == 1
            if asked[0] / peak < 1.6:
                break
            del cache
    assert 0.8 < asked[0] / peak < 1.6, (asked, peak)


def test_an_error_within_an_answer_keeps_what_came(tiny_folder, monkeypatch, capsys):
    """Of the text, and of the document of --json, whose exit code is 1."""
    from mlxeff import cli

    decode = generation.PlainFollowing.follow

    def follow(*arguments):
        for count, step in enumerate(decode(*arguments)):
            if count == 5:
                raise MlxeffError("decoding: a test")
            yield step

    monkeypatch.setattr(generation.PlainFollowing, "follow", staticmethod(follow))
    options = ["generate", "Hello", "--raw", "--model", str(tiny_folder)]
    assert cli.main([*options, "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["finish_reason"], len(document["token_ids"])) == ("error", 5)
    assert document["notices"][-1] == "decoding: a test"
    assert err.splitlines()[-1] == "mlxeff: error: decoding: a test"
    assert cli.main([*options, "--quiet"]) == 1
    assert capsys.readouterr().out.strip() == document["text"].strip()
