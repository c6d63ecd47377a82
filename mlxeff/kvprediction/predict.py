"""Prefill with predicted keys and values, and their refinement while the answer is decoded.

The algorithm is that of CoreNet's `kv_prediction.py` at inference: of N prompt tokens the auxiliary reads the first
N-1, the predictor makes the base's cache of them, and the base runs the last token, whose own keys and values it adds.
Two dials beyond it: `keep` and `sinks` let the base compute the last and the first tokens itself, and `Refinement`
replaces what was predicted, chunk by chunk, by what the base computes. Shapes: B batch, N prompt tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..cache import Cache
from ..decode import Progress, Step, prefill
from ..errors import MlxeffError, notices
from ..running import EXACT, RunOptions
from .predictor import KvModel, Pairs, Predictor

SINKS = 4  # first tokens that `keep` computes exactly too: attention rests on them (Xiao et al., arXiv 2309.17453)
REFINE_STEP = 64  # tokens between two decode steps


def predict(
    auxiliary: KvModel,
    predictor: Predictor,
    base: KvModel,
    tokens: mx.array,
    cache: Cache,
    step_size: int = 512,
    keep: int = 1,
    sinks: int = 0,
    progress: Progress | None = None,
    options: RunOptions = EXACT,
) -> mx.array:
    """Fill the empty `cache` of `base` with the prompt `tokens` (N,) or (B, N); returns the last logits (B, V), lazy.

    The base computes the last `keep` ≥ 1 tokens and the first `sinks`, the rest is predicted from the auxiliary, in
    chunks of `step_size`. With one token, or `keep` ≥ N, this is the base's own prefill.
    """
    if cache.length or keep < 1:
        raise MlxeffError(f"KV prediction: wanted an empty cache and keep ≥ 1, got {cache.length} tokens, keep {keep}")
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    total = tokens.shape[1]
    step_size = min(step_size, total)  # MLX's slices end at 2^31 - 1
    first, stop = predicted_range(total, keep, sinks)
    if first == stop:
        return prefill(base, cache, tokens, step_size, progress, options)
    cache.reserve(total + 1)
    if first:
        base.last_logits(tokens[:, :first], cache, options)
    read = auxiliary.new_cache(options.kv)
    read.reserve(stop)
    for start in range(0, stop, step_size):
        if progress:
            progress(start, total)
        end = min(start + step_size, stop)
        reading = predictor.read(auxiliary, tokens[:, start:end], read, options)
        if cache.length < end:  # else the base has computed all of these itself
            pairs = _without_first(predictor(reading, options.compute), cache.length - start)
            base.append_kv(pairs, cache, options)
        mx.eval(cache.arrays(), read.arrays())
    rest = progress and (lambda done, _: progress(stop + done, total))
    return prefill(base, cache, tokens[:, stop:], step_size, rest, options)


def predicted_range(total: int, keep: int, sinks: int) -> tuple[int, int]:
    """The positions [first, stop) of a prompt of `total` tokens whose keys and values are predicted."""
    stop = max(0, total - keep)
    return min(sinks, stop), stop


def _without_first(pairs: Pairs, tokens: int) -> Pairs:
    """The pairs without their first `tokens` tokens."""
    return pairs if not tokens else [(keys[:, :, tokens:], values[:, :, tokens:]) for keys, values in pairs]


class Refinement:
    """Lets the base compute, between decode steps, what was predicted.

    After its last step the cache is what the base alone would have made of the same tokens: also the tokens decoded
    meanwhile, which attended to predictions, are computed anew.
    """

    def __init__(self, base: KvModel, cache, exact: int, step_size: int = REFINE_STEP, options: RunOptions = EXACT):
        """The first `exact` tokens of `cache` are the base's own."""
        self.base, self.cache, self.exact, self.step_size, self.options = base, cache, exact, step_size, options
        self.done = False

    def step(self, tokens: Sequence[int]) -> None:
        """Compute the next chunk; `tokens` are those that the cache holds."""
        if self.done:
            return
        end = min(self.exact + self.step_size, self.cache.length)
        with self.cache.rewound(self.exact):
            self.base.last_logits(mx.array([tokens[self.exact : end]]), self.cache, self.options)
        mx.eval(self.cache.arrays())
        self.exact, self.done = end, end == self.cache.length


@dataclass
class KvPrediction:
    """A pair as a `decode.Reading`, with the dials of the user; counts what the last prompt was made of.

    keep     last prompt tokens that the base computes, with the first SINKS ones; None: the last one, no sinks
    refine   whether the base computes the predicted ones too, while it answers
    """

    auxiliary: KvModel
    predictor: Predictor
    name: str
    keep: int | None = None
    refine: bool = False
    predicted_tokens: int = field(default=0, init=False)
    refined_tokens: int = field(default=0, init=False)
    refinement: Refinement | None = field(default=None, init=False, repr=False)  # of the last prompt, if any is left

    def dialled(self, keep: int | None = None, refine: bool = False) -> "KvPrediction":
        """The same pair with these dials."""
        return replace(self, keep=keep, refine=refine)

    @property
    def kept(self) -> tuple[int, int]:
        """(last tokens, first tokens) of a prompt that the base computes itself."""
        return (1, 0) if self.keep is None else (self.keep, SINKS)

    def predicted(self, total: int) -> tuple[int, int]:
        """The positions [first, stop) of a prompt of `total` tokens whose keys and values are predicted."""
        return predicted_range(total, *self.kept)

    def read(
        self,
        model: KvModel,
        cache: Cache,
        tokens: mx.array,
        step_size: int,
        progress: Progress | None = None,
        options: RunOptions = EXACT,
    ) -> mx.array:
        """As `decode.prefill`, with prediction; a cache that holds tokens already is continued by the base alone."""
        total = tokens.shape[-1]
        self.predicted_tokens, self.refined_tokens, self.refinement = 0, 0, None
        if cache.length:
            notices.warning("KV prediction: not used: the cache holds %d tokens already", cache.length)
            return prefill(model, cache, tokens, step_size, progress, options)
        first, stop = self.predicted(total)
        limit = getattr(self.auxiliary, "context_length", None)
        if limit and stop > limit:  # tokens that the auxiliary reads
            text = f"wanted a prompt in the auxiliary's context of {limit} tokens, got {total}"
            raise MlxeffError(f"KV prediction: {self.name}: {text}")
        self.predicted_tokens = stop - first
        if not self.predicted_tokens:
            notices.info("KV prediction: not used: all %d prompt tokens are computed by the base", total)
        else:
            text = "KV prediction: the KV of %d of %d prompt tokens is predicted by %s, not computed%s"
            notices.info(text, stop - first, total, self.name, ", then refined" if self.refine else "")
            if self.refine:
                self.refinement = Refinement(model, cache, first, options=options)
        how = step_size, *self.kept, progress, options
        return predict(self.auxiliary, self.predictor, model, tokens, cache, *how)

    def accompany(self, steps: Iterator[Step], prompt: Sequence[int]) -> Iterator[Step]:
        """The same steps, which follow `prompt`, with a step of the refinement after each."""
        tokens = list(prompt)
        with contextlib.closing(steps):
            for step in steps:
                tokens.append(step.token)
                yield step
                if self.refinement:
                    before = self.refinement.exact
                    self.refinement.step(tokens)
                    self.refined_tokens += self.refinement.exact - before

    def report(self) -> dict:
        """What the last prompt was made of."""
        report = {"pair": self.name, "keep": self.keep, "refine": self.refine}
        counts = {"predicted_tokens": self.predicted_tokens, "refined_tokens": self.refined_tokens}
        return {"kv_prediction": report | counts}

    def summary(self) -> str:
        """How much of the last prompt was predicted."""
        if not self.predicted_tokens:
            return ""
        refined = f", {self.refined_tokens} refined" if self.refine else ""
        return f"KV of {self.predicted_tokens} tokens predicted{refined}"
