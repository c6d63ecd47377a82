"""The command `mlxeff`: it parses arguments, makes one call and prints the result.

Each verb has a module with a function `run`, which is imported when the verb is called. This package contains no
computation. Exit codes: 0 done, 1 an error that was explained in one line, 2 wrong usage, 130 interrupted with Ctrl-C
(text that was generated before is printed), 141 the reader of the output closed it.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__, limits, panics
from ..errors import MlxeffError
from ..names import expand
from . import arguments, parsing, streams

VERBS = {  # verb → summary for the help
    "generate": "answer one prompt, word by word",
    "chat": "hold a conversation with a model",
    "models": "list the built-in models and those in the cache",
    "convert": "convert a checkpoint: PyTorch, Hugging Face or GGUF to a folder that mlxeff and mlx-lm load",
    "fit": "fit the learned part of a technique to a model",
    "trace": "show what a technique does with a text",
    "bench": "measure speed on this machine",
    "eval": "measure the quality of a model, with any techniques switched on",
    "plan": "predict memory and speed of a model on a Mac or on this machine, before its weights are downloaded",
    "doctor": "say which backends this machine has, and why it lacks the others",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (`argparse` exits by itself on --help and wrong usage)."""
    with streams.prepared() as output:
        options = argparse.Namespace()
        try:
            code = _run(argv, options)
            output.flush()
            return code
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            output.drop()
            return 141
        except streams.OutputError as error:
            print(f"mlxeff: error: {error}", file=sys.stderr)
            output.drop()
            return 1
        except (MlxeffError, OSError) as error:
            return _fail(streams.explain(error), options, output)
        except (MemoryError, RuntimeError) as error:
            from ..memory import failure

            if (reason := failure(error)) is None:
                raise
            return _fail(reason, options, output)


def _run(argv: Sequence[str] | None, options: argparse.Namespace) -> int:
    """Parse into `options` and run the verb; returns the exit code."""
    try:
        _parser().parse_args(argv, options)
    except SystemExit:  # of --help, --version and wrong usage
        sys.stdout.flush()
        raise
    for name in arguments.PATHS:
        if getattr(options, name, None):
            setattr(options, name, str(expand(getattr(options, name))))
    streams.check(options.verb)
    panics.enable()
    if options.verb != "models":
        limits.start()
    verb = importlib.import_module(f".{options.verb}", __name__)
    if options.verb != "models":
        importlib.import_module("mlx.core")  # before Ctrl-C raises: its import does not survive exceptions
    with streams.interruptible():
        return verb.run(options)


def _fail(message: str, options: argparse.Namespace, output: streams.Output) -> int:
    """Print an error, with `--json` also as a document; returns the exit code."""
    print(f"mlxeff: error: {message}", file=sys.stderr)
    if getattr(options, "json", False):
        try:
            streams.print_json({"error": message}, indent=None)
        except (streams.OutputError, BrokenPipeError):
            output.drop()
    return 1


def _parser() -> argparse.ArgumentParser:
    """The parser for all verbs."""
    about = "LLM inference on MLX: OpenELM, the Llama family, and any other model that mlx-lm loads."
    parser = argparse.ArgumentParser("mlxeff", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mlxeff {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=parsing.sentence(summary), allow_abbrev=False)
        getattr(arguments, f"add_{verb}")(sub)
    return parser
