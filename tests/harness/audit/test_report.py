"""audit.json: written, read back, and never a number where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from quantgate.audit.report import (
    CALIBRATED_METRICS,
    METRICS,
    AuditReport,
    WeightAudit,
    missing_audit,
    read_report,
    reduce_audit,
    write_report,
)
from quantgate.errors import MeasurementError
from quantgate.measure import Missing, Scalar

WEIGHT = WeightAudit(
    name="a.weight", shape=(4, 8), is_quantized=True, num_bits=160, relative_error=0.1,
    rounding_error=0.09, error_ratio=1.1, group_ratio=1.4, worst_group=2, group_gain=1.05,
    worst_gain_group=1, cosine=0.995, num_groups=4, num_non_finite=0, num_constant=0,
    nearest_share=0.8, problems=("p",),
)  # fmt: skip


def report(**changes: Any) -> AuditReport:
    values: dict[str, Any] = {
        "scheme": "int4-gptq", "artifact_sha256": "a", "source_sha256": "s", "is_calibrated": True,
        "calibration_tokens": 900, "calibration_surprise": 0.5, "weights": (WEIGHT,),
        "bits_per_weight": 4.5, "coverage": ("x is missing", "y is missing"), "seconds": 1.5,
    }  # fmt: skip
    return AuditReport(**values | changes)


def measured(**changes: Any) -> dict[str, Scalar | Missing]:
    return {m.metric: m for m in reduce_audit(report(**changes), source="audit.json")}  # type: ignore[misc]


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_report(tmp_path / "audit.json", report())
    assert read_report(tmp_path / "audit.json") == report()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema_version": 0, "weights": []}', '{"schema_version": 1}']
)
def test_what_is_no_audit_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MeasurementError, match="not an audit"):
        read_report(path)


def test_every_metric_is_measured_and_says_what_it_is_about() -> None:
    found = measured()
    assert tuple(found) == (*METRICS, *CALIBRATED_METRICS)
    assert all(isinstance(one, Scalar) for one in found.values())
    notes = {metric: one.note for metric, one in found.items() if isinstance(one, Scalar)}
    assert notes["audit/weight_error.ratio"] == "worst: a.weight"
    assert notes["audit/group_error.ratio"] == "worst: a.weight, group 2 of 4"
    assert notes["audit/group_gain.ratio"] == "worst: a.weight, group 1 of 4"
    assert notes["audit/coverage_difference.count"] == "x is missing (and 1 more)"


def test_a_scheme_without_calibration_has_no_metrics_of_it() -> None:
    assert tuple(measured(is_calibrated=False)) == METRICS


def test_an_audit_of_nothing_measures_nothing() -> None:
    found = measured(weights=(), bits_per_weight=None)
    assert {m for m, one in found.items() if isinstance(one, Scalar)} == {
        "audit/calibration_tokens.count",
        "audit/calibration_surprise.ratio",
    }


def test_one_weight_that_is_not_finite_leaves_no_ratio() -> None:
    broken = dataclasses.replace(
        WEIGHT, name="b.weight", error_ratio=None, group_ratio=None, group_gain=None, cosine=None,
        num_non_finite=3,
    )  # fmt: skip
    found = measured(weights=(WEIGHT, broken))
    for metric in METRICS[:4]:
        assert isinstance(found[metric], Missing), metric
    count = found["audit/non_finite.count"]
    assert isinstance(count, Scalar)
    assert (count.value, count.note) == (3, "in 1 weights, first b.weight")


def test_unknown_calibration_is_missing_not_zero() -> None:
    found = measured(calibration_tokens=None, calibration_surprise=None)
    assert isinstance(found["audit/calibration_tokens.count"], Missing)
    assert isinstance(found["audit/calibration_surprise.ratio"], Missing)


@pytest.mark.parametrize(("share", "count"), [(0.9994, 0), (0.9995, 1), (1.0, 1)])
def test_a_module_counts_as_rounded_from_the_share_on(share: float, count: int) -> None:
    weight = dataclasses.replace(WEIGHT, nearest_share=share)
    one = measured(weights=(weight,))["audit/rounded_module.count"]
    assert isinstance(one, Scalar)
    assert one.value == count


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_an_audit_that_could_not_be_made_is_missing_in_every_metric(is_calibrated: bool) -> None:
    found = missing_audit(is_calibrated, "no config.json")
    names = (*METRICS, *CALIBRATED_METRICS) if is_calibrated else METRICS
    assert [m.metric for m in found] == list(names)
    assert all(isinstance(m, Missing) and m.reason == "no config.json" for m in found)
