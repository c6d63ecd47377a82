"""What `generate` and `chat` share: loading the model of the options, one streamed answer, its statistics."""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import MlxeffError, notices
from . import output

SEED_BITS = 32


@dataclass
class Runner:
    """A loaded model with the options of the command line."""

    options: argparse.Namespace
    loaded: object
    session: object
    device: str
    seed: int
    load_seconds: float
    kv_prediction: object = None

    def stream(self, ids: list[int], answer: "Answer") -> Iterator[str]:
        """Text pieces of the answer to the conversation `ids`; what happened is noted in `answer`."""
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
                kv_prediction=self.kv_prediction,
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
        """Counts and timings of an answer. Seconds, tokens a second, GB (10^9 bytes)."""
        import mlx.core as mx

        last, fused = answer.last, getattr(self.loaded.model, "_fused", None)
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
            "backend": self.loaded.backend,
            "compute": fused and self.options.compute,
            "kv_dtype": fused and self.options.kv_dtype,
            "kv_prediction": self.kv_prediction and self.kv_prediction.report(),
        }


@dataclass
class Answer:
    """One generation as it grows."""

    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    last: object = None
    interrupted: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish_reason(self) -> str:
        """ "stop", "length" or "interrupted"."""
        return (self.last and self.last.finish_reason) or "interrupted"


def start(options: argparse.Namespace) -> Runner:
    """Load the model that the options name, on the device they name."""
    _check(options)
    import mlx.core as mx

    from .. import hub, kernels
    from ..generation import Session
    from ..loading import load_path
    from ..models.fused import set_precision

    device = kernels.use_device(options.device)
    with output.bar(f"fetching {options.model}", "B", options.quiet) as progress:
        path = hub.resolve(options.model, offline=options.offline, progress=progress)
    began = time.perf_counter()
    loaded = load_path(path, trust_remote_code=options.trust_remote_code)
    set_precision(loaded.model, options.compute, options.kv_dtype)
    session, pair = Session(loaded.model, loaded.tokenizer), _pair(options, loaded)
    seed = random.SystemRandom().getrandbits(SEED_BITS) if options.seed is None else options.seed
    mx.random.seed(seed)
    return Runner(options, loaded, session, device, seed, time.perf_counter() - began, pair)


def _pair(options: argparse.Namespace, loaded):
    """What `--kv-predict` names, None without it (`chat` has no such option)."""
    if not getattr(options, "kv_predict", None):
        return None
    from ..kv_pairs import load_pair

    folder, keep, refine = options.kv_predict
    pair = load_pair(folder, loaded, offline=options.offline)
    pair.keep, pair.refine = keep, refine
    return pair


def _check(options: argparse.Namespace) -> None:
    """Refuse contradictions before anything is loaded, and say what will be ignored."""
    from ..sampling import make_logits_processors, make_sampler

    make_sampler(options.temp, options.top_p, options.min_p, top_k=options.top_k)
    make_logits_processors(repetition_penalty=options.repetition_penalty)
    if getattr(options, "kv_predict", None) and options.prompt_cache:
        raise MlxeffError("--kv-predict: predicted KV is not for --prompt-cache: give one of the two")
    if any(not text for text in options.stop):
        raise MlxeffError("--stop: wanted a text, got an empty one")
    given = [f"--{name}" for name in ("top-p", "top-k", "min-p") if getattr(options, name.replace("-", "_"))]
    if options.temp == 0 and given:
        notices.warning("%s has no effect at temperature 0 (greedy): set --temp", " and ".join(given))
