"""verdicts.json: whole, its own witness, and refused as soon as it disagrees with itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantgate.measure import Binomial
from quantgate.measurements_file import MeasurementSet, VariantMeasurements
from quantgate.policy import load_policy
from quantgate.verdict import judge_release
from quantgate.verdicts_file import (
    ReleaseVerdicts,
    VerdictsFileError,
    collect_verdicts,
    read_verdicts,
    verdicts_sha256,
    write_verdicts,
)

POLICY = """\
policy: small
model: demo
variants: {bf16: {scheme: bf16}, int8: {scheme: int8-bnb}}
workload: {seed: 1, burst_requests: 8, rate: 5 req/s, requests: 9,
           prompt_tokens: [1, 2], output_tokens: [1, 2]}
gates:
  - {id: errors, metric: stability/error.rate, test: rate, max: 1 %}
"""


@pytest.fixture
def verdicts(tmp_path: Path) -> ReleaseVerdicts:
    path = tmp_path / "small.yaml"
    path.write_text(POLICY)
    policy = load_policy(path)
    errors = Binomial(metric="stability/error.rate", source="load", events=0, trials=400)
    bf16 = VariantMeasurements(
        variant="bf16",
        scheme="bf16",
        artifact_sha256="ab" * 32,
        measurements={errors.metric: errors},
    )
    measurements = MeasurementSet(
        release_id="r1",
        policy_sha256="cd" * 32,
        reference="source",
        champion="bf16",
        variants={"bf16": bf16},
        noise_floors={},
    )
    return collect_verdicts(policy, measurements, judge_release(policy, measurements))


def test_what_is_written_comes_back(verdicts: ReleaseVerdicts, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    digest = write_verdicts(path, verdicts)
    back = read_verdicts(path)
    assert back == verdicts
    assert verdicts_sha256(back) == digest == json.loads(path.read_text())["sha256"]


def test_decisions_are_found_by_variant(verdicts: ReleaseVerdicts) -> None:
    approved = verdicts.decision("bf16")
    assert approved is not None
    assert approved.approved
    assert verdicts.decision("int3") is None


def test_a_variant_without_an_artifact_has_no_digest_and_no_approval(
    verdicts: ReleaseVerdicts,
) -> None:
    assert dict(verdicts.artifacts) == {"bf16": "ab" * 32}
    unbuilt = verdicts.decision("int8")
    assert unbuilt is not None
    assert not unbuilt.approved


def test_the_digest_does_not_depend_on_spacing_or_key_order(
    verdicts: ReleaseVerdicts, tmp_path: Path
) -> None:
    path = tmp_path / "verdicts.json"
    digest = write_verdicts(path, verdicts)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert verdicts_sha256(read_verdicts(path)) == digest


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["variants"]["int8"].update(approved=True),
        lambda c: c["variants"]["int8"].update(reasons=[]),
        lambda c: c["variants"]["int8"]["verdicts"][0].update(outcome="PASS"),
        lambda c: c["variants"]["bf16"]["verdicts"][0].update(estimate=0.5),
        lambda c: c["variants"]["bf16"].update(artifact_sha256="ef" * 32),
        lambda c: c.update(policy_sha256="0"),
        lambda c: c.update(sha256="0"),
    ],
)
def test_an_edited_file_is_refused(verdicts: ReleaseVerdicts, tmp_path: Path, edit: Any) -> None:
    path = tmp_path / "verdicts.json"
    write_verdicts(path, verdicts)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(VerdictsFileError, match="do not follow from its verdicts"):
        read_verdicts(path)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda c: c.update(schema_version=2), "schema_version"),
        (lambda c: c.pop("release_id"), "release_id"),
        (lambda c: c.update(extra=1), "extra"),
        (
            lambda c: c["variants"]["bf16"]["verdicts"][0].update(extra=1),
            "variants.bf16.verdicts.0.extra",
        ),
        (
            lambda c: c["variants"]["bf16"]["verdicts"][0].update(outcome="MAYBE"),
            "variants.bf16.verdicts.0.outcome",
        ),
        (
            lambda c: c["variants"]["bf16"]["verdicts"][0].update(estimate=float("nan")),
            "variants.bf16.verdicts.0.estimate",
        ),
    ],
)
def test_another_schema_is_refused_by_field(
    verdicts: ReleaseVerdicts, tmp_path: Path, edit: Any, field: str
) -> None:
    path = tmp_path / "verdicts.json"
    write_verdicts(path, verdicts)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(VerdictsFileError, match=rf"verdicts\.json: {field}: "):
        read_verdicts(path)


def test_half_a_file_is_refused(verdicts: ReleaseVerdicts, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    write_verdicts(path, verdicts)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(VerdictsFileError, match=r"verdicts\.json: the file: Invalid JSON"):
        read_verdicts(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerdictsFileError, match=r"verdicts\.json: cannot be read"):
        read_verdicts(tmp_path / "verdicts.json")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    path.write_bytes(b"\xff")
    with pytest.raises(VerdictsFileError, match="not UTF-8"):
        read_verdicts(path)
