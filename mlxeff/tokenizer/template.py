"""Chat messages → prompt text, by the model's own Jinja template, which runs in a sandbox.

Supports what Hugging Face chat templates use (https://huggingface.co/docs/transformers/chat_templating): trimmed
blocks, `raise_exception`, `strftime_now`, a filter `tojson` that does not escape HTML, `{% generation %}` blocks,
`{% break %}` and `{% continue %}`. This module knows nothing about token ids.
"""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

from ..errors import MlxeffError

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


def render(template: str, origin: str, messages: list[dict], variables: dict[str, Any]) -> str:
    """The prompt text of `messages`, dicts with "role" and "content". `variables` are passed to the template, `origin`
    names the tokenizer in errors. Raises MlxeffError where the template is invalid, fails or refuses the messages."""
    import jinja2

    try:
        return _compile(template).render(messages=messages, **variables)
    except MlxeffError as error:
        raise MlxeffError(f"{origin}: chat template: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise MlxeffError(f"{origin}: chat template: line {error.lineno}: {_one_line(error)}") from error
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise MlxeffError(f"{origin}: chat template failed: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The compiled `jinja2.Template`."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise MlxeffError(_one_line(Exception(message)))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
