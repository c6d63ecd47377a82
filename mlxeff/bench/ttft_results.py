"""Results of `mlxeff bench ttft`, which are its document and the file of its samples, in the form of other results."""

from collections.abc import Sequence
from pathlib import Path

from .intervals import summary
from .schema import FORMAT, PARTS, VERSION, typed

MACHINE = ("cpu", "memory_gb", "system", "mlxeff", "mlx", "cpu_backend", "threads")  # facts of a file; others: settings
SAMPLE = {
    **dict.fromkeys(("arm", "device"), (str,)),
    **dict.fromkeys(("tokens", "batch", "round"), (int,)),
    "ttft_s": (int, float),
}
DECODED = "decode_tps"


def is_document(value: object) -> bool:
    """Whether a value is the document of `bench ttft --json`, which names no format."""
    wanted = {"card": dict, "settings": dict, "arms": dict, "samples": list, "skipped": list, "notices": list}
    return (
        isinstance(value, dict)
        and not {"format", "version"} & set(value)
        and all(isinstance(value.get(name), kind) for name, kind in wanted.items())
    )


def of_document(value: dict, path: Path) -> dict:
    """The document for one of `bench ttft --json`. Raises MlxeffError for samples that are none."""
    found = of_samples(value["samples"], value["card"], value["settings"], path)
    return found | {name: value[name] for name in ("arms", "skipped", "notices")}


def of_file(identity: dict, samples: Sequence[object], path: Path) -> dict:
    """The document for a file of samples, whose first line is `identity`. Raises MlxeffError for samples that are
    none."""
    card = {name: identity[name] for name in MACHINE if name in identity}
    settings = {name: value for name, value in identity.items() if name not in (*MACHINE, "format")}
    return of_samples(samples, card, settings, path)


def of_samples(samples: Sequence[object], card: dict, settings: dict, path: Path) -> dict:
    """The document for samples of `bench ttft`: rows, and the samples in the form of other results."""
    rows: dict[tuple, tuple[dict, list[float]]] = {}
    kept = []
    for index, sample in enumerate(samples):
        typed(sample, SAMPLE, path, f"sample {index + 1}", ("step_s", "load_average"), above=("ttft_s", "step_s"))
        for test, metrics in _tests(sample, settings.get("steps")).items():
            place = {"arm": sample["arm"], "device": sample["device"], "test": test}
            more = {"round": sample["round"], "load_average": sample.get("load_average")}
            kept.append(place | more | {"values": {name: value for name, (value, _, _) in metrics.items()}})
            for metric, (value, unit, better) in metrics.items():
                sizes = {"batch": sample["batch"], "tokens": sample["tokens"], "depth": 0}
                if metric == DECODED:
                    sizes |= {"tokens": settings.get("steps"), "depth": sample["tokens"]}
                row = place | {"metric": metric, "unit": unit, "better": better} | sizes
                rows.setdefault((*place.values(), metric), (row, []))[1].append(value)
    document = {name: kind() for name, kind in PARTS.items()} | {"format": FORMAT, "version": VERSION}
    document |= {"card": card, "settings": settings, "arms": {sample["arm"]: {} for sample in samples}}
    return document | {"results": [row | summary(values) for row, values in rows.values()], "samples": kept}


def _tests(sample: dict, steps: int | None) -> dict[str, dict[str, tuple[float, str, str]]]:
    """test → metric → (value, unit, what is better) of a sample of `bench ttft --out`."""
    batch, tokens, seconds = sample["batch"], sample["tokens"], sample["ttft_s"]
    also = f" x{batch}" if batch > 1 else ""
    found = {
        f"pp{tokens}{also}": {
            "ttft_s": (seconds, "s", "lower"),
            "prompt_tps": (batch * tokens / seconds, "tok/s", "higher"),
        }
    }
    if sample.get("step_s"):
        found[f"tg{steps} @ d{tokens}{also}"] = {DECODED: (batch / sample["step_s"], "tok/s", "higher")}
    return found
