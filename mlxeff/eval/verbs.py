"""The measures of `mlxeff eval` and their options as data. Imports no slow module, so that --help is quick."""

import argparse
import shlex
from collections.abc import Sequence

from ..assembly import techniques
from ..assembly.options import IGNORE_KEYS, Option, option, positive
from ..assembly.techniques import Subcommand

MODEL = option("model", metavar="MODEL", help="a folder, a .gguf file, a Hugging Face id or a name of `mlxeff models`")
PREFILL_STEP = option(
    "--prefill-step",
    metavar="N",
    type=positive,
    help="prompt tokens that are computed at once (default 2048 on a GPU, 512 on a CPU)",
)
TRUST = option(
    "--trust-remote-code", action="store_true", help="let mlx-lm run Python code that the model folder brings"
)
STEP = option(
    "--step",
    metavar="N",
    type=positive,
    default=256,
    help="tokens of a pass after the prompt, at most; 1 reads them one by one, as plain decoding does (default "
    "%(default)s)",
)
WINDOWS: tuple[Option, ...] = (
    option("--text", metavar="FILE", help="UTF-8 text to measure on (default: a text in the package)"),
    option(
        "--tokens", metavar="N", type=positive, default=16384, help="tokens of the text to read (default %(default)s)"
    ),
    option(
        "--context",
        metavar="C",
        type=positive,
        help="tokens that a window reads (default 1024, less where the model's context is smaller)",
    ),
    option(
        "--stride",
        metavar="S",
        type=positive,
        help="tokens from one window to the next; each window scores what the one before did not (default: C, or C - P "
        "+ 1 with a --prompt of P tokens, so that every token is scored once)",
    ),
    option(
        "--prompt",
        metavar="P",
        type=positive,
        help="the first P tokens of each window are read as a prompt, as `generate` reads one, and not scored "
        "(default: those that the window before has scored, in the first window one)",
    ),
    STEP,
    option("--no-bos", action="store_true", help="begin no window with BOS, though the tokenizer begins texts with it"),
)


def run_options() -> list[Option]:
    """The options that say how a model is run: those of `generate` that every technique has."""
    return [*techniques.PRECISION, PREFILL_STEP, *techniques.switch_options("eval"), IGNORE_KEYS, TRUST]


class _Inner(argparse.ArgumentParser):
    """A parser whose errors are those of the option that it parses the value of."""

    def error(self, message: str) -> None:
        raise argparse.ArgumentTypeError(message)


def other_options(text: str) -> argparse.Namespace:
    """The value of --against-options: "--kv-cache int4" → the parsed options that say how the reference is run."""
    parser = _Inner("--against-options", add_help=False, allow_abbrev=False)
    for each in run_options():
        parser.add_argument(each.name, *each.aliases, **each.keywords)
    try:
        return parser.parse_args(shlex.split(text))
    except ValueError as error:  # of quotation marks that are not closed
        raise argparse.ArgumentTypeError(str(error)) from None


AGAINST: tuple[Option, ...] = (
    option("--against", metavar="MODEL", help="the reference (default: the same model)"),
    option(
        "--against-options",
        metavar="OPTIONS",
        type=other_options,
        default="",
        help="how the reference is run, as one text: '--kv-cache float16 --compute int8' (default: with no option)",
    ),
)


def _ppl(progress: object, **values) -> dict:
    from .perplexity import eval_ppl

    return eval_ppl(progress, **values)


def _kl(progress: object, **values) -> dict:
    from .perplexity import eval_kl

    return eval_kl(progress, **values)


def _lines_of_ppl(report: dict) -> list[str]:
    from .perplexity import ppl_lines

    return ppl_lines(report)


def _lines_of_kl(report: dict) -> list[str]:
    from .perplexity import kl_lines

    return kl_lines(report)


MEASURES: Sequence[Subcommand] = (
    Subcommand(
        name="ppl",
        summary="perplexity: how well a model predicts a text, with any techniques switched on",
        options=(MODEL, *WINDOWS),
        run=_ppl,
        lines=_lines_of_ppl,
    ),
    Subcommand(
        name="kl",
        summary="KL divergence and equal first choices beside a reference: another model, or the same one with other "
        "options",
        options=(MODEL, *AGAINST, *WINDOWS),
        run=_kl,
        lines=_lines_of_kl,
    ),
)
