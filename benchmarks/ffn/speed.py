"""Speed: tokens a second of decoding and prefill at each sensitivity, beside the dense model."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ffn.fits import SENSITIVITIES, WINDOW, always, fitted, float16, taken
from mlxeff.assembly.model import build_model, load_path
from mlxeff.decode import prefill
from mlxeff.dynamoe.install import of
from mlxeff.models.decoder import DecoderModel
from mlxeff.running import RunOptions
from mlxeff.speculation.drafters import weight_bytes
from places import TEXT

NORMAL = statistics.NormalDist()
WORDS = "The history of the computer begins with"  # of the prompt
SHAPES = {  # of models with random weights
    "Llama 3.2 1B's shape": {
        "model_type": "llama", "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "quantization": {"group_size": 64, "bits": 4},
    },
}  # fmt: skip


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


def measure(options: argparse.Namespace, source: Path, document: dict, save: Callable[[], None]) -> None:
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
    half = float16(source, options.work)
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
