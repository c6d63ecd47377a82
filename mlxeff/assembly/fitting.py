"""What `mlxeff fit` does, as Python calls: a technique's learned part, fitted to a model here.

`fit_kv_predictor` makes a pair of KV Prediction: the closed form on a text, then perhaps gradient training.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path

from .. import hub
from ..checkpoint import check_new, claim
from ..decode import require_seam
from ..errors import MlxeffError, notices
from ..kvprediction.files import PairConfig, write_pair
from ..kvprediction.fit import Fit, choose_layers, fit
from ..kvprediction.flops import parameters, ttft_flops
from ..kvprediction.layers import candidates, shared_layers
from ..kvprediction.predictor import Predictor, quantization, quantize, read_widths
from ..kvprediction.text import sample
from ..kvprediction.train import Training, check, train
from ..models.decoder import DecoderModel
from ..tuning import Tuned
from .model import Loaded, load_path
from .pair import SEAM, Auxiliary, make_auxiliary

TRAINING = {"batch": 1, "rate": 3e-4, "continuation": 64, "rank": 16, "aux_loss": 1.0}  # defaults
SEARCH_PIECES = 4  # of the text, to compare choices of layers on
NOT_KEPT = ("base", "aux", "out", "text", "train_text", "tokens", "map_bits", "offline")  # of a pair's provenance

# (title, unit) → a context that gives a callback (done, total), or None where nothing is shown
Progress = Callable[[str, str], AbstractContextManager[Callable[[int, int], None] | None]]


def no_progress(_title: str, _unit: str) -> AbstractContextManager[None]:
    """Shows nothing."""
    return contextlib.nullcontext()


@dataclass
class KvPredictorSettings:
    """What `mlxeff fit kv-predictor` is given; its help says what each means. None of `batch`, `rate`, `continuation`,
    `rank`, `aux_loss` is the default in TRAINING; given without the option that needs it, each is refused."""

    base: str
    aux: str
    out: str | Path
    text: str | Path | None = None
    tokens: int = 20000
    length: int = 512
    ridge: float = 1e-5
    inputs: str = "hidden"
    map_bits: int | None = None
    per_head: bool = False
    search: bool = False
    steps: int = 0
    train: str = "predictor"
    train_text: str | Path | None = None
    loss: str = "paper"
    continuation: int | None = None
    prompt_mark: str | None = None
    rank: int | None = None
    aux_loss: float | None = None
    batch: int | None = None
    rate: float | None = None
    seed: int = 0
    offline: bool = False

    def __post_init__(self):
        self._fill_in()
        self._check()

    def _fill_in(self) -> None:
        """The defaults of the training; refuses what would be ignored."""
        needs = {
            "batch": ("--steps", self.steps),
            "rate": ("--steps", self.steps),
            "continuation": ("--loss distill", self.loss == "distill"),
            "rank": ("--train lora", self.train == "lora"),
            "aux_loss": ("--train lora or full", self.train != "predictor"),
        }
        for name, (wanted, met) in needs.items():
            given = getattr(self, name)
            if given is not None and not met:
                raise MlxeffError(f"--{name.replace('_', '-')} {given}: wanted {wanted}, got none")
            if given is None:
                setattr(self, name, TRAINING[name])

    def _check(self) -> None:
        """Refuse contradictions."""
        if self.per_head and self.inputs != "own":
            raise MlxeffError(f"--per-head: wanted --inputs own, which have heads, got {self.inputs}")
        for name in ("ridge", "rate", "aux_loss"):
            if not getattr(self, name) >= 0:
                raise MlxeffError(f"--{name.replace('_', '-')}: wanted 0 or more, got {getattr(self, name)}")
        if self.train != "predictor" and not self.steps:
            raise MlxeffError(f"--train {self.train}: wanted --steps of 1 or more, got none")
        if self.loss == "distill" and not self.steps:
            raise MlxeffError("--loss distill: wanted --steps of 1 or more, got none")
        if self.train_text is not None and not self.steps:
            raise MlxeffError(f"--train-text {self.train_text}: wanted --steps of 1 or more, got none")
        if self.prompt_mark is not None and (self.loss != "distill" or not self.train_text):
            got = f"{self.loss}, {self.train_text or 'none'}"
            raise MlxeffError(f"--prompt-mark: wanted --loss distill and a --train-text, got {got}")

    @property
    def training(self) -> Training:
        return Training(
            self.steps,
            self.batch,
            self.rate,
            loss=self.loss,
            continuation=self.continuation,
            auxiliary_loss=self.aux_loss,
            seed=self.seed,
        )

    @property
    def unfinished(self) -> Path:
        """Where an unfinished training is kept: the same call goes on from there."""
        out = Path(self.out)
        return out.with_name(f"{out.name}.training")


def fit_kv_predictor(base: str, aux: str, out: str | Path, *, progress: Progress = no_progress, **settings) -> dict:
    """Fit a pair of KV Prediction for the model `base` (a folder, file, name or hub id) and write it to the new folder
    `out`; `aux` and `settings` are the options of `mlxeff fit kv-predictor`, with underscores.

    Returns the report that the command prints with --json, less its notices. Raises MlxeffError; `out` is then not
    made.
    """
    check_new(Path(out))
    if unknown := sorted(set(settings) - {field.name for field in fields(KvPredictorSettings)}):
        raise MlxeffError(f"fit_kv_predictor: unknown options {unknown}")
    with claim(Path(out)):  # so that no two processes write one unfinished training
        return _fit_kv_predictor(KvPredictorSettings(base, aux, out, **settings), progress)


def _fit_kv_predictor(settings: KvPredictorSettings, progress: Progress) -> dict:
    with progress(f"fetching {settings.base}", "B") as fetched:
        path = hub.resolve(settings.base, offline=settings.offline, progress=fetched)
    base, began = load_path(path), time.perf_counter()
    require_seam(base.model, SEAM, "KV prediction")
    # What can be refused at once comes before what takes minutes.
    given = _training_text(settings, base) if settings.train_text is not None else None
    searched = settings.aux.startswith("search:")
    auxiliary = None if searched else make_auxiliary(settings.aux, base, settings.offline)
    scheme = auxiliary and _quantization(settings, auxiliary.model)
    pieces = _sequences(settings, base)
    if searched:
        auxiliary = make_auxiliary(_found(settings, base.model, pieces), base)
        scheme = _quantization(settings, auxiliary.model)
    fitted, losses, tuned = _fit(settings, auxiliary, base.model, pieces, given, progress)
    if scheme:
        quantize(fitted.predictor, scheme)
    config = PairConfig(
        base={"name": settings.base, "fingerprint": base.fingerprint},
        auxiliary=auxiliary.config | ({"tuned": tuned.config} if tuned else {}),
        layer_map=fitted.predictor.layer_map,
        inputs=settings.inputs,
        shared=fitted.predictor.shared,
        quantization=scheme,
        provenance=_provenance(settings, fitted, losses),
    )

    def describe(partial: Path) -> PairConfig:
        if losses:
            _plot(losses, partial / "loss.png")
        return config

    write_pair(Path(settings.out), describe, fitted.predictor, tuned=tuned, half=True)
    if losses:
        settings.unfinished.unlink(missing_ok=True)
    if tuned:
        tuned.fold()
    return {
        "pair": str(settings.out),
        "base": config.base,
        "auxiliary": config.auxiliary,
        "layer_map": config.layer_map,
        "quantization": scheme,
        "tokens": fitted.tokens,
        "seconds": time.perf_counter() - began,
        "error": fitted.error,
        "errors": fitted.errors,
        "losses": losses,
        **_sizes(base.model, auxiliary.model, fitted.predictor),
    }


def _found(settings: KvPredictorSettings, base: DecoderModel, pieces: list[list[int]]) -> str:
    """The auxiliary of `search:FRACTION`: the layers with the least error on the first pieces."""
    choices = candidates(settings.aux.partition(":")[2], len(base.layers))
    best, errors = choose_layers(base, choices, pieces[:SEARCH_PIECES], settings.ridge, settings.inputs)
    for layers, error in zip(choices, errors, strict=True):
        notices.info("fit: layers %s: unexplained variance %.3f", ",".join(map(str, layers)), error)
    return "layers:" + ",".join(map(str, best))


def _quantization(settings: KvPredictorSettings, auxiliary: DecoderModel) -> dict | None:
    """The scheme that `map_bits` asks for; refused here, before the fit, where it does not divide what maps read."""
    if settings.map_bits is None:
        return None
    widths = read_widths(auxiliary.kv_shapes, settings.inputs, auxiliary.hidden_size)
    return quantization(settings.map_bits, widths)


def _fit(
    settings: KvPredictorSettings,
    auxiliary: Auxiliary,
    base: DecoderModel,
    pieces: list[list[int]],
    given: tuple[list[list[int]], list[int]] | None,
    progress: Progress,
) -> tuple[Fit, list[float], Tuned | None]:
    """(the closed form, perhaps trained on from there; the losses of the training; what was tuned of the auxiliary)."""
    training, ends = given or (pieces, [])
    if settings.steps:
        check(training, settings.training)  # before the closed form, which takes minutes
    models = auxiliary.model, base
    how = settings.ridge, settings.per_head, settings.search, settings.inputs
    # Layers that both have in common need no maps, unless the auxiliary's are tuned.
    shared = shared_layers(auxiliary.config.get("layers", ())) if settings.train == "predictor" else 0
    with progress("fitting", "tok") as fitting:
        fitted = fit(*models, auxiliary.layer_map, _counted(pieces, fitting), *how, shared=shared)
    if not settings.steps:
        return fitted, [], None
    tuned = None
    if settings.train != "predictor":
        tuned = Tuned(auxiliary.model, settings.train, settings.rank, settings.seed)
    with progress("training", "step") as steps:
        losses = train(fitted.predictor, *models, training, settings.training, settings.unfinished, steps, tuned, ends)
    return fitted, losses, tuned


def _training_text(settings: KvPredictorSettings, base: Loaded) -> tuple[list[list[int]], list[int]]:
    """(pieces of `train_text`; where prompts end in them, one after the other); refuses a text without the mark, or
    with nothing else."""
    tokenizer, text, mark = base.tokenizer, _read(settings.train_text), settings.prompt_mark
    parts = [_tokens(part, tokenizer) for part in (text.split(mark) if mark else [text])]
    if mark and len(parts) == 1:
        raise MlxeffError(f"{settings.train_text}: wanted {mark!r} where prompts end, got a text without it")
    ids, ends = list(itertools.chain(*parts)), list(itertools.accumulate(map(len, parts[:-1])))
    if not ids:
        raise MlxeffError(f"{settings.train_text}: wanted text to train on, got none")
    pieces, before = _pieces(ids, settings.length, tokenizer)
    # A piece may begin with more than its own tokens.
    ends = [end + before * (1 + end // (len(pieces[0]) - before)) for end in ends]
    if mark:
        notices.info("fit: %d prompts in %s", len(ends), settings.train_text)
    return pieces, ends


def _plot(losses: list[float], path: Path) -> None:
    """The loss of each step and its running mean as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        notices.warning("%s: not drawn: matplotlib is missing (pip install 'mlxeff[benchmarks]')", path.name)
        return
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.5, alpha=0.5, label="loss of a step")
    width = max(1, len(losses) // 50)
    sums = list(itertools.accumulate(losses, initial=0.0))
    means = [(sums[i + width] - sums[i]) / width for i in range(len(losses) - width + 1)]
    axes.plot(range(width, len(losses) + 1), means, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def _provenance(settings: KvPredictorSettings, fitted: Fit, losses: list[float]) -> dict:
    """How the pair came to be, for its config."""
    return {
        "method": "ridge, then gradient training" if losses else "ridge",
        "text": settings.text and Path(settings.text).name,
        "train_text": settings.train_text and Path(settings.train_text).name,
        **{f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_KEPT},
        "tokens": fitted.tokens,
        "errors": fitted.errors,  # of the closed form
        "losses": losses,
    }


def _sizes(base: DecoderModel, auxiliary: DecoderModel, predictor: Predictor) -> dict:
    """Parameter counts, and the FLOPs to the first token of 512 as a share of the base's."""
    sizes = [parameters(each) for each in (base, auxiliary, predictor)]
    counts = dict(zip(("base", "auxiliary", "predictor"), sizes, strict=True))
    return {"parameters": counts, "flops_ratio": ttft_flops(*sizes, 512) / (2 * sizes[0] * 512)}


def _sequences(settings: KvPredictorSettings, base: Loaded) -> list[list[int]]:
    """Pieces of the text, or of what the base writes, as the models read them: each begins with a BOS if the tokenizer
    adds one."""
    if settings.text is None:
        start = base.tokenizer.bos_token_id
        if start is None:
            raise MlxeffError(f"{settings.base}: wanted a token that text begins with (BOS), got none: name a --text")
        notices.info("fit: no --text: the base writes %d tokens itself", settings.tokens)
        return sample(base.model, start, settings.tokens, settings.length, settings.seed)
    ids = _tokens(_read(settings.text), base.tokenizer)
    if len(ids) < settings.tokens:
        notices.warning("%s: %d tokens, fewer than --tokens %d", settings.text, len(ids), settings.tokens)
    return _pieces(ids[: settings.tokens], settings.length, base.tokenizer)[0]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxeffError(f"{path}: wanted UTF-8 text: {error}") from error


def _tokens(text: str, tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _pieces(ids: list[int], length: int, tokenizer) -> tuple[list[list[int]], int]:
    """(pieces of at most `length` tokens; how many of these the tokenizer puts before each)."""
    start = tokenizer.encode("", add_special_tokens=True)
    step = max(1, length - len(start))
    return [start + ids[at : at + step] for at in range(0, len(ids), step)], len(start)


def _counted(pieces: Sequence[list[int]], progress: Callable[[int, int], None] | None) -> Iterator[list[int]]:
    """The pieces, with `progress` told of each that is done."""
    total, done = sum(map(len, pieces)), 0
    for piece in pieces:
        yield piece
        done += len(piece)
        if progress:
            progress(done, total)
