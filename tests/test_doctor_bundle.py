"""`mlxeff doctor --bundle`: a crash of a real process is in the file, and nothing that identifies the user. About 12 s.

The process that crashes runs the command with one function of the library replaced, as no way is known to crash it.
"""

import getpass
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxeff import ops
from mlxeff.bench import checkup
from mlxeff.cli.redaction import redacted, without_quotes

ROOT = Path(__file__).resolve().parent.parent
USER, TOKEN, KEY = "zaphodb", "hf_" + "Abc123" * 5, "wonderland-4711"
PROMPT, SYSTEM, FROM_FILE = "my very private question", "a secret system message", "what the file says of me"
CRASHING = """
import sys
from mlxeff.cli import main, runner
def broken(*arguments, **more):
    raise ValueError({message!r})
runner.Runner.__init__ = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def home(tmp_path):
    found = tmp_path / "home" / USER
    found.mkdir(parents=True)
    return found


def run(home, *arguments, program=None, code=0, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MLXEFF_", "XDG_"))}
    environment = kept | {"HOME": str(home), "USER": USER, "LOGNAME": USER, "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    environment |= {"MY_API_KEY": KEY, "HF_ENDPOINT": f"http://{USER}:pw@127.0.0.1:9"} | more
    command = [sys.executable, *(["-m", "mlxeff"] if program is None else ["-c", program]), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def crash(home, message, *arguments):
    done = run(home, "generate", *arguments, program=CRASHING.format(message=message), code=1)
    assert "Traceback" in done.stderr
    assert f"ValueError: {message}" in done.stderr  # Python's own report is whole
    assert "`mlxeff doctor --bundle` writes a file for a bug report" in done.stderr
    return done


def test_a_crash_is_in_the_file_and_nothing_of_the_user(home, tiny_folder):
    (home / "prompt.txt").write_text(f"first line\n{FROM_FILE}\n")
    message = f"bad token in {PROMPT!r} of {home}/x.gguf, {SYSTEM}, {TOKEN}, {KEY}, on {platform.node()}, by {USER}"
    crash(home, message, PROMPT, "--model", tiny_folder, "--system", SYSTEM)
    done = run(home, "doctor", "--bundle", "report.txt")
    assert re.search(r"^report +report.txt: doctor, versions, .*last crash.*speed sample$", done.stdout, re.MULTILINE)
    text = (home / "report.txt").read_text()
    crashed = text.partition("== last crash ==\n")[2].partition("\n== ")[0]
    assert "verb: generate" in crashed
    assert "ValueError: bad token in " in crashed
    assert "in broken" in crashed
    assert "mlxeff/cli/generate.py" in crashed
    for private in (USER, str(home), TOKEN, KEY, PROMPT, SYSTEM, platform.node(), getpass.getuser(), "pw@"):
        assert not re.search(rf"(?<![A-Za-z]){re.escape(private)}(?![A-Za-z])", text), private
    for wanted in ('"HF_TOKEN": "(set)"', '"kernel": "attention"', '"read_gbps"', '"available"', "x.gguf"):
        assert wanted in text


def test_the_text_of_a_file_is_left_out_too(home, tiny_folder):
    (home / "prompt.txt").write_text(f"first line\n{FROM_FILE}\n")
    crash(home, f"cannot read {FROM_FILE}", "--file", "prompt.txt", "--model", tiny_folder)
    kept = next(home.rglob("last-crash.txt")).read_text()
    assert "ValueError: cannot read <text>" in kept
    assert FROM_FILE not in kept


def test_an_explained_error_is_no_crash(home):
    run(home, "generate", "a", "--model", "./nowhere", code=1)
    assert not list(home.rglob("last-crash.txt"))


def test_a_file_that_is_no_report_is_kept(home):
    (home / "notes.txt").write_text("mine")
    done = run(home, "doctor", "--bundle", "notes.txt", code=1)
    assert done.stderr == "mlxeff: error: notes.txt: wanted a new file or an earlier report, got another file\n"
    assert (home / "notes.txt").read_text() == "mine"
    for place, message in (("no/such/x", "wanted an existing folder"), (".", "got a folder")):
        assert message in run(home, "doctor", "--bundle", place, code=1).stderr


def test_redaction():
    environment = {"HOME": "/somewhere/ford", "USER": "ford", "SECRET_THING": "mice-are-clever", "KEY_X": "short"}
    cases = {
        "/somewhere/ford/a/b": "~/a/b",
        "/somewhere/fordham": "/somewhere/fordham",
        "of Ford, by ford_x and fordx": "of <user>, by <user>_x and fordx",
        "/home/arthur/x /Users/trillian/y": "/home/<user>/x /Users/<user>/y",
        "hf_AbCdEfGhIj at https://a:b@host.org/": "<token> at https://<login>@host.org/",
        "the mice-are-clever, a short word": "the <token>, a short word",
        "one two three four\nfive": "<text>\nfive",
        "say 'one two\\nthree'": "say '<text>'",
    }
    for given, wanted in cases.items():
        assert redacted(given, ["one two three four", "one two\nthree"], environment) == wanted, given
    assert without_quotes(f"got {'x' * 30!r} and 'short'") == "got <30 characters> and 'short'"


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    found = checkup.native_kernels()
    assert all(each["passed"] for each in found)
    if not found:
        pytest.skip("no native kernels here")
    right = ops.swiglu_cpu
    monkeypatch.setattr(ops, "swiglu_cpu", lambda gate, up: right(gate, up) + mx.array(1e-3))
    assert [each["kernel"] for each in checkup.native_kernels() if not each["passed"]] == ["swiglu"]
