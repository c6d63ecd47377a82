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

__all__ = ["SANITIZERS", "Launch", "MetalError", "emulated", "recorded", "run", "trace"]


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
    with _calling(functools.partial(_run, sanitizer=sanitizer, descending=descending)):
        yield


@contextlib.contextmanager
def recorded():
    """Within it no kernel runs: a call appends its `Launch` to the list that this yields, and gives zeros."""
    launches = []
    with _calling(functools.partial(_record, launches=launches)):
        yield launches


@contextlib.contextmanager
def _calling(function):
    """Within it a kernel's call is `function(kernel, inputs=…, grid=…, …)`; `kernel` is what MLX made."""
    real = mx.fast.metal_kernel

    def metal_kernel(*arguments, **keywords):
        return functools.partial(function, real(*arguments, **keywords))

    mx.fast.metal_kernel = metal_kernel
    kernels.metal_kernel.cache_clear()
    try:
        yield
    finally:
        mx.fast.metal_kernel = real
        kernels.metal_kernel.cache_clear()


def _run(kernel, *, sanitizer, descending, inputs, stream=None, **keywords):
    """One call of a kernel as MLX's signature has it; the outputs come back as evaluated arrays."""
    arrays = _arrays(inputs)
    return run_on_host(trace(kernel, arrays, **keywords), arrays, sanitizer, descending)


def _record(kernel, *, launches, inputs, stream=None, **keywords):
    launches.append(trace(kernel, _arrays(inputs), **keywords))
    return [mx.zeros(shape, dtype) for shape, dtype in launches[-1].outputs]


def _arrays(inputs):
    return [each if isinstance(each, mx.array) else mx.array(each) for each in inputs]
