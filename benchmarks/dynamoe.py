"""DynaMoE: quality and speed at each mean share of the feed-forward neurons, beside static widths and its rivals.

    python benchmarks/dynamoe.py [--save] [--phase quality speed] [--arms NAME ...] [--windows 16] [--add]
    python benchmarks/dynamoe.py --report [FILE]

quality  windows of 512 tokens of `data/jargon-validation.txt`. "all": every token at the share. "after": the first
         256 tokens are read with all neurons, and the others at the share, as GRIFFIN needs it. The reference is the
         dense model. "share" is that of the feed-forward weights which tokens compute, of our own arms as it was
         counted; "bytes" is the share of the bytes that kernels read for it: who leaves out inputs of quantised weights
         still reads all scales
speed    the native decoder at each sensitivity and the dense model, taking turns: tokens a second in decoding after a
         short prompt, bytes of feed-forward weights a token as the kernels counted them, and how much of the time is
         saved that the bytes predict: those of all weights that a token reads

The models are fitted on the package's calibration text, which is another one, by `fit_dynamoe` under --work, and used
again; that takes some minutes a piece.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlxeff.convert import convert

import ffn_rivals
import plan_ahead
import saving
from distributions import compare, means
from mlxeff import calibration, fit_dynamoe, hub
from mlxeff.assembly.model import Loaded, build_model, load_path
from mlxeff.bench.tables import table
from mlxeff.decode import PlainReading, prefill
from mlxeff.dynamoe.install import of
from mlxeff.dynamoe.sparse import SparseFeedForward
from mlxeff.dynamoe.usage import CountedReading
from mlxeff.models.decoder import DecoderModel
from mlxeff.ops import log_softmax
from mlxeff.running import EXACT, RunOptions
from mlxeff.speculation.drafters import weight_bytes
from peers import card
from places import TEXT, work_folder

SECTION = "dynamoe"  # of RESULTS.md
WINDOW, PROMPT = 512, 256
SHARES = (0.95, 0.9, 0.8, 0.65, 0.5)
# Name of an arm → options of its fit.
FITS = {
    "DynaMoE": {},
    "by inputs": {"by": "inputs"},
    "low-rank 64": {"down": "low-rank"},
    "no refit": {"down": "shared"},
    "paper's router": {"router": "paper"},
    "tuned": {"tune": 32768},
}
STATIC, PLANNED = "static widths", "plan-ahead router"
NAMES = [*FITS, STATIC, PLANNED, *ffn_rivals.RIVALS]
PLAN_TOKENS = 16384  # that the plan-ahead router is fitted on
SENSITIVITIES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.0)
NORMAL = statistics.NormalDist()
CLEAR = 0.1  # share of the bytes that must be saved, so that the time tells more than its noise
WORDS = "The history of the computer begins with"  # of the speed
SHAPES = {  # of models with random weights
    "Llama 3.2 1B's shape": {
        "model_type": "llama", "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "quantization": {"group_size": 64, "bits": 4},
    },
}  # fmt: skip


def fitted(name: str, source: Path, work: Path, **more) -> Path:
    """The folder of a fitted model, which is made if it is not there."""
    folder = work / "-".join(name.replace("'", "").split())
    if not folder.exists():
        print(f"fitting {name}", file=sys.stderr)
        work.mkdir(parents=True, exist_ok=True)
        report = fit_dynamoe(str(source), folder, **(FITS.get(name, {}) | more))
        (work / f"{folder.name}.json").write_text(json.dumps(report))
    return folder


# Quality


class Truth:
    """Log-probabilities of the dense model in windows (W, T)."""

    def __init__(self, model: DecoderModel, windows: np.ndarray):
        self.windows = windows
        self._hidden = []
        for window in windows:
            self._hidden.append(model.hidden(mx.array(window)[None], model.new_cache())[0, :-1])
            mx.eval(self._hidden[-1])
        self.head = model.head

    def compared(self, found: Iterator[mx.array], start: int) -> dict:
        """How the log-probabilities of each window from token `start` on compare with the dense model's."""
        rows = []
        for window, hidden, log_probabilities in zip(self.windows, self._hidden, found, strict=True):
            true = log_softmax(self.head(hidden[start:]))
            rows.append(compare(log_probabilities, true, window[start + 1 :]))
        return means(rows)


def log_probabilities(
    model: DecoderModel, windows: np.ndarray, options: RunOptions, start: int, between: Callable = lambda _: None
) -> Iterator[mx.array]:
    """Log-probabilities of each window from token `start` on. The tokens before it are read with all neurons;
    `between` is called with whether what follows is to be computed at the share."""
    for window in windows:
        cache = model.new_cache()
        between(False)
        if start:
            mx.eval(prefill(model, cache, mx.array(window[:start]), WINDOW))
        between(True)
        logits = model(mx.array(window[None, start:]), cache, options)[0, :-1]
        mx.eval(logits)
        yield log_softmax(logits)


def taken(model: DecoderModel, options: RunOptions) -> CountedReading:
    """Counts what share of the neurons the tokens compute from now on."""
    return CountedReading(PlainReading(), of(model), options.fraction, lambda: model.native and model.native.usage)


class Share:
    """The mean share of the neurons that tokens compute while it is on."""

    def __init__(self, model: DecoderModel, options: RunOptions):
        self._new, self._counted = (lambda: taken(model, options)), None
        self._shares: list[tuple[float, int]] = []

    def switch(self, on: bool) -> None:
        if self._counted is not None:
            report = self._counted.report()["dynamoe"]
            self._shares.append((report["mean_fraction"], report["tokens"]))
        self._counted = self._new() if on else None

    def mean(self) -> float:
        self.switch(False)
        return sum(share * tokens for share, tokens in self._shares) / sum(tokens for _, tokens in self._shares)


def own_rows(truth: Truth, model: DecoderModel, shares: tuple[float, ...]) -> Iterator[dict]:
    """The measurements of a fitted model."""
    networks = of(model)
    if any(isinstance(network, SparseFeedForward) for network in networks):
        model.native = None  # which leaves out inputs of few tokens only
        for network in networks:
            network.most_sparse = WINDOW
    for share in shares:
        options = RunOptions(fraction=share)
        for mode, start in (("all", 0), ("after", PROMPT)):
            counted = Share(model, options)
            found = truth.compared(log_probabilities(model, truth.windows, options, start, counted.switch), start)
            taken_share = counted.mean()
            read = [sum(each.read_bytes(part) for each in networks) for part in (taken_share, 1.0)]
            shares_of = {"share": round(taken_share, 4), "bytes": round(read[0] / read[1], 4)}
            yield {"wanted": share, **shares_of, "mode": mode, **found}


@contextmanager
def always(model: DecoderModel, number: int) -> Iterator[None]:
    """Let every token take the expert of this number, by routers whose scores do not depend on it."""
    kept = [(network.router.weight, network.router.bias) for network in of(model)]
    for network in of(model):
        rows = network.router.bias.shape[0]
        network.router.weight = mx.zeros_like(network.router.weight)
        network.router.bias = mx.array([-50.0 if each == number else 50.0 for each in range(rows)])
    refresh(model)
    try:
        yield
    finally:
        for network, (weight, bias) in zip(of(model), kept, strict=True):
            network.router.weight, network.router.bias = weight, bias
        refresh(model)


def refresh(model: DecoderModel) -> None:
    """Give the native decoder the routers as they are."""
    if model.native is not None:
        model.use_native()


def static_rows(truth: Truth, model: DecoderModel) -> Iterator[dict]:
    """The measurements of the smaller experts, each for all tokens."""
    for number, width in enumerate(of(model)[0].widths[:-1]):
        share = width / of(model)[0].widths[-1]
        with always(model, number):
            for mode, start in (("all", 0), ("after", PROMPT)):
                found = truth.compared(log_probabilities(model, truth.windows, RunOptions(fraction=0.9), start), start)
                shares_of = dict.fromkeys(("wanted", "share", "bytes"), round(share, 4))
                yield {**shares_of, "mode": mode, **found}


def planned_rows(truth: Truth, dense: Loaded, folder: Path, shares: tuple[float, ...]) -> Iterator[dict]:
    """The measurements of the fitted model with a plan-ahead router in place of its own."""
    model = load_path(folder).model
    model.native = None
    text, _ = calibration.read_text(None)
    ids = calibration.windows(text, dense.tokenizer, PLAN_TOKENS, "text", dense.model.vocab_size)
    planner = plan_ahead.Planner(model, dense.model, ids)
    print(f"the router predicts {np.mean(planner.explained):.1%} of the errors' variance", file=sys.stderr)
    for share in shares:
        for mode, start in (("all", 0), ("after", PROMPT)):
            taken_shares: list[float] = []
            planned = plan_ahead.plans(planner, dense.model, truth.windows, share)

            def follow(follows: bool, planned=planned, start=start, taken_shares=taken_shares) -> None:
                if follows:
                    taken_shares.append(planner.follow(next(planned), start))

            options = RunOptions(fraction=share)
            found = truth.compared(log_probabilities(model, truth.windows, options, start, follow), start)
            read = dict.fromkeys(("share", "bytes"), round(float(np.mean(taken_shares)), 4))
            yield {"wanted": share, **read, "mode": mode, **found}


def scale_share(model: DecoderModel) -> float:
    """The share of the bytes of the feed-forward weights that are scales and biases of quantised groups."""
    names = [
        (name, array.nbytes) for layer in model.layers for name, array in tree_flatten(layer.feed_forward.parameters())
    ]
    return sum(size for name, size in names if name.endswith((".scales", ".biases"))) / sum(size for _, size in names)


def rival_rows(truth: Truth, source: Path, kind: str, shares: tuple[float, ...]) -> Iterator[dict]:
    """The measurements of a rival."""
    model = load_path(source).model
    networks = ffn_rivals.replace_all(model, kind)
    scales = scale_share(load_path(source).model) if issubclass(ffn_rivals.RIVALS[kind], ffn_rivals.Teal) else 0.0
    modes = [("after", PROMPT)] + ([] if kind == "griffin" else [("all", 0)])
    for share in shares:
        set_share = lambda follows, share=share: ffn_rivals.keep(networks, share if follows else 1.0)  # noqa: E731
        for mode, start in modes:
            found = truth.compared(log_probabilities(model, truth.windows, EXACT, start, set_share), start)
            read = {"share": share, "bytes": round(scales + (1 - scales) * share, 4)}
            yield {"wanted": share, **read, "mode": mode, **found}


def quality(options: argparse.Namespace, source: Path, document: dict, save: Callable[[], None]) -> None:
    """Measure the arms that the document lacks."""
    missing = [name for name in options.arms if name not in document["arms"]]
    if not missing:
        return
    dense = load_path(source)
    ids = dense.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    places = np.linspace(0, len(ids) - WINDOW, options.windows).astype(int)
    windows = np.stack([np.array(ids[place : place + WINDOW], np.int32) for place in places])
    truth = Truth(dense.model, windows)
    document["windows"] = len(windows)
    document["dense"] = {
        mode: truth.compared(log_probabilities(dense.model, windows, EXACT, start), start)
        for mode, start in (("all", 0), ("after", PROMPT))
    }
    for name in missing:
        print(name, file=sys.stderr)
        if name in ffn_rivals.RIVALS:
            rows = rival_rows(truth, source, name, SHARES)
        elif name == PLANNED:
            rows = planned_rows(truth, dense, fitted("DynaMoE", source, options.work), SHARES)
        else:
            model = load_path(fitted(name if name in FITS else "DynaMoE", source, options.work)).model
            rows = static_rows(truth, model) if name == STATIC else own_rows(truth, model, SHARES)
        document["arms"][name] = []
        for row in rows:
            print(row, file=sys.stderr)
            document["arms"][name].append(row)
        save()


# Speed


class Stopwatch:
    """Seconds of decoded tokens, and bytes of feed-forward weights a token, of one model and one sensitivity."""

    def __init__(self, model: DecoderModel, ids: list[int], sensitivity: float, steps: int):
        self.model, self.ids, self.steps = model, ids, steps
        self.options = RunOptions(fraction=sensitivity)
        self.seconds: list[float] = []
        self.read, self.share = 0.0, 1.0

    def round(self) -> None:
        """Decode the tokens once more, after the prompt; what is decoded is the prompt's own continuation."""
        cache, model = self.model.new_cache(), self.model
        logits = prefill(model, cache, mx.array(self.ids), WINDOW, options=self.options)
        token = mx.argmax(logits, axis=-1)
        mx.eval(token)
        counted = taken(model, self.options) if of(model) else None
        began = time.perf_counter()
        for _ in range(self.steps):
            token = mx.argmax(model.last_logits(token[None], cache, self.options), axis=-1)
            mx.eval(token)
        self.seconds.append((time.perf_counter() - began) / self.steps)
        if counted is not None:
            report = counted.report()["dynamoe"]
            self.share, self.read = report["mean_fraction"], (report["feed_forward_bytes"] or 0) / self.steps


def dense_bytes(model: DecoderModel) -> tuple[int, int]:
    """(Bytes of the feed-forward weights of a dense model, of all weights that a token reads)."""
    inner = sum(weight_bytes(layer.feed_forward) for layer in model.layers)
    ends = model.end_parts()
    table_is_head = ends.embedding.module is ends.head.module
    return inner, weight_bytes(model) - (0 if table_is_head else weight_bytes(ends.embedding.module))


def speed_rows(
    dense: DecoderModel,
    dynamic: DecoderModel,
    ids: list[int],
    sensitivities: tuple[float, ...],
    rounds: int,
    steps: int,
) -> list[dict]:
    """Medians of interleaved rounds: the dense model, and the dynamic one at each sensitivity."""
    watches = [Stopwatch(dense, ids, 1.0, steps), *(Stopwatch(dynamic, ids, each, steps) for each in sensitivities)]
    for watch in watches:
        watch.round()
        watch.seconds.clear()
    for _ in range(rounds):
        for watch in watches:
            watch.round()
    inner, whole = dense_bytes(dense)
    base = statistics.median(watches[0].seconds)
    rows = [{"arm": "dense", "tps": 1 / base, "feed_forward_bytes": inner, "bytes": whole}]
    for watch in watches[1:]:
        seconds = statistics.median(watch.seconds)
        saved = inner - watch.read
        row = {"arm": f"sensitivity {watch.options.fraction:g}", "tps": 1 / seconds, "share": watch.share}
        row |= {"feed_forward_bytes": watch.read, "bytes": whole - saved, "time": seconds / base}
        row["of_predicted"] = (1 - seconds / base) / (saved / whole) if saved / whole > 0.02 else None
        rows.append(row)
    return rows


def prefill_rows(
    dense: DecoderModel, dynamic: DecoderModel, ids: list[int], sensitivities: tuple[float, ...], rounds: int
) -> list[dict]:
    """Tokens a second of a prompt of `ids`, medians of interleaved rounds."""
    arms = [("dense", dense, 1.0), *((f"sensitivity {each:g}", dynamic, each) for each in sensitivities)]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in arms}
    for number in range(rounds + 1):
        for name, model, sensitivity in arms:
            began = time.perf_counter()
            mx.eval(prefill(model, model.new_cache(), mx.array(ids), WINDOW, options=RunOptions(fraction=sensitivity)))
            if number:
                seconds[name].append(time.perf_counter() - began)
    return [{"arm": name, "tps": len(ids) / statistics.median(each)} for name, each in seconds.items()]


def randomise(model: DecoderModel) -> None:
    """Give the quantised layers random codes, with scales that keep the sums small."""
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            module.weight = mx.random.randint(0, 1 << 31, module.weight.shape).astype(mx.uint32)
            module.scales = mx.full(module.scales.shape, 1e-3, mx.float16)
            module.biases = mx.full(module.biases.shape, -8e-3, mx.float16)


def shaped(config: dict, shares: tuple[float, ...]) -> tuple[DecoderModel, DecoderModel]:
    """(A dense model, a dynamic one) of random weights in 4 bits with the sizes of `config`."""
    full = config["intermediate_size"]
    widths = [*(round(share * full / 512) * 512 for share in shares), full]
    entry = {"version": 1, "widths": [widths] * config["num_hidden_layers"], "down": "own", "rule": "lagrangian"}
    models = []
    for more in ({}, {"dynamoe": entry | {"table": [[0.4, 1.0]]}}):
        model = build_model(config | more)
        randomise(model)
        mx.eval(model.parameters())
        model.eval()
        model.use_native()
        models.append(model)
    return tuple(models)


def shaped_by_inputs(config: dict) -> DecoderModel:
    """A model of random weights in 4 bits with the sizes of `config`, which leaves out inputs. The values of its
    neurons are scaled so that about the same share of them counts as of the inputs of gate and up, which are those of
    a normal distribution."""
    form = [[config["quantization"]["bits"], config["quantization"]["group_size"]]] * config["num_hidden_layers"]
    table = [[share, NORMAL.inv_cdf(1 - share / 2)] for share in sorted(SENSITIVITIES[1:-1])]
    entry = {"version": 1, "by": "inputs", "gate_up": form, "down": form, "table": table}
    model = build_model(config | {"dynamoe": entry})
    randomise(model)
    for network in of(model):
        for part in (network.gate_up, network.down):
            part.weight = mx.random.randint(0, 1 << 31, part.weight.shape).astype(mx.uint32)
            part.scales = mx.full(part.scales.shape, 1e-3, mx.float16)
            part.biases = mx.full(part.biases.shape, -8e-3, mx.float16)
            part.align()
        sizes = mx.abs(network.neurons(mx.random.normal((8, network.gate_up.inputs))))
        middle = mx.sort(sizes.reshape(-1))[sizes.size // 2]
        network.neuron_weights = mx.full(network.neuron_weights.shape, NORMAL.inv_cdf(0.75) / middle.item())
    mx.eval(model.parameters())
    model.eval()
    model.use_native()
    return model


def forced(dense: DecoderModel, dynamic: DecoderModel, ids: list[int], rounds: int, steps: int) -> list[dict]:
    """As `speed_rows`, where all tokens take the same expert."""
    rows = []
    for number in range(len(of(dynamic)[0].widths) - 1):
        with always(dynamic, number):
            found = speed_rows(dense, dynamic, ids, (0.4,), rounds, steps)
        rows += found[:1] * (not rows) + [found[1] | {"arm": f"expert {number + 1} for all"}]
    return rows


def speed(options: argparse.Namespace, source: Path, document: dict, save: Callable[[], None]) -> None:
    """Measure the speed with the weights of the source, in float16, and of a large model's shape."""
    loaded = load_path(source)
    ids = loaded.tokenizer.encode(WORDS)
    long = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)[: options.prompt]
    dynamic = load_path(fitted("DynaMoE", source, options.work)).model
    found = document.setdefault("speed", {})
    found["weights of 4 bits"] = speed_rows(loaded.model, dynamic, ids, SENSITIVITIES, options.rounds, options.steps)
    document["prefill"] = prefill_rows(loaded.model, dynamic, long, SENSITIVITIES, max(2, options.rounds // 2))
    by_inputs = load_path(fitted("by inputs", source, options.work)).model
    few = SENSITIVITIES[:-1]
    found["weights of 4 bits, by inputs"] = speed_rows(loaded.model, by_inputs, ids, few, options.rounds, options.steps)
    save()
    half = options.work / "float16"
    if not half.exists():
        convert(source, half, dequantize=True, dtype="float16")
    wide, dynamic = load_path(half).model, load_path(fitted("float16-DynaMoE", half, options.work, tokens=4096)).model
    found["weights of 16 bits"] = speed_rows(wide, dynamic, ids, SENSITIVITIES, options.rounds, options.steps)
    by_inputs = load_path(fitted("float16-by-inputs", half, options.work, tokens=4096, by="inputs")).model
    found["weights of 16 bits, by inputs"] = speed_rows(wide, by_inputs, ids, few, options.rounds, options.steps)
    save()
    for name, config in SHAPES.items():
        models = shaped(config, (1 / 3, 2 / 3))
        steps = max(4, options.steps // 8)
        found[name] = forced(*models, ids, options.rounds, steps)
        by_inputs = shaped_by_inputs(config)
        found[f"{name}, by inputs"] = speed_rows(models[0], by_inputs, ids, few, options.rounds, steps)
        save()


# The report


def quality_table(document: dict, mode: str) -> str:
    dense = document["dense"][mode]
    rows = [["dense", "1.000", "1.000", f"{dense['perplexity']:.2f}", "", "0", "100 %"]]
    for name, measured in document["arms"].items():
        for row in measured:
            if row["mode"] != mode:
                continue
            worse = row["perplexity"] / dense["perplexity"] - 1
            numbers = [f"{row['perplexity']:.2f}", f"{worse:+.1%}", f"{row['kl']:.4f}", f"{row['agreement']:.1%}"]
            rows.append([name, f"{row['share']:.3f}", f"{row.get('bytes', row['share']):.3f}", *numbers])
    return table(["", "share", "bytes", "perplexity", "", "KL", "same first choice"], rows)


def speed_table(rows: list[dict]) -> str:
    lines, whole = [], rows[0]["bytes"]
    for row in rows:
        share = f"{row['share']:.3f}" if "share" in row else ""
        known = row.get("of_predicted") is not None and row["bytes"] < (1 - CLEAR) * whole
        of_predicted = f"{row['of_predicted']:.0%}" if known else ""
        megabytes = [f"{row[key] / 1e6:.1f}" for key in ("feed_forward_bytes", "bytes")]
        lines.append([row["arm"], share, f"{row['tps']:.1f}", *megabytes, f"{row.get('time', 1):.3f}", of_predicted])
    return table(["", "share", "tokens/s", "MB feed-forward", "MB in all", "time", "of what the bytes predict"], lines)


def text(document: dict) -> str:
    """The section of RESULTS.md."""
    own = document["card"]
    parts = [f"{own['cpu']}, {own['cores']} cores, MLX {own['mlx']}: `{own['command']}`"]
    if "dense" in document:
        parts += [
            f"Every token of {document['windows']} windows of {WINDOW} tokens at the share:",
            quality_table(document, "all"),
            f"The first {PROMPT} tokens of each window read with all neurons, what follows at the share:",
            quality_table(document, "after"),
        ]
    for name, rows in document.get("speed", {}).items():
        parts += [f"Decoding, {name}:", speed_table(rows)]
    if "prefill" in document:
        rows = [[row["arm"], f"{row['tps']:.0f}"] for row in document["prefill"]]
        parts += ["Reading a prompt, weights of 4 bits:", table(["", "tokens/s"], rows)]
    return "\n\n".join(parts)


def stem() -> Path:
    """The path, without extension, of this machine's result."""
    return saving.result_path(card.machine()["cpu"], SECTION)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--phase", nargs="+", default=["quality", "speed"], choices=("quality", "speed"))
    parser.add_argument("--arms", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens of a round")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--work", type=Path, default=work_folder("dynamoe"))
    parser.add_argument("--add", action="store_true", help="keep what the saved result has")
    parser.add_argument("--save", action="store_true", help="write results/<processor>-dynamoe.json")
    saving.add_report(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    path = stem().with_suffix(".json")
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or path).resolve(), text)
        return
    source = hub.resolve(options.model)
    document = saving.read_json(path) if options.add and path.exists() else {"arms": {}}
    document["card"] = card.identity() | {"command": saving.command()}
    save = (lambda: saving.write_json(document, path)) if options.save else (lambda: None)
    if "quality" in options.phase:
        quality(options, source, document, save)
    if "speed" in options.phase:
        speed(options, source, document, save)
    print(text(document))
    save()


if __name__ == "__main__":
    main()
