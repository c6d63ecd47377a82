"""The result of a benchmark, and its document, in which every verb of `mlxeff bench` writes it (docs/json.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .conditions import thermal
from .rounds import Results
from .rows import ratios, rows
from .schema import FORMAT, VERSION


@dataclass
class Result:
    """What was measured.

    card       the machine, see `machine.card`
    settings   what was asked for
    measured   samples, arms and what was skipped
    against    the arm that ratios compare with; None: no ratios
    ceilings   device → {"read_gbps", "gflops", "how"}: what the machine can do at most, as measured
    thermal_after  the conditions at the end, see `conditions.thermal`
    published  lines with published numbers beside ours, see `published.line`
    """

    card: dict
    settings: dict
    measured: Results
    against: str | None = None
    ceilings: dict[str, dict] = field(default_factory=dict)
    published: list[dict] = field(default_factory=list)
    thermal_after: dict = field(default_factory=thermal)

    @property
    def failed(self) -> bool:
        """Whether an arm failed or a sample could not be written."""
        return self.measured.failed or self.measured.samples.failed

    def document(self, notices: Sequence[str]) -> dict:
        """The document; `notices` are the lines that were shown meanwhile."""
        samples = self.measured.samples.all
        return {
            "format": FORMAT,
            "version": VERSION,
            "card": self.card | {"thermal_after": self.thermal_after},
            "settings": self.settings,
            "arms": self.measured.arms,
            "ceilings": self.ceilings,
            "results": rows(samples, self.ceilings),
            "ratios": ratios(samples, self.against) if self.against else [],
            "published": self.published,
            "samples": samples,
            "skipped": self.measured.skipped,
            "notices": list(notices),
        }
