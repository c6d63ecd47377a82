"""`mlxeff models`: lists the built-in models and those in the cache."""

import argparse

from . import output, streams


def run(options: argparse.Namespace) -> int:
    """Print the list; returns the exit code."""
    from .. import hub

    rows, (cache, reason) = hub.models(), output.cache_place()
    if options.json:
        facts = {"cache": cache, "default": hub.DEFAULT_MODEL, "models": rows, "pairs": hub.pairs()}
        streams.print_json(facts)
        return 0
    table = [("NAME", "SOURCE", "SIZE", "CACHED")]
    for row in rows:
        cached = row["cached"]
        size = (cached or row)["bytes"]
        mark = " (default)" if row["alias"] == hub.DEFAULT_MODEL else ""
        name = (row["alias"] or row["source"]) + mark
        table.append((name, row["source"], _size(size), cached["path"] if cached else "no"))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print("  ".join([*(text.ljust(width) for text, width in zip(line[:3], widths)), line[3]]))
    print(f"\nPairs of KV Prediction, for generate --kv-predict: {', '.join(hub.pairs())}")
    print(f"Any Hugging Face id, model folder or .gguf file works too. Built-in model's cache: {cache or reason}")
    return 0


def _size(count: int | None) -> str:
    """A number of bytes in words."""
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
