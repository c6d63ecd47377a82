"""Whether what is computed next fits into memory, and what an allocation that fails means.

MLX and the native kernels allocate in the middle of a computation, where too little memory can end the process without
a word: MLX's CPU backend does not look whether an allocation failed, and writes to address 0. So what weights, a KV
cache and a forward pass need is compared with `limits` before they are made. The needs are counted low, lest something
that would fit is refused. What fails all the same becomes one line by `explained`.
"""

import contextlib
from collections.abc import Callable, Iterator

import mlx.core as mx

from . import limits
from .errors import MlxeffError, notices
from .kernels import BUFFER_CACHE_BYTES, device

FAILURES = (
    "[malloc",
    "bad_alloc",
    "unable to allocate",
    "insufficient memory",
    "cannot allocate",
    "resource temporarily unavailable",  # no memory for a thread
)


def require(need: float, what: str, fits: Callable[[float], str], tell: bool = True) -> None:
    """Raises MlxeffError where `need` bytes for `what` are not available; `fits`: available bytes → what would fit, in
    words. With `tell` a notice says on a GPU where they exceed the working set that the system recommends."""
    have = limits.require(need, what, fits)
    mx.set_cache_limit(min(BUFFER_CACHE_BYTES, int((have - need) / 2)))  # freed buffers that MLX keeps count too
    if tell and device() == "gpu":
        recommended = mx.device_info().get("max_recommended_working_set_size") or limits.UNLIMITED
        if mx.get_active_memory() + need > recommended:
            text = "%s: need %s, more than the %s that the GPU should hold at once: it will be slow"
            notices.warning(text, what, limits.size(need), limits.size(recommended))


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises MlxeffError, one line that begins with `what`, where an allocation or a native kernel fails inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := failure(error)) is None:
            raise
        raise MlxeffError(f"{what}: {reason}") from error


def failure(error: Exception) -> str | None:
    """What an exception of MLX, a native kernel or Python says of memory or of a kernel's input; None for others."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, RuntimeError) and text.startswith("native kernel: "):
        return text
    if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in FAILURES):
        return f"out of memory: {text[:200]}"
    return None
