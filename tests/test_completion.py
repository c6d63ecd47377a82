"""`mlxeff completion`: bash, zsh and fish, each a real shell in a terminal, complete what is typed. About 5 seconds."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxeff import cli

ROOT = Path(__file__).resolve().parent.parent
READY, DONE = "READY-", "DONE-"  # printed by commands that are typed in two parts, so that the echo does not have them


def script(shell, cwd):
    command = [sys.executable, "-m", "mlxeff", "completion", shell]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    path = cwd / f"script.{shell}"
    path.write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model's folder and a text in it."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "work" / "smooth-model").mkdir(parents=True)
    (folder / "work" / "smile.txt").write_text("x")
    return folder


class Terminal:
    """A shell in a terminal."""

    def __init__(self, command, cwd):
        self.process, self.seen = None, ""
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, start_new_session=True,
            env=os.environ | {"TERM": "dumb", "PS1": "$ ", "HOME": str(cwd), "COLUMNS": "200"},
        )  # fmt: skip
        os.close(slave)

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, text, timeout=60):
        """What the terminal shows up to the text."""
        end = time.monotonic() + timeout
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        assert text in self.seen, self.seen
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture(scope="module", params=["bash", "zsh"])
def terminal(request, place):
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = script(shell, place)
    bash = ["bash", "--norc", "--noprofile", "-i"]
    opened = Terminal(bash if shell == "bash" else ["zsh", "-f", "-i"], place / "work")
    if shell == "zsh":
        opened.type("autoload -Uz compinit; compinit -u -D; unsetopt zle_bracketed_paste; ")
    opened.type(f"mlxeff() {{ printf '<%s>' \"$@\"; }}; eval \"$(<{path})\"; echo READY'-'\n")
    opened.until(READY)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        ("compl", "etion"),
        ("completion fi", "sh"),
        ("generate --max-t", "okens"),
        ("eval retr", "ieval"),
        ("eval ppl --prefill", "-step"),
        ("generate --model smollm", "2-135m"),
        ("generate --model smooth", "-model/"),
        ("generate --device g", "pu"),
        ("generate --file smi", "le.txt"),
        ("generate --kv-predict smollm2-135m-0-1", "8"),
        ("plan openelm-270m-i", "nstruct"),
    ],
)
def test_a_tab_completes(terminal, typed, rest):
    """The terminal shows the rest, and the command is called with it (a function in its place shows the words)."""
    terminal.type(f"mlxeff {typed}")
    terminal.until(typed[-3:])
    terminal.type("\t")
    terminal.until(rest)  # a shell that completes drops what is typed meanwhile
    terminal.type("; echo DONE'-'\n")
    wanted = "".join(f"<{word}>" for word in (typed + rest.rstrip("/")).split())
    assert wanted in terminal.until(DONE).replace("/>", ">")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(place):
    path = script("fish", place)

    def completed(line):
        command = ["fish", "--no-config", "-c", f'source {path}; complete -C "mlxeff {line}"']
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=place / "work", timeout=60,
            env=os.environ | {"HOME": str(place)},
        )  # fmt: skip
        assert done.stderr == ""
        return [each.partition("\t")[0] for each in done.stdout.splitlines()]

    assert completed("compl") == ["completion"]
    assert completed("generate --max-t") == ["--max-tokens"]
    assert "smollm2-135m" in completed("generate --model sm")
    assert "smooth-model/" in completed("generate --model sm")
    assert completed("generate --device g") == ["gpu"]


def test_the_script_names_every_option(place):
    """Of every verb, read from the parsers."""
    from mlxeff.cli.parsers import build

    text = script("bash", place).read_text()
    for name in ("generate", "eval_ppl", "fit_dynamoe"):
        found = re.search(rf"^_shtab_mlxeff_{name}_option_strings=\((.*)\)$", text, re.MULTILINE)[1].split()
        parser = build()
        for word in name.split("_"):
            parser = next(each for each in parser._actions if each.choices and word in each.choices).choices[word]
        assert {option for each in parser._actions for option in each.option_strings} == set(found)


def test_another_shell_is_refused():
    command = [sys.executable, "-m", "mlxeff", "completion", "fsh"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "wanted one of bash, zsh, fish, got 'fsh': did you mean fish?" in done.stderr


def test_without_shtab_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    wanted = "completion: wanted shtab, which is not installed: pip install 'mlxeff[completion]'"
    assert capsys.readouterr().err == f"mlxeff: error: {wanted}\n"
