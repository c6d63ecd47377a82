"""The pairs that are measured: closed-form ones are made here where they are missing, trained ones are named.

A pair is fitted to half of the converter's calibration text and half of what the base model writes by itself.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from mlxeff import hub
from mlxeff.bench.arms import Arm
from mlxeff.cli import main as mlxeff
from mlxeff.errors import MlxeffError
from mlxeff.kv_pairs import load_pair
from mlxeff.kvprediction.layers import kept_layers
from mlxeff.kvprediction.text import sample
from mlxeff.loading import Loaded, load_path
from mlxeff.models.fused import fuse

from .measures import Reader
from .training_text import CALIBRATION

CLOSED_FORM = (
    "lp:0.75",
    "lp:0.50",
    "lp:0.25",
    "layers:0-21",
    "layers:0-18",
    "layers:0-14",
    "layers:0-7",
    "lp:0.50 own",
)
FRACTIONS = ("0.75", "0.50", "0.25")
LENGTH, SEED = 512, 0  # tokens of a piece; of the base's own text
KEEPS = (16, 64, 128, 256, 384)
DIALLED = tuple(
    f"KVP {name}{how}" for name in ("lp:0.50", "layers:0-14") for how in ("", " distilled")
)  # their dials too


def make(recipe: str, model: str, work: Path, tokens: int) -> Path:
    """The closed-form pair of `recipe`, an auxiliary and perhaps what the maps read ("lp:0.50 own"), fitted on `tokens`
    tokens unless it is there."""
    folder = work / re.sub(r"[^\w.]+", "-", f"{recipe}-{tokens}")
    if not folder.exists():
        auxiliary, _, inputs = recipe.partition(" ")
        options = ["--aux", auxiliary, "--out", folder, "--text", _text(model, work, tokens), "--tokens", tokens]
        options += ["--inputs", inputs or "hidden"]
        code = mlxeff(["fit", "kv-predictor", model, *map(str, options), "--length", str(LENGTH)])
        if code:
            raise MlxeffError(f"kvp_quality: fitting {recipe} failed")
    return folder


def _text(model: str, work: Path, tokens: int) -> Path:
    """A file of which the first `tokens` tokens are the model's own and the calibration text's, by turns."""
    path = work / f"fit-{tokens}.txt"
    if not path.exists():
        loaded = load_path(hub.resolve(model))
        tokenizer, half = loaded.tokenizer, tokens // 2
        drawn = sample(loaded.model, tokenizer.bos_token_id, half, LENGTH, SEED)
        read = tokenizer.encode(CALIBRATION.read_text(encoding="utf-8"), add_special_tokens=False)
        pieces = []
        for number, own in enumerate([*drawn, []]):  # a piece more of the text, since decoding may lose some tokens
            pieces += [own[1:], read[number * LENGTH : (number + 1) * LENGTH]]
        partial = path.with_suffix(".partial")
        partial.write_text("\n\n".join(tokenizer.decode(piece) for piece in pieces), encoding="utf-8")
        partial.replace(path)
    return path


def digest(folder: Path) -> str:
    """Tells one pair from another of the same name."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def readers(base: Loaded, pairs: dict[str, Path], pruned: dict[str, Path]) -> dict[str, Reader]:
    """What is measured, by name: the base, the layer-pruned baselines (`pruned`: trained ones, each a model or a pair
    whose auxiliary is meant), and each pair with its dials."""
    count = len(base.model.layers)
    found = {"base": Reader(base.model)}
    for fraction in FRACTIONS:
        found[f"LP {fraction}"] = Reader(_fused(base.model.pruned(kept_layers(fraction, count))))
    for name, folder in pruned.items():
        found[name] = Reader(_fused(auxiliary_of(folder, base)))
    for name, folder in pairs.items():
        pair = load_pair(folder, base)
        found[name] = Reader(base.model, pair)
        if name not in DIALLED:
            continue
        found |= {f"{name}, keep {keep}": Reader(base.model, pair, keep) for keep in KEEPS}
        found[f"{name}, refine"] = Reader(base.model, pair, refine=True)
    return found


def auxiliary_of(folder: Path, base: Loaded):
    """The model in `folder`, or the auxiliary of the pair in it."""
    text = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").exists() else ""
    return load_pair(folder, base).auxiliary if '"mlxeff-kv-pair"' in text else load_path(folder).model


def _fused(model):
    if model._fused is None:
        fuse(model)
    return model


def arms(found: dict[str, Reader]) -> list[Arm]:
    """The same for the measurement of the time to the first token, which `refine` does not change."""
    return [
        Arm(name, reader.model, *_prediction(reader), *reader.kept)
        for name, reader in found.items()
        if not reader.refine
    ]


def _prediction(reader: Reader) -> tuple:
    return (reader.pair.auxiliary, reader.pair.predictor) if reader.pair else (None, None)


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """The names that hold one of the words of `only`, all without it."""
    return [name for name in names if not only or any(word in name for word in only)]
