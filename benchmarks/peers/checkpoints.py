"""The measured models, made once in the cache folder from the built-in one: GGUF files for the engines that read GGUF,
and folders of the same weights for mlx-lm and torch. Also the cost of a token, counted from a file's tensors.

Blocks are those of the `gguf` library, llama.cpp's own; a file is written under a temporary name and renamed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from mlxeff.convert import convert

from mlxeff import hub
from mlxeff.checkpoint import open_source
from saving import once

from .table import EIGHT, FOUR, LARGE, SIXTEEN

F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
Q4_0, Q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1
Q8_0 = gguf.GGMLQuantizationType.Q8_0
BLOCK, SEED = 32, 0
ROW_BYTES = {Q4_1: 20, Q8_0: 34}  # of a block


@dataclass(frozen=True)
class Files:
    """One model: the GGUF file; folders of its weights: `mlx`, as mlx-lm is fastest on a CPU, and `bfloat16`; and
    `q4_0`, a GGUF file with the Q4_1 matrices rounded to Q4_0."""

    gguf: Path
    q4_0: Path | None = None
    mlx: Path | None = None
    bfloat16: Path | None = None


@dataclass(frozen=True)
class Costs:
    """The memory traffic and arithmetic that a token requires in any implementation."""

    weight_bytes: int  # of the file's matrices and norms, all read for a decoded token
    layer_values: int  # of the layers' matrices
    head_values: int  # of the output matrix
    key_values: int  # that a token adds to the KV cache, keys and values of all layers
    query_values: int  # heads × head size of all layers

    def decode_bytes(self, depth: float, kv_bytes: int) -> float:
        """Bytes read for one token after `depth` others."""
        return self.weight_bytes + depth * self.key_values * kv_bytes

    def prefill_flops(self, tokens: int) -> float:
        """Multiplications and additions of a prompt: matrices, causal attention, the head on the last row."""
        attention = 4 * self.query_values * tokens * (tokens + 1) / 2
        return 2 * (self.layer_values * tokens + self.head_values) + attention


def make(name: str, folder: Path) -> Files:
    """Return the files of the model `name` of `table`, made if they are missing."""
    builtin, place = hub.resolve(hub.DEFAULT_MODEL), folder / "models"
    place.mkdir(parents=True, exist_ok=True)
    if name == LARGE:
        path = once(place / "llama-1b-random.Q4_1.gguf", lambda path: write_random(path, builtin))
        return Files(path, repacked(path, place))
    kind = {FOUR: None, EIGHT: Q8_0, SIXTEEN: F16}[name]
    path = builtin
    if kind is not None:
        path = once(place / f"{builtin.stem}.{kind.name}.gguf", lambda path: requantise(builtin, path, kind))
    dense = name == SIXTEEN
    dtype = "bfloat16" if dense else "float32"  # of the scales: MLX's CPU kernels are fastest with float32
    mlx = once(place / f"{path.stem}.{dtype}", lambda place: convert(path, place, dtype=dtype))
    return Files(path, repacked(path, place) if name == FOUR else None, mlx, mlx if dense else None)


def repacked(path: Path, place: Path) -> Path:
    """The Q4_0 file of a Q4_1 file."""
    return once(place / f"{path.stem}.Q4_0.gguf", lambda out: requantise(path, out, Q4_0, only=Q4_1))


def costs(path: Path) -> Costs:
    """The costs of a token, counted from the tensors and keys of a GGUF file."""
    source = open_source(path)
    tensors, key = source.tensors, lambda name: source.metadata[f"llama.{name}"]
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    read = [tensor for name, tensor in tensors.items() if name != "token_embd.weight" or tensor is head]
    layers, heads = key("block_count"), key("attention.head_count")
    size = key("embedding_length") // heads
    return Costs(
        weight_bytes=sum(tensor.nbytes for tensor in read),
        layer_values=sum(
            int(np.prod(t.shape)) for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2
        ),
        head_values=int(np.prod(head.shape)),
        key_values=2 * layers * key("attention.head_count_kv") * size,
        query_values=layers * heads * size,
    )


def all_costs(models: Iterable[str], folder: Path) -> dict[tuple[str, str], Costs]:
    """(model, form) → costs, of every GGUF file of `models`."""
    files = {name: make(name, folder) for name in models}
    forms = ((name, form, getattr(each, form)) for name, each in files.items() for form in ("gguf", "q4_0"))
    return {(name, form): costs(path) for name, form, path in forms if path}


def requantise(
    source: Path, path: Path, kind: gguf.GGMLQuantizationType, only: gguf.GGMLQuantizationType | None = None
) -> None:
    """A copy of a GGUF file with every matrix, or those of type `only`, as `kind`; a tensor at a time is in memory."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)

    def kind_of(tensor):
        if len(tensor.shape) != 2:
            return F32
        return kind if only in (None, tensor.tensor_type) else tensor.tensor_type

    def values(tensor):
        if kind_of(tensor) == tensor.tensor_type:
            return tensor.data
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return gguf.quants.quantize(dense, kind_of(tensor))

    shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    kinds = {tensor.name: kind_of(tensor) for tensor in reader.tensors}
    write(writer, shapes, kinds, (values(tensor) for tensor in reader.tensors))


def write(writer: gguf.GGUFWriter, shapes: dict, kinds: dict, arrays: Iterator[np.ndarray]) -> None:
    """Write the header, then the tensors one by one."""
    for name, shape in shapes.items():
        elements, nbytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        size = int(np.prod(shape)) // elements * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in arrays:
        writer.write_tensor_data(array)
    writer.close()


LARGE_SHAPE = {  # Llama 3.2 1B's
    "embedding_length": 2048,
    "block_count": 16,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
    "feed_forward_length": 8192,
    "context_length": 131072,
}
LARGE_VOCABULARY = 128256


def large_tensors(vocabulary: int, shape: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes (rows, columns) of a Llama with tied embeddings."""
    hidden, inner = shape["embedding_length"], shape["feed_forward_length"]
    groups = hidden // shape["attention.head_count"] * shape["attention.head_count_kv"]
    layer = {
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (groups, hidden),
        "attn_v": (groups, hidden), "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    tensors = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for number in range(shape["block_count"]):
        tensors |= {f"blk.{number}.{name}.weight": size for name, size in layer.items()}
    return tensors


def write_random(path: Path, like: Path, vocabulary: int = LARGE_VOCABULARY, shape: dict | None = None) -> None:
    """A Llama of Llama 3.2 1B's shape with seeded random weights: layers Q4_1, embedding Q8_0, norms 1.

    The tokenizer is that of the file `like`, filled up with unused tokens.
    """
    shape = shape or LARGE_SHAPE
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in shape.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 500000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("llama.rope.dimension_count", shape["embedding_length"] // shape["attention.head_count"])
    writer.add_uint32("llama.vocab_size", vocabulary)
    _copy_tokenizer(writer, like, vocabulary)
    shapes = large_tensors(vocabulary, shape)
    kinds = {name: F32 if len(size) == 1 else Q4_1 for name, size in shapes.items()} | {"token_embd.weight": Q8_0}
    generator = np.random.default_rng(SEED)
    write(writer, shapes, kinds, (random_tensor(generator, size, kinds[name]) for name, size in shapes.items()))


def random_tensor(generator: np.random.Generator, shape: tuple[int, ...], kind) -> np.ndarray:
    """Bytes (rows, blocks × block bytes) of uniform random numbers with the deviation 1/√columns; a vector of ones."""
    if kind == F32:
        return np.ones(shape, np.float32)
    rows, columns = shape
    blocks = np.frombuffer(
        generator.bytes(rows * columns // BLOCK * ROW_BYTES[kind]), np.uint8
    ).reshape(-1, ROW_BYTES[kind]).copy()  # fmt: skip
    levels = 16 if kind == Q4_1 else 256
    scale = np.float16(columns**-0.5 * 12**0.5 / levels)  # a uniform number in [0, levels) has the deviation levels/√12
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    if kind == Q4_1:
        blocks[:, 2:4] = np.frombuffer(np.float16(-7.5 * scale).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def _copy_tokenizer(writer: gguf.GGUFWriter, like: Path, vocabulary: int) -> None:
    fields = gguf.GGUFReader(like).fields
    contents = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    tokens, kinds = contents["tokenizer.ggml.tokens"], contents["tokenizer.ggml.token_type"]
    missing = vocabulary - len(tokens)
    contents["tokenizer.ggml.tokens"] = tokens + [f"<|unused {number}|>" for number in range(missing)]
    contents["tokenizer.ggml.token_type"] = kinds + [gguf.TokenType.UNUSED.value] * missing
    for name, value in contents.items():
        kinds = fields[name].types
        writer.add_key_value(name, value, kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
