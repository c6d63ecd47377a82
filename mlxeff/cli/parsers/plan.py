"""The options of `mlxeff plan`."""

import argparse

from ...assembly.options import IGNORE_KEYS, OFFLINE, PREFILL_STEP, names, positive
from .common import add, add_end
from .parser import Parser
from .values import above_zero, naturals, numbers, probability, shares, version


def add_plan(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a config.json, a .gguf file, a name, or a hub id, of which config.json alone is fetched",
    )
    _add_machine(parser.add_argument_group("machine"))
    _add_compared(parser.add_argument_group("what is compared"))
    shown = parser.add_argument_group("result")
    shown.add_argument("--explain", action="store_true", help="show bytes and FLOPs of each layer too")
    result = shown.add_mutually_exclusive_group()
    result.add_argument(
        "--calibrate",
        metavar="RESULT.json",
        help="fit this machine's constants to a result of `mlxeff bench ttft MODEL --json`, and keep them",
    )
    result.add_argument(
        "--score", metavar="RESULT.json", help="compare predictions with such a result: the error of each point"
    )
    add(parser, [IGNORE_KEYS, OFFLINE])
    add_end(parser, "print one JSON document")


def _add_machine(machine: argparse._ArgumentGroup) -> None:
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


def _add_compared(what: argparse._ArgumentGroup) -> None:
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
