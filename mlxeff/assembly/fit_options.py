"""The options of each thing that `mlxeff fit` can fit, as data, and how its report is put into words."""

from .options import Option, natural, option, positive

KV_PREDICTOR: tuple[Option, ...] = (
    option("base", metavar="BASE", help="the base model: a folder, file, name or hub id"),
    option(
        "--aux",
        metavar="SPEC",
        required=True,
        help="lp:0.5 (a fraction of the base's layers, evenly spread), search:0.5 (those that serve best), "
        "layers:0-9,12 (these), a smaller model, or a configuration of the paper, such as OE1.1B-KVP-C-450M",
    ),
    option("--out", metavar="PAIR", required=True, help="the new folder"),
    option("--text", metavar="FILE", help="UTF-8 text to fit on (default: what the base writes by itself)"),
    option("--tokens", metavar="N", type=positive, default=20000, help="to fit on (default %(default)s)"),
    option("--length", metavar="N", type=positive, default=512, help="tokens a piece (default %(default)s)"),
    option("--ridge", metavar="X", type=float, default=1e-5, help="regularisation (default %(default)s)"),
    option(
        "--inputs",
        choices=("hidden", "own"),
        default="hidden",
        help="what the maps read of an auxiliary layer: its hidden states, or own: keys for keys, values for values, "
        "as in the paper (default %(default)s)",
    ),
    option(
        "--map-bits",
        type=int,
        choices=(4, 8),
        help="round the fitted maps to 4 or 8 bits, affine in groups of 64 or 32, which makes them smaller and lets "
        "`--compute int8` reach them (default: dense float16)",
    ),
    option("--per-head", action="store_true", help="each base head from one auxiliary head (with --inputs own)"),
    option("--search", action="store_true", help="choose the auxiliary layer of each base layer by its error"),
    option("--steps", metavar="N", type=natural, default=0, help="of gradient training after the closed form"),
    option(
        "--train",
        choices=("predictor", "lora", "full"),
        default="predictor",
        help="what these steps change: the predictor, low-rank terms of the auxiliary's matrices too, or its whole "
        "layers (default %(default)s)",
    ),
    option(
        "--train-text", metavar="FILE", help="UTF-8 text that these steps read, all of it (default: what was fitted on)"
    ),
    option(
        "--loss",
        choices=("paper", "distill"),
        default="paper",
        help="what they minimise: the paper's loss, which fits the text, or how far from the base's is what follows a "
        "predicted prompt (default %(default)s)",
    ),
    option(
        "--continuation",
        metavar="N",
        type=positive,
        help="tokens that --loss distill continues a prompt with (default 64)",
    ),
    option(
        "--prompt-mark",
        metavar="TEXT",
        help="stands in the training text where prompts end, and is not read itself: every other step of --loss "
        "distill has only such prompts, and what follows right after them (default: prompts end anywhere)",
    ),
    option("--rank", metavar="R", type=positive, help="of --train lora (default 16)"),
    option(
        "--aux-loss",
        metavar="X",
        type=float,
        help="weight of a tuned auxiliary's own next-token loss; a step with 0 is cheaper (default 1)",
    ),
    option("--batch", metavar="N", type=positive, help="pieces a step (default 1)"),
    option("--rate", metavar="X", type=float, help="highest learning rate (default 3e-4)"),
    option("--seed", type=natural, default=0, help="of the text that the base writes, and of the training"),
)


def kv_predictor_lines(report: dict) -> list[str]:
    """The report of `fit_kv_predictor` for people."""
    lines = []
    if losses := report["losses"]:
        lines.append(f"training: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    scheme = report["quantization"]
    maps = "{bits} bits in groups of {group_size}".format(**scheme) if scheme else "float16"
    lines.append(
        f"{report['pair']}: fitted on {report['tokens']} tokens in {report['seconds']:.1f} s, unexplained variance "
        f"{report['error']:.3f}, maps of {maps}, "
        f"FLOPs to the first token of 512 {report['flops_ratio']:.2f} of the base's"
    )
    return lines
