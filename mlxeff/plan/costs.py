"""What a pass over a model costs, as terms: for each kind of work the seconds that it would take at the machine's
specified bandwidth and arithmetic rate. A prediction is the sum of the terms, each times a constant of the engine
(`constants`): 1.25 for "bytes" means that the engine reaches 80 % of the specified bandwidth.

Terms of a decode step: "bytes" of weights, "kv" bytes, "dequantise" (products with weights of fewer bits, which have to
be unpacked), "dequantise k" (llama.cpp's K-quants), and the work between products, which is counted in milliseconds for
each layer: "layers", "recurrent layers", "expert layers", "ultra layers" (chips that are two dies joined).
Terms of prefill: "dense" and "quantised" matrix products, "emulated" ones (bfloat16 on chips without it), "expert"
ones, products on "accelerated" units, "attention", and the same milliseconds.
"""

from dataclasses import dataclass

from .chips import Machine
from .shapes import STATE_BYTES, Shape

MLX, LLAMA = "mlx", "llama.cpp"
ENGINES = (MLX, LLAMA)
EMULATION_GAIN = 1.22  # of MLX 0.32.1's quantised products in emulated bfloat16 over 0.31.2's (published, M2 Pro)
EMULATION_FROM = (0, 32, 1)
NEW_LLAMA = (2025,)  # builds of llama.cpp by year: those before differ in kernels and overhead
# Kernels that MLX starts for a layer and a token: products 7, norms 2, rotary embedding 2, attention 1, cache 2, sums
# 2, activation 1. Qwen3 norms queries and keys; Gemma 3 too, and results, and adds 1 to the weights of each norm.
LLAMA_KERNELS = 17
KERNELS = {"qwen3": 19, "qwen3_moe": 19, "gemma3": 27, "gemma3_text": 27}
SEEDS = "seeds"  # seconds that unpacking seeds takes beyond reading them; it has no constant
PRODUCTS = ("dense", "quantised", "k-quant", "emulated", "accelerated", "experts")  # terms of matrix products
# Cycles of a GPU lane for a SeedLM weight, PREDICTED from counted instructions (benchmarks/metal_seedlm_prediction.py):
# format → (chips that issue integers and floats in turn, chips that issue both at once).
SEED_CYCLES = {"4": (13.72, 7.88), "4.5": (17.84, 10.22), "3": (16.9, 9.73)}
CPU_SEEDS = 1.8  # time of a seed weight on a CPU in that of an affine 4-bit one: 162 by 91 tokens/s, SmolLM2-135M
SERIAL = ("m1", "m2")  # generations that issue integer and float operations one after the other


@dataclass(frozen=True)
class Engine:
    """What computes: `name` of ENGINES, its version as numbers, and whether MLX's activations are bfloat16."""

    name: str = MLX
    version: tuple[int, ...] = (0, 32, 4)
    bf16: bool = True

    @property
    def suffix(self) -> str:
        """The end of the names of terms whose constants depend on the version: " old" for builds of llama.cpp before
        2025, whose kernels were others. MLX and later builds share them, because either alone was published for too few
        chips to tell the chip from the engine."""
        return " old" if self.name == LLAMA and self.version < NEW_LLAMA else ""


@dataclass(frozen=True)
class Bits:
    """Bits that are stored for a weight: of the `layers`' matrices, of the `experts`' among them, of embedding and
    `head`. `kind` is "dense", "quantised" or "k-quant"."""

    layers: float
    head: float
    experts: float
    kind: str

    @classmethod
    def of(cls, layers: float, head: float | None = None, experts: float | None = None, kind: str = "") -> "Bits":
        """Bits with the same for all that is not said. 16 and more are dense."""
        kind = kind or ("dense" if layers >= 16 else "quantised")
        return cls(layers, layers if head is None else head, layers if experts is None else experts, kind)


def weight_bytes(shape: Shape, bits: Bits, active: bool, share: float = 1.0) -> float:
    """Bytes of the weights of all layers and of the output head; `active`: those that one token reads, else all.
    `share`: of the feed-forward matrices that is read."""
    total = shape.last * bits.head
    for layer in shape.layers:
        for matrix in layer.matrices:
            part = matrix.weights * (matrix.active if active else 1.0)
            part *= share if is_feed_forward(matrix.name) else 1.0
            total += part * (bits.experts if ".experts." in matrix.name else bits.layers)
        total += 16 * layer.vectors
    return total / 8


def stored_bytes(shape: Shape, bits: Bits) -> float:
    """Bytes of all weights in memory, the embedding included."""
    return weight_bytes(shape, bits, False) + (shape.embedding if shape.head else 0) * bits.head / 8


def pipes(machine: Machine) -> str:
    """ "serial" where integer and float operations are issued one after the other, "parallel" where both at once."""
    return "serial" if machine.generation in SERIAL else "parallel"


def seed_seconds(shape: Shape, bits: Bits, machine: Machine, share: float = 1.0) -> float:
    """Seconds by which unpacking the seeds of the layers takes longer than reading them; 0 for other weights."""
    if not bits.kind.startswith("seeds"):
        return 0.0
    weights = read_weights(shape, share) - shape.last
    reading = weights * bits.layers / 8 / machine.bandwidth
    if machine.kind == "cpu":
        return max(0.0, weights * 4.5 / 8 / machine.bandwidth * CPU_SEEDS - reading)
    cycles = SEED_CYCLES[bits.kind.removeprefix("seeds ")][pipes(machine) == "parallel"]
    return max(0.0, weights * cycles * 2 / machine.flops - reading)


def read_weights(shape: Shape, share: float = 1.0) -> float:
    """Weights that one token reads; `share`: of the feed-forward matrices that is read."""
    total = float(shape.last)
    for layer in shape.layers:
        total += sum(m.weights * m.active * (share if is_feed_forward(m.name) else 1.0) for m in layer.matrices)
    return total


def expert_weights(shape: Shape, share: float = 1.0) -> float:
    """Those of `read_weights` that belong to experts."""
    return share * sum(m.weights * m.active for layer in shape.layers for m in layer.matrices if ".experts." in m.name)


def is_feed_forward(name: str) -> bool:
    """Whether a matrix of this name belongs to the feed-forward network."""
    return name.startswith(("mlp.", "ffn."))


def state_bytes(shape: Shape) -> float:
    """Bytes of the recurrent states."""
    return STATE_BYTES * sum(layer.state for layer in shape.layers)


def overhead(shape: Shape, machine: Machine, engine: Engine) -> dict[str, float]:
    """The terms of the work between products, in thousandths of a layer of Llama's."""
    recurrent = sum(1 for layer in shape.layers if layer.state)
    experts = sum(1 for layer in shape.layers if any(".experts." in m.name for m in layer.matrices))
    layers = len(shape.layers) * KERNELS.get(shape.model_type, LLAMA_KERNELS) / LLAMA_KERNELS
    return {
        f"layers{engine.suffix}": layers / 1e3,
        "recurrent layers": recurrent / 1e3,
        "expert layers": experts / 1e3,
        "ultra layers": layers / 1e3 if machine.ultra else 0.0,
    }


def decode_terms(
    shape: Shape, bits: Bits, machine: Machine, engine: Engine, depth: float, kv_bytes: float = 2.0, share: float = 1.0
) -> dict[str, float]:
    """The terms of one decode step after `depth` tokens, in seconds; `kv_bytes`: of a number in the KV cache; `share`:
    of the feed-forward network that is computed."""
    read, depth = weight_bytes(shape, bits, True, share), int(depth)
    experts = 2 * expert_weights(shape, share) if bits.experts != bits.layers else 0.0
    unpacked = 0.0 if bits.kind == "dense" else 2.0 * read_weights(shape, share) - experts
    if bits.kind.startswith("seeds"):
        unpacked = 2.0 * shape.last  # what unpacks seeds is counted in `seed_seconds`
    name = "dequantise k" if bits.kind == "k-quant" else "dequantise"
    parallel = "" if pipes(machine) == "serial" else " parallel"
    return {
        "bytes": (read + 2 * state_bytes(shape)) / machine.bandwidth,
        f"kv{engine.suffix}": kv_bytes * shape.cached_numbers(depth) / machine.bandwidth,
        name + parallel: unpacked / machine.flops,
        "dequantise mxfp4" + parallel: experts / machine.flops,
        SEEDS: seed_seconds(shape, bits, machine, share),
        **overhead(shape, machine, engine),
    }


def prefill_terms(
    shape: Shape, bits: Bits, machine: Machine, engine: Engine, first: int, last: int, share: float = 1.0
) -> dict[str, float]:
    """The terms of computing the tokens `first` + 1 to `last` of a prompt in one chunk, in seconds."""
    tokens = last - first
    plain = experts = 0.0
    for layer in shape.layers:
        for matrix in layer.matrices:
            flops = 2.0 * tokens * matrix.weights * matrix.active * (share if is_feed_forward(matrix.name) else 1.0)
            if ".experts." in matrix.name:
                experts += flops
            else:
                plain += flops
    rate, kind = machine.flops, "dense" if bits.kind == "dense" else "quantised"
    scale = 1.0
    if machine.accelerated:
        rate, kind = machine.accelerated, "accelerated"
    elif engine.name == MLX and engine.bf16 and not machine.bf16:
        kind, scale = "emulated", 1.0 / EMULATION_GAIN if engine.version >= EMULATION_FROM else 1.0
    elif bits.kind == "k-quant":
        kind = "k-quant"
    attention = shape.attention_flops(first, last)
    return {
        kind: scale * (plain + experts) / rate,
        "experts": scale * experts / rate,
        f"attention{engine.suffix}": attention / machine.flops,
        "bytes": weight_bytes(shape, bits, False, share) / machine.bandwidth,
        **overhead(shape, machine, engine),
    }


def total(terms: dict[str, float], constants: dict[str, float]) -> float:
    """Seconds: each term times its constant; a term without one counts nothing."""
    return sum(value * constants.get(name, 0.0) for name, value in terms.items())
