"""The card of a result: the machine, the versions and the peers."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import saving
from mlxeff import kernels
from mlxeff.bench.machine import cores, first_line, instruction_sets, physical_bytes, processor, sysctl, system
from places import ROOT

from .install import LLAMA_VERSION, TORCH_VERSION, XLLAMACPP_VERSION, Peer
from .table import GENERATED

FEATURES = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "sve", "i8mm", "bf16")


def machine() -> dict:
    """The processor, its caches and instruction sets; the system; the compiler."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "instruction_sets": sorted(flag for flag in instruction_sets() if flag.startswith(FEATURES)),
        "caches": caches(),
        "memory_gib": round(physical_bytes() / 2**30, 1),
        "system": system(),
        "compiler": first_line([os.environ.get("CC", "cc"), "--version"]),
    }


def versions() -> dict:
    names = ("mlxeff", "mlx", "mlx-lm", "numpy", "gguf")
    return {name: installed(name) for name in names}


def identity() -> dict:
    """The properties that must be the same for all samples of a file."""
    return machine() | versions() | {"peers": [LLAMA_VERSION, XLLAMACPP_VERSION, TORCH_VERSION]}


def card(peers: dict[str, Peer], samples: list[dict], limit: float) -> dict:
    """The machine, the versions, and how it was run."""
    native, reason = kernels.native()
    return {
        "command": saving.command(),
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


def caches() -> dict:
    """{"L2": size, …} of the first core."""
    found = {}
    for place in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (place / "type").read_text().strip() != "Instruction":
            found[f"L{(place / 'level').read_text().strip()}"] = (place / "size").read_text().strip()
    if not found and (size := sysctl("hw.perflevel0.l2cachesize")):
        found["L2"] = size
    return found


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
