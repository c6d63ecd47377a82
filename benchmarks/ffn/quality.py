"""Quality: how the predictions of each arm compare with the dense model's.

Windows of 512 tokens of `data/jargon-validation.txt`. "all": every token at the share. "after": the first 256 tokens
are read with all neurons, and the others at the share, as GRIFFIN needs it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ffn import plan_ahead, rivals
from ffn.fits import FITS, WINDOW, always, fitted, taken
from mlxeff import calibration
from mlxeff.assembly.model import Loaded, load_path
from mlxeff.decode import prefill
from mlxeff.dynamoe.install import of
from mlxeff.dynamoe.sparse import SparseFeedForward
from mlxeff.eval.measures import compare, means
from mlxeff.models.decoder import DecoderModel
from mlxeff.ops import log_softmax
from mlxeff.running import EXACT, RunOptions
from places import TEXT

PROMPT = 256  # tokens of a window
SHARES = (0.95, 0.9, 0.8, 0.65, 0.5)
STATIC, PLANNED = "static widths", "plan-ahead router"
NAMES = [*FITS, STATIC, PLANNED, *rivals.RIVALS]
PLAN_TOKENS = 16384  # that the plan-ahead router is fitted on


class Truth:
    """Log-probabilities of the dense model in windows (W, T)."""

    def __init__(self, model: DecoderModel, windows: np.ndarray):
        self.windows = windows
        self._hidden = []
        for window in windows:
            self._hidden.append(model.hidden(mx.array(window)[None], model.new_cache())[0, :-1])
            mx.eval(self._hidden[-1])
        self.head = model.head

    def compared(self, found: Iterator[mx.array], start: int) -> dict:
        """How the log-probabilities of each window from token `start` on compare with the dense model's."""
        rows = []
        for window, hidden, log_probabilities in zip(self.windows, self._hidden, found, strict=True):
            true = log_softmax(self.head(hidden[start:]))
            rows.append(compare(log_probabilities, true, window[start + 1 :]))
        return means(rows)


def log_probabilities(
    model: DecoderModel, windows: np.ndarray, options: RunOptions, start: int, between: Callable = lambda _: None
) -> Iterator[mx.array]:
    """Log-probabilities of each window from token `start` on. The tokens before it are read with all neurons;
    `between` is called with whether what follows is to be computed at the share."""
    for window in windows:
        cache = model.new_cache()
        between(False)
        if start:
            mx.eval(prefill(model, cache, mx.array(window[:start]), WINDOW))
        between(True)
        logits = model(mx.array(window[None, start:]), cache, options)[0, :-1]
        mx.eval(logits)
        yield log_softmax(logits)


class Share:
    """The mean share of the neurons that tokens compute while it is on."""

    def __init__(self, model: DecoderModel, options: RunOptions):
        self._new, self._counted = (lambda: taken(model, options)), None
        self._shares: list[tuple[float, int]] = []

    def switch(self, on: bool) -> None:
        if self._counted is not None:
            report = self._counted.report()["dynamoe"]
            self._shares.append((report["mean_fraction"], report["tokens"]))
        self._counted = self._new() if on else None

    def mean(self) -> float:
        self.switch(False)
        return sum(share * tokens for share, tokens in self._shares) / sum(tokens for _, tokens in self._shares)


def own_rows(truth: Truth, model: DecoderModel, shares: tuple[float, ...]) -> Iterator[dict]:
    """The measurements of a fitted model."""
    networks = of(model)
    if any(isinstance(network, SparseFeedForward) for network in networks):
        model.native = None  # which leaves out inputs of few tokens only
        for network in networks:
            network.most_sparse = WINDOW
    for share in shares:
        options = RunOptions(fraction=share)
        for mode, start in (("all", 0), ("after", PROMPT)):
            counted = Share(model, options)
            found = truth.compared(log_probabilities(model, truth.windows, options, start, counted.switch), start)
            taken_share = counted.mean()
            read = [sum(each.read_bytes(part) for each in networks) for part in (taken_share, 1.0)]
            shares_of = {"share": round(taken_share, 4), "bytes": round(read[0] / read[1], 4)}
            yield {"wanted": share, **shares_of, "mode": mode, **found}


def static_rows(truth: Truth, model: DecoderModel) -> Iterator[dict]:
    """The measurements of the smaller experts, each for all tokens."""
    for number, width in enumerate(of(model)[0].widths[:-1]):
        share = width / of(model)[0].widths[-1]
        with always(model, number):
            for mode, start in (("all", 0), ("after", PROMPT)):
                found = truth.compared(log_probabilities(model, truth.windows, RunOptions(fraction=0.9), start), start)
                shares_of = dict.fromkeys(("wanted", "share", "bytes"), round(share, 4))
                yield {**shares_of, "mode": mode, **found}


def planned_rows(truth: Truth, dense: Loaded, folder: Path, shares: tuple[float, ...]) -> Iterator[dict]:
    """The measurements of the fitted model with a plan-ahead router in place of its own."""
    model = load_path(folder).model
    model.native = None
    text, _ = calibration.read_text(None)
    ids = calibration.windows(text, dense.tokenizer, PLAN_TOKENS, "text", dense.model.vocab_size)
    planner = plan_ahead.Planner(model, dense.model, ids)
    print(f"the router predicts {np.mean(planner.explained):.1%} of the errors' variance", file=sys.stderr)
    for share in shares:
        for mode, start in (("all", 0), ("after", PROMPT)):
            taken_shares: list[float] = []
            planned = plan_ahead.plans(planner, dense.model, truth.windows, share)

            def follow(follows: bool, planned=planned, start=start, taken_shares=taken_shares) -> None:
                if follows:
                    taken_shares.append(planner.follow(next(planned), start))

            options = RunOptions(fraction=share)
            found = truth.compared(log_probabilities(model, truth.windows, options, start, follow), start)
            read = dict.fromkeys(("share", "bytes"), round(float(np.mean(taken_shares)), 4))
            yield {"wanted": share, **read, "mode": mode, **found}


def scale_share(model: DecoderModel) -> float:
    """The share of the bytes of the feed-forward weights that are scales and biases of quantised groups."""
    names = [
        (name, array.nbytes) for layer in model.layers for name, array in tree_flatten(layer.feed_forward.parameters())
    ]
    return sum(size for name, size in names if name.endswith((".scales", ".biases"))) / sum(size for _, size in names)


def rival_rows(truth: Truth, source: Path, kind: str, shares: tuple[float, ...]) -> Iterator[dict]:
    """The measurements of a rival."""
    model = load_path(source).model
    networks = rivals.replace_all(model, kind)
    scales = scale_share(load_path(source).model) if issubclass(rivals.RIVALS[kind], rivals.Teal) else 0.0
    modes = [("after", PROMPT)] + ([] if kind == "griffin" else [("all", 0)])
    for share in shares:
        set_share = lambda follows, share=share: rivals.keep(networks, share if follows else 1.0)  # noqa: E731
        for mode, start in modes:
            found = truth.compared(log_probabilities(model, truth.windows, EXACT, start, set_share), start)
            read = {"share": share, "bytes": round(scales + (1 - scales) * share, 4)}
            yield {"wanted": share, **read, "mode": mode, **found}


def measure(options: argparse.Namespace, source: Path, document: dict, save: Callable[[], None]) -> None:
    """Measure the arms that the document lacks."""
    missing = [name for name in options.arms if name not in document["arms"]]
    if not missing:
        return
    dense = load_path(source)
    ids = dense.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    places = np.linspace(0, len(ids) - WINDOW, options.windows).astype(int)
    windows = np.stack([np.array(ids[place : place + WINDOW], np.int32) for place in places])
    truth = Truth(dense.model, windows)
    document["windows"] = len(windows)
    document["dense"] = {
        mode: truth.compared(log_probabilities(dense.model, windows, EXACT, start), start)
        for mode, start in (("all", 0), ("after", PROMPT))
    }
    for name in missing:
        print(name, file=sys.stderr)
        if name in rivals.RIVALS:
            rows = rival_rows(truth, source, name, SHARES)
        elif name == PLANNED:
            rows = planned_rows(truth, dense, fitted("DynaMoE", source, options.work), SHARES)
        else:
            model = load_path(fitted(name if name in FITS else "DynaMoE", source, options.work)).model
            rows = static_rows(truth, model) if name == STATIC else own_rows(truth, model, SHARES)
        document["arms"][name] = []
        for row in rows:
            print(row, file=sys.stderr)
            document["arms"][name].append(row)
        save()
