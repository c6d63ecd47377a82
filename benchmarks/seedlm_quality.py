"""Quality per bit: SeedLM beside MLX's affine quantisation, on the built-in model.

    python benchmarks/seedlm_quality.py [--tokens 16384] [--arms NAME ...] [--work DIR] [--save]

The reference is the built-in model's Q4_1 file, dequantised. Every arm replaces the linear layers of the decoder and
keeps the reference's embedding. (576 columns are no multiple of 128: there "g128" has groups of 64, and its bits are
counted as they are.) Measured on windows of `data/jargon-validation.txt`: perplexity of the next token, mean
KL divergence of the reference's distribution from the arm's, and how often both have the same first choice.

Since the reference was itself rounded to a 4-bit grid once, the relative error of the outputs of single layers is
measured too, with Gaussian and heavy-tailed weights and correlated inputs, of which the encoder sees other samples.

SeedLM folders are made by `mlxeff.convert` under --work and used again; that takes about ten minutes a piece. The plot
needs matplotlib (`pip install 'mlxeff[benchmarks]'`).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlxeff.convert import convert
from mlxeff.convert.seedlm import dense

from mlxeff import hub
from mlxeff.loading import load_path
from mlxeff.models.fused import fuse
from mlxeff.modules import QuantizedLinear
from mlxeff.ops import log_softmax
from mlxeff.seedlm.encode import encode
from mlxeff.seedlm.format import FORMATS
from mlxeff.seedlm.linear import SeedLinear
from peers import card

HERE = Path(__file__).parent
TEXT = HERE / "data" / "jargon-validation.txt"
WINDOW = 512
AFFINE = {"affine 3 g64": (3, 64), "affine 4 g128": (4, 128), "affine 4 g64": (4, 64), "affine 4 g32": (4, 32)}
SEEDS = {f"SeedLM {bits} {how}": (bits, how == "data-free") for how in ("aware", "data-free") for bits in FORMATS}
TARGETS = (
    ("SeedLM 4.5 aware", "affine 4 g64"),
    ("SeedLM 4 aware", "affine 4 g128"),
    ("SeedLM 3 aware", "affine 3 g64"),
)


def linears(model):
    """(name, module) of the decoder's linear layers, the head left out."""
    kinds = (nn.Linear, nn.QuantizedLinear, SeedLinear)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and ".layers." in name]


def affine_arm(path, bits, group):
    """The reference requantised by MLX, scales in half precision; in smaller groups where these do not divide a row."""
    model, replaced = load_path(path).model, []
    for name, module in linears(model):
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = dense(module).astype(mx.float16)
        fitting = next(size for size in (group, 64, 32) if layer.weight.shape[1] % size == 0)
        replaced.append((name, QuantizedLinear.from_linear(layer, fitting, bits)))
    model.update_modules(tree_unflatten(replaced))
    mx.eval(model.parameters())
    model._fused = None
    if not fuse(model):
        raise SystemExit("the native kernels do not apply here: this benchmark needs them")
    return model


def seed_arm(path, work, name):
    """The converted folder, made where it is not there yet."""
    bits, data_free = SEEDS[name]
    folder = work / name.replace(" ", "-")
    if not folder.exists():
        convert(path, folder, seedlm=bits, data_free=data_free)
    return load_path(folder).model


def size(model):
    """Bits a weight of the linear layers, and bytes of all parameters."""
    held = [(m.rows * m.cols if isinstance(m, SeedLinear) else dense(m).size, m) for _, m in linears(model)]
    bits = sum(8 * sum(a.nbytes for _, a in tree_flatten(m.parameters())) for _, m in held)
    return bits / sum(count for count, _ in held), sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def measure(reference, arms, windows):
    """Arm → sums over all predicted tokens, window after window."""
    sums = {name: np.zeros(3) for name in arms}
    for number, window in enumerate(windows):
        tokens = mx.array(window)
        truth = log_softmax(reference(tokens[None], reference.new_cache())[0, :-1])
        for name, model in arms.items():
            found = truth if model is reference else log_softmax(model(tokens[None], model.new_cache())[0, :-1])
            nll = -mx.take_along_axis(found, tokens[1:, None], axis=-1).sum()
            kl = (mx.exp(truth) * (truth - found)).sum()
            same = (mx.argmax(found, axis=-1) == mx.argmax(truth, axis=-1)).sum()
            sums[name] += [nll.item(), kl.item(), same.item()]
        print(f"\rwindow {number + 1} of {len(windows)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    count = len(windows) * (windows.shape[1] - 1)
    return {
        n: {"perplexity": math.exp(s[0] / count), "kl": s[1] / count, "top1": s[2] / count} for n, s in sums.items()
    }


def single_layers(rows=128, cols=768, samples=4096):
    """Relative output error of one layer: weights N(0, 1) or Student t3, inputs with a power-law spectrum."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    shape = (basis * np.arange(1, cols + 1) ** -0.25) @ basis.T * np.exp(0.3 * rng.standard_normal(cols))
    seen, fresh = (rng.standard_normal((samples, cols)) @ shape for _ in range(2))
    found_of = {}
    for kind, w in (("Gaussian", rng.standard_normal((rows, cols))), ("Student t3", rng.standard_t(3, (rows, cols)))):
        w = w.astype(np.float32)
        error = lambda got, w=w: float(np.linalg.norm(fresh @ (got - w).T) / np.linalg.norm(fresh @ w.T))  # noqa: E731
        found = {}
        for name, (bits, group) in AFFINE.items():
            parts = mx.quantize(mx.array(w).astype(mx.float16), group, bits)
            found[name] = error(np.array(mx.dequantize(*parts, group, bits).astype(mx.float32)))
        for name, (bits, data_free) in SEEDS.items():
            found[name] = error(encode(FORMATS[bits], w, None if data_free else seen.T @ seen).decoded)
        found_of[kind] = found
    return found_of


def plot(document, path):
    """Bits a weight against KL divergence."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'mlxeff[benchmarks]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    groups = {"MLX affine": "affine", "SeedLM, data-free": "data-free", "SeedLM, activation-aware": "aware"}
    for (label, key), marker in zip(groups.items(), "so^", strict=True):
        points = sorted((a["bits"], a["kl"], n) for n, a in document["arms"].items() if key in n)
        if points:
            axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, label=label)
    axes.set(xlabel="bits a weight", ylabel="KL divergence from the reference (nats a token)", yscale="log")
    axes.set_title("SmolLM2-135M, decoder layers")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"plot: {path}", file=sys.stderr)


def table(document):
    print(f"{'arm':20} {'bits':>6} {'MB':>7} {'perplexity':>10} {'KL':>8} {'same first':>10}")
    for name, a in document["arms"].items():
        line = f"{name:20} {a['bits']:6.3f} {a['bytes'] / 1e6:7.1f} {a['perplexity']:10.3f} {a['kl']:8.4f}"
        print(f"{line} {a['top1']:10.2%}")
    for mine, other in TARGETS:
        if {mine, other} <= document["arms"].keys():
            better = all(document["arms"][mine][key] < document["arms"][other][key] for key in ("kl", "perplexity"))
            print(f"target: {mine} below {other} in KL and perplexity: {'met' if better else 'missed'}")
    for kind, errors in document["single layers"].items():
        print(f"{kind}: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--arms", nargs="+", default=[*AFFINE, *SEEDS], choices=[*AFFINE, *SEEDS])
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "mlxeff-seedlm")
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, help="the reference")
    parser.add_argument("--save", action="store_true", help="write results/<processor>-seedlm-quality.json and .png")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = hub.resolve(options.model)
    loaded = load_path(path)
    ids = np.array(loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False), np.int32)
    count = min(options.tokens, len(ids)) // WINDOW
    windows = ids[: count * WINDOW].reshape(count, WINDOW)
    arms = {"reference": loaded.model}
    for name in options.arms:
        arms[name] = affine_arm(path, *AFFINE[name]) if name in AFFINE else seed_arm(path, options.work, name)
    found = measure(loaded.model, arms, windows)
    document = {
        "card": card.identity() | {"command": " ".join(sys.argv)},
        "tokens": windows.size,
        "arms": {
            name: dict(zip(("bits", "bytes"), size(model), strict=True)) | found[name] for name, model in arms.items()
        },
        "single layers": single_layers(),
    }
    table(document)
    if options.save:
        stem = HERE / "results" / f"{card.machine()['cpu'].replace(' ', '-')}-seedlm-quality"
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(document, stem.with_suffix(".png"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
