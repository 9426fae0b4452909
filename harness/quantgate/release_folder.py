"""A release on disk: where each file lies, and how far the release has come."""

from __future__ import annotations

import datetime
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import ArtifactError, UsageError
from quantgate.files import read_json, write_bytes, write_json
from quantgate.measurements_file import MeasurementSet
from quantgate.policy import Policy, load_policy

RELEASE_NAME = "release.json"
SCHEMA_VERSION = 1

MEASURING, MEASURED, JUDGED, RECORDED = "measuring", "measured", "judged", "recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFolder:
    """Paths of one release under the runs folder."""

    runs: Path
    release_id: str

    @property
    def path(self) -> Path:
        return self.runs / self.release_id

    @property
    def policy(self) -> Path:
        return self.path / "policy.yaml"

    @property
    def measurements(self) -> Path:
        return self.path / "measurements.json"

    @property
    def verdicts(self) -> Path:
        return self.path / "verdicts.json"

    @property
    def load(self) -> Path:
        return self.path / "load"

    def variant(self, name: str) -> Path:
        return self.path / name

    def items(self, variant: str, golden_set: str) -> Path:
        return self.variant(variant) / f"{golden_set}.parquet"

    def audit(self, variant: str) -> Path:
        return self.variant(variant) / "audit.json"

    def distribution(self, variant: str) -> Path:
        return self.variant(variant) / "distribution.parquet"

    def served(self, variant: str) -> Path:
        return self.variant(variant) / "served.parquet"

    def rerun(self, reference: str, name: str) -> Path:
        """What the reference gave at another batch size and order: a golden set, or `served`."""
        return self.variant(reference) / "noise_floor" / f"{name}.parquet"

    def relative(self, path: Path) -> str:
        """A file of the release as measurements name it."""
        return path.relative_to(self.path).as_posix()

    def log(self, variant: str) -> Path:
        return self.variant(variant) / "server.log"

    def read_state(self) -> dict[str, Any]:
        """release.json.

        Raises:
            UsageError: there is none, or it is of another schema.
        """
        path = self.path / RELEASE_NAME
        try:
            state = read_json(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: not a release ({error}).") from error
        if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{path}: expected schema_version {SCHEMA_VERSION}.")
        return state

    def own_policy(self, measurements: MeasurementSet) -> Policy:
        """The policy that was measured for, as it was read then.

        Raises:
            SpecError: it is no policy any more.
            ArtifactError: it was edited since.
        """
        policy = load_policy(self.policy)
        if policy.sha256 != measurements.policy_sha256:
            raise ArtifactError(
                f"{self.policy}: not the policy that was measured for: it was edited since. "
                "Restore it. To see what another policy would say, write: "
                f"quantgate judge {self.path} --policy FILE"
            )
        return policy

    def update_state(self, **changes: Any) -> None:
        write_json(self.path / RELEASE_NAME, self.read_state() | changes)


@contextmanager
def claimed(release: ReleaseFolder) -> Iterator[None]:
    """Nobody else measures this release meanwhile: blocks of two processes would not pair.

    Raises:
        UsageError: somebody does.
    """
    with (release.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{release.path}: another process measures these inputs now; wait for its end."
            ) from error
        yield


def timestamp() -> str:
    """The time now as files say it: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def store_of(runs: Path) -> Path:
    """Where artifacts and results outlive a release, found again by digest."""
    return runs / "store"


def releases(runs: Path) -> Iterator[ReleaseFolder]:
    """Every release under a runs folder, newest first."""
    found = sorted(runs.glob(f"*/{RELEASE_NAME}"), reverse=True, key=lambda p: p.parent.name[-15:])
    for path in found:
        yield ReleaseFolder(runs=runs, release_id=path.parent.name)


def open_release(runs: Path, policy: Policy, identity: dict[str, Any]) -> ReleaseFolder:
    """Continues the newest interrupted release of the same inputs, or begins one.

    Args:
        identity: everything that must be equal for a release to be continued.
    """
    for folder in releases(runs):
        try:
            state = folder.read_state()
        except UsageError:
            # Of another version, or damaged: nothing that could go on.
            continue
        if state.get("identity") == identity and state.get("stage") == MEASURING:
            return folder
    now = datetime.datetime.now(datetime.UTC)
    release_id = f"{policy.policy}-{now:%Y%m%d-%H%M%S}"
    folder = ReleaseFolder(runs=runs, release_id=release_id)
    folder.path.mkdir(parents=True)
    write_bytes(folder.policy, policy.path.read_bytes())
    write_json(
        folder.path / RELEASE_NAME,
        {
            "schema_version": SCHEMA_VERSION,
            "release_id": release_id,
            "policy": policy.policy,
            "stage": MEASURING,
            "started_at": now.isoformat(timespec="seconds"),
            "identity": identity,
        },
    )
    return folder
