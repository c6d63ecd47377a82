"""Configs and models with seed-encoded modules: for tests of loading, of the fused form and of conversion."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxeff.assembly.model import build_model
from mlxeff.seedlm import codec
from mlxeff.seedlm.format import block_format
from mlxeff.seedlm.install import entry
from mlxeff.seedlm.linear import SeedModule


def with_seeds(config, bits, only="", embeddings=False):
    """The config with every linear layer seed-encoded whose name contains `only`, and perhaps the embeddings."""
    dense = build_model({key: value for key, value in config.items() if key != "quantization"})
    kinds = (nn.Linear, nn.Embedding) if embeddings else nn.Linear
    found = {name: m.weight.shape for name, m in dense.named_modules() if isinstance(m, kinds) and only in name}
    return config | {"seedlm": entry({name: (block_format(bits), *shape) for name, shape in found.items()})}


def randomise(module: SeedModule, rng):
    """Blocks whose weights have a root mean square near 0.15."""
    fmt, shape = module.block_format, (module.rows, module.block_format.blocks(module.cols))
    blocks = codec.Blocks(
        rng.integers(1, 1 << 16, shape).astype(np.uint16),
        rng.integers(-8, 8, (*shape, fmt.states)).astype(np.int8),
        rng.integers(7, 9, shape).astype(np.uint8),
        -5,
    )
    module.update({name: mx.array(array) for name, array in codec.pack(fmt, blocks).items()})


def rounds_to_int8(level: str) -> bool:
    """Whether the native kernels of an instruction-set level have mode INT8 for seeds here."""
    cpu = Path("/proc/cpuinfo")
    return level in ("avx512", "amx") and cpu.exists() and " avx512vbmi " in cpu.read_text()
