"""The training loop on toy modules: Adam by its formulas, and being killed and resumed to the bit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close
from mlxeff.errors import MlxeffError
from mlxeff.training import BETAS, CLIP, LAST_RATE, Training, schedule, train

DATA = np.random.default_rng(3).standard_normal((64, 6)).astype(np.float32)
DATA[:, :3] = 0.3 * np.sin(DATA[:, 3:])


class Toy(nn.Module):
    """Two layers that learn the first three columns of rows from the last three; a frozen number beside them."""

    def __init__(self, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 3)
        self.scale = mx.array(0.5)
        self.freeze(keys=["scale"], recurse=False)

    def __call__(self, x):
        return self.second(mx.tanh(self.first(x))) * self.scale


def run(settings, seed=0, data=DATA, checkpoint=None, progress=None):
    """(losses, weights by name) of a training of a new toy."""
    toy = Toy(seed)
    step = nn.value_and_grad(toy, lambda rows: (toy(rows[:, 3:]) - rows[:, :3]).square().mean())

    def batch(index):
        chooser = np.random.default_rng([settings.seed, index])
        return (mx.array(data[chooser.integers(0, len(data), settings.batch)]),)

    losses = train(toy, step, batch, (data,), settings, checkpoint, progress)
    return losses, dict(tree_flatten(toy.parameters()))


SETTINGS = Training(steps=12, batch=4, rate=1e-2, warmup=3, seed=6, every=4)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    """Killed after step 10: the checkpoint is that of step 8."""
    path = tmp_path / "state"

    def kill(done, total):
        if done == 10:
            raise KeyboardInterrupt

    whole, want = run(SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, checkpoint=path, progress=kill)
    done = []
    losses, got = run(SETTINGS, checkpoint=path, progress=lambda *at: done.append(at))
    assert done == [(step, 12) for step in (9, 10, 11, 12)]
    assert losses == whole
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert_close(value, want[name], name, rtol=0, atol=0)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    done.clear()
    again, got = run(SETTINGS, checkpoint=path, progress=lambda *at: done.append(at))
    assert (again, done) == (whole, [])
    assert_close(got["first.weight"], want["first.weight"], "of a finished training", rtol=0, atol=0)


def test_the_last_step_is_kept_wherever_it_falls(tmp_path):
    run(Training(steps=5, every=4), checkpoint=tmp_path / "state")
    done = []
    run(Training(steps=5, every=4), checkpoint=tmp_path / "state", progress=lambda *at: done.append(at))
    assert done == []


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "state"
    run(SETTINGS, checkpoint=path)
    others = {
        "settings": {"settings": Training(steps=12, batch=4, rate=1e-2, warmup=3, seed=7, every=4)},
        "first weights": {"seed": 1},
        "data": {"data": DATA + 1},
    }
    for what, changes in others.items():
        with pytest.raises(MlxeffError, match=r"state: wanted a checkpoint of this training \(\w+\), got \w+: delete"):
            pytest.fail(f"other {what}: {run(**{'settings': SETTINGS, 'checkpoint': path} | changes)}")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(MlxeffError, match="state: wanted a training's checkpoint, got "):
        run(SETTINGS, checkpoint=path)


def test_the_steps_are_those_of_adam_by_its_formulas():
    """A linear loss has the same gradient everywhere; here it changes from step to step, and some are clipped."""
    assert (BETAS, CLIP, LAST_RATE) == ((0.9, 0.95), 1.0, 0.1)
    settings = Training(steps=30, rate=0.1, warmup=5)
    slopes = np.random.default_rng(0).standard_normal((30, 4)) * 10.0 ** np.arange(-2, 1).repeat(10)[:, None]
    norms = np.linalg.norm(slopes, axis=1)
    assert (norms > CLIP).any()
    assert (norms < CLIP).any()
    toy = nn.Module()
    toy.w = mx.zeros(4)
    step = nn.value_and_grad(toy, lambda slope: (slope * toy.w).sum())
    losses = train(toy, step, lambda index: (mx.array(slopes[index].astype(np.float32)),), (slopes,), settings)

    w, mean, square, want = np.zeros(4), np.zeros(4), np.zeros(4), []
    for index, slope in enumerate(slopes):
        want.append((slope * w).sum())
        gradient = slope * min(1, CLIP / norms[index])
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        done = max(0, index - 5) / 25
        falling = LAST_RATE + (1 - LAST_RATE) * (1 + np.cos(np.pi * done)) / 2
        rate = 0.1 * min((index + 1) / 5, falling)
        unbiased = mean / (1 - BETAS[0] ** (index + 1)), square / (1 - BETAS[1] ** (index + 1))
        w = w - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    # Thirty steps, each rounded; the clipped norm has 1e-6 added to it.
    assert_close(toy.w, w, "weights", rtol=2.0**-15)
    assert losses == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    rate = schedule(Training(steps=100, rate=2.0, warmup=20))
    got = [rate(mx.array(step, mx.uint64)).item() for step in (0, 9, 19, 20, 60, 100)]  # as Adam counts its steps
    assert got == pytest.approx([0.1, 1.0, 2.0, 2.0, 1.1, 0.2])


def test_training_lowers_the_loss_and_leaves_what_is_frozen():
    losses, weights = run(Training(steps=200, batch=16, rate=1e-2))
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:20])
    assert weights["scale"].item() == 0.5


@pytest.mark.parametrize(
    ("value", "slope", "complaint"),
    [
        (float("nan"), 0.0, "training: step 3: wanted a finite loss, got nan: lower the learning rate"),
        (1.0, float("inf"), "training: wanted finite weights after the last step, got others"),
    ],
)
def test_numbers_that_are_not_finite_stop(value, slope, complaint):
    """At the third step of three."""
    toy = nn.Module()
    toy.w = mx.zeros(2)

    def step(index):
        last = index == 2
        return mx.array(value if last else 1.0), {"w": mx.full((2,), slope if last else 0.1)}

    with pytest.raises(MlxeffError, match=complaint):
        train(toy, step, lambda index: (index,), (), Training(steps=3))
