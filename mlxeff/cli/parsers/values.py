"""Conversions of options' values from the text on the command line. Each raises argparse.ArgumentTypeError."""

import argparse

from ...assembly.options import integer, natural, positive


def numbers(text: str) -> tuple[int, ...]:
    """ "1,8" → (1, 8)."""
    return tuple(positive(part) for part in text.split(","))


def naturals(text: str) -> tuple[int, ...]:
    """ "0,2048" → (0, 2048)."""
    return tuple(natural(part) for part in text.split(","))


def generated(text: str) -> tuple[int, ...]:
    """ "0,128" → (0, 128): a rate needs two tokens."""
    wanted = "0 or a whole number above 1"
    return tuple(integer(part, lambda n: n == 0 or 1 < n < 1 << 64, wanted) for part in text.split(","))


def version(text: str) -> tuple[int, ...]:
    """ "0.31.2" → (0, 31, 2)."""
    return tuple(natural(part) for part in text.split("."))


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a number above 0, got {text!r}")
    return value


def percentage(text: str) -> float:
    """A finite number of percent, 0 or more."""
    if not 0 <= (value := number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a number of percent, 0 or more, got {text!r}")
    return value


def probability(text: str) -> float:
    """A number above 0 and below 1."""
    if not 0 < (value := number(text)) < 1:
        raise argparse.ArgumentTypeError(f"wanted a number between 0 and 1, got {text!r}")
    return value


def shares(text: str) -> tuple[float, ...]:
    """ "0.5,1" → (0.5, 1.0): numbers above 0 and up to 1."""
    values = tuple(number(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"wanted numbers above 0 and up to 1, got {text!r}")
    return values


def number(text: str) -> float:
    """A number; NaN for a text that is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def checkpoint(text: str) -> tuple[str, str]:
    """ "1.1B=FOLDER" → ("1.1B", "FOLDER")."""
    size, equals, model = text.partition("=")
    if size not in ("270M", "450M", "1.1B", "3B") or not equals or not model:
        raise argparse.ArgumentTypeError(f"wanted SIZE=MODEL with a SIZE of 270M, 450M, 1.1B, 3B, got {text!r}")
    return size, model


def quantize(text: str) -> tuple[int | str, int]:
    """ "4:32" → (4, 32), bits (or the name of a recipe) and group size."""
    bits, _, group = text.partition(":")
    try:
        return (bits if bits.startswith("mixed_") else int(bits)), int(group or 64)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted BITS or BITS:GROUP, got {text!r}") from None


def keep(text: str) -> tuple[tuple[str, int], ...]:
    """ "embed,lm_head:8" → (("embed", 8), ("lm_head", 8)); "none" → ()."""
    if text == "none":
        return ()
    names, colon, bits = text.rpartition(":")
    if not colon:
        names, bits = text, "8"
    try:
        kept = tuple((name.strip(), int(bits)) for name in names.split(","))
    except ValueError:
        kept = ()
    if not kept or not all(name for name, _ in kept):
        raise argparse.ArgumentTypeError(f"wanted NAME,…[:BITS] or none, got {text!r}")
    return kept


def tokens(text: str) -> int:
    """The value of --max-tokens."""
    return integer(text, lambda n: n > 0 or n == -1, "a whole number above 0, or -1")
