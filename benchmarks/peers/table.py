"""The table of measurements: the arms (an engine in one mode), models and depths. A new mode of mlxeff is a line in
ARMS.

Knows nothing of how it is measured.
"""

from dataclasses import astuple, dataclass, field

GENERATED = 32  # tokens decoded after each prompt
EXACT_FLOAT32 = {"compute": "exact", "kv": "float32"}  # options of our own engine, `RunOptions`
EXACT_FLOAT16 = {"compute": "exact", "kv": "float16"}
INT8_FLOAT16 = {"compute": "int8", "kv": "float16"}
FOUR, EIGHT, SIXTEEN, LARGE = "4-bit", "8-bit", "16-bit", "1B random"
UNTHREADED = ("mlx-lm",)  # engines that run on as many threads as they like, whatever is asked
EXACT, FAST = "mlxeff exact", "mlxeff int8, fp16 KV"  # EXACT decodes the tokens of mlx-lm in float32
SMALL = (FOUR, EIGHT, SIXTEEN)
REPACKED = (FOUR, LARGE)  # models that there is a Q4_0 file of
DEPTHS = {  # prompt tokens: time to first token at it, decode speed after it
    **dict.fromkeys(SMALL, (16, 64, 512, 2048, 4096)),
    LARGE: (16, 512, 2048),
}


@dataclass(frozen=True)
class Arm:
    """An engine in one mode, a row of each table."""

    name: str
    engine: str  # of worker.ENGINES
    options: dict = field(default_factory=dict)  # what the worker gives the engine
    models: tuple[str, ...] = (*SMALL, LARGE)
    files: str = "gguf"  # which form of the model it reads: a key of `checkpoints.Files`; "q4_0" has other weights
    kv_bytes: int = 2  # a value of its KV cache
    peer: str | None = None  # what must be installed for it, a key of `install.PEERS`

    @property
    def ours(self) -> bool:
        return self.engine == "mlxeff"

    @property
    def threaded(self) -> bool:
        """True if the arm has an option for the number of threads; if not, it is measured once, with the arms that use
        all cores.
        """
        return self.engine not in UNTHREADED


ARMS = [
    Arm(EXACT, "mlxeff", EXACT_FLOAT32, kv_bytes=4),
    Arm("mlxeff exact, fp16 KV", "mlxeff", EXACT_FLOAT16),
    Arm(FAST, "mlxeff", INT8_FLOAT16, models=(FOUR, EIGHT, LARGE)),
    Arm("llama.cpp, flash attention", "llama.cpp", {"flash_attention": True}, peer="llama.cpp"),
    Arm("llama.cpp, plain attention", "llama.cpp", {"flash_attention": False}, peer="llama.cpp"),
    # On CPUs without AMX, Q4_0 (4.5 bits a weight, not 5) has repacked kernels in llama.cpp, Q4_1 has not.
    Arm("llama.cpp Q4_0, flash attention", "llama.cpp", {"flash_attention": True}, REPACKED, "q4_0", peer="llama.cpp"),
    Arm("llama.cpp Q4_0, plain attention", "llama.cpp", {"flash_attention": False}, REPACKED, "q4_0", peer="llama.cpp"),
    Arm("torch bfloat16", "torch", {}, models=(SIXTEEN,), files="bfloat16", peer="torch"),
    Arm("mlx-lm", "mlx-lm", {}, models=SMALL, files="mlx", kv_bytes=4),
]
CEILINGS = ("memory read", "fp32 matmul", "bf16 matmul")  # GB/s, GFLOPS, GFLOPS
COLD_START = {  # arm: what is started
    EXACT: "mlxeff generate",
    "llama.cpp, flash attention": "import llama_cpp, load, first token",
}


@dataclass(frozen=True)
class Job:
    """One measurement, a process of its own."""

    kind: str  # "speed", "ceiling", "cold start", "quality"
    arm: str
    model: str
    threads: int
    depth: int  # prompt tokens; 0 where that means nothing
    round: int

    @property
    def key(self) -> tuple:
        """The key that identifies the job."""
        return astuple(self)

    def __str__(self) -> str:
        where = f", {self.model}" if self.model else ""
        return f"{self.kind}: {self.arm}{where}, {self.threads} threads, depth {self.depth}, round {self.round + 1}"


def jobs(rounds: int, threads: list[int]) -> list[Job]:
    """All measurements, the arms taking turns: arms are innermost, rounds outermost."""
    found, most = [], max(threads)
    for number in range(rounds):
        found += [Job("ceiling", name, "", count, 0, number) for name in CEILINGS for count in threads]
        found += [Job("cold start", name, FOUR, most, 20, number) for name in COLD_START]
        found += [
            Job("speed", arm.name, model, count, depth, number)
            for model, depths in DEPTHS.items()
            for depth in depths
            for count in threads
            for arm in ARMS
            if model in arm.models and (arm.threaded or count == most)
        ]
    # The reference of correctness is the 4-bit model; the 16-bit one has its weights, rounded to half precision.
    found += [
        Job("quality", arm.name, FOUR if FOUR in arm.models else SIXTEEN, most, 0, 0)
        for arm in ARMS
        if arm.files != "q4_0"
    ]
    return found


def arm(name: str) -> Arm:
    return next(each for each in ARMS if each.name == name)
