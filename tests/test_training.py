"""Training of whole models on the native kernels: gradients against MLX's own and against finite differences, losses
step by step.
"""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from helpers import assert_close
from mlxeff import kernels, ops
from mlxeff.ops import mlx_only
from tiny_model import CONFIG, random_model

native, reason = kernels.native()
pytestmark = pytest.mark.skipif(native is None or kernels.device() != "cpu", reason=reason or "the device is a GPU")

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "LICENSE").read_bytes()
OPENELM = {
    "model_type": "openelm",
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 16,
    "num_query_heads": [4, 8],
    "num_kv_heads": [1, 2],
    "ffn_multipliers": [0.5, 1.5],
    "ffn_dim_divisor": 32,
    "vocab_size": 261,
}
MODELS = {
    "llama": CONFIG,
    "untied, biases": CONFIG | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "qwen3": CONFIG | {"model_type": "qwen3", "head_dim": 32},
    "window": CONFIG | {"model_type": "mistral", "sliding_window": 5},
    "yarn": CONFIG | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "openelm": OPENELM,
    "openelm, not gated": OPENELM | {"ffn_with_glu": False},
}


def batches(count, rows=4, length=33, seed=0):
    """Pieces of a text as byte tokens, (rows, length)."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        starts = random.integers(0, len(TEXT) - length, rows)
        yield mx.array([list(TEXT[start : start + length]) for start in starts])


def loss(model, tokens):
    logits = model(tokens[:, :-1], model.new_cache())
    return ops.cross_entropy(logits, tokens[:, 1:]).mean()


def trainable(name, scale=0.1):
    return random_model(MODELS[name], seed=3, scale=scale).train()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_equal_mlx(name):
    model = trainable(name)
    (tokens,) = batches(1)
    step = nn.value_and_grad(model, loss)
    value, gradients = step(model, tokens)
    with mlx_only():
        want, wanted = step(model, tokens)
    assert not np.array_equal(value, want) or not all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(tree_flatten(gradients), tree_flatten(wanted))
    ), "MLX's kernels ran"
    assert_close(value, want, "loss")
    # Forward and backward pass through some thirty roundings in a row, each side its own.
    for (path, got), (_, expected) in zip(tree_flatten(gradients), tree_flatten(wanted), strict=True):
        assert_close(got, expected, path, rtol=2.0**-15)


@pytest.mark.parametrize("name", ["llama", "openelm"])
def test_finite_differences(name):
    """The slope along the gradient, and along a random part of it in each array alone, by central differences."""
    model = trainable(name)
    (tokens,) = batches(1)
    _, gradients = nn.value_and_grad(model, loss)(model, tokens)
    parameters = model.trainable_parameters()

    def moved(direction, distance):
        model.update(tree_map(lambda p, d: p + distance * d, parameters, direction))
        return loss(model, tokens).item()

    def check(direction, what):
        slope = sum((g * d).sum().item() for (_, g), (_, d) in zip(tree_flatten(gradients), tree_flatten(direction)))
        length = sum((d**2).sum().item() for _, d in tree_flatten(direction)) ** 0.5
        step = 0.02 / length
        measured = (moved(direction, step) - moved(direction, -step)) / (2 * step)
        # The loss, near 5.6, is rounded to 2^-22: over a step of 0.02 that is 1e-5 of slope. The curve adds its part.
        assert abs(measured - slope) < 0.01 * abs(slope) + 2e-5 * length, f"{what}: {measured} by differences, {slope}"

    check(gradients, "gradient")
    still = dict(tree_flatten(tree_map(mx.zeros_like, gradients)))
    for index, (path, gradient) in enumerate(tree_flatten(gradients)):
        part = gradient * mx.random.uniform(shape=gradient.shape, key=mx.random.key(index))
        check(tree_unflatten([*(still | {path: part}).items()]), path)


def train(name, steps):
    model = trainable(name, scale=0.05)
    optimizer = optim.AdamW(learning_rate=3e-3)
    step = nn.value_and_grad(model, loss)
    losses = []
    for tokens in batches(steps):
        value, gradients = step(model, tokens)
        optimizer.update(model, gradients)
        mx.eval(value, model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses


def test_twenty_steps_of_training_have_the_losses_of_mlx():
    """AdamW divides by the root of the squared gradients: where these are near 0, rounding decides the step's sign, and
    differences grow from step to step, here to less than 2e-4 of the loss. Learning itself takes the loss down by 1.5.
    """
    got = train("llama", 20)
    with mlx_only():
        want = train("llama", 20)
    assert got != want, "MLX's kernels ran"
    assert got == pytest.approx(want, rel=2e-4)
    assert got[0] - got[-1] > 1.5
    assert train("llama", 3) == got[:3], "not repeatable"


def test_a_quantised_model_has_gradients_for_its_input_side():
    """As for low-rank adapters: the norms of a model with quantised matrices are trained through these."""
    model = trainable("untied, biases")
    nn.quantize(model, 32, 4)
    model.freeze()
    model.apply_to_modules(lambda _, module: isinstance(module, nn.RMSNorm) and module.unfreeze())
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    (tokens,) = batches(1)
    names = [path for path, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 5
    assert all("norm" in name for name in names)
    step = nn.value_and_grad(model, loss)
    value, gradients = step(model, tokens)
    with mlx_only():
        want, wanted = step(model, tokens)
    assert_close(value, want, "loss")
    for (path, got), (_, expected) in zip(tree_flatten(gradients), tree_flatten(wanted), strict=True):
        assert_close(got, expected, path, rtol=2.0**-15)


def test_checkpointed_layers_and_a_compiled_step_have_the_same_gradients():
    model = trainable("llama")
    (tokens,) = batches(1)
    step = nn.value_and_grad(model, loss)
    want = tree_flatten(step(model, tokens))
    got = tree_flatten(mx.compile(lambda tokens: step(model, tokens))(tokens))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, want))

    for layer in model.layers:
        layer.mlp = Checkpointed(layer.mlp)
    value, gradients = nn.value_and_grad(model, loss)(model, tokens)
    flat = {path.replace("mlp.inner", "mlp"): g for path, g in tree_flatten(gradients)}
    wanted = dict(tree_flatten(step_gradients(want)))
    assert np.array_equal(value, want[0][1])
    assert set(flat) == set(wanted)
    assert all(np.array_equal(flat[path], wanted[path]) for path in wanted)


def step_gradients(flat):
    """(value, gradients) flattened → the gradients."""
    return tree_unflatten([(path.partition(".")[2], g) for path, g in flat if path.startswith("1.")])


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return nn.utils.checkpoint(self.inner)(x)


@pytest.mark.parametrize("name", ["llama", "openelm"])
def test_gradients_do_not_depend_on_the_number_of_threads(name):
    model = trainable(name)
    (tokens,) = batches(1)
    results = []
    try:
        for threads in (1, 2, 3):
            native.set_num_threads(threads)
            result = nn.value_and_grad(model, loss)(model, tokens)
            mx.eval(result)
            results.append(tree_flatten(result))
    finally:
        native.set_num_threads(0)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(results[0], other))


def test_unfused_inference_of_a_batch_equals_one_by_one():
    """Batches run on the native operations; each row is what it is alone, to rounding."""
    model = random_model(MODELS["llama"]).eval()
    tokens = next(iter(batches(1)))
    cache = model.new_cache()
    got = mx.concatenate([model(tokens[:, :20], cache), model(tokens[:, 20:], cache)], axis=1)
    for row in range(tokens.shape[0]):
        with mlx_only():
            want = model(tokens[row : row + 1], model.new_cache())
        assert_close(got[row : row + 1], want, f"row {row}", rtol=2.0**-15)


def test_a_pass_in_flight_at_the_end_of_the_process():
    code = """if True:
        import mlx.core as mx
        from mlxeff import ops
        x, w = mx.ones((64, 256)), mx.ones((256, 256))
        def loss(x, w):
            for _ in range(20):
                x = ops.rms_norm(ops.swiglu(ops.linear(x, w), x), w[0], 1e-5)
            return ops.cross_entropy(x, mx.zeros((64,), mx.int32)).mean()
        mx.async_eval(mx.value_and_grad(loss, argnums=(0, 1))(x, w))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
