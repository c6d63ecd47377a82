"""Where the time of a decoded token goes on this CPU: the steps of the native decoder, waiting, MLX and Python.

    python benchmarks/cpu_decode_profile.py [--save] [--depths 16 512 2048] [--modes exact int8] [--neighbours 0 2]
    python benchmarks/cpu_decode_profile.py --report [FILE]

The native kernels note when each thread came to a step, had no more work and went on. Of each kind of step the table
has the time that it takes in a token, from the end of the step before to its own end, and which share of that its
threads worked. The rest of the token, outside the native pass, is sampling, MLX and Python. "GB/s" are the bytes of all
weights that a token reads by its time; the read bandwidth is measured between the arms, and the best of all counts.
Medians of all tokens.

Neighbours are processes that count, one for each core.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

import saving
from mlxeff import hub, kernels
from mlxeff.assembly.model import load_path
from mlxeff.bench.tables import card_lines, table
from mlxeff.decode import Step, decode, prefill
from mlxeff.models.decoder import DecoderModel
from mlxeff.running import RunOptions
from mlxeff.sampling import make_sampler
from mlxeff.speculation.drafters import weight_bytes
from peers import card
from peers.measure import compile_bandwidth

SECTION = "cpu-decode-profile"  # of RESULTS.md
BEFORE, AFTER = ("embedding", "angles"), ("norm", "head")  # steps of a pass
LAYER = ("norm", "q k v", "rope, append", "attention", "round", "o", "norm", "gate up", "activation", "down")
ABOUT = ("neighbours", "depth", "threads", "mode")
WARM_UP, NOTED = 8, 400_000  # tokens; steps of threads


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """As many processes that count while it is on."""
    command = [sys.executable, "-c", "n = 0\nwhile True: n += 1"]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def passes(notes: list[tuple]) -> Iterator[dict[int, list[tuple]]]:
    """The notes of each pass: step → the notes of its threads."""
    found: dict[object, dict[int, list[tuple]]] = {}
    alone = 0
    for note in sorted(notes, key=lambda note: note[3]):
        region, step = note[:2]
        alone += region == 0 and step == 0
        found.setdefault(region or -alone, defaultdict(list))[step].append(note)
    yield from found.values()


def names(steps: int, layers: int) -> list[str]:
    """What each step of a pass is. Attention has several steps where the others leave more than one a layer."""
    inner = (steps - len(BEFORE) - len(AFTER)) // layers
    more = inner - len(LAYER)
    place = LAYER.index("attention")
    layer = [*LAYER[:place], *["attention"] * (1 + more), *LAYER[place + 1 :]]
    return [*BEFORE, *layer * layers, *AFTER]


def spent(steps: dict[int, list[tuple]], layers: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """(Seconds of a pass, kind of step → (seconds, seconds of work of all threads))."""
    ends = {step: max(note[4] for note in each) for step, each in steps.items()}  # 0 of who found no work
    began = last = min(note[3] for note in steps[0])
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step, name in enumerate(names(len(steps), layers)):
        worked = sum(max(0, note[4] - max(note[3], last)) for note in steps[step] if note[4])
        kinds[name][0] += (ends[step] - last) / 1e9
        kinds[name][1] += worked / 1e9
        last = ends[step]
    return (last - began) / 1e9, {name: tuple(times) for name, times in kinds.items()}


def answer(model: DecoderModel, depth: int, mode: str) -> Iterator[Step]:
    """The greedy steps after a prompt of `depth` tokens, as in `mlxeff generate`."""
    options = RunOptions(compute=mode)
    cache, ids = model.new_cache(), mx.array([1000 + place % 5000 for place in range(depth)])
    return decode(model, cache, prefill(model, cache, ids, 512, options=options), make_sampler(), options=options)


def profile(model: DecoderModel, depth: int, threads: int, modes: Sequence[str], tokens: int) -> dict[str, dict]:
    """Mode → the medians of `tokens` tokens after a prompt of `depth`. The modes take turns token by token, so that a
    noisy phase of the machine is one for all of them."""
    native, _ = kernels.native()
    native.set_num_threads(threads)
    answers = {mode: answer(model, depth, mode) for mode in modes}
    for steps in answers.values():
        for _ in range(WARM_UP):
            next(steps)
    order = [mode for number in range(tokens) for mode in (modes if number % 2 else modes[::-1])]
    times = defaultdict(list)
    native.note_step_times(NOTED)
    for mode in order:
        began = time.perf_counter()
        next(answers[mode])
        times[mode].append(time.perf_counter() - began)
    notes = native.step_times()
    native.note_step_times(0)
    found = defaultdict(list)
    for mode, steps in zip(order, passes(notes), strict=True):
        found[mode].append(spent(steps, len(model.layers)))
    return {mode: medians(times[mode], found[mode], threads) for mode in modes}


def medians(times: Sequence[float], found: Sequence[tuple], threads: int) -> dict:
    """The part of a row that was measured, from the seconds of each token and what `spent` found of each."""
    whole, inside = statistics.median(times), statistics.median(each for each, _ in found)
    kinds = {}
    for name in found[0][1]:
        seconds, worked = (statistics.median(each[name][part] for _, each in found) for part in (0, 1))
        kinds[name] = {"ms": 1e3 * seconds, "worked": worked / seconds / threads}
    return {"ms": 1e3 * whole, "outside_ms": 1e3 * (whole - inside), "steps": kinds}


def bandwidth(program: str | None, threads: int) -> float | None:
    """GB/s of the memory."""
    if program is None:
        return None
    return float(subprocess.run([program, "256", str(threads), "5"], capture_output=True, text=True).stdout.split()[0])


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each arm."""
    model, rows = load_path(hub.resolve(options.model)).model, []
    with tempfile.TemporaryDirectory() as folder:
        program = compile_bandwidth(Path(folder))
        for busy in options.neighbours:
            for depth, threads in itertools.product(options.depths, options.threads):
                read = bandwidth(program, threads) if not busy else None
                with neighbours(busy):
                    found = profile(model, depth, threads, options.modes, options.tokens)
                for mode, row in found.items():
                    about = {"neighbours": busy, "depth": depth, "threads": threads, "mode": mode}
                    rows.append(about | {"bytes": weight_bytes(model), "bandwidth": read} | row)
                    print(f"{about}: {row['ms']:.2f} ms", file=sys.stderr)
    return rows


def text(document: dict) -> str:
    """The section of RESULTS.md."""
    own, rows = document["card"], document["rows"]
    header = [*ABOUT, "ms a token", "outside", "GB/s", "of the bandwidth"]
    kinds = list(rows[0]["steps"])
    lines, parts = [], []
    most = {row["threads"]: 0.0 for row in rows}
    for row in rows:
        most[row["threads"]] = max(most[row["threads"]], row["bandwidth"] or 0)
    for row in rows:
        about = [str(row[key]) for key in ABOUT]
        speed = row["bytes"] / row["ms"] / 1e6
        share = f"{speed / most[row['threads']]:.0%}" if row["bandwidth"] else ""
        lines.append([*about, f"{row['ms']:.2f}", f"{row['outside_ms']:.2f}", f"{speed:.1f}", share])
        each = (row["steps"][kind] for kind in kinds)
        parts.append([*about, *(f"{step['ms']:.2f} ({step['worked']:.0%})" for step in each)])
    read = ", ".join(f"{speed:.1f} GB/s on {threads}" for threads, speed in most.items())
    title = f"{own['cpu']}, {own['cores']} cores, MLX {own['mlx']}: `{own['command']}`."
    steps = "Milliseconds of a token in each kind of step (share of it that the threads worked):"
    return "\n\n".join(
        [title, f"Read bandwidth by threads: {read}.", table(header, lines), steps, table([*header[:4], *kinds], parts)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--depths", type=int, nargs="+", default=(16, 512, 2048))
    parser.add_argument("--modes", nargs="+", choices=("exact", "int8"), default=["exact", "int8"])
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--neighbours", type=int, nargs="+", default=(0, 2), help="processes that count")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--save", action="store_true", help=f"write results/<processor>-{SECTION}.json")
    saving.add_report(parser)
    options = parser.parse_args()
    path = saving.result_path(card.machine()["cpu"], f"{SECTION}.json")
    if options.report is not None:
        saving.write_report(SECTION, Path(options.report or path).resolve(), text)
        return
    kernels.use_device("cpu")
    document = {"card": card.identity() | {"command": saving.command()}, "rows": measure(options)}
    print(card_lines(document["card"]), text(document), sep="\n\n")
    if options.save:
        saving.write_json(document, path)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
