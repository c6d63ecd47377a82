"""Quality per bit: SeedLM compared with MLX's affine quantisation, mlx-lm's GPTQ, AWQ and DWQ, and llama.cpp's types.

    python benchmarks/seedlm_quality.py [--tokens 16384] [--arms NAME ...] [--add] [--save]
    python benchmarks/seedlm_quality.py --report [FILE]

The reference is the built-in model's Q4_1 file, dequantised. Every arm replaces the decoder layers and keeps the
reference's embedding. (576 columns are no multiple of 128: there "g128" has groups of 64, and its bits are
counted as they are.) Measured on windows of `data/jargon-validation.txt`: perplexity of the next token, mean
KL divergence of the reference's distribution from the arm's, and how often both have the same first choice.

Since the reference was itself rounded to a 4-bit grid once, the relative error of the outputs of single layers is
measured too, with Gaussian and heavy-tailed weights and correlated inputs, of which the encoder sees other samples.

SeedLM folders are made by `mlxeff.convert` under --work and used again; that takes about ten minutes a piece. What
mlx-lm and llama.cpp quantise lies under --cache (`quality/mlx_lm_quant.py`, `quality/llama_quant.py`). With --save the
document is written after every arm; --add measures only arms that it does not hold yet. The plot needs matplotlib
(`pip install 'mlxeff[benchmarks]'`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np

import saving
from mlxeff import hub
from mlxeff.assembly.model import load_path
from mlxeff.errors import MlxeffError
from mlxeff.eval.measures import compare, means
from mlxeff.models.decoder import DecoderModel
from mlxeff.ops import log_softmax
from peers import card
from places import HERE, TEXT, work_folder
from quality import report
from quality.arms import NAMES, QuantisedModel, Workshop
from quality.layers import single_layers

WINDOW = 512
SAME = 1e-4  # relative difference of perplexities of one model on two machines


class Truth:
    """The reference's distributions on windows (W, T) of tokens, computed from the stored hidden states of its
    passes.
    """

    def __init__(self, model: DecoderModel, windows: np.ndarray):
        self.head, self.hidden = model.head, []
        for window in progress(windows):
            self.hidden.append(model.hidden(mx.array(window)[None], model.new_cache())[0, :-1])
            mx.eval(self.hidden[-1])

    def __getitem__(self, window: int) -> mx.array:
        """Logarithms of the probabilities of the tokens after each but the last of a window, (T - 1, V)."""
        return log_softmax(self.head(self.hidden[window]))


Item = TypeVar("Item")


def progress(items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items and show their count as progress."""
    for number, item in enumerate(items):
        print(f"\r{number + 1} of {len(items)}", end="", file=sys.stderr, flush=True)
        yield item
    print(file=sys.stderr)


def measure(truth: Truth, model: DecoderModel | None, windows: np.ndarray) -> dict:
    """Perplexity, KL divergence and agreement of first choices over all predicted tokens; of the reference without a
    model.
    """
    compared = []
    for number, window in enumerate(progress(windows)):
        true = truth[number]
        found = true if model is None else log_softmax(model(mx.array(window)[None], model.new_cache())[0, :-1])
        compared.append(compare(found, true, window[1:]))
    mean = means(compared)
    return {"perplexity": mean["perplexity"], "kl": mean["kl"], "top1": mean["agreement"]}


def stem() -> Path:
    """The path, without extension, of this machine's result files."""
    return saving.result_path(card.machine()["cpu"], "seedlm-quality")


def saved() -> dict:
    """The saved results document of this machine."""
    return saving.read_json(stem().with_suffix(".json"))


def write(document: dict, add: bool) -> None:
    """Save the document; with `add`, first merge the arms that another run has saved in the meantime."""
    path = stem().with_suffix(".json")
    if add and path.exists():
        document["arms"] = saved()["arms"] | document["arms"]
    saving.write_json(document, path)


def begun(options: argparse.Namespace, tokens: int) -> dict:
    """The document that arms are put into: a new one; with --add the saved one, if of these versions and this text."""
    if not options.add or not stem().with_suffix(".json").exists():
        return {"card": card.identity() | {"command": saving.command()}, "tokens": tokens, "arms": {}}
    document = saved()
    here, there = card.versions() | {"tokens": tokens}, document["card"] | {"tokens": document["tokens"]}
    if other := [key for key, value in here.items() if value != there.get(key)]:
        raise SystemExit(f"{stem()}.json: --add: measured with another {', '.join(other)}: measure anew, without --add")
    return document


def origin(document: dict) -> dict:
    """The machine an arm was measured on, for its record; empty if it is the document's machine."""
    here = json.loads(json.dumps(card.machine()))
    return {} if all(document["card"].get(key) == value for key, value in here.items()) else {"machine": here}


def check_reference(document: dict, found: dict) -> None:
    """Raise an error if the reference differs from the document's: arms of several machines share a table only if it is
    equal.
    """
    if (kept := document["arms"].get("reference")) and abs(found["perplexity"] / kept["perplexity"] - 1) > SAME:
        before, now = kept["perplexity"], found["perplexity"]
        raise SystemExit(f"{stem()}.json: --add: the reference's perplexity was {before}, is {now} here: measure anew")


def fill(
    document: dict, names: list[str], workshop: Workshop, windows: np.ndarray, save: Callable[[dict], None]
) -> None:
    """Measure the arms that the document lacks, `save(document)` after each; one that cannot be had has the reason."""
    reference = load_path(workshop.path).model
    failed = document.setdefault("not measured", {})
    missing = [name for name in names if name not in document["arms"]]
    if missing:
        truth = Truth(reference, windows)
        found = QuantisedModel(reference).size() | measure(truth, None, windows)
        check_reference(document, found)
        document["arms"].setdefault("reference", found | origin(document))
    for name in missing:
        print(name, file=sys.stderr)
        failed.pop(name, None)
        try:
            arm = workshop.arm(name)
            document["arms"][name] = arm.size() | measure(truth, arm.model, windows) | origin(document)
            if arm.made:
                document["arms"][name]["made"] = arm.made
        except MlxeffError as error:
            failed[name] = str(error)
            print(f"{name}: not measured: {error}", file=sys.stderr)
        save(document)
    if "single layers" not in document:
        document["single layers"] = single_layers()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--arms", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--work", type=Path, default=work_folder("seedlm"), help="SeedLM's folders")
    parser.add_argument("--cache", type=Path, default=work_folder("peers"), help="the peers and what they made")
    parser.add_argument("--limit", type=float, default=5400, help="CPU seconds that a peer may quantise")
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, help="the reference")
    parser.add_argument("--add", action="store_true", help="only arms that the saved results lack")
    parser.add_argument("--save", action="store_true", help="write results/<processor>-seedlm-quality.json and .png")
    saving.add_report(parser)
    return parser.parse_args()


def main():
    options = arguments()
    if options.report is not None:
        path = Path(options.report or stem().with_suffix(".json")).resolve()
        document, picture = saving.read_json(path), path.with_suffix(".png")
        report.plot(document, picture)
        saving.write_section(report.SECTION, report.section(document, picture, HERE))
        print(report.text(document))
        return
    path = hub.resolve(options.model)
    ids = load_path(path).tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    count = min(options.tokens, len(ids)) // WINDOW
    windows = np.array(ids[: count * WINDOW], np.int32).reshape(count, WINDOW)
    document = begun(options, windows.size)
    save = (lambda document: write(document, options.add)) if options.save else (lambda _: None)
    fill(document, options.arms, Workshop(path, options.work, options.cache, options.limit), windows, save)
    print(report.text(document))
    if options.save:
        save(document)
        report.plot(document, stem().with_suffix(".png"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
