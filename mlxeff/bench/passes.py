"""One pass of one of our models: an empty cache, a prompt, and the time of what follows. Prints nothing.

Peak memory is that of MLX's allocator: the weights of the arm, and what the pass adds to what was allocated before.
"""

import time
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..decode import PlainFollowing, prefill
from ..errors import MlxeffError, no_notices
from ..sampling import make_sampler
from .points import PROMPT, Point

if TYPE_CHECKING:
    from .arms import Arm


def measure(arm: "Arm", point: Point, ids: np.ndarray, step_size: int, steps: int) -> dict:
    """One pass of an arm at a point: {"values": see `rows`, "bytes_moved", "flops"}.

    ids: of the prompt, (point.batch, point.prompt). step_size: prompt tokens that are computed at once. steps: tokens
    that are decoded after a prompt of the kind "pp", for `decode_tps`; 0: none.
    """
    tokens = mx.array(ids.astype(np.uint32))
    mx.eval(tokens)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with no_notices():
        cache = arm.setup.new_cache()
        values = (_read if point.kind == PROMPT else _decode)(arm, point, tokens, cache, step_size, steps)
    values["peak_bytes"] = arm.bytes + max(0, mx.get_peak_memory() - before)
    return {"values": values, "bytes_moved": _moved(arm, point, cache), "flops": arm.token_flops}


def _read(arm: "Arm", point: Point, tokens: mx.array, cache, step_size: int, steps: int) -> dict:
    """Seconds until the first token of every prompt is evaluated, and then of some decode steps."""
    setup = arm.setup
    if point.depth:
        mx.eval(prefill(arm.base, cache, tokens[:, : point.depth], step_size, options=setup.options), cache.arrays())
    began = time.perf_counter()
    token = mx.argmax(setup.read(tokens[:, point.depth :], cache, step_size), axis=-1)
    mx.eval(token)
    first = time.perf_counter()
    for _ in range(steps):
        token = mx.argmax(arm.base.last_logits(token[:, None], cache, setup.options), axis=-1)
        mx.eval(token)
    ended = time.perf_counter()
    values = {"ttft_s": first - began, "prompt_tps": point.batch * point.tokens / (first - began)}
    return values | ({"decode_tps": point.batch * steps / (ended - first)} if steps else {})


def _decode(arm: "Arm", point: Point, tokens: mx.array, cache, step_size: int, _: int) -> dict:
    """Decode `point.tokens` tokens as `generate` does. N tokens have N - 1 times between them: the time before the
    first one is that of the prompt."""
    setup, times, history = arm.setup, [], tokens[0]
    began = time.perf_counter()
    logits = setup.read(tokens, cache, step_size)
    following = setup.following.follow(
        setup.model, cache, logits, make_sampler(), (), history, point.tokens, setup.options
    )
    for _ in setup.reading.accompany(following, history.tolist()):
        times.append(time.perf_counter())
    if len(times) != point.tokens:
        raise MlxeffError(f"{arm.name}: wanted {point.tokens} decoded tokens, got {len(times)}")
    values = {"decode_tps": (len(times) - 1) / (times[-1] - times[0])}
    if point.depth:
        values["ttft_s"] = times[0] - began
    accepted = [part["acceptance"] for part in setup.report().values() if part.get("acceptance") is not None]
    return values | ({"acceptance": accepted[0]} if accepted else {})


def _moved(arm: "Arm", point: Point, cache) -> float | None:
    """Bytes of memory that a decoded token reads: the weights, and the KV cache in the middle of the decoding. None
    where a technique makes that depend on the text, and where the model does not tell."""
    setup = arm.setup
    if not isinstance(setup.following, PlainFollowing) or setup.options.fraction != 1 or arm.read_bytes is None:
        return None
    tokens = cache.length if point.kind == PROMPT else point.prompt + point.tokens / 2
    return (arm.read_bytes + cache.read_bytes() / cache.length * tokens) / point.batch
