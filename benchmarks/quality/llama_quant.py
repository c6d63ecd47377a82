"""Quantise the reference with llama.cpp's library in the peers' virtual environment (`peers/install.py`).

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
    from mlxeff.checkpoint import Tensor
    from mlxeff.models.llama import Model

TYPES = {f"llama.cpp {name}": name for name in ("Q3_K_M", "Q4_0", "IQ4_NL", "Q4_K_M")}
FILE, IMPORTANCE = "model.gguf", "importance.npz"


def make(
    name: str, source: Path, importance: Path | None, folder: Path, python: str, limit: float
) -> tuple[Path, dict]:
    """Return the GGUF file of the arm `name`, or of one of llama.cpp's types, in `folder`, made if missing, and how it
    was made."""
    from . import process

    task = {"source": str(source), "importance": importance and str(importance), "type": TYPES.get(name, name)}
    place = folder / name.replace(" ", "-")
    note = process.make(place, "quality.llama_quant", task, limit, python)
    return place / FILE, note


def importance(model: "Model", windows: np.ndarray) -> dict[str, np.ndarray]:
    """The importance matrix of a model: GGUF's tensor name → mean square of each input column, float32 (columns), over
    windows (W, T) of tokens."""
    import mlx.core as mx

    from mlxeff.calibration import LayerStream
    from mlxeff.models.gguf import LAYER
    from mlxeff.modules import is_matrix

    gguf_names = {theirs: ours for ours, theirs in LAYER.items()}
    sums: dict[str, mx.array] = {}

    def add(readers: tuple[str, ...], x: mx.array) -> None:
        squares = mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1]).sum(axis=0)
        for reader in readers:
            name = f"blk.{stream.index}.{gguf_names[reader]}.weight"
            sums[name] = sums.get(name, 0) + squares
        mx.eval(sums)

    stream = LayerStream(model, windows)
    for layer in model.layers:
        stream.watch([name for name, module in layer.named_modules() if is_matrix(module)], add)
        stream.next_layer()
    return {name: np.array(total) / windows.size for name, total in sums.items()}


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
    importance = np.load(task["importance"]) if task["importance"] else {}
    kept = [(name.encode(), np.ascontiguousarray(array, np.float32)) for name, array in importance.items()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # the last one has no name
    for entry, (name, array) in zip(entries, kept, strict=False):
        entry.name, entry.size = name, array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{task['type']}")
    options.allow_requantize, options.imatrix = True, entries if kept else None
    target = Path(task["destination"]) / FILE
    status = llama_cpp.llama_model_quantize(task["source"].encode(), str(target).encode(), ctypes.byref(options))
    if status:
        raise SystemExit(f"{target}: llama_model_quantize ended with {status}")
    print(json.dumps({"imatrix": len(kept)}))


if __name__ == "__main__":
    main()
