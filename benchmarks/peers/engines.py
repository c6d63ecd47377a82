"""The engines measured, behind one interface: `generate(ids, count)` yields greedy tokens from an empty cache,
`logits(pieces)` gives the rows (S, V) of the pieces of one text, computed one after the other, and `note` names the
code that computes.

A job names the `path` of the model, `threads`, `context` (tokens at most) and `options` of the arm. A class imports its
engine itself, so that this module runs in mlxeff's environment and in the peers'.

    python -m peers.engines JOB        writes the logits of the job's `pieces` to its file `logits`
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np


class Mlxeff:
    """mlxeff through the functions that `mlxeff generate` uses; the options are those of `RunOptions`."""

    def __init__(self, job: dict):
        from mlxeff import kernels
        from mlxeff.assembly.model import load_path
        from mlxeff.running import RunOptions

        kernels.use_device("cpu")
        loaded = load_path(Path(job["path"]))
        self.model, self.note = loaded.model, loaded.backend
        self.options = RunOptions(**job["options"])
        self.model.check(self.options)

    def generate(self, ids: list[int], count: int):
        import mlx.core as mx

        from mlxeff.decode import decode, prefill
        from mlxeff.kernels import PREFILL_STEP, device
        from mlxeff.sampling import make_sampler

        cache, options = self.model.new_cache(self.options.kv), self.options
        logits = prefill(self.model, cache, mx.array(ids), PREFILL_STEP[device()], options=options)
        for step in decode(self.model, cache, logits, make_sampler(), max_tokens=count, options=options):
            yield step.token

    def logits(self, pieces: list[list[int]]) -> np.ndarray:
        import mlx.core as mx

        cache = self.model.new_cache(self.options.kv)
        rows = [self.model(mx.array([piece]), cache, self.options)[0] for piece in pieces]
        return np.concatenate([np.array(row, np.float32) for row in rows])


class MlxLm:
    """mlx-lm's own generator. The option `kv_bits` quantises the KV cache, from the first token on."""

    def __init__(self, job: dict):
        import mlx.core as mx
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.cpu)
        self.model, self.note = load_model(Path(job["path"]))[0], "mlx"
        self.kv_bits = job.get("options", {}).get("kv_bits")

    def generate(self, ids: list[int], count: int):
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        cache = {"kv_bits": self.kv_bits, "quantized_kv_start": 0}
        for token, _ in generate_step(mx.array(ids), self.model, max_tokens=count, **cache):
            yield int(token)

    def logits(self, pieces: list[list[int]]) -> np.ndarray:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        rows = [self.model(mx.array([piece]), cache=cache)[0].astype(mx.float32) for piece in pieces]
        return np.concatenate([np.array(row) for row in rows])


class LlamaCpp:
    """libllama through the low-level bindings of llama-cpp-python; timing is around `llama_decode`. The option `kv` is
    the type of the KV cache, as in "q8_0"; "f16" where it is absent."""

    def __init__(self, job: dict):
        import llama_cpp.llama_cpp as library

        self.library = library
        self._silent = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._silent, None)
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = library.llama_model_load_from_file(job["path"].encode(), parameters)
        if not model:
            raise SystemExit(f"llama.cpp cannot load {job['path']}")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self.context = library.llama_init_from_model(model, self._parameters(job))
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {job['context']} tokens")
        self.note = library.llama_print_system_info().decode().strip()

    def _parameters(self, job: dict):
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = job["context"]
        parameters.n_threads = parameters.n_threads_batch = job["threads"]
        parameters.flash_attn_type = int(job["options"]["flash_attention"])
        kind = getattr(self.library, f"GGML_TYPE_{job['options'].get('kv', 'f16').upper()}")
        parameters.type_k = parameters.type_v = kind
        parameters.offload_kqv = parameters.op_offload = False
        return parameters

    def _run(self, ids: list[int], all_rows: bool = False) -> np.ndarray:
        """Logits (1, V) after `ids`, or (len(ids), V)."""
        library = self.library
        tokens = (ctypes.c_int32 * len(ids))(*ids)  # the batch points into it
        batch = library.llama_batch_get_one(tokens, len(ids))
        if all_rows:
            batch.logits = (ctypes.c_int8 * len(ids))(*[1] * len(ids))
        if code := library.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode of {len(ids)} tokens failed with code {code}")
        if not all_rows:
            return np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, -1), (1, self.vocabulary))
        return np.ctypeslib.as_array(library.llama_get_logits(self.context), (len(ids), self.vocabulary))

    def _clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)

    def generate(self, ids: list[int], count: int):
        self._clear()
        for _ in range(count):
            token = int(self._run(ids).argmax())
            yield token
            ids = [token]

    def logits(self, pieces: list[list[int]]) -> np.ndarray:
        self._clear()
        return np.concatenate([self._run(piece, all_rows=True).copy() for piece in pieces])


class Xllamacpp:
    """llama.cpp's server, in this process, of the prebuilt wheel `xllamacpp`: no logits, times by its own clock."""

    def __init__(self, job: dict):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = job["path"]
        parameters.n_ctx = parameters.n_batch = job["context"]
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
        kinds = xllamacpp.llama_flash_attn_type
        on, off = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED, kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = on if job["options"]["flash_attention"] else off
        parameters.n_gpu_layers, parameters.n_parallel, parameters.warmup = 0, 1, False
        self.server, self.note = xllamacpp.Server(parameters), f"xllamacpp {xllamacpp.__version__}"

    def complete(self, ids: list[int], count: int) -> dict:
        request = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        return self.server.handle_completions(request)

    def timed(self, ids: list[int], count: int) -> tuple[float, float]:
        timings = self.complete(ids, count)["timings"]
        return timings["prompt_ms"] / 1e3, timings["predicted_per_second"]


class Torch:
    """transformers' model in bfloat16 with torch's scaled-dot-product attention."""

    def __init__(self, job: dict):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.bfloat16).eval()
        self.note = f"torch {torch.__version__}, {self.model.config._attn_implementation}"

    def _run(self, ids: list[int], past, rows: int):
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=rows)
        return out.logits[0], out.past_key_values

    def generate(self, ids: list[int], count: int):
        past = None
        for _ in range(count):
            logits, past = self._run(ids, past, 1)
            ids = [int(logits[-1].argmax())]
            yield ids[0]

    def logits(self, pieces: list[list[int]]) -> np.ndarray:
        past, found = None, []
        for piece in pieces:
            logits, past = self._run(piece, past, 0)
            found.append(logits.float().numpy())
        return np.concatenate(found)


ENGINES = {"mlxeff": Mlxeff, "mlx-lm": MlxLm, "llama.cpp": LlamaCpp, "xllamacpp": Xllamacpp, "torch": Torch}


def write_logits(job: dict) -> dict:
    """Write the logits (S, V) of the job's `pieces` of one text to its file `logits`."""
    engine = ENGINES[job["engine"]](job)
    np.save(job["logits"], engine.logits(job["pieces"]))
    return {"note": engine.note}


if __name__ == "__main__":
    print(json.dumps(write_logits(json.loads(sys.argv[1]))))
