"""A request to `mlxeff bench ttft`, and its execution: builds the arms, measures them, and returns the results.

Contradictory options are refused before any model is loaded. This module prints nothing and parses no command line.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from .. import hub, kernels
from ..assembly.model import load_path
from ..assembly.techniques import Switched
from ..decode import Setup, require_seam
from ..errors import MlxeffError
from ..running import EXACT, RunOptions
from . import kvp_paper, machine, ttft
from .arms import Arm
from .result import SAMPLES_FORMAT
from .samples import Samples

LENGTHS = (128, 512, 2048)  # default prompt lengths in tokens
INT_MAX = 2**31 - 1
ACTIVATIONS = "float32 in the native CPU kernels, else the weights' type"


@dataclass(frozen=True)
class Request:
    """The options of the command. Either `model` or `suite` is given.

    model        a folder, file, name or hub id; measured as it is, and with each technique in `switched`
    suite        the name of a suite with models of its own, "kvp-paper"
    switched     (technique, the value of its option)
    run          the options of the forward passes of `model`
    lengths      prompt lengths in tokens; None: those of LENGTHS that the context has room for
    only         conditions "KEY=VALUE" that select measurements (see `selection`)
    out          the file that keeps every sample; None: none
    device       "cpu", "gpu" or "auto"
    threads      of the native CPU kernels; None: unchanged
    dtype        the type of the suite's random weights; None: float16
    checkpoints  (size of an OpenELM, model): checkpoints that the suite uses in place of random weights
    ignored      entries of config.json to read as absent, of the model, of a pair's auxiliary, and of `checkpoints`
    offline      whether models are taken from the local cache only
    """

    model: str | None
    suite: str | None
    switched: Sequence[tuple[Switched, object]] = ()
    run: RunOptions = EXACT
    lengths: Sequence[int] | None = None
    batches: Sequence[int] = (1,)
    only: Sequence[str] = ()
    settings: ttft.Settings = field(default_factory=ttft.Settings)
    out: str | None = None
    device: str = "auto"
    threads: int | None = None
    dtype: str | None = None
    checkpoints: Sequence[tuple[str, str]] = ()
    ignored: Sequence[str] = ()
    offline: bool = False

    def check(self) -> None:
        """Raises MlxeffError for options that contradict each other or are out of range."""
        if (self.model is None) == (self.suite is None):
            raise MlxeffError("bench ttft: wanted MODEL or --suite, got " + ("both" if self.model else "neither"))
        if self.suite:
            given = {technique.option.name: True for technique, _ in self.switched}
            given["--ignore-keys without --checkpoint"] = self.ignored and not self.checkpoints
            given |= {"--compute": self.run.compute != EXACT.compute, "--kv-cache": self.run.kv is not None}
        else:
            given = {"--checkpoint": self.checkpoints, "--dtype": self.dtype}
        for name, value in given.items():
            if value:
                raise MlxeffError(f"bench ttft: {name} is not for {'--suite' if self.suite else 'a MODEL'}")
        for technique, value in self.switched:
            technique.check_timed(value)
        memory = self.settings.memory
        if memory is not None and not memory > 0:
            raise MlxeffError(f"--memory: wanted GB above 0, got {memory / 1e9:g}")

    @property
    def devices(self) -> list[str]:
        """The devices to measure on, "cpu" or "gpu". Makes the first one MLX's default device."""
        if self.device == "auto" and self.suite:
            found = ["cpu", "gpu"] if kernels.has_metal() else ["cpu"]
            kernels.use_device(found[0])
            return found
        return [kernels.use_device(self.device)]


Fetching = Callable[[str, str], AbstractContextManager]  # (title, unit) → a progress bar, as in `assembly.fitting`


def measure(request: Request, fetching: Fetching) -> tuple[dict, dict, ttft.Results]:
    """Run the request: (the card of the machine, a description of models and settings, the results).

    Raises MlxeffError for a request that `Request.check` refuses, for a model that cannot be loaded, and for an `out`
    file with samples of another kind.
    """
    request.check()
    if request.threads:
        _set_threads(request.threads)
    devices = request.devices
    kernels.bound_buffer_cache()
    groups, about = _suite(request) if request.suite else _model(request, fetching)
    card, settings = machine.card(), request.settings
    steps = {device: settings.step_size or kernels.PREFILL_STEP[device] for device in devices}
    described = about | {"steps": settings.steps, "prefill_step": steps}
    out = request.out and Path(request.out)
    samples = Samples(out, {"format": SAMPLES_FORMAT, **card, **described}, ttft.KEYS)
    results = ttft.Results(samples)
    ttft.run(groups, devices, settings, request.only, results)
    return card, described | {"rounds": settings.rounds, "warmup": settings.warmup}, results


def _set_threads(count: int) -> None:
    native, reason = kernels.native()
    if native is None:
        raise MlxeffError(f"--threads: only the native CPU kernels have them: {reason}")
    native.set_num_threads(min(count, INT_MAX))  # a C int, which the native module limits further


def _suite(request: Request) -> tuple[list[ttft.Group], dict]:
    dtype = request.dtype or "float16"
    found = {size: hub.resolve(model, offline=request.offline) for size, model in request.checkpoints}
    weights = f"{dtype}, random" if len(found) < len(kvp_paper.SIZES) else "as stored"
    given = {size: str(path) for size, path in found.items()}
    about = {"suite": request.suite, "weights": weights, "checkpoints": given, "activations": ACTIVATIONS}
    return kvp_paper.groups(getattr(mx, dtype), found, request.ignored), about


def _model(request: Request, fetching: Fetching) -> tuple[list[ttft.Group], dict]:
    """One group of arms, the model as it is and the model with each technique; and the description of both."""
    with fetching(f"fetching {request.model}", "B") as progress:
        path = hub.resolve(request.model, offline=request.offline, progress=progress)
    base = load_path(path, dict.fromkeys(request.ignored))
    require_seam(base.model, "kv", "bench ttft")
    base.model.check(request.run)
    plain = Setup(base.model, options=request.run)
    arms, identities = {request.model: Arm(request.model, plain)}, {}
    for technique, value in request.switched:
        values = argparse.Namespace(offline=request.offline)
        name, setup = technique.label(value), technique.apply(replace(plain), base, value, values)
        arms[name] = Arm(name, setup)
        identities[name] = technique.identity(value)
    lengths = _lengths(request.lengths, base.model.context_length)
    points = [ttft.Point(batch, tokens) for batch in request.batches for tokens in lengths]
    about = {
        "model": request.model,
        "fingerprint": base.fingerprint,
        "weights": "as stored",
        "activations": base.dtype,
        "compute": request.run.compute,
        "kv_dtype": request.run.kv or base.dtype,
        "pairs": identities,
    }
    return [ttft.Group(list(arms), lambda names: [arms[name] for name in names], points, loaded=True)], about


def _lengths(asked: Sequence[int] | None, limit: int | None) -> list[int]:
    """The prompt lengths `asked` for; None: those of LENGTHS within the context of `limit` tokens. Raises MlxeffError
    for a length above `limit`."""
    lengths = asked or [length for length in LENGTHS if not limit or length <= limit] or [limit]
    if limit and max(lengths) > limit:
        raise MlxeffError(f"--prompt-lengths: {max(lengths)} tokens, but the context is {limit} tokens")
    return list(lengths)
