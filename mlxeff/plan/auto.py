"""`--auto`: of the ways to run a model whose loss is known and allowed, the one that is predicted as fastest.

Choices without loss: the tokens that are computed at once, the threads (those numbers that this machine is calibrated
for), and QuantSpec's drafts where the KV cache is int8 already. With an allowed loss also kinds of KV cache and pairs
of KV Prediction, for the model whose loss with them was measured (`data/quality.json`, which
`benchmarks/plan_quality.py` writes from committed results). Losses of two choices are added up, which is an estimate.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from ..assembly.techniques import parse_pair
from . import memory, techniques
from .costs import Bits
from .formats import KV_BYTES
from .predict import STEPS, Predictor
from .published import data
from .request import ACCEPTANCE
from .shapes import Shape

NEAR = 0.02  # choices whose times differ by less are as fast
DRAFTING = "int8"  # kind of KV cache on which QuantSpec drafts


@dataclass(frozen=True)
class Task:
    """What is to be run.

    fingerprint   of the model, as `assembly.model.fingerprint`
    number        bytes of a number in the default KV cache
    prompt        tokens of the prompt
    answer        tokens of the answer
    share         of the feed-forward networks that is computed (DynaMoE)
    most          allowed KL divergence from the model without lossy choices, nats a token
    given         option → the value that the user gave, which is kept
    drafts        whether tokens may be drafted: not where something else drafts already
    predicts      whether the prompt may be predicted
    """

    shape: Shape
    bits: Bits
    fingerprint: str
    number: float
    prompt: int
    answer: int
    share: float = 1.0
    most: float = 0.0
    given: Mapping[str, object] = field(default_factory=dict)
    drafts: bool = True
    predicts: bool = True


@dataclass(frozen=True)
class Choice:
    """One way to run it; `None` and False are what happens without the option. `ttft` are seconds to the first token,
    `token` those of each further one; `kl` of what was chosen and not given, and `sources`, the results that it is
    from."""

    threads: int | None
    kv_cache: str | None
    quantspec: bool
    num_draft_tokens: int | None
    kv_predict: str | None
    prefill_step: int | None
    ttft: float = 0.0
    token: float = 0.0
    kl: float = 0.0
    sources: tuple[str, ...] = ()

    def options(self, task: Task) -> dict[str, object]:
        """Option → the value that was chosen for it; without those that the user gave or that stay as they are."""
        found = {name: getattr(self, name) for name in NAMES if getattr(self, name) not in (None, False)}
        return {name: value for name, value in found.items() if name not in task.given}

    def seconds(self, task: Task) -> float:
        """Of the prompt and the answer."""
        return self.ttft + (task.answer - 1) * self.token


NAMES = ("threads", "kv_cache", "quantspec", "num_draft_tokens", "kv_predict", "prefill_step")


def value(name: str, chosen: object) -> object:
    """The parsed value of an option that was chosen."""
    return parse_pair(chosen) if name == "kv_predict" else chosen


def known(fingerprint: str) -> dict[str, dict]:
    """Option → value → {"kl": nats a token, "result": the file that it is from, …} of a model; {} for another one than
    was measured."""
    found = json.loads(data("quality.json"))
    return found["options"] if found["fingerprint"] == fingerprint else {}


def choose(task: Task, machines: Mapping[int | None, Predictor]) -> tuple[Choice, Choice]:
    """(The fastest choice, the choice that only keeps what was given); of those that are nearly as fast the one that
    loses least, and of these the one that changes least. `machines`: threads → the predictor with them; None: with the
    default ones, or those that were given."""
    found = list(choices(task, machines))
    plain, fitting = found[0], [each for each in found if fits(each, task, machines)] or found[:1]
    fastest = min(each.seconds(task) for each in fitting)
    near = [each for each in fitting if each.seconds(task) <= (1 + NEAR) * fastest]
    return min(near, key=lambda each: (each.kl, len(each.options(task)), each.seconds(task))), plain


def fits(choice: Choice, task: Task, machines: Mapping[int | None, Predictor]) -> bool:
    """Whether weights, KV cache and the buffers of a chunk fit into the memory of the machine."""
    machine = machines[choice.threads].machine
    step, tokens = choice.prefill_step or STEPS[machine.kind], task.prompt + task.answer
    peak = memory.peak_bytes(task.shape, task.bits, tokens, step, _number(choice, task), machine)
    return not machine.usable or peak <= machine.usable


def _number(choice: Choice, task: Task) -> float:
    """Bytes of a number in the KV cache."""
    return KV_BYTES.get(choice.kv_cache, task.number)


def choices(task: Task, machines: Mapping[int | None, Predictor]) -> Iterator[Choice]:
    """Every choice whose loss is known and allowed, first the one without options. What several share is computed
    once."""
    measured = known(task.fingerprint) if task.most > 0 else {}
    depth = task.prompt + task.answer // 2

    @cache
    def first(threads: int | None, pair: str | None, step: int | None) -> float:
        found = machines[threads]
        if pair is None or "kv_predict" in task.given:
            return found.prefill(task.shape, task.bits, task.prompt, step, task.share)
        layers = measured["kv_predict"][pair]["layers"]
        return techniques.kv_prediction(found, task.shape, task.bits, task.prompt, layers, step, task.share)

    @cache
    def token(threads: int | None, kind: str | None, quantspec: bool) -> tuple[float, int | None]:
        """Seconds of a token, and the number of drafted ones; of drafts the less favourable end of the error bar."""
        found = machines[threads]
        if quantspec:
            how = (ACCEPTANCE, task.share, techniques.DOUBTS[0])
            drafted = techniques.quantspec(found, task.shape, task.bits, depth, *how)
            return drafted.seconds, drafted.width if drafted.speedup > 1 else None
        return found.decode(task.shape, task.bits, depth, KV_BYTES.get(kind, task.number), task.share), None

    for threads, kind, pair, step in itertools.product(machines, *_values(task, measured)):
        loss, sources = 0.0, []
        for name, chosen in (("kv_cache", kind), ("kv_predict", pair)):
            if chosen is not None and name not in task.given:
                entry = measured[name][chosen]
                loss, sources = loss + entry["kl"], [*sources, entry["result"]]
        if loss > task.most:
            continue
        for quantspec in _drafting(task, kind):
            seconds, width = token(threads, kind, quantspec)
            width = task.given.get("num_draft_tokens", width)
            start = first(threads, pair, step)
            yield Choice(threads, kind, quantspec, width, pair, step, start, seconds, loss, tuple(sources))


def _values(task: Task, measured: Mapping[str, dict]) -> Sequence[Sequence[object]]:
    """The values that KV cache, pair and prefill step may have."""
    kinds = [None, *measured.get("kv_cache", ())]
    pairs = [None, *measured.get("kv_predict", ())] if task.predicts else [None]
    lists = {"kv_cache": kinds, "kv_predict": pairs, "prefill_step": [None, *memory.CHUNKS]}
    return [[task.given[name]] if name in task.given else values for name, values in lists.items()]


def _drafting(task: Task, kind: str | None) -> Sequence[bool]:
    """Whether QuantSpec may draft, on this kind of KV cache; its answers are those of the same cache."""
    if "quantspec" in task.given:
        return [True]
    return [False, True] if task.drafts and kind == DRAFTING else [False]


def with_threads(task: Task, found: Predictor, calibrated: Mapping[int, Predictor]) -> dict[int | None, Predictor]:
    """The predictors for `choose`: of the default threads, and of other numbers of threads that have constants of their
    own, unless the number was given."""
    others = {} if "threads" in task.given else calibrated
    return {None: found} | {count: replace(each, engine=found.engine) for count, each in others.items()}
