"""Models that are fitted as DynaMoE for the measurements, and how they are counted and steered."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlxeff.convert import convert

from mlxeff import fit_dynamoe
from mlxeff.decode import PlainReading
from mlxeff.dynamoe.install import of
from mlxeff.dynamoe.usage import CountedReading
from mlxeff.models.decoder import DecoderModel
from mlxeff.running import RunOptions

WINDOW = 512  # tokens: of the measured windows, and of a step of prefill
SENSITIVITIES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.0)
# Name of an arm → options of its fit.
FITS = {
    "DynaMoE": {},
    "by inputs": {"by": "inputs"},
    "low-rank 64": {"down": "low-rank"},
    "no refit": {"down": "shared"},
    "paper's router": {"router": "paper"},
    "tuned": {"tune": 32768},
}


def fitted(name: str, source: Path, work: Path, **more) -> Path:
    """The folder of a fitted model, which is made if it is not there."""
    folder = work / "-".join(name.replace("'", "").split())
    if not folder.exists():
        print(f"fitting {name}", file=sys.stderr)
        work.mkdir(parents=True, exist_ok=True)
        report = fit_dynamoe(str(source), folder, **(FITS.get(name, {}) | more))
        (work / f"{folder.name}.json").write_text(json.dumps(report))
    return folder


def float16(source: Path, work: Path) -> Path:
    """The folder of the model in float16, which is made if it is not there."""
    folder = work / "float16"
    if not folder.exists():
        convert(source, folder, dequantize=True, dtype="float16")
    return folder


def taken(model: DecoderModel, options: RunOptions) -> CountedReading:
    """Counts what share of the neurons the tokens compute from now on."""
    return CountedReading(PlainReading(), of(model), options.fraction, lambda: model.native and model.native.usage)


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
