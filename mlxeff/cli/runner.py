"""The part that `generate` and `chat` share: loading the model that the options name, streaming an answer, its
statistics."""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import MlxeffError, notices
from . import output, streams
from .auto import decide

if TYPE_CHECKING:
    from ..assembly.model import Loaded
    from ..decode import Setup
    from ..generation import GenerationResponse, Session
    from ..tokenizer import Tokenizer

SEED_BITS = 32  # size of a random seed


@dataclass
class Runner:
    """A loaded model, the way in which it is run, and the options of the command line."""

    options: argparse.Namespace
    loaded: "Loaded"
    setup: "Setup"
    session: "Session"
    device: str
    seed: int
    load_seconds: float
    auto: dict | None = None  # what `--auto` chose, for `--json`

    def stream(self, ids: list[int], answer: "Answer") -> Iterator[str]:
        """Yield the text of the answer to the prompt `ids` piece by piece, and record the answer in `answer`."""
        from ..sampling import make_logits_processors, make_sampler

        options = self.options
        with output.bar("prefill", "tok", options.quiet) as progress:
            stream = self.session.stream(
                ids,
                max_tokens=options.max_tokens,
                sampler=make_sampler(options.temp, options.top_p, options.min_p, top_k=options.top_k),
                logits_processors=make_logits_processors(repetition_penalty=options.repetition_penalty),
                prefill_step_size=options.prefill_step,
                prompt_progress_callback=progress,
                stop=options.stop,
                context_limit=options.context_limit,
                truncate=options.truncate,
                reading=self.setup.reading,
                following=self.setup.following,
                options=self.setup.options,
            )
            try:
                for response in stream:
                    answer.last, answer.prompt_ids = response, self.session.prompt
                    answer.token_ids.append(response.token)
                    answer.pieces.append(response.text)
                    yield response.text
            except KeyboardInterrupt:
                answer.interrupted = True
            finally:
                stream.close()

    def stats(self, answer: "Answer") -> dict:
        """Counts and timings of an answer, as docs/json.md explains them: in seconds, tokens a second, GB (10^9
        bytes)."""
        import mlx.core as mx

        from ..assembly.techniques import reports

        last, ran, cache = answer.last, self.session.ran.report(), self.session.cache
        return {
            "prompt_tokens": len(answer.prompt_ids),
            "reused_tokens": self.session.reused,
            "generated_tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "load_s": self.load_seconds,
            "ttft_s": last.ttft if last else 0.0,
            "prefill_tps": last.prompt_tps if last else 0.0,
            "decode_tps": last.generation_tps if last else 0.0,
            "peak_memory_gb": last.peak_memory if last else mx.get_peak_memory() / 1e9,
            "device": self.device,
            "dtype": self.loaded.dtype,
            **ran,
            "kv_dtype": cache and cache.stored_as,
            "kv_bytes": cache and cache.nbytes,
            **reports(self.setup),
        }


@dataclass
class Answer:
    """One answer, which grows while it is generated."""

    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    last: "GenerationResponse | None" = None
    interrupted: bool = False
    failed: bool = False  # whether an error ended it

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    @property
    def finish_reason(self) -> str:
        """ "stop", "length", "memory", "error" or "interrupted"."""
        return (self.last and self.last.finish_reason) or ("error" if self.failed else "interrupted")


def start(options: argparse.Namespace, encode: "Callable[[Tokenizer], list[int]] | None" = None) -> Runner:
    """Load the model on the device, as the options say; `--auto` sets some of them. `encode` gives the ids of the
    prompt; None where it comes later. Raises MlxeffError where that fails."""
    _check(options)
    import mlx.core as mx

    from .. import hub, kernels
    from ..assembly.model import load_path
    from ..assembly.techniques import checked_before, run_options, switch_on
    from ..decode import Setup
    from ..generation import Session

    device = kernels.use_device(options.device)
    with output.bar(f"fetching {options.model}", "B", options.quiet) as progress:
        path = hub.resolve(options.model, offline=options.offline, progress=progress)
    began = time.perf_counter()
    loaded = load_path(
        path,
        dict.fromkeys(options.ignore_keys),
        trust_remote_code=options.trust_remote_code,
        check=checked_before(options),
    )
    read = time.perf_counter() - began
    chosen = decide(options, loaded, encode)
    began = time.perf_counter() - read  # without the time of choosing
    setup = switch_on(Setup(loaded.model, options=run_options(options)), loaded, options)
    loaded.model.check(setup.options)
    seed = random.SystemRandom().getrandbits(SEED_BITS) if options.seed is None else options.seed
    mx.random.seed(seed)
    session = Session(loaded.model, loaded.tokenizer)
    return Runner(options, loaded, setup, session, device, seed, time.perf_counter() - began, chosen)


def _check(options: argparse.Namespace) -> None:
    """Check the options before anything is loaded. Raises MlxeffError for contradictions; a notice says which options
    have no effect."""
    from ..assembly.techniques import check_switched
    from ..sampling import make_logits_processors, make_sampler

    make_sampler(options.temp, options.top_p, options.min_p, top_k=options.top_k)
    make_logits_processors(repetition_penalty=options.repetition_penalty)
    check_switched(options)
    if options.max_kl is not None and not options.auto:
        raise MlxeffError("--max-kl: wanted --auto with it, which chooses, got none")
    for name in ("system", "stop"):
        given = getattr(options, name)
        for text in [given] if isinstance(given, str) else given or ():
            streams.require_text(text, f"--{name}")
    if any(not text for text in options.stop):
        raise MlxeffError("--stop: wanted a text, got an empty one")
    filters = [f"--{name}" for name in ("top-p", "top-k", "min-p") if getattr(options, name.replace("-", "_"))]
    if options.temp == 0 and filters:
        notices.warning("%s has no effect at temperature 0 (greedy): set --temp", " and ".join(filters))
