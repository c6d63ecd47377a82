"""What the parsers of several verbs share."""

import argparse
from collections.abc import Iterable

from ...assembly import techniques
from ...assembly.options import OFFLINE, Option
from .parser import Parser

DEVICE_HELP = "where to compute (default: auto, the GPU if there is one)"


def sentence(summary: str) -> str:
    """A summary as a sentence: with a capital letter and a full stop."""
    return summary[0].upper() + summary[1:] + "."


def add(parser: argparse._ActionsContainer, options: Iterable[Option], **more) -> None:
    """Add options to a parser; `more` are keywords that override theirs."""
    for option in options:
        parser.add_argument(option.name, *option.aliases, **option.keywords | more)


def add_end(sub: Parser, document: str) -> None:
    """The options --json, with the help text `document`, and --quiet."""
    sub.add_argument("--json", action="store_true", help=document)
    sub.add_argument("--quiet", action="store_true", help="no notes; warnings still show")


def add_subcommands(parser: Parser, entries: Iterable[techniques.Subcommand]) -> list[Parser]:
    """Add what a verb does, such as for each technique, with the options that all of them have; returns the parsers."""
    what, added = parser.add_subparsers(dest="what", metavar="WHAT", required=True), []
    for entry in entries:
        sub = what.add_parser(
            entry.name, help=entry.summary, description=sentence(entry.summary), examples=entry.examples
        )
        add(sub, [each for each in entry.options if not each.name.startswith("-")])
        own = sub.add_argument_group("options")
        add(own, [each for each in entry.options if each.name.startswith("-")])
        sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=DEVICE_HELP)
        add(sub, [OFFLINE])
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--quiet", action="store_true", help="no progress bar, no report; warnings still show")
        added.append(sub)
    return added
