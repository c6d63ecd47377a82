"""A header of a GGUF file → the file, with weights that depend on nothing but the names and shapes of the tensors."""

import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

IDS = [(7 * i * i + 3 * i + 5) % 317 + 3 for i in range(40)]  # the prompt
BLOCK = 32  # values of a block of the quantised types that are written
PLACES, COLUMNS = (0, 5, 17, 39), 8  # positions, and the number of tokens, whose logits are kept


def kept(logits: np.ndarray) -> dict:
    """What is kept of the logits (S, V) of the prompt: those of some positions and tokens, in units of the standard
    deviation of all, and the first choices."""
    scaled = logits / logits.std()
    return {
        "logits": [[round(float(each), 6) for each in scaled[place, :COLUMNS]] for place in PLACES],
        "choices": scaled.argmax(axis=1).tolist(),
    }


def values(name: str, shape: list[int]) -> np.ndarray:
    """The weights of a tensor, float32. Norms are near 1, the recurrence of a state-space model is negative."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.startswith("rope_factors"):
        return 1 + np.abs(noise)
    if name.endswith("ssm_a"):
        return -np.exp(0.5 * noise)
    return (1 if "norm" in name and name.endswith(".weight") else 0) + 0.15 * noise


def write(
    header: dict,
    path: Path,
    kind: str = "F32",
    more: dict | None = None,
    values: Callable[[str, list[int]], np.ndarray] = values,
) -> Path:
    """Write the file. Matrices whose rows have whole blocks of type `kind` are stored in it, vectors as F32; `more` is
    further metadata; `values` gives the weights of a tensor of this name and shape."""
    metadata = header["metadata"] | (more or {})
    writer = gguf.GGUFWriter(str(path), metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            add(writer, key, value)
    for name, shape in header["tensors"].items():
        matrix = name.endswith(".weight") and len(shape) > 1 and shape[-1] % BLOCK == 0
        quant = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values(name, shape), quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add an entry to the metadata, in the type that llama.cpp's converter gives such values."""
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds.get(type(value), writer.add_array)(key, value)
