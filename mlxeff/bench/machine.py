"""What was measured on, and how much memory there is."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from .. import __version__, kernels

LINUX_SHARE, OTHER_SHARE = 0.85, 0.7  # that may be used: of the memory that is free, where known, else of all


def card() -> dict:
    """Processor, memory, system, versions, and the CPU backend with its threads."""
    native, reason = kernels.native()
    return {
        "cpu": processor(),
        "memory_gb": round(physical_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "mlxeff": __version__,
        "mlx": mx.__version__,
        "cpu_backend": f"native {native.isa()}" if native else f"MLX ({reason})",
        "threads": native.num_threads() if native else cores(),
    }


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        return names[0] if names else platform.machine()
    if sys.platform == "darwin":
        run = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return run.stdout.strip() or platform.processor()
    return platform.processor() or platform.machine()


def physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_bytes(device: str) -> float:
    """Memory that a benchmark may take now: a share of what is free (Linux) or of all (elsewhere, where what counts as
    free is mostly caches); on a GPU no more than it should hold at once."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    usable = LINUX_SHARE * free[0] if free else OTHER_SHARE * physical_bytes()
    limit = mx.device_info().get("max_recommended_working_set_size") if device == "gpu" else None
    return min(usable, limit or usable)
