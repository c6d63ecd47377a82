"""What memory this process may use: its own limits, those of its control groups, and what the machine has free.

Imports no slow module, so that the command can ask before it loads the libraries: these end the process without a word,
or hang, where memory is too little for them.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import MlxeffError

CGROUPS = Path("/sys/fs/cgroup")
# Bytes of address space that stay free while a model runs: an allocation that fails in a library ends the process.
RESERVE = 32 << 20
THREADS = 6  # that run beside a model: Python's, MLX's for a stream, and MLX's four that read files
STACK = 8 << 20  # bytes of address space of a thread, where the process has no limit of its own
UNLIMITED = 1 << 60  # bytes; the largest numbers stand for no limit
# Limit of the process → (bytes that numpy, MLX and the tokenizers take of it until a model is read, measured, for
# `start`; the line of /proc/self/status that tells what is used of it; the limit in words).
PROCESS_LIMITS = {
    "RLIMIT_AS": (140 << 20, "VmSize", "the limit of the address space, ulimit -v"),
    "RLIMIT_DATA": (56 << 20, "VmData", "the limit of the data segment, ulimit -d"),
}
MARGIN = 1 << 20  # bytes by which two runs of the program differ
ARENA_MAX = -8  # M_ARENA_MAX of the GNU C library's mallopt


def start() -> None:
    """To be called before numpy and MLX are imported. Where the address space is limited, the C library and OpenBLAS
    are told to take little of it: each thread's own pool of memory takes 64 MB otherwise, and each of OpenBLAS's
    threads 40 MB. Raises MlxeffError where the libraries do not fit into the limits of the process."""
    for (need, _, words), limit, free in _own_limits():
        if need > free:
            enough = f"{words.rpartition(', ')[2]} {(limit + need - free + MARGIN) // 1024}"
            raise MlxeffError(f"the libraries: {shortage(need, free, words)}: {enough} is enough to start")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with contextlib.suppress(ImportError, OSError, AttributeError):  # another C library
            import ctypes

            ctypes.CDLL(None).mallopt(ARENA_MAX, 1)


def available() -> tuple[float, str]:
    """(Bytes that this process can still allocate, what limits them in words)."""
    own = ((float(free), words) for (_, _, words), _, free in _own_limits())
    return min([*own, *_cgroup_limits(), *_machine_limits()], default=(float(UNLIMITED), "no limit"))


def require(need: float, what: str, fits: Callable[[float], str]) -> float:
    """The bytes that are available. Raises MlxeffError where these are fewer than the `need` bytes for `what`; `fits`:
    available bytes → what would fit, in words."""
    have, words = available()
    if need > have:
        have = max(have, 0)
        raise MlxeffError(f"{what}: {shortage(need, have, words)}: {fits(have)}")
    return have


def shortage(need: float, have: float, words: str) -> str:
    """Need and have, and the limit in words, for a message."""
    return f"need {size(need)}, {size(max(have, 0))} may be used ({words})"


def size(count: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _own_limits() -> Iterator[tuple[tuple[int, str, str], int, int]]:
    """(Entry of PROCESS_LIMITS, limit, bytes that are free of it) of the limits that the caller has set for this
    process, as with a shell's `ulimit`. What threads take that will run is not free. Only Linux tells what is used."""
    status = _table(Path("/proc/self/status"))
    if not status:
        return
    import resource

    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = STACK if stack == resource.RLIM_INFINITY else stack
    missing = max(0, THREADS - len(os.listdir("/proc/self/task")))
    for name, entry in PROCESS_LIMITS.items():
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and entry[1] in status:
            yield entry, limit, limit - status[entry[1]] - RESERVE - missing * stack


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
