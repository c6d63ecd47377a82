"""Writing checkpoints: what comes back, what is left after a failure (nothing), and how much memory it takes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple

import mlx.core as mx
import pytest

import checkpoint_files as files
from mlxeff import MlxeffError
from mlxeff.checkpoint import Piece, claim, open_source, save_arrays, write_folder

KINDS = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}


def piece(**arrays) -> Piece:
    return Piece(tuple((n, KINDS[a.dtype], a.shape) for n, a in arrays.items()), lambda: list(arrays.values()))


@pytest.fixture
def arrays():
    mx.random.seed(0)
    made = {"a": mx.random.normal((8, 4)), "b": mx.random.normal((5,)).astype(mx.bfloat16), "scalar": mx.array(2.5)}
    made |= {
        "turned": mx.random.normal((3, 4)).T,
        "empty": mx.zeros((0, 3)),
        "c": mx.array([[1, 2**32 - 1]], mx.uint32),
    }
    return made | {"ä": mx.random.normal((2, 2)).astype(mx.float16)}


@pytest.fixture
def left_behind(tmp_path):
    """What stands in the folder besides what the test put there."""
    before = set(os.listdir(tmp_path))
    return lambda: sorted(set(os.listdir(tmp_path)) - before)


@pytest.mark.parametrize(("shard_bytes", "files"), [(1 << 30, 1), (62, 3), (61, 4), (1, 7)])
def test_round_trip(tmp_path, arrays, shard_bytes, files):
    pieces, seen = [piece(**{name: array}) for name, array in arrays.items()], []
    if shard_bytes == 1:
        pieces = [p for p in pieces if p.nbytes] + [pieces[4]]
    written = write_folder(
        tmp_path / "out", pieces, parameters=9, shard_bytes=shard_bytes, progress=lambda *x: seen.append(x)
    )
    total = sum(array.nbytes for array in arrays.values())
    assert len(written) == files
    for path in written:
        held = mx.load(str(path)).values()
        assert len(held) == 1 or sum(array.nbytes for array in held) <= shard_bytes
    assert [path.name for path in written] == (
        ["model.safetensors"]
        if len(written) == 1
        else [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    )
    assert seen[-1] == (total, total)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": total, "total_parameters": 9}
    for path in written:
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "the numbers begin at a multiple of 8 bytes"
    source = open_source(tmp_path / "out")
    assert index["weight_map"] == {name: source.tensors[name].origin.name for name in sorted(arrays)}
    assert source.metadata == {"format": "mlx"}
    for name, want in arrays.items():
        got = source.tensors[name].read()
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert mx.array_equal(got, want)
        assert mx.array_equal(mx.load(str(source.tensors[name].origin))[name], want)


def test_destination_that_exists(tmp_path, arrays):
    (tmp_path / "out").mkdir()
    with pytest.raises(MlxeffError, match="wanted a new folder"):
        write_folder(tmp_path / "out", [piece(a=arrays["a"])])
    with pytest.raises(MlxeffError, match="existing parent"):
        write_folder(tmp_path / "none" / "out", [piece(a=arrays["a"])])


def test_disk_that_is_too_small(tmp_path, arrays, monkeypatch, left_behind):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(MlxeffError, match=r"disk full: wanted 128 bytes free, got 10"):
        write_folder(tmp_path / "out", [piece(a=arrays["a"])])
    assert left_behind() == []


def test_write_error_leaves_nothing(tmp_path, left_behind):
    """The kernel refuses bytes beyond a file size limit as it refuses them on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(MlxeffError, match="not written, nothing is left behind") as caught:
            write_folder(tmp_path / "out", [piece(a=mx.zeros((50_000,)))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert left_behind() == []


@pytest.mark.parametrize("error", [MlxeffError("broken"), KeyboardInterrupt()])
def test_failing_read_leaves_nothing(tmp_path, arrays, left_behind, error):
    def broken():
        raise error

    with pytest.raises(type(error)):
        write_folder(tmp_path / "out", [piece(a=arrays["a"]), Piece((("x", "F32", (1,)),), broken)])
    assert left_behind() == []


def test_array_that_is_not_as_planned(tmp_path, arrays, left_behind):
    wrong = Piece((("x", "F32", (4, 8)),), lambda: [arrays["a"]])
    with pytest.raises(MlxeffError, match=r"'x': wanted F32 \(4, 8\), got F32 \(8, 4\)"):
        write_folder(tmp_path / "out", [wrong])
    assert left_behind() == []


def run(code: str, *arguments, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, **more)


KILLED = """
import os, signal, sys
import mlx.core as mx
from mlxeff.checkpoint import Piece, write_folder
def die():
    os.kill(os.getpid(), int(sys.argv[2]))
    return [mx.zeros((4,))]
good = Piece((("a", "F32", (4,)),), lambda: [mx.zeros((4,))])
write_folder(sys.argv[1], [good, Piece((("b", "F32", (4,)),), die)])
"""


def test_killed_process(tmp_path, arrays, left_behind):
    """Ctrl-C cleans up; after a kill there is a hidden folder, which the next conversion to the place removes."""
    assert run(KILLED, tmp_path / "out", int(signal.SIGINT), stderr=subprocess.DEVNULL).returncode != 0
    assert left_behind() == []
    assert run(KILLED, tmp_path / "out", int(signal.SIGKILL)).returncode == -signal.SIGKILL
    assert [name.startswith(".out.partial-") for name in left_behind()] == [True]
    write_folder(tmp_path / "out", [piece(a=arrays["a"])])
    assert left_behind() == ["out"]


MEMORY = """
import mlx.core as mx, numpy as np, gguf, safetensors
from mlxeff.checkpoint import Piece, open_source, write_folder
source = open_source(sys.argv[1])
def pack(tensor):
    return list(mx.quantize(tensor.read().astype(mx.float32), 32, 8))
def piece(name, tensor):
    rows, columns = tensor.shape
    parts = (("U32", columns // 4), ("F32", columns // 32), ("F32", columns // 32))
    specs = tuple((f"{name}.{i}", dtype, (rows, width)) for i, (dtype, width) in enumerate(parts))
    return Piece(specs, lambda: pack(tensor))
before = peak()
write_folder(sys.argv[2], [piece(n, t) for n, t in source.tensors.items()])
print(peak() - before)
"""


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_peak_memory(tmp_path, form):
    """Below 1.3 times the largest source shard, here with 8 tensors a shard, read, cast and quantised."""
    import numpy as np

    names = [f"{i}.weight" for i in range(8)]
    data = {name: np.full((1024, 2048), i, np.float16) for i, name in enumerate(names)}
    for shard in (1, 2):
        part = {f"{shard}.{name}": value for name, value in data.items()}
        if form == "torch":
            state = {name: files.whole(value) for name, value in part.items()}
            files.write_torch(tmp_path / f"pytorch_model-0000{shard}-of-00002.bin", state)
        else:
            path = tmp_path / f"model-0000{shard}-of-00002.safetensors"
            mx.save_safetensors(str(path), {name: mx.array(value) for name, value in part.items()})
    shard_bytes = sum(value.nbytes for value in data.values())
    peak = int(run(files.PEAK + MEMORY, tmp_path, tmp_path / "out").stdout)
    assert 0 < peak < 1.3 * shard_bytes, f"{peak / shard_bytes:.2f} times the largest shard"


def test_files_of_killed_processes_are_removed(tmp_path):
    """The next write of the same file removes what a killed one left; a living process keeps its own."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living, other = (tmp_path / f".a[1].cache.{name}.safetensors" for name in (dead.pid, os.getppid(), "x"))
    for path in (left, living, other):
        path.write_bytes(b"half")
    save_arrays(tmp_path / "a[1].cache", {"x": mx.ones(3)}, {}, "a test")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, other.name, "a[1].cache"])


CLAIM = """
import sys
from pathlib import Path
from mlxeff.checkpoint import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_path_is_claimed_by_one_process_at_a_time(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", CLAIM, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MlxeffError, match=r"out: another process is making it"), claim(out):
            pass
        holder.kill()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    with claim(out):
        pass
    assert list(tmp_path.iterdir()) == []
