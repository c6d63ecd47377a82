"""`--only KEY=VALUE …`: which measurements of a benchmark are made."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence


def condition(keys: Sequence[str]) -> Callable[[str], str]:
    """The type, for argparse, of a condition "KEY=VALUE" whose KEY is one of `keys`."""

    def checked(text: str) -> str:
        key, equals, value = text.partition("=")
        if key not in keys or not equals or not value:
            raise argparse.ArgumentTypeError(f"wanted KEY=VALUE with a KEY of {', '.join(keys)}, got {text!r}")
        return text

    return checked


def selected(fields: Mapping, conditions: Iterable[str]) -> bool:
    """Whether `fields` of a measurement meet the conditions "KEY=VALUE": for every key that is named, one of its
    values. Texts match by a part of them, numbers whole."""
    values: dict[str, list[str]] = {}
    for text in conditions:
        key, _, value = text.partition("=")
        values.setdefault(key, []).append(value)
    return all(any(_matches(fields[key], value) for value in allowed) for key, allowed in values.items())


def _matches(got: object, value: str) -> bool:
    return value in got if isinstance(got, str) else str(got) == value
