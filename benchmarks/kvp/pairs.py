"""The KV Prediction pairs that are measured. A pair is named by its recipe, "AUX" or "AUX HOW", and is made if it is
missing. AUX is a value of `mlxeff fit kv-predictor --aux`; HOW is a key of the table HOW, and without it the fit is the
closed form. All pairs are fitted in closed form on one text, half of it the converter's calibration text and half text
that the base model generates; some are then trained further on `training_text`. "RECIPE 8-bit" is the pair of RECIPE
with its maps rounded to 8 bits.

    python -m kvp.pairs RECIPE FOLDER       # in benchmarks/: make one, for use
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import saving
from mlxeff import hub
from mlxeff.assembly.fitting import fit_kv_predictor
from mlxeff.assembly.model import Loaded, load_path
from mlxeff.assembly.pair import load_pair, native_like
from mlxeff.bench.arms import Arm
from mlxeff.cli.output import bar, show_notices
from mlxeff.decode import Setup
from mlxeff.errors import MlxeffError
from mlxeff.kvprediction.files import FORMAT, read_config, write_pair
from mlxeff.kvprediction.layers import FRACTIONS, kept_layers
from mlxeff.kvprediction.predictor import quantization, quantize
from mlxeff.kvprediction.text import sample
from mlxeff.models.decoder import DecoderModel
from places import work_folder

from . import training_text
from .training_text import CALIBRATION

LOSS = {"loss": "distill", "prompt_mark": training_text.MARK}
DISTILLED = {**LOSS, "batch": 4}
LORA = {**LOSS, "train": "lora", "batch": 3}
HOW = {  # options of `fit_kv_predictor`
    "own": {"inputs": "own"},
    "distilled": DISTILLED,
    "longer": DISTILLED,
    "lora": {**LORA, "aux_loss": 0},
    "joint": LORA,  # the auxiliary learns to be a model of its own, too
    "paper": {"loss": "paper", "batch": 2},
}
TRAINED = {  # steps and learning rate; maps that read layers the base does not have in this order want a lower one
    "lp:0.75 distilled": (100, 3e-4),
    "lp:0.50 distilled": (200, 3e-4),
    "lp:0.25 distilled": (100, 3e-4),
    "layers:0-21 distilled": (100, 1e-3),
    "layers:0-18 distilled": (100, 1e-3),
    "layers:0-18 longer": (300, 1e-3),
    "layers:0-14 distilled": (300, 1e-3),
    "layers:0-7 distilled": (200, 1e-3),
    "lp:0.50 lora": (120, 5e-4),
    "lp:0.75 joint": (120, 3e-4),
    "lp:0.50 joint": (120, 3e-4),
    "lp:0.25 joint": (120, 3e-4),
    "lp:0.50 paper": (60, 5e-4),
}
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
ROUNDED, BITS = " 8-bit", 8
SHIPPED = {  # name in the package → recipe
    "smollm2-135m-0-18": f"layers:0-18 distilled{ROUNDED}",
    "smollm2-135m-0-21": f"layers:0-21 distilled{ROUNDED}",
}
RECIPES = (*CLOSED_FORM, *TRAINED, *SHIPPED.values())
TOKENS, LENGTH, SEED = 32768, 512, 0  # of the closed form, of a piece, of the base's own text
KEEPS = (64, 256, 384)
DIALLED = (  # whose dials are measured too
    "KVP layers:0-14",
    "KVP layers:0-18 distilled",
    "KVP layers:0-14 distilled",
    "KVP lp:0.50 distilled",
)


def make(recipe: str, model: str, work: Path, tokens: int, folder: Path | None = None) -> Path:
    """Return the pair of `recipe` in `folder` or under `work`, and make it if missing; its closed form is fitted on
    `tokens` tokens.
    """
    folder = folder or work / re.sub(r"[^\w.]+", "-", f"{recipe}-{tokens}")
    if folder.exists():
        _check(folder, recipe)
        return folder
    if recipe.endswith(ROUNDED):
        return _rounded(make(recipe.removesuffix(ROUNDED), model, work, tokens), model, folder)
    auxiliary, _, how = recipe.partition(" ")
    if how and how not in HOW:
        raise MlxeffError(f"kvp: {recipe}: wanted an auxiliary and one of {', '.join(HOW)}, got {how!r}")
    options = {"text": _text(model, work, tokens), "tokens": tokens, "length": LENGTH, **HOW.get(how, {})}
    if recipe in TRAINED:
        steps, rate = TRAINED[recipe]
        options |= {"steps": steps, "rate": rate, "train_text": _training_text(model, work)}
    with show_notices():
        fit_kv_predictor(model, auxiliary, folder, progress=bar, **options)
    return folder


def _check(folder: Path, recipe: str) -> None:
    """Raise an error for a folder that was made with another definition of the recipe."""
    kept = read_config(folder).provenance
    (steps, rate), got = TRAINED.get(recipe.removesuffix(ROUNDED), (0, None)), (kept.get("steps"), kept.get("rate"))
    if steps != got[0] or (steps and rate != got[1]):
        raise MlxeffError(f"{folder}: wanted {steps} steps at the rate {rate}, got {got[0]} at {got[1]}: remove it")


def _rounded(whole: Path, model: str, folder: Path) -> Path:
    """Write the pair in `whole` to `folder`, with its maps rounded to BITS bits."""
    if read_config(whole).tuned:
        raise MlxeffError(f"{whole}: wanted a pair whose auxiliary is not tuned")
    predictor = load_pair(whole, load_path(hub.resolve(model))).predictor
    scheme = quantization(BITS, [each.weight.shape[1] for pair in predictor.maps for each in pair])
    quantize(predictor, scheme)
    config = replace(read_config(whole), quantization=scheme)
    write_pair(folder, lambda _: config, predictor, half=True)
    return folder


def trained_baselines(made: dict[str, Path]) -> dict[str, Path]:
    """The pairs, by recipe, whose auxiliary was also trained as a model of its own; it serves as a layer-pruned
    baseline.
    """
    return {
        f"LP {each.split()[0].removeprefix('lp:')} trained": folder
        for each, folder in made.items()
        if each.endswith(" joint")
    }


def _training_text(model: str, work: Path) -> Path:
    path = work / f"train-{training_text.TOKENS}.txt"
    if not path.exists():
        training_text.write(load_path(hub.resolve(model)), path, training_text.TOKENS)
    return path


def _text(model: str, work: Path, tokens: int) -> Path:
    """Write a text file whose first `tokens` tokens alternate between generated text and calibration text."""
    path = work / f"fit-{tokens}.txt"
    if not path.exists():
        loaded = load_path(hub.resolve(model))
        tokenizer, half = loaded.tokenizer, tokens // 2
        drawn = sample(loaded.model, tokenizer.bos_token_id, half, LENGTH, SEED)
        read = tokenizer.encode(CALIBRATION.read_text(encoding="utf-8"), add_special_tokens=False)
        pieces = []
        for number, own in enumerate([*drawn, []]):  # a piece more of the text, since decoding may lose some tokens
            pieces += [own[1:], read[number * LENGTH : (number + 1) * LENGTH]]
        saving.write_text("\n\n".join(tokenizer.decode(piece) for piece in pieces), path)
    return path


def arms(base: Loaded, pairs: dict[str, Path], pruned: dict[str, Path]) -> dict[str, Arm]:
    """The arms by name: the base, the layer-pruned baselines, and each pair with its settings of `keep` and `refine`.
    `pruned` gives trained baselines; each is a model, or a pair whose auxiliary is used.
    """
    count = len(base.model.layers)
    found = {"base": Setup(base.model)}
    for fraction in FRACTIONS:
        found[f"LP {fraction}"] = Setup(native_like(base.model.pruned(kept_layers(fraction, count)), base.model))
    for name, folder in pruned.items():
        found[name] = Setup(native_like(auxiliary_of(folder, base), base.model))
    for name, folder in pairs.items():
        pair = load_pair(folder, base)
        found[name] = Setup(base.model, pair)
        if name not in DIALLED:
            continue
        found |= {f"{name}, keep {keep}": Setup(base.model, pair.dialled(keep)) for keep in KEEPS}
        found[f"{name}, refine"] = Setup(base.model, pair.dialled(refine=True))
    return {name: Arm(name, setup) for name, setup in found.items()}


def pair_of(name: str) -> str:
    """The name of the pair that an arm of `arms` uses, without its `keep` and `refine` settings."""
    return name.partition(",")[0]


def auxiliary_of(folder: Path, base: Loaded) -> DecoderModel:
    """The model in `folder`, or the auxiliary of the pair in it."""
    text = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").exists() else ""
    return load_pair(folder, base).auxiliary if f'"{FORMAT}"' in text else load_path(folder).model


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """The names that contain one of the words of `only`; all names if `only` is empty."""
    return [name for name in names if not only or any(word in name for word in only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    options = parser.parse_args()
    work = work_folder("kvp")
    work.mkdir(parents=True, exist_ok=True)
    make(options.recipe, hub.DEFAULT_MODEL, work, TOKENS, options.folder)


if __name__ == "__main__":
    try:
        main()
    except MlxeffError as error:
        sys.exit(f"kvp: {error}")
