"""The options of each verb. Parses and describes; imports nothing that is slow, so that --help is quick. Those of a
technique stand in `assembly.techniques`.
"""

import argparse
from collections.abc import Iterable

from ..assembly import techniques
from ..assembly.options import Option, integer, natural, positive
from ..hub.catalog import DEFAULT_MODEL

MAX_TOKENS = 1024


def _add(parser: argparse._ActionsContainer, options: Iterable[Option], **more) -> None:
    for option in options:
        parser.add_argument(option.name, **option.keywords | more)


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the prompt; - or nothing reads standard input")
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    _add_model(parser)
    _add_text(parser)
    parser.add_argument("--raw", action="store_true", help="the prompt as it is, without the model's chat template")
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="reuse the KV cache in FILE as far as the prompt agrees with it, and write it back with this prompt",
    )
    _add(parser, (technique.option for technique in techniques.switched_for("generate")))
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end instead of streaming")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no timings; warnings still show")


def add_fit(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for fitted in techniques.FITTED:
        summary = fitted.summary
        sub = what.add_parser(fitted.name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        _add(sub, fitted.options)
        sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: the GPU if any")
        sub.add_argument("--offline", action="store_true", help="never touch the network")
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--quiet", action="store_true", help="no progress bar, no report; warnings still show")


def add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_text(parser)
    parser.add_argument("--resume", metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no greeting; warnings still show")


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    summary = "seconds to the first token: of a model, of its pairs of KV Prediction, or of that paper's models"
    sub = what.add_parser("ttft", help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
    sub.add_argument("model", nargs="?", metavar="MODEL", help="a folder, file, name or hub id")
    for technique in techniques.switched_for("bench ttft"):
        again = {"action": "append", "default": [], "help": "measure MODEL with this beside it (repeatable)"}
        _add(sub, [technique.option], **again)
    sub.add_argument(
        "--suite",
        choices=("kvp-paper",),
        help="in place of MODEL: OpenELM 1.1B and 3B, smaller ones, layer-pruned ones and the paper's eleven pairs, "
        "batch 1, 4, 8 x 64 to 1024 tokens and 64 x 59, on CPU and GPU, beside the published numbers",
    )
    sub.add_argument("--prompt-lengths", metavar="N,…", type=_numbers, help="tokens (default 128,512,2048)")
    sub.add_argument("--batch", metavar="B,…", type=_numbers, default=(1,), help="prompts at once (default 1)")
    sub.add_argument(
        "--only",
        metavar="KEY=VALUE",
        type=_filter,
        nargs="+",
        action="extend",
        default=[],
        help="a part: arm (by a part of its name), device, batch, tokens; one key several times: any of its values",
    )
    sub.add_argument("--rounds", metavar="N", type=positive, default=3, help="passes counted (default %(default)s)")
    sub.add_argument("--warmup", metavar="N", type=natural, default=1, help="passes before (default %(default)s)")
    sub.add_argument("--steps", metavar="N", type=natural, default=4, help="decode steps a pass (default %(default)s)")
    sub.add_argument("--out", metavar="FILE", help="keep every sample in FILE; the same command goes on from there")
    _add_bench_machine(sub)
    sub.add_argument("--offline", action="store_true", help="never touch the network")
    sub.add_argument("--json", action="store_true", help="print one JSON document with every sample")
    sub.add_argument("--quiet", action="store_true", help="no progress lines; warnings still show")


def _add_bench_machine(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: the GPU if any; the suite: every one"
    )
    sub.add_argument("--threads", metavar="N", type=positive, help="of the CPU kernels (default: one a core)")
    _add(sub, techniques.PRECISION)
    sub.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="of the suite's random weights (default float16)"
    )
    sub.add_argument(
        "--checkpoint",
        metavar="SIZE=MODEL",
        type=_checkpoint,
        action="append",
        default=[],
        help="the suite's OpenELM of SIZE (270M, 450M, 1.1B, 3B) in place of random weights (repeatable)",
    )
    sub.add_argument("--prefill-step", metavar="N", type=positive, help="prompt tokens a chunk (2048 GPU, 512 CPU)")
    sub.add_argument(
        "--memory", metavar="GB", type=float, help="to use (default: most of what is free); what needs more is left out"
    )


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a folder, a file (.gguf .safetensors .pt .bin), a name or hub id")
    parser.add_argument("dst", metavar="DST", help="the new folder")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="float type (default: as stored)")
    parser.add_argument("--quantize", metavar="BITS[:GROUP]", type=_quantize, help="affine, e.g. 4 or 4:32 (group 64)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer folder or file (default: beside the weights)")
    group = parser.add_argument_group("SeedLM")
    group.add_argument("--seedlm", choices=("3", "4", "4.5"), help="linear layers as seeds: this many bits a weight")
    group.add_argument(
        "--keep",
        metavar="NAME,…[:BITS]",
        type=_keep,
        action="append",
        help="layers, by parts of their names, that stay affine-quantised, 8 bits by default, 16: as stored; "
        "none: encode all (default: embed,lm_head:8; repeatable)",
    )
    group.add_argument("--calibrate", metavar="FILE", help="text to weigh errors by (default: the package has one)")
    group.add_argument("--calibration-tokens", metavar="N", type=positive, help="of that text (default: 32768)")
    group.add_argument("--data-free", action="store_true", help="no text: the blocks nearest to the weights")
    parser.add_argument("--dry-run", action="store_true", help="only report names, shapes, types, disk and memory")
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
    group.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: the GPU if any")
    group.add_argument("--offline", action="store_true", help="never touch the network")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="let mlx-lm run Python code that the model folder brings"
    )
    group.add_argument("--context-limit", metavar="N", type=positive, help="tokens (default: the model's own)")
    group.add_argument("--truncate", action="store_true", help="drop the beginning of what is longer than the context")
    _add(group, techniques.PRECISION)
    group.add_argument("--prefill-step", metavar="N", type=positive, help="prompt tokens a chunk (2048 GPU, 512 CPU)")


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument(
        "--max-tokens", metavar="N", type=_tokens, default=MAX_TOKENS, help="default %(default)s; -1: to the context"
    )
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before TEXT (repeatable)")
    group.add_argument("--temp", type=float, default=0.0, help="sampling temperature; 0, the default, is greedy")
    group.add_argument("--top-p", type=float, default=0.0, help="keep the most probable tokens of mass P; 0: off")
    group.add_argument("--top-k", type=int, default=0, help="keep the K most probable tokens; 0: off")
    group.add_argument("--min-p", type=float, default=0.0, help="keep tokens of P times the best; 0: off")
    group.add_argument("--repetition-penalty", metavar="X", type=float, help="divide logits of the last 20 tokens")
    group.add_argument(
        "--seed",
        type=natural,
        help="of the sampling; same seed, same words, but for a rare one where a cache holds the prompt's beginning "
        "(default: random)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    """ "1,8" → (1, 8)."""
    return tuple(positive(part) for part in text.split(","))


def _filter(text: str) -> str:
    key, equals, value = text.partition("=")
    if key not in ("arm", "device", "batch", "tokens") or not equals or not value:
        raise argparse.ArgumentTypeError(f"wanted KEY=VALUE with a KEY of arm, device, batch, tokens, got {text!r}")
    return text


def _checkpoint(text: str) -> tuple[str, str]:
    size, equals, model = text.partition("=")
    if size not in ("270M", "450M", "1.1B", "3B") or not equals or not model:
        raise argparse.ArgumentTypeError(f"wanted SIZE=MODEL with a SIZE of 270M, 450M, 1.1B, 3B, got {text!r}")
    return size, model


def _quantize(text: str) -> tuple[int, int]:
    bits, _, group = text.partition(":")
    try:
        return int(bits), int(group or 64)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted BITS or BITS:GROUP, got {text!r}") from None


def _keep(text: str) -> tuple[tuple[str, int], ...]:
    if text == "none":
        return ()
    names, colon, bits = text.rpartition(":")
    try:
        found = tuple((name.strip(), int(bits)) for name in names.split(",")) if colon else _keep(f"{text}:8")
    except ValueError:
        found = ()
    if not found or not all(name for name, _ in found):
        raise argparse.ArgumentTypeError(f"wanted NAME,…[:BITS] or none, got {text!r}")
    return found


def _tokens(text: str) -> int:
    return integer(text, lambda n: n > 0 or n == -1, "a whole number above 0, or -1")
