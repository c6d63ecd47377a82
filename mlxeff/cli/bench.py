"""`mlxeff bench`: speed on this machine. `ttft`: seconds to the first token, tokens a second before and after it."""

import argparse
import json
from pathlib import Path

from ..errors import MlxeffError
from . import output

LENGTHS = (128, 512, 2048)
ACTIVATIONS = "float32 in the native CPU kernels, else the weights' type"


def run(options: argparse.Namespace) -> int:
    _check(options)
    with output.show_notices(options.quiet) as lines:
        card, settings, results = _measure(options)
    from ..bench import report

    if options.json:
        found = list(report.medians(results.samples.all).values())
        document = {"card": card, "settings": settings, "arms": results.arms, "results": found}
        document |= {"samples": results.samples.all, "skipped": results.skipped, "notices": lines}
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        print(report.tables(results, card | settings, options.suite is not None))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse contradictions before anything is loaded."""
    if (options.model is None) == (options.suite is None):
        raise MlxeffError("bench ttft: wanted MODEL or --suite, got " + ("both" if options.model else "neither"))
    if options.suite:
        given = {"--kv-predict": options.kv_predict, "--compute": options.compute != "exact"}
        given["--kv-dtype"] = options.kv_dtype != "float32"
    else:
        given = {"--checkpoint": options.checkpoint, "--dtype": options.dtype}
    for name, value in given.items():
        if value:
            raise MlxeffError(f"bench ttft: {name} is not for {'--suite' if options.suite else 'a MODEL'}")
    if any(refine for *_, refine in options.kv_predict):
        raise MlxeffError("bench ttft: :refine changes nothing before the first token: leave it out")
    if options.memory is not None and not options.memory > 0:
        raise MlxeffError(f"--memory: wanted GB above 0, got {options.memory}")


def _measure(options: argparse.Namespace) -> tuple[dict, dict, object]:
    """(the card, the settings, the results)."""
    from .. import kernels
    from ..bench import machine, ttft
    from ..bench.samples import Samples

    if options.threads:
        _set_threads(options.threads)
    devices = _devices(options)
    kernels.use_device(devices[0])
    kernels.bound_buffer_cache()
    groups, about = _suite(options) if options.suite else _model(options)
    memory = options.memory and options.memory * 1e9
    settings = ttft.Settings(options.rounds, options.warmup, options.steps, options.prefill_step, memory)
    card = machine.card()
    steps = {device: options.prefill_step or kernels.PREFILL_STEP[device] for device in devices}
    described = about | {"steps": options.steps, "prefill_step": steps}
    samples = Samples(options.out and Path(options.out), {"format": "mlxeff-ttft", **card, **described}, ttft.KEYS)
    results = ttft.Results(samples)
    ttft.run(groups, devices, settings, options.only, results)
    return card, described | {"rounds": options.rounds, "warmup": options.warmup}, results


def _set_threads(count: int) -> None:
    from .. import kernels

    native, reason = kernels.native()
    if native is None:
        raise MlxeffError(f"--threads: only the native CPU kernels have them: {reason}")
    native.set_num_threads(count)


def _devices(options: argparse.Namespace) -> list[str]:
    from .. import kernels

    if options.device == "auto" and options.suite:
        return ["cpu", "gpu"] if kernels.has_metal() else ["cpu"]
    return [kernels.use_device(options.device)]


def _suite(options: argparse.Namespace) -> tuple[list, dict]:
    import mlx.core as mx

    from .. import hub
    from ..bench import kvp_paper

    dtype = options.dtype or "float16"
    found = {size: hub.resolve(model, offline=options.offline) for size, model in options.checkpoint}
    weights = f"{dtype}, random" if len(found) < len(kvp_paper.SIZES) else "as stored"
    given = {size: str(path) for size, path in found.items()}
    about = {"suite": options.suite, "weights": weights, "checkpoints": given, "activations": ACTIVATIONS}
    return kvp_paper.groups(getattr(mx, dtype), found), about


def _model(options: argparse.Namespace) -> tuple[list, dict]:
    """The model and its pairs as one group."""
    from .. import hub
    from ..bench.arms import Arm
    from ..bench.ttft import Group, Point
    from ..kv_pairs import load_pair
    from ..kvprediction.files import digest
    from ..kvprediction.predict import SINKS
    from ..loading import load_path, require_seam
    from ..models.fused import set_precision

    with output.bar(f"fetching {options.model}", "B", options.quiet) as progress:
        path = hub.resolve(options.model, offline=options.offline, progress=progress)
    base = load_path(path)
    require_seam(base.model, "kv", "bench ttft")
    set_precision(base.model, options.compute, options.kv_dtype)
    pairs = {}
    arms = {options.model: Arm(options.model, base.model)}
    for folder, keep, _ in options.kv_predict:
        pair = load_pair(folder, base, offline=options.offline)
        pairs[folder] = digest(hub.resolve_pair(folder))
        name = folder if keep is None else f"{folder}:keep={keep}"
        arms[name] = Arm(name, base.model, pair.auxiliary, pair.predictor, keep or 1, SINKS if keep else 0)
    lengths = _lengths(options, base.model.context_length)
    points = [Point(batch, tokens) for batch in options.batch for tokens in lengths]
    about = {"model": options.model, "fingerprint": base.fingerprint, "weights": "as stored", "activations": base.dtype}
    about |= {"compute": options.compute, "kv_dtype": options.kv_dtype, "pairs": pairs}
    return [Group(list(arms), lambda names: [arms[name] for name in names], points, loaded=True)], about


def _lengths(options: argparse.Namespace, limit: int | None) -> list[int]:
    """The prompt lengths asked for, else those of LENGTHS that the context has room for."""
    lengths = options.prompt_lengths or [length for length in LENGTHS if not limit or length <= limit] or [limit]
    if limit and max(lengths) > limit:
        raise MlxeffError(f"--prompt-lengths: {max(lengths)} tokens, but the context is {limit} tokens")
    return list(lengths)
