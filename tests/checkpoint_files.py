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
    """A GGUF file; `tensors` gives float32 values and the block type to quantise them to. With `split`, parts of at
    most so many tensors, named as llama.cpp's gguf-split names them."""
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
        writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(array: mx.array) -> np.ndarray:
    """Any float array as float32 numpy."""
    return np.array(array.astype(mx.float32))
