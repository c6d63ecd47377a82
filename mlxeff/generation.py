"""Prompt → text: `stream_generate` and `generate` with mlx-lm's arguments, and `Session`, which keeps a KV cache
between prompts.

Adds to the decode loop (`decode.Reading`, `decode.Following`) what concerns text: the tokenizer, stop strings, the
context limit and timings. This module knows no technique by name and no option of the command line. The only file that
it reads or writes is the one for a session's cache.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from . import kernels, memory
from .cache import Cache, OtherPrecisionError, common_prefix
from .decode import Following, Model, PlainFollowing, PlainReading, Progress, Reading, Step
from .errors import MlxeffError, notices
from .running import EXACT, RunOptions, Tally
from .sampling import LogitsProcessor, Sampler, make_sampler
from .speculation.drafters import ModelDraft
from .speculation.following import Speculation
from .tokenizer import Tokenizer

NEXT = 8  # tokens that one pass may append while an answer is decoded: drafted ones, and one more


@dataclass
class GenerationResponse:
    """One decoded token and the state of the generation: the fields of mlx-lm's response, and `ttft`."""

    text: str  # text that became final with this token
    token: int
    logprobs: mx.array  # (V,), as in `decode.Step`
    from_draft: bool  # whether a draft model proposed the token
    prompt_tokens: int  # prompt tokens that were computed, without those that the cache already contained
    prompt_tps: float  # tokens a second: prompt_tokens / ttft
    generation_tokens: int  # tokens generated so far, N
    generation_tps: float  # tokens a second: (N - 1) / (seconds since the first token); 0 at the first token
    peak_memory: float  # of MLX's allocator, in GB (10^9 bytes)
    # "stop": end token or stop string; "length": max_tokens or the context limit; "memory": no more for the KV cache
    finish_reason: str | None = None
    ttft: float = 0.0  # seconds from the call to the first token


def generate(model: Model, tokenizer: Tokenizer, prompt: str | list[int], verbose: bool = False, **more) -> str:
    """The whole answer as one string. `verbose` also prints it while it is generated; `more`: arguments of
    `stream_generate`, which also names the errors."""
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
    tokenizer: Tokenizer,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model=None,
    stream: mx.Stream | None = None,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: Cache | list | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    stop: str | Sequence[str] = (),
    context_limit: int | None = None,
    truncate: bool = False,
    history: Sequence[int] = (),
    reading: Reading | None = None,
    following: Following | None = None,
    options: RunOptions = EXACT,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,  # noqa: ARG001 - this one and the next one have no effect
    quantized_kv_start: int | None = None,  # noqa: ARG001
    input_embeddings: mx.array | None = None,
    num_draft_tokens: int | None = None,
) -> Iterator[GenerationResponse]:
    """Yield one `GenerationResponse` for each token; the last one has a `finish_reason`. Where the memory that this
    process may use cannot hold a longer KV cache, that is "memory", and a notice has the numbers.

    prompt                    text (a BOS token is added unless the text begins with it) or token ids
    max_tokens                -1: up to the end of the context
    sampler                   log-probabilities → token, see `sampling.make_sampler`; None: greedy
    logits_processors         see `sampling.make_logits_processors`
    prompt_cache              a cache from `model.new_cache()`, or the list of `make_prompt_cache`; `prompt` continues
                              the tokens that it contains
    prefill_step_size         prompt tokens in one forward pass; None: kernels.PREFILL_STEP of the device
    prompt_progress_callback  called with (prompt tokens done, prompt tokens in total)
    stop                      strings that end the text; they are not part of it
    context_limit             tokens; None: the model's own limit
    truncate                  drop the beginning of a prompt that is too long, with a notice, instead of raising
    history                   ids of the tokens in `prompt_cache`, for the logits processors and for drafts
    reading                   how the prompt is read into the cache, such as the KV Prediction that `load_pair` gives;
                              None: the model computes every token
    following                 how the answer is decoded; None: one token in each forward pass
    options                   arithmetic and kind of KV cache, for this call

    draft_model               a smaller model of the same vocabulary, which drafts tokens that `model` verifies
    num_draft_tokens          tokens of each draft; None: as many as pay by measurement
    kv_bits                   8 or 4: as options with the KV cache int8 or int4; an empty cache in a list for
                              `prompt_cache` is replaced there by one of that kind

    These exist only for mlx-lm's signature. max_kv_size, input_embeddings and a stream of another device are refused;
    kv_group_size and quantized_kv_start have no effect.

    Raises MlxeffError for an empty or too long prompt, for ids outside of the vocabulary, and for arguments that the
    model does not support.
    """
    _refuse("stream_generate", {"max_kv_size": max_kv_size, "input_embeddings": input_embeddings}, stream)
    if kv_bits is not None:
        options = _with_bits(options, kv_bits)
    _check_parts(model, tokenizer)
    if max_tokens == 0 or max_tokens < -1:
        raise MlxeffError(f"max_tokens: wanted 1 or more, or -1 for no limit, got {max_tokens}")
    if prefill_step_size is not None and prefill_step_size < 1:
        raise MlxeffError(f"prefill_step_size: wanted 1 or more, got {prefill_step_size}")
    began = time.perf_counter()
    reading = reading or PlainReading()
    if draft_model is not None:
        following = _drafting(draft_model, model, following, num_draft_tokens)
    following = following or PlainFollowing()
    if options is not EXACT:
        model.check(options)
    ids = prompt_ids(tokenizer, prompt)
    _check_ids(ids, model.vocab_size, tokenizer)
    cache = _one_cache(model, prompt_cache) if prompt_cache is not None else model.new_cache(options.kv)
    if options.kv not in (None, cache.kind):
        cache = _of_kind(model, options.kv, cache, prompt_cache)
    limit = context_limit or model.context_length
    ids = fit_context(ids, cache.length, limit, max_tokens, truncate)
    budget = max_tokens
    if limit and (max_tokens < 0 or max_tokens > limit - cache.length - len(ids) + 1):
        budget = limit - cache.length - len(ids) + 1
    mx.reset_peak_memory()
    step_size = prefill_step_size or kernels.PREFILL_STEP[kernels.device()]
    require_memory(model, cache, len(ids), step_size, options)
    with memory.explained("prompt"):
        logits = reading.read(model, cache, mx.array(ids), step_size, prompt_progress_callback, options)
    seen = mx.array([*history, *ids])
    sampler = sampler or make_sampler()
    steps = following.follow(model, cache, logits, sampler, logits_processors or (), seen, budget, options)
    steps = reading.accompany(steps, ids)
    finisher = _Finisher(tokenizer, stop, budget, budget != max_tokens, lambda left: _room(model, cache, left, options))
    try:
        yield from _respond(steps, finisher, began, len(ids), prompt_progress_callback)
    finally:
        steps.close()


def _with_bits(options: RunOptions, bits: int) -> RunOptions:
    """The options with a KV cache of so many bits. Raises MlxeffError for bits that none has."""
    if bits not in (4, 8) or options.kv is not None:
        also = "" if options.kv is None else f" and options.kv {options.kv}"
        raise MlxeffError(f"kv_bits: wanted 4 or 8, and no other kind of KV cache, got {bits}{also}")
    return replace(options, kv=f"int{bits}")


def _drafting(draft: Model, model: Model, following: Following | None, count: int | None) -> Following:
    """The following with drafts of another model. Raises MlxeffError where that has another vocabulary."""
    if following is not None:
        raise MlxeffError("stream_generate: wanted draft_model or following, got both")
    _check_model(draft, "draft_model")
    if draft.vocab_size != model.vocab_size:
        rows = f"the model has {model.vocab_size} rows, the draft model {draft.vocab_size}"
        raise MlxeffError(f"draft_model: vocabulary mismatch: {rows}")
    return Speculation(ModelDraft(draft), "draft_model", count)


def make_prompt_cache(model: Model, max_kv_size: int | None = None) -> list[Cache]:
    """A new KV cache of `model` for `prompt_cache`, as the list of one member that mlx-lm's function of that name
    gives for a model of ours too. Raises MlxeffError for `max_kv_size`: this cache keeps every token."""
    _refuse("make_prompt_cache", {"max_kv_size": max_kv_size})
    return model.make_cache()


def _refuse(function: str, arguments: dict[str, object], stream: mx.Stream | None = None) -> None:
    """Raises MlxeffError for arguments of mlx-lm's `function` that were given and are not supported: each in
    `arguments` that is not None, and a stream of another device than the default one."""
    if names := [name for name, value in arguments.items() if value is not None]:
        raise MlxeffError(f"{function}: {' and '.join(names)} {'are' if names[1:] else 'is'} not supported")
    device = getattr(stream, "device", None)
    if device is not None and device.type != mx.default_device().type:
        raise MlxeffError(f"stream: wanted one of the default device, {mx.default_device()}, got one of {device}")


def _check_parts(model: Model, tokenizer: Tokenizer) -> None:
    """Raises MlxeffError for a model that is not one of `load`, and for a tokenizer that cannot stream text."""
    _check_model(model, "model")
    if not hasattr(tokenizer, "detokenizer"):
        got = f"{type(tokenizer).__module__}.{type(tokenizer).__name__}"
        raise MlxeffError(f"tokenizer: wanted one of mlxeff.load or mlx-lm's wrapper, got {got}")


def _check_model(model: Model, what: str) -> None:
    """Raises MlxeffError for a model that is not one of `load`; `what` is the argument's name."""
    if not hasattr(model, "new_cache"):
        raise MlxeffError(f"{what}: wanted one of mlxeff.load, got {type(model).__module__}.{type(model).__name__}")


def _one_cache(model: Model, given: Cache | list) -> Cache:
    """The cache for the model in what a caller gives: a cache, or a list as mlx-lm's `make_prompt_cache` returns it."""
    if isinstance(given, list | tuple):
        if len(given) == 1 and hasattr(given[0], "rewind"):
            return given[0]
        if hasattr(model, "wrap_cache"):
            return model.wrap_cache(list(given))
    elif hasattr(given, "rewind"):
        return given
    got = type(given[0] if isinstance(given, list | tuple) and given else given).__name__
    raise MlxeffError(f"prompt_cache: wanted one of mlxeff.make_prompt_cache(model), got a list or an object of {got}")


def _of_kind(model: Model, kind: str, cache: Cache, given: Cache | list) -> Cache:
    """An empty cache of `kind`, which takes the place of `cache` in the list `given`, as mlx-lm quantises the caches of
    a list. Raises MlxeffError for a cache that holds tokens, and for one that is not in a list."""
    if not cache.length and cache.kind is None and isinstance(given, list):
        given[:] = [model.new_cache(kind)]
        return given[0]
    got = f"one of {cache.kind or cache.stored_as or 'the type that the model computes'}"
    how = f'an empty list of mlxeff.make_prompt_cache(model) becomes one, and model.new_cache("{kind}") makes one'
    raise MlxeffError(f"prompt_cache: wanted a KV cache of the kind {kind}, got {got}: {how}")


def _respond(
    steps: Iterator[Step], finisher: "_Finisher", began: float, prompt_tokens: int, progress: Progress | None
) -> Iterator[GenerationResponse]:
    """The response to each step. `began` is the `time.perf_counter()` of the call."""
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


def prompt_ids(tokenizer: Tokenizer, prompt: str | mx.array | list[int]) -> list[int]:
    """Token ids of a prompt: with a BOS token before text, unless the text begins with it. Raises MlxeffError for an
    empty prompt."""
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


def _check_ids(ids: list[int], rows: int | None, tokenizer: Tokenizer) -> None:
    """Raises MlxeffError for ids without a row in the embedding table, which has `rows` rows (None: unknown). MLX would
    read memory outside of the table. Some tokenizers have tokens that their model lacks."""
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < (rows or 1 << 31):
            if isinstance(token, int) and 0 <= token < tokenizer.vocab_size:
                name = tokenizer.decode([token])
                raise MlxeffError(
                    f"prompt: the model has no token {name!r:.60}: its id is {token}, wanted one below {rows}"
                )
            raise MlxeffError(f"prompt: wanted token ids from 0 to {(rows or 1 << 31) - 1}, got {token!r:.60}")


def require_memory(model: Model, cache: Cache, tokens: int, step_size: int, options: RunOptions) -> None:
    """Raises MlxeffError where the memory that this process may use cannot hold the KV cache and the computation of
    `tokens` more tokens. Models that do not tell what they need are not checked."""
    if not hasattr(model, "prefill_bytes"):
        return

    def fits(have: float) -> str:
        low, high = 0, tokens
        while low < high:  # the largest number of tokens that fits
            middle = (low + high + 1) // 2
            enough = model.prefill_bytes(cache, middle, step_size, options) <= have
            low, high = (middle, high) if enough else (low, middle - 1)
        dials = "--kv-cache or --prefill-step" if model.seams else "--prefill-step"
        return f"about {low} tokens would, more with a smaller {dials}" if low else "none would"

    need = model.prefill_bytes(cache, tokens, step_size, options)
    memory.require(need, f"prompt: the KV cache and computation of {tokens} tokens", fits)


def _room(model: Model, cache: Cache, left: int, options: RunOptions) -> bool:
    """Whether the memory that this process may use holds the KV cache after the next pass, of an answer that may have
    `left` more tokens; a notice says where it does not. Models that do not tell what they need are not checked."""
    if not hasattr(model, "require_room"):
        return True
    try:
        model.require_room(cache, NEXT if left < 0 else min(left, NEXT), options)
    except MlxeffError as error:
        notices.warning("stopped: %s", error)
        return False
    return True


def fit_context(ids: list[int], cached: int, limit: int | None, max_tokens: int, truncate: bool) -> list[int]:
    """The prompt `ids` if they fit into the context of `limit` tokens after `cached` cached tokens.

    Of longer prompts `truncate` keeps the end, with a notice, where nothing is cached: it leaves room for `max_tokens`,
    at most half of the context. A BOS token at the beginning is dropped like any other. Raises MlxeffError otherwise.
    """
    if not limit or cached + len(ids) <= limit:
        return ids
    if not truncate or cached:
        raise MlxeffError(
            f"prompt: {cached + len(ids)} tokens, but the context is {limit} tokens (--truncate drops its beginning)"
        )
    room = limit // 2 if max_tokens < 0 else min(max_tokens, limit // 2)
    kept = max(1, limit - room)
    dropped = len(ids) - kept
    notices.warning("prompt truncated: dropped the first %d of %d tokens to fit %d", dropped, len(ids), limit)
    return ids[-kept:]


class _Finisher:
    """Turns tokens into final text, and decides when the generation ends.

    Text that may be the beginning of a stop string is kept in `pending` until the following text decides. `budget` is
    the largest number of tokens, -1 without one; `cut_by_context` says that the context limits it rather than the
    caller. `room`: the number of tokens that are left of the budget → whether there is memory to go on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str],
        budget: int,
        cut_by_context: bool,
        room: Callable[[int], bool] = lambda _: True,
    ):
        stop = [stop] if isinstance(stop, str) else list(stop)
        if any(not text for text in stop):
            raise MlxeffError("stop: wanted non-empty strings, got an empty one")
        self.detokenizer, self.eos, self.stop = tokenizer.detokenizer, tokenizer.eos_token_ids, stop
        self.budget, self.cut_by_context, self.room = budget, cut_by_context, room
        self.pending = ""

    def take(self, token: int, count: int) -> tuple[str, str | None]:
        """Add the `count`-th token; returns (text that is now final, finish reason or None)."""
        reason = "stop" if token in self.eos else None
        if reason is None:
            self.detokenizer.add_token(token)
            if count == self.budget:
                reason = "length"
                if self.cut_by_context:
                    notices.warning("stopped: the context is full")
            elif not self.room(max(self.budget - count, -1)):
                reason = "memory"
        if reason:
            self.detokenizer.finalize()
        self.pending += self.detokenizer.last_segment
        places = [self.pending.find(text) for text in self.stop]
        stops = [place for place in places if place >= 0]
        if stops:
            return self.pending[: min(stops)], "stop"
        final = len(self.pending) - (0 if reason else self._possible_stop())
        text, self.pending = self.pending[:final], self.pending[final:]
        return text, reason

    def _possible_stop(self) -> int:
        """Length of the longest end of the pending text that is the beginning of a stop string."""
        lengths = (n for text in self.stop for n in range(1, len(text)) if self.pending.endswith(text[:n]))
        return max(lengths, default=0)


@dataclass
class Session:
    """A model with a KV cache that is kept between prompts: of each prompt only the tokens after the longest common
    prefix with the cache are computed."""

    model: Model
    tokenizer: Tokenizer
    cache: Cache | None = None
    tokens: list[int] = field(default_factory=list)  # ids of the tokens in the cache
    prompt: list[int] = field(default_factory=list)  # ids of the last prompt, after truncation
    reused: int = 0  # how many tokens of the last prompt were taken from the cache
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
        """`stream_generate` for the prompt `ids`, which is the whole conversation: tokens in the cache are reused.
        `more`: arguments of `stream_generate`, which also names the errors."""
        self._require_precision(options)
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
        """Continue with the cache that `save` wrote to `path`. Nothing happens where the file does not exist yet.

        Keys and values of another precision than that of `options` are not reused: a notice says so, and the prompt is
        computed anew. A notice says too when the file has no token in common with the prompt `ids`. Raises MlxeffError
        for a file of another model (`fingerprint`), and for a folder that does not exist.
        """
        if not path.exists():
            if not path.absolute().parent.is_dir():
                raise MlxeffError(f"{path}: wanted an existing folder for the prompt cache, got none")
            return
        cache = self.model.new_cache(options.kv)
        try:
            tokens = cache.restore(path, fingerprint, options)
        except OtherPrecisionError as error:
            notices.warning("%s: not reused, computed anew", error)
            return
        if not common_prefix(tokens, ids[:-1]):
            notices.warning("%s: none of its %d tokens fit this prompt: computed anew", path, len(tokens))
        self.cache, self.tokens = cache, tokens

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the cache of the model with this `fingerprint` to `path`. A notice says when the cache is empty. Raises
        MlxeffError where the file cannot be written."""
        if self.cache is None or not self.tokens:
            notices.warning("%s: not written: the prompt was interrupted", path)
            return
        self.cache.save(path, self.tokens, fingerprint)

    def _require_precision(self, options: RunOptions) -> None:
        """Drop the cache, with a notice, where another arithmetic, or another share of the neurons, than that of
        `options` computed it."""
        computed = {ran.precision for ran in self.cache.tally} if self.cache is not None else set()
        if computed - {options.precision}:
            text = "KV cache: computed in %s products, wanted %s ones: not reused, computed anew"
            notices.warning(text, " + ".join(sorted(computed)), options.precision)
            self.cache, self.tokens = None, []

    def _rewind(self, shared: int, options: RunOptions) -> int:
        """Drop all cached tokens after the first `shared`; returns how many are left: fewer, with a notice, where the
        cache cannot go back to exactly that token."""
        kept = self.cache.rewind(shared) if shared < self.cache.length else shared
        if kept > shared:  # the cache cannot drop tokens: start with an empty one
            self.cache, kept = self.model.new_cache(options.kv), 0
        if kept < shared:
            notices.warning("KV cache: %d tokens recomputed, this model's cache cannot be taken back", shared - kept)
        self.tokens = self.tokens[:kept]
        return kept

    def _settle(self, tokens: list[int], complete: bool) -> None:
        """Note the ids of the cached tokens, which are the first of `tokens`. After an interrupted prefill (`complete`
        is false) the state of the cache is unknown, and the cache is dropped."""
        if complete and self.cache.length <= len(tokens):
            self.tokens = tokens[: self.cache.length]
        else:
            self.cache, self.tokens = None, []
