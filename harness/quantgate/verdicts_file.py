"""`verdicts.json`: verdicts and the decision per variant, with the digest that promotion checks.

The file repeats `approved` and `reasons` for its readers; whoever reads it back gets them derived
from the verdicts again, and a file that disagrees with itself is refused.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from quantgate.errors import ArtifactError
from quantgate.files import sha256_of_json, write_json
from quantgate.measurements_file import MeasurementSet
from quantgate.policy import Policy
from quantgate.verdict import Decision, Verdict

SCHEMA_VERSION = 1

JsonObject: TypeAlias = dict[str, Any]


class VerdictsFileError(ArtifactError):
    """A verdicts file that nothing may be promoted from; the message names file and field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseVerdicts:
    """What a release decided, about which bytes, under which policy.

    `artifacts` maps each decided variant to the sha256 of the artifact that was measured, and
    leaves out a variant that was never built.
    """

    release_id: str
    policy: str
    policy_sha256: str
    reference: str
    champion: str
    artifacts: Mapping[str, str]
    decisions: tuple[Decision, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "artifacts", types.MappingProxyType(dict(self.artifacts)))

    def decision(self, variant: str) -> Decision | None:
        """None: this release decided nothing about the variant, which is no approval."""
        return next((one for one in self.decisions if one.variant == variant), None)


def collect_verdicts(
    policy: Policy, measurements: MeasurementSet, decisions: tuple[Decision, ...]
) -> ReleaseVerdicts:
    """Put decisions next to the digests of what they are about."""
    return ReleaseVerdicts(
        release_id=measurements.release_id,
        policy=policy.policy,
        policy_sha256=policy.sha256,
        reference=measurements.reference,
        champion=measurements.champion,
        artifacts={
            decision.variant: measurements.variants[decision.variant].artifact_sha256
            for decision in decisions
            if decision.variant in measurements.variants
        },
        decisions=decisions,
    )


def verdicts_sha256(verdicts: ReleaseVerdicts) -> str:
    """The digest of everything the file says, whatever its spacing and key order."""
    return sha256_of_json(_content(verdicts))


def write_verdicts(path: Path, verdicts: ReleaseVerdicts) -> str:
    """Replace `path` as a whole; returns `verdicts_sha256`."""
    value = verdicts_json(verdicts)
    write_json(path, value)
    return str(value["sha256"])


def verdicts_json(verdicts: ReleaseVerdicts) -> JsonObject:
    """What the file holds."""
    return {**_content(verdicts), "sha256": verdicts_sha256(verdicts)}


def read_verdicts(path: Path) -> ReleaseVerdicts:
    """Read what `write_verdicts` wrote.

    Raises:
        VerdictsFileError: no file, not this schema, or edited: digest, `approved` or `reasons` do
            not follow from the verdicts.
    """
    try:
        text = path.read_text(encoding="utf-8")
        stored = _StoredRelease.model_validate_json(text)
    except OSError as error:
        raise VerdictsFileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise VerdictsFileError(f"{path}: not UTF-8 text") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise VerdictsFileError(f"{path}: {where}: {first['msg']}") from error
    verdicts = stored.to_verdicts()
    if verdicts_json(verdicts) != json.loads(text):
        raise VerdictsFileError(
            f"{path}: its digest or its decisions do not follow from its verdicts; "
            "it was edited or damaged: judge the release again"
        )
    return verdicts


class _StoredDecision(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    artifact_sha256: str | None
    approved: bool
    reasons: tuple[str, ...]
    problems: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


class _StoredRelease(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1]
    release_id: str
    policy: str
    policy_sha256: str
    reference: str
    champion: str
    variants: dict[str, _StoredDecision]
    sha256: str

    def to_verdicts(self) -> ReleaseVerdicts:
        return ReleaseVerdicts(
            release_id=self.release_id,
            policy=self.policy,
            policy_sha256=self.policy_sha256,
            reference=self.reference,
            champion=self.champion,
            artifacts={
                name: stored.artifact_sha256
                for name, stored in self.variants.items()
                if stored.artifact_sha256 is not None
            },
            decisions=tuple(
                Decision(variant=name, verdicts=stored.verdicts, problems=stored.problems)
                for name, stored in self.variants.items()
            ),
        )


def _content(verdicts: ReleaseVerdicts) -> JsonObject:
    return {
        "schema_version": SCHEMA_VERSION,
        "release_id": verdicts.release_id,
        "policy": verdicts.policy,
        "policy_sha256": verdicts.policy_sha256,
        "reference": verdicts.reference,
        "champion": verdicts.champion,
        "variants": {
            decision.variant: {
                "artifact_sha256": verdicts.artifacts.get(decision.variant),
                "approved": decision.approved,
                "reasons": list(decision.reasons),
                "problems": list(decision.problems),
                "verdicts": [dataclasses.asdict(verdict) for verdict in decision.verdicts],
            }
            for decision in verdicts.decisions
        },
    }
