"""The products with a model's matrices, each kind and shape apart, beside what the machine can do at most.

A pass computes the products of all layers' matrices of one kind and shape, one after the other as decoding does, so
that weights come from memory and not from a cache. Where that is too much work, it takes the first ones.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..decode import require_seam
from ..errors import notices
from ..models.decoder import DecoderModel
from . import ceilings, rounds
from .contenders import Fetching, Loader
from .request import Machine, here, samples
from .result import Result

ROWS = (1, 8, 512)  # default numbers of rows: a decoded token, a verified draft, a chunk of a prompt
MOST_FLOPS = 2e10  # of a pass


@dataclass(frozen=True)
class Product:
    """Matrices of one kind and shape, R x C, of a model."""

    kind: str  # as in "4-bit g32", "float16", "seeds 4"
    shape: tuple[int, int]
    bytes: int  # of one matrix
    calls: list[Callable[[mx.array], mx.array]]

    def test(self, rows: int) -> str:
        """The name of the test with so many rows in the input."""
        return f"{self.shape[0]}x{self.shape[1]} {self.kind}, {rows} row{'s' if rows > 1 else ''}"


def products(model: DecoderModel) -> list[Product]:
    """The products with the matrices of a model, those of the output head too."""
    found: dict[tuple, Product] = {}
    head = model.end_parts().head.module
    for _, module in model.named_modules():
        linear = module if _is_linear(module) else None
        call = linear or (getattr(module, "as_linear", None) if module is head else None)
        if call is None:
            continue
        kind, shape = _described(module)
        size = sum(array.nbytes for _, array in tree_flatten(module.parameters()))
        found.setdefault((kind, shape), Product(kind, shape, size, [])).calls.append(call)
    return list(found.values())


def _is_linear(module: nn.Module) -> bool:
    """Whether calling the module multiplies by its matrix."""
    return isinstance(module, nn.Linear | nn.QuantizedLinear) or (
        hasattr(module, "to_dense") and callable(module) and not hasattr(module, "as_linear")
    )


def _described(module: nn.Module) -> tuple[str, tuple[int, int]]:
    """(Kind, shape) of a module's matrix."""
    if hasattr(module, "to_dense"):
        name = getattr(getattr(module, "block_format", None), "name", type(module).__name__)
        return str(name), (module.rows, module.cols)
    rows, columns = module.weight.shape
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        mode = "" if module.mode == "affine" else f" {module.mode}"
        return f"{module.bits}-bit g{module.group_size}{mode}", (rows, columns * 32 // module.bits)
    return str(module.weight.dtype).rpartition(".")[2], (rows, columns)


@dataclass(frozen=True)
class KernelRequest:
    """The options of `mlxeff bench kernels`; as in `request.Request`. Without `models` only the ceilings are measured.
    `rows`: rows of the inputs."""

    models: Sequence[str] = ()
    rows: Sequence[int] = ROWS
    rounds: int = 5
    warmup: int = 1
    machine: Machine = field(default_factory=Machine)
    out: str | None = None
    ignored: Sequence[str] = ()
    offline: bool = False


def measure(request: KernelRequest, fetching: Fetching) -> Result:
    """Run the request. Raises MlxeffError for a model that cannot be loaded, and for an `out` file with samples of
    another kind."""
    device = request.machine.use()
    load = Loader(fetching, request.ignored, request.offline)
    loaded = {name: load(name) for name in dict.fromkeys(request.models)}
    for name, each in loaded.items():
        require_seam(each.model, "linear", f"bench kernels: {name}")
    arms = {name: products(each.model) for name, each in loaded.items()}
    described = {
        "verb": "bench kernels",
        "model": next(iter(arms), None),
        "fingerprint": {name: each.fingerprint for name, each in loaded.items()},
        "device": device,
    }
    card = here()
    results = rounds.Results(samples(request.out, card, described))
    results.arms |= {name: _facts(name, each, loaded[name]) for name, each in arms.items()}
    found = {device: ceilings.measure(device)}
    _run(arms, device, request, results)
    described |= {"rows": list(request.rows), "rounds": request.rounds, "warmup": request.warmup}
    return Result(card, described, results, against=next(iter(arms), None), ceilings=found)


def _facts(name: str, made: Sequence[Product], loaded) -> dict:
    count = sum(len(each.calls) for each in made)
    size = sum(each.bytes * len(each.calls) for each in made)
    return {"engine": "mlxeff", "model": name, "backend": loaded.backend, "matrices": count, "weight_bytes": size}


def _run(arms: dict[str, list[Product]], device: str, request: KernelRequest, results: rounds.Results) -> None:
    """Measure every product; the arms take turns in each round."""
    done = results.samples.done()
    for rows in request.rows:
        for number in range(-request.warmup, request.rounds):
            for arm, made in arms.items():
                for product in made:
                    if (device, product.test(rows), arm, number) in done:
                        continue
                    busy = round(os.getloadavg()[0], 2)
                    values = _pass(product, rows, device)
                    place = {"arm": arm, "device": device, "test": product.test(rows), "batch": rows}
                    if number >= 0:
                        more = {"round": number, "values": values, "bytes_moved": product.bytes, "load_average": busy}
                        results.samples.add(place | more)
        notices.info("%d row%s: measured", rows, "s" if rows > 1 else "")


def _pass(product: Product, rows: int, device: str) -> dict:
    """One pass: seconds of a product, and what it reads and computes in a second."""
    flops = 2 * rows * product.shape[0] * product.shape[1]
    calls = product.calls[: max(1, int(MOST_FLOPS / flops))]
    dtype = mx.float32 if device == "cpu" else mx.float16
    x = mx.random.normal((rows, product.shape[1]), dtype, key=mx.random.key(0))
    mx.eval(x)
    began = time.perf_counter()
    mx.eval([call(x) for call in calls])
    seconds = (time.perf_counter() - began) / len(calls)
    return {"seconds": seconds, "gbps": product.bytes / seconds / 1e9, "gflops": flops / seconds / 1e9}
