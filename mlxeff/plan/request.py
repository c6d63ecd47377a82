"""A request to `mlxeff plan` and its answer: the document that `--json` prints. Everything in it is predicted.

This module prints nothing and parses no command line. What this machine is, is handed in (`here`).
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..errors import MlxeffError, notices
from . import calibrate, chips, constants, costs, formats, memory, probe, techniques
from .chips import Machine
from .costs import Bits, Engine
from .predict import STEPS, Predicted, Predictor
from .shapes import Shape, say_assumed
from .source import Described, describe

# Architectures whose shapes the tests check against the parameter counts of releases.
CHECKED = (
    "openelm llama mistral qwen2 qwen3 qwen3_moe gpt_oss gemma3_text qwen3_5_text qwen3_5_moe_text phi3 qwen3_next"
).split()
LENGTHS, DEPTHS = (128, 512, 2048, 8192), (0, 2048, 8192, 32768)
SENSITIVITIES, PARTS = (1.0, 0.8, 0.6), (0.5, 0.75)
ACCEPTANCE = 0.9  # of a drafted token, where none is given: unknown before it is measured


@dataclass(frozen=True)
class Here:
    """This machine. `card`: as a benchmark describes it; `device`: "cpu" or "gpu"; `usable`: bytes that may be used;
    `memory`: bytes of the machine; `cores`: that this process may use."""

    card: dict
    device: str
    memory: float
    usable: float
    cores: int = 1


@dataclass(frozen=True)
class Request:
    """The options of the command.

    model            a folder, config.json, GGUF file, name or hub id
    chip             a name of `chips.CHIPS`, or "this"
    cores, memory_gb of the Mac; None: the largest variant
    accelerators     whether the engine uses the neural accelerators of M5
    engine           what computes; its constants are those of Macs
    weights, caches  the ways to store them that are compared; None: all
    lengths, depths  tokens of prompts, and in the cache before decoding; None: those of LENGTHS and DEPTHS that the
                     model's context has room for
    step             prompt tokens computed at once; None: the device's default
    acceptance       of QuantSpec's drafted tokens
    sensitivities    shares of the feed-forward networks that are computed (DynaMoE)
    parts            shares of the layers that an auxiliary of KV Prediction has
    """

    model: str
    chip: str = chips.THIS
    cores: int | None = None
    memory_gb: float | None = None
    accelerators: bool = True
    engine: Engine = field(default_factory=Engine)
    weights: Sequence[str] | None = None
    caches: Sequence[str] | None = None
    lengths: Sequence[int] | None = None
    depths: Sequence[int] | None = None
    step: int | None = None
    acceptance: float = ACCEPTANCE
    sensitivities: Sequence[float] = SENSITIVITIES
    parts: Sequence[float] = PARTS
    explain: bool = False
    ignored: tuple[str, ...] = ()
    offline: bool = False


def predictor(request: Request, here: Here) -> Predictor:
    """The predictor for the machine of a request. Raises MlxeffError for one that is not known."""
    if request.chip == chips.THIS:
        return _here(request, here)
    machine = chips.machine(chips.find(request.chip), request.cores, request.memory_gb, request.accelerators)
    return Predictor(machine, request.engine, constants.fitted(request.engine.name))


def _here(request: Request, here: Here) -> Predictor:
    """This machine: calibrated, else a chip that is known, else probed. A notice says which."""
    for name in ("cores", "memory_gb"):
        if getattr(request, name) is not None and not _known(here):
            raise MlxeffError(f"--{name.partition('_')[0]}: describes a --chip, and this machine is none of them")
    machine = _unrated(here)
    found = constants.kept(calibrate.machine_key(here.card, here.device))
    if found:
        notices.info("this machine: %s", found[0].source)
        return Predictor(calibrate.with_rates(machine, found[1]), request.engine, found[0])
    if _known(here):
        chip = chips.find(here.card["cpu"])
        machine = chips.machine(chip, request.cores, here.memory / 1e9, request.accelerators)
        machine = chips.with_memory(machine, here.memory, here.usable)
        notices.info("this machine: constants of published speeds for %s; --calibrate fits its own", machine.name)
        return Predictor(machine, request.engine, constants.fitted(request.engine.name))
    bandwidth, flops = probe.probe(here.device)
    text = "this machine: probed, %.3g GB/s and %.3g GFLOP/s, which tells little; --calibrate fits its own constants"
    notices.info(text, bandwidth / 1e9, flops / 1e9)
    errors = dict.fromkeys(("prefill", "decode"), probe.ERROR)
    rates = constants.Constants(**probe.constants(), errors=errors, source="a short probe", kind="probed")
    return Predictor(replace(machine, bandwidth=bandwidth, flops=flops), request.engine, rates)


def _unrated(here: Here) -> Machine:
    """This machine, whose rates are not known yet."""
    return Machine(here.card["cpu"], 1.0, 1.0, None, here.memory, here.usable, kind=here.device)


def by_threads(here: Here, compute: str = "exact") -> dict[int, Predictor]:
    """Threads → the predictor of this machine, of those numbers of threads that it was calibrated with."""
    machine = _unrated(here)
    counts = range(1, here.cores + 1) if here.device == "cpu" else ()
    kept = {n: constants.kept(calibrate.machine_key(here.card | {"threads": n}, here.device, compute)) for n in counts}
    found = {n: each for n, each in kept.items() if each}
    return {n: Predictor(calibrate.with_rates(machine, rates), Engine(), known) for n, (known, rates) in found.items()}


def _known(here: Here) -> bool:
    """Whether this machine is a Mac whose chip is in the table, and its GPU computes."""
    try:
        return here.device == "gpu" and bool(chips.find(here.card["cpu"]))
    except MlxeffError:
        return False


def plan(request: Request, here: Here) -> dict:
    """The document of docs/json.md. Raises MlxeffError for a model, a chip or values that cannot be predicted."""
    found = predictor(request, here)  # refuses a chip before a config is fetched
    model = describe(request.model, request.ignored, request.offline)
    say_assumed(model.shape, CHECKED)
    formats.say_smaller(model.bits)
    return _document(request, model, found)


def _document(request: Request, model: Described, found: Predictor) -> dict:
    machine, shape = found.machine, model.shape
    weights = _chosen("--weights", request.weights, formats.choices(model.bits))
    kinds = _chosen("--kv-cache", request.caches or formats.KV_DEFAULT[machine.kind], formats.KV_BYTES)
    caches = {name: formats.KV_BYTES[name] for name in kinds}
    lengths, depths = _within(request.lengths, LENGTHS, shape), _within(request.depths, DEPTHS, shape)
    step = request.step or STEPS[machine.kind]
    return {
        "model": model.name,
        "kind": "predicted",
        "machine": {
            "name": machine.name,
            "device": machine.kind,
            "bandwidth_gbs": _round(machine.bandwidth / 1e9),
            "tflops": _round(machine.flops / 1e12),
            "accelerated_tflops": machine.accelerated and _round(machine.accelerated / 1e12),
            "memory_gb": _round(machine.memory / 1e9),
            "usable_gb": _round(machine.usable / 1e9),
        },
        "engine": f"{found.engine.name} {'.'.join(map(str, found.engine.version))}",
        "constants": {
            "kind": found.constants.kind,
            "source": found.constants.source,
            "prefill_error": _round(found.constants.errors["prefill"]),
            "decode_error": _round(found.constants.errors["decode"]),
        },
        "shape": {
            "model_type": shape.model_type,
            "parameters": shape.parameters,
            "active_weights": round(shape.active),
            "layers": len(shape.layers),
            "kv_numbers": shape.kv_numbers,
            "context": shape.context,
            "bits": _round(model.bits.layers),
        },
        "prefill_step": step,
        "combinations": [*_combinations(request, found, shape, step, weights, caches, lengths, depths)],
        "memory": _memory(shape, weights, caches, max(lengths), machine),
        "quantspec": [
            _quantspec(found, shape, name, bits, depth, request.acceptance)
            for name, bits in weights.items()
            for depth in depths
        ]
        if "int8" in caches
        else [],
        "layers": [_layer(shape, number, model.bits, max(depths)) for number in range(len(shape.layers))]
        if request.explain
        else None,
    }


def _chosen(option: str, names: Sequence[str] | None, known: dict) -> dict:
    """The entries of `known` that are asked for. Raises MlxeffError for another name."""
    if names is None:
        return known
    if unknown := [name for name in names if name not in known]:
        raise MlxeffError(f"{option}: wanted {', '.join(known)}, got {unknown[0]!r}")
    return {name: known[name] for name in names}


def _within(asked: Sequence[int] | None, default: Sequence[int], shape: Shape) -> list[int]:
    """The numbers of tokens to predict for. Raises MlxeffError for more than the model's context."""
    limit = shape.context
    if asked and limit and max(asked) > limit:
        raise MlxeffError(f"{max(asked)} tokens: the model's context is {limit} tokens")
    return sorted(set(asked)) if asked else [each for each in default if not limit or each <= limit] or [limit]


def _combinations(
    request: Request,
    found: Predictor,
    shape: Shape,
    step: int,
    weights: dict[str, Bits],
    caches: dict[str, float],
    lengths: Sequence[int],
    depths: Sequence[int],
) -> Iterator[dict]:
    """The combinations of techniques. What several of them share is computed once."""

    @functools.cache
    def first(name: str, share: float, count: int | None, tokens: int) -> dict:
        bits = weights[name]
        if count is None:
            seconds = found.prefill(shape, bits, tokens, step, share)
        else:
            seconds = techniques.kv_prediction(found, shape, bits, tokens, count, step, share)
        return {"tokens": tokens, **_bar(found.bar("prefill", seconds), "s")}

    @functools.cache
    def token(name: str, share: float, cache: str, drafts: bool, depth: int) -> dict:
        bits = weights[name]
        if drafts:
            seconds = techniques.quantspec(found, shape, bits, depth, request.acceptance, share).seconds
        else:
            seconds = found.decode(shape, bits, depth, caches[cache], share)
        return {"depth": depth, **_bar(found.bar("decode", seconds).inverse(), "tps")}

    longest, usable = max([*lengths, *depths]), found.machine.usable
    counts = [None, *(techniques.kept_layers(shape, part) for part in request.parts)]
    for name, cache, drafts in itertools.product(weights, caches, (False, True)):
        if drafts and cache != "int8":
            continue
        peak = memory.peak_bytes(shape, weights[name], longest, step, caches[cache], found.machine)
        draft = techniques.draft_bits(weights[name])
        if drafts and draft != weights[name]:
            peak += costs.stored_bytes(shape, draft)
        for share, count in itertools.product(request.sensitivities, counts):
            yield {
                "weights": name,
                "kv_cache": cache,
                "quantspec": drafts,
                "sensitivity": share,
                "kv_predict_layers": count,
                "fits": peak <= usable if usable else None,
                "peak_bytes": round(peak),
                "ttft": [first(name, share, count, tokens) for tokens in lengths],
                "decode": [token(name, share, cache, drafts, depth) for depth in depths],
            }


def _memory(
    shape: Shape, weights: dict[str, Bits], caches: dict[str, float], tokens: int, machine: Machine
) -> list[dict]:
    """Weights, cache and chunk of each way to store them, by the prefill step."""
    rows = []
    for name, bits in weights.items():
        for cache, number in caches.items():
            steps = {step: memory.peak_bytes(shape, bits, tokens, step, number, machine) for step in memory.CHUNKS}
            most = memory.most_context(shape, bits, STEPS[machine.kind], number, machine) if machine.usable else None
            rows.append(
                {
                    "weights": name,
                    "kv_cache": cache,
                    "weight_bytes": round(costs.stored_bytes(shape, bits)),
                    "kv_bytes_per_token": number * shape.kv_numbers,
                    "kv_bytes": round(memory.kv_bytes(shape, tokens, number)),
                    "peak_bytes_by_step": {str(step): round(value) for step, value in steps.items()},
                    "most_context": most,
                }
            )
    return rows


def _quantspec(found: Predictor, shape: Shape, name: str, bits: Bits, depth: int, acceptance: float) -> dict:
    each = techniques.quantspec(found, shape, bits, depth, acceptance)
    ends = [techniques.quantspec(found, shape, bits, depth, acceptance, doubt=doubt) for doubt in techniques.DOUBTS]
    return {
        "weights": name,
        "depth": depth,
        "acceptance": acceptance,
        "draft_tokens": each.width,
        "speedup": _round(each.speedup),
        "low": _round(ends[0].speedup),
        "high": _round(ends[1].speedup),
        "pays": ends[0].speedup > 1 if (ends[0].speedup > 1) == (ends[1].speedup > 1) else None,
        "break_even_acceptance": each.break_even and _round(each.break_even),
    }


def _layer(shape: Shape, number: int, bits: Bits, depth: int) -> dict:
    """What one token reads and computes in a layer."""
    layer = shape.layers[number]
    one = replace(shape, layers=(layer,), embedding=0, head=0)
    return {
        "layer": number,
        "window": layer.window,
        "weights": sum(m.weights for m in layer.matrices),
        "read_bytes": round(costs.weight_bytes(one, bits, True)),
        "kv_bytes_per_token": 2.0 * layer.kv_numbers,
        "product_flops": round(one.matrix_flops(1)),
        "attention_flops": layer.attention_flops(depth, depth + 1),
    }


def _bar(predicted: Predicted, unit: str) -> dict:
    return {unit: _round(predicted.value), "low": _round(predicted.low), "high": _round(predicted.high)}


def _round(value: float) -> float:
    """Four significant digits: more would be false precision."""
    return float(f"{value:.4g}")


def calibrated(request: Request, here: Here, name: str) -> dict:
    """Fit this machine's constants to the measurement in a file, keep them, and say what came out."""
    model, measured = describe(request.model, request.ignored, request.offline), calibrate.read(name)
    calibrate.check_model(measured, model.shape)
    if calibrate.machine_key(here.card, measured.device) != measured.key:
        raise MlxeffError(f"{measured.path}: measured on another machine or otherwise: {measured.key}")
    bandwidth, flops = probe.probe(measured.device)
    machine = Machine(measured.cpu, bandwidth, flops, kind=measured.device)
    found = calibrate.calibrate(measured, model.shape, model.bits, machine, request.engine)
    path = constants.keep(measured.key, found, bandwidth, flops)
    result = score_of(Predictor(machine, request.engine, found), measured, model)
    result |= {"constants": {"prefill": found.prefill, "decode": found.decode}, "kept": str(path)}
    return {"model": model.name, "calibrated": result}


def scored(request: Request, here: Here, name: str) -> dict:
    """The errors of predictions against the measurement in a file."""
    model, measured = describe(request.model, request.ignored, request.offline), calibrate.read(name)
    calibrate.check_model(measured, model.shape)
    own = replace(here, device=measured.device) if request.chip == chips.THIS else here
    return {"model": model.name, "score": score_of(predictor(request, own), measured, model)}


def score_of(found: Predictor, measured: calibrate.Measured, model: Described) -> dict:
    """The points of a measurement with their predictions, and the mean absolute errors."""
    points = calibrate.score(found, measured, model.shape, model.bits)
    return {
        "result": measured.path,
        "source": found.constants.source,
        "points": [
            {
                "phase": each.phase,
                "tokens": each.tokens,
                "measured_s": _round(each.measured),
                "predicted_s": _round(each.predicted),
                "error": _round(each.error),
            }
            for each in points
        ],
        "mape": {
            "all": calibrate.mape(points),
            "prefill": calibrate.mape(points, lambda each: each.phase == "prefill"),
            "decode": calibrate.mape(points, lambda each: each.phase == "decode"),
        },
    }
