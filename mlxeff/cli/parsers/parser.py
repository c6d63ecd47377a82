"""The parser of a verb: a help that begins with examples, and errors of one line that name what was probably meant."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from . import elsewhere

NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")  # what argparse takes for a negative number, not for an option


class Formatter(argparse.HelpFormatter):
    """argparse's layout, but lines break at spaces only, and the value of an option with two names stands once."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in _wrapped(text, width - len(indent)))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """A parser with `examples`: whole commands, which its help begins with."""

    def __init__(self, *positional, examples: Sequence[str] = (), **keywords):
        super().__init__(*positional, **{"formatter_class": Formatter, "allow_abbrev": False} | keywords)
        self.examples = tuple(examples)
        self._positionals.title, self._optionals.title = "arguments", "general"

    def format_usage(self) -> str:
        """One line: the words of the command, the options that it needs, and its arguments."""
        needed = [f"{each.option_strings[0]} {each.metavar or each.dest.upper()}" for each in self._needed()]
        values = [_usage_of(each) for each in self._get_positional_actions()]
        return " ".join(["usage:", self.prog, *needed, "[OPTION …]", *values]) + "\n"

    def _needed(self) -> list[argparse.Action]:
        return [each for each in self._get_optional_actions() if each.required]

    def format_help(self) -> str:
        """Examples, usage, what the command does, its arguments, the groups of options; what all verbs have is last."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for group in [each for each in self._action_groups if each is not self._optionals] + [self._optionals]:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        shown = "".join(f"  {each}\n" for each in self.examples)
        return f"examples:\n{shown}\n{self.format_usage()}\n{formatter.format_help()}"

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, but what the parser does not know is an error of this parser, found before any other."""
        words = list(sys.argv[1:] if args is None else args)
        for word in self._own(words):
            if (name := self._unknown(word)) is not None:
                self.error(self._no_option(name))
        parsed, left = super().parse_known_args(words, namespace)
        if left:
            self.error(f"wanted {self._wanted()}, got also {' '.join(repr(each) for each in left)}")
        return parsed, left

    def _own(self, words: Sequence[str]) -> Iterable[str]:
        """The words for this parser: up to the first that is no option where verbs follow, else up to "--"."""
        for word in words:
            if word == "--" or (self._subparsers and not word.startswith("-")):
                return
            yield word

    def _unknown(self, word: str) -> str | None:
        """The name of the option that a word of the command line names and the parser lacks; None for other words."""
        known, name = self._option_string_actions, word.partition("=")[0]
        if len(word) < 2 or word[0] != "-" or NUMBER.match(word) or name in known or " " in word:
            return None
        attached = word[1] != "-" and word[:2] in known and known[word[:2]].nargs != 0  # -n20
        return None if attached and not elsewhere.hint(name, known) else name

    def _no_option(self, name: str) -> str:
        """What to say of an option that there is not."""
        known = [each for each in self._option_string_actions if each.startswith("--")]
        if hint := elsewhere.hint(name, known):
            return f"no option {name} here: {hint}"
        if near := nearest(name.replace("_", "-"), known):
            return f"no option {name}: did you mean {near}?"
        return f"no option {name}"

    def _wanted(self) -> str:
        words = [_usage_of(each) for each in self._get_positional_actions()]
        return " ".join(words) if words else "options only"

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """As in argparse, but the error lists the choices in plain words and names the nearest one."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(each) for each in action.choices]
        near = nearest(str(value), choices)
        asked = f": did you mean {near}?" if near else ""
        raise argparse.ArgumentError(action, f"wanted one of {', '.join(choices)}, got {str(value)!r}{asked}")

    def error(self, message: str) -> NoReturn:
        """Print the usage, the message, and how to see the help; exit with code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def _usage_of(action: argparse.Action) -> str:
    """A positional argument in a line of usage."""
    name = action.metavar or action.dest
    if isinstance(action, argparse._SubParsersAction):
        return f"{name} …"
    return f"[{name}]" if action.nargs == "?" else name


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The one of the known words that the word begins, or else resembles most; None where none does."""
    begun = [each for each in known if each.startswith(word) and len(word) > 2]
    if len(begun) == 1:
        return begun[0]
    found = difflib.get_close_matches(word, begun or known, 1, 0.6)
    return found[0] if found else (begun or [None])[0]
