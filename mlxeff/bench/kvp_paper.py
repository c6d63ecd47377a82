"""The suite `kvp-paper`: the models, batches and prompt lengths of the KV Prediction paper (arXiv 2410.08391), and the
numbers that the paper prints for them.

The models are OpenELM 1.1B and 3B, the smaller OpenELMs, the layer-pruned baselines and the eleven pairs of KV
Prediction. Where the user names no checkpoint, weights are random: the time to first token (TTFT) does not depend on
their values. The paper's baselines that prune tokens (RP, SP, LazyLLM) are left out.

The paper measured on the CPU of an M2 Pro. It does not state the numeric type, threads, software and repetitions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..assembly.model import build_model, load_model
from ..decode import Setup, require_seam
from ..errors import notices
from ..kernels import arithmetic_dtype
from ..kvprediction import KvPrediction
from ..kvprediction.layers import PUBLISHED, kept_layers, pruned_map, spread_map
from ..models.decoder import DecoderModel
from ..models.openelm import SIZES as SHAPES
from ..models.openelm import published_config
from ..ops import native_for
from .arms import Arm, random_predictor, randomise
from .points import Point
from .published import line
from .rounds import Group

MACHINE = "M2 Pro CPU"
POINTS = [Point(batch, tokens) for batch in (1, 4, 8) for tokens in (64, 128, 256, 512, 1024)] + [Point(64, 59)]
SIZES = tuple(size.replace("_", ".") for size in SHAPES)


@dataclass(frozen=True)
class Published:
    """The paper's numbers for a model: the reduction of FLOPs against the base as a factor (`flops`), and at batch 64 x
    59 tokens the TTFT in seconds (`ttft_s`) and its reduction as a factor. None: not printed."""

    flops: float
    ttft_s: float | None = None
    reduction: float | None = None


TABLE_5 = {  # OpenELM 1.1B
    "OE1.1B": Published(1.00, 5.59, 1.00),
    "OE450M": Published(2.36, 2.58, 2.17),
    "OE270M": Published(3.98, 1.67, 3.34),
    "OE1.1B-LP-0.75": Published(1.34, 4.08, 1.37),
    "OE1.1B-LP-0.50": Published(1.93, 2.78, 2.01),
    "OE1.1B-LP-0.25": Published(3.60, 1.46, 3.82),
    "OE1.1B-KVP-C-450M": Published(2.36, 3.17, 1.76),
    "OE1.1B-KVP-C-270M": Published(3.98, 2.24, 2.50),
    "OE1.1B-KVP-LP-0.75": Published(1.34, 4.63, 1.21),
    "OE1.1B-KVP-LP-0.50": Published(1.93, 3.33, 1.68),
    "OE1.1B-KVP-LP-0.25": Published(3.60, 2.05, 2.73),
}
TABLE_6 = {  # OpenELM 3B; the paper prints no times for it
    "OE3B": Published(1.00),
    "OE3B-LP-0.75": Published(1.34),
    "OE3B-LP-0.50": Published(1.97),
    "OE3B-LP-0.25": Published(3.84),
    "OE3B-KVP-C-1.1B": Published(2.81),
    "OE3B-KVP-C-450M": Published(6.64),
    "OE3B-KVP-C-270M": Published(11.18),
    "OE3B-KVP-LP-0.75": Published(1.34),
    "OE3B-KVP-LP-0.50": Published(1.97),
    "OE3B-KVP-LP-0.25": Published(3.84),
}
TABLES = {"OE1.1B": TABLE_5, "OE3B": TABLE_6}
AT_TABLE_5 = Point(64, 59)
# Figure 1: the TTFT in seconds, and as a multiple (`steps`) of the time of a decode step.
FIGURE_1 = {"arm": "OE3B", "point": Point(1, 1024), "ttft_s": 4.8, "steps": 12}
# Figure 5b: the first model's TTFT is 10 to 20 % above the second's, at this batch and from 128 to 1024 prompt tokens.
FIGURE_5B = ("OE1.1B-KVP-C-450M", "OE450M", 8, (128, 1024))
SOURCE = "KV Prediction (arXiv 2410.08391)"
WHERE = f"{MACHINE}; numeric type and threads not stated"
NOTE = "Table 3 prints 3.59 for the FLOPs reduction of OE1.1B-KVP-LP-0.25, Table 5 3.60"


def groups(dtype: mx.Dtype, checkpoints: dict[str, Path], ignored: Sequence[str] = ()) -> list[Group]:
    """A group of arms for each base model.

    dtype: type of random weights. checkpoints: size of an OpenELM, such as "1.1B" → the folder of its checkpoint, which
    is used in place of random weights. ignored: entries of their config.json to read as absent.
    """
    return [Group(list(table), Builder(dtype, checkpoints, ignored, base), POINTS) for base, table in TABLES.items()]


@dataclass
class Builder:
    """`builder(names)` builds the arms with these names, all for the base model `base`. The arms share the weights of
    base and auxiliaries."""

    dtype: mx.Dtype
    checkpoints: dict[str, Path]
    ignored: Sequence[str]
    base: str

    def __call__(self, names: Sequence[str]) -> list[Arm]:
        self._models = {}
        return [self._arm(name) for name in names]

    def _arm(self, name: str) -> Arm:
        if name in PUBLISHED:
            return self._pair(name)
        size, _, keep = name.removeprefix("OE").partition("-LP-")
        return Arm(name, Setup(self._pruned(size, keep) if keep else self._model(size)))

    def _pair(self, name: str) -> Arm:
        pair, base = PUBLISHED[name], self._model(self.base.removeprefix("OE"))
        count = len(base.layers)
        if pair.keep:
            kept = kept_layers(pair.keep, count)
            auxiliary, layer_map = base.pruned(kept), pruned_map(kept, count)
        else:
            auxiliary = self._model(pair.auxiliary.replace("_", "."))
            layer_map = spread_map(len(auxiliary.layers), count)
        predictor = random_predictor(auxiliary, base, layer_map, self._type())
        return Arm(name, Setup(base, KvPrediction(auxiliary, predictor, name)))

    def _pruned(self, size: str, keep: str) -> DecoderModel:
        base = self._model(size)
        return base.pruned(kept_layers(keep, len(base.layers)))

    def _model(self, size: str) -> DecoderModel:
        if size not in self._models:
            self._models[size] = self._load(size)
        return self._models[size]

    def _load(self, size: str) -> DecoderModel:
        if size in self.checkpoints:
            path = self.checkpoints[size]
            return _of_size(load_model(path, self.ignored)[0], size, path)
        model = build_model(published_config(size.replace(".", "_")))
        randomise(model, self._type())
        return model

    def _type(self) -> mx.Dtype:
        """The type of random weights: `dtype`, but on a CPU without native kernels the type in which MLX computes."""
        return self.dtype if native_for() else arithmetic_dtype(self.dtype, False)


def _of_size(model: DecoderModel, size: str, origin: Path) -> DecoderModel:
    """`model`, with a warning where it has other numbers of layers and hidden units than OpenELM of size `size`. Raises
    MlxeffError where it lacks the seam "kv"."""
    require_seam(model, "kv", f"{origin}: the suite")
    published, own = SHAPES[size.replace(".", "_")][:2], (len(model.layers), model.hidden_size)
    if published != own:
        text = "%s stands for OpenELM-%s, %d layers of %d, but has %d layers of %d"
        notices.warning(text, origin, size, *published, *own)
    return model


def published(rows: Sequence[dict], arms: dict[str, dict]) -> list[dict]:
    """The paper's numbers beside ours: `rows` of the result, and the descriptions of its `arms`."""
    found = {(r["device"], r["batch"], r["tokens"], r["arm"], r["metric"]): r["median"] for r in rows}
    devices = list(dict.fromkeys(key[0] for key in found))
    lines = [each for device in devices for each in [*_table_5(found, device), *_figures(found, device)]]
    return [*lines, *_flops(arms)]


def _table_5(found: dict[tuple, float], device: str) -> Iterator[dict]:
    """The TTFT and its reduction in Table 5."""
    place, source = (device, AT_TABLE_5.batch, AT_TABLE_5.tokens), f"{SOURCE}, Table 5, {WHERE}"
    base = found.get((*place, "OE1.1B", "ttft_s"))
    for arm, theirs in TABLE_5.items():
        mine = found.get((*place, arm, "ttft_s"))
        if mine is None:
            continue
        where = {"arm": arm, "test": AT_TABLE_5.test, "source": source, "device": device}
        yield line("TTFT", metric="ttft_s", unit="s", ours=mine, theirs=theirs.ttft_s, **where)
        ratio = base / mine if base else None
        yield line("TTFT reduction", metric="ttft_reduction", unit="x", ours=ratio, theirs=theirs.reduction, **where)


def _figures(found: dict[tuple, float], device: str) -> Iterator[dict]:
    """What the paper's text states of Figures 1 and 5b."""
    point = FIGURE_1["point"]
    place = (device, point.batch, point.tokens, FIGURE_1["arm"])
    if seconds := found.get((*place, "ttft_s")):
        where = {"arm": FIGURE_1["arm"], "test": point.test, "source": f"{SOURCE}, Figure 1, {WHERE}", "device": device}
        yield line("TTFT", metric="ttft_s", unit="s", ours=seconds, theirs=FIGURE_1["ttft_s"], **where)
        decode = found.get((*place, "decode_tps"))
        steps = seconds * decode if decode else None
        theirs = FIGURE_1["steps"]
        yield line("TTFT in decode steps", metric="ttft_steps", unit="steps", ours=steps, theirs=theirs, **where)
    mine, other, batch, ends = FIGURE_5B
    for tokens in sorted({key[2] for key in found if key[:2] == (device, batch) and ends[0] <= key[2] <= ends[1]}):
        pair, model = (found.get((device, batch, tokens, arm, "ttft_s")) for arm in (mine, other))
        if pair and model:
            more = pair / model - 1
            where = {"arm": mine, "test": Point(batch, tokens).test, "source": f"{SOURCE}, Figure 5b, {WHERE}"}
            what = f"TTFT above that of {other}"
            theirs = "0.10 to 0.20"
            yield line(what, metric="ttft_excess", unit="", ours=more, theirs=theirs, device=device, **where)


def _flops(arms: dict[str, dict]) -> Iterator[dict]:
    """The FLOPs reductions: the paper's definition, parameters of the base by those of the auxiliary, with our counts;
    and that of all FLOPs to the first token, with those of the predictor and of the base's last token."""
    for base, table in TABLES.items():
        whole = arms.get(base)
        for name, theirs in table.items():
            if whole is None or name not in arms:
                continue
            mine = arms[name]
            counted = whole["base"] / mine.get("auxiliary", mine["base"])
            full = whole["flops_512"] / mine["flops_512"]
            where = {
                "arm": name,
                "metric": "flops_reduction",
                "unit": "x",
                "source": f"{SOURCE}, Tables 5 and 6. {NOTE}",
            }
            yield line("FLOPs reduction", test="", ours=counted, theirs=theirs.flops, **where)
            what = "FLOPs reduction with predictor and last token"
            yield line(what, test="pp512", ours=full, theirs=None, **where)
