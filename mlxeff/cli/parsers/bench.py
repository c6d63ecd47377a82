"""The options of `mlxeff bench`."""

import argparse

from ...assembly import techniques
from ...assembly.options import IGNORE_KEYS, PREFILL_STEP, natural, positive
from ...bench.selection import condition
from .common import add, add_end, sentence
from .parser import Parser
from .values import checkpoint, numbers, percentage

TTFT_EXAMPLES = (
    "mlxeff bench ttft smollm2-135m",
    "mlxeff bench ttft smollm2-135m --kv-predict smollm2-135m-0-18 --batch 1,8",
)
COMPARE_EXAMPLES = ("mlxeff bench compare before.json after.json",)
PAGE_EXAMPLES = ("mlxeff bench page result.json", "mlxeff bench page result.json --png plots")


def add_bench(parser: Parser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    summary = "seconds to the first token of a model, of KV Prediction pairs for it, or of the models in that paper"
    sub = what.add_parser("ttft", help=summary, description=sentence(summary), examples=TTFT_EXAMPLES)
    sub.add_argument("model", nargs="?", metavar="MODEL", help="a folder, file, name or hub id")
    for technique in techniques.switched_for("bench ttft"):
        also = {"action": "append", "default": [], "help": "measure MODEL with this option too (repeatable)"}
        add(sub, [technique.option], **also)
    sub.add_argument(
        "--suite",
        choices=("kvp-paper",),
        help="measure the models of the KV Prediction paper instead of MODEL, beside the published numbers: OpenELM of "
        "all sizes, layer-pruned ones and the paper's eleven pairs, with 1, 4 or 8 prompts of 64 to 1024 tokens at "
        "once and 64 prompts of 59, on CPU and GPU",
    )
    sub.add_argument(
        "--prompt-lengths", metavar="N,…", type=numbers, help="tokens in the prompts (default 128,512,2048)"
    )
    sub.add_argument(
        "--batch", metavar="B,…", type=numbers, default=(1,), help="prompts that are computed at once (default 1)"
    )
    sub.add_argument(
        "--only",
        metavar="KEY=VALUE",
        type=condition(("arm", "device", "batch", "tokens")),
        nargs="+",
        action="extend",
        default=[],
        help="measure only a part. KEY is arm (VALUE is a part of the name of a row in the table), device, batch or "
        "tokens; of a key that is given several times, all values are measured",
    )
    sub.add_argument("--rounds", metavar="N", type=positive, default=3, help="measured passes (default %(default)s)")
    sub.add_argument(
        "--warmup", metavar="N", type=natural, default=1, help="passes before the measured ones (default %(default)s)"
    )
    sub.add_argument(
        "--steps", metavar="N", type=natural, default=4, help="tokens that each pass decodes (default %(default)s)"
    )
    sub.add_argument(
        "--out", metavar="FILE", help="keep every sample in FILE; the same command continues an interrupted measurement"
    )
    _add_machine(sub)
    add(sub, [IGNORE_KEYS])
    sub.add_argument("--offline", action="store_true", help="never touch the network")
    sub.add_argument("--json", action="store_true", help="print one JSON document with every sample")
    sub.add_argument("--quiet", action="store_true", help="no progress lines; warnings still show")
    _add_files(what)


def _add_files(what: argparse._SubParsersAction) -> None:
    """The options of what reads results of benchmarks."""
    summary = "which rows of results became better or worse than noise; exit code 1 where one became worse"
    sub = what.add_parser("compare", help=summary, description=sentence(summary), examples=COMPARE_EXAMPLES)
    sub.add_argument("result", metavar="A.json", help="a result of `mlxeff bench`, or the file of `bench ttft --out`")
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
    summary = "write a report for a browser: plots and tables in one HTML file"
    sub = what.add_parser("page", help=summary, description=sentence(summary), examples=PAGE_EXAMPLES)
    sub.add_argument("results", metavar="RESULT.json", nargs="+", help="results; several are compared with the first")
    sub.add_argument("--out", metavar="FILE", help="the HTML file (default: RESULT.html, beside RESULT.json)")
    sub.add_argument("--png", metavar="FOLDER", help="write each plot as a PNG file, too")
    add_end(sub, "print one JSON document: the files that were written")


def _add_machine(sub: Parser) -> None:
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to compute (default: auto, the GPU if there is one, for the suite every device)",
    )
    sub.add_argument(
        "--threads", metavar="N", type=positive, help="threads of the CPU kernels (default: one for each core)"
    )
    add(sub, techniques.PRECISION)
    sub.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of the suite's random weights (default float16)",
    )
    sub.add_argument(
        "--checkpoint",
        metavar="SIZE=MODEL",
        type=checkpoint,
        action="append",
        default=[],
        help="use MODEL as the suite's OpenELM of SIZE (270M, 450M, 1.1B, 3B) instead of random weights (repeatable)",
    )
    add(sub, [PREFILL_STEP])
    sub.add_argument(
        "--memory",
        metavar="GB",
        type=float,
        help="memory that may be used (default: most of the free memory); a measurement that needs more is left out",
    )
