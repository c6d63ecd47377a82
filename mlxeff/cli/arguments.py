"""The options of each verb of the command, with their help texts and the conversions of their values.

A technique defines its own options in `assembly.techniques`. Imports no slow module, so that --help is quick.
"""

import argparse
from collections.abc import Iterable

from ..assembly import techniques
from ..assembly.options import IGNORE_KEYS, PREFILL_STEP, TRUST_REMOTE_CODE, names, natural, positive
from ..eval import verbs as measures
from ..hub.catalog import DEFAULT_MODEL
from . import bench_arguments
from .parsing import (
    above_zero,
    add,
    add_end,
    keep,
    naturals,
    numbers,
    probability,
    quantize,
    sentence,
    shares,
    tokens,
    version,
)

MAX_TOKENS = 1024  # default of --max-tokens
# Options that name a file or a folder, in which "~" stands for a home folder; names of models are resolved elsewhere.
PATHS = "file prompt_cache dst out text train_text calibrate tokenizer plot questions score png".split()
DEVICE_HELP = "where to compute (default: auto, the GPU if there is one)"
add_bench = bench_arguments.add_bench


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
    add(parser, techniques.switch_options("generate"))
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end instead of streaming")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no timings; warnings still show")


def add_fit(parser: argparse.ArgumentParser) -> None:
    _add_subcommands(parser, techniques.FITTED)


def add_trace(parser: argparse.ArgumentParser) -> None:
    _add_subcommands(parser, techniques.TRACED)


def add_eval(parser: argparse.ArgumentParser) -> None:
    for sub in _add_subcommands(parser, measures.MEASURES):
        add(sub.add_argument_group("how the model is run"), measures.run_options())


def _add_subcommands(
    parser: argparse.ArgumentParser, entries: Iterable[techniques.Subcommand]
) -> list[argparse.ArgumentParser]:
    """Add what a verb does, such as for each technique, with the options that all of them have; returns the parsers."""
    what, added = parser.add_subparsers(dest="what", metavar="WHAT", required=True), []
    for entry in entries:
        sub = what.add_parser(entry.name, help=entry.summary, description=sentence(entry.summary), allow_abbrev=False)
        add(sub, entry.options)
        sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=DEVICE_HELP)
        sub.add_argument("--offline", action="store_true", help="never touch the network")
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--quiet", action="store_true", help="no progress bar, no report; warnings still show")
        added.append(sub)
    return added


def add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_text(parser)
    add(parser, techniques.switch_options("chat"))
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
    _add_plan_machine(parser.add_argument_group("machine"))
    _add_plan_compared(parser.add_argument_group("what is compared"))
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
    add(parser, [IGNORE_KEYS])
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    add_end(parser, "print one JSON document")


def _add_plan_machine(machine: argparse._ArgumentGroup) -> None:
    machine.add_argument(
        "--chip",
        default="this",
        metavar="CHIP",
        help="of a Mac, as in m2-pro or m5-max (an unknown one lists all); this: this machine (default)",
    )
    machine.add_argument("--cores", metavar="N", type=positive, help="cores of its GPU (default: the largest variant)")
    machine.add_argument(
        "--memory", metavar="GB", type=above_zero, help="memory of the Mac (default: the largest option)"
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
        type=version,
        help="version of MLX, as in 0.31.2, or the year of a build of llama.cpp (default: the newest that is known)",
    )
    machine.add_argument(
        "--float16", action="store_true", help="activations are float16: M1 and M2 only emulate bfloat16"
    )


def _add_plan_compared(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--weights", metavar="KIND,…", type=names, help='"as stored", "affine 4", "seedlm 4.5", … (all)')
    what.add_argument("--kv-cache", metavar="KIND,…", type=names, help="kinds of KV cache (default: all)")
    what.add_argument("--prompt-lengths", metavar="N,…", type=numbers, help="tokens in prompts")
    what.add_argument("--depths", metavar="N,…", type=naturals, help="tokens in the KV cache before decoding")
    add(what, [PREFILL_STEP])
    what.add_argument(
        "--acceptance",
        metavar="P",
        type=probability,
        default=0.9,
        help="probability that a token which QuantSpec drafts is accepted (default 0.9, a guess until measured)",
    )
    what.add_argument(
        "--sensitivity",
        metavar="S,…",
        type=shares,
        default=(1.0, 0.8, 0.6),
        help="shares of the feed-forward networks that a DynaMoE model computes (default 1,0.8,0.6)",
    )
    what.add_argument(
        "--kv-predict",
        metavar="PART,…",
        type=shares,
        default=(0.5, 0.75),
        help="shares of the layers that read the prompt in KV Prediction (default 0.5,0.75)",
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
        type=quantize,
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
    add(parser, [IGNORE_KEYS])
    group = parser.add_argument_group("SeedLM")
    group.add_argument(
        "--seedlm", choices=("3", "4", "4.5"), help="encode linear layers as seeds with so many bits per weight"
    )
    group.add_argument(
        "--keep",
        metavar="NAME,…[:BITS]",
        type=keep,
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
    add(group, [TRUST_REMOTE_CODE, IGNORE_KEYS])
    group.add_argument(
        "--context-limit", metavar="N", type=positive, help="tokens in the context (default: the model's own limit)"
    )
    group.add_argument(
        "--truncate",
        action="store_true",
        help="drop what does not fit into the context: the beginning of a prompt, the oldest turns of a chat",
    )
    add(group, techniques.PRECISION)
    add(group, [PREFILL_STEP])


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
        type=tokens,
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
