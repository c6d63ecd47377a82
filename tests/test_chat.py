"""`mlxeff chat` loses nothing that was typed or answered: failing commands, bytes that are no text, a full disk.

Real processes, pipes and pseudo-terminals on a tiny model: some 15 s in all, 1 to 2 s a process.
"""

import json
import os
import pty
import subprocess
import time

import pytest

from test_cli import COMMAND, environment, in_terminal, mlxeff


@pytest.fixture
def saved(tmp_path):
    return tmp_path / "talk.json"


def chat(folder, lines, saved=None, **options):
    """(messages that /save wrote at the end, what standard error has) of a chat with these lines, as bytes."""
    end = [b"/save " + os.fsencode(saved)] if saved else []
    out, err = mlxeff("chat", "--model", folder, "--max-tokens", 4, stdin=b"\n".join([*lines, *end, b""]), **options)
    return (json.loads(saved.read_text())["messages"] if saved else out), err


def errors(err):
    return [line for line in err.splitlines() if line.startswith("mlxeff: error: ")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"/proc/nobody/may/write", "cannot be written: "),
        (b"/etc/passwd/below-a-file", "cannot be written: Not a directory"),
        (b"x" * 300, "cannot be written: File name too long"),
        (b"a\0b", "wanted a path, got one with a NUL character"),
        (b"~nosuchuser/talk", "~nosuchuser: no such user"),
        (b"~nosuchuser", "~nosuchuser: no such user"),
        (b"", "/save: wanted a file name"),
        (b"/", "wanted a new file, got one that exists"),
    ],
    ids=["proc", "below a file", "long", "nul", "user", "user alone", "empty", "exists"],
)
def test_a_save_that_fails_is_one_line_and_the_chat_goes_on(tiny_folder, saved, name, reason):
    messages, err = chat(tiny_folder, [b"Hello", b"/save " + name, b"And now?"], saved)
    assert len(errors(err)) == 1, err
    assert reason in err
    assert [message["content"] for message in messages[::2]] == ["Hello", "And now?"]
    assert [path.name for path in saved.parent.iterdir()] == ["talk.json"], "nothing else is left behind"


def test_a_name_of_255_bytes_and_one_that_is_not_utf8_are_saved_to(tiny_folder, tmp_path):
    for name in (b"x" * 255, b"caf\xe9.json"):
        path = tmp_path / os.fsdecode(name)
        run = subprocess.run(
            [*COMMAND, "chat", "--model", str(tiny_folder), "--max-tokens", "4"],
            input=b"Hello\n/save " + os.fsencode(path) + b"\n", capture_output=True, env=environment(),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        if name.isascii():
            assert len(json.loads(path.read_text())["messages"]) == 2
        else:  # the line with the name is no UTF-8, and every line has to be
            assert b"wanted UTF-8 text, got byte 0xe9" in run.stderr


def test_bytes_that_are_no_text_are_one_line_and_the_chat_goes_on(tiny_folder, saved):
    messages, err = chat(tiny_folder, [b"Hello", b"caf\xe9", b"lone \xed\xa0\x80", b"And now?"], saved)
    assert [message["content"] for message in messages[::2]] == ["Hello", "And now?"]
    assert [line.partition("got ")[2] for line in errors(err)] == ["byte 0xe9 at position 3", "byte 0xed at position 5"]


def test_a_byte_order_mark_is_not_part_of_the_first_message(tiny_folder, saved):
    messages, _ = chat(tiny_folder, [b"\xef\xbb\xbfHello"], saved)
    assert messages[0]["content"] == "Hello"
    out, _ = mlxeff("chat", "--model", tiny_folder, stdin=b"\xef\xbb\xbf/help\n")
    assert out.startswith("/reset")


def test_a_message_that_begins_with_a_slash(tiny_folder, saved):
    lines = [b"//etc is full", b"  //usr too", b"/etc/fstab is a file", b"/etc is full"]
    messages, err = chat(tiny_folder, lines, saved)
    want = ["/etc is full", "/usr too", "/etc/fstab is a file"]
    assert [message["content"] for message in messages[::2]] == want
    assert errors(err) == ["mlxeff: error: unknown command /etc; /help lists them; //etc sends it as a message"]


def test_an_answer_that_fails_keeps_the_conversation(tiny_folder, saved):
    """A message longer than the context is an error; the others stay."""
    messages, err = chat(tiny_folder, [b"Hello", b"x" * 400, b"And now?"], saved)
    assert [message["content"] for message in messages[::2]] == ["Hello", "And now?"]
    assert len(errors(err)) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_answers_keeps_the_conversation(tiny_folder, saved):
    lines = b"Hello\nAnd now?\n/save " + os.fsencode(saved) + b"\n"
    command = [*COMMAND, "chat", "--model", str(tiny_folder), "--max-tokens", "4"]
    with open("/dev/full", "wb") as full:
        run = subprocess.run(command, input=lines, stdout=full, stderr=subprocess.PIPE, env=environment())
    err = run.stderr.decode()
    assert run.returncode == 1
    assert "Traceback" not in err
    assert "standard output: cannot be written: No space left on device" in err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Hello", "And now?"]
    assert messages[1]["role"] == "assistant"


def test_bytes_that_are_no_text_in_a_terminal_with_answers_in_a_pipe(tiny_folder, saved):
    """As in `mlxeff chat | tee log`, where Python's `input` has no line editing and raised."""
    terminal, side = pty.openpty()
    command = [*COMMAND, "chat", "--model", str(tiny_folder), "--max-tokens", "4"]
    process = subprocess.Popen(
        command, stdin=side, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(TERM="dumb")
    )
    os.close(side)
    for line in (b"Hello", b"caf\xe9", b"And now?", b"/save " + os.fsencode(saved)):
        os.write(terminal, line + b"\n")
    end = time.monotonic() + 60
    while not saved.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.write(terminal, b"\x04")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"got byte 0xe9" in err
    assert b"> " in err, "the prompt is for the person, not for the log"
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Hello", "And now?"]
    assert out.decode().split() == "\n".join(message["content"] for message in messages[1::2]).split()
    os.close(terminal)


def test_bytes_that_are_no_text_in_a_terminal(tiny_folder, saved):
    """readline drops the byte, or the line is an error: the chat goes on in either case."""
    keys = [(r"> ", b"caf\xe9\n"), (r"caf.*\r\n> ", b"/save " + os.fsencode(saved) + b"\n"), (r"saved.*> ", b"\x04")]
    seen, code = in_terminal(["chat", "--model", tiny_folder, "--max-tokens", 4], keys, "(saved ")
    assert code == 0, seen
    assert "Traceback" not in seen


def test_a_saved_name_that_is_no_text_is_resumed(tiny_folder, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.json"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with open(path, "w") as file:
        json.dump({"model": "x", "messages": messages}, file)
    saved = tmp_path / "again.json"
    run = subprocess.run(
        [*COMMAND, "chat", "--model", str(tiny_folder), "--resume", path, "--max-tokens", "4"],
        input=b"Hello\n/save " + os.fsencode(saved) + b"\n", capture_output=True, env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(json.loads(saved.read_text())["messages"]) == 4
