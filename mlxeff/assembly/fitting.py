"""`mlxeff fit` as Python calls: they fit the learned part of a technique to a model, on this machine.

`fit_kv_predictor` makes a KV Prediction pair. The linear maps of its predictor are fitted to a text in closed form
(ridge regression), and then trained further by gradient steps if the settings say so.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

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
from ..tokenizer import Tokenizer
from ..tuning import Tuned
from .model import Loaded, load_path
from .pair import SEAM, Auxiliary, make_auxiliary

TRAINING = {"batch": 1, "rate": 3e-4, "continuation": 64, "rank": 16, "aux_loss": 1.0}  # defaults for training
SEARCH_PIECES = 4  # pieces of the text on which choices of layers are compared
# Settings that are not copied into the provenance of a pair's config, because other entries have them or they are
# paths.
NOT_KEPT = ("base", "aux", "out", "text", "train_text", "tokens", "map_bits", "offline")

Settings = TypeVar("Settings")
# (title, unit) → a context manager that gives a callback for (done, total), or None where no progress is shown.
Progress = Callable[[str, str], AbstractContextManager[Callable[[int, int], None] | None]]


class NotWrittenError(MlxeffError):
    """The pair was fitted and could not be written. `report` is what `fit_kv_predictor` would have returned."""

    def __init__(self, message: str, report: dict):
        super().__init__(message)
        self.report = report


def no_progress(_title: str, _unit: str) -> AbstractContextManager[None]:
    """The `Progress` that shows nothing."""
    return contextlib.nullcontext()


@dataclass
class KvPredictorSettings:
    """The options of `mlxeff fit kv-predictor`, which its help explains, with "_" in place of "-".

    `batch`, `rate`, `continuation`, `rank` and `aux_loss` apply only together with another option. Where they are None,
    they become the default in TRAINING. Raises MlxeffError for contradictions, and for these five without the option
    that they need.
    """

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
    ignore_keys: Sequence[str] = ()
    offline: bool = False

    def __post_init__(self):
        self._fill_in()
        self._check()

    def _fill_in(self) -> None:
        """Set the defaults of the training. Raises MlxeffError for an option that would have no effect."""
        needs = {
            "batch": ("--steps", self.steps),
            "rate": ("--steps", self.steps),
            "continuation": ("--loss distill", self.loss == "distill"),
            "rank": ("--train lora", self.train == "lora"),
            "aux_loss": ("--train lora or full", self.train != "predictor"),
        }
        for name, (needed, met) in needs.items():
            value = getattr(self, name)
            if value is not None and not met:
                raise MlxeffError(f"--{name.replace('_', '-')} {value}: wanted {needed}, got none")
            if value is None:
                setattr(self, name, TRAINING[name])

    def _check(self) -> None:
        """Raises MlxeffError for contradictions."""
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
        """The settings of the gradient steps."""
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
        """The path where the state of an interrupted training is kept, from which the same call continues."""
        out = Path(self.out)
        return out.with_name(f"{out.name}.training")


def fit_kv_predictor(base: str, aux: str, out: str | Path, *, progress: Progress = no_progress, **settings) -> dict:
    """Fit a KV Prediction pair for the model `base` (a folder, file, alias or hub id) and write it to the new folder
    `out`. `aux` and `settings` are the options of `mlxeff fit kv-predictor`, see `KvPredictorSettings`.

    Returns the report that the command prints with `--json`, without the notices. Raises MlxeffError for invalid
    settings, models and texts; `out` does not exist then. Where only writing failed, it raises NotWrittenError, which
    has the report.
    """
    with settled(KvPredictorSettings, "fit_kv_predictor", base, aux, out=out, **settings) as checked:
        return _fit_kv_predictor(checked, progress)


@contextlib.contextmanager
def settled(kind: type[Settings], function: str, *names: str, out: str | Path, **settings) -> Iterator[Settings]:
    """The settings of a fit, of the dataclass `kind`, whose first fields are `names`. The new path `out` is this
    process's inside the block, so that no two write one unfinished fit. Raises MlxeffError for options that `function`
    does not have, for invalid ones, and where `out` exists or another process makes it."""
    check_new(Path(out))
    if unknown := sorted(set(settings) - {field.name for field in fields(kind)}):
        raise MlxeffError(f"{function}: unknown options {unknown}")
    with claim(Path(out)):
        yield kind(*names, out=out, **settings)


def _fit_kv_predictor(settings: KvPredictorSettings, progress: Progress) -> dict:
    """`fit_kv_predictor` with checked settings."""
    with progress(f"fetching {settings.base}", "B") as fetched:
        path = hub.resolve(settings.base, offline=settings.offline, progress=fetched)
    base, began = load_path(path, dict.fromkeys(settings.ignore_keys)), time.perf_counter()
    require_seam(base.model, SEAM, "KV prediction")
    # Input that can be refused at once is read before anything that takes minutes.
    training_text = _training_text(settings, base) if settings.train_text is not None else None
    searched = settings.aux.startswith("search:")
    auxiliary = None if searched else make_auxiliary(settings.aux, base, settings.offline)
    scheme = auxiliary and _quantization(settings, auxiliary.model)
    pieces = _sequences(settings, base)
    if searched:
        auxiliary = make_auxiliary(_searched_layers(settings, base.model, pieces), base)
        scheme = _quantization(settings, auxiliary.model)
    fitted, losses, tuned = _fit(settings, auxiliary, base.model, pieces, training_text, progress)
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

    failure = None
    try:
        write_pair(Path(settings.out), describe, fitted.predictor, tuned=tuned, half=True)
    except MlxeffError as error:
        failure = str(error)
    if losses and failure is None:
        settings.unfinished.unlink(missing_ok=True)
    if tuned:
        tuned.fold()
    report = {
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
    if failure is not None:
        raise NotWrittenError(failure, report)
    return report


def _searched_layers(settings: KvPredictorSettings, base: DecoderModel, pieces: list[list[int]]) -> str:
    """The description "layers:…" of the auxiliary for "search:FRACTION": of all candidates, the layers with the least
    error on the first pieces of the text."""
    choices = candidates(settings.aux.partition(":")[2], len(base.layers))
    best, errors = choose_layers(base, choices, pieces[:SEARCH_PIECES], settings.ridge, settings.inputs)
    for layers, error in zip(choices, errors, strict=True):
        notices.info("fit: layers %s: unexplained variance %.3f", ",".join(map(str, layers)), error)
    return "layers:" + ",".join(map(str, best))


def _quantization(settings: KvPredictorSettings, auxiliary: DecoderModel) -> dict | None:
    """The parameters of the maps' quantisation, None for dense maps. Raises MlxeffError, before the fit, where no group
    size divides the width of the maps' inputs."""
    if settings.map_bits is None:
        return None
    widths = read_widths(auxiliary.kv_shapes, settings.inputs, auxiliary.hidden_size)
    return quantization(settings.map_bits, widths)


def _fit(
    settings: KvPredictorSettings,
    auxiliary: Auxiliary,
    base: DecoderModel,
    pieces: list[list[int]],
    training_text: tuple[list[list[int]], list[int]] | None,
    progress: Progress,
) -> tuple[Fit, list[float], Tuned | None]:
    """Fit the predictor in closed form, and train it if the settings say so: (the fit, whose predictor is trained; the
    loss of each step; the tuned parts of the auxiliary, None where it is unchanged)."""
    training, ends = training_text or (pieces, [])
    if settings.steps:
        check(training, settings.training)  # before the closed form, which takes minutes
    models = auxiliary.model, base
    how = settings.ridge, settings.per_head, settings.search, settings.inputs
    # Layers that the auxiliary shares with the base need no maps, unless they are tuned.
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
    """(The pieces of `train_text`; the places where prompts end, counted in tokens of all pieces one after the other).
    Raises MlxeffError for an empty text, and for one without the mark of `prompt_mark`."""
    tokenizer, text, mark = base.tokenizer, _read(settings.train_text), settings.prompt_mark
    parts = [_tokens(part, base) for part in (text.split(mark) if mark else [text])]
    if mark and len(parts) == 1:
        raise MlxeffError(f"{settings.train_text}: wanted {mark!r} where prompts end, got a text without it")
    ids, ends = list(itertools.chain(*parts)), list(itertools.accumulate(map(len, parts[:-1])))
    if not ids:
        raise MlxeffError(f"{settings.train_text}: wanted text to train on, got none")
    pieces, added = _pieces(ids, settings.length, tokenizer)
    # Each piece begins with `added` tokens, such as BOS, that are not part of the text.
    ends = [end + added * (1 + end // (len(pieces[0]) - added)) for end in ends]
    if mark:
        notices.info("fit: %d prompts in %s", len(ends), settings.train_text)
    return pieces, ends


def _plot(losses: list[float], path: Path) -> None:
    """Draw the loss of each step and its moving average into a PNG file. A notice says where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        notices.warning("%s: not drawn: matplotlib is missing (pip install 'mlxeff[benchmarks]')", path.name)
        return
    try:
        _draw(losses, path, Figure(figsize=(7, 4)))
    except (OSError, ValueError, RuntimeError) as error:  # the pair does not depend on its picture
        notices.warning("%s: not drawn: %s", path.name, " ".join(str(error).split())[:200])


def _draw(losses: list[float], path: Path, figure) -> None:
    """The loss of each step and its running mean on the empty `figure` of matplotlib, written to `path`."""
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.5, alpha=0.5, label="loss of a step")
    width = max(1, len(losses) // 50)
    sums = list(itertools.accumulate(losses, initial=0.0))
    means = [(sums[i + width] - sums[i]) / width for i in range(len(losses) - width + 1)]
    axes.plot(range(width, len(losses) + 1), means, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def _provenance(settings: KvPredictorSettings, fitted: Fit, losses: list[float]) -> dict:
    """The entry `provenance` of the pair's config: how the pair was made."""
    return {
        "method": "ridge, then gradient training" if losses else "ridge",
        "text": settings.text and Path(settings.text).name,
        "train_text": settings.train_text and Path(settings.train_text).name,
        **{f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_KEPT},
        "tokens": fitted.tokens,
        "errors": fitted.errors,  # unexplained variance of the closed form
        "losses": losses,
    }


def _sizes(base: DecoderModel, auxiliary: DecoderModel, predictor: Predictor) -> dict:
    """The report's parameter counts, and the FLOPs to the first token of a prompt of 512 tokens, as a share of the
    FLOPs of the base alone."""
    sizes = [parameters(model) for model in (base, auxiliary, predictor)]
    counts = dict(zip(("base", "auxiliary", "predictor"), sizes, strict=True))
    return {"parameters": counts, "flops_ratio": ttft_flops(*sizes, 512) / (2 * sizes[0] * 512)}


def _sequences(settings: KvPredictorSettings, base: Loaded) -> list[list[int]]:
    """Token ids of the pieces of the text, or of text that the base generates. Each piece begins with BOS if the
    tokenizer adds it. Raises MlxeffError for a text that cannot be read."""
    if settings.text is None:
        start = base.tokenizer.bos_token_id
        if start is None:
            raise MlxeffError(f"{settings.base}: wanted a token that text begins with (BOS), got none: name a --text")
        notices.info("fit: no --text: the base writes %d tokens itself", settings.tokens)
        return sample(base.model, start, settings.tokens, settings.length, settings.seed)
    ids = _tokens(_read(settings.text), base)
    if len(ids) < settings.tokens:
        notices.warning("%s: %d tokens, fewer than --tokens %d", settings.text, len(ids), settings.tokens)
    return _pieces(ids[: settings.tokens], settings.length, base.tokenizer)[0]


def _read(path: str | Path) -> str:
    """The text in a UTF-8 file. Raises MlxeffError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxeffError(f"{path}: wanted UTF-8 text: {error}") from error


def _tokens(text: str, base: Loaded) -> list[int]:
    """Token ids of a text without BOS and EOS. Raises MlxeffError for a token that the model lacks."""
    ids, rows = base.tokenizer.encode(text, add_special_tokens=False), base.model.vocab_size
    if max(ids, default=0) >= rows:
        name = base.tokenizer.decode([max(ids)])
        raise MlxeffError(f"text: the model has no token {name!r:.60}: its id is {max(ids)}, wanted one below {rows}")
    return ids


def _pieces(ids: list[int], length: int, tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
    """(Pieces of at most `length` tokens; the number of tokens, such as BOS, that begin each piece)."""
    start = tokenizer.encode("", add_special_tokens=True)
    step = max(1, length - len(start))
    return [start + ids[at : at + step] for at in range(0, len(ids), step)], len(start)


def _counted(pieces: Sequence[list[int]], progress: Callable[[int, int], None] | None) -> Iterator[list[int]]:
    """The pieces; `progress` is called with the number of tokens when the next one is asked for."""
    total, done = sum(map(len, pieces)), 0
    for piece in pieces:
        yield piece
        done += len(piece)
        if progress:
            progress(done, total)
