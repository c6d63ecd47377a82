"""Reading checkpoints: what a sound file gives, and the one line that an unsound one gives."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import gguf
import mlx.core as mx
import numpy as np
import pytest

import checkpoint_files as files
from checkpoint_files import numbers, whole
from mlxeff import MlxeffError
from mlxeff.checkpoint import open_source, read_json


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def values(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def some_arrays():
    mx.random.seed(0)
    weights = {
        "a": mx.random.normal((3, 4)),
        "b": mx.random.normal((5,)).astype(mx.bfloat16),
        "empty": mx.zeros((0, 3)),
    }
    return weights | {"c": mx.array([[1, 2]], mx.uint32), "d": mx.random.normal((2, 2)).astype(mx.float16)}


def same(got: mx.array, want: mx.array) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and mx.array_equal(got, want).item()


def refused(path, *words: str) -> str:
    """The error of opening and reading `path`: one line with all `words`."""
    with pytest.raises(MlxeffError) as caught:
        mx.eval([tensor.read() for tensor in open_source(path).tensors.values()])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# safetensors and folders


def write_shards(folder, arrays, count=2):
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {}
    for i, file in enumerate(names):
        part = dict(list(arrays.items())[i::count])
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / file for file in names], index


def test_safetensors_file(tmp_path):
    arrays = some_arrays()
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays, {"format": "mlx"})
    source = open_source(tmp_path / "model.safetensors")
    assert source.tensors.keys() == arrays.keys()
    assert source.metadata == {"format": "mlx"}
    assert source.config is None
    for name, want in arrays.items():
        tensor = source.tensors[name]
        assert (tensor.shape, tensor.nbytes, tensor.size) == (want.shape, want.nbytes, want.size)
        assert same(tensor.read(), want)
        assert same(tensor.read(), want), "a second read"
    assert source.tensors["b"].dtype == "BF16"


def test_folder_of_shards(tmp_path):
    arrays = some_arrays()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    shards, index = write_shards(tmp_path, arrays)
    for _ in range(2):
        source = open_source(tmp_path)
        assert source.config == {"model_type": "llama"}
        assert source.files == tuple(shards)
        assert all(same(source.tensors[name].read(), want) for name, want in arrays.items())
        index.unlink(missing_ok=True)


def test_folder_incomplete(tmp_path, caplog):
    shards, index = write_shards(tmp_path, some_arrays())
    whole_index, whole_shard = index.read_text(), shards[1].read_bytes()
    shards[1].unlink()
    refused(tmp_path, "incomplete", "wanted 2 shards, got 1", shards[1].name)
    index.unlink()
    refused(tmp_path, "incomplete", "wanted 2 shards, got 1", shards[1].name)
    index.write_text(whole_index)
    shards[1].write_bytes(whole_shard[:-3])
    refused(tmp_path, "incomplete", shards[1].name, f"wanted {len(whole_shard)} bytes, got {len(whole_shard) - 3}")
    shards[1].write_bytes(whole_shard)
    index.write_text(json.dumps({"weight_map": json.loads(whole_index)["weight_map"] | {"lost": shards[0].name}}))
    assert set(open_source(tmp_path).tensors) == set(some_arrays())
    (line,) = {record.getMessage() for record in caplog.records}
    assert line == f"{tmp_path}: the index is stale, the shards are read without it: 1 tensors are elsewhere: lost"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(tmp_path, "../elsewhere.safetensors")


def test_doubled_tensor(tmp_path):
    for i in (1, 2):
        mx.save_safetensors(str(tmp_path / f"model-0000{i}-of-00002.safetensors"), {"x": mx.ones((2,))})
    refused(tmp_path, "'x'", "already in model-00001-of-00002.safetensors")


def raw_safetensors(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": ENTRY}, b"1234567", ["incomplete", "got"]),
        ({"a": ENTRY}, b"123456789", ["damaged"]),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12), ["damaged"]),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), ["damaged"]),
        ({"a": ENTRY | {"shape": [3]}}, bytes(8), ["damaged"]),
        ({"a": ENTRY | {"shape": [0, 2**40], "data_offsets": [0, 0]}}, b"", ["dimensions up to"]),
        ({"a": ENTRY | {"dtype": "F64", "shape": [1]}}, bytes(8), ["'a'", "F64"]),
        ({"a": ENTRY | {"shape": [2**62, 2**62]}}, bytes(8), ["damaged"]),
        ({"a": 3}, b"", ["damaged header"]),
        (b'{"a":1,"a":2}', b"", ["twice"]),
        (b"[" * 100_000, b"", ["not safetensors"]),
        (b"{" + b'"a":[' * 100_000, b"", ["damaged header"]),
    ],
)
def test_safetensors_damaged(tmp_path, header, data, words):
    path = raw_safetensors(tmp_path / "x.safetensors", header, data)
    if words == ["not safetensors"]:
        words = ["damaged header"]
    refused(path, "x.safetensors", *words)


def test_safetensors_absurd_header_length(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(path, "wanted a header of up to 100000000 bytes", str(1 << 62))
    path.write_bytes(struct.pack("<Q", 50_000_000) + b"{}")
    refused(path, "incomplete", "50000000")
    path.write_bytes(b"abc")
    refused(path, "incomplete", "at least 8 bytes, got 3")


def test_nothing_there(tmp_path):
    refused(tmp_path / "none", "nothing")
    refused(tmp_path, "no weights", "model*.safetensors")
    (tmp_path / "x.txt").write_bytes(b"hello world")
    refused(tmp_path / "x.txt", "x.txt", "hell")


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": {"__float__": "Infinity"}, "b": [{"__float__": "-Infinity"}], "c": {"__float__": "x"}}')
    assert read_json(path) == {"a": float("inf"), "b": [float("-inf")], "c": {"__float__": "x"}}
    for text, word in (("{", "not valid JSON"), ("[1]", "got list"), ('"\\ud800' + "x" * 5, "not valid JSON")):
        path.write_text(text)
        with pytest.raises(MlxeffError, match=word):
            read_json(path)


# GGUF


@pytest.fixture
def small_gguf(tmp_path, rng):
    kinds = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1"]
    tensors = {f"t.{kind}": (values(rng, 6, 64), kind) for kind in kinds}
    metadata = {"words": ["a", "ä", ""], "numbers": [1, 2, 3], "flags": [True, False], "x": 0.5, "n": 7, "yes": True}
    return files.write_gguf(tmp_path / "small.gguf", "llama", metadata, tensors), tensors


def test_gguf_matches_the_gguf_library(small_gguf):
    path, tensors = small_gguf
    source = open_source(path)
    for tensor in gguf.GGUFReader(path).tensors:
        got, want = source.tensors[tensor.name], gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if got.dtype == "F16":
            want = want.astype(np.float16)
        assert got.shape == tensors[tensor.name][0].shape
        assert np.array_equal(numbers(got.read()), want.astype(np.float32)), tensor.name
    assert {k: source.metadata[k] for k in ("words", "x", "n", "yes")} == {
        "words": ["a", "ä", ""],
        "x": 0.5,
        "n": 7,
        "yes": True,
    }
    assert source.metadata["numbers"].tolist() == [1, 2, 3]
    assert source.metadata["flags"].tolist() == [True, False]


def test_gguf_packed_is_exact(small_gguf):
    """In float32, where q d + m rounds as in ggml, the packed form gives the block's values to the bit."""
    path, _ = small_gguf
    source = open_source(path)
    for tensor in gguf.GGUFReader(path).tensors:
        got = source.tensors[tensor.name]
        if got.bits:
            weight, scales, biases = got.read_packed()
            assert (weight.dtype, scales.dtype, biases.dtype) == (mx.uint32, mx.float16, mx.float16)
            dense = mx.dequantize(
                weight, scales.astype(mx.float32), biases.astype(mx.float32), got.group_size, got.bits
            )
            assert np.array_equal(numbers(dense), gguf.quants.dequantize(tensor.data, tensor.tensor_type)), tensor.name


def test_gguf_scales_beyond_half(tmp_path, rng):
    """-128 d overflows float16 for d > 511: scales and biases are then float32, and the values still the block's."""
    path = files.write_gguf(tmp_path / "x.gguf", "llama", {}, {"t": (values(rng, 2, 32) * 1e5, "Q8_0")})
    tensor = open_source(path).tensors["t"]
    weight, scales, biases = tensor.read_packed()
    raw = gguf.GGUFReader(path).tensors[0]
    want = gguf.quants.dequantize(raw.data, raw.tensor_type)
    assert scales.dtype == biases.dtype == mx.float32
    assert np.array_equal(numbers(mx.dequantize(weight, scales, biases, 32, 8)), want)
    assert np.array_equal(numbers(tensor.read()), want)


def test_gguf_overflow_of_half_stays_float32(tmp_path, rng):
    path = files.write_gguf(tmp_path / "x.gguf", "llama", {}, {"t": (values(rng, 2, 32) * 3e5, "Q5_0")})
    assert open_source(path).tensors["t"].read().dtype == mx.float32


def header(version=3, tensors=0, keys=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor_entry(shape=(32,), code=0, offset=0, name=b"t"):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF", ["incomplete", "24"]),
        (header(version=1), ["version 2 or 3, got 1"]),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian"]),
        (header(tensors=1 << 60), [f"wanted {1 << 60} tensors"]),
        (header(keys=1 << 60), [f"wanted {1 << 60} keys"]),
        (header(keys=1, rest=struct.pack("<Q", 1 << 63) + bytes(20)), ["string", "passes the end"]),
        (header(keys=1, rest=text(b"\xff") + bytes(20)), ["not UTF-8"]),
        (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 61)), ["wanted", "strings"]),
        (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61)), ["wanted", "numbers"]),
        (header(keys=1, rest=text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20), ["nested"]),
        (header(keys=1, rest=text(b"a") + struct.pack("<I", 77) + bytes(8)), ["unknown value type 77"]),
        (header(keys=2, rest=(text(b"a") + struct.pack("<IQ", 10, 1)) * 2), ["'a' appears twice"]),
        (header(tensors=1, rest=tensor_entry((1 << 40, 1 << 40))), ["dimensions up to"]),
        (header(tensors=1, rest=tensor_entry((0,))), ["at least 1"]),
        (header(tensors=1, rest=tensor_entry(code=99)), ["unknown GGUF type number 99"]),
        (header(tensors=1, rest=tensor_entry((31,), 2)), ["multiple of 32 for Q4_0, got 31"]),
        (header(tensors=1, rest=tensor_entry((1 << 30,))), ["incomplete", "wanted"]),
        (header(tensors=1, rest=tensor_entry(offset=(1 << 64) - 32)), ["incomplete"]),
        (header(tensors=1, rest=tensor_entry() + bytes(7 + 127)), ["incomplete: wanted 192 bytes, got 191"]),
        (header(tensors=1, rest=tensor_entry(offset=3) + bytes(256)), ["an offset that 32 divides, got 3"]),
        (header(tensors=2, rest=tensor_entry() + tensor_entry(name=b"u") + bytes(256)), ["overlaps"]),
        (header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)), ["general.alignment"]),
        (header(keys=1, rest=text(b"split.count") + struct.pack("<II", 4, 3)), ["one part of 3"]),
    ],
)
def test_gguf_damaged(tmp_path, data, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    refused(path, "x.gguf", *words)


def test_gguf_data_begins_where_the_alignment_says(tmp_path):
    numbers = np.arange(32, dtype=np.float32)
    start = header(keys=1, tensors=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 128) + tensor_entry())
    (tmp_path / "x.gguf").write_bytes(start + bytes(-len(start) % 128) + numbers.tobytes())
    assert np.array_equal(open_source(tmp_path / "x.gguf").tensors["t"].read(), numbers)


# PyTorch


def test_torch_archive(tmp_path, rng):
    shared, half, brain = (
        values(rng, 24),
        values(rng, 4, 4, dtype=np.float16),
        mx.random.normal((3, 5)).astype(mx.bfloat16),
    )
    state = {
        "whole": whole(values(rng, 3, 4), parameter=True),
        "transposed": files.View(shared, (4, 6), (1, 4)),
        "strided": files.View(shared, (2, 3), (12, 2), 1),
        "scalar": files.View(shared, (), (), 5),
        "half": whole(half),
        "brain": whole(np.array(brain.view(mx.uint16))),
        "ids": whole(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "mask": whole(np.array([True, False])),
        "empty": whole(np.zeros((0, 3), np.float32)),
    }
    source = open_source(files.write_torch(tmp_path / "x.bin", state))
    got = {name: tensor.read() for name, tensor in source.tensors.items()}
    assert np.array_equal(numbers(got["whole"]), state["whole"].data.reshape(3, 4))
    assert np.array_equal(numbers(got["transposed"]), shared.reshape(6, 4).T)
    assert np.array_equal(
        numbers(got["strided"]), [[shared[1], shared[3], shared[5]], [shared[13], shared[15], shared[17]]]
    )
    assert got["scalar"].item() == shared[5]
    assert np.array_equal(np.array(got["half"]), half)
    assert same(got["brain"], brain)
    assert got["ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["mask"].tolist() == [True, False]
    assert got["empty"].shape == (0, 3)
    for name, tensor in source.tensors.items():
        assert (tensor.shape, got[name].shape) == (got[name].shape, tensor.shape)
        assert tensor.nbytes == got[name].nbytes


def test_torch_doubles_are_reported(tmp_path, rng, caplog):
    data = values(rng, 4, dtype=np.float64)
    got = open_source(files.write_torch(tmp_path / "x.pt", {"a": whole(data)})).tensors["a"].read()
    assert np.array_equal(np.array(got), data.astype(np.float32))
    assert caplog.messages == ["x.pt: 1 float64 tensors are read as float32"]


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict"])
def test_torch_nested(tmp_path, rng, caplog, key):
    weights = {"w": whole(values(rng, 2, 2)), "step": 3}
    state = {"epoch": 3, key: weights, "optimizer": {"state": {0: whole(values(rng, 2))}, "lr": [0.1, None]}}
    source = open_source(files.write_torch(tmp_path / "x.pt", state))
    assert list(source.tensors) == ["w"]
    assert caplog.messages == [
        f"x.pt: weights taken from {key!r}; ignored: epoch, optimizer",
        "x.pt: ignored what is not a tensor: step",
    ]


class Attack:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_malicious_pickle_executes_nothing(tmp_path, protocol):
    mark = tmp_path / "executed"
    attacks = [
        Attack(os.system, f"touch {mark}"),
        Attack(eval, f"open({str(mark)!r}, 'w')"),
        Attack(exec, f"open({str(mark)!r}, 'w')"),
        Attack(getattr, Attack(__import__, "os"), "system"),
        Attack(subprocess.run, ["touch", str(mark)]),
    ]
    for attack in attacks:
        code = pickle.dumps({"w": attack}, protocol)
        refused(files.write_pickle(tmp_path / "evil.pt", code), "evil.pt: refused, nothing was executed")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (b"\x80\x02}r\xff\xff\xff\xff.", "memo index"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "attributes"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "0 arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "_rebuild_tensor_v2.__globals__"),
        (b"\x80\x04\x8c\x05torch\x8c\x0csystem.popen\x93.", "torch.system.popen"),
        (b"\x80\x02}(]K\x01u.", "dictionary key"),
        (b"\x80\x02}X\xff\xff\xff\x7fabc.", "damaged pickle"),
        (b"\x80\x02K\x01Q.", "persistent id"),
        (b"\x80\x02" + b")\x85" * 50 + b"K\x01\x86.", "got a tuple"),
        (b"\x80\x02}", "damaged pickle"),
        (b"\x80\x02.", "damaged pickle"),
        (b"\x80\x02u.", "damaged pickle"),
        (b"", "damaged pickle"),
        (b"\x80\x02}.", "wanted a state dict"),
    ],
)
def test_hostile_pickle_instructions(tmp_path, code, word):
    refused(files.write_pickle(tmp_path / "x.pt", code), "x.pt", word)


TENSOR_OF_STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000NK\x01tQK\x00"
)


@pytest.mark.parametrize(
    "tail", [b"}h\x00K\x01s.", b"Q.", b"ctorch\nSize\nh\x00R.", b".", TENSOR_OF_STORAGE + b"h\x00h\x00tR."]
)
def test_pickle_bomb_takes_no_time(tmp_path, tail):
    """A tuple doubled 200 times has 2^200 leaves: nothing may hash, compare, print or copy it."""
    code = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 200 + tail
    refused(files.write_pickle(tmp_path / "x.pt", code), "x.pt")


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (files.View(np.zeros(4, np.float32), (2, 3), (3, 1)), "wanted at least 6 elements"),
        (files.View(np.zeros(4, np.float32), (2,), (1,), 3), "wanted at least 5 elements"),
        (files.View(np.zeros(4, np.float32), (2,), (2**31 - 1,)), "elements"),
        (files.View(np.zeros(4, np.float32), (2**31 - 1, 2**31 - 1), (0, 0)), "elements"),
        (files.View(np.zeros(4, np.float32), (2**40, 0), (0, 0)), "dimensions up to"),
        (files.View(np.zeros(4, np.float32), (-2,), (1,)), "natural"),
        (files.View(np.zeros(4, np.float32), (2,), (-1,), 3), "natural"),
        (files.View(np.zeros(4, np.float32), (2,), (1, 1)), "shape and strides"),
        (files.View(np.zeros(4, np.float32), (1,) * 9, (1,) * 9), "9 dimensions"),
    ],
)
def test_torch_tensor_outside_its_storage(tmp_path, view, word):
    refused(files.write_torch(tmp_path / "x.pt", {"w": view}), "x.pt", word)


def test_a_torch_storage_that_is_longer_than_its_entry(tmp_path, rng):
    """The next entry follows at once, so reading on would find bytes."""
    whole_archive = files.write_torch(tmp_path / "x.pt", {"a": whole(values(rng, 8)), "b": whole(values(rng, 8))})
    with zipfile.ZipFile(whole_archive) as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 28 if name == "archive/data/0" else None])
    refused(tmp_path / "y.pt", "y.pt: tensor 'a': incomplete: wanted a storage of 32 bytes, got 28")


def test_torch_bad_archives(tmp_path, rng):
    state = {"w": whole(values(rng, 64, 64))}
    refused(files.write_torch(tmp_path / "big.pt", state, byteorder=b"big"), "little-endian", "re-save")
    refused(files.write_torch(tmp_path / "packed.pt", state, compress=True), "refused", "compressed")
    bomb = files.write_torch(tmp_path / "bomb.pt", {"w": whole(np.zeros((4096, 4096), np.float32))}, compress=True)
    assert bomb.stat().st_size < 1 << 20
    refused(bomb, "refused", "compressed")
    cut = files.write_torch(tmp_path / "cut.pt", state)
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(cut, "incomplete or damaged zip")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"w": 1}, 2))
    refused(tmp_path / "old.pt", "bare pickle", "re-save")
    (tmp_path / "tar.pt").write_bytes(bytes(257) + b"ustar" + bytes(250))
    refused(tmp_path / "tar.pt", "tar", "re-save")
    with zipfile.ZipFile(tmp_path / "npz.pt", "w") as archive:
        archive.writestr("a.npy", b"x")
    refused(tmp_path / "npz.pt", "one data.pkl, got 0")


def test_zip_entry_that_lies_about_its_size(tmp_path, rng):
    """The central directory says 2 GiB, the file has a few KiB."""
    path = files.write_torch(tmp_path / "x.pt", {"w": whole(values(rng, 8))})
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[place + 20 : place + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    path.write_bytes(data)
    refused(path, "incomplete", str(1 << 31)[:4])


def test_zip_entries_that_share_bytes(tmp_path, rng):
    """Two storages on the same bytes: overlapping entries would let a small file describe a large model."""
    state = {"a": whole(values(rng, 8)), "b": whole(values(rng, 8))}
    path = files.write_torch(tmp_path / "x.pt", state)
    data, places, place = bytearray(path.read_bytes()), [], -1
    while (place := data.find(b"PK\x01\x02", place + 1)) >= 0:
        places.append(place)
    first, second = (place for place in places if b"archive/data/" in data[place : place + 60])
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    refused(path, "x.pt: refused", "overlap")


def test_reading_needs_no_torch():
    heavy = ["torch", "gguf", "transformers", "mlx_lm"]
    code = f"import mlxeff.checkpoint, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
