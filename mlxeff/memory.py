"""How much memory this process may still take, and what an allocation that fails means.

MLX and the native kernels allocate in the middle of a computation, where too little memory can end the process without
a word. So what weights, a KV cache and a forward pass need is compared with the limits here before they are made. The
needs are counted low, lest something that would fit is refused. What fails all the same becomes one line by
`explained`.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from .errors import MlxeffError, notices
from .kernels import BUFFER_CACHE_BYTES, device

CGROUPS = Path("/sys/fs/cgroup")
# Bytes of address space for threads and libraries while a model runs: an allocation that fails in the tokenizer's
# library ends the process.
RESERVE = 32 << 20
UNLIMITED = 1 << 60  # bytes; the largest numbers stand for no limit
FAILURES = (
    "[malloc",
    "bad_alloc",
    "unable to allocate",
    "insufficient memory",
    "cannot allocate",
    "resource temporarily unavailable",  # no memory for a thread
)


def available() -> tuple[float, str]:
    """(Bytes that this process can still allocate, what limits them in words)."""
    return min([*_process_limits(), *_cgroup_limits(), *_machine_limits()], default=(float(UNLIMITED), "no limit"))


def require(need: float, what: str, fits: Callable[[float], str]) -> None:
    """Raises MlxeffError where `need` bytes for `what` are not available; `fits`: available bytes → what would fit, in
    words. On a GPU a notice says where they exceed the working set that the system recommends."""
    have, limit = available()
    if need > have:
        have = max(have, 0)
        raise MlxeffError(f"{what}: need {_size(need)}, {_size(have)} may be used ({limit}): {fits(have)}")
    mx.set_cache_limit(min(BUFFER_CACHE_BYTES, int((have - need) / 2)))  # freed buffers that MLX keeps count too
    if device() == "gpu":
        recommended = mx.device_info().get("max_recommended_working_set_size") or UNLIMITED
        if mx.get_active_memory() + need > recommended:
            text = "%s: need %s, more than the %s that the GPU should hold at once: it will be slow"
            notices.warning(text, what, _size(need), _size(recommended))


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises MlxeffError, one line that begins with `what`, where an allocation or a native kernel fails inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := failure(error)) is None:
            raise
        raise MlxeffError(f"{what}: {reason}") from error


def failure(error: Exception) -> str | None:
    """What an exception of MLX, a native kernel or Python says of memory or of a kernel's input; None for others."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, RuntimeError) and text.startswith("native kernel: "):
        return text
    if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in FAILURES):
        return f"out of memory: {text[:200]}"
    return None


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _process_limits() -> Iterator[tuple[float, str]]:
    """Those that the caller has set for this process, as with a shell's `ulimit`. Only Linux tells what is in use."""
    status = _table(Path("/proc/self/status"))
    if not status:
        return
    import resource

    for name, used, words in (
        (resource.RLIMIT_AS, "VmSize", "the limit of the address space, ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "the limit of the data segment, ulimit -d"),
    ):
        limit = resource.getrlimit(name)[0]
        if limit != resource.RLIM_INFINITY and used in status:
            yield float(limit - status[used] - RESERVE), words


def _cgroup_limits() -> Iterator[tuple[float, str]]:
    """Those of the control groups that this process is in, as a container sets them; versions 1 and 2."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inside = root / place.lstrip("/")
        for folder in [inside, *inside.parents]:
            if folder != root and root not in folder.parents:
                break
            limit, used = (_number(folder / name) for name in names)
            if limit is None or used is None or limit >= UNLIMITED:
                continue
            stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
            freed = stat.get("total_inactive_file") or stat.get("inactive_file") or "0"  # cached pages of files
            yield float(limit - used + int(freed)), "the limit of the container or control group"


def _machine_limits() -> Iterator[tuple[float, str]]:
    """The memory that is free, swap included; on a Mac, where what counts as free is mostly caches, all of it."""
    info = _table(Path("/proc/meminfo"))
    if "MemAvailable" in info:
        yield float(info["MemAvailable"] + info.get("SwapFree", 0)), "free memory"
    elif sys.platform == "darwin":
        yield float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "the machine's memory"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    """A table of the kernel, name → bytes: the lines of the form "VmSize:  12 kB"."""
    rows = (line.split() for line in _lines(path))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
