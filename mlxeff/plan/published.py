"""Published speeds of other engines on Macs (`data/published.csv`, with the source of each row), as measured times with
the terms that predict them. Rows that cannot be predicted are left out with a reason."""

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass
from importlib import resources

from . import costs
from .chips import Machine, find, machine
from .costs import LLAMA, MLX, Bits, Engine
from .shapes import Shape, read_shape

# Name of a quantisation in the table → bits a weight with scales. Q4_K_M is a mixture, whose files have about 4.85.
BITS = {
    "F16": Bits.of(16),
    "bf16": Bits.of(16),
    "Q8_0": Bits.of(8.5),
    "Q4_0": Bits.of(4.5),
    "Q4_K_M": Bits.of(4.85, kind="k-quant"),
    "8bit": Bits.of(8.5),
    "6bit": Bits.of(6.5),
    "5bit": Bits.of(5.5),
    "5bit g32": Bits.of(6),
    "4bit": Bits.of(4.5),
    "4bit g32": Bits.of(5),
    "MXFP4": Bits.of(8.5, experts=4.25),
    "MXFP4-Q8": Bits.of(8.5, experts=4.25),
}
# GPU cores where a row names none: those of the largest variant but for a host whose other facts tell.
CORES = {"M2 Pro": 16, "M3 Ultra": 60}  # a Mac mini with 10 CPU cores; the 256 GB host of the same source's other rows
SHORT = 64  # tokens in the middle of an answer to a short prompt, where a row gives no number
NEWEST = 2026  # year of builds of llama.cpp that name none
CHUNKS = {MLX: 2048, LLAMA: 512}  # prompt tokens that an engine computes at once, by default
NOT_ACCELERATED = (
    "8e672ef",
    "no tensor API",
    "2024",
    "2025-08",
)  # in names of builds that do not use M5's accelerators


@dataclass(frozen=True)
class Row:
    """A published speed. `phase`: "prefill" or "decode"; `tokens`: of the prompt, or in the cache in the middle of the
    decoding; `rate`: tokens a second; `engine_name`: as published."""

    chip: str
    machine: Machine
    engine: Engine
    engine_name: str
    model: str
    quantisation: str
    phase: str
    tokens: int
    rate: float
    source: str
    shape: Shape
    bits: Bits

    @property
    def family(self) -> str:
        """The engine under which the error is reported."""
        return f"{LLAMA} fork" if "fork" in self.engine_name else self.engine.name

    @property
    def seconds(self) -> float:
        """Seconds of the prompt, or of one decode step."""
        return (self.tokens if self.phase == "prefill" else 1) / self.rate

    def terms(self) -> dict[str, float]:
        """The terms of `costs` that predict `seconds`."""
        if self.phase == "prefill":
            step, found = CHUNKS[self.engine.name], Counter()
            for first in range(0, self.tokens, step):
                last = min(first + step, self.tokens)
                found.update(costs.prefill_terms(self.shape, self.bits, self.machine, self.engine, first, last))
            return dict(found)
        return costs.decode_terms(self.shape, self.bits, self.machine, self.engine, self.tokens)


def data(name: str) -> str:
    """The text of a file in `data/`."""
    return resources.files(__package__).joinpath("data", name).read_text(encoding="utf-8")


def read() -> tuple[list[Row], dict[str, int]]:
    """(The rows that can be predicted, reason → number of rows that are left out)."""
    shapes = {name: read_shape(entry["config"]) for name, entry in json.loads(data("published-models.json")).items()}
    rows, left_out = [], Counter()
    for line in csv.DictReader(data("published.csv").splitlines()):
        reason = _reason(line, shapes)
        if reason:
            left_out[reason] += 1
        else:
            rows.append(_row(line, shapes[line["model"]]))
    return rows, dict(left_out)


def _reason(line: dict, shapes: dict[str, Shape]) -> str:
    """Why a row is left out; "" for one that can be predicted."""
    if line["quant"] not in BITS:
        return f"quantisation {line['quant']}: bits not stated"
    if line["model"] not in shapes:
        return f"{line['model'].rpartition('/')[2]}: no config was read"
    return ""


def _row(line: dict, shape: Shape) -> Row:
    chip = find(line["chip"])
    cores = int(line["gpu_cores"]) if line["gpu_cores"] else CORES.get(line["chip"], chip.most_cores)
    accelerators = not any(words in line["engine"] for words in NOT_ACCELERATED)
    prefill = line["test"].startswith("pp")
    return Row(
        line["chip"],
        machine(chip, cores, accelerators=accelerators),
        engine_of(line["engine"]),
        line["engine"],
        line["model"],
        line["quant"],
        "prefill" if prefill else "decode",
        _tokens(line["test"]),
        float(line["tokens_per_s"]),
        line["source"],
        shape,
        BITS[line["quant"]],
    )


def _tokens(test: str) -> int:
    """Tokens of a prompt ("pp512"), or in the cache in the middle of the decoding ("tg128", "tg128@d512", "tg@d4096",
    "tg (short prompt)")."""
    count, depth = re.match(r"(pp|tg)(\d+)", test), re.search(r"@d(\d+)", test)
    if test.startswith("pp"):
        return int(count[2])
    if count is None and depth is None:
        return SHORT
    return (int(count[2]) // 2 if count else 0) + (int(depth[1]) if depth else 0)


def engine_of(name: str) -> Engine:
    """The engine that a published row names: MLX by MLX's version, llama.cpp by the year of the build."""
    if LLAMA in name:
        year = re.search(r"20\d\d", name)
        return Engine(LLAMA, (int(year[0]) if year else NEWEST,))
    version = re.search(r"/ mlx (\d+)\.(\d+)\.(\d+)", name)
    return Engine(MLX, tuple(map(int, version.groups())) if version else (0, 31, 2))
