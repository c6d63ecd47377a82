"""The words and digits in which results of benchmarks are shown: names of metrics, numbers with their units."""

from collections.abc import Iterable

from ..errors import one_line

METRICS = {  # metric → its name, in the order in which metrics are shown
    "ttft_s": "time to the first token",
    "decode_tps": "decoding speed",
    "prompt_tps": "prompt speed",
    "peak_bytes": "peak memory",
    "ppl": "perplexity",
    "kl": "KL divergence",
    "gbps": "memory bandwidth",
    "gflops": "arithmetic",
}
SHORT = {"ttft_s": "TTFT", "decode_tps": "speed", "prompt_tps": "speed", "peak_bytes": "memory"}  # in labels of plots
STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(text: object, limit: int = 10**6) -> str:
    """A text of a file on one line of at most `limit` characters, that can be shown and written in UTF-8."""
    return one_line(str(text), limit).encode("utf-8", "backslashreplace").decode("utf-8")


def metric_name(metric: str) -> str:
    """The name of a metric in words; of an unknown one its own name."""
    return METRICS.get(metric, metric)


def title_of(metric: str) -> str:
    """The name of a metric in words, with a capital letter; of an unknown one its own name."""
    words = metric_name(metric)
    return words[0].upper() + words[1:] if metric in METRICS else words


def in_order(metrics: Iterable[str]) -> list[str]:
    """The metrics, each once, in the order of METRICS; unknown ones follow as they came."""
    found = list(dict.fromkeys(metrics))
    return [each for each in METRICS if each in found] + [each for each in found if each not in METRICS]


def scale(unit: str, largest: float) -> tuple[float, str]:
    """(Factor, unit) that make a number as large as `largest` short: bytes become GB, MB or kB, seconds below one ms
    or µs."""
    if unit == "bytes":
        return next(((1 / size, f"{letter}B") for size, letter in STEPS if abs(largest) >= size), (1, "bytes"))
    if unit == "s" and 0 < abs(largest) < 1:
        return (1e3, "ms") if abs(largest) >= 1e-3 else (1e6, "µs")
    return 1, unit


def digits(value: float) -> str:
    """A number with three significant digits and without an exponent where that is short."""
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-4 <= size < 1e15:
        decimals = max(0, 2 - _exponent(size))
        return f"{value:,.{decimals}f}" if size >= 1000 else f"{value:.{decimals}f}"
    return f"{value:.3g}"


def _exponent(size: float) -> int:
    """The power of ten of a number above 0 after it was rounded to three digits."""
    return int(f"{size:.2e}".partition("e")[2])


def shown(value: float | None, unit: str) -> str:
    """A number with its unit; "–" for None."""
    if value is None:
        return "–"
    factor, unit = scale(unit, value)
    return f"{digits(value * factor)} {unit}".rstrip()


def percent(change: float | None) -> str:
    """A change as a signed percentage, as in +3.1 %; "–" for None."""
    return "–" if change is None else f"{100 * change:+.1f} %"
