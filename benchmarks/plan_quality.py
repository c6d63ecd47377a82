"""Write `mlxeff/plan/data/quality.json`: what lossy options cost the built-in model, which `--auto --max-kl` reads.

    python benchmarks/plan_quality.py

The numbers are those of committed results (KL divergence from the model without the option, nats a token), each with
the name of its file. Measures nothing; `tests/test_auto.py` holds that the file is what this script writes.
"""

from pathlib import Path

import mlxeff.plan
import saving
from kvp.pairs import SHIPPED
from mlxeff import hub
from mlxeff.kvprediction.files import read_config

CACHE, PAIRS = "AMD-EPYC-kv-cache.json", "Intel-Xeon-Processor-kvp-quality.json"
PATH = Path(mlxeff.plan.__file__).parent / "data" / "quality.json"
EXACT = "float32"  # kind of KV cache that the others are compared with


def quality() -> dict:
    """The document."""
    caches = saving.read_json(saving.RESULTS / CACHE)["quality"]
    arms = saving.read_json(saving.RESULTS / PAIRS)["arms"]
    configs = {name: read_config(hub.resolve_pair(name)) for name in SHIPPED}
    (fingerprint,) = {config.base["fingerprint"] for config in configs.values()}
    return {
        "model": hub.DEFAULT_MODEL,
        "fingerprint": fingerprint,
        "options": {
            "kv_cache": {
                kind: {"kl": found["kl"], "result": f"benchmarks/results/{CACHE}"}
                for kind, found in caches.items()
                if kind != EXACT
            },
            "kv_predict": {
                name: {
                    "kl": arms[f"KVP {recipe}"]["kl"],
                    "layers": len(configs[name].layers),
                    "result": f"benchmarks/results/{PAIRS}",
                }
                for name, recipe in SHIPPED.items()
            },
        },
    }


if __name__ == "__main__":
    saving.write_json(quality(), PATH)
