"""mlx-lm's own quantisers (`mlx_lm.quant`) on the reference and our calibration text: folders that mlx-lm loads.

Their functions are called as they are; their data sets, which are downloads, are not used: the windows of tokens are
those that SeedLM's encoder sees. The products run on native kernels (`mlx_on_native.py`). As a worker:
`python -m quality.mlx_lm_quant`, the task as JSON on standard input; the last line tells what was done.

Settings below mlx-lm's defaults, to save time: GPTQ and AWQ run on as many tokens as METHODS says (default
there: a downloaded text, and 128 × 512; AWQ's search costs 6 GFLOP a token). DWQ makes one pass over its windows,
one a step, where the default is 512 steps of 4 × 1025 tokens; its learning rate 1e-6 is multiplied by the ratio of
the steps, so that Adam can move a scale as far. GPTQ packs 2, 4 and 8 bits only; groups of 128 do not divide 576.
"""

import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import process

SEED = 123  # mlx-lm's default
HEAD_BITS, HEAD_GROUP = 8, 64  # of the embedding, which no arm uses
DWQ_BATCH, DWQ_VALID = 1, 4
DWQ_STEPS, DWQ_RATE = 512, 1e-6  # mlx-lm's defaults


@dataclass(frozen=True)
class Method:
    """A quantiser, its format, and the calibration tokens it gets."""

    method: str
    bits: int
    group: int
    tokens: int


METHODS = {
    "mlx-lm GPTQ 4 g64": Method("gptq", 4, 64, 32768),
    "mlx-lm AWQ 4 g64": Method("awq", 4, 64, 2048),
    "mlx-lm AWQ 3 g64": Method("awq", 3, 64, 2048),
    "mlx-lm DWQ 4 g64": Method("dwq", 4, 64, 8192),
    "mlx-lm DWQ 3 g64": Method("dwq", 3, 64, 8192),
}


def make(name: str, source: Path, windows: np.ndarray, folder: Path, limit: float) -> tuple[Path, dict]:
    """Return the folder of the arm `name` in `folder`, made if missing, and a record of how it was made.

    `source`: mlx-lm's folder of the reference. `windows`: token ids (W, T), evenly spread over the text.
    """
    method, place = METHODS[name], folder / name.replace(" ", "-")
    count = method.tokens // windows.shape[1]
    kept = windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]
    task = asdict(method) | {"source": str(source), "windows": kept.tolist()}
    return place, process.make(place, "quality.mlx_lm_quant", task, limit)


def main() -> None:
    from mlx_lm.utils import dequantize_model, load, save

    from . import mlx_on_native

    task = json.load(sys.stdin)
    native = mlx_on_native.install()
    mx.random.seed(SEED)
    model, tokenizer, config = load(task["source"], return_config=True)
    dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    model, config = QUANTISERS[task["method"]](model, config, mx.array(task["windows"]), task["bits"], task["group"])
    save(task["destination"], task["source"], model, tokenizer, config)
    print(json.dumps({"tokens": int(np.size(task["windows"])), "native": native}))


Quantised = tuple[nn.Module, dict]  # mlx-lm's model, its config


def gptq(model: nn.Module, config: dict, windows: mx.array, bits: int, group: int) -> Quantised:
    from mlx_lm.quant.gptq import gptq_quantize

    model, quantization = gptq_quantize(model, windows, bits, group, HEAD_BITS, HEAD_GROUP)
    return model, config | {"quantization": quantization}


def awq(model: nn.Module, config: dict, windows: mx.array, bits: int, group: int) -> Quantised:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    kind = AWQ_MODEL_CONFIGS[config["model_type"]]
    awq_quantize(model, windows, kind, group, bits, HEAD_GROUP, HEAD_BITS)
    return model, update_config(model, config)


def dwq(model: nn.Module, config: dict, windows: mx.array, bits: int, group: int) -> Quantised:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    student, in_layers = copy.deepcopy(model), lambda path, _: ".layers." in path
    student, config = quantize_model(student, config, group, bits, quant_predicate=in_layers)
    student.model.embed_tokens.freeze()
    data = [(window, 0) for window in windows.tolist()]
    steps = len(data) // DWQ_BATCH
    optimiser = Adam(learning_rate=DWQ_RATE * DWQ_STEPS / steps, bias_correction=True)
    teacher = lambda batch, _, split: model(batch)  # noqa: ARG005, E731
    length = windows.shape[1] + 1  # mlx-lm drops the last of a padded batch
    valid = data[:: max(1, len(data) // DWQ_VALID)]
    dwq_quantize(student, teacher, optimiser, data, valid, DWQ_BATCH, length, SEED, dtype=mx.float32)
    return student, config


QUANTISERS = {"gptq": gptq, "awq": awq, "dwq": dwq}

if __name__ == "__main__":
    main()
