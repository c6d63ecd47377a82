"""Four bits for keys and values: which grouping, and does a rotation help? Ways to round the older tokens of the
built-in model's KV cache at the same bits, beside the float32 cache and the 8-bit one.

    python benchmarks/kv_codecs.py [--windows 2] [--save]
    python benchmarks/kv_codecs.py --report [FILE]

Each number has 4 bits, and each group of 64 numbers a scale and a zero of 16 bits: 4.5 bits in all. The newest 64 to
127 tokens are not rounded, as in the real cache. All arms compute with a dense cache whose older tokens were rounded.

per channel   keys in groups of one channel of 64 tokens, values of one token: the planes of QuantSpec
per token     keys and values in groups of one token
calibrated    as per token, with the keys' channels brought to mean 0 and deviation 1 first, by statistics of another
              text
rotated       a Hadamard transform along the head before rounding, undone after it

"ends in 8 bits" keeps the first and the last two layers in 8 bits. "accepted" is the share of tokens at which the arm's
first choice is that of the 8-bit cache: what a greedy draft on this cache would have accepted.
"""

import argparse
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from distributions import compare, means
from kv_cache import CHUNK, PROMPT, STEP_SIZE, WINDOW, run
from mlxeff.bench.tables import table
from mlxeff.cache import KVCache, LayerCache
from mlxeff.decode import prefill
from mlxeff.ops import log_softmax
from mlxeff.quantspec.planes import decode, encode

SECTION = "kv-codecs"  # of RESULTS.md
BLOCK = 64  # tokens
ENDS = 2  # layers at each end

Codec = Callable[[mx.array], mx.array]  # a block of keys or values (B, G, N, BLOCK, E) → the same, rounded


def rounded(groups: mx.array, bits: int) -> mx.array:
    """Numbers with a group along the last axis, rounded to 4 or 8 bits."""
    upper, lower, scale, zero = encode(groups)
    return decode(upper, lower if bits == 8 else None, scale, zero, groups.shape[-1])


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
    """A dense cache that rounds blocks of tokens as soon as a whole block of newer ones follows them."""

    def __init__(self, window: int | None, keys: Codec, values: Codec):
        super().__init__(window, mx.float32)
        self.codecs, self.done = (keys, values), 0

    def room(self, new: int, shape: tuple[int, int, int], dtype: mx.Dtype) -> dict[str, mx.array]:
        end = max(0, self.length // BLOCK - 1) * BLOCK
        if end > self.done:
            rows = []
            for buffer, codec in zip((self.keys, self.values), self.codecs, strict=True):
                old = buffer[:, :, self.done : end]
                blocks = old.reshape(*old.shape[:2], -1, BLOCK, old.shape[-1])
                rows.append(codec(blocks).reshape(old.shape))
            self.keys[:, :, self.done : end], self.values[:, :, self.done : end] = rows
            self.done = end
        return super().room(new, shape, dtype)


def statistics(model, ids: list[int]) -> list[tuple[mx.array, mx.array]]:
    """(mean, deviation) of each channel of each layer's keys, (G, 1, 1, E)."""
    held = model.new_cache()
    mx.eval(prefill(model, held, mx.array(ids), STEP_SIZE))
    keys = [layer.state()[0][0] for layer in held.layers]
    return [(k.mean(1)[:, None, None], mx.sqrt(k.var(1))[:, None, None] + 1e-6) for k in keys]


def arms(found: list[tuple[mx.array, mx.array]]) -> dict[str, list[tuple[Codec, Codec]]]:
    """Name → the codecs of each layer's keys and values. `found` are the layers' `statistics`."""
    count = len(found)
    exact = lambda block: block  # noqa: E731
    eight = (lambda block: by_channel(block, 8), lambda block: by_token(block, 8))
    ways = {
        "per channel": [(by_channel, by_token)] * count,
        "per channel, rotated": [(turned(by_channel), turned(by_token))] * count,
        "per token": [(by_token, by_token)] * count,
        "per token, rotated": [(turned(by_token), turned(by_token))] * count,
        "per token, calibrated": [(calibrated(by_token, *each), by_token) for each in found],
    }
    ends = {
        f"{name}, ends in 8 bits": [
            eight if min(i, count - 1 - i) < ENDS else codecs for i, codecs in enumerate(layers)
        ]
        for name, layers in ways.items()
    }
    return {"float32": [(exact, exact)] * count, "8 bits": [eight] * count} | ways | ends


def measure(model, ids: list[int], windows: int) -> dict:
    """Arm → perplexity, KL and agreement with the float32 cache, and `accepted` beside the 8-bit one."""
    codecs = arms(statistics(model, ids[windows * WINDOW : (windows + 1) * WINDOW]))
    found, drafts = {name: [] for name in codecs}, {name: [] for name in codecs}
    for start in range(0, windows * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        caches = {}
        for name, layers in codecs.items():
            made = [RoundedLayer(model.window(i), *codec) for i, codec in enumerate(layers)]
            caches[name] = KVCache(made)
            mx.eval(prefill(model, caches[name], mx.array(window[:PROMPT]), STEP_SIZE))
        for at in range(PROMPT, WINDOW - CHUNK, CHUNK):
            tokens, targets = mx.array([window[at : at + CHUNK]]), np.array(window[at + 1 : at + CHUNK + 1])
            rows = {name: log_softmax(model(tokens, held)[0]) for name, held in caches.items()}
            for name, row in rows.items():
                found[name].append(compare(row, rows["float32"], targets))
                drafts[name].append(compare(row, rows["8 bits"], targets))
        print(f"window {start // WINDOW + 1} of {windows}", file=sys.stderr)
    return {name: means(each) | {"accepted": means(drafts[name])["agreement"]} for name, each in found.items()}


def text(document: dict) -> str:
    """The table, in Markdown."""
    rows = [
        [name, f"{each['perplexity']:.3f}", f"{each['kl']:.1e}", f"{each['agreement']:.2%}", f"{each['accepted']:.2%}"]
        for name, each in document["arms"].items()
        if name != "float32"
    ]
    return table(["4 bits", "perplexity", "KL", "same first token", "accepted"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2)
    run(parser, SECTION, text, lambda model, ids, options: {"arms": measure(model, ids, options.windows)})


if __name__ == "__main__":
    main()
