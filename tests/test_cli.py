"""The command as a user has it: real processes, files and terminals; its words, its messages, its exit codes."""

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoint_files import Raw, write_torch
from tiny_model import CONTEXT, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "mlxeff"]
TIMINGS = re.compile(
    r"prompt \d+ tokens( \(\d+ from the cache\))? \| TTFT [\d.]+ s \| prefill [\d.]+ tok/s \| generated \d+ tokens "
    r"\((stop|length|interrupted)\) \| decode [\d.]+ tok/s \| peak memory [\d.]+ GB \| (cpu|gpu) \w+ (mlx|native \w+)"
)


def environment(**more):
    """No terminal colours, no network: an endpoint where nobody listens."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    return kept | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)} | more


def mlxeff(*arguments, stdin=b"", code=0, limit=None, cwd=None, **more):
    """Run the command; returns (stdout, stderr) after a check of its exit code and that no traceback shows."""
    command = [*COMMAND, *(str(argument) for argument in arguments)]
    set_limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    run = subprocess.run(
        command, input=stdin, capture_output=True, env=environment(**more), timeout=120, preexec_fn=set_limit, cwd=cwd
    )
    out, err = run.stdout.decode(), run.stderr.decode()
    assert run.returncode == code, f"exit {run.returncode}, wanted {code}: {err}"
    assert "Traceback" not in err, err
    return out, err


def fails(*arguments, **options):
    """The one line of a failing command."""
    out, err = mlxeff(*arguments, code=1, **options)
    lines = [line for line in err.splitlines() if line.startswith("mlxeff: error: ")]
    assert len(lines) == 1, err
    assert out == ""
    return lines[0].removeprefix("mlxeff: error: ")


def generate(folder, *arguments, **options):
    return mlxeff("generate", "--model", folder, "--max-tokens", 24, *arguments, **options)


def document(folder, *arguments, **options):
    out, _ = generate(folder, *arguments, "--json", **options)
    return json.loads(out)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A tiny model without an end token, with room for very long texts."""
    folder = write_tiny_model(
        tmp_path_factory.mktemp("models") / "endless", {"max_position_embeddings": 10**6, "eos_token_id": None}
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_same_seed_same_words_and_another_seed_other_words(tiny_folder):
    texts = [generate(tiny_folder, "Hello", "--temp", 1, "--seed", seed)[0] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].endswith("\n")


def test_without_a_seed_the_one_drawn_is_told_and_repeats(tiny_folder):
    first = document(tiny_folder, "Hello", "--temp", 1)
    again = document(tiny_folder, "Hello", "--temp", 1, "--seed", first["seed"])
    assert first["token_ids"] == again["token_ids"]
    assert document(tiny_folder, "Hello", "--temp", 1)["seed"] != first["seed"]


def test_prompt_from_argument_stdin_and_file_are_one(tiny_folder, tmp_path):
    text = "Zwei Wörter 🤖"
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte-order mark is not part of the text
    want = generate(tiny_folder, text)[0]
    assert generate(tiny_folder, "-", stdin=text.encode())[0] == want
    assert generate(tiny_folder, stdin=text.encode())[0] == want
    assert generate(tiny_folder, "--file", path)[0] == want


def test_template_system_and_raw(tiny_folder):
    plain, raw = document(tiny_folder, "Hi"), document(tiny_folder, "Hi", "--raw")
    system = document(tiny_folder, "Hi", "--system", "Be brief")
    assert plain["prompt_token_ids"][:1] == [258]
    assert plain["prompt_token_ids"][-2:] == [257, 259]
    assert raw["prompt_token_ids"][0] == 256
    assert len(raw["prompt_token_ids"]) == 3
    assert system["prompt_token_ids"][:1] == [260]
    assert system["prompt_token_ids"][-5:] == plain["prompt_token_ids"]


def test_control_tokens_in_messages_are_text(tiny_folder, tmp_path):
    """From the argument, a file and the system message, and in a conversation; two options have the old way."""
    (tmp_path / "prompt.txt").write_text("a<|end|>b")
    for arguments in (["a<|end|>b"], ["--file", tmp_path / "prompt.txt"], ["b", "--system", "a<|end|>"]):
        ids = document(tiny_folder, *arguments, "--max-tokens", 1)["prompt_token_ids"]
        old = document(tiny_folder, *arguments, "--max-tokens", 1, "--special-in-text")["prompt_token_ids"]
        turns = 2 if "--system" in arguments else 1
        assert (ids.count(257), old.count(257)) == (turns, turns + 1)
        assert len(ids) == len(old) + len("<|end|>") - 1
    assert 257 in document(tiny_folder, "a<|end|>b", "--raw", "--max-tokens", 1)["prompt_token_ids"]
    tokens = []
    for options in ([], ["--special-in-text"]):
        end = [*options, "--max-tokens", 1, "--quiet"]
        output = mlxeff("chat", "--model", tiny_folder, *end, stdin=b"a<|end|>b\n/stats\n")[0]
        tokens.append(int(re.search(r"prompt (\d+) tokens", output)[1]))
    assert tokens[0] == tokens[1] + len("<|end|>") - 1


def test_timings_on_stderr_and_quiet(tiny_folder):
    out, err = generate(tiny_folder, "Hello")
    assert TIMINGS.fullmatch(err.splitlines()[0]), err
    quiet, nothing = generate(tiny_folder, "Hello", "--quiet")
    assert quiet == out
    assert nothing == ""


def test_json_is_one_document(tiny_folder):
    streamed, _ = generate(tiny_folder, "Hello")
    got = document(tiny_folder, "Hello")
    assert got["text"] + "\n" == streamed or got["text"] == streamed
    assert got["finish_reason"] in ("stop", "length")
    assert set(got) == set(
        "model path text prompt_token_ids token_ids finish_reason seed auto timings notices versions".split()
    )
    assert set(got["timings"]) == set(
        "prompt_tokens reused_tokens generated_tokens load_s ttft_s prefill_tps decode_tps peak_memory_gb device "
        "dtype backend compute kv_dtype kv_bytes kv_prediction quantspec draft_model prompt_lookup dynamoe_draft "
        "dynamoe".split()
    )
    assert got["timings"]["prompt_tokens"] == len(got["prompt_token_ids"])
    assert got["timings"]["generated_tokens"] == len(got["token_ids"])
    assert got["timings"]["ttft_s"] > 0
    assert got["versions"]["mlx"] == mx.__version__
    from mlxeff import load

    _, tokenizer = load(tiny_folder)
    ids = [token for token in got["token_ids"] if token not in tokenizer.eos_token_ids]
    assert tokenizer.decode(ids) == got["text"]


def test_json_of_an_error(tiny_folder):
    out, _ = mlxeff("generate", "--model", tiny_folder, "x" * CONTEXT, "--json", code=1)
    assert str(CONTEXT) in json.loads(out)["error"]


def test_stop_strings(endless):
    text = document(endless, "Hello")["text"]
    middle, late = text[8:11], text[15:18]
    cut = min(text.index(middle), text.index(late))
    got = document(endless, "Hello", "--stop", late, "--stop", middle)
    assert got["text"] == text[:cut]
    assert got["finish_reason"] == "stop"


def test_max_tokens_are_said(endless):
    _, err = generate(endless, "Hello")
    assert "stopped at --max-tokens 24" in err
    assert "generated 24 tokens (length)" in err


def test_context_is_said_when_it_ends_the_text(endless):
    got = document(endless, "Hello", "--max-tokens", -1, "--context-limit", 40)
    prompt, generated = len(got["prompt_token_ids"]), len(got["token_ids"])
    assert (got["finish_reason"], prompt + generated - 1) == ("length", 40)
    assert got["notices"] == ["stopped: the context is full"]


def test_truncation_is_opted_into_and_told(tiny_folder):
    text = "".join(chr(97 + i % 26) for i in range(2 * CONTEXT))
    line = fails("generate", "--model", tiny_folder, text, "--raw")
    assert re.search(rf"{2 * CONTEXT + 1} tokens.*context is {CONTEXT} tokens.*--truncate", line)
    got = document(tiny_folder, text, "--raw", "--truncate")
    assert len(got["notices"]) == 1
    assert f"of {2 * CONTEXT + 1} tokens" in got["notices"][0]
    assert got["timings"]["prompt_tokens"] == CONTEXT - 24


def test_prefill_in_chunks_gives_the_same_words(tiny_folder):
    prompt = "A longer prompt " * 6
    whole, steps = document(tiny_folder, prompt), document(tiny_folder, prompt, "--prefill-step", 7)
    assert whole["token_ids"] == steps["token_ids"]


def test_options_without_effect_are_told(tiny_folder):
    got = document(tiny_folder, "Hello", "--top-p", 0.9, "--min-p", 0.1)
    assert got["notices"] == ["--top-p and --min-p has no effect at temperature 0 (greedy): set --temp"]


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


BAD = [
    (["generate", "--model", "MODEL", ""], b"", r"prompt: wanted a prompt, got an empty one"),
    (["generate", "--model", "MODEL"], b" \n", r"standard input: wanted a prompt, got an empty one"),
    (["generate", "--model", "MODEL", "-"], b"ab\xff", r"standard input: wanted UTF-8.*0xff at position 2"),
    (["generate", "--model", "MODEL", "--file", "nowhere.txt"], b"", r"nowhere.txt: cannot be read: No such file"),
    (["generate", "--model", "MODEL", "a", "--file", "b"], b"", r"wanted a prompt or --file, got both"),
    (["generate", "--model", "MODEL", "a", "--raw", "--system", "b"], b"", r"--system needs the chat template"),
    (["generate", "--model", "MODEL", "a", "--top-p", "2"], b"", r"top-p: wanted 0 to 1, got 2"),
    (["generate", "--model", "MODEL", "a", "--temp", "-1"], b"", r"temperature: wanted 0 or more, got -1"),
    (["generate", "--model", "MODEL", "a", "--repetition-penalty", "-1"], b"", r"repetition penalty: wanted more"),
    (["generate", "--model", "MODEL", "a", "--stop", ""], b"", r"--stop: wanted a text"),
    (["generate", "--model", "./nowhere", "a"], b"", r"nowhere: no such file or folder"),
    (["generate", "--model", "smolm2-135m", "a"], b"", r"unknown model 'smolm2-135m'; did you mean smollm2-135m"),
    (["generate", "--model", "nobody/nothing", "a"], b"", r"nobody/nothing: no network: http://127.0.0.1:9 .*local"),
    (["generate", "--model", "nobody/nothing", "a", "--offline"], b"", r"not in the cache and offline; fetch it once"),
    (["generate", "--model", "MODEL", "a", "--prompt-cache", "no/such/cache"], b"", r"wanted an existing folder"),
    (["chat", "--model", "MODEL", "--resume", "nowhere.json"], b"", r"nowhere.json: cannot be read"),
    (["convert", "./nowhere", "out"], b"", r"nowhere: no such file or folder"),
]


@pytest.mark.parametrize(("arguments", "stdin", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_one_line(tiny_folder, tmp_path, hub_cache, arguments, stdin, message):
    arguments = [str(tiny_folder) if argument == "MODEL" else argument for argument in arguments]
    line = fails(*arguments, stdin=stdin, cwd=tmp_path, HF_HOME=str(hub_cache))
    assert re.search(message, line), line


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = dict(mx.load(str(path)))
    change(weights)
    mx.eval(weights)
    path.unlink()
    mx.save_safetensors(str(path), weights, {"format": "mlx"})


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
DAMAGED = {
    "truncated": (lambda d: cut(d / "model.safetensors", 9000), r"model.safetensors: .*wanted \d+ bytes.*got 9000"),
    "header": (lambda d: cut(d / "model.safetensors", 100), r"model.safetensors: .*wanted"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"no weights: looked for model\*.safetensors"),
    "missing shard": (
        lambda d: edit_index(d, "model-00001-of-00002.safetensors"), r"model-00001-of-00002.safetensors.*missing"
    ),
    "missing tensor": (lambda d: edit_weights(d, lambda w: w.pop(NORM)), rf"missing 1 tensors: {NORM}"),
    "unknown tensor": (lambda d: edit_weights(d, lambda w: w.update(extra=w[NORM])), r"1 unknown tensors: extra"),
    "wrong shape": (
        lambda d: edit_weights(d, lambda w: w.update({DOWN: w[DOWN].T})),
        rf"tensor {DOWN}: wanted shape \(64, 96\), got \(96, 64\)",
    ),
    "unknown key": (lambda d: edit_json(d / "config.json", novelty=1), r"llama config: unknown keys \['novelty'\]"),
    "architecture": (
        lambda d: edit_json(d / "config.json", model_type="novel"), r"unsupported architecture 'novel'"
    ),
    "vocabulary": (lambda d: fewer_rows(d, 256), r"prompt: the model has no token '<\|user\|>': its id is 258"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"no tokenizer found; looked for"),
    "config": (lambda d: (d / "config.json").write_text("{"), r"config.json: not valid JSON"),
}  # fmt: skip


def fewer_rows(folder, rows):
    edit_json(folder / "config.json", vocab_size=rows)
    name = "model.embed_tokens.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:rows]}))


def edit_index(folder, shard):
    names = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_is_one_line(tiny_folder, tmp_path, what):
    damage, message = DAMAGED[what]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    damage(folder)
    line = fails("generate", "--model", folder, "Hello")
    assert re.search(message, line), line


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has a GPU")
def test_no_gpu_here(tiny_folder):
    assert "--device gpu" in fails("generate", "--model", tiny_folder, "a", "--device", "gpu")


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["generate", "a", "--max-tokens", "0"], ["generate", "--tem", "1"], ["convert", "a"],
     ["convert", "a", "b", "--quantize", "x"], ["generate", "a", "--seed", "-1"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments):
    out, err = mlxeff(*arguments, code=2)
    assert out == ""
    assert "usage: mlxeff" in err


def test_version_and_help():
    import mlxeff as package

    assert mlxeff("--version")[0] == f"mlxeff {package.__version__}\n"
    usage = mlxeff("--help")[0]
    for verb in ("generate", "chat", "models", "convert", "eval", "doctor"):
        assert verb in usage
        assert "usage" in mlxeff(verb, "--help")[0]


def stream_until(process, size, timeout=60):
    """Read at least `size` bytes from the process's standard output as they come."""
    data, end = b"", time.monotonic() + timeout
    while len(data) < size and time.monotonic() < end and (piece := os.read(process.stdout.fileno(), 4096)):
        data += piece
    assert len(data) >= size, process.communicate()[1].decode()
    return data


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_generated(endless, tmp_path, as_json):
    cache = tmp_path / "cache"
    command = [*COMMAND, "generate", "Hello", "--model", str(endless), "--max-tokens", "-1", "--prompt-cache", cache]
    process = subprocess.Popen(
        command + ["--json"] * as_json, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    if as_json:
        time.sleep(4)
        seen = b""
    else:
        seen = stream_until(process, 50)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert cache.exists()
    if as_json:
        got = json.loads(out)
        assert got["finish_reason"] == "interrupted"
        assert len(got["text"]) > 0
    else:
        assert "(interrupted)" in err.decode()
        assert (seen + out).endswith(b"\n")


def test_a_reader_that_goes_away(endless):
    process = subprocess.Popen(
        [*COMMAND, "generate", "Hello", "--model", str(endless), "--max-tokens", "-1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    stream_until(process, 20)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 141, err
    assert "Traceback" not in err


def test_prompt_cache(tiny_folder, tmp_path):
    cache, text = tmp_path / "cache", "The same long beginning, then "
    first = document(tiny_folder, text + "one", "--raw", "--prompt-cache", cache)
    assert first["timings"]["reused_tokens"] == 0
    again = document(tiny_folder, text + "one", "--raw", "--prompt-cache", cache)
    assert again["token_ids"] == first["token_ids"]
    assert again["timings"]["reused_tokens"] == len(first["prompt_token_ids"]) - 1
    other = document(tiny_folder, text + "two", "--raw", "--prompt-cache", cache)
    assert other["timings"]["reused_tokens"] == 1 + len(text)
    assert other["token_ids"] == document(tiny_folder, text + "two", "--raw")["token_ids"]
    missed = document(tiny_folder, "Hi", "--prompt-cache", cache)
    assert missed["timings"]["reused_tokens"] == 0
    assert any("none of its" in notice for notice in missed["notices"])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_prompt_cache_that_does_not_fit(tiny_folder, endless, tmp_path):
    cache = tmp_path / "cache"
    generate(tiny_folder, "Hello", "--prompt-cache", cache)
    assert "of this model" in fails("generate", "a", "--model", endless, "--prompt-cache", cache)
    cache.write_bytes(cache.read_bytes()[:200])
    assert "damaged or foreign" in fails("generate", "a", "--model", tiny_folder, "--prompt-cache", cache)


def test_an_answer_whose_prompt_cache_cannot_be_written_is_shown(tiny_folder, tmp_path):
    """A limit of the size of files stands for a full disk."""
    cache, limit = tmp_path / "cache", 1000
    want = document(tiny_folder, "Hello")
    out, err = generate(tiny_folder, "Hello", "--json", "--prompt-cache", cache, limit=limit, code=1)
    got = json.loads(out)
    assert got["text"] == want["text"]
    assert got["token_ids"] == want["token_ids"]
    assert len(got["notices"]) == 1
    assert got["notices"][0].startswith(f"{cache}: cannot write the prompt cache: ")
    assert f"mlxeff: warning: {got['notices'][0]}\n" in err
    text, err = generate(tiny_folder, "Hello", "--prompt-cache", cache, limit=limit, code=1)
    assert text == generate(tiny_folder, "Hello")[0]
    assert "warning: " in err
    assert "TTFT" in err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_cache_is_kept_when_the_reader_goes_away(endless, tmp_path):
    cache = tmp_path / "cache"
    command = [*COMMAND, "generate", "Hello", "--model", str(endless), "--max-tokens", "-1", "--prompt-cache", cache]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    stream_until(process, 20)
    process.stdout.close()
    assert process.wait(60) == 141, process.stderr.read().decode()
    assert cache.exists()


def test_prompt_cache_of_another_precision_is_computed_anew(tiny_folder, tmp_path):
    """Keys and values in bfloat16 are not reused by an exact run, which says so and is exact."""
    cache, text = tmp_path / "cache", "The same long beginning, then "
    arguments = (tiny_folder, text, "--raw", "--prompt-cache", cache)
    exact = document(tiny_folder, text, "--raw")
    document(*arguments, "--kv-dtype", "bfloat16")
    again = document(*arguments, "--kv-dtype", "bfloat16")
    assert again["timings"]["reused_tokens"] > 0
    assert again["timings"]["kv_dtype"] == "bfloat16"
    got = document(*arguments)
    assert got["timings"]["reused_tokens"] == 0
    assert got["timings"]["kv_dtype"] == "float32"
    assert got["token_ids"] == exact["token_ids"]
    want = f"{cache}: wanted a KV cache of exact float32, got exact bfloat16: not reused, computed anew"
    assert got["notices"] == [want]
    assert document(*arguments)["timings"]["reused_tokens"] > 0, "the file is the exact run's"
    if json.loads(mlxeff("doctor", "--json")[0])["native"]["available"]:
        other = document(*arguments, "--compute", "int8")
        assert other["timings"]["reused_tokens"] == 0
        assert "wanted a KV cache of int8 float32, got exact float32" in other["notices"][0]


def test_models():
    table = mlxeff("models")[0]
    for name in ("smollm2-135m (default)", "apple/OpenELM-270M", "openelm-3b-instruct"):
        assert name in table
    rows = json.loads(mlxeff("models", "--json")[0])
    assert rows["default"] == "smollm2-135m"
    assert {row["alias"] for row in rows["models"]} >= {"smollm2-135m", "openelm-1.1b"}


def test_doctor():
    text = mlxeff("doctor")[0]
    facts = json.loads(mlxeff("doctor", "--json")[0])
    assert facts["mlx"] == mx.__version__
    assert facts["mlx"] in text
    if facts["native"]["available"]:
        assert facts["native"]["level"] in facts["native"]["levels"]
        assert f"native kernels: {facts['native']['level']}" in text
    off = json.loads(mlxeff("doctor", "--json", MLXEFF_NATIVE="0")[0])["native"]
    assert off["reason"] == "switched off by MLXEFF_NATIVE=0"


def test_convert_then_generate(tiny_folder, tmp_path):
    plan, _ = mlxeff("convert", tiny_folder, tmp_path / "out", "--quantize", "8:32", "--dry-run")
    assert "would convert" in plan
    assert "tokenizer.json" in plan
    assert not (tmp_path / "out").exists()
    report = json.loads(mlxeff("convert", tiny_folder, tmp_path / "out", "--json")[0])
    assert report["ok"]
    assert report["written"]
    assert document(tmp_path / "out", "Hello")["token_ids"] == document(tiny_folder, "Hello")["token_ids"]
    mlxeff("convert", tiny_folder, tmp_path / "small", "--quantize", "8:32")
    assert (tmp_path / "small/model.safetensors").stat().st_size < (tmp_path / "out/model.safetensors").stat().st_size
    assert generate(tmp_path / "small", "Hello")[0]
    assert "exists" in fails("convert", tiny_folder, tmp_path / "out")


def test_convert_that_ignores_keys(tiny_folder, tmp_path):
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    edit_json(source / "config.json", attn_scale=2.0)
    assert fails("convert", source, tmp_path / "out").endswith("run with --ignore-keys attn_scale")
    out, _ = mlxeff("convert", source, tmp_path / "out", "--ignore-keys", "attn_scale")
    assert " ignore_keys attn_scale\n" in out
    assert generate(tmp_path / "out", "Hello", "--max-tokens", 2)[0]


def test_convert_with_a_full_disk_leaves_nothing(tiny_folder, tmp_path):
    line = fails("convert", tiny_folder, tmp_path / "out", limit=100_000)
    assert re.search(r"out: not written, nothing is left behind: File too large", line), line
    assert list(tmp_path.iterdir()) == []


def test_a_malicious_pickle_is_refused(tmp_path):
    marker = tmp_path / "executed"
    code = f"touch {marker}".encode()
    attack = Raw(b"cposix\nsystem\n(X" + len(code).to_bytes(4, "little") + code + b"tR")
    write_torch(tmp_path / "model.pt", {"token_embeddings.weight": attack})
    line = fails("convert", tmp_path / "model.pt", tmp_path / "out")
    assert "refused, nothing was executed" in line
    assert "posix.system" in line
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_chat_keeps_its_cache(tiny_folder, tmp_path):
    saved = tmp_path / "talk.json"
    lines = f"Hello\n\nAnd now?\n/stats\n/save {saved}\n/reset\n/stats\n/nonsense\n/exit\nnever\n"
    out, err = mlxeff("chat", "--model", tiny_folder, "--max-tokens", 8, stdin=lines.encode())
    stats = [line for line in out.splitlines() if TIMINGS.fullmatch(line)]
    assert len(stats) == 2
    assert "from the cache" in stats[0]
    assert "conversation: 2 turns" in out
    assert "unknown command /nonsense" in err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages][::2] == ["Hello", "And now?"]
    assert out.startswith(messages[1]["content"])
    assert "exists" in mlxeff("chat", "--model", tiny_folder, stdin=f"/save {saved}\n".encode())[1]


def test_chat_goes_on_with_a_saved_conversation(tiny_folder, tmp_path):
    saved = tmp_path / "talk.json"
    both = b"Hello\nAnd now?\n"
    whole, _ = mlxeff("chat", "--model", tiny_folder, "--max-tokens", 8, stdin=both)
    first, _ = mlxeff("chat", "--model", tiny_folder, "--max-tokens", 8, stdin=f"Hello\n/save {saved}\n".encode())
    second, _ = mlxeff("chat", "--model", tiny_folder, "--max-tokens", 8, "--resume", saved, stdin=b"And now?\n")
    assert first + second == whole


def test_chat_that_outgrows_the_context(tiny_folder):
    lines = b"one one one one one one\ntwo two two two two two two\nthree three three three\n"
    options = ("chat", "--model", tiny_folder, "--max-tokens", 8, "--context-limit", 64)
    _, err = mlxeff(*options, stdin=lines)
    assert "context is 64 tokens" in err
    _, err = mlxeff(*options, "--truncate", stdin=lines)
    assert "dropped its" in err
    assert "error" not in err


def test_chat_needs_a_template(tmp_path):
    folder = write_tiny_model(tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "has no chat template" in fails("chat", "--model", folder, stdin=b"Hi\n")
    got = document(folder, "Hi")
    assert got["prompt_token_ids"][0] == 256
    assert any("no chat template" in notice for notice in got["notices"])
    assert "--system has no place" in fails("generate", "--model", folder, "Hi", "--system", "x")


def in_terminal(arguments, keys, until):
    """Run the command in a pseudo-terminal; type each of `keys` when the text before it has appeared."""
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.execvpe(COMMAND[0], [*COMMAND, *map(str, arguments)], environment(TERM="dumb"))
    seen, end = "", time.monotonic() + 60
    waiting = list(keys)
    while time.monotonic() < end:
        try:
            seen += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other side has closed
            break
        while waiting and re.search(waiting[0][0], seen, re.DOTALL):
            os.write(terminal, waiting.pop(0)[1])
    _, status = os.waitpid(process, 0)
    assert until in seen, seen
    return seen, os.waitstatus_to_exitcode(status)


def test_chat_in_a_terminal(endless):
    keys = [(r"> ", b"Hello\n"), (r"Hello\r\n.{20}", b"\x03"), (r"\(interrupted\)\r\n> ", b"/stats\n"),
            (r"conversation: 1 turns.*> ", b"\x04")]  # fmt: skip
    seen, code = in_terminal(["chat", "--model", endless, "--max-tokens", -1], keys, "conversation: 1 turns")
    assert code == 0, seen
    assert "/help lists the commands" in seen
    assert "Traceback" not in seen


def test_a_progress_bar_shows_on_a_terminal_only(endless, monkeypatch):
    monkeypatch.setenv("MLXEFF_NATIVE", "0")  # slow enough to show one
    arguments = ["generate", "--model", endless, "x" * 6000, "--raw", "--max-tokens", 2, "--prefill-step", 16]
    seen, code = in_terminal(arguments, [], "TTFT")
    assert code == 0
    assert "prefill:" in seen
    _, err = mlxeff(*arguments)
    assert "prefill:" not in err


@pytest.mark.slow
def test_built_in_model_answers(smollm2_gguf):
    out, err = mlxeff("generate", "What is the capital of France?", "--max-tokens", 12)
    assert "Paris" in out
    assert TIMINGS.search(err)
