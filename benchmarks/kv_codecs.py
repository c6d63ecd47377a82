"""Four bits for keys and values: which grouping, does a rotation help, and how exact do the newest tokens have to be?
Ways to round the built-in model's KV cache at the same bits, beside the float32 cache and an 8-bit one.

    python benchmarks/kv_codecs.py [--windows 2] [--save]
    python benchmarks/kv_codecs.py --report [FILE]

Each number has 4 bits, and each group of 64 numbers a scale and a zero of 16 bits: 4.5 bits in all. The newest 64 to
127 tokens are not rounded unless an arm says so. All arms compute with a dense cache whose tokens were rounded.

per channel   keys in groups of one channel of 64 tokens, values of one token: the planes of QuantSpec
per token     keys and values in groups of one token
calibrated    as per token, with the keys' channels brought to mean 0 and deviation 1 first, by statistics of another
              text
rotated       a Hadamard transform along the head before rounding, undone after it

"ends in 8 bits" keeps the first and the last two layers in 8 bits. "newest in 8 bits" and "newest too" round the newest
tokens to 8 and to 4 bits as soon as they are appended. "accepted" is the share of tokens at which the arm's first
choice is that of the 8-bit cache: what a greedy draft on this cache would have accepted.

Two more tables have biases in the keys, as models of the Qwen 2 family have them: in three slow channels of each head,
seeded, of 5 to 15 and of 30 to 90 times the deviation of a channel in the first and last two layers, and an eighth of
that in the others.
"""

import argparse
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from kv_cache import CHUNK, PROMPT, STEP_SIZE, WINDOW, run
from mlxeff.bench.tables import table
from mlxeff.cache import KVCache, LayerCache
from mlxeff.decode import prefill
from mlxeff.eval.measures import compare, means
from mlxeff.ops import attention, log_softmax
from mlxeff.quantspec.planes import MIDDLE, decode, encode
from mlxeff.running import EXACT, RunOptions

SECTION = "kv-codecs"  # of RESULTS.md
BLOCK = 64  # tokens
ENDS = 2  # layers at each end

FACTORS = (0, 10, 60)  # of the biases, see `biases`
BASE = 100000.0  # of the built-in model's rotary embedding

Codec = Callable[[mx.array], mx.array]  # a block of keys or values (B, G, N, BLOCK, E) → the same, rounded
Codecs = tuple[Codec, Codec]  # of keys and values


def rounded(groups: mx.array, bits: int) -> mx.array:
    """Numbers with a group along the last axis, rounded to 4 or 8 bits."""
    codes, scale, zero = encode(groups)
    return decode(codes if bits == 8 else (codes >> 4).astype(mx.float32) * 16 + MIDDLE, scale, zero)


def by_channel(block: mx.array, bits: int = 4) -> mx.array:
    """The block with a group for each channel."""
    return rounded(block.swapaxes(-1, -2), bits).swapaxes(-1, -2)


def by_token(block: mx.array, bits: int = 4) -> mx.array:
    """The block with a group for each token."""
    return rounded(block, bits)


def turned(codec: Codec) -> Codec:
    """The codec between a Hadamard transform along the head and the same again, which undoes it."""
    return lambda block: mx.hadamard_transform(codec(mx.hadamard_transform(block)))


def calibrated(codec: Codec, mean: mx.array, deviation: mx.array) -> Codec:
    """The codec of channels that are brought to mean 0 and deviation 1; both are (G, 1, 1, E)."""
    return lambda block: codec((block - mean) / deviation) * deviation + mean


class RoundedLayer(LayerCache):
    """A dense cache that rounds blocks of tokens as soon as a whole block of newer ones follows them. `codecs` are
    those of keys and values; `newest` those of tokens that are appended. `bias` (G, E) is added to the keys, rotated as
    the model rotates keys."""

    storage = store = "rounded"

    def __init__(self, window: int | None, codecs: Codecs, newest: Codecs | None = None, bias: mx.array | None = None):
        super().__init__(window, mx.float32)
        self.codecs, self.newest, self.bias, self.done = codecs, newest, bias, 0
        self.exact: list[mx.array] = []  # keys and values of all tokens, where the newest ones are rounded

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, _options: RunOptions = EXACT
    ) -> mx.array:
        return attention(queries, *self.append(keys, values), scale, self.window)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.bias is not None:
            keys = keys + rotated(self.bias, self.length, keys.shape[2])
        self.finish_blocks()
        rows = [keys, values]
        if self.newest:
            old = self.exact or [rows[0][:, :, :0], rows[1][:, :, :0]]
            self.exact = [mx.concatenate(pair, axis=2) for pair in zip(old, rows, strict=True)]
            rows = [codec(each[:, :, None])[:, :, 0] for codec, each in zip(self.newest, rows, strict=True)]
        return super().append(*rows)

    def finish_blocks(self) -> None:
        """Round what is no longer among the newest tokens."""
        end = max(0, self.length // BLOCK - 1) * BLOCK
        if end <= self.done:
            return
        held, rows = self.exact or [self.keys, self.values], []
        for each, codec in zip(held, self.codecs, strict=True):
            old = each[:, :, self.done : end]
            rows.append(codec(old.reshape(*old.shape[:2], -1, BLOCK, old.shape[-1])).reshape(old.shape))
        self.keys[:, :, self.done : end], self.values[:, :, self.done : end] = rows
        self.done = end


def rotated(bias: mx.array, start: int, count: int) -> mx.array:
    """A bias (G, E) in the rotary embedding of `count` positions from `start` on: (1, G, count, E)."""
    half = bias.shape[-1] // 2
    angles = mx.arange(start, start + count)[:, None] * BASE ** (-mx.arange(half) / half)
    low, high = bias[:, None, :half], bias[:, None, half:]
    cosines, sines = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([low * cosines - high * sines, low * sines + high * cosines], axis=-1)[None]


def biases(found: list[tuple[mx.array, mx.array]], factor: float) -> list[mx.array | None]:
    """The biases (G, E) of each layer, of about `factor` deviations; None where the factor is 0."""
    if not factor:
        return [None] * len(found)
    rng, made = np.random.default_rng(7), []
    for layer, (_, deviation) in enumerate(found):
        groups, size = deviation.shape[0], deviation.shape[-1]
        bias, here = (
            np.zeros((groups, size), np.float32),
            factor if min(layer, len(found) - 1 - layer) < ENDS else factor / 8,
        )
        for head, deviations in zip(bias, deviation, strict=True):
            slow = rng.choice(np.arange(size * 5 // 16, size // 2), 3, replace=False) + rng.choice([0, size // 2], 3)
            head[slow] = rng.choice([-1, 1], 3) * here * rng.uniform(0.5, 1.5, 3) * float(deviations.mean())
        made.append(mx.array(bias))
    return made


def statistics(model, ids: list[int]) -> list[tuple[mx.array, mx.array]]:
    """(mean, deviation) of each channel of each layer's keys, (G, 1, 1, E)."""
    held = model.new_cache()
    mx.eval(prefill(model, held, mx.array(ids), STEP_SIZE))
    keys = [layer.state()[0][0] for layer in held.layers]
    return [(k.mean(1)[:, None, None], mx.sqrt(k.var(1))[:, None, None] + 1e-6) for k in keys]


def arms(found: list[tuple[mx.array, mx.array]], few: bool) -> dict[str, list[tuple[Codecs, Codecs | None]]]:
    """Name → the codecs of each layer, and those of its newest tokens. `found` are the layers' `statistics`; `few`
    leaves out what the first table has decided."""
    count = len(found)
    exact = lambda block: block  # noqa: E731
    eight = (lambda block: by_token(block, 8),) * 2
    turned_eight, turned_four = (tuple(turned(codec) for codec in (each, each)) for each in (eight[0], by_token))
    ways = {
        "per channel": [(by_channel, by_token)] * count,
        "per channel, rotated": [(turned(by_channel), turned(by_token))] * count,
        "per token": [(by_token, by_token)] * count,
        "per token, rotated": [turned_four] * count,
        "per token, calibrated": [(calibrated(by_token, *each), by_token) for each in found],
    }
    ends = {
        f"{name}, ends in 8 bits": [
            eight if min(i, count - 1 - i) < ENDS else codecs for i, codecs in enumerate(layers)
        ]
        for name, layers in ways.items()
    }
    made = {name: [(codecs, None) for codecs in layers] for name, layers in (ways if few else ways | ends).items()}
    made |= {
        "per token, rotated, newest in 8 bits": [(turned_four, turned_eight)] * count,
        "the same, keys in 8 bits": [((turned_eight[0], turned_four[1]), turned_eight)] * count,
        "per token, rotated, newest too": [(turned_four, turned_four)] * count,
        "8 bits, not rotated": [(eight, eight)] * count,
    }
    return {"float32": [((exact, exact), None)] * count, "8 bits": [(turned_eight, turned_eight)] * count} | made


def measure(model, ids: list[int], windows: int, factor: float) -> dict:
    """Arm → perplexity, KL and agreement with the float32 cache, and `accepted` beside the 8-bit one. `factor` as in
    `biases`."""
    known = statistics(model, ids[windows * WINDOW : (windows + 1) * WINDOW])
    codecs, added = arms(known, factor > 0), biases(known, factor)
    found, drafts = {name: [] for name in codecs}, {name: [] for name in codecs}
    for start in range(0, windows * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        caches = {}
        for name, layers in codecs.items():
            made = [RoundedLayer(model.window(i), *pair, added[i]) for i, pair in enumerate(layers)]
            caches[name] = KVCache(made)
            mx.eval(prefill(model, caches[name], mx.array(window[:PROMPT]), STEP_SIZE))
        for at in range(PROMPT, WINDOW - CHUNK, CHUNK):
            tokens, targets = mx.array([window[at : at + CHUNK]]), np.array(window[at + 1 : at + CHUNK + 1])
            rows = {name: log_softmax(model(tokens, held)[0]) for name, held in caches.items()}
            for name, row in rows.items():
                found[name].append(compare(row, rows["float32"], targets))
                drafts[name].append(compare(row, rows["8 bits"], targets))
        print(f"biases of {factor:g}: window {start // WINDOW + 1} of {windows}", file=sys.stderr)
    return {name: means(each) | {"accepted": means(drafts[name])["agreement"]} for name, each in found.items()}


def text(document: dict) -> str:
    """The tables, in Markdown."""
    parts = []
    for factor, measured in document["arms"].items():
        rows = [
            [
                name,
                f"{each['perplexity']:.3f}",
                f"{each['kl']:.1e}",
                f"{each['agreement']:.2%}",
                f"{each['accepted']:.2%}",
            ]
            for name, each in measured.items()
            if name != "float32"
        ]
        title = f"4 bits, biases of {factor}" if factor != "0" else "4 bits"
        parts.append(table([title, "perplexity", "KL", "same first token", "accepted"], rows))
    return "\n\n".join(parts)


def measured(model, ids: list[int], options: argparse.Namespace) -> dict:
    """The document without its card: factor of the biases → arm → what was measured. The tables with biases are of one
    window."""
    return {"arms": {f"{f:g}": measure(model, ids, 1 if f else options.windows, f) for f in FACTORS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2)
    run(parser, SECTION, text, measured)


if __name__ == "__main__":
    main()
