"""Prompt → text: `stream_generate` and `generate` in mlx-lm's shapes, and `Session`, which keeps a cache between
prompts.

Joins how a prompt is read and how tokens follow (`decode.Reading`, `decode.Following`) with a tokenizer: stop strings,
the context limit, timings. Knows no technique, no flags, and of files only the one that a session's cache goes to.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from . import kernels
from .cache import Cache, common_prefix
from .decode import Following, Model, PlainFollowing, PlainReading, Progress, Reading, Step
from .errors import MlxeffError, notices
from .running import EXACT, RunOptions, Tally
from .sampling import LogitsProcessor, Sampler, make_sampler


@dataclass
class GenerationResponse:
    """One decoded token and the state of the generation; mlx-lm's fields and `ttft`.

    `text` is what became final with this token. `prompt_tokens` counts those computed (not those a cache already
    held); `prompt_tps` is that count by `ttft`, the seconds to the first token; `generation_tps` is (N-1)/Δt from the
    first token on (0 for the first); `peak_memory` is MLX's, in GB. `finish_reason`: None, "stop" (end token or stop
    string) or "length" (`max_tokens` or the context limit).
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    ttft: float = 0.0


def generate(model: Model, tokenizer, prompt: str | list[int], verbose: bool = False, **more) -> str:
    """The whole answer as one string; `more` as in `stream_generate`, `verbose` prints it as it comes."""
    pieces, response = [], None
    for response in stream_generate(model, tokenizer, prompt, **more):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\nPrompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return "".join(pieces)


def stream_generate(
    model: Model,
    tokenizer,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model=None,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: Cache | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    stop: str | Sequence[str] = (),
    context_limit: int | None = None,
    truncate: bool = False,
    history: Sequence[int] = (),
    reading: Reading | None = None,
    following: Following | None = None,
    options: RunOptions = EXACT,
) -> Iterator[GenerationResponse]:
    """Yield a `GenerationResponse` a token; the last one has a `finish_reason`.

    `prompt`: text (a BOS is added unless it is there) or token ids. `max_tokens` -1 is unlimited up to the context.
    `prompt_cache`: a cache from `model.new_cache()` that may already hold a prefix of the conversation; `prompt` is
    what comes after it. `stop`: strings that end the text and are not part of it. `context_limit`: tokens, the
    model's own by default; a longer prompt is an error, or with `truncate` loses its beginning, with a notice.
    `history`: the tokens that `prompt_cache` stands for, for the logits processors. `reading`: how the prompt gets into
    the cache, such as the pair of KV Prediction that `load_pair` gives; None: the model computes every token.
    `following`: how tokens follow, None: one a pass. `options`: arithmetic and kind of KV cache, valid for this call.
    """
    if draft_model is not None:
        raise MlxeffError("stream_generate: draft_model is not supported")
    if max_tokens == 0 or max_tokens < -1:
        raise MlxeffError(f"max_tokens: wanted 1 or more, or -1 for no limit, got {max_tokens}")
    began = time.perf_counter()
    reading, following = reading or PlainReading(), following or PlainFollowing()
    if options is not EXACT:
        model.check(options)
    ids = prompt_ids(tokenizer, prompt)
    _check_ids(ids, model.vocab_size)
    cache = prompt_cache if prompt_cache is not None else model.new_cache(options.kv)
    if options.kv not in (None, cache.kind):
        raise MlxeffError(f"prompt_cache: wanted a KV cache of the kind {options.kv}, got one of {cache.kind}")
    limit = context_limit or model.context_length
    ids = fit_context(ids, cache.length, limit, max_tokens, truncate)
    budget = max_tokens
    if limit and (max_tokens < 0 or max_tokens > limit - cache.length - len(ids) + 1):
        budget = limit - cache.length - len(ids) + 1
    mx.reset_peak_memory()
    step_size = prefill_step_size or kernels.PREFILL_STEP[kernels.device()]
    logits = reading.read(model, cache, mx.array(ids), step_size, prompt_progress_callback, options)
    seen, sampler = mx.array([*history, *ids]) if logits_processors else None, sampler or make_sampler()
    steps = following.follow(model, cache, logits, sampler, logits_processors or (), seen, budget, options)
    steps = reading.accompany(steps, ids)
    finisher = _Finisher(tokenizer, stop, budget, cut_by_context=budget != max_tokens)
    try:
        yield from _respond(steps, finisher, began, len(ids), prompt_progress_callback)
    finally:
        steps.close()


def _respond(steps: Iterator[Step], finisher: "_Finisher", began: float, prompt_tokens: int, progress: Progress | None):
    ttft, first = 0.0, 0.0
    for count, step in enumerate(steps, start=1):
        now = time.perf_counter()
        if count == 1:
            ttft, first = now - began, now
            if progress:
                progress(prompt_tokens, prompt_tokens)
        text, reason = finisher.take(step.token, count)
        yield GenerationResponse(
            text=text,
            token=step.token,
            logprobs=step.logprobs,
            from_draft=step.from_draft,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / ttft,
            generation_tokens=count,
            generation_tps=(count - 1) / (now - first) if count > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
            ttft=ttft,
        )
        if reason:
            return


def prompt_ids(tokenizer, prompt: str | mx.array | list[int]) -> list[int]:
    """Token ids of a prompt; refuses an empty one."""
    if isinstance(prompt, str):
        bos = getattr(tokenizer, "bos_token", None)
        ids = tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))
        empty = not prompt
    else:
        ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        empty = False
    if empty or not ids:
        raise MlxeffError("prompt: wanted at least one token, got an empty prompt")
    return ids


def _check_ids(ids: list[int], rows: int | None) -> None:
    """Refuse ids that have no row in the embedding table of `rows`: MLX would read outside of it."""
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < (rows or 1 << 31):
            raise MlxeffError(f"prompt: wanted token ids from 0 to {(rows or 1 << 31) - 1}, got {token!r:.60}")


def fit_context(ids: list[int], held: int, limit: int | None, max_tokens: int, truncate: bool) -> list[int]:
    """`ids` if they fit into `limit` after `held` tokens, else an error or, with `truncate`, their end, with a notice.

    Truncation leaves room for `max_tokens`, at most half of the context; a leading token is dropped like any other.
    """
    if not limit or held + len(ids) <= limit:
        return ids
    if not truncate or held:
        raise MlxeffError(
            f"prompt: {held + len(ids)} tokens, but the context is {limit} tokens (--truncate drops its beginning)"
        )
    room = limit // 2 if max_tokens < 0 else min(max_tokens, limit // 2)
    kept = max(1, limit - room)
    dropped = len(ids) - kept
    notices.warning("prompt truncated: dropped the first %d of %d tokens to fit %d", dropped, len(ids), limit)
    return ids[-kept:]


class _Finisher:
    """Token → text that is final, and why to finish: holds text back while it may turn out to be a stop string."""

    def __init__(self, tokenizer, stop: str | Sequence[str], budget: int, cut_by_context: bool):
        stop = [stop] if isinstance(stop, str) else list(stop)
        if any(not text for text in stop):
            raise MlxeffError("stop: wanted non-empty strings, got an empty one")
        self.detokenizer, self.eos, self.stop = tokenizer.detokenizer, tokenizer.eos_token_ids, stop
        self.budget, self.cut_by_context = budget, cut_by_context
        self.held = ""

    def take(self, token: int, count: int) -> tuple[str, str | None]:
        """(final text, finish reason or None) after the `count`-th token."""
        reason = "stop" if token in self.eos else None
        if reason is None:
            self.detokenizer.add_token(token)
            if count == self.budget:
                reason = "length"
                if self.cut_by_context:
                    notices.warning("stopped: the context is full")
        if reason:
            self.detokenizer.finalize()
        self.held += self.detokenizer.last_segment
        found = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if found:
            return self.held[: min(found)], "stop"
        keep = 0 if reason else self._possible_stop()
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, reason

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        lengths = (n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n]))
        return max(lengths, default=0)


@dataclass
class Session:
    """A model with a cache that lives on between prompts: each prompt computes only what the cache does not hold."""

    model: Model
    tokenizer: object
    cache: Cache | None = None
    tokens: list[int] = field(default_factory=list)  # what the cache holds
    prompt: list[int] = field(default_factory=list)  # the last one, as it was computed
    reused: int = 0  # how many of its tokens the cache already held
    ran: Tally = field(default_factory=Tally)  # what computed the last prompt and its answer

    def stream(
        self,
        ids: list[int],
        max_tokens: int = 256,
        context_limit: int | None = None,
        truncate: bool = False,
        options: RunOptions = EXACT,
        **more,
    ) -> Iterator[GenerationResponse]:
        """`stream_generate` on the whole conversation `ids`; reuses the longest common prefix with the last one."""
        if self.cache is None:
            self.cache = self.model.new_cache(options.kv)
        self.prompt = fit_context(ids, 0, context_limit or self.model.context_length, max_tokens, truncate)
        self.reused = self._rewind(common_prefix(self.tokens, self.prompt[:-1]), options)
        generated: list[int] = []
        more |= {"prompt_cache": self.cache, "history": self.tokens, "options": options}
        more |= {"max_tokens": max_tokens, "context_limit": context_limit}
        cache, before = self.cache, Tally(self.cache.tally)
        responses = stream_generate(self.model, self.tokenizer, self.prompt[self.reused :], **more)
        try:
            for response in responses:
                generated.append(response.token)
                yield response
        finally:
            responses.close()
            self.ran = cache.tally.since(before)
            self._settle(self.prompt + generated, bool(generated))

    def restore(self, path: Path, fingerprint: str, ids: Sequence[int], options: RunOptions = EXACT) -> None:
        """Go on with the cache that `save` wrote to `path`, for the prompt `ids`; says when none of it is of use.

        Raises MlxeffError for a file of another model (`fingerprint`) or kind, and for a folder that is not there; a
        file that is not there yet is none.
        """
        if not path.exists():
            if not path.absolute().parent.is_dir():
                raise MlxeffError(f"{path}: wanted an existing folder for the prompt cache, got none")
            return
        cache = self.model.new_cache(options.kv)
        held = cache.restore(path, fingerprint)
        if not common_prefix(held, ids[:-1]):
            notices.warning("%s: none of its %d tokens fit this prompt: computed anew", path, len(held))
        self.cache, self.tokens = cache, held

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the cache to `path`; says so where there is nothing to write."""
        if self.cache is None or not self.tokens:
            notices.warning("%s: not written: the prompt was interrupted", path)
            return
        self.cache.save(path, self.tokens, fingerprint)

    def _rewind(self, shared: int, options: RunOptions) -> int:
        """Take the cache back to its first `shared` tokens, or to fewer where it cannot; returns how many it holds."""
        kept = self.cache.rewind(shared) if shared < self.cache.length else shared
        if kept > shared:  # nothing can be taken back
            self.cache, kept = self.model.new_cache(options.kv), 0
        if kept < shared:
            notices.warning("KV cache: %d tokens recomputed, this model's cache cannot be taken back", shared - kept)
        self.tokens = self.tokens[:kept]
        return kept

    def _settle(self, tokens: list[int], complete: bool) -> None:
        """Note what the cache holds; forget all after an interrupted prefill, whose state is unknown."""
        if complete and self.cache.length <= len(tokens):
            self.tokens = tokens[: self.cache.length]
        else:
            self.cache, self.tokens = None, []
