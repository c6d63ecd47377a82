"""Output of the command on standard error: notices, progress bars and the line of timings."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from ..errors import MlxeffError, notices

BAR_DELAY = 1.0  # seconds of work before a bar appears


class NoticeHandler(logging.Handler):
    """Prints each notice as a line and collects all in `lines` for `--json`. With `quiet`, only warnings are
    printed."""

    def __init__(self, quiet: bool = False):
        super().__init__(logging.INFO)
        self.quiet, self.lines = quiet, []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        line = record.getMessage()
        self.lines.append(line)
        if record.levelno >= logging.WARNING or not self.quiet:
            words = {logging.ERROR: "error", logging.WARNING: "warning"}
            word = words.get(record.levelno, "note")
            print(f"mlxeff: {word}: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def show_notices(quiet: bool = False) -> Iterator[list[str]]:
    """Show notices inside the block; gives the list in which they are collected."""
    handler = NoticeHandler(quiet)
    before = notices.level, notices.propagate
    notices.addHandler(handler)
    notices.setLevel(logging.INFO)
    notices.propagate = False
    try:
        yield handler.lines
    finally:
        notices.removeHandler(handler)
        notices.level, notices.propagate = before


@contextlib.contextmanager
def bar(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Gives a callback for (done, total) that draws a progress bar, or None without a terminal. `unit` is "B" (bytes),
    "w" (weights), "tok" (tokens) or "step"."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    scale, divisor = unit != "tok", 1024 if unit == "B" else 1000
    with tqdm(
        desc=title, unit=unit, unit_scale=scale, unit_divisor=divisor, delay=BAR_DELAY, leave=False, file=sys.stderr
    ) as drawn:

        def show(done: int, total: int) -> None:
            drawn.total = total
            drawn.update(done - drawn.n)

        yield show


def cache_place() -> tuple[str | None, str]:
    """(The folder for downloaded files, "") or (None, the reason why there is none)."""
    from .. import hub

    try:
        return str(hub.cache_dir()), ""
    except MlxeffError as error:
        return None, str(error)


def _precision(stats: dict) -> Iterator[str]:
    """Words for what is not computed exactly."""
    if stats["compute"] not in (None, "exact"):
        yield f"{stats['compute']} products"
    if stats["kv_dtype"] not in (None, stats["dtype"]):
        yield f"{stats['kv_dtype']} KV cache"


def timing_line(stats: dict, summary: Sequence[str] = ()) -> str:
    """The line with the timings of an answer. `stats` is the result of `Runner.stats`; `summary` are the statistics of
    the techniques, in words."""
    prompt = f"prompt {stats['prompt_tokens']} tokens"
    if stats["reused_tokens"]:
        prompt += f" ({stats['reused_tokens']} from the cache)"
    return " | ".join(
        [
            prompt,
            f"TTFT {stats['ttft_s']:.3f} s",
            f"prefill {stats['prefill_tps']:.1f} tok/s",
            f"generated {stats['generated_tokens']} tokens ({stats['finish_reason']})",
            f"decode {stats['decode_tps']:.1f} tok/s",
            f"peak memory {stats['peak_memory_gb']:.2f} GB",
            *summary,
            " ".join([stats["device"], stats["dtype"], stats["backend"], *_precision(stats)]),
        ]
    )
