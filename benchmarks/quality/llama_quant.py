"""llama.cpp's quantisations of the reference, by its library in the peers' virtual environment (`peers/install.py`).

The importance matrix is what `llama-imatrix` collects, computed here: the mean square of every input column of every
linear layer, on the calibration text that SeedLM's encoder sees. K-quants need rows of a multiple of 256: for the
matrices of 576 columns llama.cpp takes another type with more bits, so an arm's bits are counted from its file.
As a worker in the peers' interpreter: `python -m quality.llama_quant`, the task as JSON on standard input.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlxeff.checkpoint import Tensor
    from mlxeff.models.llama import Model

TYPES = {f"llama.cpp {name}": name for name in ("Q3_K_M", "Q4_0", "IQ4_NL", "Q4_K_M")}
FILE, IMPORTANCE = "model.gguf", "importance.npz"


def make(name: str, source: Path, importance: Path, folder: Path, python: str, limit: float) -> tuple[Path, dict]:
    """The GGUF file of the arm `name` in `folder`, made when it is missing, and the counts of its block types."""
    from . import process

    task = {"source": str(source), "importance": str(importance), "type": TYPES[name]}
    place = folder / name.replace(" ", "-")
    note = process.make(place, "quality.llama_quant", task, limit, python)
    return place / FILE, note


def importance(model: "Model", windows: np.ndarray) -> dict[str, np.ndarray]:
    """The importance matrix of a model: GGUF's tensor name → mean square of each input column, float32 (columns), over
    windows (W, T) of tokens.

    `model` computes operator by operator from then on.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_unflatten

    kinds = (nn.Linear, nn.QuantizedLinear)
    linears = [(n, m) for n, m in model.named_modules() if ".layers." in n and isinstance(m, kinds)]
    sums: dict[str, mx.array] = {}
    model.update_modules(tree_unflatten([(name, _watched(module, name, sums)) for name, module in linears]))
    model.native = None
    for window in windows:
        model(mx.array(window)[None], model.new_cache())
        mx.eval(sums)
    model.update_modules(tree_unflatten(linears))
    return {gguf_name(name): np.array(total) / windows.size for name, total in sums.items()}


def _watched(module: "nn.Module", name: str, sums: dict[str, "mx.array"]) -> "nn.Module":
    """`module` that adds the squares of its inputs to `sums`."""
    import mlx.core as mx
    import mlx.nn as nn

    class Watched(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            found = mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1]).sum(axis=0)
            sums[name] = sums[name] + found if name in sums else found
            return module(x)

    return Watched()


def gguf_name(module: str) -> str:
    """Hugging Face's name of a module in a layer → the name of its matrix in a GGUF file."""
    from mlxeff.models.gguf import LAYER

    _, _, rest = module.partition("layers.")
    number, _, part = rest.partition(".")
    return f"blk.{number}.{next(ours for ours, theirs in LAYER.items() if theirs == part)}.weight"


def matrices(path: Path) -> list["Tensor"]:
    """The decoder's matrices in a GGUF file: `shape`, `kind` (the block type), `nbytes`."""
    from mlxeff.checkpoint import open_source

    return [t for name, t in open_source(path).tensors.items() if name.startswith("blk.") and len(t.shape) == 2]


def types(path: Path) -> dict[str, float]:
    """Block type → the share of the decoder's weights that it holds."""
    held, total = {}, 0
    for tensor in matrices(path):
        count = int(np.prod(tensor.shape))
        held[tensor.kind], total = held.get(tensor.kind, 0) + count, total + count
    return {kind: round(count / total, 3) for kind, count in sorted(held.items())}


def main() -> None:
    import ctypes

    import llama_cpp

    task = json.load(sys.stdin)
    kept = [(name.encode(), np.ascontiguousarray(a, np.float32)) for name, a in np.load(task["importance"]).items()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # the last one has no name
    for entry, (name, array) in zip(entries, kept, strict=False):
        entry.name, entry.size = name, array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{task['type']}")
    options.allow_requantize, options.imatrix = True, entries
    target = Path(task["destination"]) / FILE
    status = llama_cpp.llama_model_quantize(task["source"].encode(), str(target).encode(), ctypes.byref(options))
    if status:
        raise SystemExit(f"{target}: llama_model_quantize ended with {status}")
    print(json.dumps({"imatrix": len(kept)}))


if __name__ == "__main__":
    main()
