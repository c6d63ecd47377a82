"""`make demo-quantspec`: one long prompt answered with KV caches of 32, 16, 8 and 4 bits, with QuantSpec's drafts and
with prompt lookup; of each the bytes of the cache, tokens a second and the first words.

    python benchmarks/demo_quantspec.py [--model MODEL] [--max-tokens 96]
"""

import argparse
import json
import subprocess
import sys

from mlxeff.bench.tables import table
from places import DATA

ARMS = {
    "float32": ("--kv-cache", "float32"),
    "float16": ("--kv-cache", "float16"),
    "int8": ("--kv-cache", "int8"),
    "int4": ("--kv-cache", "int4"),
    "QuantSpec": ("--quantspec",),
    "prompt lookup": ("--prompt-lookup",),
}


def answer(model: str, tokens: int, options: tuple[str, ...]) -> dict:
    """The document of `mlxeff generate --json`."""
    prompt = ("--raw", "--file", str(DATA / "demo-prompt.txt"), "--max-tokens", str(tokens), "--model", model)
    command = [sys.executable, "-m", "mlxeff", "generate", "--json", *prompt, *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def row(name: str, document: dict) -> list[str]:
    """A row of the table."""
    timings = document["timings"]
    report = timings["quantspec"] or timings["prompt_lookup"]
    drafts = f"{report['tokens_per_round']} tokens a round" if report and report["rounds"] else ""
    text = " ".join(document["text"].split())[:40]
    return [name, f"{timings['kv_bytes'] / 1e6:.1f}", f"{timings['decode_tps']:.1f}", drafts, text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    rows = [row(name, answer(options.model, options.max_tokens, arm)) for name, arm in ARMS.items()]
    print(table(["KV cache", "MB", "tokens/s", "drafts", "the answer begins"], rows))


if __name__ == "__main__":
    main()
