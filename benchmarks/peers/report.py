"""Turn samples into medians and Markdown tables: speed, shares of the machine's ceilings, correctness, the targets.

llama.cpp stands in a ratio with its better attention setting for that metric.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mlxeff.bench.samples import median_of
from mlxeff.bench.tables import card_lines, table

from .checkpoints import Costs
from .table import ARMS, COLD_START, DEPTHS, EXACT, FAST, FOUR, GENERATED, LARGE, Arm

TTFT_DEPTHS, DECODE_DEPTHS = (64, 512, 2048, 4096), (16, 512, 2048, 4096)
LLAMA, LLAMA_Q4_0 = ([a.name for a in ARMS if (a.engine, a.files) == ("llama.cpp", kind)] for kind in ("gguf", "q4_0"))
OURS = [arm for arm in ARMS if arm.ours]
SECTION = "cpu-peers"  # of RESULTS.md
SHOWN = {  # a row of RESULTS.md: the arms of which each number is the best
    "mlxeff": [EXACT],
    "mlxeff, fast": [FAST],
    "llama.cpp": LLAMA,
    "llama.cpp Q4_0": LLAMA_Q4_0,
    "PyTorch bfloat16": ["torch bfloat16"],
    "mlx-lm": ["mlx-lm"],
}


class Results:
    """Medians of samples; a number that was not measured is None."""

    def __init__(self, samples: list[dict], costs: dict[tuple[str, str], Costs]):
        """costs: of (model, form), a key of `checkpoints.Files`; forms that are missing have those of "gguf"."""
        self.samples, self.costs = samples, costs
        self.threads = sorted({s["threads"] for s in samples})

    def get(self, metric: str, kind: str, arm: str, model: str = "", threads: int = 0, depth: int = 0) -> float | None:
        """The median of all values of `metric`, of all rounds."""
        place = {"kind": kind, "arm": arm, "model": model, "threads": threads, "depth": depth}
        return median_of(self.samples, metric, **place)

    def speed(self, metric: str, arm: str, model: str, threads: int, depth: int) -> float | None:
        return self.get(metric, "speed", arm, model, threads, depth)

    def best(self, metric: str, model: str, threads: int, depth: int, arms: list[str]) -> float | None:
        """The best of the arms, settings of one engine: more tokens a second, or less of anything else."""
        values = [self.speed(metric, name, model, threads, depth) for name in arms]
        best = max if metric == "decode_tps" else min
        return best((value for value in values if value is not None), default=None)

    def bandwidth_share(self, arm: Arm, model: str, threads: int, depth: int) -> float | None:
        """Bytes that must be read a second while decoding, relative to the measured read bandwidth."""
        rate = self.speed("decode_tps", arm.name, model, threads, depth)
        ceiling = self.get("gbps", "ceiling", "memory read", threads=threads)
        if rate is None or ceiling is None:
            return None
        costs = self.costs.get((model, arm.files), self.costs[model, "gguf"])
        return rate * costs.decode_bytes(depth + GENERATED / 2, arm.kv_bytes) / 1e9 / ceiling

    def flops_share(self, arm: Arm, model: str, threads: int, depth: int, peak: str) -> float | None:
        """Multiplications and additions of the prompt a second, relative to a measured peak."""
        seconds = self.speed("ttft_s", arm.name, model, threads, depth)
        ceiling = self.get("gflops", "ceiling", peak, threads=threads)
        if seconds is None or ceiling is None:
            return None
        return self.costs[model, "gguf"].prefill_flops(depth) / seconds / 1e9 / ceiling


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


@dataclass(frozen=True)
class Target:
    """A target: `value(results, arm, threads)` must be at most or at least `bound`."""

    what: str
    bound: float
    at_least: bool
    value: Callable[[Results, Arm, int], float | None]

    def row(self, results: Results, threads: int) -> list[str]:
        cells = [self.what, f"{'≥' if self.at_least else '≤'} {self.bound:g}"]
        for arm in OURS:
            got = self.value(results, arm, threads)
            met = got is not None and (got >= self.bound if self.at_least else got <= self.bound)
            cells.append("not measured" if got is None else f"{got:.3g} {'met' if met else 'missed'}")
        return cells


def ttft_ratio(depth: int, arms: list[str] = LLAMA):
    return lambda results, arm, threads: quotient(
        results.speed("ttft_s", arm.name, FOUR, threads, depth), results.best("ttft_s", FOUR, threads, depth, arms)
    )


def decode_ratio(depth: int, arms: list[str] = LLAMA):
    return lambda results, arm, threads: quotient(
        results.speed("decode_tps", arm.name, FOUR, threads, depth),
        results.best("decode_tps", FOUR, threads, depth, arms),
    )


def bandwidth(depth: int):
    return lambda results, arm, threads: results.bandwidth_share(arm, LARGE, threads, depth)


def over_mlx_lm(results: Results, arm: Arm, threads: int) -> float | None:
    ours = results.speed("ttft_s", arm.name, FOUR, threads, 512)
    return quotient(results.speed("ttft_s", "mlx-lm", FOUR, threads, 512), ours)


def more_memory(results: Results, arm: Arm, threads: int) -> float | None:
    """Memory in MiB beyond that of llama.cpp, at the depth with the largest difference."""
    pairs = [
        (results.speed("rss_mib", arm.name, FOUR, threads, depth), results.best("rss_mib", FOUR, threads, depth, LLAMA))
        for depth in DEPTHS[FOUR]
    ]
    return max((ours - theirs for ours, theirs in pairs if None not in (ours, theirs)), default=None)


def cold_start(results: Results, arm: Arm, threads: int) -> float | None:
    return results.get("first_token_s", "cold start", arm.name, FOUR, threads, 20)


PEERS = {"llama.cpp": LLAMA, "llama.cpp Q4_0, 4.5 bits": LLAMA_Q4_0}
TARGETS = [
    *(Target(f"TTFT {depth} / {name}", bound, False, ttft_ratio(depth, arms))
      for name, arms in PEERS.items() for depth, bound in ((512, 0.55), (2048, 0.35))),
    *(Target(f"decode at {depth} / {name}", bound, True, decode_ratio(depth, arms))
      for name, arms in PEERS.items() for depth, bound in ((16, 0.9), (512, 1.1), (2048, 1.3), (4096, 1.3))),
    *(Target(f"share of read bandwidth, decode of 1B at {depth}", 0.8, True, bandwidth(depth))
      for depth in DEPTHS[LARGE]),
    Target(
        "share of fp32 peak, whole prefill of 1B at 512", 0.5, True,
        lambda results, arm, threads: results.flops_share(arm, LARGE, threads, 512, "fp32 matmul"),
    ),
    Target("TTFT 512, mlx-lm / ours", 150, True, over_mlx_lm),
    Target("cold start, s", 1.0, False, cold_start),
    Target("peak RSS - llama.cpp's, MiB", 100, False, more_memory),
]  # fmt: skip


def report(results: Results, card: dict) -> str:
    """The card and all tables."""
    parts = [card_lines(card), ceilings(results)]
    for model in DEPTHS:
        for threads in results.threads:
            parts += [speeds(results, model, threads), shares(results, model, threads)]
    parts += [starts(results), qualities(results), failures(results), targets(results)]
    return "\n\n".join(part for part in parts if part)


def cell(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def measured(results: Results, model: str, threads: int) -> list[Arm]:
    """The arms whose speed was measured there."""
    return [
        arm
        for arm in ARMS
        if any(
            (s["kind"], s["arm"], s["model"], s["threads"]) == ("speed", arm.name, model, threads)
            for s in results.samples
        )
    ]


def speeds(results: Results, model: str, threads: int) -> str:
    header = [f"{model}, {threads} threads", *(f"TTFT {depth}, s" for depth in TTFT_DEPTHS)]
    header += [*(f"tok/s @{depth}" for depth in DECODE_DEPTHS), "load, s", "peak RSS at 512, MiB"]
    rows = []
    for arm in measured(results, model, threads):
        key = arm.name, model, threads
        rows.append(
            [arm.name]
            + [cell(results.speed("ttft_s", *key, depth), ".3f") for depth in TTFT_DEPTHS]
            + [cell(results.speed("decode_tps", *key, depth), ".1f") for depth in DECODE_DEPTHS]
            + [cell(results.speed("load_s", *key, 16), ".2f"), cell(results.speed("rss_mib", *key, 512), ".0f")]
        )
    return table(header, rows)


def shares(results: Results, model: str, threads: int) -> str:
    """Decode against the read bandwidth, prefill against the two peaks, in percent."""
    header = [f"{model}, {threads} threads, % of", *(f"bandwidth @{depth}" for depth in DECODE_DEPTHS)]
    header += [f"{peak[:4]} peak, {depth}" for peak in ("fp32 matmul", "bf16 matmul") for depth in (512, 2048)]
    rows = []
    for arm in measured(results, model, threads):
        values = [results.bandwidth_share(arm, model, threads, depth) for depth in DECODE_DEPTHS]
        values += [
            results.flops_share(arm, model, threads, depth, peak)
            for peak in ("fp32 matmul", "bf16 matmul")
            for depth in (512, 2048)
        ]
        rows.append([arm.name, *(cell(None if value is None else 100 * value, ".0f") for value in values)])
    return table(header, rows)


def section(results: Results) -> str:
    """The section of RESULTS.md."""
    parts = shown, targets, ceilings, starts, qualities, failures
    return "\n\n".join(text for part in parts if (text := part(results)))


def targets(results: Results) -> str:
    """Of our arms on all threads."""
    most = max(results.threads, default=0)
    names = [f"target, {most} threads, SmolLM2-135M 4-bit", "wanted", *(arm.name for arm in OURS)]
    return table(names, [target.row(results, most) for target in TARGETS])


def shown(results: Results) -> str:
    """Speeds, a line for each engine."""
    most = max(results.threads)
    header = ["", f"TTFT {TTFT_DEPTHS[0]}, s", *map(str, TTFT_DEPTHS[1:])]
    header += [f"tok/s @{DECODE_DEPTHS[0]}", *(f"@{depth}" for depth in DECODE_DEPTHS[1:]), "peak RSS at 512, MiB"]
    blocks = [(FOUR, most), *((FOUR, count) for count in results.threads if count != most)]
    blocks += [(model, most) for model in DEPTHS if model != FOUR]
    rows = []
    for model, threads in blocks:
        mark = f"{model}, {threads} thread{'s' * (threads > 1)}: "
        for name, arms in SHOWN.items():
            numbers = [results.best("ttft_s", model, threads, depth, arms) for depth in TTFT_DEPTHS]
            numbers += [results.best("decode_tps", model, threads, depth, arms) for depth in DECODE_DEPTHS]
            numbers.append(results.best("rss_mib", model, threads, 512, arms))
            if numbers.count(None) < len(numbers):
                rows.append([mark + name, *map(short, numbers)])
                mark = ""
    return table(header, rows)


def short(value: float | None) -> str:
    """A number as text: small numbers with three digits, large ones without a fraction."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ceilings(results: Results) -> str:
    rows = []
    for threads in results.threads:
        read = results.get("gbps", "ceiling", "memory read", threads=threads)
        peaks = [results.get("gflops", "ceiling", name, threads=threads) for name in ("fp32 matmul", "bf16 matmul")]
        rows.append([str(threads), cell(read, ".1f"), *(cell(peak, ".0f") for peak in peaks)])
    return table(["threads", "memory read, GB/s", "fp32 matmul, GFLOPS", "bf16 matmul, GFLOPS"], rows)


def starts(results: Results) -> str:
    found = [(name, what, s["threads"]) for name, what in COLD_START.items() for s in results.samples
             if (s["kind"], s["arm"]) == ("cold start", name)]  # fmt: skip
    rows = [
        [name, what, cell(results.get("first_token_s", "cold start", name, FOUR, threads, 20), ".2f")]
        for name, what, threads in dict.fromkeys(found)
    ]
    return table(["cold start", "what is started", "first token, s"], rows)


def qualities(results: Results) -> str:
    rows = [
        [s["arm"], s["model"], f"{s['equal']} of {s['prompts']}", cell(s["prefill_error"]), cell(s["decode_error"])]
        for s in results.samples
        if s["kind"] == "quality" and "equal" in s
    ]
    header = ["correctness", "model", "same tokens as mlx-lm fp32", "logits error, prefill", "logits error, decode"]
    return table(header, rows)


def failures(results: Results) -> str:
    """The measurements that have no value, each with the reason."""
    rows = []
    for s in results.samples:
        if "error" in s or "exceeded_s" in s:
            why = s.get("error") or f"beyond {s['exceeded_s']:g} s"
            rows.append([s["kind"], s["arm"], s["model"], str(s["threads"]), str(s["depth"]), why])
    return table(["not measured", "engine", "model", "threads", "depth", "why"], rows)
