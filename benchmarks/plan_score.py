"""How far the predictions of `mlxeff plan` are from published speeds of Macs, chip by chip: constants are fitted to all
chips but one and predict that one. Nothing is measured here; the published rows are in mlxeff/plan/data/published.csv.

    python benchmarks/plan_score.py [--save]
    python benchmarks/plan_score.py --report [FILE]
    python benchmarks/plan_score.py --machine CALIBRATION.json HELD-OUT.json [--save]

`--save` writes the result, and the constants of all chips together to mlxeff/plan/data/constants.json, which the
command uses. All variants of a chip (numbers of GPU cores, engines, models) are left out at once. The error of a row is
that of the predicted tokens a second, relative to the published ones.

`--machine`: the other test. Both files are documents of `mlxeff bench ttft --json` of one model on this machine;
constants come from the first one alone, the times of the second are predicted.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np

import saving
from mlxeff.bench.tables import card_lines, table
from mlxeff.plan import calibrate, costs, fit, published
from mlxeff.plan.calibrate import TARGETS
from mlxeff.plan.chips import Machine
from mlxeff.plan.costs import Engine
from mlxeff.plan.predict import Predictor
from mlxeff.plan.source import describe
from places import ROOT

SECTION = "plan-score"  # of RESULTS.md
PATH = saving.RESULTS / "published-M1-to-M5-plan-score.json"
CONSTANTS = ROOT / "mlxeff/plan/data/constants.json"
PHASES = ("prefill", "decode")
ENGINES = (costs.MLX, costs.LLAMA)  # fitted; forks are predicted with these constants and reported apart
PLACES = 5  # significant digits of saved numbers


def constants(rows: list[published.Row]) -> dict[str, float]:
    """Fitted to the rows of released engines among `rows`."""
    own = [row for row in rows if row.family in ENGINES]
    return fit.constants([row.terms() for row in own], [row.seconds for row in own])


def left_out(rows: list[published.Row]) -> list[dict]:
    """For each row its prediction by constants of all other chips."""
    samples = []
    for chip in dict.fromkeys(row.chip for row in rows):
        found = constants([row for row in rows if row.chip != chip])
        for row in rows:
            if row.chip == chip:
                samples.append(_sample(row, costs.total(row.terms(), found)))
    return samples


def _sample(row: published.Row, seconds: float) -> dict:
    predicted = (row.tokens if row.phase == "prefill" else 1) / seconds
    return {
        "phase": row.phase,
        "engine": row.family,
        "build": row.engine_name,
        "chip": row.machine.name,
        "model": row.model,
        "quantisation": row.quantisation,
        "tokens": row.tokens,
        "published_tps": row.rate,
        "predicted_tps": _short(predicted),
        "error": round(predicted / row.rate - 1, 4),
    }


def _short(value: float) -> float:
    return float(f"{value:.{PLACES}g}")


def errors(samples: list[dict]) -> dict:
    """engine → phase → rows, chips, MAPE, and the error bar: nine of ten predictions are within this factor - 1."""
    found: dict[str, dict] = {}
    for engine in dict.fromkeys(sample["engine"] for sample in samples):
        for phase in PHASES:
            own = [s for s in samples if (s["engine"], s["phase"]) == (engine, phase)]
            if own:
                factors = [abs(np.log(1 + s["error"])) for s in own]
                found.setdefault(engine, {})[phase] = {
                    "rows": len(own),
                    "chips": len({s["chip"].split(",")[0] for s in own}),
                    "mape": round(float(np.mean([abs(s["error"]) for s in own])), 4),
                    "p90": round(float(np.expm1(np.quantile(factors, 0.9))), 4),
                }
    return found


def fitted(rows: list[published.Row], summary: dict) -> dict:
    """The document of mlxeff/plan/data/constants.json."""
    about = {
        "provenance": f"fitted to {sum(row.family in ENGINES for row in rows)} published speeds of M1 to M5",
        "errors": {engine: summary[engine] for engine in ENGINES},
    }
    for phase in PHASES:
        found = constants([row for row in rows if row.phase == phase])
        about[phase] = {name: _short(value) for name, value in found.items()}
    return about


def published_document() -> dict:
    """The result."""
    rows, reasons = published.read()
    samples = [sample for phase in PHASES for sample in left_out([row for row in rows if row.phase == phase])]
    card = {
        "command": saving.command(),
        "kind": "predictions beside published speeds, each for a chip that the constants have not seen",
        "host": f"{platform.system()} {platform.machine()}",
    }
    return {"card": card, "left_out": reasons, "errors": errors(samples), "samples": samples}


def machine_document(calibration: str, held_out: str) -> dict:
    """The result of `--machine`."""
    first, second = calibrate.read(calibration), calibrate.read(held_out)
    model = describe(first.model)
    calibrate.check_model(first, model.shape)
    calibrate.check_model(second, model.shape)
    machine = Machine(first.cpu, 1e10, 1e11, kind=first.device)  # constants are relative to these
    found = calibrate.calibrate(first, model.shape, model.bits, machine, Engine())
    predictor = Predictor(machine, Engine(), found)
    result = json.loads(Path(held_out).read_text(encoding="utf-8"))
    busy = [sample["load_average"] for sample in result["samples"]]
    card = result["card"] | {"load_average": float(np.median(busy)), "rounds": result["settings"]["rounds"]}
    samples = [
        {
            "result": name,
            "phase": each.phase,
            "tokens": each.tokens,
            "measured_s": _short(each.measured),
            "predicted_s": _short(each.predicted),
            "error": round(each.error, 4),
        }
        for name, measured in (("calibration", first), ("held out", second))
        for each in calibrate.score(predictor, measured, model.shape, model.bits)
    ]
    about = {"command": saving.command(), "kind": "predictions beside measured medians", "model": first.model}
    return {"card": about | card, "samples": samples}


def text(document: dict) -> str:
    """The tables, in Markdown."""
    rows = []
    for engine, phases in document["errors"].items():
        for phase, each in phases.items():
            target = TARGETS[f"published {phase}"]
            met = "" if engine not in ENGINES else "met" if each["mape"] <= target else "missed"
            cells = [str(each["rows"]), str(each["chips"]), f"{each['mape']:.1%}", f"{each['p90']:.0%}"]
            rows.append([f"{engine}, {phase}", *cells, f"{target:.0%} {met}".strip()])
    header = ["predicted for chips that the fit has not seen", "rows", "chips", "MAPE", "9 of 10 within", "target"]
    parts = [table(header, rows), _by_chip(document["samples"])]
    reasons = ", ".join(f"{reason} ({count})" for reason, count in document["left_out"].items())
    return "\n\n".join([*parts, f"Rows that are not predicted: {reasons}."])


def _by_chip(samples: list[dict]) -> str:
    """MAPE by chip, engine and phase."""
    columns = [(engine, phase) for engine in ENGINES for phase in PHASES]
    rows = []
    for chip in sorted({sample["chip"] for sample in samples}):
        cells = []
        for column in columns:
            own = [abs(s["error"]) for s in samples if s["chip"] == chip and (s["engine"], s["phase"]) == column]
            cells.append(f"{np.mean(own):.0%} ({len(own)})" if own else "")
        rows.append([chip, *cells])
    return table(["MAPE (rows)", *(f"{engine}, {phase}" for engine, phase in columns)], rows)


def machine_text(document: dict) -> str:
    """The table of `--machine`."""
    rows = []
    for sample in document["samples"]:
        cells = [f"{1e3 * sample[name]:.4g}" for name in ("measured_s", "predicted_s")]
        where = f"{sample['result']}, {sample['phase']}, {sample['tokens']} tokens"
        rows.append([where, *cells, f"{sample['error']:+.1%}"])
    parts = [table(["ms", "measured", "predicted", "error of the speed"], rows)]
    for name in ("calibration", "held out"):
        found = [abs(s["error"]) for s in document["samples"] if s["result"] == name]
        target = f", target {TARGETS['own']:.0%}" if name == "held out" else ""
        parts.append(f"MAPE, {name}: {np.mean(found):.1%}{target}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the result, and the constants that the command uses")
    parser.add_argument("--machine", nargs=2, metavar="RESULT.json", help="score predictions for this machine instead")
    saving.add_report(parser)
    options = parser.parse_args()
    if options.report is not None:
        _report(Path(options.report or PATH))
        return
    document = machine_document(*options.machine) if options.machine else published_document()
    shown = machine_text if options.machine else text
    print(card_lines(document["card"]), shown(document), sep="\n\n")
    if options.save and options.machine:
        saving.write_json(document, saving.result_path(document["card"]["cpu"], "plan-score.json"))
    elif options.save:
        saving.write_json(document, PATH)
        saving.write_json(fitted(published.read()[0], document["errors"]), CONSTANTS)
    print(json.dumps(document))


def _report(path: Path) -> None:
    """Both results, as far as they are saved."""
    found = [text(saving.read_json(path))]
    for own in sorted(saving.RESULTS.glob("*-plan-score.json")):
        if own != PATH:
            document = saving.read_json(own)
            card = document["card"]
            where = f"{card['cpu']}, {card['threads']} threads, {card['model']}, {card['rounds']} rounds"
            busy = f"load average {card['load_average']:.1f}"
            found.append(
                f"Measured by `mlxeff bench ttft` ({where}, {busy}); the fit saw only the rows of the calibration:"
            )
            found.append(machine_text(document))
    saving.write_section(SECTION, "\n\n".join(found))
    print("\n\n".join(found))


if __name__ == "__main__":
    main()
