"""Promotion and rollback: the only module that writes under `serve/`.

The audit entry is on disk before serving.yaml changes, and names the digest of what serving.yaml
will hold, so that a crash between the two is visible. Entries are chained by digest.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantgate.errors import ArtifactError, QuantgateError, UsageError
from quantgate.files import sha256_of_bytes, sha256_of_json, write_bytes
from quantgate.measure import Latencies, percentile
from quantgate.measurements_file import MeasurementSet, read_measurements
from quantgate.release_folder import RECORDED, ReleaseFolder, timestamp
from quantgate.variants.manifest import VariantManifest, digest_files, read_manifest, verify
from quantgate.verdict import judge_release
from quantgate.verdicts_file import (
    ReleaseVerdicts,
    collect_verdicts,
    read_verdicts,
    verdicts_sha256,
)
from quantgate_serve.config import (
    ServedVariant,
    ServingConfig,
    champion_folder,
    read_serving_config,
    verify_files,
)

AUDIT_NAME = "audit.jsonl"


class PromotionRefused(QuantgateError):
    """The variant may not be promoted; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What serving.yaml said before and says now."""

    action: str
    before: str | None
    after: str | None
    config: ServingConfig


def promote(
    release: ReleaseFolder, variant: str, *, serving_config: Path, reason: str = ""
) -> Change:
    """Makes an approved variant the champion, and the champion the previous one.

    Raises:
        PromotionRefused: not approved, not recorded, or the verdicts do not follow from the
            measurements.
        ArtifactError: the variant's bytes changed since they were judged, or the policy's.
    """
    state = release.read_state()
    verdicts = _checked_verdicts(release)
    decision = verdicts.decision(variant)
    if decision is None:
        known = ", ".join(d.variant for d in verdicts.decisions)
        raise PromotionRefused(
            f"{release.release_id} did not judge {variant!r}; it judged {known}."
        )
    if not decision.approved:
        reasons = "\n  ".join(decision.reasons)
        raise PromotionRefused(f"{variant} is not approved by {release.release_id}:\n  {reasons}")
    digest = verdicts_sha256(verdicts)
    recorded = state.get("record", {}).get("verdicts_sha256")
    if state.get("stage") != RECORDED or recorded != digest:
        raise PromotionRefused(
            f"{release.release_id}: its verdicts are not in MLflow yet, and a verdict is recorded "
            f"before it is acted on. Write: quantgate record {release.path}"
        )
    folder = release.runs.resolve().parent / state["variants"][variant]["folder"]
    manifest = _judged_bytes(folder, verdicts.artifacts[variant], scheme_of(state, variant))
    served = ServedVariant(
        name=variant,
        path=_relative(folder, serving_config),
        scheme=manifest.scheme,
        artifact_sha256=manifest.artifact_sha256,
        files=dict(manifest.files),
        release=release.release_id,
        verdicts_sha256=digest,
        promoted_at=timestamp(),
        slo=_baselines(read_measurements(release.measurements), variant),
    )
    with _locked(serving_config):
        old = _read_or_new(serving_config, model_name=state["source"]["name"])
        if old.champion and old.champion.artifact_sha256 == served.artifact_sha256:
            raise PromotionRefused(
                f"{old.champion.name} ({served.artifact_sha256[:12]}) is the champion already."
            )
        new = old.model_copy(update={"champion": served, "previous": old.champion})
        return _change("promote", old, new, serving_config, reason=reason)


def rollback(serving_config: Path, *, reason: str = "", allow_none: bool = False) -> Change:
    """Makes the previous variant the champion again.

    Args:
        allow_none: also when nothing served before, so that nothing serves afterwards.

    Raises:
        UsageError: nothing is promoted, or nothing served before.
        ArtifactError: the previous variant's bytes changed.
    """
    with _locked(serving_config):
        if not serving_config.is_file():
            raise UsageError(f"{serving_config}: nothing was promoted, so nothing can be undone.")
        old = read_serving_config(serving_config)
        if old.champion is None:
            raise UsageError(f"{serving_config}: no champion, so nothing can be undone.")
        if old.previous is None and not allow_none:
            raise UsageError(
                f"{serving_config}: nothing served before {old.champion.name}. To take it out and "
                "serve nothing, write: quantgate rollback --allow-none"
            )
        new = old.model_copy(update={"champion": old.previous, "previous": None})
        if new.champion is not None:
            verify_files(new.champion, champion_folder(new, serving_config))
        return _change("rollback", old, new, serving_config, reason=reason)


def read_audit(serving_config: Path) -> list[dict[str, Any]]:
    """The audit entries, oldest first.

    Raises:
        ArtifactError: an entry was changed, removed or inserted.
    """
    path = serving_config.with_name(AUDIT_NAME)
    if not path.is_file():
        return []
    entries = []
    previous = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            stated = entry.pop("sha256")
        except (ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{path}:{number}: not an audit entry ({error}).") from error
        if entry.get("previous_sha256") != previous or sha256_of_json(entry) != stated:
            raise ArtifactError(f"{path}:{number}: the chain is broken: the log was edited.")
        previous = stated
        entries.append(entry | {"sha256": stated})
    return entries


def is_audit_complete(serving_config: Path) -> bool:
    """Whether serving.yaml holds what the last audit entry says."""
    entries = read_audit(serving_config)
    if not entries:
        return True
    found = serving_config.read_bytes() if serving_config.is_file() else b""
    return bool(entries[-1]["serving_sha256"] == sha256_of_bytes(found))


def scheme_of(state: Mapping[str, Any], variant: str) -> str:
    return str(state["variants"][variant]["scheme"])


def _checked_verdicts(release: ReleaseFolder) -> ReleaseVerdicts:
    """The stored verdicts, after judging the stored measurements again: both must agree."""
    stored = read_verdicts(release.verdicts)
    measurements = read_measurements(release.measurements)
    policy = release.own_policy(measurements)
    names = [decision.variant for decision in stored.decisions]
    again = collect_verdicts(
        policy, measurements, judge_release(policy, measurements, variants=names)
    )
    if verdicts_sha256(again) != verdicts_sha256(stored):
        raise PromotionRefused(
            f"{release.verdicts}: does not follow from the measurements and the policy beside it. "
            f"It or the measurements were changed; judge again: quantgate judge {release.path}"
        )
    return stored


def _judged_bytes(folder: Path, judged_sha256: str, scheme: str) -> VariantManifest:
    """The manifest of exactly the bytes that were judged."""
    if (folder / "variant.json").is_file():
        manifest = read_manifest(folder)
        verify(folder, manifest)
    else:
        files = digest_files(folder)
        manifest = VariantManifest(scheme=scheme, files=files, source_sha256=None)
    if manifest.artifact_sha256 != judged_sha256:
        raise ArtifactError(
            f"{folder}: artifact {manifest.artifact_sha256[:12]} is not the judged "
            f"{judged_sha256[:12]}: its bytes changed. Run the release again."
        )
    return manifest


def _baselines(measurements: MeasurementSet, variant: str) -> dict[str, float]:
    """What the variant measured when it was approved, for alerts to compare with."""
    latency = measurements.variants[variant].measurements.get("perf/e2e_ms.p95")
    if not isinstance(latency, Latencies):
        return {}
    p95 = percentile(latency.values, 95.0, num_infinite=latency.failed)
    return {} if p95 is None else {"e2e_ms.p95": round(p95, 3)}


def _read_or_new(path: Path, *, model_name: str) -> ServingConfig:
    return read_serving_config(path) if path.is_file() else ServingConfig(model_name=model_name)


def _change(
    action: str, old: ServingConfig, new: ServingConfig, path: Path, *, reason: str
) -> Change:
    text = _HEADER + yaml.safe_dump(new.model_dump(mode="json"), sort_keys=False)
    data = text.encode("utf-8")
    before = old.champion.name if old.champion else None
    after = new.champion.name if new.champion else None
    entries = read_audit(path)
    entry = {
        "at": timestamp(),
        "action": action,
        "who": _user(),
        "reason": reason,
        "before": _identity(old.champion),
        "after": _identity(new.champion),
        "serving_sha256": sha256_of_bytes(data),
        "previous_sha256": entries[-1]["sha256"] if entries else None,
    }
    _append_audit(path.with_name(AUDIT_NAME), entry | {"sha256": sha256_of_json(entry)})
    write_bytes(path, data)
    return Change(action=action, before=before, after=after, config=new)


_HEADER = "# Written by `quantgate promote` and `quantgate rollback`; reviewed by people.\n"


def _identity(variant: ServedVariant | None) -> dict[str, str] | None:
    if variant is None:
        return None
    return variant.model_dump(
        include={"name", "artifact_sha256", "release", "verdicts_sha256"}, mode="json"
    )


def _append_audit(path: Path, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry, sort_keys=True, ensure_ascii=False) + "\n"
    before = path.read_bytes() if path.is_file() else b""
    # Whole: half a line, where the disk is full, would break the chain for every later change.
    write_bytes(path, before + line.encode("utf-8"))


def _user() -> str:
    """Who changes what serves, by number where the system has no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@contextmanager
def _locked(serving_config: Path) -> Iterator[None]:
    """One change at a time: two promotions at once would lose one of them."""
    serving_config.parent.mkdir(parents=True, exist_ok=True)
    with serving_config.with_name(".serving.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _relative(folder: Path, serving_config: Path) -> str:
    root = serving_config.resolve().parent.parent
    folder = folder.resolve()
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
