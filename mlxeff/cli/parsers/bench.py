"""The options of `mlxeff bench WHAT`, a function for each WHAT."""

from collections.abc import Callable
from typing import NamedTuple

from ...assembly.options import IGNORE_KEYS, OFFLINE, natural, option
from ...eval import verbs as measures
from .bench_parts import MODEL, VersusParser, add_machine, add_measuring, add_model, add_output, add_rounds, add_versus
from .common import add, add_end, sentence
from .parser import Parser
from .values import checkpoint, generated, naturals, numbers, percentage

SUITES = ("kvp-paper", "openelm-paper", "quantspec-paper", "seedlm-paper", "dynamoe", "all")

# Of the verbs that decode after a prompt.
STEPS = option(
    "--steps", metavar="N", type=natural, default=4, help="tokens that each pass decodes (default %(default)s)"
)


class What(NamedTuple):
    """A verb of `bench`: its summary, the function that adds its options, and whole commands."""

    summary: str
    add: Callable[[Parser], None]
    examples: tuple[str, ...]


def add_bench(parser: Parser) -> None:
    """Add every WHAT of `bench`."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=VersusParser)
    for name, each in WHATS.items():
        description = sentence(each.summary)
        each.add(what.add_parser(name, help=each.summary, description=description, examples=each.examples))


def _ttft(sub: Parser) -> None:
    add_model(sub, "bench ttft")
    group = sub.add_argument_group("what is measured")
    group.add_argument(
        "-p", "--prompt-lengths", metavar="N,…", type=numbers, help="tokens in the prompts (default 128,512,2048)"
    )
    group.add_argument(
        "--batch", metavar="B,…", type=numbers, default=(1,), help="prompts that are computed at once (default 1)"
    )
    add(group, [STEPS])
    add_measuring(group, rounds=3)
    add_machine(sub)
    add_output(sub)


def _decode(sub: Parser) -> None:
    add_model(sub, "bench decode")
    group = sub.add_argument_group("what is measured, with the names and defaults of llama-bench")
    group.add_argument(
        "-p",
        "--prompt-lengths",
        metavar="N,…",
        type=naturals,
        default=(512,),
        help="pp: tokens in a prompt; 0: none (default 512)",
    )
    group.add_argument(
        "-n",
        "--generate",
        metavar="N,…",
        type=generated,
        default=(128,),
        help="tg: tokens that are decoded, 2 or more; 0: none (default 128)",
    )
    group.add_argument(
        "-d",
        "--depths",
        metavar="N,…",
        type=naturals,
        default=(0,),
        help="tokens in the KV cache before each of these (default 0)",
    )
    add_measuring(group, rounds=5)
    add_machine(sub)
    add_output(sub)


def _kernels(sub: Parser) -> None:
    sub.add_argument(
        "model", nargs="*", metavar="MODEL", help=f"{MODEL}; none: only what the machine can do at most is measured"
    )
    group = sub.add_argument_group("models")
    add(group, [IGNORE_KEYS, OFFLINE])
    group = sub.add_argument_group("what is measured")
    group.add_argument(
        "--rows",
        metavar="N,…",
        type=numbers,
        default=(1, 8, 512),
        help="rows of the inputs: 1 as in decoding, some as in verifying drafts, many as in prompts (default 1,8,512)",
    )
    add_rounds(group, 5)
    add_machine(sub, prefill=False)
    add_output(sub)


def _quality(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    add(sub.add_argument_group("how MODEL is run"), measures.run_options())
    add(sub, [OFFLINE])
    add_versus(sub.add_argument_group("what it is compared with"), measures.run_options())
    add(sub.add_argument_group("what is read"), measures.WINDOWS)
    add_machine(sub, prefill=False)
    add_output(sub)


def _suite(sub: Parser) -> None:
    sub.add_argument("suite", metavar="NAME", choices=SUITES, help=f"the suite: {', '.join(SUITES)}")
    sub.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="of quantspec-paper a model in place of the built-in one; of seedlm-paper a dense model and its SeedLM "
        "conversions; of dynamoe a DynaMoE model",
    )
    group = sub.add_argument_group("models")
    group.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="type of random weights (default %(default)s)",
    )
    group.add_argument(
        "--checkpoint",
        metavar="SIZE=MODEL",
        type=checkpoint,
        action="append",
        default=[],
        help="use MODEL as the suite's OpenELM of SIZE (270M, 450M, 1.1B, 3B) instead of random weights (repeatable)",
    )
    add(group, [IGNORE_KEYS, OFFLINE])
    group = sub.add_argument_group("what is measured")
    add(group, [STEPS])
    add_measuring(group, rounds=3, text=False)
    add_machine(sub, "every device")
    add_output(sub).add_argument(
        "--report",
        metavar="FOLDER",
        help="write the result there at the end: result.json, report.html for a browser, plots as PNG files; and keep "
        "samples there, so that the same command continues an interrupted measurement",
    )


def _compare(sub: Parser) -> None:
    sub.add_argument("result", metavar="A.json", help="a result of `mlxeff bench`, or the file of `--out`")
    sub.add_argument("others", metavar="B.json", nargs="+", help="results that are compared with A")
    sub.add_argument(
        "--threshold",
        metavar="PERCENT",
        type=percentage,
        default=3.0,
        help="a change is noise unless its whole interval is beyond so many percent (default %(default)g)",
    )
    sub.add_argument("--no-fail", action="store_true", help="exit code 0 though a row became worse")
    sub.add_argument(
        "-o", dest="output", choices=("text", "md", "json"), default="text", help="how to print (default: %(default)s)"
    )
    add_end(sub, "print one JSON document, as -o json")


def _page(sub: Parser) -> None:
    sub.add_argument("results", metavar="RESULT.json", nargs="+", help="results; several are compared with the first")
    sub.add_argument("--out", metavar="FILE", help="the HTML file (default: RESULT.html, beside RESULT.json)")
    sub.add_argument("--png", metavar="FOLDER", help="write each plot as a PNG file, too")
    add_end(sub, "print one JSON document: the files that were written")


WHATS = {
    "ttft": What(
        "seconds to the first token of a model, and of others beside it",
        _ttft,
        (
            "mlxeff bench ttft smollm2-135m",
            "mlxeff bench ttft smollm2-135m --vs '--kv-predict smollm2-135m-0-18'",
        ),
    ),
    "decode": What(
        "prompt and decoded tokens a second of a model and of others, under the names of llama-bench",
        _decode,
        (
            "mlxeff bench decode smollm2-135m",
            "mlxeff bench decode smollm2-135m --vs '--kv-cache int8' -d 0,2048",
        ),
    ),
    "kernels": What(
        "bytes and FLOPs a second of the products with a model's matrices, and what the machine can do",
        _kernels,
        ("mlxeff bench kernels smollm2-135m",),
    ),
    "quality": What(
        "perplexity of a model, and how far others are from it, as `mlxeff eval` measures them",
        _quality,
        ("mlxeff bench quality smollm2-135m --vs '--kv-cache int4'",),
    ),
    "suite": What(
        "models and settings of a publication, beside its numbers",
        _suite,
        ("mlxeff bench suite kvp-paper --out kvp.jsonl", "mlxeff bench suite all --report suite"),
    ),
    "compare": What(
        "which rows of results became better or worse than noise; exit code 1 where one became worse",
        _compare,
        ("mlxeff bench compare before.json after.json",),
    ),
    "page": What(
        "write a report for a browser: plots and tables in one HTML file",
        _page,
        ("mlxeff bench page result.json", "mlxeff bench page result.json --png plots"),
    ),
}
