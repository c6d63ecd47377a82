"""The measures of `mlxeff eval` and their options as data. Imports no slow module, so that --help is quick."""

import argparse
from collections.abc import Sequence

from ..assembly import techniques
from ..assembly.options import (
    IGNORE_KEYS,
    PREFILL_STEP,
    TRUST_REMOTE_CODE,
    Option,
    ValueParser,
    names,
    natural,
    numbers,
    option,
    positive,
)
from ..assembly.techniques import Subcommand

MODEL = option("model", metavar="MODEL", help="a folder, a .gguf file, a Hugging Face id or a name of `mlxeff models`")
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
    return [*techniques.PRECISION, PREFILL_STEP, *techniques.switch_options("eval"), IGNORE_KEYS, TRUST_REMOTE_CODE]


def other_options(text: str | Sequence[str]) -> argparse.Namespace:
    """The value of --against-options: "--kv-cache int4", or its words → the parsed options that say how a model is run.
    Raises argparse.ArgumentTypeError."""
    parser = ValueParser("--against-options", add_help=False, allow_abbrev=False)
    for each in run_options():
        parser.add_argument(each.name, *each.aliases, **each.keywords)
    return parser.parse_text(text) if isinstance(text, str) else parser.parse_args(text)


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


def _choices(progress: object, **values) -> dict:
    from .choices import eval_choices

    return eval_choices(progress, **values)


def _lines_of_choices(report: dict) -> list[str]:
    from .choices import choices_lines

    return choices_lines(report)


def _retrieval(progress: object, **values) -> dict:
    from .retrieval import eval_retrieval

    return eval_retrieval(progress, **values)


def _lines_of_retrieval(report: dict) -> list[str]:
    from .retrieval import retrieval_lines

    return retrieval_lines(report)


def lengths(text: str) -> list[int]:
    """The value of --lengths: "512,1024" → [512, 1024]."""
    return [positive(each) for each in names(text)]


def depths(text: str) -> list[float]:
    """The value of --depths: "0,50" → [0.0, 50.0]."""
    found = numbers(text)
    if not found or not all(0 <= each <= 100 for each in found):
        raise argparse.ArgumentTypeError(f"wanted percentages from 0 to 100, got {text!r}")
    return found


RETRIEVAL: tuple[Option, ...] = (
    option(
        "--lengths",
        metavar="N,…",
        type=lengths,
        help="tokens of the prompts (default 512,1024,2048,4096, those that the model's context has room for)",
    ),
    option(
        "--depths",
        metavar="P,…",
        type=depths,
        default="0,25,50,75,100",
        help="places of the needle, in percent of the prompt (default %(default)s)",
    ),
    option(
        "--needles",
        metavar="N",
        type=positive,
        default=3,
        help="needles for each length and depth (default %(default)s)",
    ),
    option(
        "--seed",
        metavar="N",
        type=natural,
        default=0,
        help="seed of names, numbers and sentences (default %(default)s)",
    ),
    option("--text", metavar="FILE", help="UTF-8 text that the needles lie in (default: a text in the package)"),
    option("--plot", metavar="FILE.png", help="draw the heat map; needs matplotlib (mlxeff[benchmarks])"),
)
CHOICES: tuple[Option, ...] = (
    option("questions", metavar="FILE", help="JSON lines with the keys query, choices and gold"),
    option("--limit", metavar="N", type=positive, help="the first N questions (default: all)"),
    option("--delimiter", metavar="TEXT", default=" ", help="text between a query and a choice (default: a space)"),
    option(
        "--num-fewshot", metavar="N", type=natural, default=0, help="questions with their right choices before each one"
    ),
    option("--fewshot", metavar="FILE", help="the file of these, its first N (default: the others of the same file)"),
    option("--chat-template", action="store_true", help="ask each as a message in the model's chat template"),
    STEP,
)
MEASURES: Sequence[Subcommand] = (
    Subcommand(
        name="ppl",
        examples=(
            "mlxeff eval ppl smollm2-135m",
            "mlxeff eval ppl smollm2-135m --text notes.txt --kv-cache int4",
        ),
        summary="perplexity: how well a model predicts a text, with any techniques switched on",
        options=(MODEL, *WINDOWS),
        run=_ppl,
        lines=_lines_of_ppl,
    ),
    Subcommand(
        name="kl",
        examples=(
            "mlxeff eval kl smollm2-135m --text notes.txt --kv-cache int4",
            "mlxeff eval kl ./seeds --against smollm2-135m",
        ),
        summary="KL divergence and equal first choices beside a reference: another model, or the same one with other "
        "options",
        options=(MODEL, *AGAINST, *WINDOWS),
        run=_kl,
        lines=_lines_of_kl,
    ),
    Subcommand(
        name="retrieval",
        examples=(
            "mlxeff eval retrieval smollm2-135m",
            "mlxeff eval retrieval smollm2-135m --kv-cache int8 --plot map.png",
        ),
        summary="long context: whether a model finds a sentence in a long prompt, by length and depth",
        options=(MODEL, *RETRIEVAL),
        run=_retrieval,
        lines=_lines_of_retrieval,
    ),
    Subcommand(
        name="choices",
        examples=(
            "mlxeff eval choices smollm2-135m questions.jsonl",
            "mlxeff eval choices smollm2-135m questions.jsonl --num-fewshot 5",
        ),
        summary="multiple choice: the share of questions for which the right choice is the most likely one",
        options=(MODEL, *CHOICES),
        run=_choices,
        lines=_lines_of_choices,
    ),
)
