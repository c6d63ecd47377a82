"""Time of a training step (forward and backward pass) of the built-in model on this CPU: native operations against
MLX's.

    python benchmarks/cpu_training.py [--shapes 4x256 1x32] [--mlx-tokens 32] [--rounds 3] [--save]

The weights of SmolLM2-135M are dequantised to float32 and all of them trained: tokens of a text (batch x tokens),
cross-entropy, gradients of every parameter. Each measurement is a process of its own, the arms take turns, medians are
shown; the first pass of a process is not counted. MLX's operations run the shapes of up to --mlx-tokens tokens only.
The last line is one JSON document with every sample; --save writes it to benchmarks/results/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import saving
from mlxeff.bench.samples import median_of
from mlxeff.bench.tables import card_lines, table
from peers.worker import peak_rss
from places import ROOT

if TYPE_CHECKING:
    from mlxeff.models.decoder import DecoderModel
    from mlxeff.tokenizer import Tokenizer

ARMS = {
    "native": {},
    "native, 1 thread": {"MLXEFF_NUM_THREADS": "1"},
    "MLX": {"MLXEFF_NATIVE": "0"},
}
PASSES = 2  # timed passes per process; the MLX arm runs one


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4x256", "1x32"], metavar="BATCHxTOKENS")
    parser.add_argument("--mlx-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("SHAPE", "PASSES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        shape, passes = options.worker
        print(json.dumps(train(*size_of(shape), int(passes))))
        return
    results = {"card": card(), "samples": measure(options)}
    print_table(results)
    if options.save:
        name = f"cpu-training-mlx-{results['card']['mlx']}.json"
        saving.write_json(results, saving.result_path(results["card"]["cpu"], name))
    print(json.dumps(results))


def size_of(shape: str) -> tuple[int, int]:
    batch, tokens = shape.split("x")
    return int(batch), int(tokens)


def card() -> dict:
    """Describe the machine, the versions and the measured model."""
    from mlxeff.bench import machine

    return {"command": saving.command(), **machine.card()}


def measure(options: argparse.Namespace) -> list[dict]:
    """All samples, the arms interleaved."""
    samples = []
    for _ in range(options.rounds):
        for shape in options.shapes:
            batch, tokens = size_of(shape)
            for arm, environment in ARMS.items():
                if arm == "MLX" and batch * tokens > options.mlx_tokens:
                    continue
                passes = 1 if arm == "MLX" else PASSES
                command = [sys.executable, __file__, "--worker", shape, str(passes)]
                run = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=os.environ | environment, cwd=ROOT
                )
                samples.append({"arm": arm, "shape": shape} | json.loads(run.stdout.splitlines()[-1]))
                print(f"{arm}, {shape}: {samples[-1]['seconds']}", file=sys.stderr)
    return samples


def train(batch: int, tokens: int, passes: int) -> dict:
    """Seconds and CPU seconds of each pass, the loss, peak resident MiB, 1e9 operations of a pass."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from mlxeff import ops

    model, tokenizer = dense_model()
    ids = tokenizer.encode((ROOT / "LICENSE").read_text())[: batch * (tokens + 1)]
    data = mx.array(ids).reshape(batch, tokens + 1)

    def loss(model, data):
        return ops.cross_entropy(model(data[:, :-1], model.new_cache()), data[:, 1:]).mean()

    step, seconds, busy = nn.value_and_grad(model, loss), [], []
    for _ in range(passes + 1):
        began, worked = time.perf_counter(), time.process_time()
        value, gradients = step(model, data)
        mx.eval(value, gradients)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - worked)
        del gradients
    weights = sum(
        p.size for _, p in tree_flatten(model.parameters()) if p.ndim == 2
    )  # the embedding counts once, since the head shares its weights
    return {
        "seconds": seconds[1:],
        "cpu_seconds": busy[1:],  # of all threads; least affected by other load on the machine
        "loss": value.item(),
        "gflop": 6e-9 * weights * batch * tokens,  # of the matrix products, without those of attention
        "rss_mib": peak_rss(),
    }


def dense_model() -> tuple["DecoderModel", "Tokenizer"]:
    """(the built-in model in training mode, its matrices dequantised to float32; its tokenizer)."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from mlxeff import hub
    from mlxeff.assembly.model import build_model, load_path

    loaded = load_path(hub.resolve(hub.DEFAULT_MODEL))
    weights = dict(tree_flatten(loaded.model.parameters()))
    for path, module in loaded.model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            parts = [weights.pop(f"{path}.{name}") for name in ("weight", "scales", "biases")]
            weights[f"{path}.weight"] = mx.dequantize(*parts, module.group_size, module.bits)
    model = build_model({key: value for key, value in loaded.config.items() if key != "quantization"})
    model.load_weights([(name, value.astype(mx.float32)) for name, value in weights.items()])
    mx.eval(model.parameters())
    return model.train(), loaded.tokenizer


def print_table(results: dict) -> None:
    """The card; medians of the passes, and of the processes."""
    header = ["operations", "batch x tokens", "s", "CPU s", "tokens/s", "GFLOP/s", "peak RSS MiB", "loss"]
    rows = []
    for shape in dict.fromkeys(sample["shape"] for sample in results["samples"]):
        batch, tokens = size_of(shape)
        for arm in ARMS:
            chosen = [s for s in results["samples"] if (s["arm"], s["shape"]) == (arm, shape)]
            if not chosen:
                continue
            seconds, busy, rss = (median_of(chosen, metric) for metric in ("seconds", "cpu_seconds", "rss_mib"))
            times = f"{seconds:.3f}", f"{busy:.3f}", f"{batch * tokens / seconds:.1f}"
            speed = f"{chosen[0]['gflop'] / seconds:.0f}"
            rows.append([arm, shape, *times, speed, f"{rss:.0f}", f"{chosen[0]['loss']:.6f}"])
    print(f"{card_lines(results['card'])}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
