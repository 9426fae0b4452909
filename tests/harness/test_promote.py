"""Promotion: only what was approved, recorded and is still the same bytes; rollback undoes it."""

from __future__ import annotations

import json
import os
import resource
from typing import TYPE_CHECKING

import pytest
import yaml

from quantgate.errors import ArtifactError, UsageError
from quantgate.files import write_json
from quantgate.promote import (
    AUDIT_NAME,
    PromotionRefused,
    is_audit_complete,
    promote,
    read_audit,
    rollback,
)
from quantgate.record import record_release
from quantgate.release import judge_stored
from quantgate.release_folder import JUDGED, ReleaseFolder, releases
from quantgate_serve.config import ConfigError, read_serving_config

if TYPE_CHECKING:
    from conftest import MiniProject

# The mini policy's KL limit lets the cast pass, and stops four bits.
APPROVED, REFUSED = "bf16", "int4-nf4"


@pytest.fixture
def release(release_copy: MiniProject) -> ReleaseFolder:
    return next(releases(release_copy.runs))


def weights_of(release: ReleaseFolder, variant: str) -> str:
    return str(release.read_state()["variants"][variant]["folder"])


def test_an_approved_variant_becomes_the_champion_with_the_digest_of_every_file(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    change = promote(release, APPROVED, serving_config=release_copy.serving_config)
    config = read_serving_config(release_copy.serving_config)
    assert (change.before, change.after) == (None, APPROVED)
    assert config.champion is not None
    assert config.champion.release == release.release_id
    assert "model.safetensors" in config.champion.files
    assert (release_copy.root / config.champion.path).is_dir()


def test_a_variant_that_is_not_approved_is_refused_with_the_gates_that_stopped_it(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    with pytest.raises(PromotionRefused, match="kl is FAIL"):
        promote(release, REFUSED, serving_config=release_copy.serving_config)
    assert not release_copy.serving_config.exists()
    assert read_audit(release_copy.serving_config) == []


def test_a_variant_that_was_never_judged_is_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    with pytest.raises(PromotionRefused, match="did not judge 'int3'; it judged bf16, int4-nf4"):
        promote(release, "int3", serving_config=release_copy.serving_config)


def test_a_release_that_is_not_recorded_is_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    release.update_state(stage=JUDGED)
    with pytest.raises(PromotionRefused, match="not in MLflow yet"):
        promote(release, APPROVED, serving_config=release_copy.serving_config)


def test_a_flipped_bit_in_the_weights_is_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    path = release_copy.root / weights_of(release, APPROVED) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="digest mismatch"):
        promote(release, APPROVED, serving_config=release_copy.serving_config)


def test_a_truncated_artifact_is_refused(release: ReleaseFolder, release_copy: MiniProject) -> None:
    path = release_copy.root / weights_of(release, APPROVED) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="digest mismatch"):
        promote(release, APPROVED, serving_config=release_copy.serving_config)


def test_verdicts_edited_to_pass_are_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    text = release.verdicts.read_text(encoding="utf-8").replace('"FAIL"', '"PASS"')
    release.verdicts.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="edited or damaged"):
        promote(release, REFUSED, serving_config=release_copy.serving_config)


def test_measurements_edited_after_judging_are_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    stored = json.loads(release.measurements.read_text(encoding="utf-8"))
    metric = "memory/peak_bytes.max"
    measured = stored["variants"][APPROVED]["measurements"]
    next(m for m in measured if m["metric"] == metric)["value"] = 1
    write_json(release.measurements, stored)
    with pytest.raises(PromotionRefused, match="does not follow from the measurements"):
        promote(release, APPROVED, serving_config=release_copy.serving_config)


def test_a_policy_loosened_after_judging_is_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    text = release.policy.read_text(encoding="utf-8").replace("max: 0.0005 nats", "max: 9 nats")
    release.policy.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"policy\.yaml: not the policy that was measured for"):
        promote(release, REFUSED, serving_config=release_copy.serving_config)


def test_verdicts_that_were_judged_again_and_not_recorded_are_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    stored = json.loads(release.measurements.read_text(encoding="utf-8"))
    measured = stored["variants"][REFUSED]["measurements"]
    at = next(i for i, m in enumerate(measured) if m["metric"] == "quality/kl_nats.mean")
    source = stored["variants"][APPROVED]["measurements"]
    measured[at] = next(m for m in source if m["metric"] == "quality/kl_nats.mean")
    write_json(release.measurements, stored)
    judge_stored(release)
    with pytest.raises(PromotionRefused, match="its verdicts are not in MLflow yet"):
        promote(release, REFUSED, serving_config=release_copy.serving_config)
    record_release(release)
    promote(release, REFUSED, serving_config=release_copy.serving_config)


def test_promoting_the_champion_again_is_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    promote(release, APPROVED, serving_config=release_copy.serving_config)
    with pytest.raises(PromotionRefused, match="is the champion already"):
        promote(release, APPROVED, serving_config=release_copy.serving_config)
    assert len(read_audit(release_copy.serving_config)) == 1


def test_rollback_restores_the_previous_champion_byte_for_byte(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    path = release_copy.serving_config
    promote(release, APPROVED, serving_config=path)
    first = read_serving_config(path).champion
    _pretend_another_was_promoted(release_copy, release)
    change = rollback(path, reason="p95 rose")
    config = read_serving_config(path)
    assert config.champion == first
    assert config.previous is None
    assert change.after == APPROVED
    assert [e["action"] for e in read_audit(path)][-1] == "rollback"
    assert read_audit(path)[-1]["reason"] == "p95 rose"


def test_rollback_to_a_previous_variant_whose_bytes_changed_is_refused(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    path = release_copy.serving_config
    promote(release, APPROVED, serving_config=path)
    _pretend_another_was_promoted(release_copy, release)
    before = path.read_bytes()
    weights = release_copy.root / weights_of(release, APPROVED) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="sha256"):
        rollback(path)
    assert path.read_bytes() == before


def test_rollback_of_the_first_promotion_needs_to_be_told_that_nothing_will_serve(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    path = release_copy.serving_config
    promote(release, APPROVED, serving_config=path)
    with pytest.raises(UsageError, match="nothing served before bf16"):
        rollback(path)
    rollback(path, allow_none=True)
    assert read_serving_config(path).champion is None


def test_rollback_without_a_promotion_says_so(release_copy: MiniProject) -> None:
    with pytest.raises(UsageError, match="nothing was promoted"):
        rollback(release_copy.serving_config)


def test_an_edited_audit_log_is_noticed(release: ReleaseFolder, release_copy: MiniProject) -> None:
    promote(release, APPROVED, serving_config=release_copy.serving_config)
    log = release_copy.serving_config.with_name(AUDIT_NAME)
    log.write_text(log.read_text(encoding="utf-8").replace('"promote"', '"restore"'), "utf-8")
    with pytest.raises(ArtifactError, match="the chain is broken"):
        read_audit(release_copy.serving_config)


def test_a_serving_config_edited_by_hand_disagrees_with_the_audit_log(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    path = release_copy.serving_config
    promote(release, APPROVED, serving_config=path)
    assert is_audit_complete(path)
    path.write_text(path.read_text(encoding="utf-8") + "# a note\n", encoding="utf-8")
    assert not is_audit_complete(path)


def test_a_full_disk_leaves_the_audit_log_whole_so_that_the_next_change_is_possible(
    release: ReleaseFolder, release_copy: MiniProject
) -> None:
    path = release_copy.serving_config
    promote(release, APPROVED, serving_config=path)
    before = path.with_name(AUDIT_NAME).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            rollback(path, allow_none=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.with_name(AUDIT_NAME).read_bytes() == before
    assert is_audit_complete(path)
    rollback(path, allow_none=True)
    assert [entry["action"] for entry in read_audit(path)] == ["promote", "rollback"]


def test_a_user_without_a_name_is_known_by_number(
    release: ReleaseFolder, release_copy: MiniProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_no_name() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", has_no_name)
    promote(release, APPROVED, serving_config=release_copy.serving_config)
    assert read_audit(release_copy.serving_config)[0]["who"] == f"uid {os.getuid()}"


def _pretend_another_was_promoted(project: MiniProject, release: ReleaseFolder) -> None:
    """Puts a second champion in by hand: the mini policy approves only one variant."""
    path = project.serving_config
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    value["previous"] = value["champion"]
    value["champion"] = value["champion"] | {"name": REFUSED, "artifact_sha256": "0" * 64}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
