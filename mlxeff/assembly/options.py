"""Options of the command line as data, with which a technique can add its own option to a verb, and conversions of
their values from text. Imports no slow module, so that --help is quick.
"""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """An option or argument: its name ("--steps", "base"), keywords of `argparse.ArgumentParser.add_argument`, and
    further names."""

    name: str
    keywords: dict = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of the attribute for its value in the namespace that argparse returns."""
        return self.keywords.get("dest") or self.name.lstrip("-").replace("-", "_").lower()


def option(name: str, *aliases: str, **keywords) -> Option:
    """An `Option` with its keywords as keyword arguments."""
    return Option(name, keywords, aliases)


class ValueParser(argparse.ArgumentParser):
    """A parser for the value of an option that contains options itself: its errors are those of that option's value,
    argparse.ArgumentTypeError."""

    def error(self, message: str) -> None:
        raise argparse.ArgumentTypeError(message)

    def parse_text(self, text: str) -> argparse.Namespace:
        """Parse the words of a text, with the quotation marks of a shell."""
        try:
            return self.parse_args(shlex.split(text))
        except ValueError as error:  # of quotation marks that are not closed
            raise argparse.ArgumentTypeError(str(error)) from None


def names(text: str) -> list[str]:
    """ "a,b" → ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


# Of all verbs that read a config.json.
IGNORE_KEYS = option(
    "--ignore-keys", metavar="KEY,…", type=names, default=[], help="entries of config.json to read as absent"
)
# Of all verbs that take a model by name.
OFFLINE = option("--offline", action="store_true", help="never touch the network")
# Of all verbs that run a model.
TRUST_REMOTE_CODE = option(
    "--trust-remote-code", action="store_true", help="let mlx-lm run Python code that the model folder brings"
)


def integer(text: str, valid: Callable[[int], bool], wanted: str) -> int:
    """The whole number in `text`. Raises argparse.ArgumentTypeError unless `valid` accepts it; `wanted` describes in
    the message what is accepted."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not valid(number):
        raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}")
    return number


def numbers(text: str) -> list[float]:
    """ "0.3,0.7" → [0.3, 0.7]."""
    try:
        return [float(name) for name in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted numbers with commas between them, got {text!r}") from None


def positive(text: str) -> int:
    """A whole number above 0."""
    return integer(text, lambda n: n > 0, "a whole number above 0")


def natural(text: str) -> int:
    """A whole number from 0 to 2^64 - 1."""
    return integer(text, lambda n: 0 <= n < 1 << 64, "a whole number from 0 to 2^64 - 1")


# Of the verbs that read prompts.
PREFILL_STEP = option(
    "--prefill-step",
    metavar="N",
    type=positive,
    help="prompt tokens that are computed at once (default 2048 on a GPU, 512 on a CPU)",
)
