"""Custom Metal kernels on the host CPU: traced by MLX, compiled by the C++ compiler, run thread by thread.

    import metal_on_cpu
    got = metal_on_cpu.run(launch, x, weights)                          # launch calls mx.fast.metal_kernel(...)(...)
    metal_on_cpu.run(launch, x, weights, sanitizer="address")           # or "thread": raises MetalError on a finding

Where there is a Metal GPU, `run` calls `launch` on it. README.md says what is checked here and what is not.
"""

import contextlib
import functools
import os
import shutil

import mlx.core as mx
import pytest

from mlxeff import kernels

from .host import SANITIZERS, MetalError, run_on_host
from .recording import Launch, trace

__all__ = ["SANITIZERS", "Launch", "MetalError", "emulated", "run", "trace"]


def run(launch, *arguments, sanitizer=None, descending=False, **keywords):
    """`launch(*arguments, **keywords)`, evaluated: on the GPU, or by emulation where there is none.

    sanitizer: "address" (with undefined behaviour) or "thread". descending: the threads' order of execution, emulated.
    """
    if kernels.has_metal():
        if sanitizer:
            pytest.skip("sanitizers need the emulation, here the kernel runs on the GPU")
        result = launch(*arguments, **keywords)
    else:
        if os.environ.get("MLXEFF_REQUIRE_METAL"):
            pytest.fail("MLXEFF_REQUIRE_METAL is set, and MLX finds no GPU")
        with emulated(sanitizer, descending):
            result = launch(*arguments, **keywords)
    mx.eval(result)
    return result


@contextlib.contextmanager
def emulated(sanitizer=None, descending=False):
    """Within it, kernels made by `mx.fast.metal_kernel` and by `mlxeff.kernels.metal_kernel` run on the host CPU."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to run Metal kernels with")
    real = mx.fast.metal_kernel

    def metal_kernel(*arguments, **keywords):
        return functools.partial(_call, real(*arguments, **keywords), sanitizer, descending)

    mx.fast.metal_kernel = metal_kernel
    kernels.metal_kernel.cache_clear()
    try:
        yield
    finally:
        mx.fast.metal_kernel = real
        kernels.metal_kernel.cache_clear()


def _call(kernel, sanitizer, descending, *, inputs, stream=None, **keywords):
    """One call of a kernel as MLX's signature has it; the outputs come back as evaluated arrays."""
    arrays = [each if isinstance(each, mx.array) else mx.array(each) for each in inputs]
    launch = trace(kernel, arrays, **keywords)
    return run_on_host(launch, arrays, sanitizer, descending)
