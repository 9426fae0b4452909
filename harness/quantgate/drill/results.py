"""What a drill found: one row per fault and variant, the mutation score, and drill.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from quantgate.files import write_json

SCHEMA_VERSION = 1


class Caught(StrEnum):
    """What became of one fault in one variant."""

    CAUGHT = "caught"
    LET_THROUGH = "LET THROUGH"
    NO_EFFECT = "no effect"
    """Not caught, known to be invisible at times, and measured to change nothing here."""
    PASSED = "passed"
    """A harmless change that no gate minded."""
    BLOCKED = "BLOCKED"
    """A harmless change that a gate minded: a false alarm."""
    NOT_JUDGED = "not judged"
    """A harmless change that no gate which passes on the sound variant looked at: it shows
    nothing, and counts neither way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRow:
    """One fault in one variant."""

    fault: str
    what: str
    variant: str
    is_harmful: bool
    outcome: Caught
    layer: str
    """The layer that decided: preflight, build, digest, lock, or one of layers.LAYERS."""
    gates: tuple[str, ...]
    """The gates that pass on the sound variant and not on this one."""
    verdict: str
    """FAIL, INVALID or INCONCLUSIVE of the first of them; "refused" where no gate was needed."""
    effect: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillResult:
    """One drill over a policy."""

    policy: str
    policy_sha256: str
    source: str
    source_sha256: str
    machine: Mapping[str, Any]
    taken_at: str
    """When it began."""
    seconds: float
    seconds_by_layer: Mapping[str, float]
    """What building, planting and each layer took."""
    rows: tuple[DrillRow, ...]
    blind_gates: Mapping[str, tuple[str, ...]]
    """By variant: gates that do not pass on the sound variant, and so can catch nothing."""
    not_applicable: Mapping[str, str]
    """Faults that no variant could have, and why."""
    advice: Mapping[str, str]
    """A gate to add, by the name of each fault that was let through."""

    @property
    def num_harmful(self) -> int:
        """Harmful faults that had an effect to be seen."""
        return self.num_caught + self.count(Caught.LET_THROUGH)

    @property
    def num_caught(self) -> int:
        return self.count(Caught.CAUGHT)

    @property
    def num_benign(self) -> int:
        """Harmless changes that were judged."""
        return self.count(Caught.PASSED) + self.num_blocked

    @property
    def num_blocked(self) -> int:
        return self.count(Caught.BLOCKED)

    @property
    def num_not_judged(self) -> int:
        return self.count(Caught.NOT_JUDGED)

    @property
    def is_clean(self) -> bool:
        """Some fault was caught, none let through; each harmless change judged, none blocked."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """As of a release: 0, 1 where a fault was let through or a harmless change blocked, 3
        where nothing was shown (a harmless change was not judged, or no fault was caught)."""
        if self.num_caught < self.num_harmful or self.num_blocked:
            return 1
        return 3 if self.num_not_judged or not self.num_caught else 0

    def count(self, outcome: Caught) -> int:
        return len(by_outcome(self.rows, outcome))


def write_drill(path: Path, result: DrillResult) -> None:
    summary = {
        "num_harmful": result.num_harmful,
        "num_caught": result.num_caught,
        "num_benign": result.num_benign,
        "num_blocked": result.num_blocked,
        "num_not_judged": result.num_not_judged,
        "is_clean": result.is_clean,
    }
    write_json(path, {"schema_version": SCHEMA_VERSION} | summary | asdict(result))


def by_outcome(rows: Sequence[DrillRow], outcome: Caught) -> list[DrillRow]:
    return [row for row in rows if row.outcome is outcome]
