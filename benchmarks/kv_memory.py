"""Memory of the kinds of KV cache on this CPU, and the time of attention to them.

    python benchmarks/kv_memory.py [--save] [--prompt 8192] [--lengths 16384 32768] [--kinds float16 int8] [--rounds 9]
    python benchmarks/kv_memory.py --report [FILE]

prompt      the built-in model reads the beginning of `data/jargon-validation.txt`, at most 8 tokens less than its
            context
shape       a cache of Llama 3.2 1B's shape takes normally distributed keys and values, 512 tokens at a time. The model
            has the heads and layers of that one, and is 64 numbers wide
attention   what a pass of this small model over 1 or 5 tokens takes longer after so many cached tokens than after 16.
            It reads the caches of all layers, so that none comes from the CPU's own caches. The kinds take turns

Each memory is that of a process of its own, above what was resident once the weights had been read. "peak" is the most,
or that of the whole process where the system does not forget an earlier one. "stays" is what is resident afterwards,
without freed buffers. "cache" is what the cache says; `k8v4` and `int4` have the lower planes of all that was appended
last, up to the next token. "formula" has the bytes of a number of docs/quantspec.md: the lower planes of the newest
tokens and unused capacity are left out. GB/s are bytes of the formula, and their share is that of the read bandwidth,
measured just before in the same process by numpy's dot product on as many threads.
"""

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np

import saving
from kv_cache import KINDS, STEP_SIZE
from mlxeff import hub, kernels
from mlxeff.assembly.model import build_model, load_path
from mlxeff.bench.machine import cores
from mlxeff.bench.samples import median_of
from mlxeff.bench.tables import card_lines, table
from mlxeff.cache import FLOAT_KINDS, KVCache
from mlxeff.decode import prefill
from mlxeff.models.decoder import DecoderModel
from mlxeff.quantspec.cache import PARTS, WHOLE
from mlxeff.quantspec.planes import SCALE_BYTES, TILE
from mlxeff.running import DRAFT_VIEW, FULL_VIEW, RunOptions
from peers import card, worker
from peers.measure import READ_MIB, environment, last_line, reason
from places import TEXT

SECTION = "kv-memory"  # of RESULTS.md
SHAPE = "Llama 3.2 1B's shape"
SPARE = 8  # tokens of the context that stay free
PIECE = 512  # tokens that are appended at once
SHORT = 16  # tokens: those read before a memory is measured, and those cached in the pass that is subtracted
QUERIES = (1, 5)  # tokens of a pass: decoding, and the verification of four drafted ones
STEPS = 3  # passes of a round
PAGES, FORGET = Path("/proc/self/statm"), Path("/proc/self/clear_refs")  # of Linux
CONFIG = {  # heads and layers are Llama 3.2 1B's, all else is small
    "model_type": "llama", "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip


def number_bytes(kind: str, size: int, view: str = FULL_VIEW) -> float:
    """Bytes of a number of keys and values as they are read in this view, scales included, with heads of `size`."""
    if kind in FLOAT_KINDS:
        return FLOAT_KINDS[kind].size
    lower = 0 if view == DRAFT_VIEW else len(WHOLE[kind])
    return (1 + lower / len(PARTS)) / 2 + SCALE_BYTES / (2 * TILE * size)


def formula(cache: KVCache, view: str = FULL_VIEW) -> float:
    """Bytes of a number times numbers."""
    layers = zip(cache.layers, cache.shapes, strict=True)
    of_token = (2 * s.groups * s.head_size * number_bytes(layer.stored_as, s.head_size, view) for layer, s in layers)
    return cache.length * sum(of_token)


def resident() -> tuple[int, int]:
    """(Bytes of this process that are resident, that were at most); elsewhere than on Linux both are the second."""
    most = int(worker.peak_rss() * 2**20)
    return int(PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if PAGES.exists() else most, most


def give_back() -> None:
    """Return freed memory to the system: MLX's buffers, and that of the C library where it is GNU's."""
    mx.clear_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def grown(cache: KVCache, work: Callable[[], object]) -> dict:
    """The sample of a memory: bytes by which this process grows by `work`, which fills the cache."""
    give_back()
    before = resident()[0]
    with contextlib.suppress(OSError):
        FORGET.write_text("5")
    busy, began = os.getloadavg()[0], time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - began, resident()[1] - before
    give_back()
    found = {"peak": peak, "stays": resident()[0] - before, "cache": cache.nbytes, "formula": formula(cache)}
    return {"kind": cache.kind, "tokens": cache.length, **found, "seconds": seconds, "load_average": busy}


def prompt(job: dict) -> dict:
    """What reading a prompt takes."""
    loaded = load_path(Path(job["path"]))
    model, written = loaded.model, TEXT.read_text(encoding="utf-8")
    ids = loaded.tokenizer.encode(written, add_special_tokens=False)[: min(job["tokens"], model.context_length - SPARE)]
    first, cache = (model.new_cache(job["kind"]) for _ in range(2))
    mx.eval(prefill(model, first, mx.array(ids[:SHORT]), STEP_SIZE))
    return grown(cache, lambda: mx.eval(prefill(model, cache, mx.array(ids), STEP_SIZE)))


def shaped() -> DecoderModel:
    """The small model of a large model's heads and layers."""
    kernels.bound_buffer_cache()
    model = build_model(CONFIG).eval()
    mx.eval(model.parameters())
    model.use_native()
    return model


def fill(model: DecoderModel, cache: KVCache, tokens: int) -> KVCache:
    """The cache, with so many tokens of random keys and values."""
    rng, (heads, size) = np.random.default_rng(0), model.kv_shapes[0]
    cache.reserve(tokens)
    for start in range(0, tokens, PIECE):
        shape = (2, 1, heads, min(PIECE, tokens - start), size)
        keys, values = map(mx.array, rng.standard_normal(shape, dtype=np.float32))
        model.append_kv([(keys, values)] * len(model.layers), cache)
        mx.eval(cache.arrays())
    return cache


def shape(job: dict) -> dict:
    """What a cache of the shape takes."""
    model = shaped()
    cache = model.new_cache(job["kind"])
    fill(model, model.new_cache(job["kind"]), SHORT)
    return grown(cache, lambda: fill(model, cache, job["tokens"]))


def passes(model: DecoderModel, cache: KVCache, queries: int, options: RunOptions) -> list[float]:
    """Milliseconds of passes over so many tokens, which are dropped again."""
    length, tokens, times = cache.length, mx.zeros((1, queries), mx.int32), []
    for _ in range(STEPS):
        began = time.perf_counter()
        mx.eval(model.last_logits(tokens, cache, options))
        times.append(1e3 * (time.perf_counter() - began))
        cache.rewind(length)
    return times


def attention(job: dict) -> list[dict]:
    """The samples: milliseconds of passes after many cached tokens and after few ones."""
    read = worker.read({"mib": READ_MIB, "threads": job["threads"]})["gbps"]
    model, samples, lengths = shaped(), [], (job["tokens"], SHORT)
    pairs = {kind: [fill(model, model.new_cache(kind), length) for length in lengths] for kind in job["kinds"]}
    arms = [*((kind, FULL_VIEW) for kind in pairs), *((kind, DRAFT_VIEW) for kind in pairs if kind == "int8")]
    for number, queries, (kind, view) in product(range(-1, job["rounds"]), QUERIES, arms):  # round -1 warms up
        about = {"kind": kind, "view": view, "tokens": job["tokens"], "queries": queries, "round": number}
        about |= {"gbps": read, "formula": formula(pairs[kind][0], view), "load_average": os.getloadavg()[0]}
        ms, short_ms = (passes(model, cache, queries, RunOptions(view=view)) for cache in pairs[kind])
        samples.append(about | {"ms": ms, "short_ms": short_ms})
    return [sample for sample in samples if sample["round"] >= 0]


TASKS = {"prompt": prompt, "shape": shape, "attention": attention}


def measured(options: argparse.Namespace) -> dict:
    """The document without its card: the samples of each task, measured in processes of this script."""
    path, variables = hub.resolve(options.model).resolve(), environment(options.threads)
    jobs = [{"task": "prompt", "kind": kind, "tokens": options.prompt, "path": str(path)} for kind in options.kinds]
    jobs += [{"task": "shape", "kind": k, "tokens": length} for length in options.lengths for k in options.kinds]
    common = {"kinds": options.kinds, "rounds": options.rounds, "threads": options.threads}
    jobs += [{"task": "attention", "tokens": length} | common for length in options.lengths]
    found = {task: [] for task in TASKS}
    for job in jobs:
        print(f"{job['task']}, {job['tokens']} tokens {job.get('kind', '')}", file=sys.stderr)
        try:
            samples = json.loads(last_line([sys.executable, __file__, "--job", json.dumps(job)], variables, None))
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"kv_memory: {job['task']}: {reason(error)}") from error
        found[job["task"]] += samples if isinstance(samples, list) else [samples]
    return found


def text(document: dict) -> str:
    """The tables, in Markdown."""
    parts = memory("a prompt of the built-in model", document["prompt"]), memory(SHAPE, document["shape"])
    return "\n\n".join([*parts, times(document["attention"])])


def memory(title: str, samples: list[dict]) -> str:
    """Bytes, and peak and growth beside float16's."""
    rows, base = [], {sample["tokens"]: sample for sample in samples if sample["kind"] == "float16"}
    for sample in samples:
        cells = [sample["kind"], str(sample["tokens"])]
        for name in ("peak", "stays"):
            theirs = base.get(sample["tokens"], {}).get(name)
            cells += [f"{sample[name] / 1e6:.1f}", f"{sample[name] / theirs:.2f}" if theirs else ""]
        rows.append([*cells, *(f"{sample[name] / 1e6:.1f}" for name in ("cache", "formula"))])
    header = ["tokens", "peak, MB", "of float16's", "stays, MB", "of float16's", "cache, MB", "formula, MB"]
    return table([title, *header], rows)


def times(samples: list[dict]) -> str:
    """Milliseconds of attention in all layers, and what was read meanwhile."""
    rows, found, names = [], {}, ("tokens", "queries", "kind", "view")
    for key in dict.fromkeys(tuple(sample[name] for name in names) for sample in samples):
        fields = dict(zip(names, key, strict=True))
        whole, short, read, gbps = (median_of(samples, n, **fields) for n in ("ms", "short_ms", "formula", "gbps"))
        found[key] = whole - short, read / (whole - short) / 1e6, read, gbps
    for (tokens, queries, kind, view), (ms, rate, read, gbps) in found.items():
        base = found.get((tokens, queries, "float16", FULL_VIEW))
        cells = [f"{ms:.1f}", f"{ms / base[0]:.2f}" if base else "", f"{read / 1e6:.1f}", f"{rate:.1f}"]
        name = f"{kind}, draft" if view == DRAFT_VIEW else kind
        rows.append([name, str(tokens), str(queries), *cells, f"{rate / gbps:.0%}"])
    header = [f"attention, {SHAPE}", "tokens", "queries", "ms", "of float16's", "read, MB", "GB/s", "of the bandwidth"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens; default %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768], help="cached tokens of the shape")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--save", action="store_true", help=f"write results/<processor>-{SECTION}.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # of a process that this script starts
    saving.add_report(parser)
    options = parser.parse_args()
    if options.job:
        kernels.use_device("cpu")
        print(json.dumps(TASKS[options.job["task"]](options.job)))
        return
    path = saving.result_path(card.machine()["cpu"], f"{SECTION}.json")
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or path), text)
        return
    native, why = kernels.native()
    about = {"command": saving.command(), "threads": options.threads, "native": native.isa() if native else why}
    document = {"card": card.identity() | about} | measured(options)
    print(card_lines(document["card"]), text(document), sep="\n\n")
    if options.save:
        saving.write_json(document, path)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
