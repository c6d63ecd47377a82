"""Predicted speed of the SeedLM Metal kernels, from their instruction counts: the share of memory bandwidth that one
token's products reach, and the time that the encoder needs.

    python benchmarks/metal_seedlm_prediction.py [--rows 4] [--save]

Nothing is measured on a GPU: every number is PREDICTED. The loop body of metal/seedlm.metal (`add_block`) is compiled
by clang -O2 with the headers of tests/metal_on_cpu, fully unrolled and inlined, and the LLVM instructions of its
straight line are counted; Metal's compiler is an LLVM too. Compiling it for one and for two rows separates what a row's
block costs from what all rows share.

The model, after measurements of the M1 and M2 by others (philipturner/metal-benchmarks on GitHub):
- one issue slot for a float32 add, multiply or fused multiply-add, an integer add, AND, OR, XOR, compare or select, and
  a load;
- a shift, a conversion and an integer multiplication take 4 cycles of another pipe and 2 issue slots;
- negations, casts between integer sizes and the address of base[index] are free.
M1, M2: cycles = max(slots, 4 x slow ones). M3, M4 issue float and integer work at once (their exact rules are not
published): cycles = max(float slots, other slots, 4 x slow ones). Bank conflicts of the table look-ups, latency, the
start of a threadgroup and the reduction at a row's end are not in the model: shares are upper bounds. Bandwidth counts
the stored blocks alone.

The encoder (metal/seedlm_encode.metal): its scan is the straight line `scan_step` for 4 blocks. To it come the entries
that a threadgroup copies (12 instructions each), the classes that are visited again and the seeds that are evaluated,
whose numbers a block are taken from random Gaussian blocks; an evaluation counts all 2 x 3^P neighbours, although it
leaves out most. What the host does between the launches is not in the model, nor is the feedback of the
activation-aware method, which NumPy computes on the CPU.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

import saving
from mlxeff.bench.machine import first_line
from mlxeff.bench.tables import table
from mlxeff.seedlm import search
from mlxeff.seedlm.format import FORMATS as BLOCK_FORMATS
from places import ROOT, TESTS

HARNESS = TESTS / "metal_on_cpu"
WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # of SmolLM2-135M's linear layers

# TFLOPS (2 x lanes x GHz) and GB/s. M1, M2: measured by metal-benchmarks; M3, M4: published clocks and core counts.
CHIPS = {
    "M1": (2.62, 68),
    "M1 Pro": (5.31, 200),
    "M1 Max": (10.62, 400),
    "M2": (3.58, 100),
    "M2 Pro": (6.80, 200),
    "M2 Max": (13.60, 400),
    "M3 Pro": (6.44, 150),
    "M3 Max": (14.32, 400),
    "M4": (3.76, 120),
    "M4 Max": (17.2, 546),
}
# Format → (store type for the host compiler, columns, states, bytes a block).
FORMATS = {
    "4": ("Packed<const uint*>", 8, 3, 4.0),
    "4.5": ("Planar<8, 4, uint, const ushort*, const ushort*, const uchar*>", 8, 4, 4.5),
    "3": ("Planar<12, 4, uint2, const ushort*, const ushort*, const uchar*>", 12, 4, 4.5),
}
FORMS = {"AND only": "Windows", "shifts": "Shifts"}
PROBE = """
using Store = {store};
extern "C" void probe(Store store, const float* vectors, int bias, uint block, uint cols, const uint* starts,
                      const Store::Entry* tables, float* sums) {{
  if (block * Store::C + Store::C > cols) __builtin_unreachable();
  add_block<{form}<Store::C, Store::P>, {rows}>(store, vectors, bias, block, cols, starts, tables, sums);
}}
"""
ENCODER_PROBES = {
    "scan": """
extern "C" void probe(const float* states, const float* entries, uint k, const float* hw, float* d, float* largest) {{
  if (k >= 64 - {P}) __builtin_unreachable();
  scan_step<{C}, {P}, together>(states, entries, k, hw, reinterpret_cast<float(*)[{P}]>(d), largest);
}}""",
    "visit": """
extern "C" float probe(const Search<{C}, {P}, const ulong*, const float*, const float*>& search, uint index) {{
  return search.energy(index);
}}""",
    "solve": """
extern "C" float probe(const Problem<{C}>& block, ulong word, const Rounded<{P}>& rounded, Fit<{P}>& fit) {{
  return solve<{C}, {P}>(block, word, fit) ? error_of<{C}, {P}>(block, word, rounded) : 0;
}}""",
    "evaluate": """
extern "C" void probe(const Problem<{C}>& block, ulong word, Best<{P}>& best) {{
  evaluate<{C}, {P}>(block, word, best);
}}""",
}
KINDS = {
    "float": ("fadd", "fsub", "fmul", "llvm.fma", "fcmp", "llvm.maxnum", "llvm.minnum", "llvm.rint", "llvm.nearbyint"),
    "integer": ("and", "or", "xor", "add", "sub", "icmp", "select", "llvm.umin", "llvm.umax", "llvm.smin", "llvm.smax"),
    "slow": ("shl", "lshr", "ashr", "mul", "sitofp", "uitofp", "fptosi"),
    "load": ("load",),
    "store": ("store",),
    "free": ("fneg", "zext", "sext", "trunc", "bitcast", "getelementptr", "llvm.assume", "ret", "llvm.fabs", "phi"),
    "branch": ("br", "switch"),
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}
FUNNEL = {"slow": 2, "integer": 1}  # llvm.fshl of two words: two shifts and an OR
DIVISION = {"float": 8, "slow": 1}  # a reciprocal and the steps to a correctly rounded quotient: assumed
COPY = 12  # instructions of an entry that a threadgroup copies
TOGETHER, BLOCKS_A_GROUP, LANES = 4, 32, 32  # blocks scanned at once, blocks of a threadgroup, lanes of a simdgroup


def find_clang():
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 13, -1))]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        sys.exit("metal_seedlm_prediction: wanted clang++ 14 or newer (Debian: apt install clang), found none")
    return found


def count(clang, fmt, form, rows):
    """Instructions by kind of the loop body for `rows` rows."""
    probe = PROBE.format(store=FORMATS[fmt][0], form=FORMS[form], rows=rows)
    return count_ir(compile_probe(clang, "seedlm", probe), straight=True)


def compile_probe(clang, family, probe):
    """LLVM's text form of the function `probe`, compiled with the source of a kernel family."""
    source = re.sub(r"//[^\n]*", "", (ROOT / f"metal/{family}.metal").read_text(encoding="utf-8")) + probe
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        flags = ["-std=c++17", "-w", "-O2", "-fno-vectorize", "-fno-slp-vectorize", "-ffp-contract=off"]
        command = [clang, *flags, "-mllvm", "-inline-threshold=1000000", f"-I{HARNESS}", "-include", "metal.h"]
        command += ["-S", "-emit-llvm", str(path), "-o", "-"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"metal_seedlm_prediction: {done.stderr[:2000]}")
    return re.search(r"^define [^\n]*@probe\(.*?^}", done.stdout, re.MULTILINE | re.DOTALL).group(0)


def count_ir(text, straight):
    """Instructions by kind of one function in LLVM's text form, which must be a straight line if `straight`."""
    kinds = Counter()
    for line in text.splitlines()[1:-1]:
        operation = re.match(r"\s+(?:%\S+ = )?(?:(?:tail )?call .*?@([\w.]+)|(\w+))", line)
        if operation is None or operation.group(2) in ("br", "phi", "switch"):
            if straight:
                sys.exit(f"metal_seedlm_prediction: not a straight line: {line!r}")
            if operation is None:
                continue
        name = operation.group(2) or re.sub(r"\.[fi]\d+$", "", operation.group(1))
        if name in ("llvm.fshl", "llvm.fshr"):
            kinds.update(FUNNEL)
        elif name == "fdiv":
            kinds.update(DIVISION)
        elif name in KIND:
            kinds[KIND[name]] += 1
        elif not name.startswith("llvm."):  # memset, lifetimes: variables that are registers on a GPU
            sys.exit(f"metal_seedlm_prediction: an instruction that is in no table: {line!r}")
    return kinds


def per_weight(clang, fmt, form, rows):
    """Instructions by kind for one weight, where `rows` rows share the preparation of x."""
    one, two = (count(clang, fmt, form, n) for n in (1, 2))
    row = Counter({kind: two[kind] - one[kind] for kind in KINDS})
    shared = Counter({kind: one[kind] - row[kind] for kind in KINDS})
    row["load"] -= 2  # the row's sum and the index of its first block are in registers
    columns = FORMATS[fmt][1]
    return {kind: (shared[kind] / rows + row[kind]) / columns for kind in ("float", "integer", "slow", "load")}


def cycles(counts, chip):
    """Cycles of one lane for one weight."""
    other = counts["integer"] + counts["load"] + 2 * counts["slow"]
    parallel = chip.startswith(("M3", "M4"))
    issued = max(counts["float"], other) if parallel else counts["float"] + other
    return max(issued, 4 * counts["slow"])


def predict(counts, fmt, chip):
    """PREDICTED cycles, budget (cycles a weight at full bandwidth), share of bandwidth, weights a second."""
    tflops, bandwidth = CHIPS[chip]
    bits = 8 * FORMATS[fmt][3] / FORMATS[fmt][1]
    budget = tflops * 1e12 / 2 / (bandwidth * 1e9 * 8 / bits)
    used = cycles(counts, chip)
    share = min(1.0, budget / used)
    return {
        "chip": chip,
        "predicted_cycles_per_weight": round(used, 2),
        "budget_cycles_per_weight": round(budget, 2),
        "predicted_share_of_bandwidth": round(share, 3),
        "predicted_gb_per_s": round(share * bandwidth, 1),
        "predicted_gweights_per_s": round(share * bandwidth * 8 / bits, 1),
    }


# ---- The encoder ----------------------------------------------------------------------------------------------------


def survivors(fmt, blocks=64):
    """Means a block of Gaussian weights: classes visited again, batches of 32 evaluations, seeds evaluated."""
    weight = np.random.default_rng(0).standard_normal((blocks // 2, 2 * fmt.columns)).astype(np.float32)
    problem = search.problem(fmt, weight, None, -2)
    states, inverse = search._tables(fmt, problem.metric.tobytes())
    energy = np.zeros((blocks, search.SEEDS + 1), np.float32)
    energy[:, :-1] = search._energies(states, inverse, problem.metric * problem.scaled)
    best = search.Best.zeros(fmt, problem)
    norm = best.error.copy()
    first = energy.argmax(1)
    search._evaluate(fmt, problem, np.arange(blocks), search.cycle()[first].astype(np.int64), True, best)
    over = energy > ((1 - search.SLACK) * norm - best.error)[:, None]
    seeds = over.sum(1)
    return over.reshape(blocks, -1, 64).any(2).sum(1).mean(), (1 + np.ceil(seeds / LANES)).mean(), seeds.mean()


def encoder_counts(clang, name):
    """Instructions by kind: of the scan for a block and seed, of a visited class and of an evaluation for a lane."""
    C, P = BLOCK_FORMATS[name].columns, BLOCK_FORMATS[name].states
    found = {}
    for part, probe in ENCODER_PROBES.items():
        text = compile_probe(clang, "seedlm_encode", probe.format(C=C, P=P))
        found[part] = count_ir(text, straight=part in ("scan", "visit"))
    entries = P * (P + 1) // 2
    scan = found["scan"]
    scan["load"] = C + entries  # the others are of registers
    scan["integer"] += COPY * entries * TOGETHER / BLOCKS_A_GROUP
    scan = {kind: scan[kind] / TOGETHER for kind in ("float", "integer", "slow", "load")}
    node = {kind: (found["evaluate"][kind] - found["solve"][kind]) / (2 * P) for kind in KINDS}
    nodes = 2 * sum(3 ** (level + 1) for level in range(P))
    evaluation = {kind: found["solve"][kind] + nodes * max(0, node[kind]) for kind in ("float", "integer", "slow")}
    evaluation["load"] = 1
    visit = {kind: 2 * found["visit"][kind] for kind in ("float", "integer", "slow", "load")}  # two seeds a lane
    return scan, visit, evaluation


def predict_encoder(clang, name):
    """One sample: counts, and PREDICTED seconds for the linear layers of SmolLM2-135M."""
    fmt = BLOCK_FORMATS[name]
    scan, visit, evaluation = encoder_counts(clang, name)
    visits, batches, seeds = survivors(fmt)
    blocks, predicted = WEIGHTS / fmt.columns, []
    for chip, (tflops, bandwidth) in CHIPS.items():
        scanned = (search.SEEDS + 1) * cycles(scan, chip)
        chosen = LANES * (visits * cycles(visit, chip) + batches * cycles(evaluation, chip))
        seconds = blocks * (scanned + chosen) / (tflops * 1e12 / 2)
        seconds = max(seconds, blocks * 2 * 4096 / (bandwidth * 1e9))  # the maxima, written and read
        predicted.append(
            {
                "chip": chip,
                "predicted_seconds": round(seconds, 1),
                "predicted_mweights_per_s": round(WEIGHTS / seconds / 1e6, 2),
                "share_of_the_scan": round(scanned / (scanned + chosen), 2),
            }
        )
    return {
        "format": name,
        "weights": WEIGHTS,
        "mflop_a_block": round((search.SEEDS + 1) * 2 * scan["float"] / 1e6, 2),
        "kib_a_block": {
            "maxima": 8,
            f"tables, of {BLOCKS_A_GROUP} blocks": round(
                4 * 64 * (1 + fmt.states * (fmt.states + 1) / 2) / BLOCKS_A_GROUP
            ),
        },
        "scan_instructions": {kind: round(value, 2) for kind, value in scan.items()},
        "evaluation_instructions": {kind: round(value) for kind, value in evaluation.items()},
        "visited_classes": round(float(visits), 1),
        "evaluated_seeds": round(float(seeds), 1),
        "evaluation_batches": round(float(batches), 2),
        "predicted": predicted,
    }


def print_encoder(samples):
    header = ["format", "MFLOP a block", "classes visited", "seeds evaluated"]
    keys = ("format", "mflop_a_block", "visited_classes", "evaluated_seeds")
    print(f"The encoder\n\n{table(header, [[str(s[key]) for key in keys] for s in samples])}")
    rows = [[s["format"], *(f"{p['predicted_seconds']:.0f}" for p in s["predicted"])] for s in samples]
    print(f"\nPREDICTED seconds for SmolLM2-135M, data-free\n\n{table(['format', *CHIPS], rows)}\n")


# ---- The report -----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="rows a simdgroup computes, which share the work on x")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    clang = find_clang()
    results = {
        "card": {
            "command": saving.command(),
            "kind": "predicted: counted instructions and published chip figures, nothing ran on a GPU",
            "compiler": first_line([clang, "--version"]),
            "host": f"{platform.system()} {platform.machine()}",
            "rows": options.rows,
        },
        "samples": [],
    }
    for fmt in FORMATS:
        for form in FORMS:
            counts = per_weight(clang, fmt, form, options.rows)
            sample = {"format": fmt, "form": form, "bytes_per_block": FORMATS[fmt][3], "columns": FORMATS[fmt][1]}
            sample["instructions_per_weight"] = {kind: round(value, 3) for kind, value in counts.items()}
            sample["predicted"] = [predict(counts, fmt, chip) for chip in CHIPS]
            results["samples"].append(sample)
    results["encoder"] = [predict_encoder(clang, name) for name in FORMATS]
    print_tables(results)
    print_encoder(results["encoder"])
    if options.save:
        saving.write_json(results, saving.result_path("predicted-M1-to-M4", "metal-seedlm.json"))
    print(json.dumps(results))


def print_tables(results):
    card = results["card"]
    print(f"{card['kind']}\n{card['compiler']}, {card['rows']} rows share the work on x\n")
    counted, shares = [], []
    for sample in results["samples"]:
        name = [sample["format"], sample["form"]]
        counts = (f"{value:.2f}" for value in sample["instructions_per_weight"].values())
        counted.append([*name, str(sample["bytes_per_block"]), *counts])
        predicted = ((p["predicted_share_of_bandwidth"], p["predicted_gweights_per_s"]) for p in sample["predicted"])
        shares.append([*name, *(f"{share:.0%} ({rate:.0f})" for share, rate in predicted)])
    header = ["format", "form", "bytes a block", "float", "integer", "slow", "loads"]
    print(f"Instructions a weight, counted\n\n{table(header, counted)}\n")
    print(f"PREDICTED share of bandwidth (PREDICTED Gweights/s)\n\n{table(['format', 'form', *CHIPS], shares)}\n")


if __name__ == "__main__":
    main()
