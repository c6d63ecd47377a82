"""The description of the machine on which a benchmark runs (its card), and the memory that a benchmark may use."""

import os
import platform
import re
import sys
from pathlib import Path

import mlx.core as mx

from .. import __version__, kernels, limits
from .conditions import output

# The shares of memory that a benchmark may use: on Linux of the available memory, elsewhere of all memory.
LINUX_SHARE, OTHER_SHARE = 0.85, 0.7
# Entries of the card that are the same for all samples of a machine and version.
FIXED = ("cpu", "gpu", "gpu_cores", "memory_gb", "system", "mlxeff", "mlx", "cpu_backend", "threads")


def card() -> dict:
    """The card: processor, GPU with its number of cores (None where there is none that MLX can use), model of a Mac,
    memory in GB (10⁹ bytes), operating system and the release of its kernel, versions, and the CPU backend with its
    number of threads."""
    native, reason = kernels.native()
    gpu, gpu_cores = graphics()
    return {
        "cpu": processor(),
        "gpu": gpu,
        "gpu_cores": gpu_cores,
        "mac": sysctl("hw.model") or None,
        "memory_gb": round(physical_bytes() / 1e9, 1),
        "system": system(),
        "kernel": platform.release(),
        "mlxeff": __version__,
        "mlx": mx.__version__,
        "cpu_backend": f"native {native.isa()}" if native else f"MLX ({reason})",
        "threads": native.num_threads() if native else cores(),
    }


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def system() -> str:
    """The operating system, on a Mac with its version, the processor architecture and the version of Python, as one
    text."""
    name = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    return f"{name} {platform.machine()}, Python {platform.python_version()}"


def processor() -> str:
    """The name of the processor, as the operating system gives it."""
    if info := cpu_info():
        return info.get("model name", platform.machine())
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def graphics() -> tuple[str | None, int | None]:
    """(The name of the GPU, its number of cores), as far as they are known; (None, None) without Metal."""
    if not kernels.has_metal():
        return None, None
    name = mx.device_info().get("device_name")
    return name, cores_of_gpu(output(["system_profiler", "SPDisplaysDataType", "-json"]))


def cores_of_gpu(report: str) -> int | None:
    """The number of cores that a report of system_profiler names first."""
    found = re.search(r'"sppci_cores"\s*:\s*"(\d+)"', report)
    return int(found[1]) if found else None


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
    return (output(command).splitlines() or [""])[0]


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
