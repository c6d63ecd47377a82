"""Which device backends exist here, and what follows from that: the device, the arithmetic type, fusion, the
buffer-cache bound.

The one place that asks "Metal or CPU?". It knows nothing about models.
"""

import functools
import importlib.resources
import os
from collections.abc import Callable
from types import ModuleType

import mlx.core as mx

from .errors import MlxeffError

BUFFER_CACHE_BYTES = 1 << 30  # freed buffers that MLX may keep; its own default is unbounded on small machines
PREFILL_STEP = {"gpu": 2048, "cpu": 512}  # prompt tokens a chunk; a CPU holds (heads, chunk, length) attention scores


@functools.cache
def has_metal() -> bool:
    """True where MLX was built with Metal and finds a GPU."""
    return bool(mx.metal.is_available())


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The CPU extension and "", or None and the reason why it cannot be used."""
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
    """The kernel `name` of metal/`family`.metal, built once: MLX's callable, which takes the launch's shapes and grid.

    body: a few lines that call a function of that file; MLX gives it `inputs`, `outputs` and the thread's position.
    """
    header = importlib.resources.files(f"{__package__}.metal").joinpath(f"{family}.metal").read_text(encoding="utf-8")
    return mx.fast.metal_kernel(
        name=name, input_names=list(inputs), output_names=list(outputs), source=body, header=header
    )


def use_device(name: str) -> str:
    """Make `name` ("auto", "cpu" or "gpu") MLX's default device; returns the device in use, "cpu" or "gpu"."""
    if name == "gpu" and not has_metal():
        raise MlxeffError("--device gpu: wanted a Metal GPU, this MLX has none (use --device cpu)")
    if name != "auto":
        mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    return device()


def device() -> str:
    """The default device's kind, "cpu" or "gpu"."""
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def bound_buffer_cache() -> None:
    """Bound MLX's cache of freed buffers. No wired-memory limit is set: it can panic small Macs (mlx issue 3186)."""
    mx.set_cache_limit(BUFFER_CACHE_BYTES)


def arithmetic_dtype(stored: mx.Dtype, quantized: bool) -> mx.Dtype:
    """The type to compute in, for weights (or quantisation scales) stored as `stored`.

    On a GPU the stored type. (The native CPU kernels read weights of any type.) MLX's CPU kernels without Metal have
    no half-precision SIMD: float16 anywhere, and half-precision scales in quantised layers, run several times slower
    than float32, so those are widened (which loses nothing). Dense bfloat16 stays: there it is the faster one.
    """
    if has_metal() or stored == mx.float32:
        return stored
    return mx.float32 if quantized or stored == mx.float16 else stored


def fused(function: Callable) -> Callable:
    """`mx.compile(function, shapeless=True)` on a GPU, `function` itself on a CPU.

    Compilation on a CPU calls the C++ compiler at run time and was measured to gain nothing there. The choice is made
    at each call, since the default device may change after import.
    """
    compiled = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return (compiled if device() == "gpu" else function)(*arrays)

    return call
