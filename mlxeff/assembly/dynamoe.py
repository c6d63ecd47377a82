"""DynaMoE for a loaded model: its sensitivity, and drafts of its smaller experts."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..dynamoe.install import of
from ..dynamoe.usage import CountedReading
from ..errors import MlxeffError
from ..running import FULL_VIEW
from ..speculation.drafters import SelfDraft
from ..speculation.following import Speculation

if TYPE_CHECKING:
    from ..decode import Setup
    from .model import Loaded


def with_sensitivity(setup: "Setup", base: "Loaded", value: float) -> "Setup":
    """The setup with this sensitivity. Raises MlxeffError for a model that is not a DynaMoE."""
    found = networks(base, "--sensitivity")
    native = lambda: base.model.native and base.model.native.usage  # noqa: E731
    reading = CountedReading(setup.reading, found, value, native)
    return replace(setup, reading=reading, options=replace(setup.options, fraction=value))


def with_draft(setup: "Setup", base: "Loaded", value: float, fixed: int | None) -> "Setup":
    """The setup with drafts that compute this share of the neurons: of the same weights and cache as the model, or of
    QuantSpec's where that drafts already. Raises MlxeffError for a model that is not a DynaMoE."""
    from .speculation import speculation

    networks(base, "--draft dynamoe")
    before = setup.following
    if isinstance(before, Speculation) and isinstance(before.drafter, SelfDraft):
        before.drafter.options = replace(before.drafter.options, fraction=value)
        before.about["draft_sensitivity"] = value
        return setup
    drafter = SelfDraft(base.model, replace(setup.options, fraction=value), view=FULL_VIEW)
    about = {"draft_sensitivity": value}
    following = speculation(drafter, "dynamoe_draft", base, f"{value:g}", fixed, about)
    return replace(setup, following=following)


def networks(base: "Loaded", option: str) -> list:
    """The dynamic feed-forward networks of the model. Raises MlxeffError where it has none; `option` begins the
    message."""
    if found := of(base.model):
        return found
    text = "wanted a DynaMoE model (mlxeff fit dynamoe makes one), got one with dense feed-forward networks"
    raise MlxeffError(f"{option}: {text}: {base.path}")
