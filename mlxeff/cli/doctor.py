"""`mlxeff doctor`: the backends of this machine, the reasons why it lacks others, and the file for a bug report."""

import argparse
import platform
import sys

from . import bundle, output, streams


def run(options: argparse.Namespace) -> int:
    """Print the report; returns the exit code."""
    facts = report()
    facts["bundle"] = None if options.bundle is None else bundle.write(options.bundle, facts)
    if options.json:
        streams.print_json(facts)
        return 0
    native, metal = facts["native"], facts["metal"]
    print(f"mlxeff    {facts['mlxeff']}, Python {facts['python']}, {facts['system']}")
    print(f"MLX       {facts['mlx']}, default device {facts['device']}")
    print("Metal     " + ("available" if metal["available"] else "not available: " + metal["reason"]))
    if native["available"]:
        others = ", ".join(native["levels"])
        print(f"CPU       native kernels: {native['level']} (of {others}), {native['threads']} threads")
    else:
        print(f"CPU       MLX's own kernels; native ones: {native['reason']}")
    print(f"cache     {facts['cache'] or 'none: ' + output.cache_place()[1]}")
    if found := facts["bundle"]:
        print(f"report    {found['path']}: {', '.join(found['sections'])}")
        print(f"          without {bundle.LEFT_OUT}; read it before you send it")
    return 0


def report() -> dict:
    """The document that `--json` prints (docs/json.md)."""
    import mlx.core as mx

    from .. import __version__, kernels

    native, reason = kernels.native()
    return {
        "mlxeff": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "mlx": mx.__version__,
        "device": kernels.device(),
        "metal": {
            "available": kernels.has_metal(),
            "reason": "" if kernels.has_metal() else f"MLX has no Metal on {sys.platform}",
        },
        "native": {
            "available": native is not None,
            "reason": reason,
            "level": native.isa() if native else None,
            "levels": native.isa_available().split() if native else [],
            "threads": native.num_threads() if native else 1,
        },
        "cache": output.cache_place()[0],
    }
