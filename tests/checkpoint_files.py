"""Small checkpoint files made from nothing: PyTorch zip archives as `torch.save` lays them out, GGUF files, Llama and
OpenELM weights.

The PyTorch writer emits the pickle instructions that torch emits, so torch is not needed. GGUF files are written by the
`gguf` library.
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

PEAK = """
import resource, sys
def peak():
    # Linux carries ru_maxrss over from the process that forked this one; VmHWM is this program's own.
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
"""  # begins a program of its own: the bytes of memory that it held at most

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage", "int64": "LongStorage"}
STORAGES |= {"float64": "DoubleStorage", "bool": "BoolStorage", "uint8": "ByteStorage", "int32": "IntStorage"}


@dataclass
class View:
    """A tensor of a torch archive: a view of the storage `data` (numpy; uint16 stands for bfloat16)."""

    data: np.ndarray
    shape: tuple
    strides: tuple
    offset: int = 0
    parameter: bool = False


@dataclass
class Raw:
    """Pickle instructions put in as they are."""

    code: bytes


def whole(data: np.ndarray, **more) -> View:
    """A contiguous tensor with a storage of its own."""
    return View(data.reshape(-1), data.shape, tuple(s // data.itemsize for s in data.strides), **more)


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


class _Pickler:
    def __init__(self):
        self.storages, self.kept, self.memo = {}, [], 0

    def put(self) -> bytes:
        self.memo += 1
        return b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)

    def emit(self, value) -> bytes:
        if isinstance(value, Raw):
            return value.code
        if isinstance(value, View):
            return self.tensor(value)
        if isinstance(value, dict):
            items = b"".join(self.emit(k) + self.emit(v) for k, v in value.items())
            return b"ccollections\nOrderedDict\n" + self.put() + b")R" + self.put() + b"(" + items + b"u"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.emit, value)) + b"t" + self.put()
        if isinstance(value, list):
            return b"]" + self.put() + b"(" + b"".join(map(self.emit, value)) + b"e"
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value) if abs(value) < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        return _text(value) + self.put()

    def tensor(self, view: View) -> bytes:
        key = self.storages.setdefault(id(view.data), str(len(self.storages)))
        self.kept.append(view.data)
        kind = STORAGES[view.data.dtype.name]
        storage = self.emit(("storage", Raw(f"ctorch\n{kind}\n".encode()), key, "cpu", view.data.size)) + b"Q"
        hooks = Raw(b"ccollections\nOrderedDict\n)R")
        arguments = (Raw(storage), view.offset, view.shape, view.strides, False, hooks)
        built = b"ctorch._utils\n_rebuild_tensor_v2\n" + self.emit(arguments) + b"R"
        if view.parameter:
            built = b"ctorch._utils\n_rebuild_parameter\n" + self.emit((Raw(built), True, hooks)) + b"R"
        return built


def write_torch(path: Path, value, *, compress: bool = False, byteorder: bytes = b"little") -> Path:
    """What `torch.save(value, path)` writes; `value` of dicts, lists, numbers, text and View."""
    pickler = _Pickler()
    code = b"\x80\x02" + pickler.emit(value) + b"."
    storages = {pickler.storages[id(data)]: data for data in pickler.kept}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data.tobytes())
        archive.writestr("archive/version", b"3\n")
    return path


def write_pickle(path: Path, code: bytes) -> Path:
    """An archive whose data.pkl is `code`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
    return path


def write_gguf(
    path: Path, arch: str, metadata: dict, tensors: dict[str, tuple[np.ndarray, str]], split: int = 0
) -> Path:
    """A GGUF file; `tensors` gives float32 values and the block type to quantise them to, or blocks of it in uint8.
    With `split`, parts of at most so many tensors, named as llama.cpp's gguf-split names them."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name, (values, kind) in tensors.items():
        quant = gguf.GGMLQuantizationType[kind]
        data = values if values.dtype == np.uint8 else gguf.quants.quantize(values, quant)
        writer.add_tensor(name, data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Block type → the bytes at which the float16 numbers of a block stand. (Those of IQ1_M and MXFP4 are no such numbers.)
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}
HALVES |= {"Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": ()}


def random_blocks(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Blocks of the type `kind` with random bits and finite scales, uint8 (…, bytes of a row), for a tensor of `shape`.
    The root mean square of their values is about 0.1."""
    quant = gguf.GGMLQuantizationType[kind]
    values, nbytes = gguf.GGML_QUANT_SIZES[quant]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // values, nbytes), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, (len(blocks), 2)) * rng.choice([-1, 1], (len(blocks), 2))).astype(np.float16)

    def write(factor: float) -> None:
        halves = (scales * np.float16(factor)).astype("<f2")
        for number, column in enumerate(HALVES.get(kind, (0,))):
            blocks[:, column : column + 2] = halves[:, number : number + 1].view(np.uint8)
        if kind == "IQ1_M":  # four bits at the top of each of four words
            words = halves[:, :1].view("<u2") >> np.arange(0, 16, 4, dtype=np.uint16) & np.uint16(15)
            blocks[:, 49::2] = blocks[:, 49::2] & np.uint8(15) | (words << 4).astype(np.uint8)
        if kind == "MXFP4":  # a power of two
            blocks[:, 0] = 127 + np.log2(factor) + rng.integers(-1, 2, len(blocks))

    write(1.0)
    write(0.1 / np.sqrt(np.mean(np.square(gguf.quants.dequantize(blocks, quant)))))
    return blocks.reshape(*shape[:-1], -1)


def numbers(array: mx.array) -> np.ndarray:
    """Any float array as float32 numpy."""
    return np.array(array.astype(mx.float32))
