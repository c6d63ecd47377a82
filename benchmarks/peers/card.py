"""What was measured, where: the machine, the versions, the peers."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlxeff import kernels
from mlxeff.bench.machine import cores, processor

from .install import LLAMA_VERSION, TORCH_VERSION, XLLAMACPP_VERSION, Peer
from .measure import ROOT
from .table import GENERATED

FEATURES = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "sve", "i8mm", "bf16")


def machine() -> dict:
    """The processor, its caches and instruction sets; the system; the compiler."""
    info = cpu_info()
    return {
        "cpu": processor(),
        "cores": cores(),
        "instruction_sets": sorted(
            flag for flag in (info.get("flags") or info.get("Features") or "").split() if flag.startswith(FEATURES)
        ),
        "caches": caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "compiler": first_line([os.environ.get("CC", "cc"), "--version"]),
    }


def versions() -> dict:
    names = ("mlxeff", "mlx", "mlx-lm", "numpy", "gguf")
    return {name: installed(name) for name in names}


def identity() -> dict:
    """What may not change between the samples of one file."""
    return machine() | versions() | {"peers": [LLAMA_VERSION, XLLAMACPP_VERSION, TORCH_VERSION]}


def card(peers: dict[str, Peer], samples: list[dict], limit: float) -> dict:
    """The machine, the versions, and how it was run."""
    native, reason = kernels.native()
    return {
        "command": " ".join(["python", "benchmarks/cpu_peers.py", *sys.argv[1:]]),
        **machine(),
        **versions(),
        "native": native.isa() if native else reason,
        "commits": sorted({sample["commit"] for sample in samples}),
        "peers": {name: f"{p.version} ({p.how})" if p.present else f"absent: {p.how}" for name, p in peers.items()},
        "generated_tokens": GENERATED,
        "limit_s": limit,
    }


def current_commit() -> str:
    return first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])


def cpu_info() -> dict:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def caches() -> dict:
    """{"L2": size, …} of the first core."""
    found = {}
    for place in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (place / "type").read_text().strip() != "Instruction":
            found[f"L{(place / 'level').read_text().strip()}"] = (place / "size").read_text().strip()
    if not found and (size := sysctl("hw.perflevel0.l2cachesize")):
        found["L2"] = size
    return found


def sysctl(name: str) -> str:
    return first_line(["sysctl", "-n", name]) if sys.platform == "darwin" else ""


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def first_line(command: list[str]) -> str:
    """The first line that a command prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout.splitlines() or [""])[0]
