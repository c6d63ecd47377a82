"""The options of each verb of the command, with their help texts and the conversions of their values.

A technique defines its own options in `assembly.techniques`. Imports no slow module, so that --help is quick.
"""

import argparse
from collections.abc import Iterable

from ..assembly import techniques
from ..assembly.options import IGNORE_KEYS, PREFILL_STEP, TRUST_REMOTE_CODE, Option, integer, names, natural, positive
from ..bench.selection import condition
from ..eval import verbs as measures
from ..hub.catalog import DEFAULT_MODEL

MAX_TOKENS = 1024  # default of --max-tokens
# Options that name a file or a folder, in which "~" stands for a home folder; names of models are resolved elsewhere.
PATHS = "file prompt_cache dst out text train_text calibrate tokenizer plot questions score png".split()
DEVICE_HELP = "where to compute (default: auto, the GPU if there is one)"


def sentence(summary: str) -> str:
    """A summary as a sentence: with a capital letter and a full stop."""
    return summary[0].upper() + summary[1:] + "."


def _add(parser: argparse._ActionsContainer, options: Iterable[Option], **more) -> None:
    """Add options to a parser; `more` are keywords that override theirs."""
    for option in options:
        parser.add_argument(option.name, *option.aliases, **option.keywords | more)


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the prompt; without it, or with -, it is read from standard input")
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    _add_model(parser)
    _add_text(parser)
    parser.add_argument("--raw", action="store_true", help="use the prompt as it is, without the model's chat template")
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="a file with the KV cache of an earlier call: tokens at the beginning of the prompt that it contains are "
        "not computed again; afterwards it has the cache of this prompt",
    )
    _add(parser, techniques.switch_options("generate"))
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end instead of streaming")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no timings; warnings still show")


def add_fit(parser: argparse.ArgumentParser) -> None:
    _add_subcommands(parser, techniques.FITTED)


def add_trace(parser: argparse.ArgumentParser) -> None:
    _add_subcommands(parser, techniques.TRACED)


def add_eval(parser: argparse.ArgumentParser) -> None:
    for sub in _add_subcommands(parser, measures.MEASURES):
        _add(sub.add_argument_group("how the model is run"), measures.run_options())


def _add_subcommands(
    parser: argparse.ArgumentParser, entries: Iterable[techniques.Subcommand]
) -> list[argparse.ArgumentParser]:
    """Add what a verb does, such as for each technique, with the options that all of them have; returns the parsers."""
    what, added = parser.add_subparsers(dest="what", metavar="WHAT", required=True), []
    for entry in entries:
        sub = what.add_parser(entry.name, help=entry.summary, description=sentence(entry.summary), allow_abbrev=False)
        _add(sub, entry.options)
        sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=DEVICE_HELP)
        sub.add_argument("--offline", action="store_true", help="never touch the network")
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--quiet", action="store_true", help="no progress bar, no report; warnings still show")
        added.append(sub)
    return added


def add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_text(parser)
    _add(parser, techniques.switch_options("chat"))
    parser.add_argument("--resume", metavar="FILE", help="continue a conversation that /save wrote")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no greeting; warnings still show")


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a config.json, a .gguf file, a name, or a hub id, of which config.json alone is fetched",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--chip",
        default="this",
        metavar="CHIP",
        help="of a Mac, as in m2-pro or m5-max (an unknown one lists all); this: this machine (default)",
    )
    machine.add_argument("--cores", metavar="N", type=positive, help="cores of its GPU (default: the largest variant)")
    machine.add_argument(
        "--memory", metavar="GB", type=_above_zero, help="memory of the Mac (default: the largest option)"
    )
    machine.add_argument(
        "--no-accelerators",
        action="store_true",
        help="predict for an engine that does not use M5's neural accelerators",
    )
    machine.add_argument(
        "--engine", choices=("mlx", "llama.cpp"), default="mlx", help="whose constants to use (default: mlx)"
    )
    machine.add_argument(
        "--engine-version",
        metavar="V",
        type=_version,
        help="version of MLX, as in 0.31.2, or the year of a build of llama.cpp (default: the newest that is known)",
    )
    machine.add_argument(
        "--float16", action="store_true", help="activations are float16: M1 and M2 only emulate bfloat16"
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--weights", metavar="KIND,…", type=names, help='"as stored", "affine 4", "seedlm 4.5", … (all)')
    what.add_argument("--kv-cache", metavar="KIND,…", type=names, help="kinds of KV cache (default: all)")
    what.add_argument("--prompt-lengths", metavar="N,…", type=_numbers, help="tokens in prompts")
    what.add_argument("--depths", metavar="N,…", type=_naturals, help="tokens in the KV cache before decoding")
    _add(what, [PREFILL_STEP])
    what.add_argument(
        "--acceptance",
        metavar="P",
        type=_probability,
        default=0.9,
        help="probability that a token which QuantSpec drafts is accepted (default 0.9, a guess until measured)",
    )
    what.add_argument(
        "--sensitivity",
        metavar="S,…",
        type=_shares,
        default=(1.0, 0.8, 0.6),
        help="shares of the feed-forward networks that a DynaMoE model computes (default 1,0.8,0.6)",
    )
    what.add_argument(
        "--kv-predict",
        metavar="PART,…",
        type=_shares,
        default=(0.5, 0.75),
        help="shares of the layers that read the prompt in KV Prediction (default 0.5,0.75)",
    )
    parser.add_argument("--explain", action="store_true", help="show bytes and FLOPs of each layer too")
    result = parser.add_mutually_exclusive_group()
    result.add_argument(
        "--calibrate",
        metavar="RESULT.json",
        help="fit this machine's constants to a result of `mlxeff bench ttft MODEL --json`, and keep them",
    )
    result.add_argument(
        "--score", metavar="RESULT.json", help="compare predictions with such a result: the error of each point"
    )
    _add(parser, [IGNORE_KEYS])
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no notes; warnings still show")


def add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    summary = "seconds to the first token of a model, of KV Prediction pairs for it, or of the models in that paper"
    sub = what.add_parser("ttft", help=summary, description=sentence(summary), allow_abbrev=False)
    sub.add_argument("model", nargs="?", metavar="MODEL", help="a folder, file, name or hub id")
    for technique in techniques.switched_for("bench ttft"):
        also = {"action": "append", "default": [], "help": "measure MODEL with this option too (repeatable)"}
        _add(sub, [technique.option], **also)
    sub.add_argument(
        "--suite",
        choices=("kvp-paper",),
        help="measure the models of the KV Prediction paper instead of MODEL, beside the published numbers: OpenELM of "
        "all sizes, layer-pruned ones and the paper's eleven pairs, with 1, 4 or 8 prompts of 64 to 1024 tokens at "
        "once and 64 prompts of 59, on CPU and GPU",
    )
    sub.add_argument(
        "--prompt-lengths", metavar="N,…", type=_numbers, help="tokens in the prompts (default 128,512,2048)"
    )
    sub.add_argument(
        "--batch", metavar="B,…", type=_numbers, default=(1,), help="prompts that are computed at once (default 1)"
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
    _add_bench_machine(sub)
    _add(sub, [IGNORE_KEYS])
    sub.add_argument("--offline", action="store_true", help="never touch the network")
    sub.add_argument("--json", action="store_true", help="print one JSON document with every sample")
    sub.add_argument("--quiet", action="store_true", help="no progress lines; warnings still show")
    _add_bench_files(what)


def _add_bench_files(what: argparse._SubParsersAction) -> None:
    """The options of what reads results of benchmarks."""
    summary = "which rows of results became better or worse than noise; exit code 1 where one became worse"
    sub = what.add_parser("compare", help=summary, description=sentence(summary), allow_abbrev=False)
    sub.add_argument("result", metavar="A.json", help="a result of `mlxeff bench`, or the file of `bench ttft --out`")
    sub.add_argument("others", metavar="B.json", nargs="+", help="results that are compared with A")
    sub.add_argument(
        "--threshold",
        metavar="PERCENT",
        type=_percentage,
        default=3.0,
        help="a change is noise unless its whole interval is beyond so many percent (default %(default)g)",
    )
    sub.add_argument("--no-fail", action="store_true", help="exit code 0 though a row became worse")
    sub.add_argument(
        "-o", dest="output", choices=("text", "md", "json"), default="text", help="how to print (default: %(default)s)"
    )
    _add_end(sub, "print one JSON document, as -o json")
    summary = "write a report for a browser: plots and tables in one HTML file"
    sub = what.add_parser("page", help=summary, description=sentence(summary), allow_abbrev=False)
    sub.add_argument("results", metavar="RESULT.json", nargs="+", help="results; several are compared with the first")
    sub.add_argument("--out", metavar="FILE", help="the HTML file (default: RESULT.html, beside RESULT.json)")
    sub.add_argument("--png", metavar="FOLDER", help="write each plot as a PNG file, too")
    _add_end(sub, "print one JSON document: the files that were written")


def _add_end(sub: argparse.ArgumentParser, document: str) -> None:
    """The options --json, with the help text `document`, and --quiet."""
    sub.add_argument("--json", action="store_true", help=document)
    sub.add_argument("--quiet", action="store_true", help="no notes; warnings still show")


def _percentage(text: str) -> float:
    """A finite number of percent, 0 or more."""
    if not 0 <= (value := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a number of percent, 0 or more, got {text!r}")
    return value


def _add_bench_machine(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to compute (default: auto, the GPU if there is one, for the suite every device)",
    )
    sub.add_argument(
        "--threads", metavar="N", type=positive, help="threads of the CPU kernels (default: one for each core)"
    )
    _add(sub, techniques.PRECISION)
    sub.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of the suite's random weights (default float16)",
    )
    sub.add_argument(
        "--checkpoint",
        metavar="SIZE=MODEL",
        type=_checkpoint,
        action="append",
        default=[],
        help="use MODEL as the suite's OpenELM of SIZE (270M, 450M, 1.1B, 3B) instead of random weights (repeatable)",
    )
    _add(sub, [PREFILL_STEP])
    sub.add_argument(
        "--memory",
        metavar="GB",
        type=float,
        help="memory that may be used (default: most of the free memory); a measurement that needs more is left out",
    )


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a folder, a file (.gguf .safetensors .pt .bin), a name or hub id")
    parser.add_argument("dst", metavar="DST", help="the new folder")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="float type of the new weights (default: as stored)"
    )
    parser.add_argument(
        "--quantize",
        metavar="BITS[:GROUP]",
        type=_quantize,
        help="quantise matrices to BITS, affine in groups of GROUP weights (default 64), as in 4 or 4:32; or by a "
        "recipe of two widths: mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="write dense weights for quantised and seed-encoded ones"
    )
    parser.add_argument(
        "--export-dense",
        action="store_true",
        help="of a DynaMoE checkpoint: write the dense model that it was made of, which stock mlx-lm loads",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer folder or file (default: beside the weights)")
    _add(parser, [IGNORE_KEYS])
    group = parser.add_argument_group("SeedLM")
    group.add_argument(
        "--seedlm", choices=("3", "4", "4.5"), help="encode linear layers as seeds with so many bits per weight"
    )
    group.add_argument(
        "--keep",
        metavar="NAME,…[:BITS]",
        type=_keep,
        action="append",
        help="do not encode layers whose names contain NAME: quantise them to BITS, affine (default 8), or leave them "
        "as stored (16). none: encode all linear layers (default: embed,lm_head:8; repeatable). With --quantize: BITS "
        "of layers that differ, 16 for dense ones",
    )
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        help="UTF-8 text on which the errors of the layers' outputs are minimised (default: a text in the package)",
    )
    group.add_argument(
        "--calibration-tokens", metavar="N", type=positive, help="tokens of that text to use (default: 32768)"
    )
    group.add_argument(
        "--data-free", action="store_true", help="use no text: minimise the errors of the weights, as in the paper"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing, only report names, shapes, types, disk and memory"
    )
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report; warnings still show")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a folder, a .gguf file, a Hugging Face id or a name from `mlxeff models` (default: %(default)s)",
    )
    group.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=DEVICE_HELP)
    group.add_argument("--offline", action="store_true", help="never touch the network")
    _add(group, [TRUST_REMOTE_CODE, IGNORE_KEYS])
    group.add_argument(
        "--context-limit", metavar="N", type=positive, help="tokens in the context (default: the model's own limit)"
    )
    group.add_argument(
        "--truncate",
        action="store_true",
        help="drop what does not fit into the context: the beginning of a prompt, the oldest turns of a chat",
    )
    _add(group, techniques.PRECISION)
    _add(group, [PREFILL_STEP])


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument(
        "--special-in-text",
        action="store_true",
        help="let control tokens that are spelled out in messages, such as <|im_end|>, act as such; else they are text",
    )
    group.add_argument(
        "--max-tokens",
        metavar="N",
        type=_tokens,
        default=MAX_TOKENS,
        help="tokens of the answer at most (default %(default)s; -1: up to the end of the context)",
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer before TEXT (repeatable)"
    )
    group.add_argument(
        "--temp",
        metavar="T",
        type=float,
        default=0.0,
        help="temperature of the sampling; 0, the default, always takes the most probable token",
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=0.0,
        help="sample from the most probable tokens whose probabilities add up to P; 0: off",
    )
    group.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="sample from the K most probable tokens; 0: off"
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="sample from the tokens that are at least P times as probable as the most probable one; 0: off",
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="make the last 20 tokens less probable: divide their logits by X",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=natural,
        help="seed of the sampling; one seed gives one text, but for a rare word where a cache holds the beginning of "
        "the prompt (default: random)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    """ "1,8" → (1, 8)."""
    return tuple(positive(part) for part in text.split(","))


def _naturals(text: str) -> tuple[int, ...]:
    """ "0,2048" → (0, 2048)."""
    return tuple(natural(part) for part in text.split(","))


def _version(text: str) -> tuple[int, ...]:
    """ "0.31.2" → (0, 31, 2)."""
    return tuple(natural(part) for part in text.split("."))


def _above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a number above 0, got {text!r}")
    return value


def _probability(text: str) -> float:
    """A number above 0 and below 1."""
    if not 0 < (value := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"wanted a number between 0 and 1, got {text!r}")
    return value


def _shares(text: str) -> tuple[float, ...]:
    """ "0.5,1" → (0.5, 1.0): numbers above 0 and up to 1."""
    values = tuple(_number(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"wanted numbers above 0 and up to 1, got {text!r}")
    return values


def _number(text: str) -> float:
    """A number; NaN for a text that is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _checkpoint(text: str) -> tuple[str, str]:
    """ "1.1B=FOLDER" → ("1.1B", "FOLDER")."""
    size, equals, model = text.partition("=")
    if size not in ("270M", "450M", "1.1B", "3B") or not equals or not model:
        raise argparse.ArgumentTypeError(f"wanted SIZE=MODEL with a SIZE of 270M, 450M, 1.1B, 3B, got {text!r}")
    return size, model


def _quantize(text: str) -> tuple[int | str, int]:
    """ "4:32" → (4, 32), bits (or the name of a recipe) and group size."""
    bits, _, group = text.partition(":")
    try:
        return (bits if bits.startswith("mixed_") else int(bits)), int(group or 64)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted BITS or BITS:GROUP, got {text!r}") from None


def _keep(text: str) -> tuple[tuple[str, int], ...]:
    """ "embed,lm_head:8" → (("embed", 8), ("lm_head", 8)); "none" → ()."""
    if text == "none":
        return ()
    names, colon, bits = text.rpartition(":")
    if not colon:
        names, bits = text, "8"
    try:
        kept = tuple((name.strip(), int(bits)) for name in names.split(","))
    except ValueError:
        kept = ()
    if not kept or not all(name for name, _ in kept):
        raise argparse.ArgumentTypeError(f"wanted NAME,…[:BITS] or none, got {text!r}")
    return kept


def _tokens(text: str) -> int:
    """The value of --max-tokens."""
    return integer(text, lambda n: n > 0 or n == -1, "a whole number above 0, or -1")
