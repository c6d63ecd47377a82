"""Apple's chips as machines to predict for, and engines whose constants are known.

Bandwidths are Apple's specifications. FLOP/s of a GPU core: M1 and M2 as measured by philipturner/metal-benchmarks on
GitHub; M3, M4 and M5 from core counts and clocks that others estimated, so their shares of a peak are shares of an
estimate. The rate of M5's neural accelerators is an estimate too: 1024 half-precision FLOPs a core and cycle, from a
microbenchmark of the A19. Memory options are in part from memory and not checked, above all those of M1 Ultra, M2 Max,
M2 and M3 Ultra, M3 Max and M5; more may exist, `--memory` takes any number.
"""

import re
from dataclasses import dataclass, replace

from ..errors import MlxeffError

CORE_TFLOPS = {"m1": 0.332, "m2": 0.358, "m3": 0.358, "m4": 0.43, "m5": 0.45}  # float32, of one GPU core
ACCELERATED_TFLOPS = {"m5": 1.6}  # float16 in the neural accelerators of one GPU core
BF16_EMULATED = ("m1", "m2")  # generations whose GPU has no bfloat16 arithmetic
# macOS lets a GPU hold about two thirds of the memory at once on smaller Macs, three quarters on larger ones: an
# ESTIMATE from published cases (21 of 32 GB, 48 of 64 GB).
SMALLER_GB, SMALLER_SHARE, LARGER_SHARE = 36, 2 / 3, 3 / 4
THIS = "this"


@dataclass(frozen=True)
class Chip:
    """A chip: specified bandwidth in GB/s by number of GPU cores, and memory options in GB, least first."""

    name: str
    bandwidth: dict[int, float]
    memory_gb: tuple[int, ...]

    @property
    def generation(self) -> str:
        """ "m1" to "m5"."""
        return self.name[:2].lower()

    @property
    def most_cores(self) -> int:
        """Cores of the largest variant."""
        return max(self.bandwidth)


def _chip(name: str, cores: tuple[int, ...], bandwidth: float | tuple[float, ...], *memory: int) -> Chip:
    each = bandwidth if isinstance(bandwidth, tuple) else (bandwidth,) * len(cores)
    return Chip(name, dict(zip(cores, each, strict=True)), memory)


TABLE = (
    _chip("M1", (7, 8), 68.25, 8, 16),
    _chip("M1 Pro", (14, 16), 200, 16, 32),
    _chip("M1 Max", (24, 32), 400, 32, 64),
    _chip("M1 Ultra", (48, 64), 800, 64, 128),
    _chip("M2", (8, 10), 100, 8, 16, 24),
    _chip("M2 Pro", (16, 19), 200, 16, 32),
    _chip("M2 Max", (30, 38), 400, 32, 64, 96),
    _chip("M2 Ultra", (60, 76), 800, 64, 128, 192),
    _chip("M3", (8, 10), 100, 8, 16, 24),
    _chip("M3 Pro", (14, 18), 150, 18, 36),
    _chip("M3 Max", (30, 40), (300, 400), 36, 64, 128),
    _chip("M3 Ultra", (60, 80), 819, 96, 256, 512),
    _chip("M4", (8, 10), 120, 16, 24, 32),
    _chip("M4 Pro", (16, 20), 273, 24, 48, 64),
    _chip("M4 Max", (32, 40), (410, 546), 36, 64, 128),
    _chip("M5", (8, 10), 153, 16, 24, 32),
    _chip("M5 Pro", (16, 20), 307, 24, 48, 64),
    _chip("M5 Max", (32, 40), (460, 614), 36, 64, 128),
)
CHIPS = {chip.name.lower().replace(" ", "-"): chip for chip in TABLE}


@dataclass(frozen=True)
class Machine:
    """What a prediction knows of a machine.

    name         in words
    bandwidth    bytes a second, as specified or probed
    flops        FLOP/s of the general arithmetic units, a peak or as probed
    accelerated  FLOP/s of units for matrix products alone, None without them
    memory       bytes; 0 where it is not known
    usable       bytes of it that a model may take at once
    ultra        whether it is two chips joined
    bf16         whether it has bfloat16 arithmetic
    generation   "m1" to "m5", "" for others
    kind         "gpu" or "cpu"
    """

    name: str
    bandwidth: float
    flops: float
    accelerated: float | None = None
    memory: float = 0.0
    usable: float = 0.0
    ultra: bool = False
    bf16: bool = True
    generation: str = ""
    kind: str = "gpu"


def find(name: str) -> Chip:
    """The chip called `name`, as in "m2-pro", "M2 Pro" or "Apple M2 Pro". Raises MlxeffError that lists all."""
    key = re.sub(r"[\s_-]+", "-", name.strip().lower()).removeprefix("apple-")
    if key not in CHIPS:
        raise MlxeffError(f"--chip: unknown chip {name!r}; wanted {THIS} or one of: {', '.join(CHIPS)}")
    return CHIPS[key]


def machine(chip: Chip, cores: int | None = None, memory_gb: float | None = None, accelerators: bool = True) -> Machine:
    """The Mac with a chip. `cores`: of its GPU, None for the largest variant; `memory_gb`: None for the largest option
    that is listed; `accelerators`: whether the engine uses those of the chip. Raises MlxeffError for a number of cores
    that the chip does not come with."""
    cores = chip.most_cores if cores is None else cores
    if cores not in chip.bandwidth:
        wanted = " or ".join(map(str, chip.bandwidth))
        raise MlxeffError(f"--cores: {chip.name} has {wanted} GPU cores, got {cores}")
    memory_gb = chip.memory_gb[-1] if memory_gb is None else memory_gb
    rate = ACCELERATED_TFLOPS.get(chip.generation) if accelerators else None
    return Machine(
        f"{chip.name}, {cores} GPU cores",
        chip.bandwidth[cores] * 1e9,
        cores * CORE_TFLOPS[chip.generation] * 1e12,
        cores * rate * 1e12 if rate else None,
        memory_gb * 1e9,
        usable_bytes(memory_gb) if memory_gb else 0.0,
        chip.name.endswith("Ultra"),
        chip.generation not in BF16_EMULATED,
        chip.generation,
    )


def usable_bytes(memory_gb: float) -> float:
    """Bytes that macOS lets the GPU of a Mac hold at once (the wired limit), an estimate."""
    return memory_gb * 1e9 * (SMALLER_SHARE if memory_gb <= SMALLER_GB else LARGER_SHARE)


def with_memory(found: Machine, memory: float, usable: float) -> Machine:
    """The machine with so many bytes of memory and usable bytes."""
    return replace(found, memory=memory, usable=usable)
