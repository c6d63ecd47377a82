"""What a model takes of a machine's memory: weights, KV cache, and the buffers of a prefill chunk.

Buffers of a chunk, counted for one layer at a time: hidden states twice and normed, queries, keys and values, gate and
up, and the last token's logits, in 2 bytes a number on a GPU and 4 in the CPU kernels. MLX keeps freed buffers for
reuse, which a system under pressure gives back; they are not counted.
"""

from . import costs
from .chips import Machine
from .costs import Bits
from .shapes import Shape

ACTIVATION_BYTES = {"gpu": 2, "cpu": 4}
HIDDEN_COPIES = 4  # of the hidden states that live at once
CHUNKS = (256, 512, 1024, 2048, 4096)  # prefill steps that are shown


def kv_bytes(shape: Shape, tokens: int, number: float) -> float:
    """Bytes of the KV cache after `tokens` tokens, and of recurrent states; `number`: bytes of one of its numbers."""
    return number * shape.cached_numbers(tokens) + costs.state_bytes(shape)


def chunk_bytes(shape: Shape, step: int, kind: str) -> float:
    """Bytes of the buffers of a prefill chunk of `step` tokens on a "gpu" or "cpu"."""
    hidden = shape.vectors
    widest = 0
    for layer in shape.layers:
        inner = sum(
            m.weights * m.active for m in layer.matrices if costs.is_feed_forward(m.name) and "down" not in m.name
        )
        inner -= sum(m.weights for m in layer.matrices if m.name in ("mlp.gate", "ffn.proj_2"))
        mixed = (layer.heads + 2 * layer.groups) * layer.size + layer.state / max(1, layer.size)
        widest = max(widest, inner / hidden + mixed)
    return step * (HIDDEN_COPIES * hidden + widest) * ACTIVATION_BYTES[kind] + 4 * shape.last / hidden


def peak_bytes(shape: Shape, bits: Bits, tokens: int, step: int, number: float, machine: Machine) -> float:
    """Bytes at the end of the prefill of `tokens` tokens in chunks of `step`."""
    chunk = chunk_bytes(shape, min(step, tokens), machine.kind)
    return costs.stored_bytes(shape, bits) + kv_bytes(shape, tokens, number) + chunk


def most_context(shape: Shape, bits: Bits, step: int, number: float, machine: Machine) -> int:
    """The most tokens with which weights, cache and a prefill chunk fit, by bisection; at most the model's context."""
    low, high = 0, shape.context or 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        if peak_bytes(shape, bits, middle, step, number, machine) <= machine.usable:
            low = middle
        else:
            high = middle - 1
    return low
