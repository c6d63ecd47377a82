"""A request to `mlxeff bench ttft` or `bench decode`, and its execution: builds the arms, measures them, and returns
the result. Contradictory options are refused before any model is loaded. Prints nothing and parses no command line.
"""

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import hub, kernels
from ..assembly.model import Loaded
from ..calibration import read_text
from ..decode import PlainFollowing
from ..errors import MlxeffError, notices
from . import ceilings, conditions, machine, rounds
from .arms import Arm
from .contenders import Fetching, Loader, arm_of, contenders
from .peers import PEERS, Peer
from .points import DECODE, PROMPT, Point
from .prompts import Prompts
from .result import Result
from .samples import Samples
from .schema import SAMPLES_FORMAT

LENGTHS = (128, 512, 2048)  # default prompt lengths of `bench ttft`, in tokens
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Machine:
    """Where and with what a benchmark computes.

    device   "cpu", "gpu" or "auto"
    threads  of the native CPU kernels; None: unchanged
    memory   GB that may be used; None: most of the free memory
    """

    device: str = "auto"
    threads: int | None = None
    memory: float | None = None

    def use(self) -> str:
        """Compute there from now on; returns "cpu" or "gpu". Raises MlxeffError for what this machine lacks."""
        if self.memory is not None and not self.memory > 0:
            raise MlxeffError(f"--memory: wanted GB above 0, got {self.memory:g}")
        if self.threads:
            native, reason = kernels.native()
            if native is None:
                raise MlxeffError(f"--threads: only the native CPU kernels have them: {reason}")
            native.set_num_threads(min(self.threads, INT_MAX))  # a C int, which the native module limits further
        kernels.bound_buffer_cache()
        return kernels.use_device(self.device)

    @property
    def usable(self) -> float | None:
        """Bytes that may be used; None: as `machine.usable_bytes` says."""
        return None if self.memory is None else self.memory * 1e9


@dataclass(frozen=True)
class Request:
    """The options of the command.

    verb      "bench ttft" or "bench decode"
    model     a folder, file, name or hub id
    values    the parsed options that say how it is run
    others    those of each --vs, with the attribute `model`
    peers     (name of another engine, of peers.PEERS; the model that it runs, None for `model`)
    points    what is measured; None: prompts of the LENGTHS that the context has room for
    batches   of these prompts
    text      a UTF-8 file whose tokens are read; None: random tokens
    only      conditions "KEY=VALUE" that select measurements (see `selection`)
    out       the file that keeps every sample; None: none
    ignored   entries of config.json to read as absent
    offline   whether models are taken from the local cache only
    """

    verb: str
    model: str
    values: argparse.Namespace
    others: Sequence[argparse.Namespace] = ()
    peers: Sequence[tuple[str, str | None]] = ()
    points: Sequence[Point] | None = None
    batches: Sequence[int] = (1,)
    text: str | None = None
    only: Sequence[str] = ()
    settings: rounds.Settings = field(default_factory=rounds.Settings)
    machine: Machine = field(default_factory=Machine)
    out: str | None = None
    ignored: Sequence[str] = ()
    offline: bool = False


def measure(request: Request, fetching: Fetching) -> Result:
    """Run the request. Raises MlxeffError for contradictory options, for a model that cannot be loaded, and for an
    `out` file with samples of another kind."""
    asked = contenders(request.model, request.values, request.others, request.verb)
    device = request.machine.use()
    load = Loader(fetching, request.ignored, request.offline)
    built = [arm_of(each, load) for each in asked]
    arms, (main, base) = {arm.name: arm for arm, _ in built}, built[0]
    points = _points(request, min((each.model.context_length or INT_MAX for _, each in built)))
    _check(arms.values(), points, request)
    prompts = _prompts(request, base)
    shapes = [(point.batch, point.prompt) for point in points]
    settings = replace(request.settings, prompts=prompts, memory=request.machine.usable)
    described = {
        "verb": request.verb,
        "model": request.model,
        "arm": main.name,
        "fingerprint": base.fingerprint,
        "device": device,
        "weights": "as stored",
        "activations": base.dtype,
        "compute": main.setup.options.compute,
        "kv_dtype": main.setup.options.kv or base.dtype,
        "peers": list(map(list, request.peers)),
        "techniques": {each.name: identity for each in asked if (identity := each.identity())},
        "prompt": prompts.described(shapes, main.vocabulary),
        "steps": settings.steps,
        "prefill_step": {device: settings.step_size or kernels.PREFILL_STEP[device]},
    }
    card = here()
    results = rounds.Results(samples(request.out, card, described))
    with contextlib.ExitStack() as ends:
        for peer in _peers(request, base, main.vocabulary, device, card["threads"], results):
            ends.callback(peer.close)
            arms[peer.name] = peer
        group = rounds.Group(list(arms), lambda names: [arms[name] for name in names], points, loaded=True)
        rounds.run([group], [device], settings, request.only, results)
        results.arms |= {name: arms[name].describe() for name in results.arms}  # peers know their version by now
    described |= {"rounds": settings.rounds, "warmup": settings.warmup, "only": list(request.only)}
    found = {device: ceilings.measure(device)} if request.verb == "bench decode" else {}
    return Result(card, described, results, against=main.name, ceilings=found)


def _peers(
    request: Request, base: Loaded, vocabulary: int, device: str, threads: int, results: rounds.Results
) -> Iterator[Peer]:
    """The arms of the peers. One that is not installed, or does not load the model, is noted as left out."""
    for name, model in request.peers:
        try:
            path = base.path if model is None else hub.resolve(model, offline=request.offline)
            yield PEERS[name](path, vocabulary, device, threads)
        except MlxeffError as error:
            results.fail(f"--peer {name}: {error}")


def here() -> dict:
    """The card of the machine, with the conditions at the beginning; a notice says where they make it slower."""
    found = conditions.power()
    conditions.warn_of_battery(found)
    return machine.card() | {"power": found, "thermal": conditions.thermal()}


def samples(out: str | None, card: dict, described: dict) -> Samples:
    """The samples of a result, and the file that keeps them, if any. A file goes on only with samples of the same
    machine, versions and settings."""
    fixed = {name: card[name] for name in machine.FIXED}
    return Samples(out and Path(out), {"format": SAMPLES_FORMAT, **fixed, **described}, rounds.KEYS)


def _points(request: Request, limit: int) -> list[Point]:
    """What is measured, within a context of `limit` tokens. Raises MlxeffError for what does not fit."""
    points = request.points
    if points is None:
        lengths = [length for length in LENGTHS if length <= limit] or [limit]
        points = [Point(batch, length) for batch in request.batches for length in lengths]
    for point in points:
        if point.total > limit:
            raise MlxeffError(f"{request.verb}: {point.test}: {point.total} tokens, but the context is {limit} tokens")
    return list(dict.fromkeys(points))


def _check(arms: Iterable[Arm], points: Sequence[Point], request: Request) -> None:
    """Raises MlxeffError for points that an arm cannot be measured at, and warns of random tokens for drafts."""
    for arm in arms:
        deep = next((point for point in points if point.kind == PROMPT and point.depth), None)
        if arm.pair and deep:
            text = "KV Prediction reads a prompt into an empty cache: leave out -p or -d"
            raise MlxeffError(f"{request.verb}: {arm.name}: {deep.test}: {text}")
    drafting = any(not isinstance(arm.setup.following, PlainFollowing) for arm in arms)
    if drafting and request.text is None and any(point.kind == DECODE for point in points):
        notices.warning(
            "drafts follow random tokens here, where more or fewer are accepted than in a text: --text FILE reads one"
        )


def _prompts(request: Request, base: Loaded) -> Prompts:
    if request.text is None:
        return Prompts()
    text, origin = read_text(request.text)
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    if rows := [i for i in ids if i >= base.model.vocab_size]:  # MLX would read memory outside of the table
        raise MlxeffError(f"{origin}: wanted token ids below {base.model.vocab_size}, got {rows[0]}")
    return Prompts(ids, origin)
