"""Speculative decoding for a loaded model: the drafters that the options name, and what rounds cost on this machine.

What rounds cost is kept in a file of the user's cache folder, so that a new run need not measure it first.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import hub, kernels
from ..decode import require_seam
from ..errors import MlxeffError
from ..speculation.drafters import LookupDraft, ModelDraft, SelfDraft
from ..speculation.following import Speculation
from .draft_weights import chosen, drafting

if TYPE_CHECKING:
    from ..decode import Model, Setup
    from .model import Loaded

KIND = "int8"  # of the KV cache that has a view for drafts
KEPT = 64  # models in the file of costs


def quantspec(setup: "Setup", base: "Loaded", weights: str = "auto", fixed: int | None = None) -> "Setup":
    """The setup with self-speculation on QuantSpec's KV cache (arXiv 2502.10424). The draft reads the cache's upper
    plane. `weights` says which it has, see `draft_weights.drafting`. `fixed`: tokens of a draft, see `Speculation`.
    Raises MlxeffError for a model or a kind of cache without that view."""
    require_kind(setup.options.kv)
    options = replace(setup.options, kv=KIND)
    require_planes(base.model)
    weights = chosen(base.model, weights)
    drafter = SelfDraft(drafting(base.model, weights), options)
    following = speculation(drafter, "quantspec", base, weights, fixed, {"draft_weights": weights})
    return replace(setup, options=options, following=following)


def require_kind(kind: str | None) -> None:
    """Raises MlxeffError for a kind of KV cache that was asked for and has no view for QuantSpec's drafts."""
    if kind not in (None, KIND):
        raise MlxeffError(f"--quantspec: wanted --kv-cache {KIND}, whose upper plane drafts, got {kind}")


def require_planes(model: "Model") -> None:
    """Raises MlxeffError for a model that cannot have QuantSpec's KV cache; it needs no weights."""
    require_seam(model, "cache", "--quantspec")
    model.new_cache(KIND)  # refuses heads that the planes do not support


def draft_model(setup: "Setup", base: "Loaded", name: str, offline: bool = False, fixed: int | None = None) -> "Setup":
    """The setup with drafts of the model called `name`. Raises MlxeffError for a model with another vocabulary."""
    from .model import load_path

    path = hub.resolve(name, offline=offline)
    loaded = load_path(path, dict.fromkeys(base.ignored))
    _check_tokens(loaded, base, name)
    if not loaded.model.new_cache().drops:
        raise MlxeffError(f"--draft-model {name}: wanted a KV cache that can drop tokens, this model's cannot")
    drafter = ModelDraft(loaded.model, vocabulary=base.model.vocab_size)
    return replace(setup, following=speculation(drafter, "draft_model", base, loaded.fingerprint, fixed))


def prompt_lookup(setup: "Setup", base: "Loaded", fixed: int | None = None) -> "Setup":
    """The setup with drafts of n-grams that occurred before. Where a draft model or QuantSpec drafts already, it
    verifies these n-grams in place of drafting each token."""
    before = setup.following
    if isinstance(before, Speculation):
        before.drafter.lookup = LookupDraft()
        return setup
    return replace(setup, following=speculation(LookupDraft(), "prompt_lookup", base, "", fixed))


def speculation(
    drafter: object, name: str, base: "Loaded", what: str, fixed: int | None, about: Mapping[str, object] | None = None
) -> Speculation:
    """The following with a drafter. `what` tells drafters of the same `name` apart; `about` is for its report."""
    key = f"{base.fingerprint} {name} {what} {base.backend} {kernels.device()}"
    return Speculation(drafter, name, fixed, lambda: read_costs(key), lambda costs: keep_costs(key, costs), about)


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
