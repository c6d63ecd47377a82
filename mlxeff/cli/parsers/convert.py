"""The options of `mlxeff convert`."""

from ...assembly.options import IGNORE_KEYS, OFFLINE, positive
from .common import add
from .parser import Parser
from .values import keep, quantize


def add_convert(parser: Parser) -> None:
    parser.add_argument("src", metavar="SRC", help="a folder, a file (.gguf .safetensors .pt .bin), a name or hub id")
    parser.add_argument("dst", metavar="DST", help="the new folder")
    form = parser.add_argument_group("form of the new weights")
    form.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="float type of the new weights (default: as stored)"
    )
    form.add_argument(
        "--quantize",
        metavar="BITS[:GROUP]",
        type=quantize,
        help="quantise matrices to BITS, affine in groups of GROUP weights (default 64), as in 4 or 4:32; or by a "
        "recipe of two widths: mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6",
    )
    form.add_argument(
        "--dequantize", action="store_true", help="write dense weights for quantised and seed-encoded ones"
    )
    form.add_argument(
        "--export-dense",
        action="store_true",
        help="of a DynaMoE checkpoint: write the dense model that it was made of, which stock mlx-lm loads",
    )
    form.add_argument("--tokenizer", metavar="PATH", help="tokenizer folder or file (default: beside the weights)")
    add(form, [IGNORE_KEYS])
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
    add(parser, [OFFLINE])
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report; warnings still show")
