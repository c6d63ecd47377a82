"""mlx-lm in a process of its own: `python -m mlxeff.bench.peer_worker DEVICE PATH`. It reads jobs from standard input,
one JSON object a line, and answers each with one line; the first line that it prints says that it is ready.

A job: {"ids": [...], "depth": how many of them are read before the clock starts, "tokens": how many follow}. The
answer: {"times": [seconds until each token], "peak_bytes"}; or {"error"}.
"""

import json
import os
import sys
import time
from pathlib import Path

CHUNK = 512  # tokens that are read at once before the clock starts


def main(device: str, path: str) -> None:
    """Load the model, then answer jobs until the end of standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not stand between the answers
    import mlx.core as mx

    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)  # before mlx-lm makes its stream
    from mlx_lm import __version__
    from mlx_lm.utils import load_model

    model = load_model(Path(path))[0]
    print(json.dumps({"version": __version__}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = run(model, json.loads(line))
        except Exception as error:  # whatever it is, the process that asked says it in a line
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def run(model, job: dict) -> dict:
    """One pass, with a new cache."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    ids, cache, times = mx.array(job["ids"]), make_prompt_cache(model), []
    mx.eval(ids)
    for start in range(0, job["depth"], CHUNK):
        model(ids[None, start : min(start + CHUNK, job["depth"])], cache=cache)
        mx.eval([layer.state for layer in cache])
    mx.reset_peak_memory()
    began = time.perf_counter()
    for token, _ in generate_step(ids[job["depth"] :], model, max_tokens=job["tokens"], prompt_cache=cache):
        int(token)
        times.append(time.perf_counter() - began)
    return {"times": times, "peak_bytes": mx.get_peak_memory()}


if __name__ == "__main__":
    main(*sys.argv[1:])
