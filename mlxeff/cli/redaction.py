"""A text without what identifies its user: home folder, user, host, access tokens, and given private texts."""

import contextlib
import getpass
import os
import platform
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)  # in names of environment variables
TOKEN = re.compile(r"\b(hf|sk|ghp|gho|github_pat|glpat|xox[abp])[-_][\w-]{8,}")
LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
OTHER_HOME = re.compile(r"/(home|Users)/[^/\s:'\"]+")
LINE = 8  # characters: shorter secrets and private lines are not looked for, as they occur everywhere
QUOTED = re.compile(r"'[^'\n]{20,}'|\"[^\"\n]{20,}\"")


def redacted(text: str, private: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> str:
    """The text with placeholders such as <user> in place of what identifies the user and of access tokens. Of the
    `private` texts, such as prompts, the whole and each line that occurs is left out."""
    for secret, placeholder in sorted(_words(private, environment), key=lambda pair: -len(pair[0])):
        text = text.replace(secret, placeholder)
    text = LOGIN.sub("<login>@", TOKEN.sub("<token>", text))
    for home in _homes(environment):
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    text = OTHER_HOME.sub(r"/\1/<user>", text)
    for names, placeholder in ((_users(environment), "<user>"), (_hosts(), "<host>")):
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", placeholder, text, flags=re.IGNORECASE)
    return text


def without_quotes(message: str) -> str:
    """The message of an exception without its longer quoted parts, which may be a user's text."""
    return QUOTED.sub(lambda found: f"<{len(found[0]) - 2} characters>", message)


def _words(private: Iterable[str], environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """(What is replaced wherever it stands, by what)."""
    for name, value in environment.items():
        if SECRET.search(name) and len(value) >= LINE:
            yield value, "<token>"
    for text in private:
        for part in {text, text.strip(), *(line.strip() for line in text.splitlines())}:
            for form in {part, repr(part)[1:-1]}:
                if len(form) >= LINE:
                    yield form, "<text>"


def _homes(environment: Mapping[str, str]) -> list[str]:
    """Paths of the home folder, also where it is a link."""
    found = {environment.get("HOME"), os.path.expanduser("~")}
    with contextlib.suppress(OSError, RuntimeError):
        found.add(str(Path.home().resolve()))
    return sorted({each.rstrip("/") for each in found if each and len(each.rstrip("/")) > 1}, key=len, reverse=True)


def _users(environment: Mapping[str, str]) -> set[str]:
    found = {environment.get(name) for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    found |= {Path(home).name for home in _homes(environment)}
    with contextlib.suppress(Exception):  # no entry in the password file
        found.add(getpass.getuser())
        import pwd

        found.add(pwd.getpwuid(os.getuid()).pw_name)
    return {each for each in found if each and len(each) > 1}


def _hosts() -> set[str]:
    found = {platform.node(), socket.gethostname()}
    found |= {name.partition(".")[0] for name in found}
    return {name for name in found if len(name) > 1 and name != "localhost"}
