"""A check of the native CPU kernels beside MLX's own operations, and a short sample of speed: for bug reports."""

import mlx.core as mx

from .. import hub, kernels, ops
from ..assembly.model import load
from ..generation import stream_generate
from ..hub.catalog import BUILTIN, DEFAULT_MODEL
from . import ceilings

# Largest difference relative to the largest value: float32 sums of up to 512 products run in another order, each with
# a rounding of 6e-8 of what is summed.
MOST = 2e-5
PROMPT, ANSWER = "Count from one to one hundred in words: one, two, three,", 32  # ANSWER in tokens


def native_kernels() -> list[dict]:
    """For each kernel its name, the largest relative error beside MLX's operation, and whether that is small enough; []
    where there are no native kernels."""
    if kernels.native()[0] is None:
        return []
    with mx.stream(mx.cpu):
        return [_compared(*case) for case in _cases()]


def _compared(name: str, found: mx.array, wanted: mx.array) -> dict:
    wanted = wanted.astype(mx.float32)
    error = (mx.abs(found.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()).item()
    return {"kernel": name, "error": error, "passed": error <= MOST}


def _cases():
    """Yield (name, the result of the kernel, that of MLX) on seeded random arrays."""
    keys = iter(mx.random.split(mx.random.key(0), 16))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    x, weight = normal(5, 512), normal(192, 512).astype(mx.float16)
    yield "linear", ops.linear_cpu(x, weight), ops.linear_ops(x, weight.astype(mx.float32))
    for bits in (4, 8):
        packed = ops.Quantized(*mx.quantize(weight.astype(mx.float32), 64, bits), 64, bits)
        yield f"quantized_linear {bits} bits", ops.quantized_linear_cpu(x, packed), ops.quantized_linear_ops(x, packed)
    scale = normal(512)
    yield "rms_norm", ops.rms_norm_cpu(x, scale, 1e-5), ops.rms_norm_ops(x, scale, 1e-5)
    gate, up = normal(5, 512), normal(5, 512)
    yield "swiglu", ops.swiglu_cpu(gate, up), ops.swiglu_ops(gate, up)
    queries, keys_, values = normal(1, 4, 3, 64), normal(1, 2, 40, 64), normal(1, 2, 40, 64)
    both = (each(queries, keys_, values, 0.125) for each in (ops.attention_cpu, ops.attention_ops))
    yield "attention", *both
    yield "log_softmax", ops.log_softmax_cpu(x), ops.log_softmax_ops(x)


def speed() -> dict:
    """Bytes a second that are read and FLOP/s of a float32 product on the default device, the best of four tries; and,
    where the built-in model is in the cache, its tokens a second after a prompt of some words. A sample, no
    benchmark."""
    most = ceilings.measure(kernels.device())
    found = {"device": kernels.device(), "read_gbps": round(most["read_gbps"], 2), "gflops": round(most["gflops"], 1)}
    if not BUILTIN[DEFAULT_MODEL].is_present():
        return found | {"model": None, "prefill_tps": None, "decode_tps": None}
    model, tokenizer = load(hub.resolve(DEFAULT_MODEL, offline=True))
    *_, last = stream_generate(model, tokenizer, PROMPT, ANSWER)
    rates = {"prefill_tps": round(last.prompt_tps, 1), "decode_tps": round(last.generation_tps, 1)}
    return found | {"model": DEFAULT_MODEL} | rates
