"""`mlxeff completion SHELL`: the script with which a shell completes the command. shtab makes it from the parsers; the
script itself needs neither shtab nor Python. The names of built-in and cached models and of pairs are part of it."""

import argparse
import re

from ..errors import MlxeffError
from . import parsers

# Attributes of the parsed options whose values are models (a name, a folder or a file), and pairs.
MODELS = ("model", "draft_model", "against", "base", "src", "aux")
PAIRS = ("kv_predict",)
FOLDERS = ("dst",)


def run(options: argparse.Namespace) -> int:
    """Print the script; returns the exit code."""
    try:
        import shtab
    except ImportError:
        raise MlxeffError(
            "completion: wanted shtab, which is not installed: pip install 'mlxeff[completion]'"
        ) from None
    parser = parsers.build()
    _mark(parser, shtab)
    print(shtab.complete(parser, options.shell, preamble=_preamble()[options.shell]))
    return 0


def _mark(parser: argparse.ArgumentParser, shtab) -> None:
    """Tell shtab what the values of the options of a parser, and of those below it, are."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _mark(sub, shtab)
        elif action.choices is None and action.nargs != 0:
            action.metavar = re.split(r"[:\[]", action.metavar or action.dest)[0]  # shtab does not quote them for zsh
            if action.dest in MODELS:
                action.complete = {shell: _name("models", shell) for shell in parsers.SHELLS}
            elif action.dest in PAIRS and not isinstance(action.default, tuple):
                action.complete = {shell: _name("pairs", shell) for shell in parsers.SHELLS}
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.dest in parsers.PATHS:
                action.complete = shtab.FILE
            elif not action.option_strings:
                action.complete = {"zsh": "()"}  # nothing; without it zsh shows the help of the argument at each tab


def _name(kind: str, shell: str) -> str:
    """What the script of a shell calls to complete models or pairs. That of bash takes names that have "_file" for
    files, which it marks."""
    return f"(_mlxeff_{kind}_files)" if shell == "fish" else f"_mlxeff_{kind}_files"


def _preamble() -> dict[str, str]:
    """For each shell the functions that complete names together with files and folders."""
    from .. import hub

    names = {"models": [row["alias"] or row["source"] for row in hub.models()], "pairs": hub.pairs()}
    words = {kind: " ".join(found) for kind, found in names.items()}
    return {
        "bash": "\n".join(
            f'_mlxeff_{kind}_files() {{ compgen -W "{found}" -- "$1"; _shtab_compgen_files "$1"; }}'
            for kind, found in words.items()
        ),
        "zsh": "\n".join(
            f"_mlxeff_{kind}_files() {{ _alternative 'names:name:({found})' 'files:file:_files' }}"
            for kind, found in words.items()
        ),
        "fish": "\n".join(
            f'function _mlxeff_{kind}_files; string split " " "{found}"; __fish_complete_path (commandline -ct); end'
            for kind, found in words.items()
        ),
    }
