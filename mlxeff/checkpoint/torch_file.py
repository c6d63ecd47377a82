"""A PyTorch zip archive (.bin, .pt, .pth) → its tensors, without torch.

Layout (torch/serialization.py): the entry `<name>/data.pkl` is a pickle that describes the tensors, read by
`torch_pickle`. Each entry `<name>/data/<key>` is a storage, the memory that one or more tensors are views of. Entries
must be stored uncompressed, every entry must lie inside of the file and every tensor inside of its storage.
"""

import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import MlxeffError, notices
from .tensor import NUMPY, Tensor, check_shape, read_bytes, to_array
from .torch_pickle import StoredTensor, read_pickle

MAX_PICKLE = 32 << 20  # bytes; a state dict needs about 150 for each tensor
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, length of the name, length of the extra field
# Keys under which training programs store the weights beside other state.
MODEL_KEYS = ("model_state_dict", "state_dict", "model", "module", "weights", "params")
RESAVE = "re-save it with torch.save(torch.load(path, weights_only=True), new_path) or as safetensors"
# Name of a number type → bytes per element.
BYTES = {"F64": 8} | {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}


@dataclass(frozen=True)
class _Entry:
    """The place of an entry's bytes in the file."""

    start: int
    nbytes: int


def read_torch(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(The tensors of the archive's state dict by name, {}: there is no metadata). Raises MlxeffError for a damaged
    archive and for one with anything but plain weights."""
    entries = _entries(path)
    prefix = _prefix(path, entries)
    pickled = entries[prefix + "data.pkl"]
    if pickled.nbytes > MAX_PICKLE:
        raise MlxeffError(f"{path.name}: wanted a data.pkl of up to {MAX_PICKLE} bytes, got {pickled.nbytes}")
    order = entries.get(prefix + "byteorder")
    if order and read_bytes(path, order.start, min(order.nbytes, 16)).tobytes() != b"little":
        raise MlxeffError(f"{path.name}: wanted little-endian storages, got another byte order: {RESAVE}")
    value = read_pickle(read_bytes(path, pickled.start, pickled.nbytes).tobytes(), path.name)
    stored = _model_tensors(value, path)
    tensors = {name: _tensor(path, name, tensor, entries, prefix) for name, tensor in stored.items()}
    if doubles := sum(tensor.storage.dtype == "F64" for tensor in stored.values()):
        notices.warning(f"{path.name}: {doubles} float64 tensors are read as float32")
    return tensors, {}


def _entries(path: Path) -> dict[str, _Entry]:
    """Name → place of every entry of the archive. Raises MlxeffError for compressed and overlapping entries and for
    entries outside of the file."""
    with open(path, "rb") as file:
        head = file.read(4)
        if head != b"PK\x03\x04":
            raise MlxeffError(f"{path.name}: wanted a PyTorch zip archive, got a {_guess(head, path)} file: {RESAVE}")
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            entries = {info.filename: _entry(file, path, info) for info in infos}
        except MlxeffError:
            raise
        except (
            zipfile.BadZipFile,
            struct.error,
            ValueError,
            NotImplementedError,
            OverflowError,
            EOFError,
            OSError,
        ) as error:
            raise MlxeffError(
                f"{path.name}: incomplete or damaged zip archive: {' '.join(str(error).split())}"
            ) from error
    if len(entries) != len(infos):
        raise MlxeffError(f"{path.name}: damaged zip archive: an entry appears twice")
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start < end:
            raise MlxeffError(f"{path.name}: refused: entries of the zip archive overlap")
        end = entry.start + entry.nbytes
    return entries


def _guess(head: bytes, path: Path) -> str:
    """A name for the format of a file that is no zip archive, for the error message."""
    if head[:1] == b"\x80":
        return "bare pickle (legacy PyTorch)"
    with open(path, "rb") as file:
        file.seek(257)
        return "tar (legacy PyTorch)" if file.read(5) == b"ustar" else "different"


def _entry(file: BinaryIO, path: Path, info: zipfile.ZipInfo) -> _Entry:
    """The place of one entry, from the header in front of its bytes."""
    what, size = f"{path.name}: entry {info.filename[:80]!r}", path.stat().st_size
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        got = f"{info.file_size} bytes compressed or encrypted to {info.compress_size}"
        raise MlxeffError(f"{what}: refused: wanted bytes stored as they are, got {got}")
    if info.header_offset < 0 or info.header_offset + LOCAL_HEADER.size > size:
        raise MlxeffError(f"{what}: incomplete: wanted {info.header_offset + LOCAL_HEADER.size} bytes, got {size}")
    file.seek(info.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.file_size > size:
        raise MlxeffError(f"{what}: incomplete: wanted {start + info.file_size} bytes, got {size}")
    return _Entry(start, info.file_size)


def _prefix(path: Path, entries: dict[str, _Entry]) -> str:
    """The name of the folder inside of the archive that contains data.pkl, with a slash at its end."""
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise MlxeffError(f"{path.name}: wanted a PyTorch archive with one data.pkl, got {len(pickles)}")
    prefix = pickles[0][: -len("data.pkl")]
    if prefix + "constants.pkl" in entries:
        raise MlxeffError(f"{path.name}: wanted a state dict, got a TorchScript program")
    return prefix


def _model_tensors(value: object, path: Path) -> dict[str, StoredTensor]:
    """The state dict in the unpickled `value`: the value itself, or below one of MODEL_KEYS where optimiser state and
    others are stored beside it. Notices say what is ignored."""
    place = []  # the keys that lead to it
    while isinstance(value, dict) and not any(isinstance(item, StoredTensor) for item in value.values()):
        key = next((key for key in MODEL_KEYS if isinstance(value.get(key), dict) and len(place) < 3), None)
        if key is None:
            break
        place.append(key)
        if ignored := sorted(str(other) for other in value if other != key):
            notices.warning(f"{path.name}: weights taken from {'.'.join(place)!r}; ignored: {_some(ignored)}")
        value = value[key]
    items = value.items() if isinstance(value, dict) else ()
    tensors = {name: item for name, item in items if isinstance(item, StoredTensor)}
    if not tensors:
        got = (
            f"a dictionary of {_some(sorted(map(str, value)))}"
            if isinstance(value, dict)
            else f"a {type(value).__name__}"
        )
        raise MlxeffError(f"{path.name}: wanted a state dict of tensors, got {got}")
    if ignored := sorted(str(name) for name in value if name not in tensors):
        notices.warning(f"{path.name}: ignored what is not a tensor: {_some(ignored)}")
    return tensors


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "nothing"


def _tensor(path: Path, name: object, stored: StoredTensor, entries: dict[str, _Entry], prefix: str) -> Tensor:
    """The tensor for one entry of the state dict. Raises MlxeffError where it reaches outside of its storage."""
    if not isinstance(name, str) or not name.isprintable():
        raise MlxeffError(f"{path.name}: wanted printable tensor names, got {name!r:.80}")
    storage, what = stored.storage, f"{path.name}: tensor {name!r}"
    entry = entries.get(f"{prefix}data/{storage.key}")
    if entry is None:
        raise MlxeffError(f"{what}: incomplete: wanted storage {storage.key[:80]!r}, got none of that name")
    item = BYTES[storage.dtype]
    if storage.count * item > entry.nbytes:
        raise MlxeffError(f"{what}: incomplete: wanted a storage of {storage.count * item} bytes, got {entry.nbytes}")
    check_shape(stored.shape, path, name)
    size, span = math.prod(stored.shape), _span(stored)
    if size > storage.count or stored.offset + span > storage.count:
        wanted = max(size, stored.offset + span)
        raise MlxeffError(f"{what}: refused: wanted at least {wanted} elements in its storage, got {storage.count}")
    dtype = "F32" if storage.dtype == "F64" else storage.dtype
    start = entry.start + stored.offset * item
    return Tensor(name, dtype, stored.shape, size * item, path, lambda: _read(path, start, span, stored))


def _span(stored: StoredTensor) -> int:
    """Number of elements in the storage from the view's first to its last, both included."""
    if 0 in stored.shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(stored.shape, stored.strides, strict=True))


def _read(path: Path, start: int, span: int, stored: StoredTensor) -> mx.array:
    """The array of a view, whose elements lie in the `span` elements from byte `start` on; float64 becomes float32."""
    kind = stored.storage.dtype
    item = BYTES[kind]
    numbers = read_bytes(path, start, span * item).view("<f8" if kind == "F64" else NUMPY[kind])
    if kind == "F64":
        numbers, kind = numbers.astype(np.float32), "F32"
    strides = tuple(stride * numbers.itemsize for stride in stored.strides)
    if span:
        numbers = np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, stored.shape, strides, writeable=False))
    return to_array(numbers.reshape(-1).view(np.uint8), kind, stored.shape)
