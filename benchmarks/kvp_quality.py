"""What KV Prediction costs in quality and gains in time to the first token, on the built-in model.

    python benchmarks/kvp_quality.py [--pair NAME=FOLDER ...] [--pruned NAME=FOLDER ...] [--only WORD ...] [--save]
    python benchmarks/kvp_quality.py --phase ttft [...]    # the times; they need a quiet machine, quality does not
    python benchmarks/kvp_quality.py --table FILE.json     # a saved result's tables; --report: those of RESULTS.md

The arms are the base, layer-pruned copies of it as models of their own, and KV Prediction pairs: those of the recipes
in `kvp.pairs`, which are made under --work if they are missing (a few minutes each, 5 to 15 for trained ones), and
those that --pair names. Some pairs are also measured with `keep` and `refine` (`kvp.pairs.DIALLED`). On windows of
`data/jargon-validation.txt` an arm reads a prompt, and the text after it is scored: perplexity, KL divergence from the
base, and agreement of the most likely tokens. Two sets of questions (`kvp.questions`) have their answers in the prompt.
Every sample is saved under --work at once, so an interrupted run continues where it ended.

The last line is one JSON document; --save writes it, and a plot (needs `mlxeff[benchmarks]`), to results/.
"""

import argparse
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

import saving
from kvp import measures, pairs, questions, report
from mlxeff import hub
from mlxeff.assembly.model import Loaded, load_path
from mlxeff.bench import rounds
from mlxeff.bench.arms import Arm
from mlxeff.bench.machine import card, processor
from mlxeff.bench.points import FILTERS, Point
from mlxeff.bench.samples import Samples
from mlxeff.bench.selection import condition
from mlxeff.cli.output import show_notices
from mlxeff.decode import Setup
from mlxeff.errors import MlxeffError
from mlxeff.eval.measures import compare
from mlxeff.kernels import use_device
from mlxeff.kvprediction.files import digest
from places import TEXT, work_folder

TTFT_POINTS = [Point(batch, tokens) for batch in (1, 8) for tokens in (128, 512, 2048)]
QUALITY_KEYS = ("arm", "digest", "item")
PHASES = ("windows", "questions", "ttft")


def main() -> None:
    options = parse()
    if options.report is not None:
        path = Path(options.report or report.result_path(processor())).resolve()
        text = report.section(saving.read_json(path), path.with_suffix(".png"), saving.REPORT.parent)
        saving.write_section(report.SECTION, text)
        return
    if options.table:
        print(report.tables(saving.read_json(options.table)))
        return
    use_device("cpu")
    options.work.mkdir(parents=True, exist_ok=True)
    base = load_path(hub.resolve(options.model))
    made = {each: pairs.make(each, options.model, options.work, options.tokens) for each in options.aux}
    given = {f"KVP {recipe}": folder for recipe, folder in made.items()} | dict(options.pair)
    pruned = pairs.trained_baselines(made) | dict(options.pruned)
    arms = pairs.arms(base, given, pruned)
    names = pairs.chosen(list(arms), options.only)
    digests = {name: digest(folder) for name, folder in (given | pruned).items()}
    what = {"model": base.fingerprint, "windows": [options.windows, options.prompt, options.continuation]}
    scored = Samples(options.work / "windows.jsonl", {"format": "kvp-windows", **what}, QUALITY_KEYS)
    asked = {
        name: Samples(
            options.work / f"{name}.jsonl", {"format": f"kvp-{name}", "model": base.fingerprint}, QUALITY_KEYS
        )
        for name in questions.sets()
    }
    machine = card()
    place = options.work / f"ttft-{machine['threads']}-threads.jsonl"
    times = Samples(place, {"format": "kvp-ttft", "model": base.fingerprint, **machine}, rounds.KEYS)
    tagged = {name: (arms[name], digests.get(pairs.pair_of(name), "")) for name in names}
    if "windows" in options.phase:
        measure_windows(base, tagged, windows(base, options), options.prompt, scored)
    if "questions" in options.phase:
        measure_questions(base, tagged, asked)
    if "ttft" in options.phase:
        measure_times(tagged, options, times)
    document = {"card": machine | {"command": saving.command()}, **what, "tokens fitted on": options.tokens}
    answers = {name: samples.all for name, samples in asked.items()}
    document["arms"] = report.summary(arms, digests, scored.all, answers, times.all, options.prompt)
    print(report.tables(document))
    if options.save:
        report.save(document)
    print(json.dumps(document))


Tagged = dict[str, tuple[Arm, str]]  # name → the arm, the digest of its pair or trained baseline, "" of others


def windows(base: Loaded, options: argparse.Namespace) -> np.ndarray:
    """Token ids, see `measures.windows`."""
    ids = base.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    return measures.windows(ids, options.windows, options.prompt, options.continuation)


def measure_windows(base: Loaded, arms: Tagged, rows: np.ndarray, prompt: int, samples: Samples) -> None:
    """Compare every arm with the base on every window."""
    truth_of = Setup(base.model)
    for item, row in enumerate(rows):
        left = [name for name, (_, mark) in arms.items() if (name, mark, item) not in samples.done()]
        truth = measures.log_probabilities(truth_of, row, prompt) if left else None
        for name in left:
            arm, mark = arms[name]
            found = compare(measures.log_probabilities(arm.setup, row, prompt), truth, row[prompt:])
            samples.add({"arm": name, "digest": mark, "item": item} | found)
        _show(f"window {item + 1} of {len(rows)}")


def measure_questions(base: Loaded, arms: Tagged, asked: dict[str, Samples]) -> None:
    """Ask every arm every question of each set."""
    for (kind, items), samples in zip(questions.sets().items(), asked.values(), strict=True):
        for number, (prompt, answer) in enumerate(items):
            ids = base.tokenizer.encode(prompt, add_special_tokens=True)
            for name, (arm, mark) in arms.items():
                if (name, mark, number) in samples.done():
                    continue
                said = questions.answer(arm.setup, base.tokenizer, ids)
                found = {"said": said, "exact": questions.exact(said, answer), "tokens": len(ids)}
                samples.add({"arm": name, "digest": mark, "item": number} | found)
                mx.clear_cache()
            _show(f"{kind}: question {number + 1} of {len(items)}")


def measure_times(arms: Tagged, options: argparse.Namespace, samples: Samples) -> None:
    """Measure the seconds to the first token; arms with `refine` need no measurement, since refinement starts after
    it.
    """
    timed = {name: arm for name, (arm, _) in arms.items() if not (arm.pair and arm.pair.refine)}
    group = rounds.Group(list(timed), lambda names: [timed[name] for name in names], TTFT_POINTS, loaded=True)
    with show_notices():
        rounds.run(
            [group], ["cpu"], rounds.Settings(options.rounds, options.warmup), options.point, rounds.Results(samples)
        )


def _show(text: str) -> None:
    print(f"\r{text}  ", end="", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--aux", nargs="*", default=pairs.RECIPES, metavar="RECIPE", help="of pairs")
    parser.add_argument(
        "--pair", action="append", type=named, default=[], metavar="NAME=FOLDER", help="measure this too"
    )
    parser.add_argument(
        "--pruned",
        action="append",
        type=named,
        default=[],
        metavar="NAME=FOLDER",
        help="a trained baseline: a model, or a pair, whose auxiliary is meant",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="arms whose name has one of these words")
    parser.add_argument("--tokens", type=int, default=pairs.TOKENS, help="to fit pairs on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a window that are read")
    parser.add_argument("--continuation", type=int, default=128, help="tokens of a window that are scored")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES[:2], help="default: the quality")
    parser.add_argument("--rounds", type=int, default=3, help="of the times")
    parser.add_argument("--warmup", type=int, default=1, help="uncounted rounds of the times")
    of_times = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--point", **of_times, type=condition(FILTERS), help="of the times: batch, tokens, arm")
    parser.add_argument("--work", type=Path, default=work_folder("kvp"), help="default %(default)s")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a saved result")
    saving.add_report(parser)
    parser.add_argument("--save", action="store_true", help="write results/<processor>-kvp-quality.json and .png")
    return parser.parse_args()


def named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not name or not equals or "," in name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"wanted NAME=FOLDER, the name without commas, got {text!r}")
    return name, Path(folder)


if __name__ == "__main__":
    try:
        main()
    except MlxeffError as error:
        sys.exit(f"kvp_quality: {error}")
