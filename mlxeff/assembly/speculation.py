"""Speculative decoding for a loaded model: the drafters that the options name, and what rounds cost on this machine.

What rounds cost is kept in a file of the user's cache folder, so that a new run need not measure it first.
"""

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import hub, kernels, modules
from ..decode import require_seam
from ..errors import MlxeffError, notices
from ..models.decoder import DecoderModel
from ..speculation.drafters import LookupDraft, ModelDraft, SelfDraft
from ..speculation.following import Speculation

if TYPE_CHECKING:
    from ..decode import Setup
    from .model import Loaded

BITS, GROUP = 4, 64  # of the draft's copy of the weights
FEW_BITS = 6.5  # bits a weight up to which a model drafts with its own weights
KIND = "int8"  # of the KV cache that has a view for drafts
KEPT = 64  # models in the file of costs


def quantspec(setup: "Setup", base: "Loaded", weights: str = "auto", fixed: int | None = None) -> "Setup":
    """The setup with self-speculation on QuantSpec's KV cache (arXiv 2502.10424). The draft reads the cache's upper
    plane. Its `weights` are the model's own ("shared"), a copy in 4 bits ("q4"), or that copy unless the model's own
    have few bits ("auto"). `fixed`: tokens of a draft, see `Speculation`. Raises MlxeffError for a model or a kind of
    cache without that view."""
    require_seam(base.model, "cache", "--quantspec")
    if setup.options.kv not in (None, KIND):
        raise MlxeffError(f"--quantspec: wanted --kv-cache {KIND}, whose upper plane drafts, got {setup.options.kv}")
    options = replace(setup.options, kv=KIND)
    base.model.new_cache(KIND)  # refuses heads that the planes do not support
    drafting = base.model
    if weights == "q4" or (weights == "auto" and bits_per_weight(base.model) > FEW_BITS):
        drafting = coarse_copy(base.model)
    drafter = SelfDraft(drafting, options)
    return replace(setup, options=options, following=_speculation(drafter, "quantspec", base, weights, fixed))


def draft_model(setup: "Setup", base: "Loaded", name: str, offline: bool = False, fixed: int | None = None) -> "Setup":
    """The setup with drafts of the model called `name`. Raises MlxeffError for a model with another vocabulary."""
    from .model import load_path

    path = hub.resolve(name, offline=offline)
    loaded = load_path(path, dict.fromkeys(base.ignored))
    _check_tokens(loaded, base, name)
    drafter = ModelDraft(loaded.model, vocabulary=base.model.vocab_size)
    return replace(setup, following=_speculation(drafter, "draft_model", base, loaded.fingerprint, fixed))


def prompt_lookup(setup: "Setup", base: "Loaded", fixed: int | None = None) -> "Setup":
    """The setup with drafts of n-grams that occurred before. Where a draft model or QuantSpec drafts already, it
    verifies these n-grams in place of drafting each token."""
    before = setup.following
    if isinstance(before, Speculation):
        before.drafter.lookup = LookupDraft()
        return setup
    return replace(setup, following=_speculation(LookupDraft(), "prompt_lookup", base, "", fixed))


def _speculation(drafter: object, name: str, base: "Loaded", what: str, fixed: int | None) -> Speculation:
    """The following with a drafter. `what` tells drafters of the same `name` apart."""
    key = f"{base.fingerprint} {name} {what} {base.backend} {kernels.device()}"
    return Speculation(drafter, name, fixed, lambda: read_costs(key), lambda costs: keep_costs(key, costs))


def bits_per_weight(model: DecoderModel) -> float:
    """Bits that a model stores for a number of its matrices."""
    bits = numbers = 0
    for module in model.modules():
        if _has_matrix(module):
            own = tree_flatten(module.parameters())
            bits += 8 * sum(array.nbytes for _, array in own)
            numbers += _numbers(module)
    return bits / numbers


def _has_matrix(module: nn.Module) -> bool:
    return modules.is_matrix(module) or isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def _numbers(module: nn.Module) -> int:
    """Numbers of a module's matrix."""
    if hasattr(module, "to_dense"):
        return module.rows * module.cols
    width = module.weight.shape[1] * 32 // module.bits if "scales" in module else module.weight.shape[1]
    return module.weight.shape[0] * width


def coarse_copy(model: DecoderModel) -> DecoderModel:
    """A copy of `model` whose matrices have 4 bits, which shares everything else with it. A notice tells its bytes.
    Matrices whose rows are no multiple of the group stay as they are."""
    copied = _copy(model)
    found = {name: _coarse(module) for name, module in copied.named_modules() if _has_matrix(module)}
    copied.update_modules(tree_unflatten(list(found.items())))
    shared = {id(array) for _, array in tree_flatten(model.parameters())}
    own = [array for _, array in tree_flatten(copied.parameters()) if id(array) not in shared]
    mx.eval(own)
    notices.info("--quantspec: drafts with a copy of the weights in 4 bits, %.0f MB", sum(a.nbytes for a in own) / 1e6)
    copied.native = None
    if model.native is not None:
        copied.use_native()
    return copied.eval()


def _coarse(module: nn.Module) -> nn.Module:
    """A module with the same matrix in 4 bits; the module itself where it has few bits already."""
    quantised = isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    if hasattr(module, "to_dense") or (quantised and module.bits <= BITS):
        return module
    matrix = modules.dense(module)
    if matrix.shape[1] % GROUP:
        return module
    table = isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    plain = modules.Embedding(1, 1) if table else modules.Linear(1, 1, bias="bias" in module)
    plain.weight = matrix.astype(mx.float16)
    if "bias" in module:
        plain.bias = module.bias
    return plain.to_quantized(GROUP, BITS)


def _copy(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules, which shares all arrays with it."""
    copied = copy.copy(module)
    for name, child in module.items():
        copied[name] = _copied(child)
    return copied


def _copied(child: object) -> object:
    if isinstance(child, nn.Module):
        return _copy(child)
    if isinstance(child, list):
        return [_copied(each) for each in child]
    return {name: _copied(each) for name, each in child.items()} if isinstance(child, dict) else child


def _check_tokens(draft: "Loaded", base: "Loaded", name: str) -> None:
    """Raises MlxeffError where ids mean other tokens in the draft model than in the base."""
    wanted, got = (each.tokenizer.vocab_size for each in (base, draft))
    if wanted != got:
        raise MlxeffError(f"{name}: vocabulary mismatch: the model has {wanted} tokens, the draft model {got}")
    ids = [*range(0, wanted, max(1, wanted // 512)), *base.tokenizer.eos_token_ids]
    for token in ids:
        own, other = (each.tokenizer.decode([token]) for each in (base, draft))
        if own != other:
            text = f"token {token} is {own!r:.40} in the model and {other!r:.40} in the draft model"
            raise MlxeffError(f"{name}: vocabulary mismatch: {text}")
    if (draft.model.vocab_size or wanted) < (rows := base.model.vocab_size or wanted):
        text = f"the model has {rows} rows, the draft model {draft.model.vocab_size}"
        raise MlxeffError(f"{name}: vocabulary mismatch: {text}")


def _costs_file() -> Path:
    return hub.cache_dir() / "speculation.json"


def read_costs(key: str) -> dict[int, float]:
    """Width → seconds of a round, as `keep_costs` wrote them; {} where nothing valid is known."""
    try:
        found = json.loads(_costs_file().read_text(encoding="utf-8"))[key]
        return {int(width): float(cost) for width, cost in found.items() if float(cost) > 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep_costs(key: str, costs: Mapping[int, float]) -> None:
    """Write what rounds cost, for the next run. A file that cannot be read is begun anew; one that cannot be written
    leaves the next run to measure again."""
    if len(costs) < 2:
        return
    path = _costs_file()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known = {name: value for name, value in known.items() if name != key}
    except (OSError, ValueError, AttributeError):
        known = {}
    known[key] = {str(width): cost for width, cost in sorted(costs.items())}
    part = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(list(known.items())[-KEPT:])), encoding="utf-8")
        os.replace(part, path)
