"""The options of `mlxeff fit kv-predictor` and `mlxeff fit dynamoe` as data, and their reports in words."""

from .options import IGNORE_KEYS, Option, natural, numbers, option, positive

KV_PREDICTOR: tuple[Option, ...] = (
    option("base", metavar="BASE", help="the base model: a folder, file, name or hub id"),
    option(
        "--aux",
        metavar="SPEC",
        required=True,
        help="the auxiliary model, which reads prompts: lp:0.5 (that fraction of the base's layers, evenly spread), "
        "search:0.5 (that fraction, the layers with the least error), layers:0-9,12 (these layers of the base), a "
        "smaller model, or a configuration of the paper, such as OE1.1B-KVP-C-450M",
    ),
    option("--out", metavar="PAIR", required=True, help="the new folder for the pair"),
    IGNORE_KEYS,
    option("--text", metavar="FILE", help="UTF-8 text to fit on (default: text that the base generates itself)"),
    option("--tokens", metavar="N", type=positive, default=20000, help="tokens to fit on (default %(default)s)"),
    option(
        "--length",
        metavar="N",
        type=positive,
        default=512,
        help="tokens in each piece of the text (default %(default)s)",
    ),
    option(
        "--ridge",
        metavar="X",
        type=float,
        default=1e-5,
        help="strength of the regularisation of the ridge regression (default %(default)s)",
    ),
    option(
        "--inputs",
        choices=("hidden", "own"),
        default="hidden",
        help="what the linear maps read from a layer of the auxiliary: hidden, its hidden states; or own, its keys to "
        "predict keys and its values to predict values, as in the paper (default %(default)s)",
    ),
    option(
        "--map-bits",
        type=int,
        choices=(4, 8),
        help="quantise the fitted maps to 4 or 8 bits, affine in groups of 64 or 32: they are smaller, and "
        "`--compute int8` applies to them too (default: dense float16)",
    ),
    option(
        "--per-head",
        action="store_true",
        help="predict each head of the base from one head of the auxiliary (with --inputs own)",
    ),
    option(
        "--search",
        action="store_true",
        help="choose for each layer of the base the layer of the auxiliary that predicts it with the least error",
    ),
    option(
        "--steps",
        metavar="N",
        type=natural,
        default=0,
        help="steps of gradient training after the closed form of ridge regression (default %(default)s)",
    ),
    option(
        "--train",
        choices=("predictor", "lora", "full"),
        default="predictor",
        help="what the steps train: predictor, the linear maps only; lora, also low-rank terms added to the matrices "
        "of the auxiliary; full, also all weights of its layers (default %(default)s)",
    ),
    option(
        "--train-text",
        metavar="FILE",
        help="UTF-8 text for the steps, read as a whole (default: the text for the closed form)",
    ),
    option(
        "--loss",
        choices=("paper", "distill"),
        default="paper",
        help="loss of the steps: paper, the paper's loss, which fits the text; or distill, the KL divergence from the "
        "base's own predictions of the tokens after a predicted prompt (default %(default)s)",
    ),
    option(
        "--continuation",
        metavar="N",
        type=positive,
        help="number of tokens after a prompt that --loss distill compares (default 64)",
    ),
    option(
        "--prompt-mark",
        metavar="TEXT",
        help="a mark in the --train-text where prompts end, which itself is not part of the text: every other step of "
        "--loss distill uses only prompts that end there (default: prompts end anywhere)",
    ),
    option("--rank", metavar="R", type=positive, help="rank of the low-rank terms of --train lora (default 16)"),
    option(
        "--aux-loss",
        metavar="X",
        type=float,
        help="weight of the auxiliary's own next-token loss with --train lora or full; steps with 0 are cheaper "
        "(default 1)",
    ),
    option("--batch", metavar="N", type=positive, help="pieces of the text in each step (default 1)"),
    option("--rate", metavar="X", type=float, help="highest learning rate of the steps (default 3e-4)"),
    option(
        "--seed",
        metavar="N",
        type=natural,
        default=0,
        help="seed of the text that the base generates, and of the steps (default %(default)s)",
    ),
)


def kv_predictor_lines(report: dict) -> list[str]:
    """The report of `fit_kv_predictor` as lines for people."""
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


DYNAMOE: tuple[Option, ...] = (
    option("model", metavar="MODEL", help="the dense model: a folder, file, name or hub id"),
    option("--out", metavar="DYN", required=True, help="the new folder for the DynaMoE model"),
    IGNORE_KEYS,
    option(
        "--by",
        choices=("experts", "inputs"),
        default="experts",
        help="experts, each token takes one of several nested experts; inputs, each token leaves out those inputs of "
        "the matrices that matter least for it, which loses less and needs weights of 4, 8 or 16 bits "
        "(default %(default)s)",
    ),
    option(
        "--widths",
        metavar="W,…",
        type=numbers,
        default=[1 / 3, 2 / 3],
        help="how many neurons of a feed-forward network the smaller experts have, rising: shares of all, which are "
        "rounded to multiples of 512 or of the largest smaller power of two that fits, or numbers above 1 "
        "(default 1/3 and 2/3)",
    ),
    option(
        "--down",
        choices=("own", "low-rank", "shared"),
        default="own",
        help="down-projections of the smaller experts: own, refitted matrices of their own; low-rank, terms of that "
        "rank added to the whole one's first columns; shared, those columns as they are (default %(default)s)",
    ),
    option("--rank", metavar="R", type=positive, help="rank of --down low-rank (default 64)"),
    option(
        "--router",
        choices=("regression", "paper"),
        default="regression",
        help="regression, a token takes the expert with the least sum of predicted error and price; paper, the "
        "smallest expert that suffices with enough probability (default %(default)s)",
    ),
    option(
        "--threshold",
        metavar="X",
        type=float,
        help="of --router paper: the share of the whole network's output on which an expert's must reach to suffice "
        "(default 0.8)",
    ),
    option("--text", metavar="FILE", help="UTF-8 text to fit on (default: a text that comes with the package)"),
    option("--tokens", metavar="N", type=positive, default=32768, help="tokens to fit on (default %(default)s)"),
    option(
        "--tune",
        metavar="TOKENS",
        type=positive,
        help="train the smaller experts after that on so many tokens of the text, towards the dense model's "
        "predictions; not with --down shared (default: no training)",
    ),
    option(
        "--seed",
        metavar="N",
        type=natural,
        default=0,
        help="seed of the tokens that are drawn to weigh errors, and of the tuning (default %(default)s)",
    ),
)


def dynamoe_lines(report: dict) -> list[str]:
    """The report of `fit_dynamoe` as lines for people."""
    fitted = f"fitted on {report['tokens']} tokens in {report['seconds']:.0f} s"
    runs = "mlxeff generate --model DYN --sensitivity S runs it: S is the mean share of the neurons that tokens compute"
    if report["by"] == "inputs":
        return [f"{report['out']}: {fitted}", runs]
    explained = [value for layer in report["explained"] for value in layer]
    what = "variance of the errors" if report["router"] == "regression" else "labels"
    widths = ", ".join(str(width) for width in report["widths"][0])
    predicted = f"the routers predict {sum(explained) / len(explained):.0%} of the {what}"
    more = f"{report['added_bytes'] / 1e6:.1f} MB more than the dense model"
    tuned = []
    if (tuning := report["tuning"]) is not None:
        rows = zip(tuning["sensitivities"], tuning["kl_before"], tuning["kl_after"], strict=True)
        changes = ", ".join(f"{before:.3g} → {after:.3g} at {sensitivity:g}" for sensitivity, before, after in rows)
        spent = f"{tuning['tokens']} tokens in {tuning['seconds']:.0f} s"
        tuned = [f"tuning: {spent}; divergence from the dense model on {tuning['held_out']} others: {changes}"]
    return [
        *tuned,
        f"{report['out']}: {fitted}; experts of {widths} neurons in the first layer; {predicted}; {more}",
        runs,
    ]
