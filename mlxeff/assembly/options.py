"""Options of the command line as data: what a technique adds to a verb, and how texts become values. Imports nothing
that is slow, so that --help is quick.
"""

import argparse
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """An option or argument: its `name` ("--steps", "BASE") and what `argparse.ArgumentParser.add_argument` takes."""

    name: str
    keywords: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name among the parsed values."""
        return self.keywords.get("dest") or self.name.lstrip("-").replace("-", "_").lower()


def option(name: str, **keywords) -> Option:
    """`Option` with keywords written out."""
    return Option(name, keywords)


def integer(text: str, valid, wanted: str) -> int:
    """A whole number that `valid` accepts."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not valid(number):
        raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}")
    return number


def positive(text: str) -> int:
    """A whole number above 0."""
    return integer(text, lambda n: n > 0, "a whole number above 0")


def natural(text: str) -> int:
    """A whole number from 0 to 2^64 - 1."""
    return integer(text, lambda n: 0 <= n < 1 << 64, "a whole number from 0 to 2^64 - 1")
