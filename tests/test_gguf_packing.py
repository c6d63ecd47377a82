"""GGUF's block types in MLX's packing; oracle: the `gguf` library's dequantisation, in float32. Costs 5 seconds."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlxeff.convert import convert

import checkpoint_files as files
from checkpoint_files import numbers, random_blocks
from helpers import assert_close
from mlxeff import MlxeffError, limits
from mlxeff.assembly.model import build_model, load_model
from mlxeff.checkpoint import gguf_blocks, gguf_layouts, gguf_packing, open_source
from mlxeff.checkpoint.gguf_blocks import BLOCKS
from mlxeff.checkpoint.gguf_packing import EXACT, FORMS, REQUANTISED, ROUNDED, pack, pack_codes
from mlxeff.models.gguf import config_from_gguf, weights_from_gguf
from mlxeff.ops import BITS, GROUPS

SIZES = {name: (values, nbytes) for name, values, nbytes in BLOCKS.values()}
LOSSY = {
    ROUNDED: {"Q4_K", "Q5_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ4_XS"},
    REQUANTISED: {"Q2_K", "Q6_K", "IQ2_XS", "IQ2_S"},
}
TINY = 2.0**-25  # the error of rounding to a subnormal number of half precision
# Error of the logits of the model below, relative to their root mean square. Measured: 0.01 and 0.03 at most.
LOGITS = {EXACT: 2.0**-15, ROUNDED: 0.02, REQUANTISED: 0.06}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def dequantised(blocks: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def values_of(packed, form) -> np.ndarray:
    weight, *rest = packed
    scales, biases = (each.astype(mx.float32) for each in rest)
    return np.array(mx.dequantize(weight, scales, biases, form.group, form.bits))


def packed(blocks: np.ndarray, kind: str):
    values, nbytes = SIZES[kind]
    shape = (*blocks.shape[:-1], blocks.shape[-1] // nbytes * values)
    return pack(blocks.reshape(-1), shape, FORMS[kind], values, nbytes)


def groups_of(values: np.ndarray, size: int) -> np.ndarray:
    return values.reshape(-1, size)


def test_every_block_type_has_a_form():
    assert set(FORMS) == {name for name, values, _ in BLOCKS.values() if values > 1}
    assert all(form.bits in BITS and form.group in GROUPS for form in FORMS.values())
    for loss, kinds in LOSSY.items():
        assert {kind for kind, form in FORMS.items() if form.loss == loss} == kinds


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_packs_them(rng, bits):
    codes = rng.integers(0, 1 << bits, (6, 64), dtype=np.uint8)
    words = mx.array(pack_codes(codes, bits).view("<u4"))
    ones = mx.ones((6, 1))
    assert np.array_equal(np.array(mx.dequantize(words, ones, 0 * ones, 64, bits)), codes)


@pytest.mark.parametrize("kind", FORMS)
def test_packed_values(rng, monkeypatch, kind):
    """Equal to the bit where nothing is lost. Otherwise the error of a weight is at most what rounding the scale and
    the bias to half precision makes, and half a step of the new grid where there is one."""
    monkeypatch.setattr(gguf_packing, "CHUNK_VALUES", 1 << 10)  # several pieces
    blocks, form = random_blocks(rng, kind, 7, 1024), FORMS[kind]
    weight, scales, biases = found = packed(blocks, kind)
    assert (weight.shape, weight.dtype) == ((7, 1024 * form.bits // 32), mx.uint32)
    assert scales.shape == biases.shape == (7, 1024 // form.group)
    assert scales.dtype == biases.dtype == mx.float16
    got, want = values_of(found, form), dequantised(blocks, kind)
    if form.loss == EXACT:
        assert np.array_equal(got, want)
        return
    top = (1 << form.bits) - 1
    step, bias = (np.abs(numbers(each)).reshape(-1, 1) for each in (scales, biases))
    bound = 2.0**-11 * (top * step + bias) * 1.01 + (top + 1) * TINY + (step / 2 if form.loss == REQUANTISED else 0)
    errors = np.abs(groups_of(got - want, form.group))
    assert (errors <= bound).all()
    assert errors.any()


@pytest.mark.parametrize(("kind", "most"), [("Q6_K", 0.85), ("IQ2_XS", 1.4), ("IQ2_S", 1.4)])
def test_requantised_groups(rng, kind, most):
    """Of the two scales of a group the larger one keeps its weights, but for the rounding of the new scale; zeros stay
    zeros; and the mean square error is at most `most` of that of the plain grid between the least and the largest
    weight."""
    blocks, form = random_blocks(rng, kind, 64, 1024), FORMS[kind]
    got, want = values_of(packed(blocks, kind), form), dequantised(blocks, kind)
    errors, halves = (groups_of(each, 32).reshape(-1, 2, 16) for each in (np.abs(got - want), np.abs(want)))
    exact = (errors <= 2.0**-11 * halves + 128 * TINY).all(axis=2)
    assert exact.any(axis=1).all()
    assert not exact.all(axis=1).all()
    assert (got[want == 0] == 0).all()
    low, high = groups_of(want, 32).min(axis=1, keepdims=True), groups_of(want, 32).max(axis=1, keepdims=True)
    step = (high - low) / 255
    plain = np.rint((groups_of(want, 32) - low) / step) * step + low
    assert np.square(errors).mean() <= most * np.square(plain - groups_of(want, 32)).mean()


def test_weight_between_the_last_code_and_the_next():
    """With a step of a seventeenth of the larger scale, 15 times the smaller one would be 127.5 steps, which has no
    code."""
    q = np.zeros((1, 32), np.float32)
    q[0, 16], q[0, 17] = 15, -15
    codes, scales, biases = gguf_layouts.requantised(q, np.array([[2, 1]], np.float32), np.ones((1, 1), np.float32))
    got = codes * scales + biases
    assert np.abs(got - q).max() < 0.1


@pytest.mark.parametrize(("kind", "dtype"), [("Q6_K", mx.float32), ("Q4_K", mx.float16)])
def test_small_scales(rng, kind, dtype):
    """Of Q6_K, whose scales are divided, weights of 10^-5 have float32 scales, unless larger ones beside them make the
    loss small. Subnormal scales of Q4_K are multiples of 2^-24 and need no more than float16."""
    blocks = random_blocks(rng, kind, 2, 256)
    for column in files.HALVES[kind]:
        blocks[:, column : column + 2] = np.array([3e-7], np.float16).view(np.uint8)
    found = packed(blocks, kind)
    assert found[1].dtype == found[2].dtype == dtype
    want = dequantised(blocks, kind)
    errors = np.abs(values_of(found, FORMS[kind]) - want)
    assert errors.max() < (0.01 * np.abs(want).max() if kind == "Q6_K" else 1e-12)
    mixed = np.concatenate([blocks, random_blocks(rng, kind, 2, 256)])
    assert packed(mixed, kind)[1].dtype == mx.float16


def test_mxfp4_zeros_need_no_scale(rng):
    """A block of zeros has the smallest power of two as its scale, which float16 has not."""
    blocks = random_blocks(rng, "MXFP4", 2, 64).reshape(-1, 17)
    blocks[0] = 0
    weight, scales, biases = packed(blocks.reshape(2, -1), "MXFP4")
    assert scales.dtype == mx.float16
    got, want = values_of((weight, scales, biases), FORMS["MXFP4"]), dequantised(blocks.reshape(2, -1), "MXFP4")
    assert np.array_equal(got, want)
    blocks[1, 0] = 90
    assert packed(blocks.reshape(2, -1), "MXFP4")[1].dtype == mx.float32


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.filterwarnings("error")
def test_damaged_scales(tmp_path, rng, kind):
    """Infinite and undefined scales, in a file: no error, no warning of NumPy; the other rows are as they were."""
    blocks = random_blocks(rng, kind, 3, 256)
    damaged = blocks.copy()
    rows, halves = damaged.reshape(3, -1, SIZES[kind][1]), files.HALVES.get(kind, (0,))
    for column in halves:
        rows[1, :, column : column + 2] = np.array([np.inf], np.float16).view(np.uint8)
        rows[2, :, column : column + 2] = np.array([np.nan], np.float16).view(np.uint8)
    if kind == "IQ1_M":
        rows[1:, :, 49::2] |= 0xF0
    if kind == "MXFP4":
        rows[1:, :, 0] = 255
    tensor = open_source(files.write_gguf(tmp_path / "x.gguf", "llama", {}, {"t": (damaged, kind)})).tensors["t"]
    got, want = values_of(tensor.read_packed(), FORMS[kind]), values_of(packed(blocks, kind), FORMS[kind])
    assert np.array_equal(got[0], want[0])
    assert tensor.read().shape == (3, 256)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q3_K", "MXFP4"])
def test_stacked_matrices(tmp_path, rng, kind):
    """Experts (E, rows, columns) are packed like E matrices; a vector is dense."""
    blocks, form = random_blocks(rng, kind, 3, 4, 512), FORMS[kind]
    vector = random_blocks(rng, kind, 256)
    path = files.write_gguf(tmp_path / "x.gguf", "llama", {}, {"e": (blocks, kind), "v": (vector, kind)})
    tensors = open_source(path).tensors
    parts = tensors["e"].read_packed()
    shapes = [(3, 4, 512 * form.bits // 32), *[(3, 4, 512 // form.group)] * 2]
    assert [part.shape for part in parts] == shapes
    for expert in range(3):
        alone = packed(blocks[expert], kind)
        assert all(mx.array_equal(part[expert], each) for part, each in zip(parts, alone, strict=True))
    assert tensors["e"].memory_nbytes == sum(part.nbytes for part in parts)
    assert tensors["v"].bits is None
    assert tensors["v"].memory_nbytes == 512
    assert np.array_equal(np.array(tensors["v"].read()), dequantised(vector, kind).astype(np.float16))


KEYS = {"block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 256}
KEYS |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
MATRICES = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
MATRICES |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (256, 256))
TOKENS = mx.array([[1, 5, 9, 60]])


def write_models(folder, rng, kind):
    """A Qwen2, whose rows llama.cpp does not permute: with matrices of the type `kind`, and with these in float32."""
    blocks = {f"blk.0.{name}.weight": random_blocks(rng, kind, *shape) for name, shape in MATRICES.items()}
    blocks |= {"token_embd.weight": random_blocks(rng, kind, 64, 256)}
    others = {f"blk.0.{name}.weight": (np.ones(256, np.float32), "F32") for name in ("attn_norm", "ffn_norm")}
    rows = {"q": 256, "k": 128, "v": 128}
    others |= {f"blk.0.attn_{x}.bias": (np.zeros(count, np.float32), "F32") for x, count in rows.items()}
    others |= {"output_norm.weight": (np.ones(256, np.float32), "F32")}
    keys = {f"qwen2.{key}": value for key, value in KEYS.items()}
    dense = {name: (dequantised(value, kind), "F32") for name, value in blocks.items()}
    return (
        files.write_gguf(folder / "x.gguf", "qwen2", keys, others | {n: (v, kind) for n, v in blocks.items()}),
        files.write_gguf(folder / "dense.gguf", "qwen2", keys, others | dense),
    )


def logits_of(path) -> tuple[np.ndarray, dict]:
    source = open_source(path)
    config, weights = config_from_gguf(source), weights_from_gguf(source)
    model = build_model(config, weights)
    model.load_weights(list(weights.items()), strict=True)
    return model(TOKENS, model.new_cache()), config


@pytest.mark.parametrize("kind", FORMS)
def test_model_of_each_type(tmp_path, rng, caplog, kind):
    """Logits as those of the dequantised weights; one notice where something is lost; the converted folder is the same
    model; its dense form has the file's weights, not those of the packing."""
    path, dense = write_models(tmp_path, rng, kind)
    form = FORMS[kind]
    (got, config), (want, _) = logits_of(path), logits_of(dense)
    assert config["quantization"] == {"group_size": form.group, "bits": form.bits, "mode": "affine"}
    assert_close(got, want, kind, rtol=LOGITS[form.loss])
    lost = f"x.gguf: tensors of types that MLX has not, kept in the nearest form: 8 of {kind} {form.loss}"
    assert caplog.messages == ([] if form.loss == EXACT else [lost])
    report = convert(path, tmp_path / "out")
    tensors = open_source(tmp_path / "out").tensors
    parts = [tensors[f"model.layers.0.mlp.up_proj.{part}"].read() for part in ("weight", "scales", "biases")]
    packed_parts = open_source(path).tensors["blk.0.ffn_up.weight"].read_packed()
    assert all(mx.array_equal(part, each) for part, each in zip(parts, packed_parts, strict=True))
    model, _ = load_model(tmp_path / "out")
    assert_close(model(TOKENS, model.new_cache()), got, kind, rtol=2.0**-15)
    held = sum(tensor.memory_nbytes for tensor in open_source(path).tensors.values())
    assert abs(report.disk_bytes - held) <= 4 * 1500  # norms and biases are written in half precision
    convert(path, tmp_path / "half", dequantize=True)
    half = open_source(tmp_path / "half").tensors["model.layers.0.mlp.up_proj.weight"].read()
    exact = open_source(dense).tensors["blk.0.ffn_up.weight"].read()
    assert mx.array_equal(half, exact.astype(mx.float16))


def test_types_of_several_forms_in_one_file(tmp_path, rng, caplog):
    """Each module has its own bits and group size in the config, and all losses are in one notice."""
    kinds = ["Q4_K", "Q6_K", "Q3_K", "Q6_K", "Q5_0", "F16", "Q4_K"]
    path, _ = write_models(tmp_path, rng, "Q6_K")
    source = gguf.GGUFReader(path)
    tensors = {t.name: (np.array(t.data), t.tensor_type.name) for t in source.tensors}
    for (name, shape), kind in zip(MATRICES.items(), kinds, strict=True):
        data = rng.standard_normal(shape).astype(np.float32) if kind == "F16" else random_blocks(rng, kind, *shape)
        tensors[f"blk.0.{name}.weight"] = (data, kind)
    path = files.write_gguf(tmp_path / "y.gguf", "qwen2", {f"qwen2.{k}": v for k, v in KEYS.items()}, tensors)
    quantization = logits_of(path)[1]["quantization"]
    default = {key: quantization.pop(key) for key in ("group_size", "bits", "mode")}
    assert (default["group_size"], default["bits"]) == (32, 8)
    own = {name.rpartition(".")[2]: each and (each["bits"], each["group_size"]) for name, each in quantization.items()}
    assert own == {"q_proj": (4, 32), "v_proj": (8, 128), "gate_proj": (5, 32), "up_proj": False, "down_proj": (4, 32)}
    lost = "2 of Q4_K with scales rounded to float16, 3 of Q6_K requantised to 8 bits"
    assert caplog.messages == [f"y.gguf: tensors of types that MLX has not, kept in the nearest form: {lost}"]


def test_memory_is_asked_for_the_packed_weights(tmp_path, rng, monkeypatch):
    """IQ4_NL takes twice its bytes in the file; a model that does not fit is refused before its weights are read."""
    path, _ = write_models(tmp_path, rng, "IQ4_NL")
    held = sum(tensor.memory_nbytes for tensor in open_source(path).tensors.values())
    assert held > 1.8 * path.stat().st_size
    monkeypatch.setattr(limits, "available", lambda: (held - 1.0, "a test"))
    monkeypatch.setattr(gguf_blocks, "pack", None)
    with pytest.raises(MlxeffError, match=r"x\.gguf: the weights: need"):
        load_model(path)
