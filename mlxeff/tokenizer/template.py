"""Chat messages → prompt text, by the model's own Jinja template, which runs in a sandbox and under a time limit.

Supports what Hugging Face chat templates use (https://huggingface.co/docs/transformers/chat_templating): trimmed
blocks, `raise_exception`, `strftime_now`, a filter `tojson` that does not escape HTML, `{% generation %}` blocks,
`{% break %}` and `{% continue %}`. Also finds which characters of the prompt come from the user rather than from the
template. This module knows nothing about token ids.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from typing import Any

from ..errors import MlxeffError, notices, one_line, some
from .guard import time_limit

# The template in CoreNet's OpenELM recipe (projects/openelm/instruction_tuning/openelm-instruct.yaml). It is not
# verified that the released Instruct weights were tuned with exactly this text. The marks of roles are plain text, not
# special tokens.
OPENELM_INSTRUCT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'system', 'assistant'] %}"
    "{{ raise_exception('OpenELM knows the roles user, system and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SECONDS = 10.0  # that a template may take for one prompt
LONGEST = 1 << 26  # characters, items or bits of what a template makes by multiplication
# Characters that can stand in for another one: no template changes them, whatever it does to a text.
STAND_INS = (*map(ord, "~`^$#@&%;=*+!?"), *range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class Prompt:
    """The messages and variables of one prompt, and its template.

    template   Jinja text
    origin     names the tokenizer in errors
    given      the values that come from the user: "messages" (dicts with "role" and "content"), "tools", …
    variables  the values that come from the tokenizer: "bos_token", …
    """

    def __init__(self, template: str, origin: str, given: dict[str, Any], variables: dict[str, Any]):
        self._template, self._origin = template, origin
        # Two renderings of a prompt have to see the same time.
        self._given, self._variables = given, {"strftime_now": datetime.now().strftime} | variables

    @functools.cached_property
    def text(self) -> str:
        """The rendered text. Raises MlxeffError where the template is invalid, fails, takes too long or refuses the
        messages."""
        return self._render(self._given)

    def from_user(self, control: Collection[str]) -> set[int]:
        """Positions in `text` of characters that come from the user's texts: at least of all that begin one of the
        texts `control`.

        The prompt is rendered once more with one other character in place of those that may begin a text of `control`.
        Where everything else stays the same, the differences are the answer. A template that looks for such characters
        itself makes another prompt then; so first all such characters are replaced, else only those of whole texts of
        `control`, else those of them that can be. A notice names the texts that the template reads in any case.
        """
        words = [text for text in control if text[0].isalnum() or text[0].isspace()]
        first = {text[0] for text in control} - {text[0] for text in words}
        wide = {v: {i for i, c in enumerate(v) if c in first} | _beginnings(v, words) for v in _strings(self._given)}
        if not any(wide.values()):
            return set()
        found = self._marked(wide)
        if found is None:
            narrow = {value: _beginnings(value, control) for value in wide}
            found = self._marked(narrow)
        return self._possible(narrow) if found is None else found

    def _possible(self, marks: dict[str, set[int]]) -> set[int]:
        """The answer of `from_user` with as many of these positions as leave the prompt the same."""
        kept: dict[str, set[int]] = {value: set() for value in marks}
        end, read = time.monotonic() + SECONDS, []
        for value, positions in marks.items():
            for position in sorted(positions):
                trial = kept | {value: kept[value] | {position}}
                if time.monotonic() < end and self._marked(trial) is not None:
                    kept = trial
                else:
                    read.append(repr(value[position : position + 24]))
        if read:
            notices.warning(
                "%s: the chat template reads parts of the messages itself, which may act as control tokens: %s",
                self._origin,
                one_line(some(dict.fromkeys(read)), 150),
            )
        return self._marked(kept) or set()

    def _marked(self, marks: dict[str, set[int]]) -> set[int] | None:
        """Where in `text` the characters stand that have these positions in the user's texts; None where the template
        makes another text without them."""
        sources = [self._template, self.text, *marks]
        stand_in = next((chr(c) for c in STAND_INS if not any(chr(c) in source for source in sources)), None)
        if stand_in is None:
            raise MlxeffError(f"{self._origin}: chat template: the messages use all private characters of Unicode")
        given = _changed(self._given, lambda value: _replaced(value, marks.get(value, ()), stand_in))
        try:
            return _differences(self.text, self._render(given), stand_in)
        except MlxeffError:
            return None

    def _render(self, given: dict[str, Any]) -> str:
        return _render(self._template, self._origin, given | self._variables)


def _strings(value: Any) -> Iterable[str]:
    """All texts in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and dicts with all texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_changed(item, change) for item in value])
    return value


def _beginnings(value: str, control: Collection[str]) -> set[int]:
    """Positions where one of the texts `control` begins in `value`, in capitals or small letters, or where the rest of
    `value` is the beginning of one."""
    if not control:
        return set()
    known, lower = {text.lower() for text in control}, value.lower()
    if len(lower) != len(value):  # small letters that are longer than their capitals
        lower = value
    lengths, end = sorted(set(map(len, known))), len(lower.rstrip())
    starts = {text[0] for text in known}
    tails = {text[:n] for text in known for n in range(1, len(text))}
    return {
        i
        for i, character in enumerate(lower)
        if character in starts
        and (any(lower[i : i + n] in known for n in lengths) or (end - i < lengths[-1] and lower[i:end] in tails))
    }


def _replaced(value: str, positions: Iterable[int], character: str) -> str:
    """`value` with `character` at these positions."""
    characters = list(value)
    for position in positions:
        characters[position] = character
    return "".join(characters)


def _differences(text: str, other: str, stand_in: str) -> set[int] | None:
    """Positions of `stand_in` in `other`, which is otherwise `text`; None where it is not."""
    if len(text) != len(other):
        return None
    found, place = set(), 0
    for part in other.split(stand_in):
        if not text.startswith(part, place):
            return None
        place += len(part)
        found.add(place)
        place += 1
    return found - {len(text)}


def _render(template: str, origin: str, variables: dict[str, Any]) -> str:
    """The prompt text. Raises MlxeffError; a template is a program, so any exception is one of its own."""
    import jinja2

    try:
        with time_limit(SECONDS, "it"):
            return _compile(template).render(variables)
    except MlxeffError as error:
        raise MlxeffError(one_line(f"{origin}: chat template: {error}")) from None
    except jinja2.TemplateSyntaxError as error:
        raise MlxeffError(one_line(f"{origin}: chat template: line {error.lineno}: {_reason(error)}")) from error
    except RecursionError as error:
        raise MlxeffError(one_line(f"{origin}: chat template failed: it calls itself without end")) from error
    except Exception as error:
        raise MlxeffError(one_line(f"{origin}: chat template failed: {_reason(error)}")) from error


def _reason(error: Exception) -> str:
    return str(error) if str(error).strip() else type(error).__name__


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The compiled `jinja2.Template`."""
    import jinja2.ext

    environment = _environment_class()(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise MlxeffError(str(message) or "it refuses the messages")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment_class() -> type:
    """Jinja's sandbox, in which no multiplication makes a text or number that fills the memory."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            size = 0
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                size = left.bit_length() * abs(right)
            elif operator == "*" and any(isinstance(value, (str, list, tuple)) for value in (left, right)):
                count = left if isinstance(left, int) else right
                size = len(right if isinstance(left, int) else left) * count if isinstance(count, int) else 0
            if size > LONGEST:
                raise SecurityError(f"wanted at most {LONGEST:,} items or bits, got {size:,}")
            return super().call_binop(context, operator, left, right)

    return Environment


@functools.cache
def _generation_extension() -> type:
    """The Jinja extension for `{% generation %}…{% endgeneration %}`, which marks the assistant's text for training.
    Here the marked text is output like any other."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation
