"""Damaged headers of real files: whatever bytes change, only MlxeffError comes out, and no large allocation is made.

Each parser gets a sound file with some bytes replaced, cut or put in; what still opens is read to the end. A
config.json gets other values, of any type and size. `make fuzz` tries more of them.
"""

import json
import os
import struct
import tracemalloc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint_files as files
from mlxeff import MlxeffError
from mlxeff.assembly.model import build_model
from mlxeff.checkpoint import open_source
from mlxeff.kvprediction.files import read_config
from mlxeff.models.openelm import published_config
from mlxeff.training import Training, train
from tiny_model import CONFIG, random_model

LIMIT = 64 << 20  # bytes of Python and numpy memory; the files have a few KiB
EXAMPLES = int(os.environ.get("MLXEFF_FUZZ", 0))  # of each test, drawn anew each time; 0: the same 400 each time
SETTINGS = settings(
    max_examples=EXAMPLES or 400,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Values that lengths, counts and offsets are damaged with.
SMALL = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
LARGE = [1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
PLACES = st.integers(0, 1 << 16)

edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("set"), PLACES, st.sampled_from(SMALL + LARGE).map(struct.Struct("<Q").pack)),
        st.tuples(st.just("set"), PLACES, st.sampled_from(SMALL).map(struct.Struct("<I").pack)),
        st.tuples(st.just("cut"), PLACES, st.integers(1, 64)),
        st.tuples(st.just("put"), PLACES, st.binary(min_size=1, max_size=16)),
    ),
    min_size=1,
    max_size=4,
)


KEYS = [*CONFIG, *published_config("270M"), "rope_scaling", "rope_parameters", "head_dim", "sliding_window", "mode"]
KEYS += ["layer_types", "quantization", "group_size", "bits", "model.norm", "type", "rope_type", "factor", "seedlm"]
KEYS += ["low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "x"]
PAIR_KEYS = ["format", "version", "base", "auxiliary", "layer_map", "inputs", "shared", "quantization", "provenance"]


def damaged(data: bytes, changes: list, header: int) -> bytes:
    """`data` with each change somewhere in its first `header` bytes."""
    for kind, place, value in changes:
        place %= header
        if kind == "set":
            data = data[:place] + value + data[place + len(value) :]
        else:
            data = data[:place] + (data[place + value :] if kind == "cut" else value + data[place:])
    return data


def opens_or_refuses(path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        refusal = read_all(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LIMIT
    assert "\n" not in refusal
    assert len(refusal) <= 300


def read_all(path) -> str:
    """The refusal, or nothing."""
    try:
        source = open_source(path)
        arrays = {name: tensor.read() for name, tensor in source.tensors.items()}
        mx.eval(arrays)
    except MlxeffError as error:
        return str(error)
    assert all(array.shape == source.tensors[name].shape for name, array in arrays.items())
    return ""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Small sound files: name -> (bytes, length of the part to damage)."""
    folder, rng = tmp_path_factory.mktemp("sound"), np.random.default_rng(0)
    values = rng.standard_normal((4, 64)).astype(np.float32)
    mx.save_safetensors(str(folder / "x.safetensors"), {"a": mx.array(values), "b": mx.ones((2, 3), mx.bfloat16)})
    state = {
        "epoch": 1,
        "model": {"a": files.whole(values, parameter=True), "b": files.View(values, (8, 4), (1, 8), 3)},
    }
    files.write_torch(folder / "x.pt", state)
    metadata = {"words": ["a", "b" * 40], "numbers": [1, 2, 3], "f": 0.5, "s": "text", "n": 3}
    tensors = {f"t.{kind}": (values, kind) for kind in ("F32", "F16", "Q4_0", "Q8_0", "Q5_0")}
    files.write_gguf(folder / "x.gguf", "llama", metadata, tensors)
    data = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    header = {"x.safetensors": 8 + int.from_bytes(data["x.safetensors"][:8], "little"), "x.gguf": 700}
    return {name: (raw, header.get(name, len(raw))) for name, raw in data.items()}


def pickle_part(raw: bytes) -> tuple[int, int]:
    start = raw.index(b"\x80\x02")
    return start, raw.index(b"PK", start) - start


@SETTINGS
@given(changes=edits)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.gguf"])
def test_damaged_file(tmp_path, sound, name, changes):
    raw, header = sound[name]
    opens_or_refuses(tmp_path / name, damaged(raw, changes, header))


@SETTINGS
@given(changes=edits)
def test_damaged_pickle(tmp_path, sound, changes):
    """The pickle alone, in an archive that is sound otherwise (its checksum is not looked at)."""
    raw, _ = sound["x.pt"]
    start, length = pickle_part(raw)
    broken = damaged(raw[start : start + length], changes, length)[:length].ljust(length, b".")
    opens_or_refuses(tmp_path / "x.pt", raw[:start] + broken + raw[start + length :])


@SETTINGS
@given(data=st.binary(max_size=300), start=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x80\x02", b"{"]))
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "gguf"])
def test_any_bytes(tmp_path, suffix, start, data):
    opens_or_refuses(tmp_path / f"x.{suffix}", start + data)


@settings(SETTINGS, max_examples=EXAMPLES or 60)
@given(changes=edits)
def test_damaged_header_of_the_built_in_model(tmp_path, smollm2_header, changes):
    """A real vocabulary's header without its tensors' data: every outcome is a refusal."""
    path = tmp_path / "x.gguf"
    path.write_bytes(damaged(smollm2_header, changes, 6000))
    with pytest.raises(MlxeffError):
        open_source(path)


@pytest.fixture(scope="module")
def smollm2_header(smollm2_gguf):
    with open(smollm2_gguf, "rb") as file:
        return file.read(1 << 21)


# Files that our own commands wrote, and read again.


def one_line_or_nothing(read, *arguments) -> None:
    try:
        read(*arguments)
        refusal = ""
    except MlxeffError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) <= 300


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@SETTINGS
@given(changes=edits)
def test_damaged_kv_cache_file(tmp_path, model, changes):
    path, cache = tmp_path / "a.cache", model.new_cache()
    model(mx.array([[1, 2, 3]]), cache)
    cache.save(path, [1, 2, 3], "m")
    raw = path.read_bytes()
    path.write_bytes(damaged(raw, changes, 8 + int.from_bytes(raw[:8], "little")))
    one_line_or_nothing(model.new_cache().restore, path, "m")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


def trained(path, steps: int) -> list[float]:
    mx.random.seed(0)
    toy, data = Toy(), np.ones((2, 4), np.float32)
    step = nn.value_and_grad(toy, lambda x: mx.square(toy.layer(x)).mean())
    return train(toy, step, lambda _: (mx.array(data),), (data,), Training(steps=steps, every=1), path)


@SETTINGS
@given(changes=edits)
def test_damaged_training_checkpoint(tmp_path_factory, training_checkpoint, changes):
    path = tmp_path_factory.mktemp("training") / "state"
    path.write_bytes(damaged(training_checkpoint, changes, 8 + int.from_bytes(training_checkpoint[:8], "little")))
    one_line_or_nothing(trained, path, 2)


@pytest.fixture(scope="module")
def training_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "state"
    trained(path, 2)
    return path.read_bytes()


numbers = st.one_of(st.integers(), st.integers(-2, 300), st.floats(), st.booleans(), st.none(), st.text(max_size=4))
values = st.recursive(
    numbers,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=8,
)


@SETTINGS
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["llama", "qwen2", "openelm"])
def test_any_config(kind, changes):
    """A model is built, unevaluated, or refused."""
    config = json.loads(json.dumps((published_config("270M") if kind == "openelm" else CONFIG) | changes))
    one_line_or_nothing(build_model, config | {"model_type": kind})


@SETTINGS
@given(changes=st.dictionaries(st.sampled_from(PAIR_KEYS), values, min_size=1, max_size=4))
def test_any_config_of_a_pair(tmp_path, changes):
    sound = {"format": "mlxeff-kv-pair", "version": 1, "base": {}, "auxiliary": {"layers": [0]}, "layer_map": [0]}
    (tmp_path / "config.json").write_text(json.dumps(sound | {"provenance": {}} | changes))
    one_line_or_nothing(read_config, tmp_path)
