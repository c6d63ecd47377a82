"""The option `--only KEY=VALUE …`, which selects the measurements of a benchmark. Knows no particular benchmark."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence


def condition(keys: Sequence[str]) -> Callable[[str], str]:
    """The argument `type` of argparse for a condition "KEY=VALUE" whose KEY is one of `keys`. It returns the text
    unchanged, and raises ArgumentTypeError for any other text."""

    def checked(text: str) -> str:
        key, equals, value = text.partition("=")
        if key not in keys or not equals or not value:
            raise argparse.ArgumentTypeError(f"wanted KEY=VALUE with a KEY of {', '.join(keys)}, got {text!r}")
        return text

    return checked


def selected(fields: Mapping, conditions: Iterable[str]) -> bool:
    """Whether a measurement with these `fields` meets the conditions "KEY=VALUE". For each key that occurs in them, its
    field must match at least one of the values: a text must contain the value, any other field must equal it."""
    values: dict[str, list[str]] = {}
    for text in conditions:
        key, _, value = text.partition("=")
        values.setdefault(key, []).append(value)
    return all(any(_matches(fields[key], value) for value in allowed) for key, allowed in values.items())


def _matches(got: object, value: str) -> bool:
    return value in got if isinstance(got, str) else str(got) == value
