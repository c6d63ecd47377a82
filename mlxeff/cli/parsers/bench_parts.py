"""What several verbs of `mlxeff bench` share: their model, what it is compared with, how often is measured, output."""

import argparse
from collections.abc import Callable, Sequence

from ...assembly import techniques
from ...assembly.options import IGNORE_KEYS, OFFLINE, PREFILL_STEP, Option, ValueParser, natural, positive
from ...bench.points import FILTERS
from ...bench.report import FORMATS
from ...bench.selection import condition
from .common import add
from .parser import Parser

PEERS = ("mlx-lm", "llama.cpp")
MODEL = "a folder, a .gguf file, a Hugging Face id or a name of `mlxeff models`"


class VersusParser(Parser):
    """A parser for which the argument after --vs is its value, though it begins with a dash."""

    def parse_known_args(self, args=None, namespace=None):
        words, joined = iter(args or ()), []
        for word in words:
            following = next(words, None) if word == "--vs" else None
            joined.append(word if following is None else f"--vs={following}")
        return super().parse_known_args(joined, namespace)


def add_model(sub: Parser, verb: str) -> None:
    """MODEL, how it is run, and what it is compared with."""
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    group = sub.add_argument_group("how MODEL is run")
    add(group, [*techniques.PRECISION, *techniques.switch_options(verb), IGNORE_KEYS, OFFLINE])
    group = sub.add_argument_group("what it is compared with")
    add_versus(group, [*techniques.PRECISION, *techniques.switch_options(verb)])
    group.add_argument(
        "--peer",
        metavar="NAME[=MODEL]",
        type=peer,
        action="append",
        default=[],
        help="another engine as an arm, where it is installed: mlx-lm, or llama.cpp through its llama-bench; with a "
        "MODEL that it loads, in place of this one (repeatable)",
    )


def add_versus(group: argparse._ArgumentGroup, options: Sequence[Option]) -> None:
    group.add_argument(
        "--vs",
        metavar="'MODEL OPTIONS'",
        type=versus(options),
        action="append",
        default=[],
        help="another arm: a model, options that say how it is run, or both, as one text: '--kv-cache int8'; without a "
        "model, MODEL with these options and no others. The arms take turns (repeatable)",
    )


def peer(text: str) -> tuple[str, str | None]:
    """ "mlx-lm=FOLDER" → ("mlx-lm", "FOLDER"); "mlx-lm" → ("mlx-lm", None)."""
    name, equals, model = text.partition("=")
    if name not in PEERS or (equals and not model):
        raise argparse.ArgumentTypeError(f"wanted NAME or NAME=MODEL with a NAME of {', '.join(PEERS)}, got {text!r}")
    return name, model or None


def versus(options: Sequence[Option]) -> Callable[[str], argparse.Namespace]:
    """The argument `type` of argparse for --vs: a text → the parsed options, with the attribute `model`."""

    def parse(text: str) -> argparse.Namespace:
        if not text.strip():
            raise argparse.ArgumentTypeError("wanted a MODEL, options or both, got an empty text")
        parser = ValueParser("--vs", add_help=False, allow_abbrev=False)
        parser.add_argument("model", nargs="?")
        add(parser, options)
        return parser.parse_text(text)

    return parse


def add_measuring(group: argparse._ArgumentGroup, rounds: int, text: bool = True) -> None:
    """How often is measured, and which part."""
    add_rounds(group, rounds)
    if text:
        group.add_argument(
            "--text", metavar="FILE", help="UTF-8 text whose first tokens are the prompts (default: random tokens)"
        )
    group.add_argument(
        "--only",
        metavar="KEY=VALUE",
        type=condition(FILTERS),
        nargs="+",
        action="extend",
        default=[],
        help=f"measure only a part. KEY is one of {', '.join(FILTERS)}; of a text, VALUE is a part; of a key that is "
        "given several times, all values are measured",
    )


def add_rounds(group: argparse._ArgumentGroup, default: int) -> None:
    group.add_argument(
        "-r", "--rounds", metavar="N", type=positive, default=default, help="measured passes (default %(default)s)"
    )
    group.add_argument(
        "--warmup", metavar="N", type=natural, default=1, help="passes before the measured ones (default %(default)s)"
    )


def add_machine(sub: Parser, auto: str = "the GPU if there is one", prefill: bool = True) -> None:
    group = sub.add_argument_group("machine")
    group.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help=f"where to compute (default: auto, {auto})"
    )
    group.add_argument(
        "--threads", metavar="N", type=positive, help="threads of the CPU kernels (default: one for each core)"
    )
    if not prefill:
        return
    add(group, [PREFILL_STEP])
    group.add_argument(
        "--memory",
        metavar="GB",
        type=float,
        help="memory that may be used (default: most of the free memory); a measurement that needs more is left out",
    )


def add_output(sub: Parser) -> argparse._ArgumentGroup:
    group = sub.add_argument_group("output")
    group.add_argument(
        "--out", metavar="FILE", help="keep every sample in FILE; the same command continues an interrupted measurement"
    )
    group.add_argument(
        "-o",
        "--format",
        choices=FORMATS,
        help="of the result: md, tables for people (default); csv and jsonl, a line for each metric of each arm and "
        "test; json, one document with every sample",
    )
    group.add_argument("--json", action="store_true", help="as -o json")
    group.add_argument("--quiet", action="store_true", help="no progress lines; warnings still show")
    return group
