"""The backends of this machine, Metal and the native CPU extension, and what depends on them: the default device, the
type to compute in, graph fusion, the limit of MLX's buffer cache.

Every question of "Metal or CPU?" is answered here. This module knows nothing about models.
"""

import functools
import importlib.resources
import os
from collections.abc import Callable
from types import ModuleType

import mlx.core as mx

from .errors import MlxeffError

BUFFER_CACHE_BYTES = 1 << 30  # of freed buffers that MLX keeps for reuse; by default they can fill a small machine
# Prompt tokens in one forward pass. MLX's attention on a CPU allocates (heads, chunk, length) scores, so chunks are
# smaller there.
PREFILL_STEP = {"gpu": 2048, "cpu": 512}


@functools.cache
def has_metal() -> bool:
    """True where MLX was built with Metal and finds a GPU."""
    return bool(mx.metal.is_available())


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """(The extension module of native CPU kernels, ""), or (None, the reason why it cannot be used)."""
    if os.environ.get("MLXEFF_NATIVE") == "0":
        return None, "switched off by MLXEFF_NATIVE=0"
    try:
        from . import _native
    except ImportError as error:
        missing = error.name == f"{__package__}._native" or "cannot import name" in str(error)
        return None, "not built at installation (no C++ compiler?)" if missing else str(error).splitlines()[0]
    if _native.mlx_version != mx.__version__:
        return None, f"built for MLX {_native.mlx_version}, not for {mx.__version__}: install mlxeff again"
    try:
        _native.accepts(mx.array(0))
    except TypeError:
        return None, "built with a nanobind that does not match MLX's"
    return _native, ""


@functools.cache
def metal_kernel(family: str, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], body: str) -> Callable:
    """The kernel `name` of the source file metal/`family`.metal, built once. Call the result as the documentation of
    `mx.fast.metal_kernel` says, with arrays, grid and output shapes.

    body: a few lines of Metal that call a function of that file. MLX wraps them into a kernel whose arguments are the
    arrays named in `inputs` and `outputs`, and the thread positions that the body mentions.
    """
    header = importlib.resources.files(f"{__package__}.metal").joinpath(f"{family}.metal").read_text(encoding="utf-8")
    return mx.fast.metal_kernel(
        name=name, input_names=list(inputs), output_names=list(outputs), source=body, header=header
    )


def use_device(name: str) -> str:
    """Make `name` MLX's default device: "cpu", "gpu" or "auto", which leaves the default as it is. Returns the device
    in use, "cpu" or "gpu". Raises MlxeffError for "gpu" without Metal."""
    if name == "gpu" and not has_metal():
        raise MlxeffError("--device gpu: wanted a Metal GPU, this MLX has none (use --device cpu)")
    if name != "auto":
        mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    return device()


def device() -> str:
    """The kind of MLX's default device, "cpu" or "gpu"."""
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def bound_buffer_cache() -> None:
    """Limit MLX's cache of freed buffers to BUFFER_CACHE_BYTES. No limit of wired memory is set, because that can make
    small Macs panic (issue 3186 of MLX)."""
    mx.set_cache_limit(BUFFER_CACHE_BYTES)


def arithmetic_dtype(stored: mx.Dtype, quantized: bool) -> mx.Dtype:
    """The type in which MLX's own operations should compute, for dense weights or quantisation scales of type `stored`.

    On a Mac this is the stored type. Without Metal, MLX's CPU kernels have no SIMD code for half precision: float16,
    and half-precision scales of quantised layers, run several times slower than float32. They are widened to float32,
    which is exact. Dense bfloat16 is kept, since it is faster than float32 there.
    """
    if has_metal() or stored == mx.float32:
        return stored
    return mx.float32 if quantized or stored == mx.float16 else stored


def fused(function: Callable) -> Callable:
    """`mx.compile(function, shapeless=True)` on a GPU, `function` itself on a CPU.

    On a CPU, MLX compiles with the C++ compiler at run time, which measurements show to gain nothing. The device is
    looked up at each call, since the default device may change after import.
    """
    compiled = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return (compiled if device() == "gpu" else function)(*arrays)

    return call
