"""Microbenchmark of the native attention kernels: GB/s of keys and values read for decode and for the verification of a
draft, GFLOPS for prefill.

    python benchmarks/cpu_attention.py [--isa avx2] [--quick]

Decode processes one token, verification eight. Both cycle through several caches of more than 256 MB in total, so that
keys and values are read from memory (or from a larger shared last-level cache). The operations of prefill are counted
for the causal half, 4 E S (S + 1) / 2 per query head; those of the backward pass with 14 E in place of 4 E, since it
recomputes the scores twice. Times are medians: process CPU time with one thread, wall time with two.
"""

import argparse
import os
import sys
import time

import numpy as np

from places import TESTS

sys.path.insert(0, str(TESTS))
from cpu_calls import attention, attention_args, attention_backward
from cpu_library import set_threads
from kernel_timing import add_isa, median_time, use_isa

SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64)}


def median_us(call, threads: int, budget: float) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    return 1e6 * median_time(lambda _: call(), budget, 5, clock)


def decode(heads, groups, size, tokens, depth, threads, budget, dtype):
    rng = np.random.default_rng(0)
    cache_bytes = 2 * groups * depth * size * np.dtype(dtype).itemsize
    copies = max(1, -(-256_000_000 // cache_bytes))
    fill = rng.standard_normal((2, 1, groups, depth, size), dtype=np.float32).astype(dtype)
    caches = [fill.copy() for _ in range(copies)]
    q = rng.standard_normal((1, heads, tokens, size), dtype=np.float32)
    out = np.empty_like(q)
    calls = [attention_args(q, keys, values, out, size**-0.5) for keys, values in caches]
    inner = max(1, min(copies, 64))

    def call():
        for _i in range(inner):
            attention(calls[call.at])
            call.at = (call.at + 1) % copies

    call.at = 0
    us = median_us(call, threads, budget) / inner
    return us, cache_bytes / us / 1e3, copies


def prefill(heads, groups, size, length, threads, budget, mode, dtype):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, heads, length, size), dtype=np.float32)
    k, v = (rng.standard_normal((1, groups, length, size), dtype=np.float32).astype(dtype) for _ in range(2))
    out = np.empty_like(q)
    args = attention_args(q, k, v, out, size**-0.5, mode=mode)
    us = median_us(lambda: attention(args), threads, budget)
    return us, 4 * heads * size * length * (length + 1) / 2 / us / 1e3


def backward(heads, groups, size, length, threads, budget):
    rng = np.random.default_rng(0)
    q, dout = (rng.standard_normal((1, heads, length, size), dtype=np.float32) for _ in range(2))
    k, v = (rng.standard_normal((1, groups, length, size), dtype=np.float32) for _ in range(2))
    out, lse, dq, dk, dv = (
        np.empty_like(q),
        np.empty((1, heads, length), np.float32),
        np.empty_like(q),
        np.empty_like(k),
        np.empty_like(v),
    )
    args = attention_args(q, k, v, out, size**-0.5, lse=lse)
    attention(args)
    us = median_us(lambda: attention_backward(args, dout, dq, dk, dv), threads, budget)
    return us, 14 * heads * size * length * (length + 1) / 2 / us / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_isa(parser)
    parser.add_argument("--quick", action="store_true", help="short runs")
    options = parser.parse_args()
    budget = 0.15 if options.quick else 0.6
    print(f"isa {use_isa(options.isa)}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for threads in (1, 2):
        set_threads(threads)
        for name, (heads, groups, size) in SHAPES.items():
            for label, tokens in (("decode", 1), ("verify", 8)):
                for depth in (512, 2048, 4096):
                    us, rate, copies = decode(heads, groups, size, tokens, depth, threads, budget, np.float16)
                    print(
                        f"{threads} thread(s) {name:13} {label:7} fp16 T={depth:5} {us:9.1f} us {rate:7.1f} GB/s"
                        f" ({copies} caches)"
                    )
            for length in (512, 2048):
                for mode, label in ((0, "exact"), (1, "bf16")):
                    us, rate = prefill(heads, groups, size, length, threads, budget, mode, np.float16)
                    print(
                        f"{threads} thread(s) {name:13} prefill {label:5} S={length:5} {us:9.1f} us {rate:7.1f} GFLOPS"
                    )
            us, rate = backward(heads, groups, size, 512, threads, budget)
            print(f"{threads} thread(s) {name:13} backward fp32 S=  512 {us:9.1f} us {rate:7.1f} GFLOPS")


if __name__ == "__main__":
    main()
