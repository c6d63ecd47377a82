"""`mlxeff convert --seedlm`: real conversions of tiny models, killed and resumed, loaded again, and what is refused.

Oracle: the converted folder decoded to dense matrices and run as an ordinary model; the predicted bytes; a second
conversion that nothing interrupted.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlxeff.convert import convert
from mlxeff.convert import seedlm as conversion
from mlxeff.convert.store import Store

from helpers import assert_close
from mlxeff import MlxeffError, kernels, load
from mlxeff.assembly.model import build_model, fill, load_path
from mlxeff.cli import main
from mlxeff.seedlm.encode import encode
from mlxeff.seedlm.format import FORMATS
from mlxeff.seedlm.install import entry, metadata
from mlxeff.seedlm.linear import SeedLinear, SeedModule
from tiny_model import (
    PHI,
    quantise_folder,
    write_foreign,
    write_random_model,
    write_tiny_model,
)

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(kernels.native()[0] is None, reason=kernels.native()[1])
TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times. " * 40  # a byte a token
TOKENS = mx.array([[256, 72, 101, 108, 108, 111, 33, 9, 200, 3]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("seedlm") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def aware(tiny, text, tmp_path_factory):
    """(folder, report) of an activation-aware conversion in 4 bits."""
    folder = tmp_path_factory.mktemp("aware") / "out"
    return folder, convert(tiny, folder, seedlm="4", calibrate=text, calibration_tokens=1024)


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def dense_model(folder):
    """The model of a converted folder with every seed-encoded module decoded."""
    model = load_path(folder).model
    found = [(name, m.to_dense()) for name, m in model.named_modules() if isinstance(m, SeedModule)]
    model.update_modules(tree_unflatten(found))
    model.native = None
    return model, [name for name, _ in found]


def logits(model, tokens=TOKENS):
    return model(tokens, model.new_cache())


@pytest.mark.parametrize("bits", FORMATS)
def test_the_converted_model_is_the_decoded_one(tiny, tmp_path, bits):
    report = convert(tiny, tmp_path / "out", seedlm=bits, data_free=True)
    loaded = load_path(tmp_path / "out")
    assert loaded.backend == f"native {kernels.native()[0].isa()}"
    dense, names = dense_model(tmp_path / "out")
    assert len(names) == 14 == report.encoding["modules"]
    # Sums of the same numbers in another order, two layers deep.
    assert_close(logits(loaded.model), logits(dense), bits, rtol=2.0**-14)
    assert report.encoding["errors"].keys() == set(names)
    assert report.encoding["encoder"] == loaded.backend
    assert f"encoder    {loaded.backend}" in report.lines()
    assert 0.05 < np.mean(list(report.encoding["errors"].values())) < {"3": 0.24, "4": 0.13, "4.5": 0.09}[bits]


@pytest.mark.parametrize(("bits", "a_block", "columns"), [("3", 4.5, 12), ("4", 4, 8), ("4.5", 4.5, 8)])
def test_the_size_on_disk_is_the_predicted_one(tiny, tmp_path, bits, a_block, columns):
    report = convert(tiny, tmp_path / "out", seedlm=bits, data_free=True)
    blocks = lambda cols: -(-cols // columns) + (-(-cols // columns) % 2 if bits != "4" else 0)  # noqa: E731
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * 2
    seeds = sum(rows * blocks(cols) * a_block + 4 for rows, cols in shapes)
    embedding, norms = 261 * 64 + 2 * 261 * 4, 5 * 64 * 4  # a byte a weight, a scale and a bias for each group of 64
    assert report.disk_bytes == seeds + embedding + norms
    file = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = int.from_bytes(file[:8], "little")
    assert len(file) == 8 + header + report.disk_bytes
    assert json.loads(file[8 : 8 + header])["__metadata__"] == {"format": "mlx"} | metadata()
    assert report.encoding["bits_per_weight"] == pytest.approx(8 * seeds / 61440)


def test_the_config_describes_itself(aware):
    config = json.loads((aware[0] / "config.json").read_text())
    assert config["seedlm"]["taps"] == [0, 1, 3, 12]
    assert config["seedlm"]["modules"]["model.layers.1.mlp.down_proj"] == {"format": "4", "rows": 64, "cols": 96}
    assert config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    options = config["mlxeff"]["options"]
    assert options["seedlm"] == "4"
    assert options["keep"] == "embed:8,lm_head:8"
    assert options["calibration"].startswith("text.txt (sha256 ")
    assert options["calibration"].endswith(", 1024 tokens")
    assert "kept       model.embed_tokens (8 bits, groups of 64)" in "\n".join(aware[1].lines())


def test_calibration_lowers_the_error_of_the_outputs(tiny, text, aware, tmp_path):
    """On tokens of the calibration text, against the model it was made of."""
    convert(tiny, tmp_path / "free", seedlm="4", data_free=True)
    tokens = mx.array([token_ids(TEXT)[:200]])
    want, aware_error, free_error = (logits(load(str(f))[0], tokens) for f in (tiny, aware[0], tmp_path / "free"))
    errors = [mx.linalg.norm(got - want).item() for got in (aware_error, free_error)]
    assert errors[0] < 0.95 * errors[1]


def test_the_inputs_of_a_layer_are_those_that_the_encoded_model_computes(tiny, text, tmp_path, monkeypatch):
    """Gram matrices of the second layer, from a forward pass through the converted first one."""
    seen = {}

    def note(fmt, weight, inputs, **more):
        seen.setdefault(more["origin"].split(": ")[1], inputs.gram)
        return encode(fmt, weight, inputs, **more)

    monkeypatch.setattr(conversion, "encode", note)
    convert(tiny, tmp_path / "out", seedlm="4", calibrate=text, calibration_tokens=512)
    reference, encoded = load_path(tiny).model, dense_model(tmp_path / "out")[0]
    reference.model.layers[0] = encoded.model.layers[0]
    windows = mx.array(np.array(text_windows(512)))
    caches = reference.new_cache()
    hidden = reference.model.layers[0](reference.model.embed_tokens(windows), caches.layers[0])
    layer = reference.model.layers[1]
    normed = layer.input_layernorm(hidden).reshape(-1, 64)
    after = hidden + layer.self_attn.attend(*layer.project(hidden), caches.layers[1])
    inner = layer.post_attention_layernorm(after)
    product = nn.silu(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner)
    for name, x in (("self_attn.k_proj", normed), ("mlp.down_proj", product.reshape(-1, 96))):
        # float32 sums of 512 products, after two layers
        assert_close(seen[f"model.layers.1.{name}.weight"], (x.T @ x), name, rtol=2.0**-12)


def test_matrices_that_read_the_same_inputs_share_what_is_made_of_them(tiny, text, tmp_path, monkeypatch):
    """Of each layer: one factor for q, k and v, one for o, one for gate and up, one for down."""
    made, make = [], conversion.Inputs.of
    monkeypatch.setattr(
        conversion.Inputs, "of", lambda fmt, gram, **more: made.append(more["origin"]) or make(fmt, gram, **more)
    )
    convert(tiny, tmp_path / "out", seedlm="4", calibrate=text, calibration_tokens=512)
    layers = len(load_path(tiny).model.layers)
    assert len(made) == 4 * layers, made


def text_windows(tokens, length=256):
    ids = token_ids(TEXT)
    starts = np.linspace(0, len(ids) - length, tokens // length).astype(int)
    return [ids[start : start + length] for start in starts]


def token_ids(words):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(words)
    return [alphabet.index(letter) for piece, _ in split for letter in piece]


def test_the_same_bits_with_any_number_of_threads(tiny, text, aware, tmp_path):
    for threads in ("1", "3"):
        command(tiny, tmp_path / threads, "--seedlm", "4", "--calibrate", text, "--calibration-tokens", "1024",
                MLXEFF_NUM_THREADS=threads)  # fmt: skip
        assert digest(tmp_path / threads) == digest(aware[0])


def command(source, destination, *options, code=0, **more):
    """Run the real command; returns what it wrote to standard error."""
    line = [sys.executable, "-m", "mlxeff", "convert", str(source), str(destination), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), **more}
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert run.returncode == code, run.stderr
    return run.stderr if code else run.stderr + run.stdout


def test_a_real_process_converts_and_the_result_generates(tiny, tmp_path):
    shown = command(tiny, tmp_path / "out", "--seedlm", "4.5", "--data-free")
    assert "14 modules, 61,440 weights, 4.507 bits a weight" in shown
    line = [
        sys.executable,
        "-m",
        "mlxeff",
        "generate",
        "--model",
        str(tmp_path / "out"),
        "Hi",
        "--max-tokens",
        "5",
        "--json",
    ]
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["timings"]["backend"].startswith("native")
    assert len(answer["token_ids"]) == 5


def test_killed_and_resumed_gives_the_same_file_without_encoding_again(tiny, text, aware, tmp_path):
    out, work = tmp_path / "out", tmp_path / ".out.seedlm-work"
    line = [sys.executable, "-c", KILLED, str(tiny), str(out), str(text)]
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not out.exists()
    first = work / "layer-0000.safetensors"
    assert sorted(p.name for p in work.glob("*.safetensors")) == [first.name]
    written = first.stat().st_mtime_ns
    time.sleep(0.01)
    done = []
    report = convert(tiny, out, seedlm="4", calibrate=text, calibration_tokens=1024,
                     encoding=lambda weights, total: done.append((weights, total)))  # fmt: skip
    assert done[0] == (61440 // 2, 61440)  # the first layer at once
    assert done[-1] == (61440, 61440)
    assert digest(out) == digest(aware[0])
    assert not work.exists()
    assert len(report.encoding["errors"]) == 14
    assert written < out.stat().st_mtime_ns


# A conversion that is killed while it encodes the second layer.
KILLED = """
import os, signal, sys
from mlxeff.convert import convert, seedlm
encode, modules = seedlm.encode, []
def dying(*args, **more):
    modules.append(more["origin"])
    if len(modules) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args, **more)
seedlm.encode = dying
convert(sys.argv[1], sys.argv[2], seedlm="4", calibrate=sys.argv[3], calibration_tokens=1024)
"""


def test_the_work_of_other_options_is_not_used(tiny, text, tmp_path, caplog):
    work = tmp_path / ".out.seedlm-work"
    subprocess.run([sys.executable, "-c", KILLED, str(tiny), str(tmp_path / "out"), str(text)], cwd=ROOT, timeout=120)
    assert (work / "layer-0000.safetensors").is_file()
    with caplog.at_level("WARNING", "mlxeff"):
        convert(tiny, tmp_path / "out", seedlm="4", data_free=True)
    assert "finished layers of another source, text or options: begun anew" in caplog.text
    convert(tiny, tmp_path / "plain", seedlm="4", data_free=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")


def test_a_damaged_work_file_is_encoded_again(tmp_path, caplog):
    modules = {"a": (FORMATS["4"], 2, 8)}
    store = Store(tmp_path / "out", "x", modules)
    arrays = {"a": {"blocks": mx.ones((2, 1), mx.uint32), "exponent_bias": mx.zeros((1,), mx.int32)}}
    store.write("layer-0000", arrays, {"a": 0.1})
    again = Store(tmp_path / "out", "x", modules)
    assert again.has("layer-0000", ["a"])
    assert again.errors == {"a": 0.1}
    assert not again.has("layer-0001", ["a"])
    path = tmp_path / ".out.seedlm-work" / "layer-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level("WARNING", "mlxeff"):
        assert not again.has("layer-0000", ["a"])
    assert "damaged, computed again" in caplog.text
    assert not Store(tmp_path / "out", "y", modules).has("layer-0000", ["a"])


def test_layers_of_mixed_precision(tiny, tmp_path):
    keep = (("embed", 8), ("down_proj", 4), ("layers.0.self_attn.q_proj", 16))
    report = convert(tiny, tmp_path / "out", seedlm="3", keep=keep, data_free=True)
    model = load_path(tmp_path / "out").model
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    assert kinds["model.layers.0.mlp.down_proj"] == "QuantizedLinear"
    assert kinds["model.layers.0.self_attn.q_proj"] == "Linear"
    assert kinds["model.layers.1.self_attn.q_proj"] == "SeedLinear"
    down = model.model.layers[0].mlp.down_proj
    assert (down.bits, down.group_size) == (4, 32)
    assert report.encoding["modules"] == 11
    source = mx.load(str(tiny / "model.safetensors"))
    same = model.model.layers[0].self_attn.q_proj.weight == source["model.layers.0.self_attn.q_proj.weight"]
    assert same.all().item()
    packed = mx.quantize(source["model.layers.0.mlp.down_proj.weight"], 32, 4)[0]
    assert mx.array_equal(down.weight, packed).item()


def test_nothing_kept_encodes_the_embedding_too(tiny, text, tmp_path):
    report = convert(tiny, tmp_path / "out", seedlm="4", keep=(), calibrate=text, calibration_tokens=512)
    loaded = load_path(tmp_path / "out")
    assert type(loaded.model.model.embed_tokens).__name__ == "SeedEmbedding"
    assert "quantization" not in loaded.config
    assert report.encoding["modules"] == 15
    assert_close(logits(loaded.model), logits(dense_model(tmp_path / "out")[0]), "embedding", rtol=2.0**-14)


def test_a_quantised_source_is_dequantised_and_its_embedding_kept_as_it_is(tmp_path):
    folder = quantise_folder(write_tiny_model(tmp_path / "q"))
    convert(folder, tmp_path / "out", seedlm="4", data_free=True)
    before, after = mx.load(str(folder / "model.safetensors")), mx.load(str(tmp_path / "out" / "model.safetensors"))
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(after[f"model.embed_tokens.{part}"], before[f"model.embed_tokens.{part}"]).item()
    name = "model.layers.0.mlp.up_proj"
    dense = mx.dequantize(*(before[f"{name}.{part}"] for part in ("weight", "scales", "biases")), 32, 8)
    want = encode(FORMATS["4"], np.array(dense)).arrays
    assert np.array_equal(np.array(after[f"{name}.blocks"]), want["blocks"])
    convert(folder, tmp_path / "low", seedlm="4", keep=(("embed", 4),), data_free=True)
    embedding = load_path(tmp_path / "low").model.model.embed_tokens
    assert (embedding.bits, embedding.group_size) == (4, 64)


def test_openelm(tmp_path):
    config = {
        "model_type": "openelm", "num_transformer_layers": 2, "model_dim": 64, "head_dim": 16, "vocab_size": 261,
        "num_query_heads": [4, 8],
        "num_kv_heads": [1, 2],
        "ffn_multipliers": [0.5, 1.0], "ffn_dim_divisor": 32,
    }  # fmt: skip
    folder = write_random_model(tmp_path / "openelm", config)
    (tmp_path / "text").write_text(TEXT)
    convert(folder, tmp_path / "out", seedlm="4.5", calibrate=tmp_path / "text", calibration_tokens=512)
    loaded = load_path(tmp_path / "out")
    assert "unfused" not in loaded.backend
    assert_close(logits(loaded.model), logits(dense_model(tmp_path / "out")[0]), "openelm", rtol=2.0**-14)


def test_a_seed_encoded_folder_converts_to_another_type_but_not_to_other_seeds(aware, tmp_path):
    convert(aware[0], tmp_path / "half", dtype="float16")
    model = load_path(tmp_path / "half").model
    blocks = load_path(aware[0]).model.model.layers[1].mlp.up_proj["blocks"]
    assert mx.array_equal(model.model.layers[1].mlp.up_proj["blocks"], blocks).item()
    assert model.model.norm.weight.dtype == mx.float16
    with pytest.raises(MlxeffError, match="already"):
        convert(aware[0], tmp_path / "again", seedlm="4")


def test_a_model_of_mlx_lm_through_the_adapter(tmp_path):
    """Phi-3's packed projections, seed-encoded by hand; the oracle is the same model with the decoded matrices."""
    folder = write_foreign(tmp_path / "phi", PHI)
    weights, seeded, decoded = mx.load(str(folder / "model.safetensors")), {}, {}
    modules = {}
    for name in [n for n in weights if "_proj" in n and n.endswith(".weight")]:
        module, found = name.removesuffix(".weight"), encode(FORMATS["3"], np.array(weights[name]))
        modules[module] = (FORMATS["3"], *weights[name].shape)
        seeded |= {f"{module}.{kind}": mx.array(array) for kind, array in found.arrays.items()}
        decoded[name] = mx.array(found.decoded)
    assert len(modules) == 8
    kept = {name: value for name, value in weights.items() if name not in decoded}
    mx.save_safetensors(str(folder / "model.safetensors"), kept | decoded, {"format": "mlx"})
    dense = load_path(folder).model
    want = dense(TOKENS, dense.new_cache())
    mx.save_safetensors(str(folder / "model.safetensors"), kept | seeded, {"format": "mlx"} | metadata())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"seedlm": entry(modules)}))
    model = load_path(folder).model
    assert isinstance(model.model.model.layers[1].mlp.down_proj, SeedLinear)
    assert_close(model(TOKENS, model.new_cache()), want, "phi3", rtol=2.0**-14)
    damaged = seeded | {"model.layers.0.mlp.down_proj.exponent_bias": mx.array([500], mx.int32)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept | damaged, {"format": "mlx"} | metadata())
    with pytest.raises(MlxeffError, match="down_proj: exponent_bias: wanted -96 to 96, got 500"):
        load_path(folder)


def rewrite(folder, weights=None, head=None, **config):
    """The folder with other weights, file header or config keys."""
    old = mx.load(str(folder / "model.safetensors"))
    mx.eval(old)
    mx.save_safetensors(str(folder / "model.safetensors"), old | (weights or {}), metadata() if head is None else head)
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(kept | config))


def test_damaged_folders_are_refused_in_one_line(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out, seedlm="4", data_free=True)
    file, name = out / "model.safetensors", "model.layers.1.mlp.up_proj.blocks"
    whole, config = file.read_bytes(), json.loads((out / "config.json").read_text())
    blocks = np.array(mx.load(str(file))[name])
    zero = blocks.copy()
    zero[5, 2] &= 0xFFFF0000
    short = json.loads(json.dumps(config["seedlm"]))
    short["modules"]["model.layers.1.mlp.up_proj"]["cols"] = 56
    cases = [
        ({name: mx.array(zero)}, None, {}, "up_proj: wanted seeds 1 to 65535, got 0 at row 5, block 2"),
        ({name.replace("blocks", "exponent_bias"): mx.array([-97], mx.int32)}, None, {}, "wanted -96 to 96, got -97"),
        ({name: mx.array(blocks[:, :7])}, None, {}, r"wanted shape \(96, 8\), got \(96, 7\)"),
        ({name: mx.array(blocks.astype(np.uint16))}, None, {}, "blocks: wanted uint32"),
        ({}, {"format": "mlx"}, {}, "the weights no 'seedlm' header"),
        ({}, {"seedlm": metadata()["seedlm"].replace("12", "13")}, {}, "taps: wanted"),
        ({}, None, {"seedlm": config["seedlm"] | {"version": 9}}, "version: wanted 1, got 9"),
        ({}, None, {"seedlm": short}, r"up_proj: wanted shape \(96, 64\), got \(96, 56\)"),
    ]
    for weights, head, changes, complaint in cases:
        rewrite(out, weights, head, **changes)
        with pytest.raises(MlxeffError, match=complaint) as caught:
            load_path(out)
        assert "\n" not in str(caught.value)
        file.write_bytes(whole)
        (out / "config.json").write_text(json.dumps(config))
    file.write_bytes(whole[:-5])
    with pytest.raises(MlxeffError, match="incomplete: wanted"):
        load_path(out)


def test_bad_weights_leave_nothing_behind(tiny, tmp_path):
    folder = tmp_path / "m"
    subprocess.run(["cp", "-r", str(tiny), str(folder)], check=True)
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.1.self_attn.v_proj.weight"
    for value in (float("nan"), float("inf")):
        damaged = np.array(weights[name])
        damaged[3, 4] = value
        mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: mx.array(damaged)}, {"format": "mlx"})
        with pytest.raises(MlxeffError, match=rf"{name}: wanted finite weights, got {value} at \(3, 4\)"):
            convert(folder, tmp_path / "out", seedlm="4", data_free=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seedlm": "5"}, "wanted 3, 4, 4.5 bits, got '5'"),
        ({"seedlm": "4", "quantize": (4, 64)}, "wanted it without quantize"),
        ({"data_free": True}, "wanted with seedlm, got none"),
        ({"seedlm": "4", "data_free": True, "calibrate": "x"}, "wanted it without calibrate"),
        ({"seedlm": "4", "calibrate": "/nowhere"}, "/nowhere: cannot be read"),
        ({"seedlm": "4", "calibrate": "short"}, "wanted at least 256 tokens, got 5"),
        ({"seedlm": "4", "calibrate": "binary"}, "binary: wanted UTF-8 text"),
        ({"seedlm": "4", "keep": (("gate", 7),)}, "keep: gate: wanted bits of"),
        ({"seedlm": "4", "keep": (("nothing", 8),)}, "keep: nothing: wanted parts of names of linear layers"),
    ],
)
def test_unusable_options_are_refused_in_one_line(tiny, tmp_path, monkeypatch, options, complaint):
    (tmp_path / "short").write_text("Hello")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlxeffError, match=complaint) as caught:
        convert(tiny, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_calibration_says_what_to_do(tiny, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(MlxeffError, match=r"name it with --tokenizer, or --data-free"):
        convert(folder, tmp_path / "out", seedlm="4")


def test_a_dry_run_predicts_and_writes_nothing(tiny, tmp_path, aware):
    report = convert(tiny, tmp_path / "out", seedlm="4", dry_run=True)
    assert report.disk_bytes == aware[1].disk_bytes
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(tiny), str(tmp_path / "out"), "--seedlm", "5"])


def test_a_seed_encoded_model_is_filled_strictly(aware):
    """Every array of every module is wanted, and no other."""
    config = json.loads((aware[0] / "config.json").read_text())
    weights = mx.load(str(aware[0] / "model.safetensors"))
    model = build_model(config, weights)
    assert dict(tree_flatten(model.parameters())).keys() == weights.keys()
    del weights["model.layers.0.mlp.up_proj.exponent_bias"]
    with pytest.raises(MlxeffError, match=r"missing 1 tensors: model\.layers\.0\.mlp\.up_proj\.exponent_bias"):
        fill(model, weights, "x")
