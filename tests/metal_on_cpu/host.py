"""Compile a launch's kernel, run it in a process of its own over its buffers, read the outputs back."""

import atexit
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from .translate import translate

HERE = Path(__file__).resolve().parent
SANITIZERS = {
    None: ["-O1"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DMETAL_ON_CPU_ADDRESS"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-DMETAL_ON_CPU_THREAD"],
}
NOT_INSTRUMENTED = {"-fsanitize=thread", "-fsanitize=address,undefined"}  # the scheduler, see runtime.h
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the fibers' stacks are given back by the process's end
    "TSAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
TIMEOUT = 300  # seconds


class MetalError(AssertionError):
    """A kernel that does not compile, breaks a rule of Metal's, or in which a sanitizer found something."""


def run_on_host(launch, arrays, sanitizer=None, descending=False):
    """Run `launch` over the input arrays; returns the outputs as mx arrays."""
    program = build(launch.source, launch.name, sanitizer)
    buffers = [each for array, info in zip(arrays, launch.shape_infos) for each in input_buffers(array, info, launch)]
    outputs = [output_buffer(shape, dtype, launch.init_value) for shape, dtype in launch.outputs]
    with tempfile.TemporaryDirectory(dir=work_folder()) as folder:
        write_launch(Path(folder), launch, buffers + [(output, 0) for output in outputs], len(buffers), descending)
        run_program(program, folder, launch.name)
        return [
            to_mlx((Path(folder) / str(len(buffers) + i)).read_bytes(), shape, dtype)
            for i, (shape, dtype) in enumerate(launch.outputs)
        ]


@functools.cache
def work_folder():
    """Holds compiled kernels and the buffers of running ones; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="metal-on-cpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def compile_cpp(*arguments):
    native = ["-march=native"] if platform.machine() == "x86_64" else []  # fused multiply-add in one instruction
    command = ["c++", "-std=c++17", "-w", "-ffp-contract=off", *native, f"-I{HERE}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise MetalError(f"the kernel does not compile:\n{done.stderr[:4000]}")


@functools.cache
def common_parts(sanitizer):
    """The precompiled header and the object of the scheduler, for one sanitizer; returns their folder."""
    flags = SANITIZERS[sanitizer]
    folder = work_folder() / f"common-{sanitizer}"
    folder.mkdir()
    shutil.copy(HERE / "metal.h", folder)
    compile_cpp(*flags, "-x", "c++-header", folder / "metal.h", "-o", folder / "metal.h.gch")
    plain = [flag for flag in flags if flag not in NOT_INSTRUMENTED]
    for name in ("scheduler", "main"):
        compile_cpp(*plain, "-c", HERE / f"{name}.cpp", "-o", folder / f"{name}.o")
    return folder


def build(source, name, sanitizer):
    """Path of the program that runs the kernel; one for each source and sanitizer."""
    key = hashlib.sha256(f"{sanitizer}\n{source}".encode()).hexdigest()[:24]
    program = work_folder() / key
    if not program.exists():
        common = common_parts(sanitizer)
        program.with_suffix(".cpp").write_text(translate(source, name))
        objects = [common / "scheduler.o", common / "main.o"]
        files = ["-include", common / "metal.h", program.with_suffix(".cpp"), *objects, "-o", program]
        compile_cpp(*SANITIZERS[sanitizer], *files)
    return program


def input_buffers(array, shape_info, launch):
    """(bytes, offset of the first element) of an input, and of its shape, strides and ndim where they are passed."""
    view = to_numpy(array)
    if launch.ensure_row_contiguous:
        view = np.ascontiguousarray(view).reshape(view.shape)
    yield memory_of(view)
    if array.ndim > 0:
        strides = [stride // view.itemsize for stride in view.strides]
        facts = (np.array(view.shape, np.int32), np.array(strides, np.int64), np.array(view.ndim, np.int32))
        yield from ((fact.tobytes(), 0) for fact, wanted in zip(facts, shape_info) if wanted)


def memory_of(view):
    """The bytes from the lowest to the highest element of a strided NumPy array, and where its first element is."""
    if view.size == 0 or view.flags.c_contiguous:
        return view.tobytes(), 0
    reach = [stride * (size - 1) for stride, size in zip(view.strides, view.shape)]
    origin = -sum(each for each in reach if each < 0)
    size = origin + sum(each for each in reach if each > 0) + view.itemsize
    memory = np.zeros(size, np.uint8)
    np.ndarray(view.shape, view.dtype, memory.data, origin, view.strides)[...] = view
    return memory.tobytes(), origin


def output_buffer(shape, dtype, init_value):
    """Initial bytes of an output: `init_value`, or 0xFF (NaN in every float type) where Metal leaves them undefined."""
    count = int(np.prod(shape))
    if init_value is None:
        return b"\xff" * (count * dtype.size)
    return to_numpy(mx.full((count,), init_value).astype(dtype)).tobytes()


def write_launch(folder, launch, buffers, inputs, descending):
    lines = [" ".join(str(n) for n in (*launch.grid, *launch.threadgroup, int(descending), len(buffers)))]
    for number, (data, origin) in enumerate(buffers):
        (folder / str(number)).write_bytes(data)
        lines.append(f"{len(data)} {origin} {int(number >= inputs)}")
    (folder / "launch").write_text("\n".join(lines) + "\n")


def run_program(program, folder, name):
    command = [*fixed_addresses(), str(program)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode != 0:
        raise MetalError(f"{name}: exit {done.returncode}\n{done.stderr[:6000]}")


@functools.cache
def fixed_addresses():
    """A prefix that switches off address randomisation, which the thread sanitizer's memory map cannot always bear."""
    prefix = ["setarch", platform.machine(), "-R"]
    found = shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if found else []


def to_numpy(array):
    """An mx array → NumPy with the same strides; bfloat16 as its bits."""
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def to_mlx(data, shape, dtype):
    if dtype == mx.bfloat16:
        return mx.array(np.frombuffer(data, np.uint16).reshape(shape)).view(mx.bfloat16)
    kind = np.dtype(str(dtype).rpartition(".")[2].rstrip("_"))
    return mx.array(np.frombuffer(data, kind).reshape(shape))
