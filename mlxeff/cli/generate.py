"""`mlxeff generate`: one prompt → its answer, printed while it is generated, or one JSON document."""

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MlxeffError, notices
from . import output, streams
from .runner import Answer, Runner, start

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


def run(options: argparse.Namespace) -> int:
    """Answer the prompt; returns the exit code."""
    from ..decode import require_seam

    cache_file = Path(options.prompt_cache or "")
    with output.show_notices(options.quiet) as lines:
        prompt = _prompt(options)
        encode = functools.cache(lambda tokenizer: _ids(tokenizer, prompt, options))
        runner = start(options, encode)
        ids = encode(runner.loaded.tokenizer)
        if options.prompt_cache:
            require_seam(runner.loaded.model, "cache", "--prompt-cache")
            runner.session.restore(cache_file, runner.loaded.fingerprint, ids, runner.setup.options)
        answer, broken = Answer(), None
        try:
            with contextlib.closing(runner.stream(ids, answer)) as pieces:
                for text in pieces:
                    if not options.json:
                        print(text, end="", flush=True)
        except KeyboardInterrupt:
            answer.interrupted = True
        except (streams.OutputError, BrokenPipeError) as error:
            broken = error  # the prompt has been computed all the same: its cache is kept
        except MlxeffError as error:
            if not answer.token_ids:
                raise
            answer.failed, failure = True, error
        if not (broken or options.json or answer.text.endswith("\n")):
            print(flush=True)
        if answer.failed:
            notices.error("%s", streams.explain(failure))
        saved = not options.prompt_cache or _save(runner, cache_file, answer)
        if broken:
            raise broken
        _finish(runner, answer, options, lines)
    complete = saved and answer.finish_reason in ("stop", "length")
    return 130 if answer.interrupted else 0 if complete else 1


def _save(runner: Runner, path: Path, answer: Answer) -> bool:
    """Write the prompt cache; returns whether that succeeded. A failure is a warning: the answer is there."""
    try:
        runner.session.save(path, runner.loaded.fingerprint)
    except MlxeffError as error:
        notices.warning("%s", streams.explain(error))
        return False
    except KeyboardInterrupt:
        answer.interrupted = True
        notices.warning("%s: not written: interrupted", path)
        return False
    return True


def _finish(runner: Runner, answer: Answer, options: argparse.Namespace, lines: list[str]) -> None:
    """Print what follows the answer: the timings, or the whole document. `lines` are the notices."""
    stats = runner.stats(answer)
    if options.json:
        streams.print_json(document(runner, answer, stats, lines))
        return
    if not options.quiet:
        print(output.timing_line(stats, runner.setup.summary()), file=sys.stderr)
        if stats["finish_reason"] == "length" and stats["generated_tokens"] == options.max_tokens:
            print(f"mlxeff: note: stopped at --max-tokens {options.max_tokens}", file=sys.stderr)


def document(runner: Runner, answer: Answer, stats: dict, lines: list[str]) -> dict:
    """The document that `--json` prints (docs/json.md). `lines` are the notices."""
    import mlx.core as mx

    from .. import __version__

    return {
        "model": runner.options.model,
        "path": str(runner.loaded.path),
        "text": answer.text,
        "prompt_token_ids": answer.prompt_ids,
        "token_ids": answer.token_ids,
        "finish_reason": stats["finish_reason"],
        "seed": runner.seed,
        "auto": runner.auto,
        "timings": {key: value for key, value in stats.items() if key != "finish_reason"},
        "notices": lines,
        "versions": {"mlxeff": __version__, "mlx": mx.__version__},
    }


def _prompt(options: argparse.Namespace) -> str:
    """The text of the prompt: from the argument, a file or standard input. Raises MlxeffError where there is none."""
    if options.prompt is not None and options.prompt != "-":
        if options.file:
            raise MlxeffError("generate: wanted a prompt or --file, got both")
        return _not_empty(streams.require_text(options.prompt, "prompt"), "prompt")
    if options.file:
        return _not_empty(streams.read_text(options.file), options.file)
    if options.prompt is None and sys.stdin.isatty():
        raise MlxeffError('generate: wanted a prompt, got none: mlxeff generate "…", --file FILE or text on stdin')
    return _not_empty(streams.decode(streams.read_input(), "standard input"), "standard input")


def _not_empty(text: str, origin: str) -> str:
    """The text itself. Raises MlxeffError where it is empty."""
    if not text.strip():
        raise MlxeffError(f"{origin}: wanted a prompt, got an empty one")
    return text


def _ids(tokenizer: "Tokenizer", prompt: str, options: argparse.Namespace) -> list[int]:
    """Token ids of the prompt, through the chat template if the model has one. Raises MlxeffError for a system message
    that has no place."""
    from ..generation import prompt_ids

    if options.system and options.raw:
        raise MlxeffError("generate: --system needs the chat template, which --raw leaves out")
    if options.raw:
        return prompt_ids(tokenizer, prompt)
    if not tokenizer.has_chat_template:
        if options.system:
            raise MlxeffError(
                f"{options.model}: has no chat template, so --system has no place; put it into the prompt"
            )
        notices.info("%s has no chat template (a base model?): the prompt is continued as plain text", options.model)
        return prompt_ids(tokenizer, prompt)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, special_in_text=options.special_in_text)
