"""The command in unusual surroundings: closed and full streams, no home folder, other encodings than UTF-8, names that
are not UTF-8, huge numbers, Ctrl-C at any moment, results whose file cannot be written.

Each case is a real process on a tiny model, 0.5 to 2 s: some 60 s in all.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxeff import MlxeffError
from mlxeff.cli.streams import interruptible
from mlxeff.models.rope import make_rope
from mlxeff.names import expand, json_text, readable_by_mlx
from test_cli import COMMAND, document, environment, fails, generate, mlxeff
from tiny_model import GEMMA, write_foreign, write_tiny_model

NEEDS_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
CLOSED = "mlxeff: error: standard {}: wanted an open stream, got a closed one\n"
FULL = "mlxeff: error: standard output: cannot be written: No space left on device\n"


def shell(redirection, *arguments, **more):
    """(exit code, standard output, standard error) of the command with a shell's redirection."""
    words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *map(str, arguments)]
    run = subprocess.run(words, capture_output=True, env=environment(**more), timeout=120)
    assert b"Traceback" not in run.stderr, run.stderr.decode()
    return run.returncode, run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace")


@pytest.fixture(scope="module")
def hello(tiny_folder):
    """(arguments of `generate`, what it prints)."""
    arguments = ("generate", "Hello", "--model", tiny_folder, "--max-tokens", 8)
    return arguments, mlxeff(*arguments)[0]


def test_closed_streams(hello, tiny_folder):
    arguments, want = hello
    code, out, _ = shell("2>&-", *arguments)
    assert (code, out) == (0, want)
    code, out, _ = shell("<&-", *arguments)
    assert (code, out) == (0, want)
    assert shell("<&-", "generate", "--model", tiny_folder) == (1, "", CLOSED.format("input"))
    assert shell("<&-", "chat", "--model", tiny_folder)[1:] == ("", CLOSED.format("input"))
    assert shell(">&-", *arguments) == (1, "", CLOSED.format("output"))
    assert shell("<&- >&- 2>&-", *arguments) == (1, "", "")
    assert shell(">&-", "--version") == (1, "", CLOSED.format("output"))


def test_a_closed_output_does_not_become_a_file_of_the_program(hello, tiny_folder, tmp_path):
    """The next file to be opened would get the number of the closed stream, and the report would go into it."""
    code, _, err = shell(">&-", "convert", tiny_folder, tmp_path / "out")
    assert (code, err) == (1, CLOSED.format("output"))
    assert generate(tmp_path / "out", "Hello", "--max-tokens", 8)[0] == hello[1]


@NEEDS_FULL
def test_full_streams(hello):
    arguments, want = hello
    assert shell(">/dev/full", *arguments) == (1, "", FULL)
    assert shell(">/dev/full", *arguments, "--json") == (1, "", FULL)
    assert shell(">/dev/full", "doctor") == (1, "", FULL)
    assert shell(">/dev/full", "--version") == (1, "", FULL)
    assert shell(">/dev/full", "generate", "--model", "/nowhere", "--json", "a")[0] == 1
    assert shell("2>/dev/full", *arguments) == (0, want, "")
    assert shell("2>/dev/full", "generate", "--nonsense") == (2, "", "")


HOMELESS = """
import os, pwd, sys
for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "MLXEFF_CACHE", "USER", "LOGNAME"):
    os.environ.pop(name, None)
def nobody(user):
    raise KeyError(user)
pwd.getpwuid = nobody
from mlxeff.cli import main
sys.exit(main())
"""


def homeless(*arguments, code=0, cwd=None):
    """(stdout, stderr) where there is no HOME and no entry for the user in the password file."""
    command = [sys.executable, "-c", HOMELESS, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, env=environment(), timeout=120, text=True, cwd=cwd)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    return run.stdout, run.stderr


def test_no_home_folder(hello, tmp_path):
    arguments, want = hello
    assert homeless(*arguments, cwd=tmp_path)[0] == want
    wanted = "no home folder to keep downloads in: set HOME or {} to a folder\n"
    assert homeless("generate", "Hi", code=1, cwd=tmp_path)[1] == "mlxeff: error: " + wanted.format("MLXEFF_CACHE")
    _, err = homeless("generate", "Hi", "--model", "nobody/nothing", code=1, cwd=tmp_path)
    assert err == "mlxeff: error: nobody/nothing: " + wanted.format("HF_HOME")
    assert json.loads(homeless("doctor", "--json")[0])["cache"] is None
    assert "none: no home folder" in homeless("doctor")[0]
    assert json.loads(homeless("models", "--json")[0])["cache"] is None
    assert "smollm2-135m" in homeless("models")[0]
    assert list(tmp_path.iterdir()) == [], "no folder that is called ~"


UNKNOWN = [
    ["generate", "Hi", "--model", "~nosuchuser/x"],
    ["generate", "Hi", "--model", "MODEL", "--prompt-cache", "~nosuchuser/x"],
    ["generate", "--model", "MODEL", "--file", "~nosuchuser/x"],
    ["generate", "Hi", "--model", "MODEL", "--kv-predict", "~nosuchuser/x"],
    ["chat", "--model", "MODEL", "--resume", "~nosuchuser/x"],
    ["convert", "~nosuchuser/x", "out"],
    ["convert", "MODEL", "~nosuchuser/x"],
    ["convert", "MODEL", "out", "--tokenizer", "~nosuchuser/x"],
    ["fit", "kv-predictor", "MODEL", "--aux", "~nosuchuser/x", "--out", "out"],
    ["fit", "kv-predictor", "MODEL", "--aux", "lp:0.5", "--out", "~nosuchuser/x"],
    ["bench", "ttft", "~nosuchuser/x"],
]


@pytest.mark.parametrize("arguments", UNKNOWN, ids=lambda words: " ".join(words[:4]))
def test_a_user_that_does_not_exist(tiny_folder, tmp_path, arguments):
    arguments = [str(tiny_folder) if word == "MODEL" else word for word in arguments]
    assert "~nosuchuser/x" in fails(*arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand("~/a") == tmp_path / "a"
    assert str(expand("a/~b")) == "a/~b"
    (tmp_path / "~nosuchuser").touch()
    assert str(expand("~nosuchuser")) == "~nosuchuser", "a file has that very name"
    with pytest.raises(MlxeffError, match="NUL"):
        expand("a\0b")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_json_escapes_what_the_output_cannot_show(tiny_folder, encoding):
    arguments = ("generate", "Hé 漢字", "--model", tiny_folder, "--max-tokens", 24, "--temp", 1, "--seed", 3, "--json")
    command = [*COMMAND, *map(str, arguments)]
    want = json.loads(mlxeff(*arguments)[0])
    run = subprocess.run(command, capture_output=True, env=environment(PYTHONIOENCODING=encoding), timeout=120)
    got = json.loads(run.stdout.decode(encoding))
    assert (got["text"], got["token_ids"]) == (want["text"], want["token_ids"])
    assert not got["text"].isascii()


def test_json_of_half_a_character_can_be_read_again():
    assert json.loads(json_text({"a": "caf\udce9"}).encode()) == {"a": "caf\udce9"}
    assert json_text({"a": "café"}) == '{"a": "café"}'


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac's file system takes UTF-8 only")
def test_names_that_are_not_utf8(hello, tiny_folder, tmp_path):
    arguments, want = hello
    folder, other, cache, pair = (tmp_path / os.fsdecode(name + b"\xe9") for name in (b"in", b"out", b"cache", b"pair"))
    shutil.copytree(tiny_folder, folder)
    assert mlxeff(*arguments, "--model", folder)[0] == want
    got = document(folder, "Hello", "--max-tokens", 8)
    assert os.fsencode(got["path"]) == os.fsencode(folder)
    mlxeff("convert", folder, other)
    for reused in (0, 4):
        got = document(other, "Hello", "--raw", "--max-tokens", 8, "--prompt-cache", cache)
        assert got["timings"]["reused_tokens"] in (reused, reused + 1)
    mlxeff("fit", "kv-predictor", folder, "--aux", "lp:0.5", "--out", pair, "--tokens", 200)
    assert document(folder, "Hello", "--max-tokens", 2, "--kv-predict", pair)["timings"]["kv_prediction"]
    measure = ("--prompt-lengths", 8, "--rounds", 1, "--warmup", 0, "--steps", 1)
    mlxeff("bench", "ttft", folder, *measure, "--out", tmp_path / os.fsdecode(b"samples\xe9"))
    missing = tmp_path / os.fsdecode(b"missing\xe9")
    out, _ = mlxeff("generate", "Hi", "--model", missing, "--json", code=1)
    assert os.fsencode(json.loads(out)["error"]).startswith(os.fsencode(missing))
    foreign = write_foreign(tmp_path / "gemma", GEMMA).rename(tmp_path / os.fsdecode(b"gemma\xe9"))
    assert "wanted a folder name in UTF-8" in fails("generate", "Hi", "--model", foreign)


def test_texts_that_are_not_utf8(tiny_folder):
    text = os.fsdecode(b"H\xe9")
    for arguments in ([text], ["a", "--system", text], ["a", "--stop", text]):
        line = fails("generate", *arguments, "--model", tiny_folder)
        assert line.endswith(r"wanted UTF-8 text, got '\udce9' at position 1")


def test_a_name_for_mlx_stays_readable(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"abc")
    with readable_by_mlx(path) as name:
        name.encode()
        with open(name, "rb") as file:
            assert file.read() == b"abc"
    with readable_by_mlx(tmp_path / "plain") as name:
        assert name == str(tmp_path / "plain")


@pytest.mark.parametrize(
    "more",
    [["--prefill-step", 2**31], ["--prefill-step", 2**63], ["--context-limit", 2**64], ["--top-k", 2**40]],
    ids=lambda more: " ".join(map(str, more)),
)
def test_huge_numbers(hello, more):
    arguments, want = hello
    assert mlxeff(*arguments, *more)[0] == want


def test_huge_numbers_of_bench(tiny_folder):
    measure = ("--prompt-lengths", 8, "--rounds", 1, "--warmup", 0, "--steps", 1, "--prefill-step", 2**31)
    mlxeff("bench", "ttft", tiny_folder, *measure, "--threads", 2**40)


def test_yarn_with_null_betas():
    import mlx.core as mx

    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"))
    want, got = (make_rope(16, 10000.0, each, "llama") for each in (scaling, scaling | nulls))
    assert mx.array_equal(want.frequencies, got.frequencies)
    assert want.magnitude == got.magnitude


@pytest.mark.parametrize("seconds", [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7])
def test_ctrl_c_while_it_starts(tiny_folder, seconds):
    """The package's own code runs after some 0.06 s; what came before is Python's. A signal that ends the process is
    seen by a shell as exit code 130 too."""
    command = [*COMMAND, "generate", "Hello", "--model", str(tiny_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    wait_for_main(process)
    time.sleep(seconds - 0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT, 0), err
    assert b"Traceback" not in err


def test_ctrl_c_in_a_destructor(capfd):
    """Python drops an exception there, and `sys.unraisablehook` is all that hears of it."""

    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def run():
        with interruptible():
            Interrupted()
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert capfd.readouterr().err == ""


def wait_for_main(process):
    """Until Python has given Ctrl-C back to the system, which is the first thing that `mlxeff.__main__` does."""
    end = time.monotonic() + 30
    while sys.platform == "linux" and time.monotonic() < end:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        ignored = int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16)
        started = ignored >> (signal.SIGPIPE - 1) & 1  # Python ignores it from its start on
        if started and not caught >> (signal.SIGINT - 1) & 1:
            return
        time.sleep(0.002)
    time.sleep(0 if sys.platform == "linux" else 0.1)


def limited(bytes_of_a_file, *arguments):
    """(exit code, stdout, stderr) with a limit of the size of files, which stands for a full disk."""
    limit = (bytes_of_a_file, bytes_of_a_file)
    run = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, env=environment(), timeout=120, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, run.stdout, run.stderr


def test_a_fit_that_cannot_be_written_is_reported(tiny_folder, tmp_path):
    arguments = ("fit", "kv-predictor", tiny_folder, "--aux", "lp:0.5", "--out", tmp_path / "pair", "--tokens", 200)
    code, out, err = limited(2000, *arguments, "--json")
    report = json.loads(out)
    assert code == 1
    assert 0 < report["error"] < 1
    assert report["notices"][-1].startswith(f"{tmp_path / 'pair'}: not written")
    assert f"mlxeff: warning: {report['notices'][-1]}" in err
    assert list(tmp_path.iterdir()) == []


def test_samples_that_cannot_be_kept_are_shown(tiny_folder, tmp_path):
    arguments = ("bench", "ttft", tiny_folder, "--prompt-lengths", 8, "--rounds", 5, "--out", tmp_path / "samples")
    code, out, err = limited(800, *arguments, "--json")
    assert code == 1
    assert len(json.loads(out)["samples"]) == 5
    assert "are not kept there" in err


def test_a_panic_of_the_tokenizer_is_one_line(tmp_path):
    """The library writes several to standard error, with RUST_BACKTRACE many. In a Python program they stay, and so
    does what others write."""
    folder = write_tiny_model(tmp_path / "tiny")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = "a" * 40 + "c"
    out, err = mlxeff("generate", text, "--model", folder, code=1, RUST_BACKTRACE="1")
    assert out == ""
    assert re.fullmatch(r"mlxeff: error: .*: PanicException: .*retry-limit.*\n", err), err
    _, err = mlxeff("generate", "b", "--model", folder, "--max-tokens", 2)
    assert "stopped at --max-tokens 2" in err


def test_text_beside_a_panic_stays():
    code = """if True:
        import os
        from mlxeff import panics
        class PanicException(BaseException):
            pass
        def panic(text):
            with panics.apart(), panics.apart():
                os.write(2, text + b"\\nthread '<unnamed>' panicked at x.rs:1:2:\\nwhy\\nnote: run\\n")
                raise PanicException
        for text in (b"one", b"two"):
            try:
                panic(text)
            except PanicException:
                pass
            panics.enable()
        with panics.apart():
            os.write(2, b"\\nthree")"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment())
    assert run.stderr == b"one\nthread '<unnamed>' panicked at x.rs:1:2:\nwhy\nnote: run\ntwo\nthree"


def test_a_tilde_stands_for_the_home_folder(tmp_path):
    """In every path of an option, as in the names of models."""
    home = tmp_path / "home"
    write_tiny_model(home / "tiny")
    (home / "question.txt").write_text("Hello")
    how = {"HOME": str(home), "cwd": tmp_path}
    options = ("--model", "~/tiny", "--max-tokens", 2, "--raw")
    mlxeff("generate", "--file", "~/question.txt", "--prompt-cache", "~/kept.cache", *options, **how)
    assert (home / "kept.cache").exists()
    mlxeff("convert", "~/tiny", "~/out", "--tokenizer", "~/tiny", "--quiet", **how)
    assert (home / "out" / "tokenizer.json").exists()
    small = ("--prompt-lengths", 4, "--rounds", 1, "--steps", 0, "--warmup", 0, "--quiet")
    mlxeff("bench", "ttft", "~/tiny", "--out", "~/samples.jsonl", *small, **how)
    assert (home / "samples.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    line = fails("generate", "--file", "~nosuchuser/question.txt", *options, **how)
    assert "~nosuchuser: no such user" in line
