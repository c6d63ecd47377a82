"""What a device can do at most, as measured: bytes of memory read a second, and FLOP/s of a product of matrices. Takes
some two seconds. Everything else is shown as a share of these.

Bytes: a product of one row with a float32 matrix that is far larger than the caches, which reads each weight once, by
all threads. FLOP/s: a product of two square matrices, in float32 on the CPU and in float16 on the GPU. The best of some
tries counts: a disturbance only makes one slower.
"""

import time
from collections.abc import Callable

import mlx.core as mx

from .. import kernels, limits

ROWS = 1 << 15  # of the matrix that is read
COLUMNS = 1 << 12  # 512 MiB in float32
SHARE = 0.25  # of the available memory that the matrix may take
SIZE = {"cpu": 1024, "gpu": 4096}
TRIES, SECONDS = 8, 0.5  # at most, of each probe


def measure(device: str) -> dict:
    """{"read_gbps", "gflops", "how"} of "cpu" or "gpu", MLX's default device."""
    on_cpu = device == "cpu"
    native = kernels.native()[0] if on_cpu else None
    dtype = mx.float32 if on_cpu else mx.float16
    rows = max(1024, min(ROWS, int(SHARE * limits.available()[0] / 4 / COLUMNS)))
    matrix, row = mx.ones((rows, COLUMNS)), mx.ones((1, COLUMNS))
    size = SIZE[device]
    square = mx.ones((size, size), dtype)
    mx.eval(matrix, row, square)
    reads = {"MLX": lambda: row @ matrix.T}
    products = {"MLX": lambda: square @ square.T}
    if native:
        reads["native"] = lambda: native.linear(row, matrix)
        products["native"] = lambda: native.linear(square, square)
    read, by_read = _best(reads)
    product, by_product = _best(products)
    name = str(dtype).rpartition(".")[2]
    how = (
        f"1 x {COLUMNS} by {COLUMNS} x {rows} in float32 ({by_read}); {size} x {size} by the same in {name} "
        f"({by_product})"
    )
    return {"read_gbps": matrix.nbytes / read / 1e9, "gflops": 2 * size**3 / product / 1e9, "how": how}


def _best(works: dict[str, Callable[[], mx.array]]) -> tuple[float, str]:
    """(Seconds, name) of the fastest of some ways to compute the same."""
    return min((_seconds(work), name) for name, work in works.items())


def _seconds(work: Callable[[], mx.array]) -> float:
    """The shortest time of some tries, after one that does not count."""
    mx.eval(work())
    times, began = [], time.perf_counter()
    while not times or (len(times) < TRIES and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
