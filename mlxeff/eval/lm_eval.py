"""An adapter with which lm-evaluation-harness (the package lm-eval) measures models that run here: the model `mlxeff`.

    python -m mlxeff.eval.lm_eval --model mlxeff --model_args pretrained=smollm2-135m,kv_cache=int4 --tasks arc_easy

Importing this module registers the model; run as a program it is the harness's own command with the model registered.
`pretrained` is the model's name, `step` the tokens of a pass as in `mlxeff eval`, `max_length` the context. Further
arguments are options of `mlxeff generate` that say how a model is run, with "_" for "-": `kv_predict=PAIR`,
`sensitivity=0.7`. The interface is that of lm-evaluation-harness 0.4 (docs/model_guide.md there).
"""

import argparse
import contextlib
import itertools
import sys

from tqdm import tqdm

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"mlxeff.eval.lm_eval: {error}: pip install 'mlxeff[lm-eval]'") from error

from .. import kernels
from ..assembly.fitting import no_progress
from ..assembly.techniques import Scored, check_scored
from ..errors import MlxeffError, no_notices, notices
from ..generation import stream_generate
from ..hub.catalog import DEFAULT_MODEL
from ..sampling import make_sampler
from .continuations import encode, encode_pair, likelihoods, prefix
from .subject import load
from .verbs import other_options

MAX_TOKENS = 256  # of an answer, where a task says nothing


@register_model("mlxeff")
class MlxeffLM(LM):
    """A model that runs here, for lm-evaluation-harness; one request at a time.

    pretrained  a folder, file, name or hub id
    device      "auto", "cpu" or "gpu"
    step        tokens of a pass after a context; 1 reads them one by one, as plain decoding does
    max_length  tokens of the context; None: the model's own limit
    options     how the model is run: options of `generate`, such as `kv_cache`

    `batch_size` and `max_batch_size` are accepted and have no effect. Raises MlxeffError.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        device: str | None = "auto",
        step: int = 256,
        max_length: int | None = None,
        offline: bool = False,
        batch_size: object = None,  # noqa: ARG002
        max_batch_size: object = None,  # noqa: ARG002
        **options: object,
    ):
        super().__init__()
        self._device = kernels.use_device(device or "auto")
        values = argparse.Namespace(**vars(_parsed(options)), offline=offline)
        self.subject = load(pretrained, values, no_progress)
        limit = self.subject.loaded.model.context_length
        if max_length and limit and int(max_length) > limit:
            raise MlxeffError(f"max_length: wanted at most the model's context of {limit} tokens, got {max_length}")
        self.step, self.max_length = int(step), int(max_length or limit or 2048)

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness's caches of requests."""
        return self.subject.loaded.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text of the chat template; "" where none is wanted or there is none."""
        return (self.subject.loaded.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the model's chat template."""
        tokenizer = self.subject.loaded.tokenizer
        return tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-likelihood of the continuation in nats, and whether greedy decoding
        would give it. A context that is too long loses its beginning, with a notice."""
        self._check()
        pairs = [encode_pair(self.subject.loaded.tokenizer, *request.args) for request in requests]
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for context, group in itertools.groupby(pairs, key=lambda pair: pair[0]):  # the choices of a question
                continuations = [tokens for _, tokens in group]
                found += self._scored(context, continuations)
                bar.update(len(continuations))
        for request, each in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, each)
        return found

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats. A text that is longer than the context is cut into windows, in which
        each token is scored once, as the harness wants it."""
        self._check()
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            tokenizer = self.subject.loaded.tokenizer
            ids = tokenizer.encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, prefix(tokenizer), self.max_length, 1)
            parts = (self._scored(context, [tokens]) for context, tokens in map(make_disjoint_window, windows))
            found.append(sum(total for ((total, _),) in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The answer to each (context, arguments of the generation), up to one of the texts in `until`, which is not
        part of it."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, how = request.args
            found.append(self._generated(context, dict(how)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _check(self) -> None:
        """Raises MlxeffError for techniques that change no log-likelihood."""
        check_scored(self.subject.values, self.subject.loaded, Scored(None, self.step))

    def _scored(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """For each continuation of the context its log-likelihood, and whether greedy decoding would give it."""
        longest = max(map(len, continuations))
        if longest > self.max_length:
            raise MlxeffError(f"loglikelihood: wanted at most {self.max_length} tokens, got {longest}")
        kept = self._end_of(context, self.max_length - longest + 1)
        found, _ = likelihoods(self.subject.setup, kept, continuations, self.step, self.subject.step_size)
        return [(each.total, each.greedy) for each in found]

    def _end_of(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids. A notice says where some are dropped."""
        if len(ids) > room:
            notices.warning("context: dropped the first %d of %d tokens to fit %d", len(ids) - room, len(ids), room)
        return ids[-room:]

    def _generated(self, context: str, how: dict) -> str:
        """The answer to one context."""
        until = how.pop("until", None) or []
        stop = [each for each in ([until] if isinstance(until, str) else until) if each]
        most = int(how.pop("max_gen_toks", how.pop("max_tokens", MAX_TOKENS)))
        most = min(most, self.max_length // 2)
        temperature = float(how.get("temperature") or 0) if how.get("do_sample", "temperature" in how) else 0.0
        sampler = make_sampler(temperature, float(how.get("top_p") or 0), top_k=int(how.get("top_k") or 0))
        tokenizer, setup = self.subject.loaded.tokenizer, self.subject.setup
        ids = encode(tokenizer, context) if context else [prefix(tokenizer)]
        ids = self._end_of(ids, self.max_length - most)
        with no_notices():
            responses = stream_generate(
                self.subject.loaded.model, tokenizer, ids, most, sampler=sampler,
                prompt_cache=setup.new_cache(), stop=stop,
                prefill_step_size=self.subject.values.prefill_step, reading=setup.reading, following=setup.following,
                options=setup.options,
            )  # fmt: skip
            with contextlib.closing(responses):
                return "".join(response.text for response in responses)


def _parsed(options: dict[str, object]) -> argparse.Namespace:
    """Keywords → the parsed options of the command line. Raises MlxeffError for unknown ones."""
    words = []
    for key, value in options.items():
        if value in (None, False):
            continue
        words.append(f"--{key.replace('_', '-')}")
        words += [] if value is True or value == "True" else [str(value)]
    try:
        return other_options(words)
    except argparse.ArgumentTypeError as error:
        raise MlxeffError(f"lm-eval: model_args: {error}") from None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MlxeffError as error:
        sys.exit(f"mlxeff: error: {error}")
