"""What was measured on, and how much memory there is."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from .. import __version__, kernels, memory

LINUX_SHARE, OTHER_SHARE = 0.85, 0.7  # that may be used: of the memory that is free, where known, else of all


def card() -> dict:
    """Processor, memory, system, versions, and the CPU backend with its threads."""
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
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def system() -> str:
    """The operating system, the kind of processor, the version of Python."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def processor() -> str:
    """The processor's name as the system gives it."""
    if info := cpu_info():
        return info.get("model name", platform.machine())
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cpu_info() -> dict[str, str]:
    """What Linux tells of the first core; {} on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def instruction_sets() -> list[str]:
    """The flags of the first core, as Linux names them; [] on other systems."""
    info = cpu_info()
    return (info.get("flags") or info.get("Features") or "").split()


def sysctl(name: str) -> str:
    """What macOS tells of `name`; nothing on other systems."""
    return first_line(["sysctl", "-n", name]) if sys.platform == "darwin" else ""


def first_line(command: list[str]) -> str:
    """The first line that a command prints; nothing where it is missing or prints none."""
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout.splitlines() or [""])[0]


def physical_bytes() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_bytes(device: str) -> float:
    """Memory that a benchmark may take now: a share of what is available (Linux) or of all (elsewhere, where what
    counts as free is mostly caches); on a GPU no more than it should hold at once."""
    share = LINUX_SHARE if sys.platform == "linux" else OTHER_SHARE
    usable = share * memory.available()[0]
    limit = mx.device_info().get("max_recommended_working_set_size") if device == "gpu" else None
    return min(usable, limit or usable)
