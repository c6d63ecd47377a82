"""The description of the machine on which a benchmark runs (its card), and the memory that a benchmark may use."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from .. import __version__, kernels, limits

# The shares of memory that a benchmark may use: on Linux of the available memory, elsewhere of all memory.
LINUX_SHARE, OTHER_SHARE = 0.85, 0.7


def card() -> dict:
    """The card: processor, memory in GB (10⁹ bytes), operating system, versions, and the CPU backend with its number of
    threads."""
    native, reason = kernels.native()
    return {
        "cpu": processor(),
        "memory_gb": round(physical_bytes() / 1e9, 1),
        "system": system(),
        "mlxeff": __version__,
        "mlx": mx.__version__,
        "cpu_backend": f"native {native.isa()}" if native else f"MLX ({reason})",
        "threads": native.num_threads() if native else cores(),
    }


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def system() -> str:
    """The operating system, the processor architecture and the version of Python, as one text."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def processor() -> str:
    """The name of the processor, as the operating system gives it."""
    if info := cpu_info():
        return info.get("model name", platform.machine())
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cpu_info() -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first core on Linux; {} on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def instruction_sets() -> list[str]:
    """The instruction set extensions of the first core, by their names on Linux; [] on other systems."""
    info = cpu_info()
    return (info.get("flags") or info.get("Features") or "").split()


def sysctl(name: str) -> str:
    """The value of the kernel variable `name` on macOS; "" on other systems."""
    return first_line(["sysctl", "-n", name]) if sys.platform == "darwin" else ""


def first_line(command: list[str]) -> str:
    """The first line that a command prints; "" where the command is missing or prints nothing."""
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout.splitlines() or [""])[0]


def physical_bytes() -> int:
    """The memory of the machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_bytes(device: str) -> float:
    """Bytes of memory that a benchmark may use on `device`, "cpu" or "gpu".

    On Linux this is a share of the available memory. Elsewhere it is a share of all memory, because the available
    memory is not known well: caches that the system would free count as used. On a GPU it is at most the
    working set that the device recommends.
    """
    share = LINUX_SHARE if sys.platform == "linux" else OTHER_SHARE
    usable = share * limits.available()[0]
    limit = mx.device_info().get("max_recommended_working_set_size") if device == "gpu" else None
    return min(usable, limit or usable)
